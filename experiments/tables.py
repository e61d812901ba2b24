"""The paper's tables and figures, each one command.

    python experiments/tables.py --table 1 --quick       # ten classes: untouched, closed forms, RealEra
    python experiments/tables.py --table 3               # automobile, variants 1 to 4
    python experiments/tables.py --figure 5 --quick      # Acc_s − Acc_e over D × S and over M × N
    python experiments/tables.py --sweep                 # what each setting does to the text, no pictures
    python experiments/tables.py --table 2 --i2p i2p.csv --coco coco.csv --model …      # nudity: SD v1.4
    python experiments/tables.py --table A3 --method UCE RealEra --prompts people.csv --model … --clip …
    torchrun --nproc-per-node 8 -- experiments/tables.py --table 1 --n 200 --steps 50 --model … --clip …

Every edit is made by its method's own program and kept in --out, and so is every picture's CLIP feature: a
killed run goes on, and a second table draws only what the first one had not. Tables 2, A3 and A4 have a row
per method with its authors' settings (AC and SA see fewer pictures, SA trains for fewer steps; RealEra's are
ours), and end with what the paper prints.
"""
import math
import sys
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import make_pairs
from eval_clip import CLIP, judge, outcomes, summary
from plumbing import UserError, svg
from plumbing.book import book
from plumbing.cli import DTYPES, command_line, measuring_args, parse_settings, pick_device, program
from plumbing.detectors import find_detector
from plumbing.disk import read_json
from plumbing.drift import drift_of, drifts, mean_share
from plumbing.edits import base_hash, cross_attention, read_edit
from plumbing.making import Recipe, make_edits, recipe
from plumbing.models import model_folder
from plumbing.own_prompts import read_prompts, score_prompts
from plumbing.prompts import ASSOCIATED, preserved_prompts, row_prompts
from plumbing.results import RANK, evaluate
from plumbing.stats import as_markdown, frechet, write_tables
from realera import Settings, erase_in_closed_form
from sample import Model, Text

CLOSED = ["M=0", "N=0", "lora_steps=0"]
PRINTED_WAY = ["lambda1=0.1", "tolerance=own", "D1_anchor=0.55", "lora_steps=200"]     # RealEra as printed
# Table 1's closed forms have the paper's lambda1; "reach 2" is a rival to mining.
TABLES = {"1": {"closed form": [*CLOSED, "lambda1=0.1"],
              "closed form, reach 2": [*CLOSED, "lambda1=0.1", "reach=2"],
              "RealEra, as printed": PRINTED_WAY, "RealEra": []},
          "3": {"1 closed form": CLOSED, "2 + noise alignment": ["M=0", "N=0"],
              "3 + neighbor mining": ["N=0"], "4 + beyond-concept": []}}
TASKS = {"2": "explicit", "A3": "celebrity", "A4": "style"}       # tables whose rows are methods
# A row's method: its file; its authors' settings; its authors' anchor, where it is not the task's own.
METHODS = {"FMN": ("baselines/fmn.py", [], ""), "AC": ("baselines/ac.py", []),
           "SPM": ("baselines/spm.py", [], ""), "UCE": ("baselines/uce.py", [], ""),
           "SLD-M": ("baselines/sld.py", [], ""), "ESD-x": ("baselines/esd.py", [], ""),
           "ESD-u": ("baselines/esd.py", ["variant=u"], ""), "SA": ("baselines/sa.py", []),
           "MACE": ("baselines/mace.py", []), "SPEED": ("baselines/speed.py", [], ""),
           "Surgery": ("baselines/surgery.py", [], ""), "RECE": ("rece.py", [], ""),
           "RealEra": ("realera.py", [])}
OF_TASK = {("RECE", "style"): ["rounds=1", "lam=0.001"], ("SA", "explicit"): ["trains=rest"]}
NOISE = 10_000                  # seeds of edits, far from those of pictures: MACE and FMN learn from pictures
PRINTED = Path(__file__).with_name("printed.json")
PAPERS_WAY = """As the paper counts, by MACE's script: the mean probability of the name among the classes
alone. A picture of none of them has to be one of them, and a probability depends on how certain the judge is.

"""
# One change of the defaults each. Chosen on the text alone, with templates that no table uses.
SWEEP = ["", "M=0 N=0", "M=0 N=0 reach=2", "M=0 N=0 lambda1=0.1", "M=0 N=0 lambda1=0.1 reach=2", "M=5 N=3",
         "M=20 N=6", "M=200 N=60", "N=0", "N=100", "D2=2.5", "tolerance=own", "tolerance=own D1_anchor=0.2",
         "mining=expected", "D1=0.8", "S1=0.99", "S2=0.6", "S2=0.1 D1=1.4", "share=true", "lambda1=0.1",
         "lambda1=0.1 N=100", "lambda2=0.001", "lambda2=0.1", "rows=token", "real_prompts=false",
         "D1=0.9 tolerance=own D1_anchor=0.2 S1=0.99 S2=0.5 M=5 N=3 lambda1=0.1"]
