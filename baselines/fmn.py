"""FMN (Forget-Me-Not): train the network until nothing in a picture looks at the concept's tokens.

Paper: Zhang et al. 2023, "Forget-Me-Not: Learning to Forget in Text-to-Image Diffusion Models".

    python baselines/fmn.py --concept airplane
    python baselines/fmn.py --concept airplane --set preset=mini  # ours, for mini
    python baselines/fmn.py --concept airplane --set trains=attn2 lr=1e-5

Its "attention resteering": P holds the cross-attention probabilities of all layers, heads and pixels at the
columns C of the concept's prompt, while the network looks at a noisy picture of the concept, z_t:

    L = ‖P‖_F,   P = (softmax(Q Kᵀ / √d)[:, c])  for c in C, all layers in one norm

There is no anchor and nothing that must stay: short training alone protects the rest.
Trains: the whole U-Net, or attn2. Needs: pictures of the concept.

    as published   C is the concept's tokens
    as coded       and every end token: on SD v1, whose padding is end tokens, some 70 columns, on SD v2 one.
                   as_published=false takes one on any model. One norm, so the layers with most pixels weigh
                   most. Pictures are the user's, some 4 to 8; textual inversion of the concept comes first
    as here        the model draws the pictures itself, and the concept is its word; --anchor changes nothing
                   but what is watched
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import Job, run
from plumbing import UserError
from plumbing.attention import attention_of, concept_columns
from plumbing.prompts import TASKS
from plumbing.training import begin, descend, drawn_latents, noisy, predict


@dataclass(frozen=True)
class Settings:
    """The authors' values."""
    trains: str = "unet"        # unet: all of it; attn2: cross-attention alone
    steps: int = 35
    lr: float = 2e-6
    pictures: int = 8           # of the concept, to learn from
    as_published: bool = True   # see "as coded"
    PRESETS = {"mini": dict(lr=3e-5)}                             # the best of six rates: docs/methods.md

    def __post_init__(self):
        if self.trains not in ("unet", "attn2"):
            raise UserError(f"the settings need trains = unet or attn2, not {self.trains}")
        if not min(self.steps, self.lr, self.pictures) > 0:
            raise UserError("the settings need steps, lr and pictures above 0")


def resteering(seen: list[Tensor], columns: list[int]) -> Tensor:
    """L: one norm over the probabilities [B, heads, pixels, T] of every layer in `seen` at these columns."""
    return torch.cat([P[..., columns].float().flatten() for P in seen]).norm()


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    model, template = job.model, TASKS[job.task][0]
    W = begin(job, [name for name, _ in model.unet.named_parameters()
                    if s.trains == "unet" or ".attn2." in name])
    seeds, generator = [job.seed + i for i in range(s.pictures)], torch.Generator().manual_seed(job.seed)
    z0 = [drawn_latents(model, template.format(pair.concept), seeds) for pair in job.pairs]
    columns = [concept_columns(job.text.tokenizer, template, pair.concept, padding=s.as_published)
               for pair in job.pairs]
    job.clock("pictures to learn from")

    def loss(step: int) -> Tensor:
        k, i = step % len(job.pairs), torch.randint(s.pictures, (), generator=generator)
        z, t, _ = noisy(model, z0[k][i][None], generator)
        with attention_of(model.unet) as seen:
            predict(model.unet, z, t, job.pairs[k].e[None], W)
        return resteering(seen, columns[k])

    losses = descend(W.values(), loss, s.steps, torch.optim.AdamW(W.values(), s.lr),           # decay 0.01
                     "attention resteering", clip=1, dtype=model.dtype)
    print(f"‖P‖ at {len(columns[0])} columns: {losses[0]:.4g} → {losses[-1]:.4g}")
    job.report |= {"losses": [losses[0], losses[-1]], "columns": columns, "prompts": {
        "erased": [template.format(pair.concept) for pair in job.pairs], "anchor": [], "retained": []}}
    job.clock("training")
    return {name: w.detach() for name, w in W.items()}


if __name__ == "__main__":
    run("FMN", __doc__, Settings, erase, anchor="")
