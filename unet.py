"""The U-Net of Stable Diffusion v1 and v2: noisy latent, time step and text rows in, predicted noise out.

    unet = UNet.from_pretrained("mini/unet")
    eps = unet(x, t, context)          # x [B, 4, h, w], t int or [B], context [B, T, D] -> [B, 4, h, w]

Every attribute name equals the key in the official checkpoint, so loading needs no renaming, and
`down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k` in a paper, in a file and here are one thing.
`attn2` is cross-attention: the only place where text enters, and what concept erasure edits.

Papers: Ho et al. 2020 (DDPM), Rombach et al. 2022 (latent diffusion).
"""
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffusion import noise_of
from plumbing import UserError
from plumbing.weights import load_network, read_config


@dataclass(frozen=True)
class UNetConfig:
    """Widths; the defaults are SD v1.4."""
    in_channels: int = 4
    out_channels: int = 4
    block_out_channels: tuple = (320, 640, 1280, 1280)
    down_block_types: tuple = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    layers_per_block: int = 2
    cross_attention_dim: int = 768
    attention_head_dim: int | tuple = 8      # heads, in SD 2 level by level: a misnomer that the files keep
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    sample_size: int = 64
    use_linear_projection: bool = False      # SD 2: True


SUPPORTED = {
    "act_fn": ("silu", "swish"), "addition_embed_type": (None,), "attention_type": ("default",),
    "center_input_sample": (False,), "class_embed_type": (None,), "conv_in_kernel": (3,),
    "conv_out_kernel": (3,), "downsample_padding": (1,), "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,), "flip_sin_to_cos": (True,), "freq_shift": (0,),
    "mid_block_scale_factor": (1, 1.0), "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_attention_heads": (None,), "only_cross_attention": (False,),
    "resnet_time_scale_shift": ("default",), "time_cond_proj_dim": (None,), "time_embedding_act_fn": (None,),
    "time_embedding_type": ("positional",), "timestep_post_act": (None,),
    "transformer_layers_per_block": (1,),
}   # upcast_attention is no matter: it asks for scores in float32, which fused attention has in any case


def sinusoids(t: Tensor, width: int) -> Tensor:
    """t [B] -> [B, width]: cosines, then sines, of t at frequencies 1 … 1/10000."""
    frequencies = torch.exp(-math.log(10000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t.float()[:, None] * frequencies                                        # [B, width/2]
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ResnetBlock(nn.Module):
    """x [B, c_in, h, w], time [B, c_time] -> [B, c_out, h, w]."""

    def __init__(self, c_in: int, c_out: int, c_time: int, config: UNetConfig):
        super().__init__()
        # eps is 1e-5 here (norm_eps) and 1e-6 in the transformers below: so were the checkpoints trained.
        self.norm1 = nn.GroupNorm(config.norm_num_groups, c_in, config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(c_time, c_out)
        self.norm2 = nn.GroupNorm(config.norm_num_groups, c_out, config.norm_eps)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time_emb_proj(time)[:, :, None, None]
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Queries from the picture; keys and values from it too (attn1) or from the text rows (attn2)."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads, self.seen = heads, None
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))                         # key: to_out.0

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return self.to_k(context), self.to_v(context)                                # [B, T, C] each

    def forward(self, x: Tensor, context: Tensor | dict) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)                 # [B, heads, L, C/heads]
        k, v = context[self] if isinstance(context, dict) else self.keys_values(context)
        q, k, v = split(self.to_q(x)), split(k), split(v)
        if self.seen is not None:                                 # a list, from who asks for attention
            self.seen.append((q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1))        # [B, heads, L, T]
        y = F.scaled_dot_product_attention(q, k, v)
        return self.to_out(y.transpose(1, 2).flatten(2))                             # [B, L, C]


