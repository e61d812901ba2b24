"""Draw many pictures and keep what CLIP sees in them: resumable, on any number of processes and machines.

Of every picture one line of JSON is kept: prompt, seed, and CLIP's image feature (unit vector, float16,
base64). All metrics follow from features and text, so another choice of class names draws nothing again.
Lines lie in `<folder>/<key>/`, the key being a hash of the weights and of all settings that a picture depends
on: results of different settings cannot mix. Each process appends to a file of its own, a batch in one write.
A killed run loses at most the batch in flight, and the same command goes on from there.

    torchrun --nproc-per-node 8 -- experiments/tables.py --table 1 …

The folder must be one that all processes share.
"""
import base64
import functools
import hashlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor

from plumbing import UserError
from plumbing.book import book
from plumbing.cli import RANK, WORLD
from plumbing.disk import link, read_json, whole
from plumbing.edits import base_hash, edit_file, keys_values
from plumbing.models import fingerprint
from plumbing.pictures import pixels, write_png
from plumbing.progress import progress
from plumbing.prompts import choices

Picture = tuple[str, int]                                         # prompt and seed
PATIENCE = 60                                                     # seconds


@functools.cache
def store():
    """Keys and values that all processes see. torchrun keeps them, longer than any process lives."""
    return next(torch.distributed.rendezvous("env://"))[0]


def barrier() -> None:
    """Wait until every process is here; after a minute, say for whom."""
    number = store().add(f"barriers of {RANK}", 1) if WORLD > 1 else 0
    for rank in range(WORLD):
        late = time.monotonic() + PATIENCE
        while number and store().add(f"barriers of {rank}", 0) < number:
            time.sleep(0.02)
            if time.monotonic() > late:
                print(f"process {RANK} of {WORLD} waits for process {rank}", file=sys.stderr)
                late = float("inf")


def read_features(files: list[Path], width: int) -> tuple[dict[Picture, Tensor], int]:
    """Features [width] by (prompt, seed), and how many lines are unreadable. Of a picture that is there
    twice, the first counts."""
    found, bad = {}, 0
    for path in files:
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                feature = np.frombuffer(base64.b64decode(record["feature"], validate=True), np.float16)
                right = len(feature) == width and np.isfinite(feature).all()
                if not (right and isinstance(record["prompt"], str)):
                    raise ValueError
                found.setdefault((record["prompt"], int(record["seed"])),
                                 torch.from_numpy(feature.astype(np.float32)))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):     # cut off, or damaged
                bad += 1
    return found, bad


class Results:
    """`found`: features by (prompt, seed) of one setting; `add` keeps more. `settings` go into JSON."""

    def __init__(self, folder: Path, settings: dict, width: int):
        text = json.dumps(settings, sort_keys=True, indent=1)
        self.folder, self.width = folder / hashlib.sha256(text.encode()).hexdigest()[:16], width
        self.folder.mkdir(parents=True, exist_ok=True)
        self.mine, self.all = self.folder / f"process{RANK}.jsonl", self.folder / "results.jsonl"
        with whole(self.folder / f"settings{RANK}.json") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
        self.found: dict[Picture, Tensor] = {}
        if bad := self.read():
            print(f"warning: {self.folder}: {bad} unreadable lines dropped, {len(self.found)} good ones kept",
                  file=sys.stderr)

    def read(self) -> int:
        """Everything that any process has written; how many lines are unreadable."""
        self.found, bad = read_features([self.all, *sorted(self.folder.glob("process*.jsonl"))], self.width)
        return bad

    def take_over(self, jobs: list[Picture], folders: list[Path]) -> int:
        """Add what results of these very settings in other `folders` have of `jobs`. Returns how many."""
        files = [folder / self.folder.name / self.all.name for folder in folders]
        there, _ = read_features([file for file in files if file != self.all], self.width)
        new = {job: there[job] for job in jobs if job in there and job not in self.found}
        if new and RANK == 0:
            self.add(list(new), torch.stack(list(new.values())))
        self.found |= new
        return len(new)

    @staticmethod
    def lines(jobs: list[Picture], features: list[Tensor]) -> bytes:
        return "".join(json.dumps({"prompt": prompt, "seed": seed, "feature": base64.b64encode(
            vector.numpy().astype(np.float16).tobytes()).decode()}) + "\n"
            for (prompt, seed), vector in zip(jobs, features)).encode()

    def add(self, jobs: list[Picture], features: Tensor) -> None:
        with open(self.mine, "a+b") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
            cut = file.read() not in (b"", b"\n")                 # a torn line stays alone
            file.write((b"\n" if cut else b"") + self.lines(jobs, list(features)))

    def settle(self) -> None:
        """One file in the order of prompts and seeds, the same for any number of processes."""
        barrier()
        self.read()
        barrier()
        if RANK == 0 and (parts := list(self.folder.glob("process*.jsonl"))):
            jobs = sorted(self.found)
            with whole(self.all) as temporary:
                temporary.write_bytes(self.lines(jobs, [self.found[job] for job in jobs]))
            for path in parts:
                path.unlink()
        barrier()


