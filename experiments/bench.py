"""How fast: ours beside diffusers and transformers in one run, and beside what the hardware allows.

    python experiments/bench.py --only unet-1 closed-form                    # mini/
    python experiments/bench.py --size full --device cuda --dtype bfloat16   # SD v1.4's size, random weights

Times are medians (min–max) of --runs after a warm-up. Ours and theirs take turns, so a busy machine slows
both, and the ratio is each pair's. The floor is the FLOP of our matrix products, convolutions and attention
over the rate of a large matrix product, first and last row. GiB is what a call adds to memory at its peak: by
CUDA's allocator or, on a CPU, where a row is a process of its own. out/bench/full, 4.3 GB, is made once.
"""
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
import realera
from clip_text import CLIPTextConfig, CLIPTextModel
from erasing import make_pairs
from lora import add_lora
from plumbing import UserError
from plumbing.cli import DTYPES, command_line, pick_device, program
from plumbing.disk import whole_folder
from plumbing.edits import cross_attention
from plumbing.models import MINI
from plumbing.stats import as_markdown, write_tables
from sample import Model, Text
from unet import UNet, UNetConfig
from vae import VAEConfig

ROOT = Path(__file__).resolve().parents[1]
for direction in ("", "_backward"):                               # torch counts attention on GPUs only
    flop_registry[getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention_for_cpu{direction}")] = \
        flop_registry[getattr(torch.ops.aten, f"_scaled_dot_product_flash_attention{direction}")]


def full_size(part: str):
    """SD v1.4's `unet`, `vae` or `text_encoder` as diffusers or transformers make it: float32, random."""
    import diffusers                                              # slow, as all imports of theirs here
    import transformers
    torch.manual_seed(0)
    if part == "unet":
        return diffusers.UNet2DConditionModel(**asdict(UNetConfig()))
    if part == "vae":
        return diffusers.AutoencoderKL(down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=[
            "UpDecoderBlock2D"] * 4, **asdict(VAEConfig()))
    return transformers.CLIPTextModel(transformers.CLIPTextConfig(**asdict(CLIPTextConfig())))


def make_full_size(folder: Path) -> None:
    """Write a model folder of SD v1.4's size; scheduler, tokenizer and vocabulary are mini's, 77 tokens."""
    import diffusers
    parts = {part: full_size(part) for part in ("text_encoder", "unet", "vae")}
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(MINI, **parts)
    pipe.tokenizer.model_max_length = 77
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer))
    with whole_folder(folder) as new:
        pipe.save_pretrained(new)


def measured(run: Callable, device: torch.device) -> tuple[float, float | None]:
    """Seconds of run(), on CUDA also the GiB it adds. What runs in a process of its own returns both."""
    cuda, synchronize = device.type == "cuda", getattr(torch, device.type).synchronize   # no-op on a CPU
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    synchronize()
    before, start = cuda and torch.cuda.memory_allocated(), time.perf_counter()
    found = run()
    synchronize()
    seconds, most = time.perf_counter() - start, cuda and torch.cuda.max_memory_allocated()
    return found if isinstance(found, tuple) else (seconds, (most - before) / 2 ** 30 if cuda else None)


def flops(run: Callable) -> int:
    """FLOP of the matrix products, convolutions and attention in run(), gradients included."""
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def compare(title: str, ours: Callable, theirs: Callable | None, runs: int, device: torch.device) -> dict:
    """A row of the table: warm up, then take turns. Times and ratio are [median, min, max]."""
    sides = {"ours": ours} | ({"theirs": theirs} if theirs else {})
    for run in sides.values():
        run()                                                     # with --compile, this compiles
    rounds = [{side: measured(run, device) for side, run in sides.items()} for _ in range(runs)]
    found = {f"{side}, ms": [1e3 * r[side][0] for r in rounds] for side in sides}
    found["ours / theirs, %"] = [100 * r["ours"][0] / r["theirs"][0] for r in rounds if theirs]
    row = {"": title} | {name: [statistics.median(x), min(x), max(x)] for name, x in found.items() if x}
    row |= {f"{side}, GiB": round(statistics.median(r[side][1] for r in rounds), 3)
            for side in sides if rounds[0][side][1] is not None}
    return row | ({"GFLOP": round(count / 1e9, 3)} if (count := flops(ours)) else {})


