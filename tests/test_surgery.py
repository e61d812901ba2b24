"""Semantic Surgery: prompts without the concept keep every bit, others lose the concept's way; read back."""
import dataclasses
import json
import math

import pytest
import torch

from baselines import surgery
from baselines.surgery import Settings
from helpers import MINI, quick_model
from plumbing.drift import presence
from plumbing.edits import read_edit
from plumbing.progress import peak_memory

HAS, LACKS = "a photo of the airplane", "a photo of the dog"


@pytest.fixture(scope="module")
def model():
    return quick_model(2)


def rows_of(text, concepts=("airplane",), anchors=("",), **settings):
    about = {"settings": dataclasses.asdict(Settings(**settings)), "concepts": [*concepts],
             "anchors": [*anchors]}
    return surgery.drawing(about, text)["rows"]


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / max(1e-8, math.hypot(*a) * math.hypot(*b))


def test_presence_is_the_mean_cosine_of_all_rows_and_finds_the_class_that_is_named(text):
    way = text(["airplane"])[0] - text([""])[0]
    prompts = [HAS, "a photo of the plane", LACKS, ""]
    found = presence(way, text(prompts))
    for score, rows in zip(found.tolist(), text(prompts).tolist()):
        naive = [cosine(a, b) for a, b in zip(way.tolist(), rows)]
        assert score == pytest.approx(sum(naive) / len(rows), abs=1e-5) and naive[0] == 0
    assert found[0] > 0.3 and found[0] > found[1] > 0.06 > found[2] > found[3]


def test_a_prompt_without_the_concept_keeps_every_bit_and_the_other_loses_its_way(text):
    e, rows = text([HAS, LACKS]), rows_of(text, gamma=0.3)
    before, changed = e.clone(), rows(e)
    assert torch.equal(e, before) and torch.equal(changed[1], e[1])
    way = (text(["airplane"])[0] - text([""])[0]).double()
    alpha = 1 / (1 + math.exp(-(presence(way, e[0].double()).item() - 0.06) / 0.3))
    assert 0.7 < alpha < 0.9
    assert torch.allclose(changed[0].double(), e[0].double() - alpha * way, atol=1e-5)
    assert torch.equal(rows_of(text, tau=1.0)(e), e)
    assert not torch.equal(rows_of(text, beta=1.0)(e)[1], e[1])   # as if it were in every prompt


def test_several_concepts_that_are_there_are_taken_off_as_one_text_and_from_their_anchors(text):
    given = [("airplane", "sky"), ("frog", ""), ("ship", "sea")]
    e, rows = text(["airplane ship", "a cat"]), rows_of(text, *zip(*given), beta=0.0)
    scores = [presence(text([c])[0] - text([n])[0], e).tolist()
              for c, n in given]
    alphas = [1 / (1 + math.exp(-s[0] / 0.02)) for s in scores]
    assert alphas[0] > 0.99 and alphas[1] < 0.5 < alphas[2]
    c, n = text(["airplane, ship", "sky, sea"])
    assert torch.allclose(rows(e)[0], e[0] - max(alphas) * (c - n), atol=1e-4)


def test_the_folder_draws_as_the_command_and_other_prompts_as_if_untouched(here, model, tmp_path):
    flags = ["--concept", "airplane", "--no-pictures"]
    for out in "ab":
        here("baselines/surgery.py", *flags, "--out", out, cwd=tmp_path)
    a, b = (json.loads((tmp_path / x / "run.json").read_text("utf-8")) for x in "ab")
    for about in (a, b):
        assert about.pop("seconds") and (peak_memory() is None or about.pop("peak GiB") > 0.1)
    assert a == b and 0.3 < a["presence"]["airplane"] < 0.6
    assert a["settings"] == {"beta": -0.06, "gamma": 0.02, "tau": 0.5} and a["drawing"] == ["rows"]
    plain = model.draw([HAS, LACKS], [1, 2])
    model.put(read_edit(tmp_path / "a", MINI, model.text))
    drawn = model.draw([HAS, LACKS], [1, 2])
    model.put({})
    assert torch.equal(drawn, model.draw([HAS, LACKS], [1, 2], rows=rows_of(model.text)))
    assert torch.equal(drawn[1], plain[1]) and (drawn[0] - plain[0]).abs().max() > 0.1


@pytest.mark.parametrize("setting, match", [("gamma=0", "gamma above 0"), ("tau=2", "tau in 0"),
                                            ("alpha=1", "no setting")])
def test_bad_settings_are_one_line(refused, tmp_path, setting, match):
    refused("baselines/surgery.py", "--concept", "airplane", "--set", setting, cwd=tmp_path, match=match)
