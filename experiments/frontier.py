"""What vanishes against what stays: each method along its own strength, chosen on other words than reported.

    python experiments/frontier.py --n 10 --steps 12
    python experiments/frontier.py --row "closed form" vocabulary --concept cat dog --n 4 --steps 12

Each row of the table is a method with its strengths, mostly six (rows.py). First all are tried on the
*choosing* synonyms and phrases of the book (`--choose-n` pictures each of 12 steps), and the best is taken:
by the mean of two harmonic means, of what the paper measures (concept, other classes, synonyms) and of what
is harder (concept, near things, phrases). Then it is drawn on the reported words: on one half of the classes
with the strength that was best on the other half, and the other way round; of fewer than six classes, or with
--choose-on, with what was best on the others. So no strength is reported on a class that it was chosen on,
nor on the same synonyms and phrases. The first half are the five classes on whose choosing words the
vocabulary's other settings were set, by text alone (docs/mining.md): “H_o, second half” and “H near, second
half” are of those that nothing was set on.

Where something must go (concept, synonyms, phrases, vanish) a number is the share of pictures in which CLIP
still sees the class. Where it must stay, it is a share of the pictures that the *untouched* model draws right
from the same noise: near things, the nearest of them by the text (the canary), a far one, the other classes,
one synonym and one phrase of each, the anchor; `disputed` is what readers disagree about. (Of the untouched
model itself it is a share of all.) `strange` counts pictures that look like none of the untouched model's:
black ones, noise. Random rows have four seeds of the edit, trained ones three on the first three classes that
strengths are chosen on. Intervals are the wider of two: classes and their edits drawn again, and Wilson's
over pictures; of H_o and H near, of classes, edits and pictures drawn again. “H_o − ROW” is the difference to
that row (--reference), class by class. “Ten-way probability” is the paper's number, of all pictures: the mean
probability of the name among the classes alone. Seconds of the erasure include loading the text encoder; GiB
is its process's most memory, or the GPU's; MB its file's size.

tries.json has all tries, cells.json every class by itself, frontier.svg a curve per row, of the tries. Ten
classes and the default rows are 110,000 pictures at --n 10, three hours on two cores. A killed run goes on.
"""
import functools
import math
import statistics
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import make_pairs
from experiments.rows import MINING, RANDOM, ROWS, TRAINED, names_of, own_anchor
from experiments.shares import groups_of, near_things
from experiments.tables import NOISE, each
from plumbing import UserError, svg
from plumbing.book import book, drawn_names, meanings, sights
from plumbing.cli import RANK, at_least_1, command_line, measuring_args, program
from plumbing.disk import read_json
from plumbing.drift import drift_of
from plumbing.edits import edit_file
from plumbing.making import Recipe, commit, recipe
from plumbing.models import model_folder, model_name
from plumbing.prompts import prompt_of
from plumbing.results import evaluate, text_vectors
from plumbing.stats import as_markdown, wilson, write_tables
from sample import Text

REFERENCE = "RealEra, expected"
HALF = ("airplane", "cat", "frog", "ship", "truck")               # see above
GO = ("concept", "synonyms", "phrases", "vanish")                 # what must go; the other groups stay
PAPERS = ("concept", "other classes", "synonyms")                 # its Acc_e, Acc_s, Acc_g
CHOOSE = ("concept", "synonyms", "phrases", "near", "canary", "other classes")       # what tries are drawn on


def asked(concept: str, words: str, text: Text) -> dict[str, list[tuple[str, str]]]:
    """(what CLIP should see, prompt) by group, of names that the model draws. words: reported; or choosing,
    the groups of CHOOSE alone."""
    pair, classes = make_pairs(concept, None, "object", text, "tail", 0)[0], book()["classes"]
    groups = groups_of(concept, words, near_things(pair, text))
    for group, kind in (("others' synonyms", "synonyms"), ("others' phrases", "associated")):
        groups[group] = [entry[kind][0] for name, entry in classes.items() if name != concept and entry[kind]]
    groups["anchor"] = [pair.anchor]
    class_of, drawn = meanings(), drawn_names(book())
    found = {group: [(concept if group in GO else class_of.get(name, name), prompt_of(name)) for name in names
                     if group in GO or name in drawn or "things" not in book()]
             for group, names in groups.items() if words == "reported" or group in CHOOSE}
    return {group: some for group, some in found.items() if some}


