"""What `--preview` is worth: how far prompts are moved against how often they are still drawn.

    python experiments/preview_worth.py

The closed form of each of the ten classes in turn, with default settings: ‖Δe‖/‖e‖ of 26 prompts each, and
the share of their pictures in which `mini/clip` sees what is wanted.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import edited, make_pairs
from eval_clip import CLIP, shown
from plumbing.book import book
from plumbing.cli import at_least_1, command_line, program
from plumbing.drift import movement
from plumbing.edits import cross_attention
from plumbing.models import MINI
from plumbing.prompts import preserved_prompts, row_prompts
from plumbing.stats import correlation, ranks
from realera import Settings, erase_in_closed_form
from sample import Model


def prompts_of(concept: str) -> dict[str, list[tuple[str, str]]]:
    """(what should be seen, prompt) of a class by group, without seeds: e, g, a, s."""
    groups = row_prompts(concept, "object", range(1))
    return {group: [(wanted, prompt) for wanted, prompt, _ in groups[group]] for group in "egas"}


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--n", type=int, default=4, help="pictures a prompt (default 4)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("--classes", type=int, default=10, help="to erase: the first so many (default 10)")
    args = parser.parse_args()
    at_least_1(args, "n", "steps", "classes")
    model, clip, W0 = Model(Path(MINI)), CLIP.from_pretrained(Path(MINI) / "clip"), cross_attention(MINI)
    moved, kept, kinds, s, classes = [], [], [], Settings(), book()["classes"]
    for concept, entry in list(classes.items())[:args.classes]:
        pairs = make_pairs([concept], [entry["anchor"]], "object", model.text, s.rows, 0)
        delta, _ = erase_in_closed_form(pairs, model.text(preserved_prompts("object", pairs)), s)
        # synonyms of the other classes: no P names these, nor the classes themselves
        groups = prompts_of(concept) | {"s'": [(name, f"a photo of the {classes[name]['synonyms'][0]}")
                                                for name in classes if name != concept]}
        prompts = [prompt for group in groups.values() for prompt in group]
        kinds += [kind for kind, group in groups.items() for _ in group]
        moved += movement(delta, [prompt for _, prompt in prompts], model.text)
        model.put(edited(W0, delta))
        kept += shown(model, clip, prompts, args.n, args.steps)[0].tolist()
        print(concept, *(f"{kind} {m:.2f} {k:.2f};" for kind, m, k in
                         list(zip(kinds, moved, kept))[-len(prompts):]), flush=True)
    moved, kept = torch.tensor(moved), torch.tensor(kept)
    for what in (["e", "g", "a", "s", "s'"], ["e", "g", "a"], ["s'"]):
        some = torch.tensor([kind in what for kind in kinds])
        print(f"{', '.join(what)}: {int(some.sum())} prompts, top-1 {100 * kept[some].mean():.0f}, "
              f"rank correlation with ‖Δe‖/‖e‖ {correlation(ranks(moved[some]), ranks(kept[some])):.2f}")
    for low, high in ((0, 0.1), (0.1, 0.4), (0.4, 0.6), (0.6, 2)):
        some = (low <= moved) & (moved < high)
        print(f"‖Δe‖/‖e‖ {low} to {high}: {int(some.sum())} prompts, top-1 {100 * kept[some].mean():.0f}")


if __name__ == "__main__":
    command_line(main)