# Figure 5 (a): D is read as D1, S as S2 with S1 fixed. The closed form alone, unless --set lora_steps=200.
FIGURE = {"D-S": ("D1", [0.8, 0.9, 1.0, 1.1], "S2", [0.1, 0.3, 0.5, 0.65]),
          "M-N": ("M", [1, 5, 20, 100, 200], "N", [0, 3, 10, 30, 100])}


def recipe_of(concept: str, settings: list[str], seed: int, dtype: str) -> Recipe:
    """The recipe of an edit with `--set settings`; wrong ones are an error at once."""
    trained = parse_settings(Settings, settings).lora_steps > 0
    return recipe("realera.py", concept, settings, seed, dtype if trained else "float32")


def method_recipe(concept: str, method: str, seed: int, dtype: str, task: str) -> Recipe:
    """The recipe of a row of METHODS."""
    file, settings, *anchor = METHODS[method]
    settings = [*settings, *OF_TASK.get((method, task), [])]
    return recipe(file, concept, settings, NOISE + seed, dtype, task=task,
                  anchor=anchor[0] if anchor else None)


def each(rows: list[tuple], args, recipe_of: Callable,
         may_fail: bool = False) -> Iterator[tuple[Model, CLIP, Path | None]]:
    """Make the edits of rows (concept, variant, what `recipe_of` takes, or None for the untouched model).
    Then, per row: the model that wears it, the judge, the edit's folder. may_fail: of an edit whose method
    ends with an error the folder is not there, and the model is untouched."""
    folder = model_folder(args.model)
    base, device = base_hash(cross_attention(folder)), pick_device(args.device)
    clip = judge(args.clip, folder, device)                       # that it is there is known before the edits
    recipes = [None if what is None else recipe_of(concept, what, args.edit_seed, args.dtype)
               for concept, _, what in rows]
    make_edits([one for one in recipes if one], args.out, base, args.model, args.device, may_fail)
    model = Model(folder, device, DTYPES[args.dtype])
    for one in recipes:
        edit = one and one.folder(args.out, base)
        model.put(read_edit(edit, folder, model.text) if edit and (edit.exists() or not may_fail) else {})
        yield model, clip, edit


def measure(rows: list[tuple], args, task: str = "object", recipe_of: Callable = recipe_of,
            listed: list[dict] = ()) -> list[tuple[dict, dict]]:
    """Draw and count rows as `each` takes them. Per row: {concept, variant, drift}, and the outcomes
    {how: {group: [pictures]}}."""
    seeds, found = range(args.seed, args.seed + args.n), []
    for (concept, variant, _), (model, clip, edit) in zip(rows, each(rows, args, recipe_of)):
        groups = row_prompts(concept, task, seeds, listed=listed)
        jobs = [job[1:] for group in groups.values() for job in group]
        place = args.out / "pictures" / (edit.name if edit else "untouched")
        features = evaluate(model, clip, jobs, args.out / "results", args.steps, None, args.batch,
                            place if args.keep_pictures else None,
                            f"{len(found) + 1}/{len(rows)} {concept}, {variant}")
        report = read_json(edit / "run.json") if edit else {}
        found.append(({"erased": concept, "variant": variant, "drift": round(drift_of(report) or 0, 3)},
                      outcomes(clip, concept, features, seeds, task, listed=listed)))
    return found


def table(number: str, args) -> list[dict]:
    """Tables 1 and 3, variants of RealEra; or A3 and A4, one method a row."""
    task, of = TASKS.get(number, "object"), recipe_of
    variants = {"untouched": None}
    if task == "object":
        concepts = list(book()["classes"]) if number == "1" else [args.concept]
        ours = ["lora_steps=200"] if number == "3" else []        # else variants 1 and 2 are the same
        variants |= {name: ours + args.set + settings for name, settings in TABLES[number].items()}
    else:
        concepts = [args.concept] if args.concept else list(ASSOCIATED[task])
        of, variants = partial(method_recipe, task=task), variants | {name: name for name in args.method}
    measured = measure([(c, name, what) for c in concepts for name, what in variants.items()], args, task, of,
                       args.prompts)
    rows = []
    average = f"average of {'ten' if len(concepts) == 10 else len(concepts)}"
    for how in measured[0][1]:
        rows += [{"counted": how} | about | summary([counted[how]]) for about, counted in measured]
        for name in variants if len(concepts) > 1 else []:
            some = [counted[how] for about, counted in measured if about["variant"] == name]
            drift = sum(about["drift"] for about, _ in measured if about["variant"] == name) / len(some)
            about = {"counted": how, "erased": average, "variant": name, "drift": round(drift, 3)}
            rows.append(about | summary(some))
    return rows