def method_recipe(concept: str, what: tuple, seed: int, dtype: str) -> Recipe:
    """what: a row of ROWS, the strength, and the seed of the edit."""
    row, strength, edit_seed = what
    file, settings, _ = ROWS[row]
    return recipe(file, concept, [*settings, *strength.split()], NOISE + seed + edit_seed,
                  anchor=own_anchor(row))


def numbers_of(edit: Path | None) -> dict[str, float]:
    """What an edit moves in the text, the seconds and memory that it took, and the size of its weights."""
    if edit is None:
        return {"drift": 0.0}
    report, file = read_json(edit / "run.json"), edit_file(edit)
    found = {"drift": drift_of(report), "seconds": round(sum(report["seconds"].values()), 1),
             "MB": round(file.stat().st_size / 1e6, 2) if file else 0.0, "peak GiB": report.get("peak GiB")}
    return {name: round(number, 3) for name, number in found.items() if number is not None}


def strange(seen: torch.Tensor, usual: torch.Tensor) -> torch.Tensor:
    """Which pictures are black, noise or the like, [n] bool: to CLIP each is farther from all `usual` ones,
    the untouched model's, than 99 of 100 of these are from the next. seen, usual: unit features [·, P]."""
    among = (usual @ usual.T).fill_diagonal_(-1).amax(1)
    return (seen @ usual.T).amax(1) < among.quantile(0.01)


def measure(cells: list[tuple], words: str, seeds: range, args, steps: int | None) -> list[dict[str, list]]:
    """Per cell (concept, what `method_recipe` takes, or None for the untouched model): {group: [right, of]},
    numbers of pictures, and `numbers_of` the edit; {} if it could not be made. Each concept's untouched cell
    comes before its others."""
    text, names, before, found = Text(model_folder(args.model)), sights(), {}, []
    means, usual = [*names.values()], {}                          # usual: features of the untouched pictures
    groups = {concept: asked(concept, words, text) for concept in dict.fromkeys(c for c, _ in cells)}
    rows = [(concept, " ".join(map(str, what or ["untouched"])), what) for concept, what in cells]
    for (concept, label, what), (model, clip, edit) in zip(rows, each(rows, args, method_recipe, True)):
        if edit and not edit.exists():
            found.append({})
            continue
        jobs = list(dict.fromkeys((prompt, seed) for some in groups[concept].values() for _, prompt in some
                                  for seed in seeds))             # a prompt may be in two groups
        features = evaluate(model, clip, jobs, args.out / "results", steps, None, args.batch,
                            what=f"{len(found) + 1}/{len(rows)} {concept}, {label}")
        shown = text_vectors(clip, tuple(f"a photo of the {name}" for name in names))     # [names, P]
        right, paper, classes = {}, {}, list(book()["classes"])   # the first of the names
        for group, some in groups[concept].items():
            wanted = [name for name, _ in some for _ in seeds]
            cosines = torch.stack([features[prompt, seed] for _, prompt in some for seed in seeds]) @ shown.T
            right[group] = torch.tensor([means[i] == name for i, name in zip(cosines.argmax(1), wanted)])
            if group in PAPERS:
                p = (clip.logit_scale.exp().cpu() * cosines[:, :len(classes)]).softmax(1)
                at = [classes.index(name) for name in wanted]
                sums = p[range(len(at)), at].sum().item()
                paper[f"{group}, ten-way probability"] = [round(sums, 4), len(at)]
        absolute = {group: f"{x.sum()} of {len(x)}" for group, x in right.items() if group not in GO}
        seen = torch.stack([features[job] for job in jobs])
        if what is None:
            before[concept], usual[concept] = right, seen
        else:                                                     # of what stays, what was drawn right before
            right = {group: x if group in GO else x[before[concept][group]] for group, x in right.items()}
            right["strange"] = strange(seen, usual[concept])
        found.append({group: [int(x.sum()), len(x)] for group, x in right.items() if len(x)} | paper
                     | {"of all": absolute} | numbers_of(edit))
    return found


