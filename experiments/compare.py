"""Methods × attacks: what attack.py gets back from four ways to erase a class, and what each way costs.

    python experiments/compare.py --n 8 --steps 12 --attack phrases embedding vector
    python experiments/compare.py --n 8 --steps 12 --budget 50 --concept airplane cat ship
    python experiments/compare.py --n 8 --steps 12 --cells out/frontier/cells.csv --concept airplane cat ship

With --cells the methods are the rows of frontier.py, each at the strength that was chosen for it there. A
method that acts while a picture is drawn cannot be attacked by its weights alone: it has phrases, emoji and
vector. The figure's “strongest” is the strongest of those attacks that all rows have.

Writes robustness.json, .csv, .md (averages over the classes, with 95 % intervals) and robustness.svg: what
the strongest attack gets back against what else is lost. Edits and features are shared with `tables.py --out`
of the same folder; a killed run goes on.
"""
import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from eval_clip import judge, outcomes, summary
from experiments.attack import ATTACKS, BLACK_BOX, Target, attack
from experiments.frontier import method_recipe
from experiments.rows import ROWS
from experiments.tables import TABLES
from plumbing import UserError, svg
from plumbing.book import book
from plumbing.cli import (DTYPES, WORLD, at_least_1, command_line, measuring_args, pick_device, program,
                          slug)
from plumbing.edits import base_hash, cross_attention, original, read_edit
from plumbing.making import Recipe, make_edits, recipe
from plumbing.models import model_folder
from plumbing.prompts import row_prompts
from plumbing.results import evaluate
from plumbing.stats import as_markdown, wilson, write_tables
from sample import Model

# RECE: the authors' values for easy objects, but realera.py's real prompts must stay: without them RECE
# erased most of what else the first `mini` knew, and nothing would be learned from the comparison.
RECE = ["rounds=1", "real_prompts=true"]
METHODS = {"closed form": ("realera.py", TABLES["1"]["closed form"]), "RealEra": ("realera.py", []),
           "RECE": ("rece.py", RECE), "RealEra + RECE": ("rece.py", RECE)}           # A + B: B goes on from A


def recipe_of(method: str, concept: str) -> Recipe:
    first = recipe_of(method.split(" + ")[0], concept) if " + " in method else None
    file, settings = METHODS[method]
    return recipe(file, concept, settings, start=first)


def read_cells(path: Path) -> list[dict[str, str]]:
    """frontier.py's cells. Raises UserError if it is no such file."""
    try:
        cells = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except UnicodeDecodeError:
        cells = []
    if not cells or not {"row", "class", "strength", "seed of the edit", "concept"} <= cells[0].keys():
        raise UserError(f"--cells {path} is not the cells.csv that frontier.py writes")
    return cells


def recipes_of(args) -> dict[tuple[str, str], Recipe]:
    """{(method, class): recipe}: METHODS, or the rows in --cells. Raises UserError if one is missing."""
    if not args.cells:
        return {(method, c): recipe_of(method, c) for method in METHODS for c in args.concept}
    found = {(cell["row"], cell["class"]): method_recipe(cell["class"], (cell["row"], cell["strength"], 0), 0,
                                                         args.dtype)
             for cell in read_cells(args.cells)
             if cell["row"] in ROWS and cell["class"] in args.concept and cell["seed of the edit"] == "0"
             and cell["concept"]}                                 # empty: that edit failed
    for row in dict.fromkeys(row for row, _ in found):
        if missing := [concept for concept in args.concept if (row, concept) not in found]:
            raise UserError(f"{args.cells} has no {row} of {', '.join(missing)}: give other classes")
    if not found:
        raise UserError(f"{args.cells} has no row of {', '.join(args.concept)}")
    return found


def plot(rows: list[dict], names: list[str]) -> svg.Drawing:
    """To the right, other classes lost; upwards, what the strongest of the attacks gets back."""
    names = [name for name in ("plain", *names) if all(name in row for row in rows)]
    best = {row["method"]: max(row[name][0] for name in names) for row in rows}
    points = {row["method"]: [(100 - row["Acc_s"][0], best[row["method"]])] for row in rows}
    return svg.scatter(points, "other classes lost, 100 − Acc_s (%)", "strongest attack's success (%)")


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--attack", nargs="+", choices=ATTACKS, default=list(ATTACKS),
                        help="default: all, the gradient attacks among them")
    parser.add_argument("--cells", type=Path, help="cells.csv of frontier.py: its rows, not the four")
    parser.add_argument("--concept", nargs="+", help="classes to erase (default: all ten)")
    parser.add_argument("--budget", type=int, default=100, help="steps of prefix and tokens (default 100)")
    parser.add_argument("--choose", type=int, default=4, help="pictures to choose a candidate by (default 4)")
    args = measuring_args(parser)
    at_least_1(args, "budget", "choose")
    args.out = args.out or (args.cells.parent if args.cells else Path("out/tables"))
    args.concept = list(dict.fromkeys(map(str.lower, args.concept or book()["classes"])))
    for concept in args.concept:
        row_prompts(concept, "object", range(1))                  # an unknown one is an error at once
    if WORLD > 1:
        raise UserError("this attacks in one process: start it without torchrun")
    folder, device = model_folder(args.model), pick_device(args.device)
    W0 = cross_attention(folder)
    base, seeds = base_hash(W0), range(args.seed, args.seed + args.n)
    rows, recipes = [], recipes_of(args)
    clip = judge(args.clip, folder, device)                       # that it is there is known before the edits
    make_edits(list(recipes.values()), args.out, base, args.model, args.device)
    model = Model(folder, device, DTYPES[args.dtype])
    for method in dict.fromkeys(method for method, _ in recipes):
        counted, returned = [], {name: [] for name in ("plain", *args.attack)}
        for concept in args.concept:
            W = read_edit(recipes[method, concept].folder(args.out, base), folder, model.text)
            model.put(W)
            own = W0 | original(folder, W)                        # an edit may change others, too
            jobs = [job[1:] for group in row_prompts(concept, "object", seeds).values() for job in group]
            keep = args.out / "pictures" / slug(method) / concept if args.keep_pictures else None
            found = evaluate(model, clip, jobs, args.out / "results", args.steps, None, args.batch, keep,
                             f"{method}, {concept}")
            counted.append(outcomes(clip, concept, found, seeds)["top-1"])
            target = Target(model, own, own | W, concept, "object", args.seed, args.budget)
            some = [name for name in args.attack if name in BLACK_BOX or not W.drawing]
            for row in attack(target, clip, some, args.out / "attacks" / slug(method), args):
                returned[row["attack"]].append(row["success"][0] / 100)
        success = {name: (sum(x) / len(x), args.n * len(x)) for name, x in returned.items() if x}
        rows.append({"method": method} | {name: [round(100 * x, 1) for x in (rate, *wilson(rate, pictures))]
                                          for name, (rate, pictures) in success.items()} | summary(counted))
        write_tables(args.out, "robustness", rows)
    svg.write(args.out / "robustness.svg", plot(rows, args.attack))
    print(f"{as_markdown(rows)}\n{len(args.concept)} classes; wrote {args.out}/robustness.*")


if __name__ == "__main__":
    command_line(main, shared=True)                               # that is, it refuses more than one