CHILD = """
from experiments.bench import *
from plumbing.progress import peak_memory
from vae import VAE
import diffusers, transformers
folder, device, dtype = Path({folder!r}), pick_device({device!r}), {dtype}
def run():
    {code}
before, (seconds, peak) = peak_memory(), measured(run, device)
print(json.dumps([seconds, peak or before and peak_memory() - before]))
"""


def loop_over_layers(W0: dict[str, Tensor], E: Tensor, E_star: Tensor, P: Tensor, lambda1: float,
                     lambda2: float, rows: int, outer: bool) -> dict[str, Tensor]:
    """Eq. 7 as UCE, MACE and RECE compute it: for each matrix its own sums over blocks of `rows` rows, and an
    explicit inverse, in its arguments' dtype. `outer`: an outer product a row; else one product a block."""
    def gram(a: Tensor, b: Tensor) -> Tensor:
        return (a[:, :, None] @ b[:, None, :]).sum(0) if outer else a.T @ b

    ridge, new = lambda2 * (E.square().sum() + lambda1 * P.square().sum()) / E.shape[1], {}
    for name, W in W0.items():
        top, B = ridge * W, ridge * torch.eye(E.shape[1], dtype=E.dtype)
        for weight, keys, targets in ((1, E, E_star), (lambda1, P, P)):
            for e, e_star in zip(keys.split(rows), targets.split(rows)):
                top = top + weight * gram(e_star @ W.T, e)                           # [out, D]
                B = B + weight * gram(e, e)                                          # [D, D]
        new[name] = top @ torch.inverse(B)
    return new


def distance(W: dict[str, Tensor], exact: dict[str, Tensor], W0: dict[str, Tensor]) -> float:
    """‖W − exact‖ / ‖exact − W0‖ over all matrices: an edit's error in units of the edit."""
    off, moved = (sum((exact[k] - X[k].double()).square().sum().item() for k in exact) for X in (W, W0))
    return (off / moved) ** 0.5