def mean(cells: list[dict[str, list]], group: str) -> float:
    """The share of right pictures in all cells; NaN if none has the group."""
    counts = [cell[group] for cell in cells if group in cell]
    return sum(right for right, _ in counts) / sum(of for _, of in counts) if counts else math.nan


def harmonic(gone: float, stays: float, also_gone: float) -> float:    # eval_clip's, of tensors: slow there
    found = 3 / sum(1 / torch.as_tensor(x, dtype=torch.float64) for x in (1 - gone, stays, 1 - also_gone))
    return found if found.dim() else found.item()


def h_o(cells: list[dict[str, list]]) -> float:
    """As in the paper: concept, other classes, synonyms."""
    return harmonic(mean(cells, "concept"), mean(cells, "other classes"), mean(cells, "synonyms"))


def h_near(cells: list[dict[str, list]]) -> float:
    """The harder one: concept, near things, phrases."""
    return harmonic(mean(cells, "concept"), mean(cells, "near"), mean(cells, "phrases"))


def redrawn(right: float, of: float, edits: int, rng: np.random.Generator) -> torch.Tensor:
    """A count a thousand times, [1000], as its pictures leave it possible (Jeffreys' interval: none of ten
    may be one of thirty). The numbers are divided by that many edits."""
    return of * torch.from_numpy(rng.beta(edits * right + 0.5, edits * (of - right) + 0.5, 1000))


@functools.cache
def often(concepts: tuple[str, ...]) -> torch.Tensor:
    """How often each cell is drawn, [cells, 1000]: classes with replacement, and each one's edits."""
    which, edits = (torch.Generator().manual_seed(i) for i in (0, 1))
    found = torch.zeros(len(concepts), 1000, dtype=torch.float64)
    classes = [[i for i, name in enumerate(concepts) if name == one] for one in dict.fromkeys(concepts)]
    for k in range(1000):
        for i in torch.randint(len(classes), (len(classes),), generator=which):
            for j in torch.randint(len(classes[i]), (len(classes[i]),), generator=edits):
                found[classes[i][j], k] += 1
    return found


def again(cells: list[tuple], statistic, pictures: bool) -> torch.Tensor:
    """The statistic of (concept, counts) a thousand times, [1000]: cells drawn `often`, and pictures."""
    concepts, rng, drawn = tuple(concept for concept, _ in cells), np.random.default_rng(2), []
    for n, (one, counts) in zip(often(concepts), cells):
        drawn.append({group: [n * (redrawn(*x, concepts.count(one), rng) if pictures else x[0]), n * x[1]]
                      for group, x in counts.items() if isinstance(x, list) and x[1]})
    return statistic(drawn)


def interval(cells: list[tuple], statistic, group: str | None = None, less: list[tuple] = ()) -> list | str:
    """[value, low, high] in percent, 95 %: redrawn; of a group's share, at least Wilson's; "–": none has it.
    less: cells whose own statistic is taken off, class by class, as pictures share their noise."""
    value = statistic([counts for _, counts in cells]) - (statistic([c for _, c in less]) if less else 0)
    if math.isnan(value):
        return "–"
    pictures = not (group or less)
    drawn = again(cells, statistic, pictures) - (again(less, statistic, pictures) if less else 0)
    low, high = drawn.nanquantile(drawn.new_tensor([0.025, 0.975])).tolist()
    if group:
        w_low, w_high = wilson(value, sum(counts[group][1] for _, counts in cells if group in counts))
        low, high = min(low, w_low), max(high, w_high)
    return [round(100 * x, 2) for x in (value, low, high)]


