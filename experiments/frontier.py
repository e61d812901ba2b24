"""What vanishes against what stays: each method along its own strength, chosen on other words than reported.

    python experiments/frontier.py --book mini/next/captions.json --model … --n 10 --steps 12
    python experiments/frontier.py --row "closed form" vocabulary --concept cat dog --n 4 --steps 12

Each row of the table is a method with six strengths. First all six are tried on the *choosing* synonyms and
phrases of the book (`--choose-n` pictures each), and the best is taken: by the mean of two harmonic means, of
what the paper measures (concept, other classes, synonyms) and of what is harder (concept, near things,
phrases). Then it is drawn on the reported words: on half of the classes with the strength that was best on
the other half, and the other way round. So no strength is reported on a class that it was chosen on, nor on
the same synonyms and phrases.

Where something must go (concept, synonyms, phrases, vanish) a number is the share of pictures in which CLIP
still sees the class. Where it must stay, it is a share of the pictures that the *untouched* model draws right
from the same noise: near things, the nearest of them by the text (the canary), a far one, the other classes,
one synonym and one phrase of each; `disputed` is what readers disagree about. Rows with random neighbors are
made with four seeds. Intervals are over classes and seeds of the edit. frontier.svg has a curve per row, of
the tries. Ten classes and the default rows are some 40,000 pictures, a night on two cores; a killed run goes
on. Of the other methods most are trained, each at six learning rates from the authors' own up (SPM's lie
around its preset for `mini`): so nobody is left at a rate at which nothing happens on `mini`.
"""
import math
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import make_pairs
from eval_clip import harmonic
from experiments.shares import groups_of, near_things
from experiments.tables import drift_of, each
from plumbing import UserError, svg
from plumbing.cli import RANK, at_least_1, command_line, measuring_args, program
from plumbing.making import Recipe, recipe
from plumbing.models import model_folder
from plumbing.prompts import book, prompt_of
from plumbing.results import evaluate
from plumbing.stats import as_markdown, write_tables
from sample import Text

CLOSED = ["M=0", "N=0", "lora_steps=0"]
# A row: the method's file, its settings, and its six strengths, the weakest first. RealEra's have no noise
# alignment: it adds nothing measurable (docs/results.md), and takes two minutes an edit.
ROWS = {
    "closed form": ("realera.py", CLOSED, [f"lambda1={x}" for x in (3, 1, 0.3, 0.1, 0.03, 0.01)]),
    "reach": ("realera.py", [*CLOSED, "lambda1=0.1"], [f"reach={x}" for x in (1.25, 1.5, 2, 2.5, 3, 4)]),
    "RealEra, as printed": ("realera.py", ["lora_steps=0", "lambda1=0.1"],
                            [f"M={x}" for x in (3, 10, 30, 100, 300, 1000)]),
    "RealEra, expected": ("realera.py", ["lora_steps=0", "mining=expected", "tolerance=same"],
                          [f"M={x}" for x in (3, 10, 30, 100, 300, 1000)]),
    "vocabulary": ("baselines/vocabulary.py", ["measured=false"],
                   [f"reach={x}" for x in (1, 1.5, 2, 3, 4, 6)]),
    "vocabulary, no contrast": ("baselines/vocabulary.py", ["measured=false", "contrast=0"],
                                [f"threshold={x}" for x in (0.95, 0.9, 0.85, 0.8, 0.75, 0.7)]),
    "vocabulary, all words": ("baselines/vocabulary.py", [], [f"reach={x}" for x in (1, 1.5, 2, 3, 4, 6)]),
    "UCE": ("baselines/uce.py", [], [f"lamb={x}" for x in (8, 4, 2, 1, 0.5, 0.1)])}
MINING = list(ROWS)             # the default; most of the others are trained, which takes minutes a try
ROWS |= {
    "SPEED": ("baselines/speed.py", ["rows=tail"],
              [f"threshold={x}" for x in (0.001, 0.01, 0.1, 1, 10, 100)]),
    "RECE": ("rece.py", ["real_prompts=true"], [f"rounds={x}" for x in (0, 1, 2, 3, 5, 8)]),
    "MACE": ("baselines/mace.py", [], [f"lr={x}" for x in (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2)]),
    "ESD-x": ("baselines/esd.py", ["iterations=200"],
              [f"lr={x}" for x in (1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 1e-3)]),
    "ESD-u": ("baselines/esd.py", ["variant=u", "iterations=60", "steps=10"],
              [f"lr={x}" for x in (1e-5, 3e-5, 1e-4, 2e-4, 4e-4, 1e-3)]),
    "AC": ("baselines/ac.py", [], [f"lr={x}" for x in (1.6e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3)]),
    "FMN": ("baselines/fmn.py", [], [f"lr={x}" for x in (2e-6, 1e-5, 3e-5, 6e-5, 1.2e-4, 2e-4)]),
    "SA": ("baselines/sa.py", ["steps=60", "batch=4"],
           [f"lr={x}" for x in (1.6e-4, 4e-4, 1e-3, 2e-3, 4e-3, 1e-2)]),
    "SPM": ("baselines/spm.py", ["preset=mini"], [f"lr={x}" for x in (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)]),
    "SLD": ("baselines/sld.py", [], ["preset=weak", "preset=medium", "preset=strong",
                                     "preset=strong warmup=0", "preset=max", "preset=max scale=20000"]),
    "Surgery": ("baselines/surgery.py", [], [f"beta={x}" for x in (-0.24, -0.12, -0.06, -0.03, 0, 0.03)])}
