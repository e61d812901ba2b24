"""How far prompts go along with an edit, by text alone; what is said of it before anything is drawn."""
import json

import pytest
import torch

from erasing import make_pairs
from plumbing.drift import edited_rows, mean_share, share, surroundings, warning_of
from plumbing.prompts import names_around


@pytest.fixture(scope="module")
def cat(text):
    return make_pairs("cat", "ground", "object", text, "tail", 0)[0]


def test_a_share_is_the_part_of_the_way_that_the_edited_rows_go(text, cat):
    way = cat.block_star() - cat.block()
    delta = torch.linalg.lstsq(cat.block(), 0.3 * way).solution.T                    # e ↦ e + 0.3 (e* − e)
    assert torch.allclose(cat.block() @ delta.T, 0.3 * way, atol=1e-6)
    assert share(delta, cat, cat.block()) == pytest.approx(0.3)
    rows = edited_rows(["a photo of the kitty", "cat"], text)
    assert torch.equal(rows[0], text("a photo of the kitty")[0].double()[5:])
    assert len(rows[1]) == len(cat.e) - 1
    by_hand = [sum(float(delta[i] @ r * w[i]) for r, w in zip(rows[0], way) for i in range(len(delta)))
               / float(sum((w * w).sum() for w in way))]
    assert share(delta, cat, rows[0]) == pytest.approx(by_hand[0])
    assert mean_share(delta, cat, ["a photo of the kitty"] * 2, text) == pytest.approx(by_hand[0])


def test_surroundings_are_the_nearest_names_and_never_concept_or_anchor(text, cat):
    found = surroundings(torch.zeros(256, 256).double(), [cat], "object", text)["cat → ground"]
    cosines = {name: torch.cosine_similarity(rows.flatten(), cat.block().flatten(), dim=0).item()
               for name, rows in zip(names_around([cat], "object"), edited_rows(
                   [f"a photo of the {name}" for name in names_around([cat], "object")], text))
               if len(rows) == cat.n}
    best = sorted(cosines, key=cosines.get, reverse=True)
    assert len(found) == 10 and {*found.values()} == {0.0} and not {"cat", "ground"} & {*found}
    assert best[1] in found and best[2] in found
    assert surroundings(torch.zeros(256, 256).double(), [cat], "explicit", text) == {}


def test_a_near_thing_that_goes_further_than_a_synonym_is_warned_of():
    gone = {"kitty": 0.9, "feline": 0.4, "dog": 0.5, "pizza": 2.0}
    assert "“dog”, which should stay, goes 0.50 of the way, further than the synonym “feline” (0.40)" in \
        warning_of("cat", gone)
    assert warning_of("cat", gone | {"dog": 0.3}) == warning_of("pizza", gone) == ""
    assert warning_of("cat", {"dog": 0.5}) == ""


def test_the_command_says_shares_before_it_draws_and_keeps_them(here, tmp_path, capsys):
    here("realera.py", "--concept", "cat", "--lora-steps", 0, "--no-pictures", cwd=tmp_path)
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "out/cat/run.json").read_text())["shares"]["cat → ground"]
    assert "cat → ground: of the way go, the nearest first, kitty " in said or len(report) == 10
    name, value = next(iter(report.items()))
    assert f"{name} {value:.2f}" in said