def read_others(path: Path, seed: int) -> list[dict]:
    """The rows of a CSV of people or styles, each with its class. Raises UserError if one has none."""
    rows = read_prompts(path, seed)
    rows = [row | {"class": row["class"] or row.get("artist", "").strip().lower()} for row in rows]
    if not all(row["class"] for row in rows):
        raise UserError(f"{path}: each row needs a class (or concept, or artist): who or what it shows")
    return rows


def explicit(args) -> list[dict]:
    """Table 2, a row per method: parts that the detector finds on --i2p's prompts; CLIP score of --coco's,
    and the Fréchet distance of their CLIP features to the untouched model's."""
    i2p, coco = (read_prompts(path, args.seed) if path else [] for path in (args.i2p, args.coco))
    detect, rows, before = find_detector(args.detector) if i2p else None, [], None
    asked = [(args.concept, name, name if name in METHODS else None) for name in ("untouched", *args.method)]
    of_method = partial(method_recipe, task="explicit")

    def drawn(model: Model, clip: CLIP, prompts: list[dict], keep: Path | None, what: str):
        jobs = [(row["prompt"], row["seed"]) for row in prompts]
        return evaluate(model, clip, jobs, args.out / "results", args.steps, None, args.batch, keep, what)

    for (_, name, _), (model, clip, _) in zip(asked, each(asked, args, of_method)):
        rows.append({"method": name})
        if i2p:
            drawn(model, clip, i2p, keep := args.out / "pictures/i2p" / name, f"i2p, {name}")
            rows[-1] |= detect(keep) if RANK == 0 else {}
        if coco:
            keep = args.out / "pictures/coco" / name if args.keep_pictures else None
            found = drawn(model, clip, coco, keep, f"coco, {name}")
            features = torch.stack([found[row["prompt"], row["seed"]] for row in coco])
            before = features if before is None else before
            rows[-1]["CLIP score"] = score_prompts(clip, coco, found, [])[1][-1]["CLIP score"]
            rows[-1] |= {"Fréchet": round(frechet(features, before), 4)} if len(coco) > 1 else {}
    return rows


def figure(args) -> list[dict]:
    """Figure 5: Acc_s − Acc_e of automobile, and what the paper does not show: Acc_a painted as well (the
    residue: on the first `mini` Acc_s − Acc_e was 100 almost everywhere), Acc_g and drift in the table."""
    rows, cells = [], []
    for name, (x, xs, y, ys) in FIGURE.items():
        cells += [(name, a, b, [*CLOSED[2:], *args.set, f"{x}={a}", f"{y}={b}"]) for a in xs for b in ys]
    measured = measure([(args.concept, f"{name} {a} {b}", settings) for name, a, b, settings in cells], args)
    for (name, a, b, _), (about, counted) in zip(cells, measured):
        means = {f"Acc_{g}": round(100 * x.mean().item(), 2) for g, x in counted["top-1"].items()}
        rows.append({"figure": name, "D1 or M": a, "S2 or N": b, "Acc_s - Acc_e": round(means["Acc_s"]
                     - means["Acc_e"], 2), **means, "drift": about["drift"]})
    if RANK == 0:
        maps = []
        for name, (x, xs, y, ys) in FIGURE.items():
            for column in ("Acc_s - Acc_e", "Acc_a"):
                values = [row[column] for row in rows if row["figure"] == name]
                lines = [values[i:i + len(ys)] for i in range(0, len(values), len(ys))]
                maps.append(svg.heat_map(lines, xs, ys, f"{column}, {args.concept}", x, y))
        svg.write(args.out / "figure5.svg", *maps)
    return rows


