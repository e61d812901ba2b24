"""How far an edit moves prompts, by text alone."""
import statistics
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing import UserError
from plumbing.book import book, nouns, same_word
from plumbing.edits import gram
from plumbing.prompts import TASKS, names_around


def text_change(W0: dict[str, Tensor], W: dict[str, Tensor]) -> Tensor:
    """Δ [D, D] of any edit of keys and values: (Σ W₀ᵀW₀)⁻¹ Σ W₀ᵀW − I, which brings W₀ (I + Δ) nearest to W.
    Of a closed form it is its own Δ, but for rounding. What W lacks is unchanged."""
    if not W.keys() & W0.keys():
        raise UserError("this edit leaves keys and values alone, so how far it moves text cannot be said")
    delta = torch.linalg.solve(gram(W0, W0), gram(W0, {name: W.get(name, W0[name]) for name in W0}))
    return delta - torch.eye(len(delta), dtype=delta.dtype)


def rows_of(prompts: list[str], text) -> list[Tensor]:
    """Each prompt's rows [T, D]. A command asks for some more than once, so they stay with the encoder."""
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in text.known]
    text.known |= zip(new, text(new).cpu()) if new else {}
    return [text.known[prompt] for prompt in prompts]


def edited_rows(prompts: list[str], text) -> list[Tensor]:
    """Each prompt's rows from its last token on, [·, D], float64: those that an erasure would edit."""
    return [e.double()[text.tokenizer.count(prompt):] for prompt, e in zip(prompts, rows_of(prompts, text))]


def last_tokens(text, texts: list[str]) -> Tensor:
    """The row of each text's last token, [texts, D], float64."""
    rows = text(texts or [""]).cpu().double()                     # [texts, T, D]
    return rows[range(len(texts)), [min(text.tokenizer.count(x), rows.shape[1] - 2) for x in texts]]


@torch.no_grad()
def end_rows(prompts: list[str], text) -> Tensor:
    """Each prompt's end-of-text row, [prompts, D], float64. It sees no padding, so none is encoded."""
    ids = text.tokenizer(prompts).to(text.encoder.final_layer_norm.weight.device)
    ends = torch.tensor([min(text.tokenizer.count(prompt) + 1, ids.shape[1] - 1) for prompt in prompts])
    rows = torch.cat([text.encoder(part) for part in ids[:, :ends.max() + 1].split(64)])
    return rows[torch.arange(len(ids)), ends].cpu().double()


def nearness(pair, rows: Tensor) -> float:
    """The cosine of a prompt's edited rows to the concept's, as one long vector of those that both have."""
    n = min(len(rows), pair.n)
    return torch.cosine_similarity(rows[:n].flatten(), pair.block()[:n].flatten(), dim=0).item()


def share(delta: Tensor, pair, rows: Tensor) -> float:
    """How much of the way from the concept to its anchor a prompt's edited rows e' are moved along:
    ⟨Δe', e* − e⟩/‖e* − e‖². 0: it stays; 1: as far as the anchor is."""
    n = min(len(rows), pair.n)
    way = pair.block_star()[:n] - pair.block()[:n]
    return ((rows[:n] @ delta.T * way).sum() / way.square().sum()).item()


def mean_share(delta: Tensor, pair, prompts: list[str], text) -> float:
    return statistics.mean(share(delta, pair, rows) for rows in edited_rows(prompts, text))


def surroundings(delta: Tensor, pairs, task: str, text, most: int = 10) -> dict[str, dict[str, float]]:
    """Per pair the names nearest to the concept, by the cosine of their edited rows: {name: share}. Twice as
    many, chosen by the end-of-text row alone, are encoded whole: so a stranger among them may be missed."""
    names, template, found = names_around(pairs, task), TASKS[task][0], {}
    if not names:
        return {}
    prompts = [template.format(name) for name in names] + [pair.prompt for pair in pairs]
    ends, own = end_rows(prompts, text).split([len(names), len(pairs)])
    for pair, e in zip(pairs, own):
        order = torch.cosine_similarity(ends, e, dim=-1).argsort(descending=True, stable=True)
        some = [names[i] for i in order.tolist() if names[i] not in (pair.concept, pair.anchor)][:2 * most]
        rows = dict(zip(some, edited_rows([template.format(name) for name in some], text)))
        some.sort(key=lambda name: -nearness(pair, rows[name]))
        found[str(pair)] = {name: round(share(delta, pair, rows[name]), 3) + 0.0 for name in some[:most]}
    return found


