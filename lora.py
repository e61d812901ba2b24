"""Low-rank adaptation: W x + B A x, where only A and B learn (Hu et al. 2021; the RealEra paper's Eq. 2).

    names = add_lora(unet, rank=4)           # wraps attn2.to_k and attn2.to_v; the output does not change yet
    with lora_off(unet): ...                 # the network as it was
    merge_lora(unet)                         # W <- W + B A, wrappers gone

A and B stay in float32 whatever the network's dtype is: two hundred small Adam steps move the sum by a
fraction of a percent, which bfloat16 would round away.
"""
import contextlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from plumbing import UserError
from plumbing.disk import readable, whole


class LoRALinear(nn.Linear):
    """A Linear that keeps its own `weight` (and its key in the state dict) and adds `scale · B A`."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float, generator: torch.Generator):
        nn.Module.__init__(self)                                  # no new weight: the old one is taken over
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.randn(rank, self.in_features, generator=generator).to(device) / rank)
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        self.scale, self.on = scale, True

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if not self.on:
            return y
        # Eq. (2): h = W x + B A x
        return y + (self.scale * (x.float() @ self.lora_A.T @ self.lora_B.T)).to(y.dtype)

    def delta(self) -> Tensor:
        """scale · B A, float32, the shape of `weight`."""
        return self.scale * (self.lora_B @ self.lora_A).detach()


def lora_layers(network: nn.Module) -> dict[str, LoRALinear]:
    return {name: module for name, module in network.named_modules() if isinstance(module, LoRALinear)}


def add_lora(network: nn.Module, rank: int, targets=("attn2.to_k", "attn2.to_v"), scale: float = 1.0,
             seed: int = 0) -> list[str]:
    """Wrap every Linear whose name ends in one of `targets`; A is Gaussian, B zero: nothing changes at first.

    Returns the names. Raises UserError if nothing matches or the rank is not positive.
    """
    if rank < 1:
        raise UserError(f"the LoRA rank must be at least 1, not {rank}")
    generator = torch.Generator().manual_seed(seed)
    names = [name for name, module in network.named_modules()
             if type(module) is nn.Linear and name.endswith(tuple(targets))]
    if not names:
        raise UserError(f"no layer's name ends in {' or '.join(targets)}")
    for name in names:
        replace(network, name, LoRALinear(network.get_submodule(name), rank, scale, generator))
    return names


def replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(network.get_submodule(parent), child, module)


@contextlib.contextmanager
def lora_off(network: nn.Module):
    """The network without its LoRA, inside a `with` block."""
    layers = [layer for layer in lora_layers(network).values() if layer.on]
    for layer in layers:
        layer.on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.on = True


@torch.no_grad()
def merge_lora(network: nn.Module) -> None:
    """W <- W + scale · B A, rounded once to W's dtype, and plain Linear layers again."""
    for name, layer in lora_layers(network).items():
        plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
        plain.weight = nn.Parameter((layer.weight.float() + layer.delta()).to(layer.weight.dtype),
                                    requires_grad=False)
        plain.bias = layer.bias
        replace(network, name, plain)


def save_lora(network: nn.Module, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write A and B of a network's wrapped layers, the scale folded into B."""
    save_factors({name: (layer.scale * layer.lora_B, layer.lora_A)
                  for name, layer in lora_layers(network).items()}, path, metadata)


def save_factors(factors: dict[str, tuple[Tensor, Tensor]], path: str | Path,
                 metadata: dict[str, str] | None = None) -> None:
    """Write {layer: (B, A)} in the spelling that diffusers' `load_lora_weights` takes.

    The prefix `unet.` matters: without it diffusers loads nothing and only warns.
    """
    tensors = {}
    for name, (B, A) in factors.items():
        tensors[f"unet.{name}.lora_A.weight"] = A.detach().cpu().contiguous()
        tensors[f"unet.{name}.lora_B.weight"] = B.detach().cpu().contiguous()
    with whole(path) as temporary:
        save_file(tensors, temporary, metadata)


def lora_deltas(path: str | Path) -> dict[str, Tensor]:
    """B A of every layer in a file of `save_lora`, under the name of the matrix that it is added to."""
    with readable(path):
        tensors = load_file(path)
    layers = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {f"{layer.removeprefix('unet.')}.weight":
            tensors[f"{layer}.lora_B.weight"] @ tensors[f"{layer}.lora_A.weight"] for layer in layers}


@torch.no_grad()
def load_lora(network: nn.Module, path: str | Path) -> list[str]:
    """Read a file of `save_lora` into a network without LoRA. Returns the names of the wrapped layers."""
    with readable(path):
        tensors = load_file(path)
    names = [key.removeprefix("unet.").removesuffix(".lora_A.weight") for key in tensors
             if key.endswith("lora_A.weight")]
    modules = dict(network.named_modules())
    for name in names:
        A, B = tensors.get(f"unet.{name}.lora_A.weight"), tensors.get(f"unet.{name}.lora_B.weight")
        linear = modules.get(name)
        if type(linear) is not nn.Linear or A is None or B is None or A.shape[1:] != linear.weight.shape[1:] \
                or B.shape != (linear.out_features, len(A)):
            raise UserError(f"{path} does not fit this network at {name}")
        layer = LoRALinear(linear, len(A), 1.0, torch.Generator())
        layer.lora_A.copy_(A), layer.lora_B.copy_(B)
        replace(network, name, layer)
    if not names:
        raise UserError(f"{path} holds no LoRA in the spelling unet.….lora_A.weight")
    return names
