"""The autoencoder of Stable Diffusion (AutoencoderKL): pictures to latents and back.

    vae = VAE.from_pretrained("mini/vae")
    mean, logvar = vae.encode(x)       # x [B, 3, H, W] in [-1, 1] -> two of [B, 4, h, w]; SD: h = H / 8
    x = vae.decode(z)                  # z [B, 4, h, w] -> [B, 3, H, W]

The U-Net works on `vae.config.scaling_factor * z`, whose variance is near 1.
Paper: Rombach et al. 2022, section 3.1.
"""
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plumbing.weights import load_network, read_config


@dataclass(frozen=True)
class VAEConfig:
    """Widths; the defaults are SD v1.4."""
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215          # absent from older copies of the official config
    sample_size: int = 512


SUPPORTED = {"in_channels": (3,), "out_channels": (3,), "act_fn": ("silu",),
             "mid_block_add_attention": (True,), "use_quant_conv": (True,), "use_post_quant_conv": (True,),
             "shift_factor": (None,), "latents_mean": (None,)}

EPS = 1e-6                                   # every norm of the VAE; the U-Net's ResNets have 1e-5


class ResnetBlock(nn.Module):
    """[B, c_in, h, w] -> [B, c_out, h, w]."""

    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(groups, c_in, EPS), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(groups, c_out, EPS), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.conv_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """Self-attention over all positions with a single head, at the lowest resolution only."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.Sequential(nn.Linear(width, width))                         # key: to_out.0

    def forward(self, x: Tensor) -> Tensor:
        y = self.group_norm(x).flatten(2).transpose(1, 2)                            # [B, h·w, C]
        q, k, v = (layer(y)[:, None] for layer in (self.to_q, self.to_k, self.to_v))          # [B, 1, h·w, C]
        y = self.to_out(F.scaled_dot_product_attention(q, k, v)[:, 0])
        return x + y.transpose(1, 2).reshape(x.shape)


class MidBlock(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(width, width, groups) for _ in range(2))
        self.attentions = nn.ModuleList([Attention(width, groups)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))                  # right and bottom only, as in training


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Block(nn.Module):
    """One resolution: ResNets, then a change of size unless it is the last (`resize` None)."""

    def __init__(self, c_in: int, c_out: int, layers: int, groups: int):
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(c_in if i == 0 else c_out, c_out, groups)
                                     for i in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for resnet in self.resnets:
            x = resnet(x)
        for resize in [*getattr(self, "downsamplers", []), *getattr(self, "upsamplers", [])]:
            x = resize(x)
        return x


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            self.down_blocks.append(Block(widths[max(i - 1, 0)], width, config.layers_per_block, groups))
            if i < len(widths) - 1:
                self.down_blocks[i].downsamplers = nn.ModuleList([Downsample(width)])
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(widths):                        # one ResNet more than on the way down
            self.up_blocks.append(Block(widths[max(i - 1, 0)], width, config.layers_per_block + 1, groups))
            if i < len(widths) - 1:
                self.up_blocks[i].upsamplers = nn.ModuleList([Upsample(width)])
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], EPS)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class VAE(nn.Module):
    """AutoencoderKL with its 1×1 convolutions around the latent."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    @property
    def scaling_factor(self) -> float:
        return self.config.scaling_factor

    @property
    def factor(self) -> int:
        """Picture pixels per latent pixel along one side: 8 in SD v1.4."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, 3, H, W] in [-1, 1] -> mean, logvar, each [B, 4, h, w], not yet scaled."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z: Tensor) -> Tensor:
        """z [B, 4, h, w], already divided by the scaling factor -> [B, 3, H, W], about [-1, 1]."""
        return self.decoder(self.post_quant_conv(z))

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=torch.float32, device="cpu") -> "VAE":
        """Read a `vae` folder. Raises UserError naming what is missing, extra or not supported."""
        config = read_config(Path(folder), VAEConfig, SUPPORTED)
        return load_network(cls, config, folder, "diffusion_pytorch_model", dtype, device, new_name)


# SD v1.4's full-precision file spells the mid attention as in 2022, its half-precision file as today.
HISTORIC = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def new_name(key: str) -> str:
    if ".mid_block.attentions.0." in key:
        block, name, kind = key.rsplit(".", 2)
        return f"{block}.{HISTORIC.get(name, name)}.{kind}"
    return key
