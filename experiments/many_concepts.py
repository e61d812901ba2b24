"""MACE's question: what is left of other concepts when 1, 5, 10 or 100 are erased at once?

    python experiments/many_concepts.py --quick
    python experiments/many_concepts.py --n 50 --steps 12

On `mini`. Every second class stays and is measured, Acc_s. Erased are the five others, then words of the
book, of synonyms and phrases. The closed form alone, with default settings, in two ways: what must stay
counts once per concept (as realera.py does it), or once in all. Beside the pictures the text's numbers: the
median drift of unrelated prompts, and the share of its way to the anchor that a concept and its synonyms go.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import edited, make_pairs
from eval_clip import CLIP, shown
from plumbing import UserError, svg
from plumbing.book import book, nouns
from plumbing.cli import command_line, program, quick_or_full
from plumbing.disk import refuse_existing
from plumbing.drift import drifts, mean_share
from plumbing.edits import cross_attention
from plumbing.models import MINI
from plumbing.prompts import preserved_prompts
from plumbing.stats import as_markdown, write_tables
from realera import Settings, erase_in_closed_form
from sample import Model

COUNTS, WAYS = (1, 2, 5, 10, 20, 100), ("per concept", "once in all")


def order() -> tuple[list[str], list[str]]:
    """What is erased, in this order, 100 names; and the classes that are kept."""
    classes = book()["classes"]
    kept = list(classes)[1::2]
    taken = {*classes, *book()["scenes"], *nouns("preserved"), *nouns("watched")}
    taken |= {synonym for name in kept for synonym in classes[name]["synonyms"]}
    words = [word for entry in classes.values() for text in [*entry["synonyms"], *entry["associated"]]
             for word in text.split() if len(word) > 3 and word.isalpha() and word not in taken]
    return list(dict.fromkeys([*list(classes)[::2], *words]))[:100], kept


def closed_form(pairs: list, stay: torch.Tensor, way: str) -> torch.Tensor:
    """Δ [D, D]; rows that are divided by √n count 1/n, n times."""
    times = 1 if way == "per concept" else len(pairs) ** -0.5
    return erase_in_closed_form(pairs, times * stay, Settings())[0]


def by_text(delta: torch.Tensor, pairs: list, text) -> dict[str, float]:
    """Median drift, and the mean share of the concepts and of the erased classes' synonyms."""
    classes, found = book()["classes"], {"concepts": [], "synonyms": []}
    for pair in pairs:
        found["concepts"].append(mean_share(delta, pair, [f"a photo of the {pair.concept}"], text))
        if pair.concept in classes:
            synonyms = [f"a photo of the {name}" for name in classes[pair.concept]["synonyms"]]
            found["synonyms"].append(mean_share(delta, pair, synonyms, text))
    return {"drift": round(list(drifts(delta, pairs, text).values())[1], 3)} | {
        f"share of {group}": round(sum(some) / len(some), 3) for group, some in found.items()}


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--n", type=int, help="pictures a prompt (default 20; 0: text alone)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("--quick", action="store_true", help="the same as --n 4 --steps 12")
    parser.add_argument("--out", type=Path, default=Path("out/many"), help="folder (default out/many)")
    args = parser.parse_args()
    refuse_existing(args.out, "choose another --out")
    quick_or_full(args)
    n, steps = args.n, args.steps
    if n < 0 or steps is not None and steps < 1:
        raise UserError("--n must be at least 0, --steps at least 1")
    model, clip, W0 = Model(MINI), CLIP.from_pretrained(Path(MINI) / "clip"), cross_attention(MINI)
    erased, kept = order()
    rows = []
    for count in COUNTS:
        pairs = make_pairs(erased[:count], None, "object", model.text, "tail", 0)
        stay = model.text(preserved_prompts("object", pairs)).double()
        for way in WAYS:
            delta = closed_form(pairs, stay, way)
            rows.append({"concepts": count, "what must stay": way} | by_text(delta, pairs, model.text))
            model.put(edited(W0, delta))
            groups = {"Acc_s": kept, "Acc_e": [name for name in erased[:count] if name in book()["classes"]]}
            for group, names in groups.items() if n else ():
                right = shown(model, clip, [(name, f"a photo of the {name}") for name in names], n, steps)[0]
                rows[-1][group] = round(100 * right.mean().item(), 1)
            print(*(f"{name} {value}" for name, value in rows[-1].items()), sep=", ", flush=True)
    write_tables(args.out, "many", rows)
    curves = []
    for column in ("Acc_s", "drift") if n else ("drift",):
        lines = {f"what must stay counts {way}": [(row["concepts"], row[column]) for row in rows
                                                  if row["what must stay"] == way] for way in WAYS}
        curves.append(svg.curve(lines, "concepts erased at once", column, column, "x", 420, marks=True))
    svg.write(args.out / "many.svg", *curves)
    print(f"\n{as_markdown(rows)}\nwrote {args.out}/")


if __name__ == "__main__":
    command_line(main)
