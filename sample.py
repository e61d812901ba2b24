"""Prompts to pictures.

    python sample.py "a photo of an airplane" --n 8 --seed 0
    python sample.py "a photo of an airplane" "a photo of the sky" --edit out/airplane
    python sample.py "a photo of the ship" --edit out/airplane --edit out/ship      # merged, see merge.py
    python sample.py "a red car" --model CompVis/stable-diffusion-v1-4 --device cuda --dtype bfloat16

Each prompt is a row of one PNG, each column a seed: --seed, --seed + 1, … A picture depends on its prompt and
its own seed only, never on the batch that it was drawn in.
"""
import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from clip_text import CLIPTextModel, CLIPTokenizer
from command import DTYPES, check_seed, command_line, free_name, pick_device, slug
from diffusion import SAMPLERS, Scheduler, guided
from files import MINI, UserError, beside, defaults, model_folder, put_weights, read_edit
from merge import edited_weights
from pictures import grid, write_png
from unet import UNet
from vae import VAE


def tokenizer_folder(model: Path) -> Path:
    """tokenizer/ of a model. A single file has none: the one beside it or, from the hub (2 MB), SD v1.4's."""
    folder = beside(model / "tokenizer")
    if folder == model / "tokenizer" or folder.is_dir():
        return folder
    import hub                                                    # only needed here, and slow to import
    try:
        return hub.tokenizer()
    except Exception as error:                                    # no network, …
        raise UserError(f"{model} has no tokenizer and {hub.SD}'s could not be downloaded "
                        f"({type(error).__name__}): put that tokenizer/ folder beside the file") from None


class Text:
    """Tokenizer and text encoder: prompts -> rows [B, T, D]. In float32: edits rest on it."""

    def __init__(self, folder: Path, device="cpu"):
        self.tokenizer = CLIPTokenizer.from_pretrained(tokenizer_folder(folder))
        self.encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", device=device)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        for prompt in dict.fromkeys(prompts):
            if cut := self.tokenizer.cut(prompt):
                print(f"warning: {prompt[:40]!r} has more than {self.tokenizer.length} tokens; "
                      f"cut off: {cut!r}", file=sys.stderr)
        ids = self.tokenizer(prompts).to(self.encoder.final_layer_norm.weight.device)
        return torch.cat([self.encoder(part) for part in ids.split(64)])


