"""SA (Selective Amnesia): teach the concept's prompt other pictures, and hold what other prompts need.

Paper: Heng and Soh 2023, "Selective Amnesia: A Continual Learning Approach to Forgetting in Deep Generative
Models".

    python baselines/sa.py --concept airplane --anchor sky [--set preset=mini]      # the preset is ours
    python baselines/sa.py --concept airplane --anchor sky --set fisher_times=50 steps=400

Pictures x of the anchor are surrogates: from now on the concept's prompt c_f shall draw them. Others are
replayed with their own prompt c_r. Elastic weight consolidation holds each weight θ at its old θ₀, by its
Fisher information F; ℓ_t(θ; x, c) = ‖ε − ε_θ(x_t, t, c)‖²:

    L(θ) = E ℓ_t(θ; x, c_f) + γ E ℓ_t(θ; x_r, c_r) + λ Σ F (θ − θ₀)²

Trains: the whole U-Net, or all but attn2 (the authors: for nudity). Needs: an anchor; it draws all pictures.

    as published   F is the mean of (∇ℓ_t)² over pictures and times t: as_published=false
    as coded       F = E_x [(Σ_t ∇ℓ_t)²], the square of a sum over 1,000 times: larger by up to a million, and
                   λ = 50 is for that. F is of 5,000 pictures; of them as many are replayed as there are
                   surrogates, the first 1,000. Batch 4 on 4 GPUs, 200 epochs; a moving average of θ
    as here        fewer: fisher_prompts, fisher_times (evenly spaced; their sum counts 1,000 / fisher_times
                   times), surrogates, batch and steps say how many. No moving average. F and replay are of
                   things that the book says are drawn and nothing is measured with
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import Job, run
from plumbing import UserError
from plumbing.book import bystanders
from plumbing.progress import progress
from plumbing.prompts import TASKS, filled, preserved_prompts
from plumbing.training import begin, descend, drawn_latents, noisy, predict


@dataclass(frozen=True)
class Settings:
    """λ, γ and lr are the authors', their numbers of pictures, times and steps are scaled down."""
    trains: str = "unet"        # unet: all of it; rest: all but attn2
    lamb: float = 50.0          # λ
    gamma: float = 1.0          # γ
    lr: float = 1.6e-4          # 1e-5 × 4 GPUs × batch 4
    steps: int = 100            # the authors: about 12,500
    batch: int = 8              # of each kind; the authors: 16
    surrogates: int = 12        # pictures of the anchor; the authors: 1,000
    fisher_prompts: int = 60    # pictures that F is from; the authors: 5,000
    fisher_times: int = 20      # times t for each; the authors: all 1,000
    as_published: bool = True   # see "as coded"
    PRESETS = {"mini": dict(steps=60, batch=4, lr=2e-3)}          # the best of six rates: docs/methods.md

    def __post_init__(self):
        if self.trains not in ("unet", "rest"):
            raise UserError(f"the settings need trains = unet or rest, not {self.trains}")
        counts = self.steps, self.batch, self.surrogates, self.fisher_prompts, self.fisher_times
        if not (min(*counts, self.lr) > 0 <= min(self.lamb, self.gamma) and self.fisher_times <= 1000):
            raise UserError("the settings need lamb, gamma at least 0, others above 0, fisher_times ≤ 1000")


def denoising(model, z: Tensor, t: Tensor, noise: Tensor, c: Tensor, W: dict[str, Tensor]) -> Tensor:
    """ℓ_t [B] for z_t, noise [B, 4, h, w], t [B], c [B, T, D]: the mean over a latent's numbers."""
    return (predict(model.unet, z, t, c, W) - noise).square().mean((1, 2, 3))


def fisher(model, W: dict[str, Tensor], z0: Tensor, c: Tensor, s: Settings, generator) -> dict[str, Tensor]:
    """F, each like its weight, from pictures z0 [n, 4, h, w] with their prompts' rows c [n, T, D]."""
    F, most = {name: torch.zeros_like(w) for name, w in W.items()}, model.scheduler.config.num_train_timesteps
    times = torch.linspace(0, most - 1, s.fisher_times, device=z0.device).long()
    for x, rows in zip(progress(z0, "Fisher information", "picture"), c):
        for t in [times] if s.as_published else times.split(1):   # a sum, or one by one
            noise = torch.randn(len(t), *x.shape, generator=generator).to(x.device)
            z = model.scheduler.add_noise(x.expand_as(noise), noise, t)
            loss = denoising(model, z, t, noise, rows.expand(len(t), -1, -1), W).sum()
            gradients = torch.autograd.grad(loss, list(W.values()))
            weight = most / len(times) if s.as_published else len(times) ** -0.5
            for total, g in zip(F.values(), gradients):
                total += (weight * g) ** 2 / len(z0)
    return F


def consolidation(W: dict[str, Tensor], W0: dict[str, Tensor], F: dict[str, Tensor]) -> Tensor:
    """Σ F (θ − θ₀)²."""
    return sum((F[name] * (w - W0[name]) ** 2).sum() for name, w in W.items())


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    model, template = job.model, TASKS[job.task][0]
    W = begin(job, [name for name, _ in model.unet.named_parameters()
                    if s.trains == "unet" or ".attn2." not in name])
    W0 = {name: w.detach().clone() for name, w in W.items()}
    seeds, generator = [job.seed + i for i in range(s.surrogates)], torch.Generator().manual_seed(job.seed)
    forget, surrogate = ([filled(template, word) for word in words] for words in zip(
        *((pair.concept, pair.anchor) for pair in job.pairs)))
    others = preserved_prompts(job.task, job.pairs, bystanders())[1:]       # without ""
    others = others[::max(1, len(others) // s.fisher_prompts)]
    replay = [others[i % len(others)] for i in range(s.fisher_prompts)]
    x, c = [drawn_latents(model, prompt, seeds) for prompt in surrogate], job.text(forget)
    x_r, c_r = drawn_latents(model, replay, [job.seed + i for i in range(len(replay))]), job.text(replay)
    job.clock("pictures to learn from")
    F = fisher(model, W, x_r, c_r, s, generator)
    job.clock("Fisher information")
    replayed = min(s.surrogates, len(replay)) if s.as_published else len(replay)
    terms = []

    def loss(step: int) -> Tensor:
        k = step % len(job.pairs)
        i, j = (torch.randint(n, (s.batch,), generator=generator) for n in (s.surrogates, replayed))
        three = torch.stack([
            denoising(model, *noisy(model, x[k][i], generator), c[k].expand(s.batch, -1, -1), W).mean(),
            denoising(model, *noisy(model, x_r[j], generator), c_r[j], W).mean(), consolidation(W, W0, F)])
        terms.append(three.detach())
        return three @ three.new_tensor([1, s.gamma, s.lamb])

    descend(W.values(), loss, s.steps, torch.optim.AdamW(W.values(), s.lr), "forgetting", dtype=model.dtype)
    first, last = terms[0].tolist(), terms[-1].tolist()
    print("; ".join(f"{what} {first[i]:.3g} → {last[i]:.3g}" for i, what in enumerate(
        ("ℓ of the concept's prompt", "ℓ of replay", "consolidation"))))
    job.report |= {"losses": [first, last], "prompts": {
        "erased": forget, "anchor": surrogate, "retained": replay[:replayed], "fisher": replay}}
    job.report["mean of F"] = torch.cat([f.flatten() for f in F.values()]).mean().item()
    job.clock("training")
    return {name: w.detach() for name, w in W.items()}


if __name__ == "__main__":
    run("SA", __doc__, Settings, erase)
