"""The figure of many concepts: what it erases, its two ways, its files."""
import json

import torch

from erasing import make_pairs
from experiments import many_concepts
from helpers import CLASSES, no_drawing
from plumbing.book import nouns
from realera import Settings, erase_in_closed_form, mine


def test_a_hundred_names_are_erased_and_none_that_is_measured():
    erased, kept = many_concepts.order()
    assert len(erased) == len(set(erased)) == 100 and set(erased) & set(CLASSES) == set(CLASSES) - set(kept)
    assert kept == ["automobile", "cat", "dog", "horse", "truck"] and erased[:2] == ["airplane", "bird"]
    assert not set(erased) & ({*nouns("preserved"), *nouns("watched"), "car", "feline", "sky"} - set(CLASSES))


def test_once_in_all_is_the_plain_sum(text):
    pairs, s = make_pairs(["cat", "dog", "horse"], None, "object", text, "tail", 0), Settings()
    stay = text(["", "a photo of the ship"]).double()
    E, E_star, P = (torch.cat(rows) for rows in zip(*(mine(pair, s) for pair in pairs)))
    P = torch.cat([P / 3 ** 0.5, stay.flatten(0, 1)])             # beyond-concepts count 1/n
    B = E.T @ E + s.lambda1 * P.T @ P
    B += s.lambda2 * B.trace() / len(B) * torch.eye(len(B), dtype=B.dtype)
    expected = torch.linalg.solve(B, E.T @ (E_star - E)).T
    found = many_concepts.closed_form(pairs, stay, "once in all")
    assert (found - expected).abs().max() < 1e-8
    default = erase_in_closed_form(pairs, stay, s)[0]
    assert torch.equal(many_concepts.closed_form(pairs, stay, "per concept"), default)
    assert (default - expected).abs().max() > 1e-3


def test_text_alone_gives_table_and_curve(here, tmp_path, monkeypatch):
    monkeypatch.setattr(many_concepts, "COUNTS", (1, 6))
    monkeypatch.setattr(many_concepts, "shown", no_drawing)
    here("experiments/many_concepts.py", "--n", 0, "--out", "many", cwd=tmp_path)
    rows = json.loads((tmp_path / "many/many.json").read_text())
    assert [(row["concepts"], row["what must stay"]) for row in rows] == [
        (n, way) for n in (1, 6) for way in many_concepts.WAYS]
    same, other, few, many = [row["drift"] for row in rows]
    assert same == other and few < many and rows[0]["share of concepts"] > 0.7
    assert "concepts erased at once" in (tmp_path / "many/many.svg").read_text("utf-8")