class Rows:
    """What to time: (ours, theirs), functions without arguments. Models are loaded when first needed."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, steps: int):
        self.folder, self.device, self.dtype, self.steps = folder, device, dtype, steps

    @cached_property
    def model(self) -> Model:
        return Model(self.folder, self.device, self.dtype)

    @cached_property
    def pipe(self):
        import diffusers
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(self.folder, dtype=self.dtype)
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(self.device)

    def random(self, batch: int) -> tuple[Tensor, Tensor]:
        """Latents [batch, 4, h, w] and text rows [batch, T, D]."""
        z, rows = self.model.noise(list(range(batch))), self.model.text(["x"]).expand(batch, -1, -1)
        return z.to(self.device, self.dtype), torch.randn(rows.shape).to(self.device, self.dtype)

    def unet(self, batch: int):
        x, context = self.random(batch)
        return lambda: self.model.unet(x, 500, context), lambda: self.pipe.unet(x, 500, context).sample

    def text(self, prompts: int):
        encoder = CLIPTextModel.from_pretrained(self.folder / "text_encoder", self.dtype, self.device)
        ids = self.model.text.tokenizer([f"a photo of {i} airplanes" for i in range(prompts)]).to(self.device)
        return lambda: encoder(ids), lambda: self.pipe.text_encoder(ids).last_hidden_state

    def vae(self):
        z, _ = self.random(1)
        return lambda: self.model.vae.decode(z), lambda: self.pipe.vae.decode(z).sample

    def picture(self):
        (z, _), numbers, prompt = self.random(1), self.model.defaults, "a photo of an airplane"
        return (lambda: self.model.draw([prompt], [0], self.steps),
                lambda: self.pipe(prompt, latents=z, num_inference_steps=self.steps, output_type="pt",
                                  guidance_scale=numbers["guidance"]).images)

    def child(self, code: str) -> Callable:
        """A function: seconds and added GiB of `code` in a new Python that has imported both sides."""
        code = CHILD.format(code=code, folder=str(self.folder.resolve()), device=str(self.device),
                            dtype=self.dtype)
        path = os.environ | {"PYTHONPATH": str(ROOT)}

        def run() -> tuple[float, float | None]:
            with tempfile.TemporaryDirectory() as empty:
                done = subprocess.run([sys.executable, "-c", code], cwd=empty, env=path, capture_output=True,
                                      encoding="utf-8")
            if done.returncode:
                raise UserError(f"a process to measure failed: {done.stderr.strip()[-300:]}")
            return tuple(json.loads(done.stdout.splitlines()[-1]))
        return run

    def load(self, then: str = ""):
        """Text encoder, UNet and VAE. Both sides map the files into memory; only ours reads them, for NaN."""
        return self.child(LOAD_OURS + then), self.child(LOAD_THEIRS + then)

    def closed_form(self, outer: bool):
        """One concept, M = 5, N = 3, and the empty prompt; without the text encoder."""
        text, s, W0 = Text(self.folder), realera.Settings(M=5, N=3), cross_attention(self.folder)
        pairs, stay = make_pairs(["airplane"], ["sky"], "object", text, s.rows, 0), text([""])
        E, E_star, P = realera.mine(pairs[0], s)
        def loop(dtype: torch.dtype, outer: bool) -> dict[str, Tensor]:
            W, rows = {name: W.to(dtype) for name, W in W0.items()}, (E, E_star, torch.cat([P, stay[0]]))
            return loop_over_layers(W, *(x.to(dtype) for x in rows), s.lambda1, s.lambda2, pairs[0].n, outer)

        sides = (lambda: realera.edited(W0, realera.erase_in_closed_form(pairs, stay, s)[0]),
                 lambda: loop(torch.float32, outer))
        exact = loop(torch.float64, outer=False)
        errors = [f"{distance(side(), exact, W0):.1e}" for side in sides]
        print(f"closed form, error in units of ‖ΔW‖: ours {errors[0]}, theirs {errors[1]}")
        return sides

    def lora_step(self):
        """An even step: the teacher's prediction, two of the student's, gradients, Adam."""
        import diffusers
        import peft
        s, folder = realera.Settings(), self.folder / "unet"
        W0 = {name: W.to(self.device, self.dtype) for name, W in cross_attention(self.folder).items()}
        unet = UNet.from_pretrained(folder, self.dtype, self.device)
        add_lora(unet, s.rank)
        peer = diffusers.UNet2DConditionModel.from_pretrained(folder, dtype=self.dtype).to(self.device)
        peer.add_adapter(peft.LoraConfig(r=s.rank, target_modules=["attn2.to_k", "attn2.to_v"]))
        (z, near), (target, beyond) = self.random(s.batch), self.random(s.batch)
        @contextlib.contextmanager
        def adapters_off():
            peer.disable_adapters()
            yield
            peer.enable_adapters()

        @torch.enable_grad()
        def step(eps: Callable, teacher: Callable, optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad()
            with torch.no_grad(), teacher():
                still = eps(z, 500, beyond)
            for term in realera.noise_alignment_loss(eps, z, 500, target, near, beyond, still):
                term.backward()
            optimizer.step()

        adam, adam_peer = (torch.optim.Adam([p for p in network.parameters() if p.requires_grad], s.lr)
                           for network in (unet, peer))
        return (partial(step, unet, lambda: realera.as_teacher(unet, W0), adam),
                partial(step, lambda *inputs: peer(*inputs).sample, adapters_off, adam_peer))

    def erasure(self, method: str, *closed_form: str):
        """A method's command without pictures; on a CPU with the flags for its closed form alone."""
        flags = closed_form if self.device.type == "cpu" else ()
        return self.child(ERASE.format(method=method, flags=flags)), None


LOAD_OURS = """networks = [kind.from_pretrained(folder / part, dtype, device) for part, kind in (
        ("text_encoder", CLIPTextModel), ("unet", UNet), ("vae", VAE))]"""
LOAD_THEIRS = """networks = [kind.from_pretrained(folder / part, dtype=dtype).to(device) for part, kind in (
        ("text_encoder", transformers.CLIPTextModel), ("unet", diffusers.UNet2DConditionModel),
        ("vae", diffusers.AutoencoderKL))]"""
READ = "; [parameter.sum() for network in networks for parameter in network.parameters()]"
ERASE = """sys.argv = ["", "--concept", "airplane", "--anchor", "sky", "--no-pictures",
        "--model", str(folder), "--device", str(device), "--dtype", str(dtype)[6:], *{flags}]
    import runpy; runpy.run_path(str(ROOT / {method!r}), {{}}, "__main__")"""

