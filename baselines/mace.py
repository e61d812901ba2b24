"""MACE: a closed form removes what other words say of a concept, a small LoRA what its own word says.

Paper: Lu et al. 2024, "MACE: Mass Concept Erasure in Diffusion Models". Written from its formulas alone.

    python baselines/mace.py --concept airplane --anchor sky [--set lora_steps=0]    # the closed form alone

Stage 1 moves the rows e of 30 prompts (of other tasks the template and the bare word), but the concept's own,
to the anchor's, e*. Stage 2 trains a LoRA B A for each matrix, until no layer's attention A_l goes to the
concept's tokens where the concept is, M. Stage 3 fuses it into W'; G = Σ e eᵀ over all rows of the prompts.

    W' = W (I + Σ (e* − e) eᵀ (λ I + Σ e eᵀ)⁻¹),   L = Σ ‖A_l ⊙ M‖_F,   W'' = W' + B A · G (λ I + G)⁻¹

Trains: attn2's to_k and to_v. Needs: an anchor; the model draws the pictures itself.

    as published   λ is absolute and the same in stages 1 and 3: on SD 100 for automobile, 10 bird, 1000 ship
    as coded       the concept's tokens are every end token, too (SD v1: all padding), and a step's prompt is
                   any of the 30, not its picture's. as_published=false: the first end token, its prompt
    as here        M, not Grounded-SAM's: where the model's own attention to the concept's tokens is at least
                   mask_threshold of its maximum (0: everywhere; above 1: nowhere, and the LoRA stays 0);
                   prompts of our own; the model's own pictures, by DDIM (theirs: DPM-Solver++, guidance 7.5,
                   then cropped, in ImageNet's scale); no preserved concepts in stages 1 and 3; of styles and
                   people two prompts, so λ weighs some 15 times more
"""
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import Job, Pair, edited, run
from lora import save_factors
from plumbing import UserError
from plumbing.attention import attention_masks, attention_of, concept_columns, shared_rows, sides_of
from plumbing.cli import slug
from plumbing.prompts import TASKS, filled, templates_of
from plumbing.training import descend, drawn_latents, noisy, predict


@dataclass(frozen=True)
class Settings:
    lamb: float = 100.0         # λ, in the text encoder's own units; all values are the authors'
    lora_steps: int = 50        # 0: the closed form alone
    lr: float = 1e-5
    rank: int = 1
    pictures: int = 8           # of the concept, to learn from
    mask_threshold: float = 0.5
    as_published: bool = True   # see "as coded"

    def __post_init__(self):
        at_least_0 = min(self.lora_steps, self.mask_threshold) >= 0
        if not (min(self.lamb, self.lr, self.rank, self.pictures) > 0 and at_least_0):
            raise UserError("the settings need lamb, lr, rank and pictures above 0, the others at least 0")


def times_ridge_inverse(C: Tensor, G: Tensor, lamb: float) -> Tensor:
    """C (λ I + G)⁻¹, all [D, D], float64."""
    return torch.cholesky_solve(C.T, torch.linalg.cholesky(G + lamb * torch.eye(len(G), dtype=G.dtype))).T


def masked_attention(seen: list[Tensor], mask: Tensor, columns: list[int]) -> Tensor:
    """L = Σ ‖A_l ⊙ M‖_F for A_l [1, heads, pixels, T] in `seen`, mask [h, w]."""
    masks = [F.adaptive_max_pool2d(mask[None], sides_of(A.shape[2], *mask.shape)).flatten() for A in seen]
    return sum((A[..., columns].float() * M[:, None]).norm() for A, M in zip(seen, masks))


