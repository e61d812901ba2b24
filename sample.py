"""Prompts to pictures, of the model and of its edits side by side.

    python sample.py "a photo of an airplane" --n 8 --seed 0
    python sample.py "a photo of the dog" "barking at the postman" --edit out/dog-closed --edit out/dog
    python sample.py "a red car" --model CompVis/stable-diffusion-v1-4 --device cuda --dtype bfloat16

Each prompt is a row. With --edit the untouched model comes first, then each edit, from the same noise: what
differs along a row is the edit's doing. Two files are written: a plain PNG, which holds prompts, seeds, edits
and settings as text, and beside it a sheet with labels, an SVG for your browser or report. An --edit is a
folder of a method here, a .safetensors file, or a diffusers folder that somebody else made; --edit does not
put edits together, tools/merge.py does.

A picture depends on its prompt and its own seed only: --seed, --seed + 1, … In Python, from any folder:

    model = Model("mini")
    model.draw("a photo of the dog")                              # [1, 3, 64, 64]
    show(model, ["a photo of the dog"], {"RealEra": W})           # in a notebook: the labelled sheet
"""
import math
import sys
import time
from pathlib import Path
from typing import Callable, Iterable

import torch
from torch import Tensor

from clip_text import CLIPTextModel, CLIPTokenizer
from diffusion import SAMPLERS, Scheduler, ddim, guided
from plumbing import UserError, svg
from plumbing.cli import (DTYPES, EDIT, at_least_1, check_seed, command_line, free_name, model_args,
                          pick_device, program, slug)
from plumbing.edits import Edit, edit_labels, read_edit
from plumbing.models import defaults, model_folder, model_name, tokenizer_folder, vae_folder
from plumbing.pictures import write_sheet
from plumbing.progress import progress
from plumbing.weights import check_finite, put_weights
from unet import UNet
from vae import VAE


class Text:
    """Tokenizer and text encoder: prompts -> rows [B, T, D]. In float32: edits rest on it. clip_skip: how
    many of the encoder's last layers are left out, as in diffusers (web UIs count one more)."""

    def __init__(self, model: str | Path, device="cpu", clip_skip: int = 0):
        folder = model_folder(str(model))
        words = tokenizer_folder(folder)
        self.encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", device=device)
        config, layers = self.encoder.config, self.encoder.encoder.layers
        self.tokenizer = CLIPTokenizer.from_pretrained(words, config.max_position_embeddings)
        if self.tokenizer.size != config.vocab_size:
            raise UserError(f"{folder}: the text encoder has rows for {config.vocab_size} tokens, the "
                            f"tokenizer {self.tokenizer.size}: one lacks words that were added to the other")
        if not 0 <= clip_skip < len(layers):
            raise UserError(f"clip skip must lie in 0 … {len(layers) - 1} for {folder}, not {clip_skip}")
        del layers[len(layers) - clip_skip:]
        self.known: dict[str, Tensor] = {}                        # rows that drift.py asks for repeatedly

    @torch.no_grad()
    def __call__(self, prompts: str | list[str]) -> Tensor:
        prompts = [prompts] if isinstance(prompts, str) else prompts
        for prompt in dict.fromkeys(prompts):
            if cut := self.tokenizer.cut(prompt):
                print(f"warning: {prompt[:40]!r} has more than {self.tokenizer.length} tokens; "
                      f"cut off: {cut!r}", file=sys.stderr)
        ids = self.tokenizer(prompts).to(self.encoder.final_layer_norm.weight.device)
        return torch.cat([self.encoder(part) for part in ids.split(64)])


