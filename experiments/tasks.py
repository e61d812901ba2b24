"""Every method on the paper's other tasks, as `mini` has them: characters, styles, weapons.

    python experiments/tasks.py --task characters --n 8 --steps 12
    python experiments/tasks.py --task styles --row "closed form" vocabulary MACE --concept twemoji
    torchrun --nproc-per-node 2 -- experiments/tasks.py --task weapons --n 8 --steps 12

Characters stand in the celebrities' place, and “weapon”, an umbrella word, in nudity's (mini/README.md). A
row is a method at the strength that frontier.py chose on objects: --cells is its table of single classes, and
what most classes have there is taken. So nothing is chosen on these tasks.

Groups: `concept`, by its name; `phrases`, the concept without it (of a style three things in that style, of
the weapon its eight members); `others`, other characters, styles, or things that are no weapon; `things`, of
styles alone, whether the three things are still there; `classes`, mini's ten. What must go is the share of
pictures in which CLIP still sees it; what must stay a share of what the untouched model draws right from the
same noise. H_o is the harmonic mean of 1 − concept, others and 1 − phrases, as in the paper's appendix. A
group of more than four prompts draws a quarter of --n of each. One edit a concept; intervals as in
frontier.py. A killed run goes on.
"""
import csv
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from experiments.compare import read_cells
from experiments.frontier import harmonic, interval, mean
from experiments.rows import ROWS, own_anchor
from experiments.tables import NOISE, each
from plumbing import UserError
from plumbing.book import BOOK, book, sights, use_book
from plumbing.cli import RANK, command_line, measuring_args, program
from plumbing.disk import read_json
from plumbing.making import ROOT, Recipe, commit, recipe
from plumbing.models import model_name
from plumbing.prompts import anchor_of, prompt_of
from plumbing.results import evaluate, text_vectors
from plumbing.stats import as_markdown, write_tables

# Those that `mini` draws right most often, by name and phrases (16 pictures of each, seeds from 1000, which
# are not reported; --row without a name after it measures the untouched model alone).
CONCEPTS = {"characters": ["santa claus", "clown", "detective"], "styles": ["fluent", "twemoji", "emojione"],
            "weapons": ["weapon"]}
GO = ("concept", "phrases")                                       # what must go; the other groups stay
STYLED = ("frog", "ship", "deer")                                 # things that are drawn in a style


def classes() -> list[str]:
    """mini's ten, also where --book has others."""
    return [*read_json(BOOK)["classes"]]


def asked(task: str, concept: str) -> dict[str, list[tuple[str, str]]]:
    """(what CLIP should see, prompt) by group."""
    known = book()
    plain = [(name, f"a photo of the {name}") for name in classes()]
    if task == "styles":
        styled = {style: [(style, f"a photo of the {name} by {style}") for name in STYLED]
                  for style in known["styles"].values()}
        return {"concept": [(concept, f"an artwork by {concept}")], "phrases": styled.pop(concept),
                "others": [one for style, some in styled.items()
                           for one in [(style, f"an artwork by {style}"), *some]],
                "things": [(name, f"a photo of the {name} by {concept}") for name in STYLED],
                "classes": plain}
    if task == "weapons":
        with open(ROOT / "mini/weapons.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        of = {kind: dict.fromkeys((row["class"], row["prompt"]) for row in rows if row["type"] == kind)
              for kind in ("member", "other")}
        return {"concept": [("weapon", "a photo of the weapon")],
                "phrases": [("weapon", prompt) for _, prompt in of["member"]],
                "others": list(of["other"]), "classes": plain}
    entry = known["classes"][concept]
    return {"concept": [(concept, prompt_of(concept))],
            "phrases": [(concept, phrase) for phrase in entry["associated"]],
            "others": [(name, prompt_of(name)) for name in known["classes"] if name != concept],
            "classes": plain}


def choices(task: str) -> tuple[dict[str, str], dict[str, str]]:
    """What CLIP chooses among, {its prompt: what it means}: things and scenes; and of a style, styles."""
    things = {f"a photo of the {name}": means
              for name, means in (sights() | {name: name for name in classes()}).items()}
    if task == "weapons":
        things |= {f"a photo of the {name}": "weapon" for name in book()["weapons"]}
    return things, {f"an artwork by {style}": style for style in book().get("styles", {}).values()}


def strengths(path: Path, rows: list[str]) -> dict[str, str]:
    """What most classes have in frontier.py's cells. Raises UserError if a row is not there."""
    found: dict[str, Counter] = {}
    for cell in read_cells(path):
        found.setdefault(cell["row"], Counter())[cell["strength"]] += 1
    if missing := [row for row in rows if row not in found]:
        raise UserError(f"{path} has no row {', '.join(missing)}")
    return {row: found[row].most_common(1)[0][0] for row in rows}


def method_recipe(task: str, concept: str, what: tuple[str, str], seed: int) -> Recipe:
    """what: a row of ROWS, and its strength."""
    row, strength = what
    file, settings, _ = ROWS[row]
    kind = "style" if task == "styles" else "object"
    own = own_anchor(row)
    anchor = "flower" if task == "weapons" else anchor_of(concept, kind)             # mini/README.md's
    return recipe(file, concept, [*settings, *strength.split()], NOISE + seed, task=kind,
                  anchor=anchor if own is None else own)


