"""report.html: what it says, what it advises, and that nothing a user types becomes HTML."""
import html.parser
import json
import sys
from pathlib import Path

import pytest
import torch

from helpers import AIRPLANE, CLOSED
from plumbing import report
from plumbing.training import descend


class Page(html.parser.HTMLParser):
    """The tags of a page, and its text by section title."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.sections, self.open, self.head = [], {}, [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self.head = data
        self.sections[self.head] = self.sections.get(self.head, "") + data


def read(path):
    return Page(path.read_text(encoding="utf-8"))


ODD = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def written(here, tmp_path_factory):
    """The page of an edit whose concept is HTML."""
    folder = tmp_path_factory.mktemp("odd")
    here("realera.py", "--concept", ODD, "--anchor", "a & b", *CLOSED, "--set", "M=2", "N=1", "reach=4",
         "--out", "odd", cwd=folder)
    return folder / "odd"


def test_what_a_user_types_is_text(written):
    page = read(written / "report.html")
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags and {"table", "svg", "pre"} <= tags
    assert f"{ODD} → a & b, RealEra" in page.sections[""]
    assert f"'{ODD}'" in page.sections["What to try next"]        # quoted for the shell, too
    policy = next(attrs for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy["content"] and "script-src" not in policy["content"]
    assert not [attrs for _, attrs in page.tags if {"src", "onclick", "onload"} & attrs.keys()]


def test_it_has_every_setting_and_number_of_run_json(written):
    page, said = read(written / "report.html"), json.loads((written / "run.json").read_text("utf-8"))
    assert all(name in page.sections["Settings"] for name in said["settings"])
    assert all(name in page.sections["Numbers"] and f"{value:.4g}" in page.sections["Numbers"]
               for name, value in said["numbers"].items())
    assert "Losses" not in page.sections and "Before and after, from the same noise" not in page.sections
    assert "singular values of Δ" in page.sections["The edit itself, Δ"]


def test_pictures_and_the_curve_of_a_training_are_there(here, tmp_path, model, monkeypatch):
    model.defaults["steps"] = 1
    monkeypatch.setattr("erasing.Model", lambda *args, **kwargs: model)
    here("realera.py", *AIRPLANE, "--n", 1, "--lora-steps", 3, "--set", "trajectories=2", "batch=1", "--out",
         "a", cwd=tmp_path)
    page, said = read(tmp_path / "a/report.html"), json.loads((tmp_path / "a/run.json").read_text("utf-8"))
    assert "a photo of the airplane" in page.sections["Before and after, from the same noise"]
    assert sum(tag == "image" for tag, _ in page.tags) == 2 * len(said["table"]) + 1      # and Δ
    assert said["curves"]["noise alignment"]["each"] == 1
    assert len(said["curves"]["noise alignment"]["means"]) == 3
    assert "Eq. 8" in page.sections["Losses"] and "noise alignment" in page.sections["Losses"]


def test_a_training_leaves_its_curve_with_the_command_that_runs_alone():
    x = torch.ones((), requires_grad=True)
    kept = {}
    with report.recorded(kept):
        for _ in range(2):
            losses = descend([x], lambda step: x * step, 120, torch.optim.SGD([x], 0.0), "learning")
    descend([x], lambda step: x * step, 2, torch.optim.SGD([x], 0.0), "learning")
    assert [*kept["curves"]] == ["learning", "learning 2"]        # MACE trains once for each concept
    curve = kept["curves"]["learning"]
    assert curve["each"] == 3 and len(curve["means"]) == 40
    assert curve["means"][0] == sum(losses[:3]) / 3 == 2 and curve["means"][-1] == sum(losses[-3:]) / 3


def said(**changes):
    return {"method": "RealEra", "concepts": ["cat"], "anchors": ["ground"], "shares": {}, "numbers": {},
            "settings": {"M": 100, "lambda1": 1.0, "lambda2": 0.01, "reach": 1.0, "lr": 1e-5}} | changes


LARGER = {"ridge": "lambda2", "stay": "lambda1"}
ROW = {"prompt": "a photo of the cat", "wanted": "cat", "before": {"right": 4}, "after": {"right": 3}}


@pytest.mark.parametrize("changes, line", [
    ({"numbers": {"median drift of unrelated prompts": 0.3}}, "--set lambda1=10 --out out/cat-lambda1-10"),
    ({"numbers": {"cond(B)": 1e11}}, "--set lambda2=0.1 "),
    ({"shares": {"cat → ground": {"kitty": 0.2, "dog": 0.0}}}, "--set reach=2 "),
    ({"shares": {"cat → ground": {"kitty": 0.2}}, "settings": {"M": 0, "reach": 1.0}}, "--set M=100 "),
    ({"shares": {"cat → ground": {"kitty": 0.2}}, "settings": {"reach": 3, "threshold": 0.9}}, "ld=0.8 "),
    ({"shares": {"cat → ground": {"kitty": 0.9, "dog": 0.7}}}, "vocabulary.py --concept cat --keep dog"),
    ({"table": [ROW]}, "--set reach=2 "),
    ({"table": [ROW | {"wanted": "dog", "after": {"right": 1}}]}, "--set lambda1=10 "),
    ({"curves": {"learning": {"each": 1, "means": [1.0] * 20}}}, "--set lr=3e-05 ")])
def test_advice_follows_from_the_numbers_and_is_a_command(changes, line, monkeypatch):
    typed = ["/far/realera.py", "--concept", "cat", "--out", "out/cat", "--overwrite"]
    monkeypatch.setattr(sys, "argv", typed)
    plain, found = (report.advice(one, LARGER, Path("out/cat")) for one in (said(), said(**changes)))
    assert [command for _, command in plain] == ["python eval_clip.py --edit out/cat",
                                                 "python experiments/attack.py --edit out/cat"]
    (why, command), *rest = found
    assert f"{line}" in f"{command} " and len(rest) == 2 and why
    assert command.startswith("python ") and "--overwrite" not in command and "--out out/cat " not in command


def test_advice_does_not_say_where_things_lie_on_this_machine(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/far/realera.py", "--concept", "cat", "--model", "/home/me/sd",
                                      "--book=/home/me/book.json", "--out", "/home/me/out/cat"])
    found = report.advice(said(numbers={"cond(B)": 1e11}), LARGER, Path("/home/me/out/cat"))
    assert found[0][1] == ("python realera.py --concept cat --model sd --book=book.json --set lambda2=0.1 "
                           "--out cat-lambda2-0.1")
    assert not any("/home" in line for _, line in found) and len(found) == 3
    found = report.advice(said(model="CompVis/stable-diffusion-v1-4"), LARGER, Path("out/cat"))
    assert [line for _, line in found] == [
        f"python {program}.py --edit out/cat --model CompVis/stable-diffusion-v1-4"
        for program in ("eval_clip", "experiments/attack")]


def test_data_in_a_script_cannot_end_it():
    text = report.as_data({"a": "</script><!--", "b": [1, 0.5]})
    assert "<" not in text and json.loads(text) == {"a": "</script><!--", "b": [1, 0.5]}
    made = report.page("1 < 2", f"<p>{text}</p><!--title-->", script=True)
    assert "<title>1 &lt; 2</title>" in made and "script-src 'unsafe-inline'" in made and text in made
    assert made.count("1 &lt; 2") == 1                            # a mark in the body is no mark