def picture_name(job: Picture) -> str:
    return f"{hashlib.sha256(job[0].encode()).hexdigest()[:16]}-{job[1]}.png"


def evaluate(model, clip, jobs: list[Picture], folder: Path, steps: int | None = None,
             guidance: float | None = None, batch: int | None = None, keep: Path | None = None,
             what: str = "pictures", rows: dict[str, Tensor] | None = None,
             reuse: list[Path] = ()) -> dict[Picture, Tensor]:
    """Draw every job that no earlier run has, and return all features {(prompt, seed): [P]}.

    The work is cut into batches before it is dealt to the processes, so no picture depends on their number.
    keep: folder that will hold just these pictures as PNG. rows: what to show the network in place of a
    prompt, {prompt: [T, D]}. reuse: folders of other runs; what they have of the same weights and settings
    is taken over. Raises UserError for impossible settings.
    """
    steps = model.defaults["steps"] if steps is None else steps
    guidance = model.defaults["guidance"] if guidance is None else guidance
    model.scheduler.timesteps(steps)                              # refuses what is impossible
    if batch is not None and batch < 1:
        raise UserError("--batch must be at least 1")
    if any(not 0 <= seed < 2 ** 63 for _, seed in jobs):
        raise UserError("seeds must be at least 0 and below 2 to the 63rd")
    weights = {name: p.data.float().cpu() for name, p in keys_values(dict(
        model.unet.named_parameters())).items()}
    settings = {"model": fingerprint(model.folder), "cross-attention": base_hash(weights),
                "clip": base_hash({"": clip.visual_projection.weight.cpu()}), "steps": steps,
                "guidance": guidance, "size": model.defaults["size"], "dtype": str(model.dtype)}
    if others := {name: W.float().cpu() for name, W in model.worn.items() if name not in weights}:
        settings["other weights"] = base_hash(others)             # of edits beyond keys and values
    if model.worn.drawing:
        settings["drawing"] = model.worn.about                    # of methods that act while it is drawn
    if rows:
        settings["rows"] = base_hash(rows)
    results = Results(folder, settings, clip.config.projection_dim)
    batch, jobs = batch or model.batch, list(dict.fromkeys(jobs))
    if (taken := results.take_over(jobs, reuse)) and RANK == 0:
        print(f"{what}: {taken} of {len(jobs)} pictures are known from earlier runs")
    by_seed = sorted(jobs, key=lambda job: job[1])                # so a larger --n later begins alike
    blocks, place = [by_seed[i:i + batch] for i in range(0, len(jobs), batch)], results.folder / "pictures"

    def done(job: Picture) -> bool:
        return job in results.found and (not keep or (place / picture_name(job)).exists())

    todo = [block for block in blocks[RANK::WORLD] if not all(map(done, block))]
    with progress(sum(map(len, todo)), what, "picture", quiet=RANK > 0) as bar:
        for block in todo:
            prompts, seeds = zip(*block)
            shown = torch.stack([rows[prompt] for prompt in prompts]) if rows else list(prompts)
            pictures = model.draw(shown, list(seeds), steps, guidance, batch=batch)
            with torch.no_grad():
                features = clip.image_features(clip.preprocess(pictures.to(clip.logit_scale))).cpu()
            if keep:
                place.mkdir(exist_ok=True)
                for job, picture in zip(block, pixels(pictures)):
                    write_png(place / picture_name(job), picture)
            results.add(block, features)
            bar.update(len(block))
    results.settle()
    if keep and RANK == 0:                                        # links: other settings' pictures stay apart
        keep.mkdir(parents=True, exist_ok=True)
        for old in keep.glob("*.png"):
            old.unlink()
        for job in jobs:
            link(place / picture_name(job), keep / picture_name(job))
    return {job: results.found[job] for job in jobs}