def folds_of(classes: list[str]) -> list[list[str]]:
    """Classes whose strength is chosen on all the others: two halves; of fewer than six each by itself."""
    halves = [[c for c in classes if (c in HALF) == first] for first in (True, False)]
    return halves if all(halves) and len(classes) > 5 else [[c] for c in classes]


def choose(rows: list[str], classes: list[str], on: list[str], args) -> tuple[dict, list[dict]]:
    """The strength to report, {row: {class: strength}}; and the table of all tries, on these classes."""
    tries = [(row, strength) for row in rows for strength in ROWS[row][2]]
    cells = [(c, None) for c in on] + [(c, (*one, 0)) for one in tries for c in on]
    seeds = range(args.seed + 1000, args.seed + 1000 + args.choose_n)                # of no reported picture
    found = dict(zip(cells, measure(cells, "choosing", seeds, args, args.choose_steps)))

    def score(row: str, strength: str, fold: list[str]) -> float:
        some = [found[c, (row, strength, 0)] for c in on if c not in fold]
        both = (h_o(some) + h_near(some)) / 2 if all(some) else math.nan             # {}: an edit failed
        return -1 if math.isnan(both) else both                   # near things that were never drawn right

    folds = dict.fromkeys(classes, []) | {c: fold for fold in folds_of(on) for c in fold}
    best = {row: {c: max(ROWS[row][2], key=lambda x: score(row, x, folds[c])) for c in classes}
            for row in rows}
    table = []
    for row, strength in tries:
        some = [found[c, (row, strength, 0)] for c in on]
        numbers = {group: mean(some, group) for group in CHOOSE} | {"H_o": h_o(some), "H near": h_near(some)}
        table.append({"row": row, "strength": strength}
                     | {name: round(100 * x, 1) for name, x in numbers.items() if x >= 0})
    return best, table


def seeds_of(row: str, concept: str, classes: list[str]) -> range:
    """The seeds of a row's edits of a class. classes: those that strengths are chosen on."""
    names = names_of(row)
    return range(4 if names & RANDOM else 3 if names & TRAINED and concept in classes[:3] else 1)


def alike(cells: list[tuple]) -> list[tuple]:
    """Cells (concept, counts) with numbers divided by how many edits the class has: classes count alike."""
    times = Counter(concept for concept, _ in cells)
    return [(concept, {group: [number / times[concept] for number in x] if isinstance(x, list) else x
                       for group, x in counts.items()}) for concept, counts in cells]


