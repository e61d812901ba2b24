"""What vanishes against what stays: what is chosen on which words, and the shares, a second way."""
import argparse
import importlib
import json
import math
import types
from xml.etree import ElementTree

import pytest
import torch
import torch.nn.functional as F

from experiments import frontier
from experiments.rows import CLOSED
from helpers import MINI, random
from plumbing import making
from plumbing.book import meanings, sights, use_book
from plumbing.cli import parse_settings
from plumbing.disk import read_json
from plumbing.progress import peak_memory
from plumbing.stats import wilson
from sample import Text
from starts import finished

BOOK = {"classes": {name: {"anchor": "ground", "synonyms": [synonym], "associated": [phrase], "stay": stay,
                           "far": "truck",
                           "choosing": {"synonyms": [other], "associated": [f"{phrase} again"]}}
                    for name, synonym, other, phrase, stay in (
                        ("cat", "feline", "housecat", "purring in the dark", ["dog", "horse"]),
                        ("dog", "hound", "puppy", "barking at the postman", ["cat", "deer"]),
                        ("ship", "vessel", "ferry", "sailing on the waves", ["truck", "frog"]))},
        "scenes": ["ground", "sea"]}
SMALL = ["--n", 1, "--steps", 4, "--choose-n", 1, "--choose-steps", 4, "--device", "cpu", "--out", "o",
         "--book", "book.json"]


@pytest.fixture
def small(tmp_path):
    (tmp_path / "book.json").write_text(json.dumps(BOOK))
    use_book(tmp_path / "book.json")
    yield tmp_path
    use_book(None)


def test_what_is_asked_and_among_what_clip_chooses(small, text):
    assert list(sights()) == ["cat", "dog", "ship", "horse", "truck", "deer", "frog", "ground", "sea"]
    assert [meanings().get(name) for name in ("cat", "puppy", "purring in the dark again", "truck")] == [
        "cat", "dog", "cat", None]
    groups = frontier.asked("cat", "reported", text)
    assert groups["synonyms"] == [("cat", "a photo of the feline")]
    assert groups["phrases"] == [("cat", "purring in the dark")]
    assert groups["near"] == [("dog", "a photo of the dog"), ("horse", "a photo of the horse")]
    assert groups["others' synonyms"] == [("dog", "a photo of the hound"), ("ship", "a photo of the vessel")]
    assert groups["anchor"] == [("ground", "a photo of the ground")]
    assert groups["others' phrases"] == [("dog", "barking at the postman"), ("ship", "sailing on the waves")]
    chosen = frontier.asked("cat", "choosing", text)
    assert chosen.keys() == set(frontier.CHOOSE)
    assert chosen["synonyms"] == [("cat", "a photo of the housecat")]


def test_shares_are_of_what_was_right_before(small, monkeypatch):
    """Made-up sights in place of pictures; each share counted by hand."""
    names, seeds = list(sights()), range(7, 10)
    what = [None, ("closed form", "lambda1=1", 0)]
    seen_by = [{}, {}]
    generator = torch.Generator().manual_seed(0)

    class Clip:
        tokenizer = staticmethod(lambda prompts: torch.arange(len(prompts)))
        text_features = staticmethod(lambda ids: torch.eye(len(names))[ids])
        logit_scale = torch.zeros(())

    def evaluate(model, clip, jobs, *_, **__):
        for job in jobs:
            dog = torch.randint(2, (), generator=generator).item()
            seen_by[model].setdefault(job, "dog" if dog else "cat")
        return {job: torch.eye(len(names))[names.index(seen_by[model][job])] for job in jobs}

    monkeypatch.setattr(frontier, "each", lambda *_: ((i, Clip, None) for i in range(2)))
    monkeypatch.setattr(frontier, "evaluate", evaluate)
    args = types.SimpleNamespace(model="mini", out=small, steps=1, batch=None)
    before, after = frontier.measure([("cat", one) for one in what], "reported", seeds, args, 1)

    def seen(i, prompt, name):
        return [seen_by[i][prompt, seed] == name for seed in seeds]
    assert after["synonyms"] == [sum(seen(1, "a photo of the feline", "cat")), 3]
    assert before["other classes"] == [sum(seen(0, "a photo of the dog", "dog")), 6]               # no ship
    right = [b for a, b in zip(*(seen(i, "a photo of the dog", "dog") for i in (0, 1))) if a]
    assert 0 < len(right) and after["near"] == [sum(right), len(right)]
    assert before["far"] == [0, 3] and "far" not in after         # it was never drawn right
    jobs = {prompt for group in frontier.asked("cat", "reported", Text(MINI)).values() for _, prompt in group}
    classes = list(BOOK["classes"])                               # cat, dog, ship: the first of the names
    for group, wanted in (("concept", "cat"), ("other classes", "dog")):
        total = 0
        for _, prompt in frontier.asked("cat", "reported", Text(MINI))[group]:
            for seed in seeds:
                exps = [math.exp(name == seen_by[1][prompt, seed]) for name in classes]
                target = wanted if group == "concept" else prompt.removeprefix("a photo of the ")
                total += exps[classes.index(target)] / sum(exps)
        assert after[f"{group}, ten-way probability"][0] == pytest.approx(total, abs=1e-3)
    assert after["strange"] == [0, 3 * len(jobs)] and "strange" not in before   # one-hot: all look alike


