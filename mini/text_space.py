"""The text space of mini/ beside what is published about SD v1.4's: the tables of its README.

    python mini/text_space.py
    python mini/text_space.py --model out/mini
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
import clip_text  # noqa: E402
from mini.emoji import Book
from plumbing.cli import command_line

# Cosines of single words in the tower of SD v1.4: the package clip-similarwords lists every pair from 0.85
# on, so a pair that it does not list lies below ("<"). Written down here, the package itself is not needed.
PUBLISHED = {
    "airplane": {"airplanes": ".871", "plane": ".856", "aircraft": "<.85", "jet": "<.85",
                 "helicopter": "<.85"},
    "automobile": {"car": "<.85"},
    "bird": {"birds": ".936", "birdie": ".880", "avian": ".874", "fowl": "<.85"},
    "cat": {"cats": ".928", "kitty": ".898", "feline": ".889", "kitten": ".880", "dog": "<.85"},
    "deer": {"reindeer": ".863", "stag": ".861"},
    "dog": {"dogs": ".933", "doggy": ".895", "canine": ".871", "pooch": ".861", "cat": "<.85"},
    "frog": {"frogs": ".921", "amphibian": "<.85"},
    "horse": {"horses": ".952", "equine": ".905", "steed": "<.85"},
    "ship": {"ships": ".912", "boat": "<.85", "vessel": "<.85"},
    "truck": {"trucks": ".927", "lorry": "<.85"},
}


class Space:
    """The text encoder as a place: rows of prompts and their cosines."""

    def __init__(self, model: Path, book: Book):
        self.book, self.tokenizer = book, clip_text.CLIPTokenizer.from_pretrained(model / "tokenizer")
        self.encoder = clip_text.CLIPTextModel.from_pretrained(model / "text_encoder")
        self.empty = self.rows("")[0]

    @torch.no_grad()
    def rows(self, prompt: str) -> tuple[Tensor, int]:
        """Rows [T, D] of a prompt, and which one is its end of text."""
        ids = self.tokenizer([prompt])
        return self.encoder(ids)[0].double(), int(ids.argmax())

    def prompt(self, name: str) -> str:
        return self.book.caption(name, 1)

    def end(self, name: str) -> Tensor:
        rows, end = self.rows(self.prompt(name))
        return rows[end]

    def edited(self, name: str, n: int) -> Tensor:
        """The rows that erasure edits: from the last token on, n of them."""
        rows, end = self.rows(self.prompt(name))
        return rows[end - 1:end - 1 + n].flatten()

    def cosine(self, a: str, b: str, n: int = 16) -> float:
        return F.cosine_similarity(self.edited(a, n), self.edited(b, n), dim=0).item()

    def presence(self, concept: str, name: str) -> float:
        """How much of a concept a prompt holds: the mean over rows of cos(e(c) − e(""), e(prompt))."""
        there = self.rows(self.prompt(concept))[0] - self.empty
        return F.cosine_similarity(there, self.rows(self.prompt(name))[0], dim=1)[1:].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE, help="model folder (default: this one)")
    args = parser.parse_args()
    book = Book()
    space = Space(args.model, book)
    print("| word | other | SD v1.4 | end of text | edited rows |\n|---|---|---|---|---|")
    errors = []
    for word, others in PUBLISHED.items():
        for other, published in others.items():
            at_end = F.cosine_similarity(space.end(word), space.end(other), dim=0).item()
            print(f"| {word} | {other} | {published} | {at_end:.2f} | {space.cosine(word, other):.2f} |")
            errors.append(at_end - float(published) if published[0] == "." else max(0.0, at_end - 0.85))
    print(f"\nroot mean square error {torch.tensor(errors).square().mean().sqrt():.3f}\n")
    groups = {"synonyms": lambda c: c["synonyms"], "phrases": lambda c: c["associated"],
              "disputed": lambda c: c["disputed"], "stay": lambda c: c["stay"], "far": lambda c: [c["far"]],
              "nouns": lambda c: book.words[::200]}
    print("Presence over the word's own, and cosines of the edited rows, means of ten classes (least, most):")
    for group, names in groups.items():
        presence, cosine = [], []
        for word, entry in book.classes.items():
            own = space.presence(word, word)
            presence += [space.presence(word, name) / own for name in names(entry)]
            cosine += [space.cosine(word, name) for name in names(entry)]
        print(f"| {group} | " + " | ".join(f"{sum(x) / len(x):.2f} ({min(x):.2f} – {max(x):.2f})"
                                           for x in (presence, cosine)) + " |")
    for word, entry in book.classes.items():
        near = max(entry["stay"], key=lambda name: space.cosine(word, name))
        print(f"canary of {word}: {near}, cosine {space.cosine(word, near):.2f}")
    norms = space.rows("a photo of the cat")[0].norm(dim=1)
    print(f"begin of text is {norms[0] / norms[1:].mean():.2f} times as long as the other rows")


if __name__ == "__main__":
    command_line(main)
