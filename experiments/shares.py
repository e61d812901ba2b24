"""What goes and what stays, by text alone: methods side by side, before a picture is drawn.

    python experiments/shares.py                                 # mini's book: seconds, no U-Net
    python experiments/shares.py --words choosing

For each class of the book and each method: the share of the way from concept to anchor that prompts go. 0
stays, 1 arrives. The table has means over the classes: the word itself, its synonyms and phrases, what every
reading of the concept includes (vanish), what is disputed; then what should stay: near things, the nearest of
them (the canary), a far one, the other classes; and the median drift of unrelated prompts. `--words choosing`
takes the synonyms and phrases that settings may be chosen on; no table of pictures reports those.
"""
import statistics
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from baselines import vocabulary
from erasing import Pair, make_pairs
from plumbing import UserError
from plumbing.book import book, measured_words, use_book
from plumbing.cli import BOOK, command_line, parse_settings, program
from plumbing.drift import drifts, edited_rows, nearness, share
from plumbing.models import model_folder
from plumbing.progress import progress
from plumbing.prompts import preserved_prompts, prompt_of
from plumbing.stats import as_markdown, write_tables
from realera import Settings, erase_in_closed_form
from sample import Text

CLOSED = "M=0 N=0 lambda1=0.1"
METHODS = {                     # name -> settings of realera.py, or of vocabulary.py
    "closed form": CLOSED, "closed form, reach 2": f"{CLOSED} reach=2",
    "RealEra": "", "… mining=expected": "mining=expected", "… and λ1 = 1": "mining=expected lambda1=1",
    "vocabulary, cosine 0.8, no contrast": "vocabulary contrast=0 threshold=0.8 measured=false",
    "vocabulary": "vocabulary measured=false", "vocabulary, all words": "vocabulary"}


def near_things(pair: Pair, text: Text) -> dict[str, float]:
    """The cosine to the concept of each thing that is near and must stay, as the book has them."""
    stay = book()["classes"][pair.concept].get("stay", [])
    return {name: nearness(pair, rows)
            for name, rows in zip(stay, edited_rows([prompt_of(name) for name in stay], text))}


def groups_of(concept: str, words: str, near: dict[str, float]) -> dict[str, list[str]]:
    """What is watched of a class: {group: names}. near: the cosine of each near thing to the concept."""
    entry = book()["classes"][concept]
    chosen = entry.get("choosing", {}) if words == "choosing" else entry
    groups = {"concept": [concept], "synonyms": chosen.get("synonyms", []),
              "phrases": chosen.get("associated", []),
              "vanish": entry.get("vanish", []), "disputed": entry.get("disputed", []),
              "canary": [max(near, key=near.get)] if near else [], "near": [*near],
              "far": [entry["far"]] if "far" in entry else [],
              "other classes": [name for name in book()["classes"] if name != concept]}
    return {group: names for group, names in groups.items() if names}


def edit_of(settings: str, pair: Pair, text: Text, words) -> torch.Tensor:
    """Δ [D, D] of one concept."""
    if not settings.startswith("vocabulary"):
        s = parse_settings(Settings, settings.split())
        return erase_in_closed_form([pair], text(preserved_prompts("object", [pair])), s)[0]
    s = parse_settings(vocabulary.Settings, settings.split()[1:])
    named = set() if s.measured else measured_words()             # nothing that is watched is handed to it
    return vocabulary.erase_with_words([pair], words, text("")[0].double(), s, named=named)[0]


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--model", default="mini", help="folder or hub id: its text encoder (default mini)")
    parser.add_argument("--book", type=Path, metavar="FILE", help=BOOK)
    parser.add_argument("--words", choices=("reported", "choosing"), default="reported",
                        help="which synonyms and phrases (default reported)")
    parser.add_argument("--classes", help="some of the book's, as cat,dog (default: all)")
    parser.add_argument("--set", action="append", default=[], metavar="SETTINGS",
                        help='one more row, as "mining=expected M=20" or "vocabulary mu=1"; may be repeated')
    parser.add_argument("--out", type=Path, default=Path("out/shares"), help="folder (default out/shares)")
    args = parser.parse_args()
    use_book(args.book)
    classes = args.classes.split(",") if args.classes else [*book()["classes"]]
    if wrong := {*classes} - book()["classes"].keys():
        raise UserError(f"--classes {min(wrong)}: the book has {', '.join(book()['classes'])}")
    text = Text(model_folder(args.model))
    words = vocabulary.make_vocabulary(text, "object")
    found: dict[str, list[dict]] = {}
    for concept in progress(classes, "classes", "class"):
        pair = make_pairs(concept, None, "object", text, "tail", 0)[0]
        groups = {group: edited_rows([prompt_of(name) for name in names], text)
                  for group, names in groups_of(concept, args.words, near_things(pair, text)).items()}
        for name, settings in [*METHODS.items(), *((line, line) for line in args.set)]:
            delta = edit_of(settings, pair, text, words)
            row = {group: statistics.mean(share(delta, pair, x) for x in some)
                   for group, some in groups.items()}
            found.setdefault(name, []).append(row | {"drift": [*drifts(delta, [pair], text).values()][1]})
    table = [{"method": name} | {group: round(statistics.mean(row[group] for row in rows if group in row), 2)
                                 for group in dict.fromkeys(group for row in rows for group in row)}
             for name, rows in found.items()]
    write_tables(args.out, f"shares-{args.words}", table)
    print(f"{args.words} words of {', '.join(classes)}; {len(words.words)} words in the vocabulary\n\n"
          f"{as_markdown(table)}\nwrote {args.out}/")


if __name__ == "__main__":
    command_line(main)