def test_strange_is_what_lies_farther_off_than_the_untouched_from_each_other():
    usual = F.normalize(random(300, 6, seed=0).float() + torch.tensor([4.0, 0, 0, 0, 0, 0]), dim=1)
    apart = [max(float(a @ b) for j, b in enumerate(usual) if i != j) for i, a in enumerate(usual)]
    edge = (sorted(apart)[2] + sorted(apart)[3]) / 2              # three of three hundred
    off = F.normalize(torch.tensor([[-1.0, 0, 0, 0, 0, 0], [0, 1, 0, 0, 0, 0]]), dim=1)
    seen = torch.cat([off, usual[:50], F.normalize(usual[50:60] + 0.01 * off[:1], dim=1)])
    wanted = [max(float(a @ b) for b in usual) < edge for a in seen]
    assert frontier.strange(seen, usual).tolist() == wanted and sum(wanted) == 2 and wanted[0]


def test_strengths_are_chosen_on_other_words_and_other_classes(small, monkeypatch):
    asked = []

    def measure(cells, words, seeds, args, steps):
        """On dog, which has twice the pictures, the first strength is best, on cat and ship the second."""
        asked.append((cells, words, seeds))
        good = [what and (what[1] == "reach=1") == (concept == "dog") for concept, what in cells]
        counts = [{"concept": [1, 10], "synonyms": [1, 5] if one else [3, 5], "phrases": [1, 2],
                   "near": [9, 10], "canary": [4, 5], "other classes": [9, 10]} for one in good]
        return [{group: [x * (1 + (concept == "dog")) for x in pair] for group, pair in some.items()}
                | {"drift": 0.0, "MB": 2.0} for (concept, _), some in zip(cells, counts)]

    monkeypatch.setattr(frontier, "measure", measure)
    monkeypatch.setattr(frontier, "ROWS", {row: ("realera.py", [], ["reach=1", "reach=2"]) for row in "ab"})
    monkeypatch.setattr(frontier, "RANDOM", {"b"})
    given = {"row": ["a", "b"], "concept": None, "choose_on": None, "choose_n": 3, "choose_steps": 2,
             "steps": 9, "n": 2, "seed": 5, "out": small / "o", "dtype": "float32", "reference": "b",
             "model": "mini"}
    monkeypatch.setattr(frontier, "measuring_args", lambda parser: argparse.Namespace(**given))
    (small / "o").mkdir()
    frontier.main()
    (tries, words, seeds), (cells, reported, others) = asked
    assert (words, reported) == ("choosing", "reported") and not {*seeds} & {*others} and len(seeds) == 3
    assert len(tries) == 3 + 2 * 2 * 3
    got = {(what[0], concept, what[1]) for concept, what in cells if what}
    assert got == {(row, concept, strength) for row in "ab"
                   for concept, strength in (("cat", "reach=1"), ("ship", "reach=1"), ("dog", "reach=2"))}
    assert [what[2] for concept, what in cells if what and (what[0], concept) == ("b", "cat")] == [0, 1, 2, 3]
    table = json.loads((small / "o/frontier-a+b.json").read_text())
    assert [row["row"] for row in table] == ["untouched", "a", "b"]
    assert table[1]["MB"] == 2 and "seconds" not in table[1]
    assert "H_o − b" in table[1] and "H_o − b" not in table[2]
    assert table[1]["synonyms"][0] == pytest.approx(60) and table[1]["strength"] == "reach=1; reach=2"
    # 3 / (1/0.9 + 1/0.9 + 1/0.4), and with near things and phrases
    assert table[1]["H_o"][0] == pytest.approx(100 * 3 / (1 / .9 + 1 / .9 + 1 / .4), abs=0.01)
    assert table[1]["H near"][0] == pytest.approx(100 * 3 / (1 / .9 + 1 / .9 + 1 / .5), abs=0.01)
    given |= {"row": ["a"], "choose_on": ["cat", "dog"], "reference": None}
    monkeypatch.setattr(frontier, "TRAINED", {"a"})
    frontier.main()
    (tries, *_), (cells, *_) = asked[2:]
    assert {concept for concept, _ in tries} == {"cat", "dog"} and len(tries) == 2 + 2 * 2
    assert [(concept, what) for concept, what in cells if what] == [
        *(("cat", ("a", "reach=1", seed)) for seed in range(3)),
        *(("dog", ("a", "reach=2", seed)) for seed in range(3)), ("ship", ("a", "reach=1", 0))]


