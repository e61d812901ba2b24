"""eval_clip.py --prompts: a CSV of one's own."""
import csv
import hashlib
import json

import numpy as np
import PIL.Image
import pytest
import torch

from helpers import CLASSES, no_drawing
from plumbing import UserError, own_prompts
from plumbing.book import other_sights
from plumbing.own_prompts import read_prompts
from sample import Model
from starts import run

CSV = """\ufeffprompt,seed,evaluation_seed,class,case
a photo of the cat,3,3.0, cat ,17
"a dog, a cat",,5,dog,18
a photo of the cat,,,cat,"nine, teen"
a photo of the sky,0,,,20
"""


def colored(model, prompts, seeds, *_, **__):
    """In place of Model.draw, where it does not matter what is drawn: plain colors."""
    return torch.stack([torch.full((3, 32, 32), len(prompt) % 7 / 7) for prompt in prompts])


def test_prompts_of_a_csv_are_drawn_with_their_seeds_and_scored(teapot, clip, tmp_path):
    """Also an edit of what is none of the ten classes."""
    (tmp_path / "mine.csv").write_text(CSV, encoding="utf-8")
    run("eval_clip.py", "--prompts", "mine.csv", "--edit", teapot, "--seed", 7, "--steps", 2,
        "--keep-pictures", cwd=tmp_path)
    out = tmp_path / "out/evaluation/teapot-mine"
    metrics = json.loads((out / "metrics.json").read_text())
    for variant in ("untouched", "teapot"):
        rows = json.loads((out / f"pictures-{variant}.json").read_text())
        assert [(row["seed"], row["class"], row["case"]) for row in rows] == [
            (3, "cat", "17"), (5, "dog", "18"), (7, "cat", "nine, teen"), (0, None, "20")]
        assert [row["prompt"] for row in rows] == ["a photo of the cat", "a dog, a cat", "a photo of the cat",
                                                   "a photo of the sky"]
        assert {row["CLIP says"] for row in rows} <= {*CLASSES, *other_sights()}
        assert len(list((out / "pictures" / variant).iterdir())) == 4
        for row in rows:
            name = f"{hashlib.sha256(row['prompt'].encode()).hexdigest()[:16]}-{row['seed']}.png"
            assert row["picture"] == f"pictures/{variant}/{name}"
            picture = np.asarray(PIL.Image.open(out / row["picture"])) / np.float32(255)
            with torch.no_grad():
                seen = clip.image_features(clip.preprocess(torch.from_numpy(picture).permute(2, 0, 1)[None]))
                said = clip.text_features(clip.tokenizer([row["prompt"]]))
            assert row["CLIP score"] == pytest.approx(100 * (seen @ said.T).item(), abs=0.5)
        with open(out / f"pictures-{variant}.csv", newline="") as file:
            again = list(csv.DictReader(file))
        assert [row["case"] for row in again] == ["17", "18", "nine, teen", "20"] and again[3]["class"] == ""
        groups = [row for row in metrics if row["variant"] == variant]
        assert [(row["class"], row["pictures"]) for row in groups] == [("cat", 2), ("dog", 1), ("all", 4)]
        for group in groups:
            value, low, high = group["CLIP score"]
            assert -100 <= low <= value <= high <= 100
            some = [row for row in rows if group["class"] in (row["class"], "all")]
            assert value == pytest.approx(sum(row["CLIP score"] for row in some) / len(some), abs=0.01)
            if group["class"] != "all":
                right = sum(row["CLIP says"] == row["class"] for row in some)
                assert group["top-1"][0] == round(100 * right / len(some), 2)
                assert 0 <= group["top-1"][1] <= group["top-1"][0] <= group["top-1"][2] <= 100
    assert "top-1" not in metrics[2] and len(metrics) == 6
    assert metrics[2]["CLIP score"] != metrics[5]["CLIP score"]
    assert (out / "grid.png").exists()