ROWS = {
    "unet-1": ("UNet, batch 1", Rows.unet, 1), "unet-2": ("UNet, batch 2", Rows.unet, 2),
    "unet-8": ("UNet, batch 8", Rows.unet, 8), "text-1": ("CLIP text, 1 prompt", Rows.text, 1),
    "text-77": ("CLIP text, 77 prompts", Rows.text, 77), "vae": ("VAE decode, 1 picture", Rows.vae),
    "picture": ("DDIM picture with guidance, {steps} steps", Rows.picture),
    "load": ("loading", Rows.load), "load-read": ("loading, then reading every weight", Rows.load, READ),
    "closed-form": ("closed form; theirs: a loop of outer products", Rows.closed_form, True),
    "closed-form-gram": ("closed form; theirs: a loop of matrix products", Rows.closed_form, False),
    "lora-step": ("LoRA step, batch 8", Rows.lora_step),
    "erasure": ("whole erasure", Rows.erasure, "realera.py", "--lora-steps", "0"),
    "uce": ("UCE", Rows.erasure, "baselines/uce.py"), "speed": ("SPEED", Rows.erasure, "baselines/speed.py"),
    "mace": ("MACE", Rows.erasure, "baselines/mace.py", "--set", "lora_steps=0")}
MINUTES = ("unet-8", "picture", "lora-step")                      # a call at full size on a CPU


@torch.no_grad()
def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--size", choices=("mini", "full"), default="mini", help="which model (default mini)")
    parser.add_argument("--only", nargs="+", choices=ROWS, metavar="NAME",
                        help=f"of {', '.join(ROWS)} (default: all, but at full size on a CPU not "
                             f"{', '.join(MINUTES)}: minutes a call)")
    parser.add_argument("--runs", type=int, default=5, help="timed calls a side (default 5)")
    parser.add_argument("--steps", type=int, default=25, help="of the picture (default 25)")
    parser.add_argument("--device", default="auto", help="auto (CUDA or CPU), cpu, cuda, mps")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of both sides (default float32)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the U-Nets of both sides")
    args = parser.parse_args()
    try:
        import diffusers, peft, transformers  # noqa: E401,F401
    except ImportError:
        raise UserError("diffusers, transformers or peft is missing: pip install -r requirements-test.txt"
                        ) from None
    if min(args.runs, args.steps) < 1:
        raise UserError("--runs and --steps must be at least 1")
    for library in (diffusers, transformers):
        library.logging.set_verbosity_error(), library.logging.disable_progress_bar()
    device, dtype, out = pick_device(args.device), DTYPES[args.dtype], Path("out/bench")
    folder = out / "full" if args.size == "full" else Path(MINI)
    if not folder.exists():
        make_full_size(folder)
    slow = MINUTES if args.size == "full" and device.type == "cpu" else ()
    rows, n = Rows(folder, device, dtype, args.steps), 8192 if device.type == "cuda" else 2048
    for unet in (rows.model.unet, rows.pipe.unet) if args.compile else ():
        unet.compile()
    a, b = torch.randn(2, n, n).to(device, dtype)
    product = f"product of two {n}×{n} matrices, {args.dtype}, {torch.get_num_threads()} threads"
    table = [compare(product, lambda: a @ b, None, 10, device)]
    for name in args.only or [name for name in ROWS if name not in slow]:
        title, make, *how = ROWS[name]
        print(f"{name} …", file=sys.stderr)
        table.append(compare(title.format(steps=args.steps), *make(rows, *how), args.runs, device))
    table.append(compare(product, lambda: a @ b, None, 10, device))           # it may have been busy before
    rate = max(row["GFLOP"] / row["ours, ms"][1] for row in (table[0], table[-1]))
    table = [row | ({"floor, ms": round(row["GFLOP"] / rate, 2)} if "GFLOP" in row else {}) for row in table]
    write_tables(out, f"{args.size}-{device.type}", table)
    print(f"{as_markdown(table)}\nwrote {out / args.size}-{device.type}.md, .csv and .json")


if __name__ == "__main__":
    command_line(main)
