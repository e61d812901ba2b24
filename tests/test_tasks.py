"""The paper's other tasks: what is asked, how it is counted, a second way, and the program as typed."""
import csv
import json
import types

import pytest
import torch

from experiments import tasks
from helpers import MINI
from plumbing import making
from plumbing.book import use_book
from plumbing.stats import write_tables
from starts import ROOT, finished

CELLS = [{"class": c, "row": row, "strength": strength, "seed of the edit": 0, "concept": "0 of 1"}
         for c, row, strength in (("cat", "untouched", "–"), ("cat", "closed form", "lambda1=3"),
                                  ("dog", "closed form", "lambda1=10"), ("ship", "closed form", "lambda1=10"),
                                  ("cat", "Surgery", "beta=-0.24"), ("cat", "FMN, authors'", ""))]


@pytest.fixture
def characters():
    use_book(ROOT / "mini/characters.json")
    yield
    use_book(None)


def test_what_is_asked_of_characters(characters):
    groups = tasks.asked("characters", "ghost")
    assert groups["concept"] == [("ghost", "a photo of the ghost")]
    assert groups["phrases"] == [("ghost", "haunts the old mansion")]
    assert len(groups["others"]) == 21 and ("robot", "a photo of the robot") in groups["others"]
    assert ("cat", "a photo of the cat") in groups["classes"] and len(groups["classes"]) == 10
    things, styles = tasks.choices("characters")
    wanted = {name for some in groups.values() for name, _ in some}
    assert wanted <= {*things.values()} and not styles            # each can be seen


def test_what_is_asked_of_styles_and_weapons():
    groups = tasks.asked("styles", "fluent")
    assert groups["concept"] == [("fluent", "an artwork by fluent")]
    assert [name for name, _ in groups["phrases"]] == ["fluent"] * 3
    assert [prompt for _, prompt in groups["things"]] == [prompt for _, prompt in groups["phrases"]]
    assert {name for name, _ in groups["things"]} < {*tasks.choices("styles")[0].values()}
    assert len(groups["others"]) == 6 * 4 and "fluent" not in {name for name, _ in groups["others"]}
    assert {name for name, _ in groups["others"]} < {*tasks.choices("styles")[1].values()}
    groups, things = tasks.asked("weapons", "weapon"), tasks.choices("weapons")[0]
    assert [len(some) for some in groups.values()] == [1, 8, 7, 10]
    for _, prompt in groups["phrases"]:
        assert things[prompt] == "weapon"                         # its own name counts as one
    assert {name for name, _ in groups["others"]} < {*things.values()} - {"weapon"}


def test_strengths_are_what_most_classes_have(tmp_path):
    write_tables(tmp_path, "cells", CELLS)
    found = tasks.strengths(tmp_path / "cells.csv", ["closed form", "Surgery"])
    assert found == {"closed form": "lambda1=10", "Surgery": "beta=-0.24"}
    recipe = tasks.method_recipe("styles", "fluent", ("closed form", "lambda1=10"), 0)
    assert "--task style" in " ".join(recipe.flags) and "an artwork" in recipe.flags
    recipe = tasks.method_recipe("weapons", "weapon", ("closed form", "lambda1=10"), 0)
    assert "flower" in recipe.flags and "lambda1=10" in recipe.flags
    assert "" in tasks.method_recipe("weapons", "weapon", ("SPM", "lr=0.01"), 0).flags       # has no anchor


def test_shares_are_of_what_was_right_before(monkeypatch):
    """Made-up sights in place of pictures; each share counted by hand."""
    generator, seen_by = torch.Generator().manual_seed(0), [{}, {}]
    things = list(dict.fromkeys(tasks.choices("weapons")[0]))

    class Clip:
        tokenizer = staticmethod(lambda prompts: torch.arange(len(prompts)))
        text_features = staticmethod(lambda ids: torch.eye(len(things))[ids])
        logit_scale = torch.zeros(())

    def evaluate(model, clip, jobs, *_, **__):
        for prompt, seed in jobs:                                 # the thing itself, or an apple
            right = torch.randint(2, (), generator=generator).item() and prompt in things
            seen_by[model][prompt, seed] = prompt if right else "a photo of the apple"
        return {job: torch.eye(len(things))[things.index(seen)] for job, seen in seen_by[model].items()}

    monkeypatch.setattr(tasks, "each", lambda *_: ((i, Clip, None) for i in range(2)))
    monkeypatch.setattr(tasks, "evaluate", evaluate)
    args = types.SimpleNamespace(task="weapons", out=MINI, n=9, seed=5, steps=1, batch=None)
    cells = [("weapon", None), ("weapon", ("closed form", "lambda1=10"))]
    before, after = tasks.measure(cells, args)
    with open(ROOT / "mini/weapons.csv", encoding="utf-8") as file:
        members = {row["prompt"] for row in csv.DictReader(file) if row["type"] == "member"}
    for found, seen in ((before, seen_by[0]), (after, seen_by[1])):
        assert found["phrases"] == [sum(seen[p, seed] == p for p in members for seed in (5, 6)), 16]
        assert found["concept"] == [0, 9]                         # the umbrella word was an apple each time
    others = [prompt for _, prompt in tasks.asked("weapons", "weapon")["others"]]
    right = [job for job in ((p, seed) for p in others for seed in (5, 6)) if seen_by[0][job] == job[0]]
    assert before["others"] == [len(right), 14]
    assert after["others"] == [sum(seen_by[1][job] == job[0] for job in right), len(right)]
    assert 0 < after["others"][0] < len(right)
    value = tasks.h_o([after])
    shares = [1, after["others"][0] / len(right), 1 - after["phrases"][0] / 16]
    assert value == pytest.approx(3 / sum(1 / share for share in shares))


@pytest.mark.parametrize("task, concept", [("characters", "ghost"), ("styles", "fluent"),
                                           ("weapons", "weapon")])
def test_the_program(here, narrow, tmp_path, monkeypatch, task, concept):
    write_tables(tmp_path, "cells", CELLS)
    monkeypatch.setattr(making.subprocess, "run", finished)
    here("experiments/tasks.py", "--task", task, "--concept", concept, "--cells", "cells.csv", "--n", 1,
         "--steps", 1, "--model", narrow, cwd=tmp_path)
    use_book(None)
    table = json.loads((tmp_path / f"out/tasks/{task}.json").read_text("utf-8"))
    assert [row["row"] for row in table] == ["untouched", "closed form", "Surgery"]
    assert table[1]["strength"] == "lambda1=10" and "H_o − closed form" not in table[2]      # of one concept
    cells = json.loads((tmp_path / f"out/tasks/{task}-cells.json").read_text("utf-8"))
    assert "realera.py" in cells[1]["command"] and "lambda1=10" in cells[1]["command"]


def test_what_is_not_there_is_one_line(refused, tmp_path):
    write_tables(tmp_path, "cells", CELLS)
    refused("experiments/tasks.py", "--task", "styles", "--concept", "van gogh", cwd=tmp_path,
            match="van gogh is none of the styles: noto, ")
    refused("experiments/tasks.py", "--task", "weapons", "--cells", "cells.csv", "--row", "MACE",
            cwd=tmp_path, match="has no row MACE")