def test_a_csv_without_classes_gets_scores_only_and_may_repeat_a_prompt(here, tmp_path):
    (tmp_path / "mine.csv").write_text("prompt,seed\na photo of the cat,1\na kite,1\na photo of the cat,1\n")
    here("eval_clip.py", "--prompts", "mine.csv", "--steps", 1, "--out", "o", cwd=tmp_path)
    rows = json.loads((tmp_path / "o/pictures-untouched.json").read_text())
    assert [row["prompt"] for row in rows] == ["a photo of the cat", "a kite", "a photo of the cat"]
    assert rows[0]["CLIP score"] == rows[2]["CLIP score"] != rows[1]["CLIP score"]
    assert not any("CLIP says" in row or "picture" in row for row in rows)
    metrics, = json.loads((tmp_path / "o/metrics.json").read_text())
    assert (metrics["class"], metrics["pictures"]) == ("all", 3) and "top-1" not in metrics
    assert not (tmp_path / "o/pictures").exists()


def test_the_class_may_stand_in_a_column_named_concept(tmp_path):
    (tmp_path / "mine.csv").write_text("concept,prompt\ncat,a cat\n,a dog\n")
    assert [row["class"] for row in read_prompts(tmp_path / "mine.csv", 0)] == ["cat", None]


@pytest.mark.parametrize("content, match", [
    (None, "no such file"), ("", "column 'prompt'"), ("prompt\n", "and a row"),
    ("text,seed\na cat,1\n", "column 'prompt'.*text, seed"),
    ("seed,prompt\n3\n", "line 2.*prompt is empty"),
    ('prompt,seed\n"a\n\ncat",1\n\na dog,x\n', "line 6.*'x'"), ("prompt,seed\na cat,3016.5\n", "'3016.5'"),
    ("prompt,seed,sd_seed\na cat,1,1\na cat,1,2\n", "line 3.*seed.*'1' and '2'"),
    ("prompt,seed\na cat,nan\n", "line 2.*'nan'"), ("prompt,noise_seed\na cat,1\n", "'noise_seed'"),
    ('prompt,seed\n"a cat,1\na dog,2\na bird,3\n', "line 2.*quote"),
    ('prompt,seed\n"a cat,1\na dog,2\n"a bird",3\n', "line 2.*quote"),
    ("prompt, Prompt\na cat,a dog\n", "two columns 'prompt'"),
    ("prompt,CLIP score\na cat,1\n", "'clip score'"),
    ("prompt,seed\na cat,one\n", "line 2.*'one'"), ("prompt,seed\na cat,1\na cat,-4\n", "line 3.*negative"),
    ("prompt,seed\na cat,99999999999999999999\n", "seed"), (b"prompt\n\xff\xfe\n", "UTF-8"),
    ("prompt\na dog, a cat\n", "line 2.*(quot|comma|column)"), ("folder", "mine.csv")])
