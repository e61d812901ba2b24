"""How far an edit moves prompts, by text alone."""
import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing import UserError
from plumbing.edits import gram
from plumbing.prompts import UNRELATED, book, same_word


def text_change(W0: dict[str, Tensor], W: dict[str, Tensor]) -> Tensor:
    """Δ [D, D] of any edit of keys and values: (Σ W₀ᵀW₀)⁻¹ Σ W₀ᵀW − I, which brings W₀ (I + Δ) nearest to W.
    Of a closed form it is its own Δ, but for rounding. What W lacks is unchanged."""
    if not W.keys() & W0.keys():
        raise UserError("this edit leaves keys and values alone, so how far it moves text cannot be said")
    delta = torch.linalg.solve(gram(W0, W0), gram(W0, {name: W.get(name, W0[name]) for name in W0}))
    return delta - torch.eye(len(delta), dtype=delta.dtype)


def movement(delta: Tensor, prompts: list[str], text) -> list[float]:
    """‖Δe‖/‖e‖ over all T rows of each prompt: how far W = W₀ (I + Δ) moves what the U-Net sees of it."""
    return [((e @ delta.T).norm() / e.norm()).item() for i in range(0, len(prompts), 64)
            for e in text(prompts[i:i + 64]).cpu().double()]


def presence(way: Tensor, rows: Tensor) -> Tensor:
    """How much of a concept prompts hold (Semantic Surgery's score): the mean over all T rows of the cosine
    of a prompt's row to the concept's way from "". way [T, D] = e(concept) − e(""), rows [B, T, D] -> [B]."""
    return F.cosine_similarity(way, rows, dim=-1).mean(-1)        # of begin-of-text, whose way is 0: 0


def drifts(delta: Tensor, pairs, text) -> dict[str, float]:
    """How far (I + Δ) e moves what it should not: ‖Δe‖/‖e‖ of "", and its median over the nouns of UNRELATED
    (30 at most, none of them in P) that name neither concept nor anchor."""
    classes = book()["classes"]
    named = {word for pair in pairs for word in (pair.concept, pair.anchor)}
    named |= {word for name in named & classes.keys() for word in classes[name]["synonyms"]}
    nouns = [noun for noun in UNRELATED if not any(same_word(noun, word) for word in named)]
    moved = movement(delta, ["", *(f"a photo of the {noun}" for noun in nouns)], text)
    return {'drift of ""': moved[0], "median drift of unrelated prompts": statistics.median(moved[1:])}


def preview(delta: Tensor, prompts: list[str], text) -> None:
    """Print how far an edit moves each prompt, the most moved first."""
    moved = sorted(zip(movement(delta, prompts, text), prompts), reverse=True)
    print("‖Δe‖/‖e‖  prompt", *(f"{far:8.3f}  {prompt}" for far, prompt in moved), sep="\n")