@functools.lru_cache(maxsize=1)                                   # and no second CLIP is kept alive
@torch.no_grad()
def text_vectors(clip, prompts: tuple[str, ...]) -> Tensor:
    """CLIP's unit vectors [prompts, P], on the CPU: kept, as the same names are asked for at every look."""
    return clip.text_features(clip.tokenizer(list(prompts)).to(clip.logit_scale.device)).cpu()


@torch.no_grad()
def rates(clip, concept: str, task: str, names, draw: Callable,
          seeds: range) -> dict[str, tuple[float, float]]:
    """Share of pictures whose first choice is the concept, and its mean probability, which decides between
    equal shares, per candidate. `draw`: jobs -> features."""
    among, prompts = choices(task, concept)
    text = text_vectors(clip, tuple(prompts))
    found, i = draw([(name, seed) for name in names for seed in seeds]), among.index(concept)
    counted = {}
    for name in names:
        cosines = torch.stack([found[name, seed] for seed in seeds]) @ text.T               # [seeds, prompts]
        logits = clip.logit_scale.exp().item() * cosines.double()
        counted[name] = ((logits.argmax(1) == i).double().mean().item(),
                         logits.softmax(1)[:, i].mean().item())
    return counted


def asked_for(args, labels: list[str], erased: list[tuple[str, str]], folder: Path) -> dict:
    """All that a table depends on, in JSON's types: it lies beside it as asked.json."""
    edits = {label: fingerprint(edit_file(edit) or Path(edit) / "run.json")
             for label, edit in zip(labels, args.edit)}
    flags = {name: getattr(args, name) for name in ("clip", "n", "steps", "seed", "dtype", "detector",
                                                     "group", "choose_from")}
    sha = {"book": json.dumps(book()).encode(), "prompts": args.prompts and args.prompts.read_bytes()}
    return {"edits": edits, "erased": list(map(list, erased)), "model": fingerprint(folder), **flags,
            **{name: data and hashlib.sha256(data).hexdigest() for name, data in sha.items()}}


def out_folder(args, labels: list[str], asked: dict) -> Path:
    """--out, or out/evaluation/<what is measured>, with -2, -3, … where the table of another command lies."""
    def others(folder: Path) -> bool:
        said = folder / "asked.json"
        return (folder / "metrics.json").exists() and not (said.exists() and read_json(said) == asked)

    if args.out:
        if others(args.out):
            raise UserError(f"--out {args.out} has another command's table: choose another --out, or none")
        return args.out
    name = "-".join(filter(None, ("+".join(labels), args.prompts and args.prompts.stem)))
    if len(name) > 80:
        name = f"{name[:70]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    folders = (Path("out/evaluation") / (name + f"-{i}" * (i > 1)) for i in range(1, 10 ** 6))
    return next(folder for folder in folders if not others(folder))
