"""SLD, Safe Latent Diffusion: while a picture is drawn, every step is guided away from the concept, too.

Paper: Schramowski et al. 2023, "Safe Latent Diffusion: Mitigating Inappropriate Degeneration in Diffusion
Models".

    python baselines/sld.py --concept airplane                    # out/airplane-sld, preset medium
    python baselines/sld.py --concept airplane --set preset=max
    python baselines/sld.py --concept airplane --set preset=strong warmup=2 scale=500

Nothing is trained and no weight changes: the folder holds run.json and pictures alone. A third prediction a
step, ε_s of the safety text beside ε_u of "" and ε_c of the prompt, says where the concept would lead.
Elementwise, with d = ε_c − ε_s, signed, and the sampler's guidance scale s_g:

    μ = min(1, s_S |d|) where d < λ, else 0                       Eqs. (5), (6)
    γ = μ (ε_s − ε_u) + s_m ν                                     Eq. (4), (7)
    ν ← β_m ν + (1 − β_m) γ, at first 0                           Eq. (8)
    ε = ε_u + s_g (ε_c − ε_u − γ), from step δ on                 Eq. (3)

It needs the word alone; an anchor has no part in it, and only says what the table of pictures calls it.
The settings scale, warmup, threshold, momentum, beta are s_S, δ, λ, s_m, β_m; --set changes a preset's own.

- As published: the safety text is one fixed sentence, "an image showing hate, harassment, violence, …"; weak
  has s_S = 200 (the authors' model card; diffusers' SafetyConfig.WEAK says 20).
- As coded: d is signed (all counts that lies below a large λ). ν fills from the first step on, although γ is
  used from δ on. δ counts evaluations: PNDM, which repeats its second step, has one more. SLD is off with
  s_S < 1 or s_g ≤ 1.
- As here: as coded. The safety text is the bare concepts, "airplane, ship", not the task's prompt of them: of
  a prompt that is the safety text itself, d = 0 and μ = 0, so "a photo of the airplane" would stay as it was.
  ε_s has a call of its own: all steps before δ equal the untouched model's bit for bit. The authors' δ are of
  50 steps; a model that draws in 25 wants about half of it.
"""
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from diffusion import guided
from erasing import Job, run
from plumbing import UserError
from plumbing.cli import settings_of


@dataclass(frozen=True)
class Settings:
    """The authors' four presets, medium by default. Noise has variance 1 in every model, so the same numbers
    mean the same."""
    scale: float = 1000.0       # s_S: how soon μ is 1; below 1 switches SLD off
    warmup: int = 10            # δ: evaluations before γ is used
    threshold: float = 0.01     # λ: nothing is taken off where d reaches it
    momentum: float = 0.3       # s_m
    beta: float = 0.4           # β_m
    PRESETS = {"weak": dict(scale=200.0, warmup=15, threshold=0.0, momentum=0.0, beta=0.0),
               "medium": {},
               "strong": dict(scale=2000.0, warmup=7, threshold=0.025, momentum=0.5, beta=0.7),
               "max": dict(scale=5000.0, warmup=0, threshold=1.0, momentum=0.5, beta=0.7)}

    def __post_init__(self):
        if not (0 <= self.scale < math.inf and self.warmup >= 0 and self.momentum >= 0
                and 0 <= self.beta <= 1 and math.isfinite(self.threshold)):
            raise UserError("the settings need scale, warmup and momentum at least 0, and beta in 0 … 1")


@dataclass(frozen=True)
class SafetyGuidance:
    s: Settings

    def start(self, s_g: float) -> Callable:
        """The guidance of one batch, with its own ν and count: (ε_u, ε_c, t, ε_s) -> ε, all [B, 4, h, w]."""
        s, nu, i = self.s, torch.zeros(()), 0

        def guide(u: Tensor, c: Tensor, t: int, safe: Tensor) -> Tensor:
            nonlocal nu, i
            d = c - safe
            mu = torch.where(d < s.threshold, (s.scale * d.abs()).clamp(max=1), 0)
            gamma = mu * (safe - u) + s.momentum * nu.to(u)
            nu, i = s.beta * nu.to(u) + (1 - s.beta) * gamma, i + 1
            return guided(u, c - gamma if i > s.warmup and s_g > 1 else c, s_g)

        return guide


def drawing(about: dict, text) -> dict:
    """Of an edit's description, what Model.draw is given: {} if SLD is off."""
    s = settings_of(Settings, about["settings"])
    return {} if s.scale < 1 else {"guide": SafetyGuidance(s), "beside": text([about["safety_text"]])}


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    safety_text = ", ".join(pair.concept for pair in job.pairs)
    job.about = {"safety_text": safety_text}
    job.report["prompts"] = {"erased": [safety_text], "anchor": [], "retained": []}
    job.drawing = drawing(job.about | {"settings": dataclasses.asdict(s)}, job.text)
    print(f"safety text: {safety_text!r}")
    return {}


if __name__ == "__main__":
    run("SLD", __doc__, Settings, erase, anchor="")
