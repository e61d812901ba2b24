"""SPM: a rank-1 adapter in every layer of the transformers erases, as strongly as the prompt asks for it.

Paper: Lyu et al. 2024, "One-dimensional Adapter to Rule Them All" (concept-SemiPermeable Membrane).

    python baselines/spm.py --concept airplane --set preset=mini [as_published=false]      # half a minute
    python baselines/spm.py --concept "van gogh" --task style --model CompVis/stable-diffusion-v1-4

It trains W = W₀ + m · up · down (up [out, 1], down [1, in · kernel]) of all linear and convolutional layers
of the transformers, 192 in SD v1, and needs the word alone. c, n are rows of the bare concept and the anchor
(the authors' "neutral" text: "" unless given), a are random rows:

    L = ‖ε(z_t, c) − (ε₀(n) − g (ε₀(c) − ε₀(n)))‖² + λ mean_a ‖ε(z_t, a) − ε₀(z_t, a)‖²   latent anchoring
    m(p) = max over concepts of max(cos(e(p), e(c)), fraction of c's tokens that p has)   at drawing

z_t: the adapted network draws c with guidance 3 and stops at a random step. ε₀: the network as it was. g: how
far beyond n the target lies. m: prompt p's strength, 1 in training and in the file. e: rows in one vector.

- As published: the strength is m; all a are random, as far from the origin as c times 0.8 … 1.2.
- As coded, here with as_published=true, lines (1) to (3): half of the anchoring goes to ""; the network is
  given a time too large for z, by 33 to 42 of 1,000 (here 32 to 41, with preset=mini 123); what acts is m².
- As coded, not here: several adapters act as (Σ m up)(Σ m down), cross terms and all; AdamW in 8 bits; sides
  of 256 … 448 pixels; an a is drawn again with a chance of cos(a, c), 0 ± 0.004.
- preset=mini is ours, as 3,000 iterations take an hour or more on two cores; its rate is the best of six.
"""
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from diffusion import ddim, guided
from erasing import Job, run
from plumbing import UserError
from plumbing.cli import settings_of
from plumbing.formats import write_adapters
from plumbing.training import descend, predict, tell
from unet import SpatialTransformer


@dataclass(frozen=True)
class Settings:
    iterations: int = 3000
    lr: float = 1e-4
    steps: int = 30             # of DDIM; each iteration draws c up to a random one
    anchoring: float = 1000.0   # λ
    rank: int = 1               # an adapter is
    alpha: float = 1.0          # alpha / rank · up · down
    g: float = 1.0              # how far beyond the neutral text
    as_published: bool = True   # the authors' code, where it differs from their paper
    PRESETS = {"mini": dict(iterations=80, lr=1e-2, steps=8, anchoring=10.0)}        # docs/methods.md

    def __post_init__(self):
        if not (min(self.iterations, self.rank) >= 1 and 2 <= self.steps <= 999
                and min(self.lr, self.alpha) > 0 <= min(self.g, self.anchoring)):
            raise UserError("the settings need iterations and rank at least 1, lr and alpha above 0, g and "
                            "anchoring at least 0, steps in 2 … 999")


def add_adapters(unet: nn.Module, rank: int, generator: torch.Generator) -> dict[str, list[Tensor]]:
    """{name of a weight: up [out, rank], 0, and down [rank, in · kernel], uniform (Kaiming, a = √5)}."""
    layers = {f"{outer}.{inner}.weight": layer.weight for outer, block in unet.named_modules()
              if isinstance(block, SpatialTransformer)
              for inner, layer in block.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))}
    return {name: [x.to(W0.device).requires_grad_() for x in (
        torch.zeros(len(W0), rank), (2 * torch.rand(rank, W0[0].numel(), generator=generator) - 1)
        / W0[0].numel() ** 0.5)] for name, W0 in layers.items()}


def merged(unet: nn.Module, adapters: dict, s: Settings) -> dict[str, Tensor]:
    """W = W₀ + alpha / rank · up · down, float32, differentiable in up and down."""
    return {name: (W0 := unet.get_parameter(name).float()) + s.alpha / s.rank * (up @ down).view_as(W0)
            for name, (up, down) in adapters.items()}


def rate(i: int, n: int) -> float:
    """The fraction of lr in iteration i of n, from 0 on: a sixth to warm up, then three cosines down to 0."""
    return 6 * i / n if 6 * i < n else (1 + math.cos(math.pi * (3 * (6 * i - n) / (5 * n) % 1))) / 2