def test_a_class_is_reported_with_what_others_chose():
    ten = list(read_json(MINI / "captions.json")["classes"])
    halves = frontier.folds_of(ten)
    assert sorted(map(len, halves)) == [5, 5] and {*halves[0]} == {*frontier.HALF}
    assert sorted(sum(halves, [])) == sorted(ten)
    assert frontier.folds_of(["airplane", "cat", "dog"]) == [["airplane"], ["cat"], ["dog"]]
    assert frontier.folds_of(list("abcdef")) == [[c] for c in "abcdef"]      # a book of one's own


@pytest.mark.parametrize("row", frontier.ROWS)
def test_every_row_has_six_strengths_or_one_that_its_method_takes(row):
    file, settings, strengths = frontier.ROWS[row]
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    made = {parse_settings(module.Settings, [*settings, *strength.split()]) for strength in strengths}
    one, sweep = row.endswith((", authors'", ", default", "retrained")), row.startswith("noise alignment")
    assert len(made) == len(strengths) == (1 if one else 11 if sweep else 6)
    assert not one or made == {module.Settings()} or row == "ESD-u, authors'"


def test_intervals_draw_classes_and_say_something_at_nothing():
    cells = [(name, {"near": [right, 10]}) for name, right in (("cat", 0), ("dog", 5), ("ship", 10))]

    def near(some):
        return frontier.mean(some, "near")
    value, low, high = frontier.interval([*cells, ("frog", {})], near, "near")
    assert (value, low, high) == (50, 0, 100)
    assert frontier.interval(cells, lambda some: frontier.mean(some, "far")) == "–"
    none = [(name, {"near": [0, 10]}) for name in ("cat", "dog")]
    value, low, high = frontier.interval(none, near, "near")
    assert value == low == 0 and high == pytest.approx(100 * wilson(0, 20)[1], abs=0.01)
    # four edits of a class are one class, not four: as wide as with one edit each
    many = [cell for cell in cells for _ in range(4)]
    assert frontier.interval(many, near) == pytest.approx(frontier.interval(cells, near), abs=2)
    thrice = [*cells, cells[0], cells[0]]                         # a class with three edits counts once
    assert frontier.interval(frontier.alike(thrice), near)[0] == pytest.approx(50)
    assert frontier.interval(thrice, near)[0] == pytest.approx(30)
    # what differs by the same in each class differs for certain
    better = [(name, {"near": [counts["near"][0] + 1, 11]}) for name, counts in cells]
    worse = [(name, {"near": [counts["near"][0], 11]}) for name, counts in cells]
    assert frontier.interval(better, near, less=worse) == pytest.approx([100 / 11] * 3, abs=0.01)


def test_even_where_all_pictures_are_right_an_interval_has_a_width():
    cells = [(name, {"concept": [0, 10], "near": [10, 10], "phrases": [0, 10]}) for name in ("cat", "dog")]
    value, low, high = frontier.interval(cells, frontier.h_near)
    assert value == 100 and 80 < low < 97 and high <= 100


def test_pictures_are_drawn_again_where_no_formula_gives_an_interval():
    """One class, so that nothing but its pictures varies: Wilson's interval, nearly."""
    def near(some):
        return frontier.mean(some, "near")
    value, low, high = frontier.interval([("cat", {"near": [120, 400], "drift": 0.1})], near)
    expected = [100 * x for x in wilson(0.3, 400)]
    assert value == 30 and [low, high] == pytest.approx(expected, abs=0.6)
    # two edits of a class, each with half of the weight, are as many pictures
    halves = frontier.alike([("cat", {"near": [60, 200]}), ("cat", {"near": [60, 200]})])
    value, low, high = frontier.interval(halves, near)
    assert value == 30 and [low, high] == pytest.approx([100 * x for x in wilson(0.3, 200)], abs=3)


def test_a_strength_whose_edit_fails_is_never_the_best(here, small, monkeypatch, capsys):
    monkeypatch.setattr(making.subprocess, "run", finished)
    monkeypatch.setattr(frontier, "ROWS", {"reach": ("realera.py", CLOSED,
                                                     ["lambda2=-1", "reach=2"])})
    here("experiments/frontier.py", "--row", "reach", "--concept", "cat", "dog", *SMALL, "--steps", 1,
         cwd=small)
    assert "warning: erasing cat failed" in capsys.readouterr().err
    table = json.loads((small / "o/frontier-reach.json").read_text())
    assert [row["strength"] for row in table] == ["–", "reach=2"]


