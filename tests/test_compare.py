"""Methods × attacks: each method's edit, and the plot."""
import json
import re
from xml.etree import ElementTree

import pytest

import starts
from experiments import compare
from helpers import MINI
from plumbing import making
from plumbing.edits import about_edit, base_hash, cross_attention, read_edit
from plumbing.stats import write_tables
from plumbing.svg import page


def test_the_plot_puts_each_method_at_what_is_lost_and_what_comes_back():
    rows = [{"method": "a", "Acc_s": [100, 90, 100], "prefix": [0, 0, 5], "tokens": [100, 90, 100]},
            {"method": "b", "Acc_s": [80, 70, 90], "prefix": [50, 40, 60], "tokens": [25, 10, 40]}]
    drawing = ElementTree.fromstring(page(compare.plot(rows, ["prefix", "tokens"])))
    svg = "{http://www.w3.org/2000/svg}"
    marks = [path.get("transform") for path in drawing.iter(f"{svg}path") if path.get("transform")]
    spots = [tuple(map(float, re.findall(r"[\d.]+", mark))) for mark in marks]
    a, b = spots[0], spots[2]                                     # behind each stands its mark in the legend
    words = {(t.text, t.get("text-anchor")): (float(t.get("x")), float(t.get("y")))
             for t in drawing.iter(f"{svg}text")}
    assert {("a", "start"), ("b", "start")} <= words.keys()
    right = {x: words[str(x), "middle"][0] for x in (0, 20)}      # of the ticks
    up = {y: words[str(y), "end"][1] - 4 for y in (0, 100)}
    assert a == (right[0], up[100])                               # nothing lost, all back
    assert b == (right[20], pytest.approx((up[0] + up[100]) / 2, abs=0.1))           # 20 % lost, half back


@pytest.mark.parametrize("program, flag", [
    ("compare", "--choose"), ("compare", "--budget"), ("lora_rank", "--n"), ("lora_rank", "--steps"),
    ("preview_worth", "--n"), ("preview_worth", "--classes")])
def test_numbers_below_1_are_refused(refused, tmp_path, program, flag):
    refused(f"experiments/{program}.py", flag, 0, cwd=tmp_path, match=f"{flag} must be at least 1")


def test_every_method_is_made_by_its_own_script_and_only_once(tmp_path, monkeypatch):
    """By the programs themselves; only RealEra's training is cut short."""
    short = ["lora_steps=1", "trajectories=2", "batch=1"]
    monkeypatch.setitem(compare.METHODS, "RealEra", ("realera.py", short))
    recipes = [compare.recipe_of(method, "cat") for method in compare.METHODS]
    base = base_hash(cross_attention(MINI))
    monkeypatch.setattr(making.subprocess, "run", starts.finished)
    making.make_edits(recipes, tmp_path, base, str(MINI), "cpu")
    monkeypatch.setattr(making.subprocess, "run", lambda *_, **__: pytest.fail("an edit is made again"))
    making.make_edits(recipes, tmp_path, base, str(MINI), "cpu")
    folders = [one.folder(tmp_path, base) for one in recipes]
    assert set(folders) == {*(tmp_path / "edits").iterdir()} and len(set(folders)) == 4
    closed, trained, rece, both = map(about_edit, folders)
    assert [one["method"] for one in (closed, trained, rece, both)] == ["RealEra"] * 2 + ["RECE"] * 2
    assert (closed["settings"]["lora_steps"], trained["settings"]["lora_steps"]) == (0, 1)
    assert all(one["settings"]["rounds"] == 1 and one["settings"]["real_prompts"] for one in (rece, both))
    assert rece["start"] is None and both["start"] == trained
    assert all(read_edit(folder, MINI).keys() == cross_attention(MINI).keys() for folder in folders)


def test_an_attack_without_candidates_has_no_column(here, narrow, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "METHODS", {"closed form": compare.METHODS["closed form"]})
    monkeypatch.setattr(making.subprocess, "run", starts.finished)
    here("experiments/compare.py", "--attack", "emoji", "--concept", "cat", "ship", "--n", 1,
         "--keep-pictures", "--model", narrow, cwd=tmp_path)
    [row] = json.loads((tmp_path / "out/tables/robustness.json").read_text())
    assert "plain" in row and "emoji" not in row                  # mini has none
    kept = tmp_path / "out/tables/pictures/closed-form/cat"
    assert len([*kept.glob("*.png")]) == 1 + 9 + 3 + 4            # concept, others, synonyms, phrases


def test_the_rows_of_a_frontier_are_attacked_at_the_strengths_chosen_there(here, refused, narrow, tmp_path,
                                                                           monkeypatch):
    cells = [{"class": "cat", "row": row, "strength": strength, "seed of the edit": 0, "concept": "0 of 1"}
             for row, strength in (("untouched", "–"), ("reach", "reach=2"), ("Surgery", "beta=-0.03"))]
    cells += [cells[1] | {"seed of the edit": 1, "strength": "reach=4"}, cells[1] | {"class": "ship"},
              cells[2] | {"class": "ship", "concept": ""}]        # an edit that failed
    write_tables(tmp_path, "cells", cells)                        # as frontier.py does
    monkeypatch.setattr(making.subprocess, "run", starts.finished)
    command = ["experiments/compare.py", "--cells", "cells.csv", "--n", 1, "--choose", 1, "--model", narrow]
    here(*command, "--attack", "phrases", "embedding", "--concept", "cat", cwd=tmp_path)
    reach, surgery = json.loads((tmp_path / "robustness.json").read_text())
    assert (reach["method"], surgery["method"]) == ("reach", "Surgery")
    assert "embedding" in reach and "embedding" not in surgery and "phrases" in surgery
    about = [about_edit(folder) for folder in (tmp_path / "edits").iterdir()]
    assert sorted(one["settings"].get("reach", one["settings"].get("beta")) for one in about) == [-0.03, 2]
    refused(*command, "--concept", "cat", "ship", cwd=tmp_path, match="no Surgery of ship")
    refused(*command, "--concept", "dog", cwd=tmp_path, match="no row of dog")
    (tmp_path / "other.csv").write_text("row,class\nreach,cat\n")
    refused(*command, "--cells", "other.csv", cwd=tmp_path, match="not the cells.csv that")