class Model:
    """A whole Stable Diffusion model, ready to draw. model: its folder or hub id, or "mini".

    clip_skip: as in Text. vae: another VAE, as a folder or a file. size: of the pictures, width and height in
    pixels, or one number for both (default: the model's).
    """

    def __init__(self, model: str | Path, device="cpu", dtype=torch.float32, text: Text | None = None,
                 clip_skip: int = 0, vae: str | Path | None = None,
                 size: int | tuple[int, int] | None = None):
        folder = model_folder(str(model))
        self.folder, self.device, self.dtype = folder, torch.device(device), dtype
        self.text = text or Text(folder, device, clip_skip)
        self.unet = UNet.from_pretrained(folder / "unet", dtype, device)
        self.vae = VAE.from_pretrained(vae_folder(vae) if vae else folder / "vae", dtype, device)
        for network in (self.unet, self.vae):                     # the convolutions' own layout: at SD's size
            network.to(memory_format=torch.channels_last)         # 5 and 12 % faster on a CPU
        widths, latent = self.unet.config, self.vae.config.latent_channels
        if not widths.in_channels == widths.out_channels == latent:                  # inpainting: 9
            raise UserError(f"{folder} is no text-to-image model: its U-Net takes {widths.in_channels} "
                            f"channels, its VAE {latent}")
        if self.text.encoder.config.hidden_size != widths.cross_attention_dim:
            raise UserError(f"{folder}: the text encoder's rows are "
                            f"{self.text.encoder.config.hidden_size} wide, but its U-Net reads "
                            f"{widths.cross_attention_dim}")
        self.scheduler = Scheduler.from_pretrained(folder / "scheduler")
        if self.scheduler.config.prediction_type == "v_prediction":        # SD 2.1's: from now on it gives ε
            self.unet.alphas_cumprod = self.scheduler.alphas_cumprod.to(self.device)
        own = defaults(folder, widths.sample_size * self.vae.factor)                 # 64 · 8; SD 2.1: 96 · 8
        self.defaults = own | ({} if size is None else {"size": size})
        size = self.defaults["size"]
        self.size = (size, size) if isinstance(size, int) else size
        for side in self.size:                                    # a latent pixel is a square of them
            if side % self.vae.factor or side < 1:
                low = max(1, side // self.vae.factor) * self.vae.factor
                raise UserError(f"pictures {side} pixels wide or high: {low} or {low + self.vae.factor} are "
                                f"possible, multiples of {self.vae.factor}")
        width, height = (side // self.vae.factor for side in self.size)
        self.latent = self.unet.config.in_channels, height, width
        self.batch = max(1, 8192 // (width * height))             # 32 of mini's pictures, 2 of SD's
        self.worn, self.own = Edit({}), {}                        # an edit's tensors, and ours in their place

    def put(self, W: dict[str, Tensor]) -> None:
        """Draw with an edit from now on, in place of an earlier one: its tensors and, if it is an Edit, its
        drawing functions; with {}, untouched."""
        put_weights(self.unet, self.own)
        self.worn = W if isinstance(W, Edit) else Edit(W)
        self.own = {name: self.unet.get_parameter(name).data for name in W}
        put_weights(self.unet, W)

    def noise(self, seeds: list[int]) -> Tensor:
        """Pure noise, each seed's from its own generator on the CPU: [B, 4, h, w], float32."""
        return torch.stack([torch.randn(self.latent, generator=torch.Generator().manual_seed(seed))
                            for seed in seeds])

    @torch.no_grad()
    def draw(self, prompts: str | list[str] | Tensor, seeds: list[int] | None = None,
             steps: int | None = None, guidance: float | None = None, sampler: str = "ddim",
             batch: int | None = None, rows: Callable | None = None, guide: Callable | None = None,
             beside: Tensor | None = None, strength: Callable | None = None, negative: str = "") -> Tensor:
        """B prompts, or their rows [B, T, D], and B seeds -> pictures [B, 3, H, W] in [0, 1], float32, on the
        CPU. Shows progress. What is None is the model's default; seeds: 0, 1, … One prompt as a string is
        drawn once for each seed. negative: what not to draw, guidance's other half. Raises UserError for
        impossible steps, or seeds that are not as many as prompts.

        For methods that change how a model draws: rows(c) gives other rows [B, T, D] for the prompts' rows c.
        guide(u, c, t, …) -> noise takes the place of u + s (c − u); it is called in the order of the steps, a
        batch at a time, with one more prediction for each of `beside`'s rows [k, T, D]. One that needs s, or
        has a memory, is an object whose start(s) gives such a function, anew for each batch.
        strength(c, prompt) says how much of the edit that was `put` a prompt with rows c [T, D] is drawn
        with: 0 none, 1 all; of rows alone the prompt is None. What is None is the edit's own, if it has one.
        """
        own = self.worn.drawing
        rows, strength = rows or own.get("rows"), strength or own.get("strength")
        if guide is None:
            guide, beside = own.get("guide"), own.get("beside")
        if isinstance(prompts, str):
            seeds = [0] if seeds is None else list(seeds)
            prompts = [prompts] * len(seeds)
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        steps = self.defaults["steps"] if steps is None else steps
        guidance = self.defaults["guidance"] if guidance is None else guidance
        batch = batch or self.batch
        if len(seeds) != len(prompts):
            raise UserError(f"{len(prompts)} prompts need as many seeds, not {len(seeds)}")
        if not math.isfinite(guidance):
            raise UserError(f"--guidance must be a finite number, not {guidance}")
        if isinstance(prompts, Tensor):
            empty, texts = self.text([negative]), prompts
        else:
            unique = list(dict.fromkeys([negative, *prompts]))
            encoded = self.text(unique)
            empty, texts = encoded[:1], encoded[[unique.index(prompt) for prompt in prompts]]
        if strength:
            m = [float(strength(c, None if isinstance(prompts, Tensor) else prompt))
                 for c, prompt in zip(texts, prompts)]
            return self.blended(texts, seeds, m, steps=steps, guidance=guidance, sampler=sampler,
                                batch=batch, rows=rows, guide=guide, beside=beside, negative=negative)
        texts = rows(texts) if rows else texts
        guide = guide or (lambda u, c, t: guided(u, c, guidance))
        beside = [] if beside is None else list(beside[:, None])
        pictures = []
        with progress(len(prompts) * steps, "drawing", "step") as bar:
            for i in range(0, len(prompts), batch):
                c = texts[i:i + batch]
                u, *more = (row.to(c).expand_as(c) for row in [empty, *beside])
                contexts = [self.unet.read(torch.cat(part).to(self.device, self.dtype))          # [2B, T, D]
                            for part in ([u, c], more) if part]   # apart: u and c stay what they are without
                guide_now = guide.start(guidance) if hasattr(guide, "start") else guide

                def eps(z: Tensor, t: int) -> Tensor:
                    bar.update(len(z))
                    time = torch.full((), t, device=self.device)  # --compile would compile anew for each int
                    noise = [part for context, k in zip(contexts, (2, len(beside))) for part in self.unet(
                        torch.cat([z] * k), time, context).float().chunk(k)]
                    return guide_now(noise[0], noise[1], t, *noise[2:])

                start = self.noise(seeds[i:i + batch]).to(self.device)
                z = SAMPLERS[sampler](eps, start, self.scheduler, steps)
                x = self.vae.decode((z / self.vae.scaling_factor).to(self.dtype)).float().cpu()
                if not x.isfinite().all():                        # asked here: a GPU is waited for once
                    check_finite(z, "the U-Net", self.dtype)
                    check_finite(x, "the VAE", self.dtype)
                pictures.append((x / 2 + 0.5).clamp(0, 1))
        return torch.cat(pictures)

    @torch.no_grad()
    def trajectories(self, e: Tensor, empty: Tensor, seed: int, pictures: int) -> tuple[Tensor, ...]:
        """Draw rows e [T, D] with guidance against `empty` [T, D], and keep every step: latents z [pictures,
        steps, 4, h, w], times t [steps], and the noise predicted there, ε(z, t, e), like z."""
        zs, ts, noises = [], [], []
        both = torch.cat([rows.expand(pictures, -1, -1) for rows in (empty, e)])
        both = both.to(self.dtype).to(self.device)                # in this order: MPS has no float64

        def eps(z: Tensor, t: int) -> Tensor:
            u, c = self.unet(torch.cat([z, z]), t, both).float().chunk(2)
            zs.append(z), ts.append(t), noises.append(c)
            return guided(u, c, self.defaults["guidance"])

        noise = self.noise([seed % 2 ** 31 + i for i in range(pictures)]).to(self.device)
        ddim(eps, noise, self.scheduler, self.defaults["steps"])
        return torch.stack(zs, 1), torch.tensor(ts, device=self.device), torch.stack(noises, 1)

    def blended(self, texts: Tensor, seeds: list[int], m: list[float], **how) -> Tensor:
        """`draw` with W₀ + m (W − W₀), where m is each prompt's strength: those of one m together."""
        W, own, drawn = self.worn, dict(self.own), [None] * len(texts)
        for x in sorted(set(m)):
            some = [i for i in range(len(m)) if m[i] == x]
            self.put(dict(W) if x == 1 else {} if x == 0 else     # without the edit's own strength
                     {name: own[name].float() + x * (W[name].to(own[name].device).float() - own[name].float())
                      for name in W})
            for i, picture in zip(some, self.draw(texts[some], [seeds[i] for i in some], **how)):
                drawn[i] = picture
        self.put(W)
        return torch.stack(drawn)


def draw_each(model: Model, prompts: list[str], edits: dict[str, dict[str, Tensor]], seeds: Iterable[int],
              **how) -> dict[str, Tensor]:
    """{name: edited tensors} -> {name: pictures [prompts, seeds, 3, H, W]}, all from the same noise; {} is
    the untouched model. how: as `Model.draw` takes it."""
    seeds, worn, drawn = list(seeds), model.worn, {}
    for name, W in edits.items():
        model.put(W)
        pictures = model.draw([prompt for prompt in prompts for _ in seeds], seeds * len(prompts), **how)
        drawn[name] = pictures.unflatten(0, (-1, len(seeds)))
    model.put(worn)
    return drawn


def show(model: Model, prompts: list[str], edits: dict[str, dict[str, Tensor]] | None = None,
         seeds: Iterable[int] = range(4), **how) -> svg.Drawing:
    """The untouched model and edits, {name: edited tensors}, side by side: a notebook displays what is
    returned, `plumbing.svg.write` saves it."""
    prompts = [prompts] if isinstance(prompts, str) else prompts
    return labelled(draw_each(model, prompts, {"untouched": {}} | (edits or {}), seeds, **how), prompts)


def labelled(drawn: dict[str, Tensor], prompts: list[str], **words) -> svg.Drawing:
    """The sheet of {name: pictures [prompts, n, 3, H, W]}: a row per prompt, a column per name."""
    return svg.sheet([[pictures[i] for pictures in drawn.values()] for i in range(len(prompts))],
                     [prompt or "(no text)" for prompt in prompts], list(drawn), **words)


def write_sheets(path: Path, drawn: dict[str, Tensor], prompts: list[str], about: dict, **words) -> None:
    """`path`, a plain PNG that holds `about`, columns and prompts as text, and the labelled SVG beside it."""
    write_sheet(path, *drawn.values(), text={"prompt": prompts[0] if len(prompts) == 1 else prompts,
                                             "columns": list(drawn)} | about)
    svg.write(path.with_suffix(".svg"), labelled(drawn, prompts, **words))


def sides(text: str) -> tuple[int, int]:
    """"512x768", or "512" for a square -> width, height."""
    width, _, height = text.partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise UserError(f"--size {text}: give it like 512x768, width x height in pixels") from None


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("prompts", nargs="+", help="one row of pictures each")
    model_args(parser)
    parser.add_argument("--edit", action="append", default=[], help=f"{EDIT}; several are compared")
    parser.add_argument("--strength", type=float, metavar="S", help="draw with this share of the change of "
                        "weights: 0 none, 1 all (default: all, or by prompt if the edit's method says so)")
    parser.add_argument("--n", type=int, default=4, help="pictures per prompt and edit (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture in a row (default 0)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's; SD 50)")
    parser.add_argument("--guidance", type=float, help="guidance scale (default: the model's; SD 7.5)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddim", help="ddim (default) or pndm")
    parser.add_argument("--negative", default="", metavar="TEXT", help="what not to draw")
    parser.add_argument("--size", type=sides, metavar="WxH", help="in pixels (default: the model's)")
    parser.add_argument("--clip-skip", type=int, default=0, metavar="N",
                        help="leave out the text encoder's last N layers; a web UI's “clip skip 2” is 1 here")
    parser.add_argument("--vae", metavar="FOLDER|FILE", help="another VAE than the model's")
    parser.add_argument("--batch", type=int, help="pictures drawn at a time (default: by their size)")
    parser.add_argument("--out", type=Path, help="PNG to write, an SVG beside it; neither may exist "
                                                 "(default: a new name in out/)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Net: for many pictures")
    args = parser.parse_args()
    check_seed(args.seed)
    at_least_1(args, "n", "batch")
    out = args.out or free_name(Path("out") / f"{slug(args.prompts[0]) or 'empty'}-seed{args.seed}.png")
    if out.suffix == ".svg":
        raise UserError(f"--out {out} names the PNG; the SVG comes beside it")
    for path in (out, out.with_suffix(".svg")):
        if path.exists():
            raise UserError(f"{path} exists: choose another --out")
    names = edit_labels(args.edit)
    model = Model(args.model, pick_device(args.device), DTYPES[args.dtype], None, args.clip_skip, args.vae,
                  args.size)
    edits = {"untouched": {}} | {name: read_edit(edit, model.folder, model.text)
                                 for name, edit in zip(names, args.edit)}
    strength = None if args.strength is None else lambda c, prompt: args.strength
    if strength and not (math.isfinite(args.strength) and args.edit and all(edits[name] for name in names)):
        raise UserError("--strength is a finite number, for an --edit that changes weights")
    if args.compile:
        model.unet.compile()
    steps = model.defaults["steps"] if args.steps is None else args.steps
    guidance = model.defaults["guidance"] if args.guidance is None else args.guidance
    start, seeds = time.perf_counter(), range(args.seed, args.seed + args.n)
    drawn = draw_each(model, args.prompts, edits, seeds, steps=steps, guidance=guidance, sampler=args.sampler,
                      batch=args.batch, negative=args.negative, strength=strength)
    seconds = (time.perf_counter() - start) / (len(drawn) * len(args.prompts) * args.n)
    how = f"seeds {seeds[0]}–{seeds[-1]}, {steps} steps of {args.sampler}, guidance {guidance}"
    out = free_name(out)                                          # it may have appeared meanwhile
    settings = {"steps": steps, "guidance": guidance, "sampler": args.sampler, "dtype": args.dtype}
    settings |= {name: value for name in ("negative", "size", "clip_skip", "vae", "strength")
                 if (value := getattr(args, name)) or name == "strength" and value is not None}
    name = model_name(args.model)
    write_sheets(out, drawn, args.prompts, {"seed": list(seeds), "edit": names, "model": name,
                                            "settings": settings}, footer=f"{name}: {how}")
    print(f"{out}  {how}, {seconds:.2f} s per picture\n{out.with_suffix('.svg')}  the same with labels")


if __name__ == "__main__":
    command_line(main)
