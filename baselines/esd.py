"""ESD: train the network to predict, for the concept, the noise that negative guidance away from it gives.

Paper: Gandikota et al. 2023, "Erasing Concepts from Diffusion Models".

    python baselines/esd.py --concept airplane                             # ESD-x: the cross-attention
    python baselines/esd.py --concept airplane --set variant=u             # ESD-u: everything else
    python baselines/esd.py --concept airplane --set preset=mini           # ours, for mini; of ESD-u: mini-u

ε* is the untouched network, ε the one that learns; c is the concept's bare word, z_t a latent on the way to a
picture of it, as ε itself draws it by now:

    L = ‖ε(z_t, c, t) − [ε*(z_t, t) − η (ε*(z_t, c, t) − ε*(z_t, t))]‖²

ε*(z_t, t), without c, is the prediction for "". The bracket is what guidance with scale −η predicts. ESD-x
learns queries, keys, values and output of every cross-attention, so every prompt that contains the word
changes, too; ESD-u learns all but those, so the word is read as before, and what is drawn changes whatever
the prompt is. It needs the word alone: no pictures, no anchor (--anchor is not looked at), nothing to keep.

As published: 1,000 steps of Adam at 1e-5, one latent each, drawn with guidance 3; η = 1.
As coded (the first code): z is 50 steps' DDIM stopped at step t_enc, but the sampler leaves out its first
    step and stops late, so that z lies two steps below t_enc. The network is given a time t within
    t_enc's step: by 39 to 58 of 1,000 too large for z. ESD-u leaves out time embedding, last norm and last
    convolution.
As here: the same; `as_published=false` gives z's own time. `steps` are the model's own if not set: 50 for SD,
    25 for mini, where a step is twice as long, and the given time 79 to 118 too large. The authors' second
    code has `as_published=false frozen=true iterations=200 lr=5e-5`, but draws with PNDM, and its ESD-u
    trains no norms, but time embedding and last convolution. Several concepts: one at random each step.
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from diffusion import Scheduler, ddim, guided
from erasing import Job, run
from plumbing import UserError
from plumbing.training import begin, descend, predict, tell


@dataclass(frozen=True)
class Settings:
    """The authors' values."""
    variant: str = "x"          # x: cross-attention; u: everything else
    iterations: int = 1000
    lr: float = 1e-5            # of Adam
    eta: float = 1.0            # η: how far the target lies beyond ε*(z, "")
    guidance: float = 3.0       # with which z is drawn
    steps: int = 0              # of DDIM from noise to picture; 0: the model's own
    frozen: bool = False        # True: the untouched network draws z
    as_published: bool = True   # False: the network is given the time that z has
    PRESETS = {"mini": dict(iterations=200, lr=3e-5),             # the best of six rates: docs/methods.md
               "mini-u": dict(variant="u", iterations=60, steps=10, lr=3e-5)}

    def __post_init__(self):
        if self.variant not in ("x", "u"):
            raise UserError(f"the settings need variant = x or u, not {self.variant}")
        if not (self.iterations > 0 and self.lr > 0 and self.eta >= 0 and self.steps >= 0):
            raise UserError("the settings need iterations and lr above 0, eta and steps at least 0")


def trained_names(unet, variant: str) -> list[str]:
    """Of the U-Net's weights those that the variant trains, by official name."""
    never = ("time_embedding.", "conv_norm_out.", "conv_out.")
    return [name for name, _ in unet.named_parameters()
            if (".attn2." in name) == (variant == "x") and not name.startswith(never)]


def part_of_the_way(scheduler: Scheduler, steps: int, t_enc: int, u: float, as_published: bool):
    """Which of DDIM's steps lead to z, and the time t that is given; t_enc 0 … steps − 1, u in [0, 1)."""
    if not as_published:
        return slice(0, steps - 1 - t_enc), scheduler.timesteps(steps)[steps - 1 - t_enc]
    # The quirk: without the first step, and until step t_enc − 1 is taken, z is two steps below t_enc …
    part = slice(1, steps - max(t_enc - 1, 0))
    low, high = (round(i / steps * scheduler.config.num_train_timesteps) for i in (t_enc, t_enc + 1))
    return part, low + math.floor(u * (high - low))               # … while t is any in t_enc's own step


def esd_loss(unet, W: dict[str, Tensor], z: Tensor, t: int, c: Tensor, empty: Tensor, eta: float) -> Tensor:
    """Mean of the squares in L, a scalar that is differentiable in W; z [1, 4, h, w], c, empty [1, T, D]."""
    with torch.no_grad():
        e_0, e_c = predict(unet, torch.cat([z, z]), t, torch.cat([empty, c])).chunk(2)           # of ε*
    return (predict(unet, z, t, c, W) - guided(e_0, e_c, -eta)).square().mean()


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    model, words = job.model, [pair.concept for pair in job.pairs]
    unet, scheduler, steps = model.unet, model.scheduler, s.steps or model.defaults["steps"]
    scheduler.timesteps(steps)                                    # refuses what is impossible
    if any(pair.anchor for pair in job.pairs):
        print("warning: ESD looks at no anchor, it moves away from the concept alone", file=sys.stderr)
    W, generator = begin(job, trained_names(unet, s.variant)), torch.Generator().manual_seed(job.seed)
    empty, *rows = job.text(["", *words]).split(1)                # [1, T, D] each
    job.report |= {"prompts": {"erased": words, "anchor": [], "retained": []}, "stored in": "float32",
                   "base of eta": 'the untouched network\'s noise for ""', "steps of DDIM": steps}

    @torch.no_grad()
    def draw(c: Tensor, part: slice) -> Tensor:
        """z [1, 4, h, w], by the network as it is now."""
        def eps(z: Tensor, t: int) -> Tensor:
            many = predict(unet, torch.cat([z, z]), t, torch.cat([empty, c]), {} if s.frozen else W)
            return guided(*many.chunk(2), s.guidance)
        noise = torch.randn(1, *model.latent, generator=generator).to(model.device)
        return ddim(eps, noise, scheduler, steps, part)

    def loss(step: int) -> Tensor:
        c = rows[torch.randint(len(rows), (), generator=generator)]
        t_enc, u = torch.randint(steps, (), generator=generator).item(), torch.rand((), generator=generator)
        part, t = part_of_the_way(scheduler, steps, t_enc, u.item(), s.as_published)
        return esd_loss(unet, W, draw(c, part), t, c, empty, s.eta)

    tell(job, descend(W.values(), loss, s.iterations, torch.optim.Adam(W.values(), s.lr), "ESD", math.inf,
                      model.dtype))
    job.clock("training")
    return W


if __name__ == "__main__":
    run("ESD", __doc__, Settings, erase, anchor="")
