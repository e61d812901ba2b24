"""What every method that erases shares: concepts as rows of text, the command, the edit folder.

A method is one file: a docstring, `Settings`, its mathematics, and an `erase` that is handed to `run`:

    def erase(job: Job, s: Settings) -> dict[str, Tensor]:
        return edited(job.W0, delta)                  # tensors of the U-Net that have changed, by name

    if __name__ == "__main__":
        run("UCE", __doc__, Settings, erase)

    python erasing.py                                 # lists the methods that are here, a line each

`run` reads the flags, lets `erase` work, writes out/<concept>-<method>/ and draws before and after. A method
that changes how the model draws, not its weights, returns {} and puts the arguments for `Model.draw` into
job.drawing; its folder holds no erased.safetensors. In Python, after `import realera`:

    W, numbers = erase_with(realera, Model("mini"), "dog", "ground", M=100)

A prompt becomes T rows. Row 0 is begin-of-text and the same for all; the encoder is causal, so what a concept
means sits in its last token and in every row after it (end of text, padding). Those are the rows to edit.
"""
import ast
import dataclasses
import hashlib
import json
import sys
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from eval_clip import CLIP
from lora import lora_off
from plumbing import UserError
from plumbing.book import doubts
from plumbing.cli import (DTYPES, NoFlags, command_line, erasing_args, lines_of, pick_device, program,
                          settings_of, slug)
from plumbing.disk import whole_folder
from plumbing.drift import drift_of, drifts, presences, preview, rows_of, say_shares, text_change
from plumbing.edits import (DRAWING, Edit, as_filed, base_hash, change, cross_attention, original,
                            refuse_weights_alone, text_hash, write_edit, write_report)
from plumbing.formats import check_export, export_pipeline, write_lora
from plumbing.models import model_folder, model_name
from plumbing.progress import Clock
from plumbing.prompts import TASKS, anchor_of, filled, names_to_choose, preserved_prompts, watch_all
from plumbing.report import recorded, write_page
from sample import Model, Text, draw_each, write_sheets


@dataclass
class Pair:
    """A concept and its anchor, e and e_star [T, D], float64. n rows are edited, from start(_star) on."""
    concept: str
    anchor: str
    e: Tensor
    e_star: Tensor
    start: int
    start_star: int
    n: int
    seed: int
    prompt: str = ""
    prompt_star: str = ""

    def __str__(self) -> str:
        return f"{self.concept} → {self.anchor or 'nothing'}"

    def block(self) -> Tensor:
        return self.e[self.start:self.start + self.n]

    def block_star(self) -> Tensor:
        return self.e_star[self.start_star:self.start_star + self.n]

    def context(self, blocks: Tensor) -> Tensor:
        """Blocks [B, n, D] in place of the edited rows of e -> [B, T, D]."""
        context = self.e.expand(len(blocks), -1, -1).clone()
        context[:, self.start:self.start + self.n] = blocks
        return context


def make_pairs(concepts, anchors, task: str, text, rows: str, seed: int,
               prompts: str = "template") -> list[Pair]:
    """A Pair for each concept and its anchor: two lists, or two strings. An anchor None: the class's own in
    the book, else the task's. `rows`: tail = the last concept token and all after it; token = that token
    alone. `prompts`: template = the task's; word = the bare word, as in the code of UCE, where an empty
    anchor's rows begin with begin-of-text.

    The pairs come sorted, each with a seed of its own: the order in which they are given does not matter.
    Blocks are aligned at their first row; the longer one loses its end. Raises UserError for what cannot be
    erased."""
    template, first = ("{}", 0) if prompts == "word" else (TASKS[task][0], 1)
    concepts, anchors = ([x] if isinstance(x, str) else x for x in (concepts, anchors))
    concepts = [" ".join(concept.lower().split()) for concept in concepts]           # CLIP reads no capitals
    if not all(concepts):
        raise UserError("--concept is empty")
    anchors = anchors or [None] * len(concepts)
    if len(concepts) != len(anchors):
        raise UserError(f"{len(concepts)} concepts but {len(anchors)} anchors: each --concept needs one")
    anchors = [anchor_of(c, task) if anchor is None else anchor for c, anchor in zip(concepts, anchors)]
    anchors = [" ".join(anchor.lower().split()) for anchor in anchors]
    if len(set(concepts)) < len(concepts):
        raise UserError("a concept is given twice")
    pairs = []
    for concept, anchor in sorted(zip(concepts, anchors)):
        if concept == anchor:
            raise UserError(f"the concept {concept!r} is its own anchor: nothing would change")
        p, p_star = template.format(concept), filled(template, anchor)
        e, e_star = text([p, p_star]).cpu().double()              # in this order: MPS has no float64
        # row 0 is begin-of-text, so the last of k tokens is row k; an empty anchor starts at its end-of-text
        start, start_star = text.tokenizer.count(p), max(first, text.tokenizer.count(p_star))
        if max(start, start_star) > len(e) - 2:
            raise UserError(f"concept and anchor must fit into {len(e)} tokens: {p[:60]!r}, {p_star[:60]!r}")
        n = 1 if rows == "token" else len(e) - max(start, start_star)
        own = hashlib.sha256(json.dumps([seed, concept, anchor]).encode()).digest()
        pairs.append(Pair(concept, anchor, e, e_star, start, start_star, n, int.from_bytes(own[:6], "big"),
                          p, p_star))
    return pairs


