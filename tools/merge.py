"""Edits that were made apart, put together into one.

    python tools/merge.py out/airplane out/ship --out out/both    # an edit folder like any other
    python eval_clip.py --edit out/both                           # a row for each concept

Eq. 7 is a sum over rows, so the merge of two closed forms is one solve with the rows of both. (The sum of the
two changes W − W₀ is not: each would move rows that the other asks to keep.) Mining is
deterministic, and an edit's metadata name its concepts, anchors, settings and seed, so the rows are mined
again, in milliseconds. On top comes the sum of what the LoRAs learned, each beside its own closed form.
"""
import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import Pair, edited, make_pairs
from lora import lora_deltas
from plumbing import UserError
from plumbing.book import use_book
from plumbing.cli import BOOK, command_line, program
from plumbing.disk import refuse_existing, whole_folder
from plumbing.edits import (about_edit, base_hash, change, cross_attention, read_edit, text_hash, write_edit,
                            write_report)
from plumbing.models import MINI, model_folder, model_name
from plumbing.prompts import preserved_prompts
from realera import Settings, erase_in_closed_form
from sample import Text

LORA_SETTINGS = ("rank", "lora_steps", "lr", "batch", "trajectories")          # these may differ


@dataclass
class Made:
    """How an edit was made: its pairs, settings and task, and what its LoRA adds, {name: [out, D]}."""
    folder: str
    pairs: list[Pair]
    settings: Settings
    task: str
    lora: dict[str, Tensor]


def how_made(folder: str, text) -> Made:
    """Read it from the edit's metadata. Raises UserError if realera.py did not make it."""
    about = about_edit(folder)
    if about.get("method") != "RealEra":
        raise UserError(f"{folder} was made by {about.get('method', 'something else')}: only edits of "
                        "realera.py have a closed form to solve again, and can be merged")
    try:
        s = Settings(**about["settings"])
        pairs = make_pairs(about["concepts"], about["anchors"], about["task"], text, s.rows, about["seed"])
        lora = lora_deltas(Path(folder) / "residual_lora.safetensors") if s.lora_steps else {}
    except (KeyError, TypeError):
        raise UserError(f"{folder} is damaged or was written by another version of realera.py: "
                        "make it again") from None
    return Made(str(folder), pairs, s, about["task"], lora)


def joint_closed_form(edits: list[Made], text) -> Tensor:
    """Δ [D, D] of Eq. 7 with every edit's rows, float64: what one command naming all concepts would solve.

    Therefore "" and the real prompts count once for each concept, whichever edits keep them, and a noun that
    one edit erases or draws instead is kept for none, although another edit, made alone, kept it.
    """
    pairs = sorted((pair for made in edits for pair in made.pairs), key=lambda pair: pair.concept)
    tasks = sorted({made.task for made in edits})
    real = [prompt for task in tasks for prompt in preserved_prompts(task, pairs)]
    s = edits[0].settings
    stay = text(list(dict.fromkeys(real)) if s.real_prompts else [""])
    return erase_in_closed_form(pairs, stay, s)[0]


def weights(edits: list[Made], W0: dict[str, Tensor], text) -> dict[str, Tensor]:
    """W₀ (I + Δ) + Σ B A, in the dtype of the model's file. The order of `edits` is moot."""
    W = edited(W0, joint_closed_form(edits, text))
    for made in sorted(edits, key=lambda made: [pair.concept for pair in made.pairs]):
        W |= {name: W[name] + learned for name, learned in made.lora.items()}
    return {name: matrix.to(W0[name].dtype) for name, matrix in W.items()}


def merged(folders: list[str], model: Path, text) -> tuple[dict[str, Tensor], list[Made]]:
    """The matrices of several edits together, in the dtype of the model's file, and how each edit was made.

    Raises UserError for edits of another model, method or version, with a concept in common, or whose closed
    forms were set differently.
    """
    written = [read_edit(folder, model) for folder in folders]
    W0, edits, seen = cross_attention(model), [how_made(folder, text) for folder in folders], {}
    first = dataclasses.asdict(edits[0].settings)
    for made, W in zip(edits, written):
        for pair in made.pairs:
            if (other := seen.setdefault(pair.concept.lower(), made)) is not made:
                raise UserError(f"{other.folder} and {made.folder} both erase {pair.concept!r}")
        for name, value in dataclasses.asdict(made.settings).items():
            if value != first[name] and name not in LORA_SETTINGS:
                raise UserError(f"{made.folder} has {name} = {value} but {edits[0].folder} has "
                                f"{first[name]}: edits merge when their closed forms have the same settings")
        # what the metadata say must give what was written, but for the last bit on another machine
        if change(W, weights([made], W0, text)) > 1e-3:
            raise UserError(f"{made.folder} is not what its settings give here: give the --book that it "
                            "was made with, or make it again")
    return weights(edits, W0, text), edits


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("edits", nargs="+", help="edit folders of realera.py, two or more")
    parser.add_argument("--out", type=Path, help="edit folder to write (default: out/a+b of their names)")
    parser.add_argument("--overwrite", action="store_true", help="replace it if it exists")
    parser.add_argument("--model", default=MINI, help="the untouched one: folder or hub id (default: mini)")
    parser.add_argument("--book", type=Path, metavar="FILE", help=f"{BOOK}: what the edits were made with")
    args = parser.parse_args()
    use_book(args.book)
    if len(args.edits) < 2:
        raise UserError("give two edits or more")
    folders = [str(Path(edit).parent) if Path(edit).is_file() else edit for edit in args.edits]
    folders.sort(key=lambda folder: Path(folder).name)
    out = args.out or Path("out") / "+".join(Path(folder).name for folder in folders)
    refuse_existing(out, overwrite=args.overwrite)
    model = model_folder(args.model)
    W, edits = merged(folders, model, Text(model))
    pairs = sorted(((pair, made.task) for made in edits for pair in made.pairs), key=lambda x: x[0].concept)
    about = {"method": "merged", "merged": list(map(about_edit, folders)),
             "concepts": [pair.concept for pair, _ in pairs], "anchors": [pair.anchor for pair, _ in pairs],
             "tasks": [task for _, task in pairs], "model": model_name(args.model),
             "base_hash": base_hash(cross_attention(model)), "text_hash": text_hash(model)}
    with whole_folder(out, args.overwrite) as new:
        write_edit(new, W, about)
        write_report(new, about)
    print(f"wrote {out}/")


if __name__ == "__main__":
    command_line(main)