class GEGLU(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        # net.1 was a dropout layer: it has no weights, and keeps the numbers of its neighbors.
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.norm1, self.attn1 = nn.LayerNorm(width), Attention(width, width, heads)
        self.norm2, self.attn2 = nn.LayerNorm(width), Attention(width, context_width, heads)
        self.norm3, self.ff = nn.LayerNorm(width), FeedForward(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class PointwiseLinear(nn.Linear):
    """SD 2's spelling of a 1×1 convolution, its weight saved as a matrix: [B, C, h, w] -> [B, C, h, w]."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight[:, :, None, None], self.bias)


class SpatialTransformer(nn.Module):
    """x [B, C, h, w], context [B, T, D] -> [B, C, h, w]: every pixel is a token."""

    def __init__(self, channels: int, config: UNetConfig, heads: int):
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_num_groups, channels, eps=1e-6)
        project = PointwiseLinear if config.use_linear_projection else partial(nn.Conv2d, kernel_size=1)
        self.proj_in = project(channels, channels)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, config.cross_attention_dim, heads)])
        self.proj_out = project(channels, channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        y = self.proj_in(self.norm(x))
        tokens = y.flatten(2).transpose(1, 2)                                        # [B, h·w, C]
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).reshape(y.shape))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


class Block(nn.Module):
    """One resolution, down or up: ResNets, a transformer after each if `cross`, then a change of size."""

    def __init__(self, widths_in: list[int], width: int, config: UNetConfig, heads: int, cross: bool):
        super().__init__()
        c_time = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(c_in, width, c_time, config) for c_in in widths_in)
        if cross:
            self.attentions = nn.ModuleList(SpatialTransformer(width, config, heads) for _ in widths_in)

    def layer(self, i: int, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        x = self.resnets[i](x, time)
        return self.attentions[i](x, context) if hasattr(self, "attentions") else x


class MidBlock(nn.Module):
    def __init__(self, width: int, config: UNetConfig, heads: int):
        super().__init__()
        c_time = 4 * config.block_out_channels[0]
        self.resnets = nn.ModuleList(ResnetBlock(width, width, c_time, config) for _ in range(2))
        self.attentions = nn.ModuleList([SpatialTransformer(width, config, heads)])

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class UNet(nn.Module):
    """x [B, 4, h, w], t int or [B], context [B, T, D] -> predicted noise [B, 4, h, w].

    alphas_cumprod: None; or, of weights that predict the velocity v, ᾱ [1000]: ε then follows in float32.
    """

    def __init__(self, config: UNetConfig = UNetConfig()):
        super().__init__()
        self.config = config
        self.low_memory, self.alphas_cumprod = False, None        # for training, see `forward`; see above
        widths, layers, heads = config.block_out_channels, config.layers_per_block, config.attention_head_dim
        heads = heads if isinstance(heads, tuple) else (heads,) * len(widths)       # one number: all levels
        if not len(widths) == len(config.down_block_types) == len(config.up_block_types) == len(heads):
            raise UserError("unet: block_out_channels, down_block_types, up_block_types and "
                            "attention_head_dim differ in length")
        if any(width % config.norm_num_groups or width % n for width, n in zip(widths, heads)):
            raise UserError(f"unet: {widths} must be divisible by norm_num_groups and by attention_head_dim")
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0])

        skips, width = [widths[0]], widths[0]                     # widths of what the way up will concatenate
        self.down_blocks = nn.ModuleList()
        for i, kind in enumerate(config.down_block_types):
            block = Block([width] + [widths[i]] * (layers - 1), widths[i], config, heads[i],
                          one_of(kind, "CrossAttnDownBlock2D", "DownBlock2D"))
            width = widths[i]
            skips += [width] * layers
            if i < len(widths) - 1:
                block.downsamplers = nn.ModuleList([Downsample(width)])
                skips.append(width)
            self.down_blocks.append(block)

        self.mid_block = MidBlock(width, config, heads[-1])

        self.up_blocks = nn.ModuleList()
        for i, kind in enumerate(config.up_block_types):
            out = widths[-1 - i]
            widths_in = [(width if j == 0 else out) + skips.pop() for j in range(layers + 1)]
            block = Block(widths_in, out, config, heads[-1 - i],
                          one_of(kind, "CrossAttnUpBlock2D", "UpBlock2D"))
            width = out
            if i < len(widths) - 1:
                block.upsamplers = nn.ModuleList([Upsample(width)])
            self.up_blocks.append(block)

        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, width, config.norm_eps)
        self.conv_out = nn.Conv2d(width, config.out_channels, 3, padding=1)

    def read(self, context: Tensor) -> dict[Attention, tuple[Tensor, Tensor]]:
        """The text's keys and values, which `forward` takes in place of context [B, T, D]: as long as neither
        text nor weights change, they need computing only once."""
        return {block.attn2: block.attn2.keys_values(context) for block in self.modules()
                if isinstance(block, TransformerBlock)}

    def forward(self, x: Tensor, t: Tensor | int, context: Tensor | dict) -> Tensor:
        def layer(block: Block, *inputs) -> Tensor:               # low memory: run again for gradients
            return checkpoint(block.layer, *inputs, use_reentrant=False) if low else block.layer(*inputs)
        low = self.low_memory and torch.is_grad_enabled()
        t = t if isinstance(t, Tensor) else torch.full((), t, device=x.device)       # filled there, not sent
        waves = sinusoids(t.expand(x.shape[0]), self.config.block_out_channels[0])   # [B, c]
        z, x = x, x.to(self.conv_in.weight.dtype)
        time = F.silu(self.time_embedding(waves.to(x.dtype)))     # [B, 4c]: the ResNets share its SiLU
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            for i in range(len(block.resnets)):
                x = layer(block, i, x, time, context)
                skips.append(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
                skips.append(x)
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            for i in range(len(block.resnets)):
                x = layer(block, i, torch.cat([x, skips.pop()], dim=1), time, context)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x, skips[-1].shape[-2:])
        x = self.conv_out(F.silu(self.conv_norm_out(x)))
        if self.alphas_cumprod is None:
            return x
        return noise_of(z.float(), x.float(), self.alphas_cumprod[t].view(-1, 1, 1, 1))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=torch.float32, device="cpu") -> "UNet":
        """Read a `unet` folder. Raises UserError naming what is missing, extra or not supported."""
        config = read_config(Path(folder), UNetConfig, SUPPORTED)
        return load_network(cls, config, folder, "diffusion_pytorch_model", dtype, device)


def one_of(kind: str, cross: str, plain: str) -> bool:
    """Does this block type have cross-attention?"""
    if kind not in (cross, plain):
        raise UserError(f"unet/config.json: block type {kind!r} is not supported "
                        f"(only {cross!r} or {plain!r})")
    return kind == cross
