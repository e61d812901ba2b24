"""Methods × attacks: what attack.py gets back from four ways to erase a class, and what each way costs.

    python mini/measure_attacks.py --n 8 --steps 12 --attack phrases embedding vector
    python mini/measure_attacks.py --n 8 --steps 12 --budget 50 --concept airplane cat ship

Writes robustness.json, .csv, .md (averages over the classes, with 95 % intervals) and robustness.svg: what
the strongest attack gets back against what else is lost. Edits and features are shared with `tables.py --out`
of the same folder; a killed run goes on.
"""
import argparse
import subprocess
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tables  # noqa: E402
from attack import ATTACKS, Target, attack  # noqa: E402
from command import DTYPES, command_line, measuring_args, pick_device  # noqa: E402
from concepts import BOOK, row_prompts  # noqa: E402
from eval_clip import judge, write_tables  # noqa: E402
from files import (UserError, base_hash, cross_attention, model_folder, put_weights, read_edit,  # noqa: E402
                   read_json, whole)
from metrics import as_markdown, summary, wilson  # noqa: E402
from sample import Model  # noqa: E402
from scores import WORLD, evaluate, outcomes  # noqa: E402

METHODS = {"closed form": [*tables.CLOSED, "lambda1=0.1"], "RealEra": [],
           # The authors' values for easy objects, but realera.py's real prompts must stay: without them RECE
           # erases most of what else `mini` knows, and nothing would be learned from the comparison.
           "RECE": None, "RealEra + RECE": None}
RECE = ["--rounds", "1", "--set", "real_prompts=true"]


def made_edit(method: str, concept: str, args) -> Path:
    """The edit folder of `method`, made if it is not there."""
    if METHODS[method] is not None:
        tables.make_edits([(concept, method, METHODS[method])], args)
        return tables.edit_folder(concept, METHODS[method], args)
    folder = args.out / "edits" / f"{concept}-{method.lower().replace(' + ', '-')}"
    if not folder.exists():
        start = ["--edit", made_edit("RealEra", concept, args)] if "RealEra" in method else []
        command = [sys.executable, ROOT / "rece.py", "--concept", concept, "--anchor",
                   tables.anchor_of(concept), "--model", args.model, "--out", folder, "--no-pictures",
                   "--device", args.device, *start, *RECE]
        done = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8")
        if done.returncode:
            raise UserError(f"{method} of {concept} failed: {done.stderr.strip().splitlines()[-1]}")
    return folder


def plot(rows: list[dict], names: list[str]) -> str:
    """An SVG: to the right, other classes lost; upwards, what the strongest of the attacks gets back."""
    text = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 560 420" font-family="sans-serif" '
            'font-size="13"><rect width="560" height="420" fill="white"/>',
            '<path d="M60 20V370H540" fill="none" stroke="black"/>',
            '<text x="300" y="408" text-anchor="middle">other classes lost, 100 − Acc_s (%)</text>',
            '<text transform="translate(16 195) rotate(-90)" text-anchor="middle">'
            "strongest attack's success (%)</text>"]
    lost = [100 - row["Acc_s"][0] for row in rows]
    widest = max(2.0, *lost)
    for tick in range(0, 101, 25):
        text.append(f'<text x="52" y="{374 - 3.4 * tick:.0f}" text-anchor="end">{tick}</text>'
                    f'<text x="{60 + 4.2 * tick:.0f}" y="388" text-anchor="middle">'
                    f"{widest * tick / 100:.1f}</text>")
    points = sorted((370 - 3.4 * max(row[name][0] for name in names), 60 + 420 * x / widest, row["method"])
                    for row, x in zip(rows, lost))
    last = 0.0
    for y, x, method in points:
        last = max(y + 4, last + 15)                              # labels below each other
        text.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="#2a6"/>'
                    f'<text x="{x + 9:.1f}" y="{last:.1f}">{method}</text>')
    return "\n".join([*text, "</svg>"]) + "\n"


def main() -> None:
    classes = list(read_json(BOOK)["classes"])
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attack", nargs="+", choices=ATTACKS, default=list(ATTACKS),
                        help="default: all, the gradient attacks among them")
    parser.add_argument("--concept", nargs="+", choices=classes, default=classes, help="default: all ten")
    parser.add_argument("--budget", type=int, default=100, help="steps of prefix and tokens (default 100)")
    parser.add_argument("--choose", type=int, default=4, help="pictures to choose a candidate by (default 4)")
    args = measuring_args(parser)
    args.out, args.edit_seed = args.out or Path("out/tables"), 0
    if WORLD > 1:
        raise UserError("this makes its edits in one process: start it without torchrun")
    folder, device = model_folder(args.model), pick_device(args.device)
    W0 = cross_attention(folder)
    args.base, seeds = base_hash(W0), range(args.seed, args.seed + args.n)
    model, clip = Model(folder, device, DTYPES[args.dtype]), judge(args.clip, folder, device)
    rows = []
    for method in METHODS:
        counted, returned = [], {name: [] for name in ("plain", *args.attack)}
        for concept in args.concept:
            W = read_edit(made_edit(method, concept, args), folder)
            put_weights(model.unet, W)
            jobs = [job[1:] for group in row_prompts(concept, "object", seeds).values() for job in group]
            found = evaluate(model, clip, jobs, args.out / "results", args.steps, None, args.batch,
                             what=f"{method}, {concept}")
            counted.append(outcomes(clip, concept, found, seeds)["top-1"])
            target = Target(model, W0, W, concept, "object", args.seed, args.budget)
            for row in attack(target, clip, args.attack, args.out / "attacks", args):
                returned[row["attack"]].append(row["success"][0] / 100)
        success = {name: sum(x) / len(x) for name, x in returned.items()}
        pictures = args.n * len(args.concept)
        rows.append({"method": method} | {name: [round(100 * x, 1) for x in (rate, *wilson(rate, pictures))]
                                          for name, rate in success.items()} | summary(counted))
        write_tables(args.out, "robustness", rows)
    with whole(args.out / "robustness.svg") as temporary:
        temporary.write_text(plot(rows, args.attack), encoding="utf-8")
    print(f"{as_markdown(rows)}\n{len(args.concept)} classes; wrote {args.out}/robustness.*")


if __name__ == "__main__":
    command_line(main)