class Job:
    """One erasure as asked for: what a method works with, and where it leaves what it finds.

    Given: pairs, text, W0 (the model's cross-attention matrices by name, as in its file), model (read when
    first used), model_folder, device, dtype, task, seed, args (all flags, the method's own too), folder (the
    edit's, being written), preview (True: only the change of text is wanted, so training can be left out);
    clock("part") notes the seconds since the last part. To fill: about (for the edit's metadata), report
    (for run.json), drawing (see above), later (functions that draw, called once the edit is written), larger
    (settings that a warning names, for the "ridge" and for what must "stay"), trained (True: the tensors come
    from training, and are written in float32 whatever the model's file holds).
    """

    def __init__(self, model: Path, concepts, anchors=None, task: str = "object", seed: int = 0,
                 rows: str = "tail", device="cpu", dtype=torch.float32, prompts: str = "template"):
        self.model_folder, self.task, self.seed, self.device, self.dtype = model, task, seed, device, dtype
        self.clock, self.text, self.folder, self.preview = Clock(), Text(model), None, False
        self.args = NoFlags(no_pictures=True)
        self.pairs = make_pairs(concepts, anchors, task, self.text, rows, seed, prompts)
        self.about, self.drawing, self.later, self.larger, self.trained = {}, {}, [], {}, False
        self.report = {"prompts": {"erased": [pair.prompt for pair in self.pairs],
                                   "anchor": [pair.prompt_star for pair in self.pairs], "retained": []}}
        for doubt in doubts(self.pairs, model, self.text.tokenizer.count):
            print(f"warning: {doubt}", file=sys.stderr)

    @cached_property
    def W0(self) -> dict[str, Tensor]:
        W0, width = cross_attention(self.model_folder), self.pairs[0].e.shape[1]
        if any(W.ndim != 2 or W.shape[1] != width for W in W0.values()):
            raise UserError(f"{self.model_folder}: the text encoder's rows are {width} wide, but its U-Net "
                            "reads others")
        return W0

    @cached_property
    def model(self) -> Model:
        return Model(self.model_folder, self.device, self.dtype, text=self.text)

    def stay(self, real_prompts: bool) -> Tensor:
        """Rows of what must stay, float64 [prompts, T, D]: "" first, and alone without `real_prompts`."""
        kept = preserved_prompts(self.task, self.pairs) if real_prompts else [""]
        self.report["prompts"]["retained"] = kept
        return torch.stack(rows_of(kept, self.text)).double()

    def say(self, what: str, W: dict[str, Tensor], **numbers: float) -> None:
        """Print and keep the numbers of `what`, such as "closed form": the method's own, ‖ΔW‖/‖W‖ and drifts;
        warn if they are absurd. `run` says those of the whole edit if a method has said none."""
        if self.preview:
            return
        numbers["‖ΔW‖/‖W‖"] = change(original(self.model_folder, W), W)
        if W.keys() & self.W0.keys():
            numbers |= drifts(text_change(self.W0, W), self.pairs, self.text)
        print(f"{what}: " + ", ".join(f"{name} {number:.3g}" for name, number in numbers.items()))
        limits = {"cond": 1e10, "‖ΔW‖": 10, "drift": 0.5, "median": 0.5}             # by how a name begins
        absurd = {b for b in limits for name in numbers if name.startswith(b) and numbers[name] > limits[b]}
        if absurd:
            cure = self.larger.get("ridge" if absurd & {"cond", "‖ΔW‖"} else "stay", "weight of what stays")
            cure = "smaller lr" if self.trained else f"larger {cure}"
            print(f"warning: this moves far more than the concept; try a {cure}"
                  + ", or fewer concepts" * (len(self.pairs) > 1), file=sys.stderr)
        self.report["numbers"] = numbers