class Model:
    """A whole Stable Diffusion folder, ready to draw."""

    def __init__(self, folder: Path, device="cpu", dtype=torch.float32, edit=None, text: Text | None = None):
        self.folder, self.device, self.dtype = folder, torch.device(device), dtype
        self.text = text or Text(folder, device)
        self.unet = UNet.from_pretrained(folder / "unet", dtype, device)
        self.vae = VAE.from_pretrained(folder / "vae", dtype, device)
        for network in (self.unet, self.vae):                     # on a CPU 5 % faster at SD's size, 10 to 20
            network.to(memory_format=torch.channels_last)         # at mini's: the convolutions' own layout
        widths, latent = self.unet.config, self.vae.config.latent_channels
        if not widths.in_channels == widths.out_channels == latent:                  # inpainting: 9
            raise UserError(f"{folder} is no text-to-image model: its U-Net takes {widths.in_channels} "
                            f"channels, its VAE {latent}")
        self.scheduler = Scheduler.from_pretrained(folder / "scheduler")
        self.defaults = defaults(folder)
        if edit:
            put_weights(self.unet, read_edit(edit, folder))

    def noise(self, seeds: list[int]) -> Tensor:
        """Pure noise, each seed's from its own generator on the CPU: [B, 4, h, w], float32."""
        side = self.defaults["size"] // self.vae.factor
        return torch.stack([torch.randn(self.unet.config.in_channels, side, side,
                                        generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    @torch.no_grad()
    def draw(self, prompts: list[str] | Tensor, seeds: list[int], steps: int | None = None,
             guidance: float | None = None, sampler: str = "ddim", batch: int | None = None) -> Tensor:
        """B prompts, or their rows [B, T, D], and B seeds -> pictures [B, 3, H, W] in [0, 1], float32, on the
        CPU. Shows progress. What is None is the model's default. Raises UserError for impossible steps.
        """
        steps = self.defaults["steps"] if steps is None else steps
        guidance = self.defaults["guidance"] if guidance is None else guidance
        side = self.defaults["size"] // self.vae.factor
        batch = batch or max(1, 8192 // side ** 2)                # 32 of mini's pictures, 2 of SD's
        if isinstance(prompts, Tensor):
            empty, rows = self.text([""]), prompts
        else:
            unique = list(dict.fromkeys(["", *prompts]))
            encoded = self.text(unique)
            empty, rows = encoded[:1], encoded[[unique.index(prompt) for prompt in prompts]]
        pictures = []
        with tqdm(total=len(prompts) * steps, desc="drawing", unit="step", leave=False, disable=None) as bar:
            for i in range(0, len(prompts), batch):
                c = rows[i:i + batch]
                both = torch.cat([empty.to(c.device).expand_as(c), c]).to(self.device, self.dtype)
                context = self.unet.read(both)                                       # of [2B, T, D]

                def eps(z: Tensor, t: int) -> Tensor:
                    bar.update(len(c))
                    time = torch.full((), t, device=self.device)  # --compile would compile anew for each int
                    noise = self.unet(torch.cat([z, z]).to(self.dtype), time, context).float()
                    return guided(*noise.chunk(2), guidance)

                start = self.noise(seeds[i:i + batch]).to(self.device)
                z = SAMPLERS[sampler](eps, start, self.scheduler, steps)
                x = self.vae.decode((z / self.vae.scaling_factor).to(self.dtype))
                pictures.append((x.float() / 2 + 0.5).clamp(0, 1).cpu())
        return torch.cat(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+", help="one row of pictures each")
    parser.add_argument("--model", default=MINI, help="folder, file or hub id (default: mini)")
    parser.add_argument("--edit", action="append",
                        help="an edit folder such as out/airplane; several of realera.py are merged")
    parser.add_argument("--n", type=int, default=4, help="pictures per prompt (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture in a row (default 0)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's; SD 50)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's; SD 7.5)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="ddim (default) or pndm")
    parser.add_argument("--batch", type=int, help="pictures drawn at a time (default: by their size)")
    parser.add_argument("--out", type=Path, help="PNG to write; must not exist (default: a new name in out/)")
    parser.add_argument("--device", default="auto", help="auto (CUDA or CPU), cpu, cuda, mps")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of U-Net, VAE (default float32)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net: for many pictures")
    args = parser.parse_args()
    check_seed(args.seed)
    if args.n < 1 or (args.batch is not None and args.batch < 1):
        raise UserError("--n and --batch must be at least 1")
    if args.out and args.out.exists():
        raise UserError(f"{args.out} exists: choose another --out")
    model = Model(model_folder(args.model), pick_device(args.device), DTYPES[args.dtype])
    if args.edit:
        put_weights(model.unet, edited_weights(args.edit, model.folder, model.text))
    if args.compile:
        model.unet.compile()
    steps = model.defaults["steps"] if args.steps is None else args.steps
    guidance = model.defaults["guidance"] if args.guidance is None else args.guidance
    start = time.perf_counter()
    prompts = [prompt for prompt in args.prompts for _ in range(args.n)]
    seeds = [args.seed + i for _ in args.prompts for i in range(args.n)]
    pictures = model.draw(prompts, seeds, steps, guidance, args.sampler, args.batch)
    seconds = (time.perf_counter() - start) / len(pictures)
    out = args.out or free_name(Path("out") / f"{slug(args.prompts[0]) or 'empty'}-seed{args.seed}.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_png(out, grid(pictures, args.n, zoom=max(1, 96 // pictures.shape[-1])))
    print(f"{out}  seeds {args.seed}–{args.seed + args.n - 1}, {steps} steps of {args.sampler}, "
          f"guidance {guidance}, {seconds:.2f} s per picture")


if __name__ == "__main__":
    command_line(main)
