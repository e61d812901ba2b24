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
import datetime
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from plumbing import UserError
from plumbing.disk import link, read_json, whole
from plumbing.edits import base_hash, edit_file
from plumbing.models import fingerprint
from plumbing.pictures import write_png
from plumbing.prompts import book

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))       # torchrun sets these
Picture = tuple[str, int]                                         # prompt and seed


def barrier() -> None:
    """Wait until every process is here."""
    if WORLD > 1:
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(days=1))
        torch.distributed.barrier()


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
                if len(feature) != width:
                    raise ValueError
                found.setdefault((record["prompt"], int(record["seed"])),
                                 torch.from_numpy(feature.astype(np.float32)))
            except (ValueError, KeyError, TypeError):             # cut off in mid-write, or damaged
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
    weights = {name: p.data.float().cpu() for name, p in model.unet.named_parameters()
               if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    settings = {"model": fingerprint(model.folder), "cross-attention": base_hash(weights),
                "clip": base_hash({"": clip.visual_projection.weight.cpu()}), "steps": steps,
                "guidance": guidance, "size": model.defaults["size"], "dtype": str(model.dtype)}
    if others := {name: W.float().cpu() for name, W in model.worn.items() if name not in weights}:
        settings["other weights"] = base_hash(others)             # of edits beyond keys and values
    if rows:
        settings["rows"] = base_hash(rows)
    results = Results(folder, settings, clip.config.projection_dim)
    batch, jobs = batch or model.batch, list(dict.fromkeys(jobs))
    if (taken := results.take_over(jobs, reuse)) and RANK == 0:
        print(f"{what}: {taken} of {len(jobs)} pictures are known from earlier runs")
    blocks = [jobs[i:i + batch] for i in range(0, len(jobs), batch)]

    def picture_file(job: Picture) -> Path:
        prompt = hashlib.sha256(job[0].encode()).hexdigest()[:16]
        return results.folder / "pictures" / f"{prompt}-{job[1]}.png"

    def done(job: Picture) -> bool:
        return job in results.found and (not keep or picture_file(job).exists())

    todo = [block for block in blocks[RANK::WORLD] if not all(map(done, block))]
    quiet = None if RANK == 0 else True                           # None: where there is no terminal
    with tqdm(total=sum(map(len, todo)), desc=what, unit="picture", disable=quiet) as bar:
        for block in todo:
            prompts, seeds = zip(*block)
            shown = torch.stack([rows[prompt] for prompt in prompts]) if rows else list(prompts)
            pictures = model.draw(shown, list(seeds), steps, guidance, batch=batch)
            with torch.no_grad():
                features = clip.image_features(clip.preprocess(pictures.to(clip.logit_scale))).cpu()
            if keep:
                picture_file(block[0]).parent.mkdir(exist_ok=True)
                for job, picture in zip(block, pictures):
                    write_png(picture_file(job), (picture.permute(1, 2, 0) * 255).round().byte().numpy())
            results.add(block, features)
            bar.update(len(block))
    results.settle()
    if keep and RANK == 0:                                        # links: other settings' pictures stay apart
        keep.mkdir(parents=True, exist_ok=True)
        for old in keep.glob("*.png"):
            old.unlink()
        for job in jobs:
            link(picture_file(job), keep / picture_file(job).name)
    return {job: results.found[job] for job in jobs}


def asked_for(args, labels: list[str], erased: list[tuple[str, str]], folder: Path) -> dict:
    """All that a table depends on, in JSON's types: it lies beside it as asked.json."""
    edits = {label: fingerprint(edit_file(edit) or Path(edit) / "run.json")
             for label, edit in zip(labels, args.edit)}
    flags = {name: getattr(args, name) for name in ("clip", "n", "steps", "seed", "dtype", "detector")}
    sha = {"book": json.dumps(book()).encode(), "prompts": args.prompts and args.prompts.read_bytes()}
    return {"edits": edits, "erased": list(map(list, erased)), "model": fingerprint(folder), **flags,
            **{name: data and hashlib.sha256(data).hexdigest() for name, data in sha.items()}}


def out_folder(args, labels: list[str], asked: dict) -> Path:
    """--out, or out/evaluation/<what is measured>, with -2, -3, … where the table of another command lies."""
    def others(folder: Path) -> bool:
        said = folder / "asked.json"
        return (folder / "metrics.json").exists() and not (said.exists() and read_json(said) == asked)

    if args.out:
        if others(args.out) and RANK == 0:
            print(f"warning: the table in {args.out} is of another command, and is replaced", file=sys.stderr)
        return args.out
    name = "-".join(filter(None, ("+".join(labels), args.prompts and args.prompts.stem)))
    if len(name) > 80:
        name = f"{name[:70]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    folders = (Path("out/evaluation") / (name + f"-{i}" * (i > 1)) for i in range(1, 10 ** 6))
    return next(folder for folder in folders if not others(folder))
