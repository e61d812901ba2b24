"""AC: train the network to predict, for the concept's prompt, what it predicts for the anchor's.

Paper: Kumari et al. 2023, "Ablating Concepts in Text-to-Image Diffusion Models" (model-based).

    python baselines/ac.py --concept airplane --anchor sky [--set preset=mini]      # the preset is ours

x: pictures that the model draws of the anchor's prompts c*; c: the same prompt with the concept in the
anchor's place; z_t: the noised latent of x; M: a mask; sg: no gradient.

    L = Σ M (ε(z_t, c, t) − sg ε(z_t, c*, t))² / Σ M            mean over a batch

It trains keys and values of the cross-attention; begin-of-text's are detached. No list of what must stay.

As published: the teacher is the network that learns, without gradient, as the anchor hardly changes.
As coded: 200 captions of a language model, 1,000 pictures, 100 steps at 2e-6 × 2 GPUs × batch 4 = 1.6e-5.
    Σ M counts a pixel once, the sum above it four channels: four times the mean square. Objects are
    mirrored, and shrunk (66 %, on grey, outside M) or enlarged, and c alone says so: "a far away …".
As here: the task's template, alone and with nouns beside the anchor; fewer pictures, by DDIM with the model's
    own guidance, not 6; styles replace the anchor, too. Left out: prior preservation, memorised pictures.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import Job, run
from plumbing import UserError
from plumbing.book import book, nouns, same_word
from plumbing.prompts import TASKS, filled
from plumbing.training import begin, descend, tell

FAR, NEAR = ("a far away ", "very small "), ("zoomed in ", "close up ")


@dataclass(frozen=True)
class Settings:
    steps: int = 100            # all are the authors' values, but for `pictures`
    lr: float = 1.6e-5          # of AdamW
    batch: int = 8
    pictures: int = 64          # of each anchor; the authors have 1,000
    augment: bool = True        # objects; styles and people never are
    as_published: bool = True   # False: mean over the channels
    PRESETS = {"mini": dict(lr=1e-4)}                             # the best of six rates: docs/methods.md

    def __post_init__(self):
        if min(self.steps, self.lr, self.batch, self.pictures) <= 0:
            raise UserError("the settings need steps, lr, batch and pictures above 0")


def captions(words: tuple[str, str], task: str) -> list[tuple[str, str]]:
    """Of (concept, anchor) -> (c, c*): prompts of the concept, each with the anchor's."""
    kept = [noun for noun in nouns("preserved") if noun not in book()["classes"]
            and not any(same_word(noun, word) for word in words)]
    return [tuple(filled(TASKS[task][0], word) + more for word in words)
            for more in ("", *(f" and the {noun}" for noun in kept))]


def augmented(x: Tensor, factor: int, augment: bool, generator) -> tuple[Tensor, Tensor, str]:
    """x [3, S, S] in [-1, 1] -> the same shape, its mask [1, S/factor, S/factor], and words before c."""
    S = side = x.shape[-1]
    mirror, kind, size, word, *corner = torch.rand(6, generator=generator).tolist()
    if augment:
        low, high = (S // 3, S + 1) if kind < 0.66 else (int(1.2 * S), int(1.4 * S))
        side = low + int(size * (high - low))
        x = x.flip(-1) if mirror < 0.5 else x
        x = F.interpolate(x[None], (side, side), mode="bilinear", antialias=True)[0]
    words = (FAR if side < 0.6 * S else NEAR if side > S else ("", ""))[int(2 * word)]
    free, sign = S - side, 1 if side <= S else -1                 # negative: so much is cut off
    top, left = (sign * int(u * (sign * free + 1)) for u in corner)
    mask = torch.full((1, S // factor, S // factor), float(side > S))
    rows, columns = (slice(at // factor + 1, (at + side) // factor - 1) for at in (top, left))
    mask[:, rows, columns] = 1                                    # all but the seam
    return F.pad(x, (left, free - left, top, free - top)), mask, words               # 0 is grey


def read(unet, W: dict[str, Tensor], c: Tensor) -> dict:
    """As `UNet.read`, with keys and values of W; those of begin-of-text, row 0, are detached."""
    def y(name: str) -> Tensor:                                   # [B, T, C]
        rows = F.linear(c, W[f"{name}.weight"].to(c.dtype))
        return torch.cat([rows[:, :1].detach(), rows[:, 1:]], 1)
    return {unet.get_submodule(name): (y(f"{name}.to_k"), y(f"{name}.to_v"))
            for name in {name.rpartition(".to_")[0] for name in W}}


def ac_loss(unet, W: dict, z: Tensor, t: Tensor, c: Tensor, c_star: Tensor, mask: Tensor, as_published=True):
    """L, differentiable in W: z [B, 4, h, w], t [B], c, c_star [B, T, D], mask [B, 1, h, w]."""
    with torch.no_grad():
        target = unet(z, t, read(unet, W, c_star)).float()
    square = mask * (unet(z, t, read(unet, W, c)).float() - target).square()
    # The quirk: the four channels are summed. AdamW would not notice, but gradients are cut at length 1.
    loss = (square.sum((1, 2, 3)) / mask.sum((1, 2, 3)).clamp(min=1)).mean()
    return loss if as_published else loss / z.shape[1]


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    if not all(pair.anchor for pair in job.pairs):
        raise UserError("AC needs an --anchor: the concept's prompt learns what it predicts for the anchor's")
    W, model, generator = begin(job, job.W0), job.model, torch.Generator().manual_seed(job.seed)
    augment, times = s.augment and job.task == "object", len(model.scheduler.alphas_cumprod)
    both = [two for pair in job.pairs for two in captions((pair.concept, pair.anchor), job.task)]
    c, c_star = map(list, zip(*(both[i % len(both)] for i in range(s.pictures * len(job.pairs)))))
    said = [words + prompt for prompt in dict.fromkeys(c + c_star) for words in ("", *FAR, *NEAR)]
    rows = dict(zip(said, job.text(said).to(model.device, model.dtype)))
    job.report |= {"prompts": {"erased": c, "anchor": c_star, "retained": []}, "stored in": "float32"}
    x = 2 * model.draw(c_star, [job.seed + i for i in range(len(c))]) - 1      # [pictures, 3, S, S]
    job.clock("pictures of the anchor")

    def loss(step: int) -> Tensor:
        some = torch.randint(len(x), (s.batch,), generator=generator).tolist()
        pictures, masks, words = zip(*(augmented(x[i], model.vae.factor, augment, generator) for i in some))
        noise, own = torch.randn(2, s.batch, *model.latent, generator=generator).to(model.device)
        t = torch.randint(times, (s.batch,), generator=generator).to(noise.device)
        mean, logvar = model.vae.encode(torch.stack(pictures).to(model.device, model.dtype))
        z0 = model.vae.scaling_factor * (mean.float() + (logvar.float() / 2).exp() * own)
        z = model.scheduler.add_noise(z0, noise, t).to(model.dtype)
        e = torch.stack([rows[before + c[i]] for before, i in zip(words, some)])
        e_star, mask = torch.stack([rows[c_star[i]] for i in some]), torch.stack(masks).to(z.device)
        return ac_loss(model.unet, W, z, t, e, e_star, mask, s.as_published)

    tell(job, descend(W.values(), loss, s.steps, torch.optim.AdamW(W.values(), s.lr), "AC", 1, model.dtype))
    job.clock("training")
    return W


if __name__ == "__main__":
    run("AC", __doc__, Settings, erase)