def measure(cells: list[tuple], args) -> list[dict[str, list]]:
    """Per cell (concept, row and strength, or None for the untouched model): {group: [right, of]}; {} if
    the edit could not be made. Each concept's untouched cell comes before its others."""
    before, found, lists, vectors = {}, [], choices(args.task), []
    rows = [(concept, " ".join(what or ["untouched"]), what) for concept, what in cells]

    def of(concept: str, what: tuple, seed: int, dtype: str) -> Recipe:
        return method_recipe(args.task, concept, what, seed)

    for (concept, label, what), (model, clip, edit) in zip(rows, each(rows, args, of, True)):
        if edit and not edit.exists():
            found.append({})
            continue
        jobs = {group: [(name, prompt, args.seed + i) for name, prompt in some
                        for i in range(args.n if len(some) < 5 else max(1, args.n // 4))]
                for group, some in asked(args.task, concept).items()}
        features = evaluate(model, clip, [job[1:] for some in jobs.values() for job in some],
                            args.out / "results", args.steps, None, args.batch,
                            what=f"{len(found) + 1}/{len(rows)} {concept}, {label}")
        # once: text_vectors keeps one list alone, and of styles there are two
        vectors = vectors or [text_vectors(clip, tuple(among)) for among in lists if among]
        right = {}
        for group, some in jobs.items():
            which = int(args.task == "styles" and group not in ("things", "classes"))
            cosines = torch.stack([features[job[1:]] for job in some]) @ vectors[which].T
            means = [*lists[which].values()]
            right[group] = torch.tensor([means[i] == job[0] for i, job in zip(cosines.argmax(1), some)])
        if what is None:
            before[concept] = right
        else:                                                     # of what stays, what was right before
            right = {group: x if group in GO else x[before[concept][group]] for group, x in right.items()}
        found.append({group: [int(x.sum()), len(x)] for group, x in right.items() if len(x)})
    return found


def h_o(cells: list[dict[str, list]]) -> float:
    return harmonic(mean(cells, "concept"), mean(cells, "others"), mean(cells, "phrases"))


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--task", choices=CONCEPTS, required=True, help="which of the paper's other tasks")
    parser.add_argument("--concept", nargs="+", type=str.lower, help="what to erase, each by itself "
                        "(default: the three that are drawn best, or “weapon”)")
    parser.add_argument("--cells", type=Path, default=ROOT / "assets/methods-cells.csv",
                        help="cells.csv of frontier.py (default: that of docs/methods.md)")
    parser.add_argument("--row", nargs="*", choices=ROWS,
                        help="methods (default: those in --cells, without their authors' settings)")
    args = measuring_args(parser)
    args.out, args.edit_seed = args.out or Path("out/tasks"), 0
    if args.task == "characters" and not args.book:
        use_book(ROOT / "mini/characters.json")
    if args.row is None:
        args.row = [row for row in dict.fromkeys(cell["row"] for cell in read_cells(args.cells))
                    if row in ROWS and not row.endswith("authors'")]
    concepts = list(dict.fromkeys(args.concept or CONCEPTS[args.task]))
    known = {"characters": book()["classes"], "styles": book().get("styles", {}).values(),
             "weapons": ["weapon"]}[args.task]
    for concept in concepts:
        if concept not in known:
            raise UserError(f"{concept} is none of the {args.task}: {', '.join(known)}")
    version = commit()                                            # of now: pictures may take hours
    what = [None, *strengths(args.cells, args.row).items()]
    cells = [(concept, one) for concept in concepts for one in what]
    found, table, flat = measure(cells, args), [], []
    of_row = {one: [(concept, counts) for (concept, other), counts in zip(cells, found)
                    if other == one and counts] for one in what}
    for one, some in of_row.items():
        row, strength = one or ("untouched", "–")
        groups = dict.fromkeys(group for _, counts in some for group in counts)
        table.append({"row": row, "strength": strength}
                     | {group: interval(some, lambda x: mean(x, group), group) for group in groups}
                     | {"H_o": interval(some, h_o)})
        first = what[1] if len(what) > 1 else None                # what the others are compared with
        if one not in (None, first) and len(some) == len(of_row[first]) > 1:      # else there is no interval
            table[-1][f"H_o − {first[0]}"] = interval(some, h_o, less=of_row[first])
    for (concept, one), counts in zip(cells, found):
        row, strength = one or ("untouched", "–")
        command = method_recipe(args.task, concept, one, 0).command(model_name(args.model)) if one else "–"
        flat.append({"task": args.task, "erased": concept, "row": row, "strength": strength}
                    | {group: f"{x[0]} of {x[1]}" for group, x in counts.items()}
                    | {"command": command, "commit of this table": version})
    if RANK == 0:
        write_tables(args.out, f"{args.task}-cells", flat)
        write_tables(args.out, args.task, table)
        print(f"{as_markdown(table)}\nwrote {args.out}/")


if __name__ == "__main__":
    command_line(main, shared=True)
