"""Noise schedule, DDIM and PNDM steps, classifier-free guidance, and the loop that draws a latent.

    scheduler = Scheduler.from_pretrained("mini/scheduler")
    z = sample(eps, latents, scheduler, steps=25)        # eps(z, t) -> predicted noise, guidance included

The steps equal diffusers' DDIMScheduler and PNDMScheduler (skip_prk_steps, "leading" spacing) step by step.
Papers: Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Liu et al. 2022 (PNDM), Ho & Salimans 2021 (guidance).
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from plumbing import UserError
from plumbing.weights import read_config


@dataclass(frozen=True)
class SchedulerConfig:
    """SD v1.4's values. In diffusers the code's own defaults differ: the folder's file decides."""
    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    timestep_spacing: str = "leading"


SUPPORTED = {"prediction_type": ("epsilon",), "timestep_spacing": ("leading", "linspace"),
             "trained_betas": (None,), "beta_schedule": ("scaled_linear", "linear"),
             "skip_prk_steps": (True,), "clip_sample": (False,), "thresholding": (False,),
             "rescale_betas_zero_snr": (False,)}


class Scheduler:
    """alphas_cumprod [1000], float32: ᾱ_t, the share of z_0 in z_t = √ᾱ_t z_0 + √(1 − ᾱ_t) ε."""

    def __init__(self, config: SchedulerConfig = SchedulerConfig()):
        self.config = config
        root = 0.5 if config.beta_schedule == "scaled_linear" else 1
        betas = torch.linspace(config.beta_start ** root, config.beta_end ** root,
                               config.num_train_timesteps) ** (1 / root)
        self.alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        self.final_alpha = torch.tensor(1.0) if config.set_alpha_to_one else self.alphas_cumprod[0]

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Scheduler":
        config = read_config(Path(folder), SchedulerConfig, SUPPORTED, file="scheduler_config.json")
        if config.timestep_spacing != "leading":                  # of DPM++, Euler, Heun, UniPC, …
            print(f"warning: {folder} asks for another sampler, with timestep_spacing = "
                  f"{config.timestep_spacing!r}; our own DDIM draws, with 'leading'", file=sys.stderr)
        return cls(config)

    def timesteps(self, steps: int) -> list[int]:
        """`steps` times from noise to picture, evenly spaced: 50 -> 981, 961, … 21, 1."""
        most = self.config.num_train_timesteps - self.config.steps_offset
        if not 1 <= steps <= most:                                # with all 1000, SD's offset of 1 leads out
            raise UserError(f"steps must lie in 1 … {most}, not {steps}")
        gap = self.config.num_train_timesteps // steps
        return [i * gap + self.config.steps_offset for i in reversed(range(steps))]

    def alpha(self, t: int) -> Tensor:
        """ᾱ_t; before the first step, the final ᾱ. In float32, like the reference."""
        return self.alphas_cumprod[t] if t >= 0 else self.final_alpha

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z0, noise [B, …], t [B] -> z_t."""
        a = self.alphas_cumprod.to(z0.device)[t].view(-1, *[1] * (z0.dim() - 1))
        return a.sqrt() * z0 + (1 - a).sqrt() * noise


def guided(u: Tensor, c: Tensor, s: float) -> Tensor:
    """Classifier-free guidance: from the unconditional prediction u along (c − u), s times as far as c."""
    return u + s * (c - u)


def ddim(eps: Callable, z: Tensor, scheduler: Scheduler, steps: int, stop: int | None = None) -> Tensor:
    """DDIM with η = 0. eps(z, t) -> noise like z; z [B, 4, h, w], pure noise -> the latent of a picture.
    stop: only that many of the steps, so that what is returned lies at the time of the next one."""
    times = scheduler.timesteps(steps)
    gap = scheduler.config.num_train_timesteps // steps
    for t in times[:stop]:
        a, a_next = scheduler.alpha(t), scheduler.alpha(t - gap)
        noise = eps(z, t)
        z0 = (z - (1 - a).sqrt() * noise) / a.sqrt()
        z = a_next.sqrt() * z0 + (1 - a_next).sqrt() * noise
    return z


def pndm(eps: Callable, z: Tensor, scheduler: Scheduler, steps: int) -> Tensor:
    """Pseudo linear multistep: the last four predictions, extrapolated. SD v1.4's own default sampler.

    The second time is visited twice (steps + 1 evaluations): a predictor, then a corrector that replaces it.
    """
    times = scheduler.timesteps(steps)
    gap = scheduler.config.num_train_timesteps // steps
    history: list[Tensor] = []                                    # newest last
    for i, t in enumerate(times[:1] + times[1:2] + times[1:]):
        noise = eps(z, t)
        if i == 1:                                                # corrector: step 0 again, both ends' mean
            z, noise, start = first, (noise + history[-1]) / 2, times[0]
        else:
            history, start = history[-3:] + [noise], t
            noise = sum(w * e for w, e in zip(ADAMS_BASHFORTH[len(history)], reversed(history)))
        if i == 0:
            first = z
        z = pndm_transfer(scheduler, z, noise, start, start - gap)
    return z


ADAMS_BASHFORTH = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12),
                   4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def pndm_transfer(scheduler: Scheduler, z: Tensor, noise: Tensor, t: int, t_next: int) -> Tensor:
    """PNDM Eq. 11: the same move as DDIM's, written so that z_t and ε keep separate factors."""
    a, b = scheduler.alpha(t), scheduler.alpha(t_next)
    return (b / a).sqrt() * z - (b - a) / (a * (1 - b).sqrt() + (a * (1 - a) * b).sqrt()) * noise


SAMPLERS = {"ddim": ddim, "pndm": pndm}