def test_the_command_draws_a_table_and_a_curve_and_goes_on(here, small, monkeypatch, capsys):
    monkeypatch.setattr(making.subprocess, "run", finished)
    rows = {"reach": ("realera.py", CLOSED, ["reach=1.25", "reach=4"]),
            "UCE": ("baselines/uce.py", [], ["lamb=0.1"])}
    monkeypatch.setattr(frontier, "ROWS", rows)
    command = ["experiments/frontier.py", "--row", "reach", "UCE", "--concept", "cat", "dog", *SMALL,
               "--steps", 1, "--choose-steps", 1]                 # what the pictures show does not matter
    here(*command, cwd=small)
    printed = capsys.readouterr().out
    names = [f"{name}-reach+UCE" for name in ("tries", "frontier", "cells")]
    tables = [json.loads((small / f"o/{name}.json").read_text()) for name in names]
    assert [(row["row"], row["strength"]) for row in tables[0]] == [
        ("reach", "reach=1.25"), ("reach", "reach=4"), ("UCE", "lamb=0.1")]
    assert [row["row"] for row in tables[1]] == ["untouched", "reach", "UCE"] and "| UCE |" in printed
    assert {(cell["class"], cell["row"]) for cell in tables[2]} == {
        (concept, row) for concept in ("cat", "dog") for row in ("untouched", "reach", "UCE")}
    assert tables[2][-1]["class"] == "dog" and tables[2][-1]["synonyms"].endswith(" of 1")
    cell = next(cell for cell in tables[2] if cell["row"] == "UCE" and cell["class"] == "cat")
    assert cell["command"].startswith("python baselines/uce.py --concept cat --set lamb=0.1 --seed ")
    assert cell["command"].endswith(" --model mini")
    assert cell["other classes, of all"].endswith(" of 2") and "concept, of all" not in cell
    assert ("peak GiB" in tables[1][1]) == (peak_memory() is not None)
    assert "seconds" not in tables[1][0] and all(row["seconds"] > 0 < row["drift"] for row in tables[1][1:])
    assert "peak GiB" not in tables[1][0] and all(row.get("peak GiB", 1) > 0.1 for row in tables[1][1:])
    assert tables[2][0]["command"] == "–" and "commit of this table" in tables[2][0]
    file = next((small / "o/edits").iterdir()) / "erased.safetensors"                # of as many bytes as any
    assert all(row["MB"] == round(file.stat().st_size / 1e6, 2) for row in tables[1][1:])
    drawn = ElementTree.parse(small / "o/frontier-reach+UCE.svg").getroot()
    assert {"reach", "UCE"} <= {element.text for element in drawn.iter()}
    made = sorted(path.name for path in (small / "o/edits").iterdir())
    here(*command, cwd=small)
    assert [json.loads((small / f"o/{name}.json").read_text()) for name in names] == tables
    assert sorted(path.name for path in (small / "o/edits").iterdir()) == made and len(made) == 6
    here("experiments/frontier.py", "--row", "UCE", "--concept", "cat", *command[7:], cwd=small)
    alone = json.loads((small / "o/frontier-UCE.json").read_text())                  # nothing to choose
    assert [(row["row"], row["strength"]) for row in alone] == [("untouched", "–"), ("UCE", "lamb=0.1")]
    assert json.loads((small / "o/cells-UCE.json").read_text()) == [
        cell for cell in tables[2] if cell["class"] == "cat" and cell["row"] != "reach"]


@pytest.mark.parametrize("args, match", [
    (["--concept", "teapot", "cat"], "teapot: this needs a class"),
    (["--concept", "cat"], "two classes or more"), (["--choose-on", "cat"], "two classes or more"),
    (["--choose-on", "teapot", "cat"], "teapot: this needs a class"),
    (["--choose-n", "0"], "--choose_n must be at least 1")])
def test_frontier_refuses_bad_flags(refused, small, args, match):
    refused("experiments/frontier.py", *args, "--book", "book.json", cwd=small, match=match)


def test_a_book_without_words_to_choose_on_is_refused(refused, tmp_path):
    classes = {name: {key: entry[key] for key in ("anchor", "synonyms", "associated")}
               for name, entry in BOOK["classes"].items()}
    (tmp_path / "book.json").write_text(json.dumps({"classes": classes, "scenes": BOOK["scenes"]}))
    refused("experiments/frontier.py", "--book", "book.json", cwd=tmp_path, match="lists stay and choosing")
    use_book(None)