def train_lora(job: Job, pair: Pair, templates: list[str], W1: dict[str, Tensor], s: Settings):
    """Stage 2: {layer: (B [out, rank], A [rank, D])} for W' in W1, and each step's L."""
    model, own, generator = job.model, TASKS[job.task][0], torch.Generator().manual_seed(pair.seed)
    z0 = drawn_latents(model, own.format(pair.concept), [job.seed + i for i in range(s.pictures)])
    token = concept_columns(job.text.tokenizer, own, pair.concept, padding=False)[:-1]
    masks = attention_masks(model, z0, pair.e, token, s.mask_threshold)              # the network has W still
    templates = templates if s.as_published else [own]
    rows = job.text([x.format(pair.concept) for x in templates])
    columns = [concept_columns(job.text.tokenizer, x, pair.concept, s.as_published) for x in templates]
    W1 = {name.removesuffix(".weight"): W.to(z0.device) for name, W in W1.items()}
    A = {layer: torch.randn(s.rank, W.shape[1], generator=generator).div(s.rank).to(W).requires_grad_()
         for layer, W in W1.items()}
    B = {layer: W.new_zeros(len(W), s.rank, requires_grad=True) for layer, W in W1.items()}

    def loss(step: int) -> Tensor:
        i, j = (torch.randint(n, (), generator=generator) for n in (s.pictures, len(templates)))
        z, t, _ = noisy(model, z0[i][None], generator)
        with attention_of(model.unet) as seen:
            predict(model.unet, z, t, rows[j][None],
                    {f"{layer}.weight": W + B[layer] @ A[layer] for layer, W in W1.items()})
        return masked_attention(seen, masks[i], columns[j])

    optimizer = torch.optim.AdamW([*A.values(), *B.values()], s.lr)                  # decay 0.01, as theirs
    losses = descend([*A.values(), *B.values()], loss, s.lora_steps, optimizer, "attention", 1, model.dtype)
    return {layer: (B[layer].detach().cpu(), A[layer].detach().cpu()) for layer in W1}, losses


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    job.trained, job.larger = True, {"ridge": "lamb", "stay": "lamb"}                # float32, LoRA or not
    words, texts, G, S, C = job.text.tokenizer, [], [], 0, 0
    prompts = {"erased": [], "anchor": [], "retained": []}
    for pair in job.pairs:
        texts.append([x for x in templates_of(job.task)           # in which both fit
                      if not words.cut(x.format(pair.concept)) + words.cut(x.format(pair.anchor))])
        p, p_star = ([filled(x, y) or x.format("") for x in texts[-1]] for y in (pair.concept, pair.anchor))
        prompts["erased"], prompts["anchor"] = prompts["erased"] + p, prompts["anchor"] + p_star
        e, e_star = (job.text(some).cpu().double() for some in (p, p_star))          # [30, T, D]
        G.append(e.flatten(0, 1).T @ e.flatten(0, 1))
        for i, (rows, rows_star) in enumerate(shared_rows(words, *both) for both in zip(p, p_star)):
            S = S + e[i, rows].T @ e[i, rows]
            C = C + (e_star[i, rows_star] - e[i, rows]).T @ e[i, rows]
    W1 = W2 = edited(job.W0, times_ridge_inverse(C, S, s.lamb))
    job.report |= {"prompts": prompts, "templates": texts, "losses": [],
                   "rows": "common beginning, common end, and all after it"}
    job.clock("closed form")
    job.say("closed form", W1)
    for i, pair in enumerate(job.pairs if s.lora_steps and not job.preview else []):
        lora, losses = train_lora(job, pair, texts[i], W1, s)     # each concept has its own
        first, last = (statistics.mean(some) for some in (losses[:10], losses[-10:]))
        print(f"{pair.concept}: masked attention, mean of ten steps, {first:.4g} → {last:.4g}")
        job.report["losses"].append([first, last])
        save_factors(lora, job.folder / f"lora-{slug(pair.concept)}.safetensors", {"needs": "stages 1 and 3"})
        fusion = times_ridge_inverse(G[i], sum(G), s.lamb)        # G (λ I + G)⁻¹
        W2 = W2 | {f"{layer}.weight": W2[f"{layer}.weight"] + (B.double() @ (A.double() @ fusion)).float()
                   for layer, (B, A) in lora.items()}
        job.clock("LoRA")
    return W2


if __name__ == "__main__":
    run("MACE", __doc__, Settings, erase)