def sweep(args) -> list[dict]:
    """Per line of SWEEP: how far concept, synonyms, phrases and other classes go along, and the drift of
    unrelated prompts, means over the ten classes. The closed form only: no U-Net is loaded."""
    text, rows = Text(model_folder(args.model)), []
    classes = book()["classes"]
    for line in SWEEP:
        s, found = parse_settings(Settings, [*args.set, *line.split()]), []
        for concept, entry in classes.items():
            pairs = make_pairs([concept], [entry["anchor"]], "object", text, s.rows, args.edit_seed)
            stay = text(preserved_prompts("object", pairs) if s.real_prompts else [""])
            delta, _ = erase_in_closed_form(pairs, stay, s)
            some = entry.get("choosing", entry)                   # words that no table reports, if there are
            groups = {"concept": [concept], "synonyms": some.get("synonyms", []),
                      "phrases": some.get("associated", []),
                      "other classes": [name for name in classes if name != concept]}
            prompts = [[f"a photo of a {name}" for name in names] for names in groups.values()]
            found.append([*(mean_share(delta, pairs[0], few, text) if few else math.nan for few in prompts),
                          list(drifts(delta, pairs, text).values())[1]])
        means = torch.tensor(found).nanmean(0).tolist()
        rows.append({"settings": line or "defaults"} | {
            name: round(mean, 3) for name, mean in zip([*groups, "drift"], means) if mean == mean})
    return rows


def main() -> None:
    parser = program(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--table", choices=[*TABLES, *TASKS], help="1: ten classes; 3: the ablation; 2: "
                      "nudity; A3, A4: the appendix's celebrities and styles")
    what.add_argument("--figure", type=int, choices=[5], help="5: two sweeps, as CSV and heat maps")
    what.add_argument("--sweep", action="store_true", help="settings beside the defaults, by text alone")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE",
                        help="settings of realera.py for every edit of tables 1, 3, figure and sweep")
    parser.add_argument("--concept", help="of table 3 and the figure (default automobile), of table 2 "
                        "(nudity), of A3 and A4 (all five)")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS),
                        help="rows of tables 2, A3, A4 (default: all, which takes days)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="of tables A3 and A4: CSV of those that "
                        "must stay: prompt, seed, and class (or concept, or artist), whom or what it shows")
    parser.add_argument("--i2p", type=Path, metavar="FILE", help="of table 2: CSV of I2P's prompts")
    parser.add_argument("--coco", type=Path, metavar="FILE", help="of table 2: CSV of prompts of MS-COCO")
    parser.add_argument("--detector", default="nudenet", help="of table 2: as in eval_clip.py (nudenet)")
    parser.add_argument("--edit-seed", type=int, default=0, help="of mining and LoRA (default 0)")
    args = measuring_args(parser)
    args.out = args.out or Path("out/tables")
    task, classes = TASKS.get(args.table, "object"), book()["classes"]
    if task != "object" and args.set:
        raise UserError(f"--table {args.table} takes its authors' settings of each method: leave out --set")
    if task == "explicit" and not (args.i2p or args.coco):
        raise UserError("--table 2 needs --i2p FILE.csv, --coco FILE.csv or both: the lists are not ours to "
                        "ship, docs/stable-diffusion.md says where they are")
    first = {"object": "automobile" if "automobile" in classes else min(classes), "explicit": "nudity"}
    args.concept = (args.concept or first.get(task, "")).lower()
    if args.prompts and args.table not in ("A3", "A4"):
        raise UserError("--prompts is for tables A3 and A4")
    args.prompts = read_others(args.prompts, args.seed) if args.prompts else []
    if args.concept and task != "explicit":                       # an unknown one is an error at once
        row_prompts(args.concept, task, range(1), listed=args.prompts)
    rows = (explicit(args) if task == "explicit" else table(args.table, args) if args.table
            else figure(args) if args.figure else sweep(args))
    if RANK == 0:
        name = f"table{args.table}" if args.table else "figure5" if args.figure else "sweep"
        write_tables(args.out, name, rows)
        print(as_markdown([row for row in rows if row.get("counted", "top-1") in ("top-1", "CLIP score")]))
        way = [row for row in rows if row.get("counted") == "ten-way probability"]
        if way and task == "object":
            print(PAPERS_WAY + as_markdown(way))
        if args.table in (printed := read_json(PRINTED)):
            of = "average of ten" if args.table == "1" else args.concept
            print("What the paper prints, on SD v1.4:\n\n" + as_markdown([
                {name: x for name, x in row.items() if x is not None} for row in printed[args.table]
                if row.get("erased") in (of, None) or not of]))
            if args.table == "1":
                print(printed["slips"])
        print(f"wrote {args.out}/")


if __name__ == "__main__":
    command_line(main, shared=True)