RANDOM = {"RealEra, as printed"}
GO = ("concept", "synonyms", "phrases", "vanish")                 # what must go; the other groups stay
CHOOSE = ("concept", "synonyms", "phrases", "near", "canary", "other classes")       # what tries are drawn on


def names_to_see() -> list[str]:
    """What CLIP chooses among: classes, what is watched beside them, what else the model draws, scenes."""
    classes, things = book()["classes"], book().get("things", {})
    names = [name for entry in classes.values()
             for name in [*entry.get("stay", []), *entry.get("disputed", []), entry.get("far", "")] if name]
    names += [thing["names"][0] for thing in things.values() if "class" not in thing
              and thing.get("drawn", True)]
    return list(dict.fromkeys([*classes, *(meant(name) for name in names), *book()["scenes"]]))


def meant(name: str) -> str:
    """The class that a name or phrase belongs to, or the name itself."""
    for concept, entry in book()["classes"].items():
        chosen = entry.get("choosing", {})
        if name in [concept, *entry["synonyms"], *entry["associated"],
                    *chosen.get("synonyms", []), *chosen.get("associated", [])]:
            return concept
    return name


def asked(concept: str, words: str, text: Text) -> dict[str, list[tuple[str, str]]]:
    """(what CLIP should see, prompt) by group. words: reported; or choosing, the groups of CHOOSE alone."""
    pair, classes = make_pairs(concept, None, "object", text, "tail", 0)[0], book()["classes"]
    groups = groups_of(concept, words, near_things(pair, text))
    for group, kind in (("others' synonyms", "synonyms"), ("others' phrases", "associated")):
        groups[group] = [entry[kind][0] for name, entry in classes.items() if name != concept and entry[kind]]
    return {group: [(concept if group in GO else meant(name), prompt_of(name)) for name in names]
            for group, names in groups.items() if words == "reported" or group in CHOOSE}


def method_recipe(concept: str, what: tuple, seed: int, dtype: str) -> Recipe:
    """what: a row of ROWS, the strength, and the seed of the edit."""
    row, strength, edit_seed = what
    file, settings, _ = ROWS[row]
    return recipe(file, concept, [*settings, *strength.split()], seed + edit_seed)


def measure(cells: list[tuple], words: str, seeds: range, args) -> list[dict[str, float]]:
    """Per cell (concept, what `method_recipe` takes, or None for the untouched model): {group: share}, in
    0 … 1, and the text's drift. Each concept's untouched cell comes before its others."""
    text, names, shown, before, found = Text(model_folder(args.model)), names_to_see(), None, {}, []
    groups = {concept: asked(concept, words, text) for concept in dict.fromkeys(c for c, _ in cells)}
    rows = [(concept, " ".join(map(str, what or ["untouched"])), what) for concept, what in cells]
    for (concept, label, what), (model, clip, edit) in zip(rows, each(rows, args, method_recipe)):
        jobs = [(prompt, seed) for some in groups[concept].values() for _, prompt in some for seed in seeds]
        features = evaluate(model, clip, jobs, args.out / "results", args.steps, None, args.batch,
                            what=f"{len(found) + 1}/{len(rows)} {concept}, {label}")
        if shown is None:
            with torch.no_grad():
                ids = clip.tokenizer([f"a photo of the {name}" for name in names]).to(clip.logit_scale.device)
                shown = clip.text_features(ids).cpu()             # [names, P]
        right = {group: torch.tensor([names[(shown @ features[prompt, seed]).argmax()] == wanted
                                      for wanted, prompt in some for seed in seeds])
                 for group, some in groups[concept].items()}
        if what is None:
            before[concept] = right
        else:                                                     # of what stays, what was drawn right before
            right = {group: x if group in GO else x[before[concept][group]] for group, x in right.items()}
        found.append({group: x.float().mean().item() for group, x in right.items() if len(x)}
                     | {"drift": drift_of(edit)})
    return found


def mean(cells: list[dict[str, float]], group: str) -> float:
    """Over the cells that have the group; NaN if none has."""
    return statistics.mean([cell[group] for cell in cells if group in cell] or [math.nan])


def h_o(cells: list[dict[str, float]]) -> float:
    """As in the paper: concept, other classes, synonyms."""
    return harmonic(mean(cells, "concept"), mean(cells, "other classes"), mean(cells, "synonyms"))