def synonyms_and_near(concept: str, gone: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Of {name: share} the book's synonyms of a concept, and its near things, which must stay."""
    entry = book()["classes"].get(concept, {})
    return tuple({name: gone[name] for name in gone if name in entry.get(group, ())}
                 for group in ("synonyms", "stay"))


def warning_of(concept: str, gone: dict[str, float]) -> str:
    """"" or what is wrong with these shares: a name that must stay goes further than a synonym."""
    goes, stays = synonyms_and_near(concept, gone)
    if not stays or not goes or max(stays.values()) <= min(goes.values()):
        return ""
    stay, synonym = max(stays, key=stays.get), min(goes, key=goes.get)
    return (f"“{stay}”, which should stay, goes {stays[stay]:.2f} of the way, further than the synonym "
            f"“{synonym}” ({goes[synonym]:.2f})")


def say_shares(delta: Tensor, pairs, task: str, text) -> dict[str, dict[str, float]]:
    """Print the surroundings of the first five concepts, and what is doubtful there; returns all."""
    found = surroundings(delta, pairs, task, text)
    for pair in pairs[:5] if found else ():
        near = ", ".join(f"{name} {round(share, 2) + 0.0:.2f}" for name, share in found[str(pair)].items())
        print(f"{pair}: of the way go, the nearest first, {near}")
        if doubt := warning_of(pair.concept, found[str(pair)]):
            print(f"warning: {doubt}", file=sys.stderr)
    return found


def movement(delta: Tensor, prompts: list[str], text) -> list[float]:
    """‖Δe‖/‖e‖ over all T rows of each prompt: how far W = W₀ (I + Δ) moves what the U-Net sees of it."""
    return [((e @ delta.T).norm() / e.norm()).item() for i in range(0, len(prompts), 64)
            for e in text(prompts[i:i + 64]).cpu().double()]


def presence(way: Tensor, rows: Tensor) -> Tensor:
    """How much of a concept prompts hold (Semantic Surgery's score): the mean over all T rows of the cosine
    of a prompt's row to the concept's way from "". way [T, D] = e(concept) − e(""), rows [B, T, D] -> [B]."""
    return F.cosine_similarity(way, rows, dim=-1).mean(-1)        # of begin-of-text, whose way is 0: 0


def presences(pairs, prompts: list[str], text) -> list[float]:
    """How much of what is erased each prompt holds: its `presence` over that of the concept's own prompt, and
    of several concepts the largest."""
    rows, empty = text(prompts).cpu().double(), text("")[0].cpu().double()
    return torch.stack([presence(pair.e - empty, rows) / presence(pair.e - empty, pair.e)
                        for pair in pairs]).amax(0).tolist()


def drifts(delta: Tensor, pairs, text) -> dict[str, float]:
    """How far (I + Δ) e moves what it should not: ‖Δe‖/‖e‖ of "", and its median over the watched nouns (none
    of them in P) that name neither concept nor anchor."""
    classes = book()["classes"]
    named = {word for pair in pairs for word in (pair.concept, pair.anchor)}
    named |= {word for name in named & classes.keys() for word in classes[name]["synonyms"]}
    watched = nouns("watched")                                    # if an edit names them all, all of them
    watched = [noun for noun in watched if not any(same_word(noun, word) for word in named)] or watched
    moved = movement(delta, ["", *(f"a photo of the {noun}" for noun in watched)],
                     lambda prompts: torch.stack(rows_of(prompts, text)))
    return {'drift of ""': moved[0], "median drift of unrelated prompts": statistics.median(moved[1:])}


def drift_of(report: dict) -> float | None:
    """The median drift of unrelated prompts that a run.json tells; None where nothing moves the text, or how
    far it moves cannot be said."""
    return report.get("numbers", {}).get("median drift of unrelated prompts")


def preview(delta: Tensor, prompts: list[str], text) -> None:
    """Print how far an edit moves each prompt, the most moved first."""
    moved = sorted(zip(movement(delta, prompts, text), prompts), reverse=True)
    print("‖Δe‖/‖e‖  prompt", *(f"{far:8.3f}  {prompt}" for far, prompt in moved), sep="\n")