# ------------------------------------------------------------------------------------------ what an edit does

def edited(W0: dict[str, Tensor], delta: Tensor) -> dict[str, Tensor]:
    """W = W₀ + W₀ Δ for every matrix, in float32: only the solve needs more."""
    return {name: W.float() + W.float() @ delta.float() for name, W in W0.items()}


def before_after(job: Job, W: dict[str, Tensor], n: int) -> list[dict]:
    """Draw before and after, n pictures a prompt from the same seeds, and write before_after.png, and .svg
    with labels. Returns a row per prompt; with what CLIP sees, and prints it, if the model has one."""
    watched, template = watch_all(job.pairs, job.task), TASKS[job.task][0]
    model, prompts, seeds = job.model, [prompt for _, prompt in watched], [job.seed + i for i in range(n)]
    with lora_off(model.unet):                                    # what it learned is part of W
        drawn = draw_each(model, prompts, {"before": original(job.model_folder, W), "after": W}, seeds)
    table = [{"prompt": prompt, "wanted": wanted, "presence": round(held, 2)}
             for (wanted, prompt), held in zip(watched, presences(job.pairs, prompts, job.text))]
    if (model.folder / "clip").is_dir():
        clip, names = CLIP.from_pretrained(model.folder / "clip"), names_to_choose(job.pairs, job.task)
        print(f"\nCLIP's first choice of {len(names)} names, {n} pictures a prompt\n"
              f"{'prompt':<28}{'before':<32}after")
        for when, pictures in drawn.items():
            said = clip.classify(pictures.flatten(0, 1), [filled(template, name) for name in names]).argmax(1)
            for row, guesses in zip(table, said.view(-1, n)):
                most = guesses.mode().values
                row[when] = {"right": (guesses == names.index(row["wanted"])).sum().item(),
                             "mostly": names[most], "times": (guesses == most).sum().item()}
        for row in table:
            print(f"{row['prompt'][:26]:<28}{seen(row, 'before', n):<32}{seen(row, 'after', n)}")
    sheets = {when: pictures[:, :8] for when, pictures in drawn.items()}
    erased, name = ", ".join(map(str, job.pairs)), model_name(job.args.model)
    notes = [["; ".join(filter(None, [f"presence {row['presence']:.2f}" * (when == "before"),
                                      seen(row, when, n)])) for when in sheets] for row in table]
    write_sheets(job.folder / "before_after.png", sheets, prompts,
                 {"seed": seeds[:8], "edit": erased, "model": name, "settings": model.defaults},
                 title=erased, notes=notes, footer="presence: how much of the concept the prompt holds; "
                 + "then CLIP's first choice; " * ("before" in table[0])
                 + f"seeds {seeds[0]}–{seeds[:8][-1]}; model: {name}")
    return table


def seen(row: dict, when: str, n: int) -> str:
    """"airplane 0/4, mostly sky 4": how many are what was wanted, and what most are if they are not."""
    if not (cell := row.get(when)):                               # there is no CLIP
        return ""
    other = f", mostly {cell['mostly']} {cell['times']}" if cell["mostly"] != row["wanted"] else ""
    return f"{row['wanted']} {cell['right']}/{n}{other}"


# ------------------------------------------------------------------------------------------ the command