def summary(row: str | None, cells: list[tuple], best: dict[str, str], to: str, reference: list) -> dict:
    """A line of the table: cells (concept, counts) of the row, and of the row `to` compare with."""
    groups = dict.fromkeys(group for _, counts in cells for group, x in counts.items() if isinstance(x, list))
    line = {"row": row or "untouched", "strength": "; ".join(dict.fromkeys(best.values())) if row else "–"}
    line |= {group: interval(cells, lambda some: mean(some, group), group) for group in groups}
    second = [(concept, counts) for concept, counts in cells if concept not in HALF]
    for name, h in (("H_o", h_o), ("H near", h_near)):
        line |= {name: interval(cells, h), f"{name}, second half": interval(second, h)}
        if row not in (None, to) and {c for c, _ in cells} == {c for c, _ in reference}:
            line[f"{name} − {to}"] = interval(cells, h, less=reference)
    numbers = {name: [counts[name] for _, counts in cells if name in counts]
               for name in ("drift", "seconds", "peak GiB", "MB")}
    return line | {name: round(statistics.mean(some), 3) for name, some in numbers.items() if some}


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--row", nargs="+", choices=ROWS, default=MINING,
                        help="methods (default: the closed forms, from \"closed form\" to UCE)")
    parser.add_argument("--reference", choices=ROWS, help=f"the row to compare with (default {REFERENCE})")
    parser.add_argument("--concept", nargs="+", type=str.lower, help="classes (default: all)")
    parser.add_argument("--choose-on", nargs="+", type=str.lower, metavar="CONCEPT",
                        help="classes to choose strengths on (default: those of --concept)")
    parser.add_argument("--choose-n", type=int, default=4, help="pictures per prompt of a try (default 4)")
    parser.add_argument("--choose-steps", type=int, default=12, help="sampling steps of a try (default 12)")
    args = measuring_args(parser)
    at_least_1(args, "choose_n", "choose_steps")
    args.out, args.edit_seed = args.out or Path("out/frontier"), 0
    classes = list(dict.fromkeys(args.concept or book()["classes"]))
    on = list(dict.fromkeys(args.choose_on or classes))
    for concept in classes + on:
        entry = book()["classes"].get(concept, {})
        if not all([entry.get("stay"), *map(entry.get("choosing", {}).get, ("synonyms", "associated"))]):
            raise UserError(f"{concept}: this needs a class of --book with lists stay and choosing, as in "
                            "mini/captions.json")
    if any({*on} <= {c} for c in classes) and any(len(ROWS[row][2]) > 1 for row in args.row):
        raise UserError("--concept: give two classes or more; strengths are chosen on others than reported")
    if args.reference not in (None, *args.row):
        raise UserError(f"--reference {args.reference} is none of the rows: {', '.join(args.row)}")
    version = commit()                                            # of now: pictures may take a day
    best, tries = choose(args.row, classes, on, args)
    rows = "+".join(row.replace(" ", "-").replace(",", "") for row in args.row)
    name = "" if args.row == MINING else f"-{rows[:100]}"         # another table does not take its place
    if RANK == 0:
        write_tables(args.out, f"tries{name}", tries)
    cells = [(c, None) for c in classes]
    cells += [(c, (row, best[row][c], seed)) for row in args.row for c in classes
              for seed in seeds_of(row, c, on)]
    found = measure(cells, "reported", range(args.seed, args.seed + args.n), args, args.steps)
    of_row = {row: alike([(concept, counts) for (concept, what), counts in zip(cells, found)
                          if (what and what[0]) == row and counts]) for row in (None, *args.row)}
    to = args.reference or REFERENCE
    table = [summary(row, some, best.get(row, {}), to, of_row.get(to, []))
             for row, some in of_row.items() if some]
    if RANK == 0:
        model = model_name(args.model)
        flat = [dict(zip(("class", "row", "strength", "seed of the edit"),
                         (concept, *(what or ("untouched", "–", 0)))))
                | {group: f"{x[0]} of {x[1]}" if isinstance(x, list) else x
                   for group, x in counts.items() if group != "of all"}
                | {f"{group}, of all": x for group, x in counts.get("of all", {}).items()}
                | {"command": what and method_recipe(concept, what, 0, args.dtype).command(model) or "–",
                   "commit of this table": version}
                for (concept, what), counts in zip(cells, found)]
        write_tables(args.out, f"cells{name}", flat)
        write_tables(args.out, f"frontier{name}", table)
        points = {}
        for one in tries:
            if {"near", "canary"} <= one.keys():                  # else the model draws none of them
                points.setdefault(one["row"], []).append(
                    ((one["near"] + one["canary"]) / 2, 100 - (one["synonyms"] + one["phrases"]) / 2))
        if points:
            svg.write(args.out / f"frontier{name}.svg", svg.scatter(
                points, "near things and canary that stay (%)", "synonyms and phrases that are gone (%)"))
        print(f"{as_markdown(tries)}\n{as_markdown(table)}\nwrote {args.out}/")


if __name__ == "__main__":
    command_line(main, shared=True)
