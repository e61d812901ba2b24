"""Training of a method's weights: float32 copies learn, the network itself stays the untouched teacher."""
import math
from typing import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from plumbing import UserError
from plumbing.formats import matrices_alone
from plumbing.progress import progress
from plumbing.report import record


def begin(job, names) -> dict[str, Tensor]:
    """The copies of these parameters that a method's job trains. Raises UserError at once for what could not
    be done with them once they are trained."""
    if job.preview:
        raise UserError("--preview has no closed form to show here: make the edit, then tools/preview.py")
    W, job.trained = learnable(job.model.unet, names), True
    if job.args.export_lora:
        matrices_alone(W)
    return W


def tell(job, losses: list[float]) -> None:
    """Print and report how the loss fell: its first and last value, and the means of its first and last
    tenth, as a single step's says little."""
    tenth = math.ceil(len(losses) / 10)
    first, last = (sum(some) / tenth for some in (losses[:tenth], losses[-tenth:]))
    print(f"loss, mean of the first {tenth} and the last {tenth} steps: {first:.2e} → {last:.2e}")
    job.report["loss"] = {"first": losses[0], "last": losses[-1], "first tenth": first, "last tenth": last}


def learnable(unet: nn.Module, names) -> dict[str, Tensor]:
    """Copies of these parameters that can learn, in float32 whatever the network's own precision is: bfloat16
    would round small steps away."""
    return {name: unet.get_parameter(name).detach().float().clone().requires_grad_() for name in names}


def predict(unet: nn.Module, z: Tensor, t: Tensor | int, c: Tensor, W: dict[str, Tensor] = {}) -> Tensor:
    """ε [B, 4, h, w], float32, with W in place of the network's own weights; differentiable in W. z like ε,
    t int or [B], c [B, T, D], of any precision and on any device. Without W: the teacher's."""
    own = unet.get_parameter("conv_in.weight")
    z, c = (x.to(own.dtype).to(own.device) for x in (z, c))       # in this order: MPS has no float64
    return functional_call(unet, {name: w.to(own.dtype) for name, w in W.items()}, (z, t, c)).float()


@torch.no_grad()
def drawn_latents(model, prompts: str | list[str], seeds: list[int]) -> Tensor:
    """What the model itself draws, as latents to learn from, z₀ [B, 4, h, w], float32: the mean of the VAE's
    posterior, scaled. Training from pictures of one's own would put them here."""
    pictures = model.draw(prompts, seeds).to(model.device, model.dtype)
    means = [model.vae.encode(2 * x - 1)[0] for x in pictures.split(model.batch)]
    return model.vae.scaling_factor * torch.cat(means).float()


def noisy(model, z0: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """z₀ [B, 4, h, w] -> z_t, t [B] and the noise in it. t is uniform over all times of training; both are
    drawn on the CPU."""
    t = torch.randint(model.scheduler.config.num_train_timesteps, (len(z0),), generator=generator)
    noise = torch.randn(z0.shape, generator=generator).to(z0.device)
    return model.scheduler.add_noise(z0, noise, t.to(z0.device)), t.to(z0.device), noise


def descend(params, loss: Callable[[int], Tensor | Iterable[Tensor]], steps: int,
            optimizer: torch.optim.Optimizer, what: str, clip: float = math.inf,
            dtype=torch.float32) -> list[float]:
    """`steps` steps of an optimizer over `params` on loss(step), step = 1, 2, … A loss may come in several
    terms: each is differentiated, and its graph freed, before the next is computed. clip: the gradients'
    greatest length. dtype: the network's. Returns all losses. Raises UserError if one is not finite."""
    params, losses = list(params), []
    scaler = torch.amp.GradScaler(params[0].device.type, enabled=dtype == torch.float16)     # they underflow
    for step in progress(range(1, steps + 1), what, "step"):
        optimizer.zero_grad()
        terms, total = loss(step), 0.0
        for term in [terms] if isinstance(terms, Tensor) else terms:
            scaler.scale(term).backward()
            total = total + term.detach()
        if clip < math.inf:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(params, clip)
        scaler.step(optimizer), scaler.update()
        losses.append(total)
    losses = torch.stack(losses).tolist() if losses else []       # asked at last: a GPU is waited for once
    for step, value in enumerate(losses, 1):
        if not math.isfinite(value):
            wrong = "NaN" if math.isnan(value) else "infinite"
            raise UserError(f"the loss became {wrong} at step {step}: try a smaller lr, or --dtype float32")
    record(what, losses)
    return losses