def run(method: str, doc: str, settings_class, erase: Callable, own: dict[str, dict] | None = None,
        anchor: str | None = None, suffix: str | None = None) -> None:
    """The command of a method: its published name, its file's docstring, its settings, erase(job, settings).

    own: flags of its own, {flag: add_argument's keywords}: one that is called like a setting sets it, the
    others are in job.args. anchor: the default one, if not the task's. suffix: of the edit's name."""
    suffix = f"-{slug(method)}" if suffix is None else suffix

    def main() -> None:
        args, s = erasing_args(doc, settings_class, own or {}, suffix, anchor)
        prompts = lines_of(args.preview) if args.preview else []
        device, folder = pick_device(args.device), model_folder(args.model)
        if args.export:
            check_export(args.export, args.out, folder)
        job = Job(folder, args.concept, args.anchor, args.task, args.seed, getattr(s, "rows", "tail"), device,
                  DTYPES[args.dtype], getattr(s, "prompts", "template"))
        job.args, job.preview = args, bool(prompts)
        job.clock("text")
        if method in DRAWING:                                     # before minutes of training
            refuse_weights_alone(method, args)
        if prompts:
            as_filed(W := erase(job, s), folder, job.trained)     # refuses what is not finite
            return preview(text_change(job.W0, W), prompts, job.text)
        print(*(f"{pair}: {pair.n} of {len(pair.e)} rows" for pair in job.pairs), sep="\n")
        with whole_folder(args.out, args.overwrite) as job.folder, recorded(job.report):
            W, about = save(job, erase(job, s), {"method": method, "settings": dataclasses.asdict(s)})
        job.folder = args.out                                     # from here on nothing can take it away
        print(f"wrote {args.out}/")
        delta = None if drift_of(job.report) is None else text_change(job.W0, W)
        about |= {} if delta is None else {"shares": say_shares(delta, job.pairs, job.task, job.text)}
        if not args.no_pictures:
            for draw in job.later:
                draw()
            about["table"] = before_after(job, W, args.n)
            job.clock("pictures")
        if args.export:
            export_pipeline(args.export, folder, W, about)
            job.clock("pipeline folder")
        write_report(job.folder, about := about | job.report | job.clock.spent())
        write_page(job.folder, about, delta, job.larger)
        print(job.clock)

    command_line(main)


def erase_with(method, model: Model, concept: str, anchor: str | None = None, task: str = "object",
               seed: int = 0, **settings) -> tuple[dict[str, Tensor], dict]:
    """From Python: erase with a method's module and settings. Returns the edited tensors, as its command
    writes them, and what it found. `model` stays as it is; `model.put(W)` lets it draw with W. anchor: None
    is the class's own in the book, or the task's. Raises UserError for what cannot be erased."""
    s = settings_of(method.Settings, settings)
    job = Job(model.folder, concept, anchor, task, seed, getattr(s, "rows", "tail"), model.device,
              model.dtype, getattr(s, "prompts", "template"))
    with tempfile.TemporaryDirectory() as folder:                 # of what the command writes besides W
        job.folder = Path(folder)
        W = method.erase(job, s)
    if W and "numbers" not in job.report:
        job.say("edit", W)
    about = {"method": method.__name__, "settings": dataclasses.asdict(s), "of": [concept, anchor, task]}
    return Edit(as_filed(W, job.model_folder, job.trained), job.drawing, about), job.report


def save(job: Job, W: dict[str, Tensor], about: dict) -> tuple[dict[str, Tensor], dict]:
    """Write the edit, each tensor in the dtype of the model's file, its LoRA if asked, and run.json. Returns
    the tensors as written, and what an edit says of itself."""
    args, filed = job.args, Edit(as_filed(W, job.model_folder, job.trained), job.drawing)
    if job.drawing:
        refuse_weights_alone(about["method"], args)
        about["drawing"] = sorted(job.drawing)                    # so that nobody draws without it
    about |= job.about | {"concepts": [pair.concept for pair in job.pairs],
                          "anchors": [pair.anchor for pair in job.pairs], "task": job.task, "seed": job.seed,
                          "model": model_name(args.model), "base_hash": base_hash(job.W0),
                          "text_hash": text_hash(job.model_folder),
                          "dtype": str(next(iter(job.W0.values())).dtype).removeprefix("torch.")}
    if W and "numbers" not in job.report:
        job.say("edit", W)
    if args.export_lora:
        W0, name = original(job.model_folder, W), args.out.absolute().name
        job.report["LoRA error"] = write_lora(job.folder, name, W0, W, args.export_lora, about)
        job.clock("LoRA file")
    if W:
        write_edit(job.folder, filed, about)
    write_report(job.folder, about | job.report | job.clock.spent())
    return filed, about


def main() -> None:
    """List the methods that are here."""
    program(__doc__).parse_args()
    root = Path(__file__).resolve().parent
    for path in [root / "realera.py", root / "rece.py", *sorted((root / "baselines").glob("*.py"))]:
        first = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
        print(f"python {str(path.relative_to(root)):<28}{first}")


if __name__ == "__main__":
    command_line(main)