def loss_of(job: Job, adapters: dict, s: Settings, generator: torch.Generator) -> Tensor:
    """L at one random concept, noise, step and anchors."""
    unet, scheduler, W = job.model.unet, job.model.scheduler, merged(job.model.unet, adapters, s)
    pair = job.pairs[torch.randint(len(job.pairs), (), generator=generator)]
    c, n, u = job.text([pair.concept, pair.anchor, ""])
    k = int(torch.randint(1, s.steps, (), generator=generator))
    with torch.no_grad():
        def eps(z, t):
            return guided(*predict(unet, torch.cat([z, z]), t, torch.stack([u, c]), W).chunk(2), 3)
        z = torch.randn(1, *job.model.latent, generator=generator).to(job.model.device)
        z, N = ddim(eps, z, scheduler, s.steps, slice(k)), scheduler.config.num_train_timesteps
        # (2) z lies at the time of the next step; the code goes as large a share of N down from N − 1
        t = N - 1 - N * k // s.steps if s.as_published else scheduler.timesteps(s.steps)[k]
        a = torch.randn(2 if s.as_published else 4, *c.shape, generator=generator).to(c)
        length = c.norm() * (0.8 + 0.4 * torch.rand(len(a), 1, 1, generator=generator).to(c))
        a *= length / a.norm(dim=(1, 2), keepdim=True)
        # (1) the code stacks "", a₁, "", a₂, "", a₃, "", a₄ as if for guidance, whose scale 1 keeps one half
        a, times = (torch.cat([u[None], a]), [2, 1, 1]) if s.as_published else (a, [1, 1, 1, 1])
        before = predict(unet, z.expand(len(a) + 2, -1, -1, -1), t, torch.cat([n[None], c[None], a]))
    after = predict(unet, z.expand(len(a) + 1, -1, -1, -1), t, torch.cat([c[None], a]), W)
    target = torch.cat([guided(before[:1], before[1:2], -s.g), before[2:]])
    error = (after - target).square().flatten(1).mean(1)
    return error[0] + s.anchoring * (error[1:] @ error.new_tensor(times)) / 4


def drawing(about: dict, text) -> dict:
    """Of an edit's description, what Model.draw is given: how strongly a prompt is edited."""
    def tokens(prompt: str) -> set[int]:
        return set(text.tokenizer([prompt])[0].tolist()) - set(text.tokenizer([""])[0].tolist())

    def strength(c: Tensor, prompt: str | None) -> float:
        m = max(max(torch.cosine_similarity(c.flatten(), e.to(c), dim=0).item(),
                    len(own & tokens(prompt or "")) / len(own)) for e, own in concepts)
        return min(m, 1.0) ** 2 if s.as_published else min(m, 1.0)       # (3) the code: up · m and down · m

    s = settings_of(Settings, about["settings"])
    concepts = [(text([name])[0].flatten(), tokens(name)) for name in about["concepts"]]
    return {"strength": strength}


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    words, anchors = ([getattr(pair, who) for pair in job.pairs] for who in ("concept", "anchor"))
    job.report |= {"prompts": {"erased": words, "anchor": anchors, "retained": [""]},
                   "strength": "max(cosine, fraction of tokens)" + ", squared" * s.as_published}
    job.trained = True
    job.drawing = drawing({"concepts": words, "settings": dataclasses.asdict(s)}, job.text)
    unet, generator = job.model.unet, torch.Generator().manual_seed(job.seed)
    adapters = add_adapters(unet, s.rank, generator)
    optimizer = torch.optim.AdamW([x for both in adapters.values() for x in both], s.lr)

    def loss(step: int) -> Tensor:
        optimizer.param_groups[0]["lr"] = s.lr * rate(step - 1, s.iterations)
        return loss_of(job, adapters, s, generator)

    tell(job, descend(optimizer.param_groups[0]["params"], loss, s.iterations, optimizer, "learning",
                      dtype=job.model.dtype))
    about = {"prompts": words, "rank": s.rank}
    write_adapters(job.folder / "spm.safetensors", unet, adapters, s.alpha, about)
    job.clock("training")
    return {name: W.detach() for name, W in merged(unet, adapters, s).items()}


if __name__ == "__main__":
    run("SPM", __doc__, Settings, erase, anchor="")