def h_near(cells: list[dict[str, float]]) -> float:
    """The harder one: concept, near things, phrases."""
    return harmonic(mean(cells, "concept"), mean(cells, "near"), mean(cells, "phrases"))


def interval(cells: list[dict[str, float]], statistic) -> list[float] | str:
    """[value, low, high] in percent, a 95 % interval by drawing the cells again; "–": none has it."""
    if math.isnan(statistic(cells)):
        return "–"
    again = torch.randint(len(cells), (1000, len(cells)), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = torch.tensor([statistic([cells[i] for i in some]) for some in again])
    return [round(100 * x, 2) for x in (statistic(cells),
                                        *drawn.nanquantile(torch.tensor([0.025, 0.975])).tolist())]


def choose(rows: list[str], halves: list[list[str]], args) -> tuple[dict[str, list[str]], list[dict]]:
    """The best strength of each row for each half of the classes; and the table of all tries."""
    tries = [(row, strength) for row in rows for strength in ROWS[row][2]]
    classes = sum(halves, [])
    cells = [(c, None) for c in classes] + [(c, (*one, 0)) for one in tries for c in classes]
    seeds = range(args.seed + 1000, args.seed + 1000 + args.choose_n)                # of no reported picture
    found = dict(zip(cells, measure(cells, "choosing", seeds, args)))

    def of(row: str, strength: str, some: list[str]) -> list[dict[str, float]]:
        return [found[c, (row, strength, 0)] for c in some]

    def score(row: str, strength: str, half: list[str]) -> float:
        both = (h_o(of(row, strength, half)) + h_near(of(row, strength, half))) / 2
        return -1 if math.isnan(both) else both                   # near things that were never drawn right

    best = {row: [max(ROWS[row][2], key=lambda strength: score(row, strength, half)) for half in halves]
            for row in rows}
    table = []
    for row, strength in tries:
        some = of(row, strength, classes)
        table.append({"row": row, "strength": strength} | {
            group: round(100 * mean(some, group), 1) for group in CHOOSE if mean(some, group) >= 0}
            | {name: round(100 * h(some), 1)
               for name, h in (("H_o", h_o), ("H near", h_near)) if h(some) >= 0})
    return best, table


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--row", nargs="+", choices=ROWS, default=MINING,
                        help="methods (default: the closed forms, from \"closed form\" to UCE)")
    parser.add_argument("--concept", nargs="+", type=str.lower, help="classes, two or more (default: all)")
    parser.add_argument("--choose-n", type=int, default=2, help="pictures per prompt of a try (default 2)")
    args = measuring_args(parser)
    at_least_1(args, "choose_n")
    args.out, args.edit_seed = args.out or Path("out/frontier"), 0
    classes = list(dict.fromkeys(args.concept or book()["classes"]))
    for concept in classes:
        entry = book()["classes"].get(concept)
        if not entry or not all(entry.get("choosing", {}).get(kind) for kind in ("synonyms", "associated")) \
                or not entry.get("stay"):
            raise UserError(f"{concept}: this needs a class of --book with lists stay and choosing, as in "
                            "mini/next/captions.json")
    if len(classes) < 2:
        raise UserError("--concept: give two classes or more; strengths are chosen on others than reported")
    halves = [classes[::2], classes[1::2]]
    best, tries = choose(args.row, halves, args)
    cells = [(c, None) for c in classes]
    cells += [(c, (row, best[row][1 - k], seed)) for row in args.row for k in (0, 1) for c in halves[k]
              for seed in range(4 if row in RANDOM else 1)]
    found = measure(cells, "reported", range(args.seed, args.seed + args.n), args)
    table = []
    for row in (None, *args.row):
        some = [shares for (_, what), shares in zip(cells, found) if (what and what[0]) == row]
        groups = dict.fromkeys(group for shares in some for group in shares if group != "drift")
        strength = "; ".join(dict.fromkeys(best[row])) if row else "–"
        table.append({"row": row or "untouched", "strength": strength}
                     | {group: interval(some, lambda cells: mean(cells, group)) for group in groups}
                     | {"H_o": interval(some, h_o), "H near": interval(some, h_near),
                        "drift": round(mean(some, "drift"), 3)})
    if RANK == 0:
        write_tables(args.out, "tries", tries)
        write_tables(args.out, "frontier", table)
        points = {}
        for one in tries:
            if {"near", "canary"} <= one.keys():                  # else the model draws none of them
                points.setdefault(one["row"], []).append(
                    ((one["near"] + one["canary"]) / 2, 100 - (one["synonyms"] + one["phrases"]) / 2))
        if points:
            svg.write(args.out / "frontier.svg", svg.scatter(
                points, "near things and canary that stay (%)", "synonyms and phrases that are gone (%)"))
        print(f"{as_markdown(tries)}\n{as_markdown(table)}\nwrote {args.out}/")


if __name__ == "__main__":
    command_line(main, shared=True)
