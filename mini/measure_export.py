"""What rank a LoRA of an edit needs, and what `--preview` is worth; both are seen by `mini/clip`.

    python mini/measure_export.py --part rank --edit out/airplane --n 8
    python mini/measure_export.py --part preview

rank: an edit of one class and its truncations, n pictures a prompt. preview: the closed form of each of the
ten classes in turn, with default settings; ‖Δe‖/‖e‖ of 26 prompts each, and how often they are still drawn.
"""
import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from command import command_line  # noqa: E402
from concepts import BOOK, make_pairs, movement, preserved_prompts, row_prompts  # noqa: E402
from eval_clip import CLIP  # noqa: E402
from export import low_rank  # noqa: E402
from files import MINI, about_edit, cross_attention, put_weights, read_edit, read_json  # noqa: E402
from realera import Settings, edited, erase_in_closed_form  # noqa: E402
from sample import Model  # noqa: E402

GROUPS = {"e": "Acc_e", "g": "Acc_g", "a": "Acc_a", "s": "Acc_s"}


def prompts_of(concept: str) -> dict[str, list[tuple[str, str]]]:
    """(wanted, prompt) by group."""
    groups = row_prompts(concept, "object", range(1))
    return {group: [(wanted, prompt) for wanted, prompt, _ in rows] for group, rows in groups.items()}


class Measure:
    def __init__(self, n: int, steps: int | None):
        self.n, self.steps, self.model = n, steps, Model(Path(MINI))
        self.clip, self.W0 = CLIP.from_pretrained(Path(MINI) / "clip"), cross_attention(MINI)
        book = read_json(BOOK)
        self.names = [*book["classes"], *book["scenes"]]

    def look(self, W: dict[str, Tensor], prompts: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """(wanted, prompt) -> the share of pictures that show what is wanted, [prompts]; and the pictures."""
        put_weights(self.model.unet, W)
        pictures = self.model.draw([p for _, p in prompts for _ in range(self.n)],
                                   list(range(self.n)) * len(prompts), self.steps)
        said = self.clip.classify(pictures, [f"a photo of the {name}" for name in self.names]).argmax(1)
        wanted = torch.tensor([self.names.index(name) for name, _ in prompts])
        return (said.view(-1, self.n) == wanted[:, None]).float().mean(1), pictures

    def rank(self, edit: str) -> None:
        W, concept = read_edit(edit, MINI), about_edit(edit)["concepts"][0]
        groups = prompts_of(concept)
        prompts = [prompt for group in GROUPS for prompt in groups[group]]
        sizes = [len(groups[group]) for group in GROUPS]
        print(f"| rank | relative error | {' | '.join(GROUPS.values())} | pixels off |\n" + "|---" * 7 + "|")
        whole = None                                              # the pictures of the whole edit
        for rank in ("all", 0, 1, 2, 4, 8, 16, 32, 64):
            if rank == "all":
                matrices, error = W, 0
            else:
                factors, error = low_rank(self.W0, W, rank)
                matrices = {name: self.W0[name].float() + B @ A for name, (B, A) in factors.items()}
            right, pictures = self.look(matrices, prompts)
            whole = pictures if whole is None else whole
            cells = [f"{100 * part.mean():.0f}" for part in right.split(sizes)]
            off = (pictures - whole).abs().mean()
            print(f"| {rank} | {error:.3f} | {' | '.join(cells)} | {off:.3f} |", flush=True)

    def preview(self, classes: int) -> None:
        moved, kept, kinds, s, book = [], [], [], Settings(), read_json(BOOK)["classes"]
        for concept, entry in list(book.items())[:classes]:
            pairs = make_pairs([concept], [entry["anchor"]], "object", self.model.text, s.rows, 0)
            delta, _ = erase_in_closed_form(pairs, self.model.text(preserved_prompts("object", pairs)), s)
            # synonyms of the other classes: nothing keeps those, as P holds only the classes' own names
            groups = prompts_of(concept) | {"s'": [(name, f"a photo of the {book[name]['synonyms'][0]}")
                                                    for name in book if name != concept]}
            prompts = [prompt for group in groups.values() for prompt in group]
            kinds += [kind for kind, group in groups.items() for _ in group]
            moved += movement(delta, [prompt for _, prompt in prompts], self.model.text)
            kept += self.look(edited(self.W0, delta), prompts)[0].tolist()
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


def ranks(x: Tensor) -> Tensor:
    """Rank of each value, equal ones share their mean rank."""
    return ((x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2).double()


def correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["rank", "preview"], required=True,
                        help="rank: of --export-lora; preview: what --preview says against what is drawn")
    parser.add_argument("--edit", default="out/airplane", help="an edit of one class (default out/airplane)")
    parser.add_argument("--n", type=int, default=4, help="pictures a prompt (default 4)")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the model's)")
    parser.add_argument("--classes", type=int, default=10, help="to erase for preview: the first so many")
    args = parser.parse_args()
    measure = Measure(args.n, args.steps)
    measure.rank(args.edit) if args.part == "rank" else measure.preview(args.classes)


if __name__ == "__main__":
    command_line(main)