def test_a_bad_csv_is_refused(refused, tmp_path, monkeypatch, content, match):
    if content == "folder":
        (tmp_path / "mine.csv").mkdir()
    elif content is not None:
        (tmp_path / "mine.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(Model, "draw", no_drawing)
    refused("eval_clip.py", "--prompts", "mine.csv", cwd=tmp_path, match=match)


# ---- columns as people name them ----

@pytest.mark.parametrize("header", ["evaluation_seed", " Evaluation_Seed", "evaluation_seed\\", "sd_seed",
                                    "\ufeffSEED ", "evaluation\\_seed"])
def test_a_seed_is_found_however_its_column_is_spelled(tmp_path, header):
    (tmp_path / "mine.csv").write_text(f"{header},prompt\n3016.0,a cat\n,a dog\n", encoding="utf-8")
    assert [row["seed"] for row in read_prompts(tmp_path / "mine.csv", 7)] == [3016, 7]


def test_an_empty_prompt_is_drawn_and_what_is_not_used_is_named_once(tmp_path, capsys):
    (tmp_path / "mine.csv").write_text('case,prompt,sd_guidance_scale,sd_image_width,class\n0,"a\nship",9,32,'
                                       '\n1,,7,32,\n\n2,  ,7,48, Cat\n')
    rows = read_prompts(tmp_path / "mine.csv", 0)
    assert [(row["prompt"], row["class"]) for row in rows] == [("a\nship", None), ("", None), ("", "cat")]
    unused, empty = sorted(capsys.readouterr().err.splitlines(), key=lambda line: "empty prompt" in line)
    assert "not used: case, sd_guidance_scale, sd_image_width; guidance and size are the model's" in unused
    assert "line 4, 6: an empty prompt is drawn" in empty


def test_columns_of_groups_are_lines_of_the_table(here, tmp_path, monkeypatch):
    (tmp_path / "mine.csv").write_text(
        "prompt,Type,mood,seed\na photo of the cat,erased,calm,0\na kite,others,calm,0\na dog,others,,0\n")
    monkeypatch.setattr(Model, "draw", colored)
    here("eval_clip.py", "--prompts", "mine.csv", "--steps", 1, "--group", "Mood", "--out", "o", cwd=tmp_path)
    rows = json.loads((tmp_path / "o/metrics.json").read_text())
    scores = [row["CLIP score"] for row in json.loads((tmp_path / "o/pictures-untouched.json").read_text())]
    parts = {"mood: calm": [0, 1], "type: erased": [0], "type: others": [1, 2]}
    assert [(row.get("group"), row["pictures"]) for row in rows] == [
        *((name, len(some)) for name, some in parts.items()), (None, 3)]
    for row, some in zip(rows, [*parts.values(), range(3)]):
        assert row["CLIP score"][0] == pytest.approx(sum(scores[i] for i in some) / len(some), abs=0.01)
    assert rows[-1]["class"] == "all"


def test_a_group_must_be_a_column_and_needs_a_csv(refused, edit, tmp_path):
    (tmp_path / "mine.csv").write_text("prompt,mood\na cat,calm\n")
    refused("eval_clip.py", "--prompts", "mine.csv", "--group", "type", cwd=tmp_path, match="column 'type'")
    refused("eval_clip.py", "--edit", edit, "--group", "type", cwd=tmp_path, match="--prompts.*--group")


# ---- what CLIP chooses among ----

def test_one_class_is_chosen_among_others_so_that_it_can_be_missed(here, tmp_path, monkeypatch):
    (tmp_path / "mine.csv").write_text("prompt,seed,class\na photo of the cat,0, Cat \nthe cat,1,cat\n")
    monkeypatch.setattr(Model, "draw", colored)
    here("eval_clip.py", "--prompts", "mine.csv", "--steps", 1, "--out", "o", cwd=tmp_path)
    rows = json.loads((tmp_path / "o/metrics.json").read_text())
    said = [row["CLIP says"] for row in json.loads((tmp_path / "o/pictures-untouched.json").read_text())]
    assert [(row["class"], row["pictures"]) for row in rows] == [("cat", 2), ("all", 2)]
    assert rows[0]["top-1"][0] == 50 * said.count("cat") < 100    # plain colors are no cats


def test_choices_are_the_book_or_named_and_hold_no_synonym_of_a_class():
    rows = [{"class": "aircraft"}, {"class": "cat"}, {"class": None}]
    expected = {"aircraft", *CLASSES, *other_sights()} - {"airplane"}
    assert set(own_prompts.names_among(rows, None)) == expected
    assert own_prompts.names_among(rows, " Sky,cat,,") == ["aircraft", "cat", "sky"]
    assert own_prompts.names_among([{"class": None}], None) == []
    for one, others in (([{"class": "cat"}], "cat, Cat"), ([{"class": None}], "cat,dog")):
        with pytest.raises(UserError, match="--choose-from"):
            own_prompts.names_among(one, others)
