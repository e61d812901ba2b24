"""eval_clip.py --prompts: a CSV of one's own."""
import csv
import hashlib
import json

import numpy as np
import PIL.Image
import pytest
import torch

from helpers import no_drawing, run
from plumbing.own_prompts import read_prompts
from sample import Model

CSV = """\ufeffprompt,seed,evaluation_seed,class,case
a photo of the cat,3,9,cat,17
"a dog, a cat",,5,dog,18
a photo of the cat,,,cat,"nine, teen"
a photo of the sky,0,,,20
"""


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
        assert {row["CLIP says"] for row in rows} <= {"cat", "dog"}
        assert len(list((out / "pictures" / variant).iterdir())) == 4
        for row in rows:
            name = f"{hashlib.sha256(row['prompt'].encode()).hexdigest()[:16]}-{row['seed']}.png"
            picture = np.asarray(PIL.Image.open(out / "pictures" / variant / name)) / np.float32(255)
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
    assert not any("CLIP says" in row for row in rows)
    metrics, = json.loads((tmp_path / "o/metrics.json").read_text())
    assert (metrics["class"], metrics["pictures"]) == ("all", 3) and "top-1" not in metrics
    assert not (tmp_path / "o/pictures").exists()


def test_the_class_may_stand_in_a_column_named_concept(tmp_path):
    (tmp_path / "mine.csv").write_text("concept,prompt\ncat,a cat\n,a dog\n")
    assert [row["class"] for row in read_prompts(tmp_path / "mine.csv", 0)] == ["cat", None]


@pytest.mark.parametrize("content, match", [
    (None, "no such file"), ("", "column 'prompt'"), ("prompt\n", "and a row"),
    ("text,seed\na cat,1\n", "column 'prompt'.*text, seed"),
    ('prompt,seed\n"",1\n', "line 2.*prompt is empty"), ("seed,prompt\n3\n", "line 2.*prompt is empty"),
    ("prompt,seed\na cat,1\n  ,3\n", "line 3.*prompt is empty"),
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
