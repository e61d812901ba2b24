"""Edits side by side in sample.py and eval_clip.py, edits from elsewhere, a book of one's own.

Nothing here rests on what mini/ draws, so its weights may change.
"""
import json
import re
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval_clip
from erasing import make_pairs
from helpers import MINI, SIZE, UNET
from plumbing import UserError
from plumbing.book import BOOK, book, use_book
from plumbing.edits import about_edit, cross_attention, edit_labels, erased_by, read_edit
from plumbing.formats import export_pipeline
from plumbing.pictures import pixels
from plumbing.prompts import anchor_of, row_prompts
from sample import Model, Text, draw_each

MODEL = ["--model", "narrow"]
FEW = [*MODEL, "--n", 2, "--steps", 1]
ONE = [*MODEL, "--n", 1, "--steps", 1]
PIZZA = {"classes": {"pizza": {"anchor": "plate", "synonyms": ["margherita", "calzone"],
                               "associated": ["a slice in a box"]},
                     "soup": {"anchor": "bowl", "synonyms": ["broth"], "associated": []}},
         "scenes": ["table"]}


@pytest.fixture(autouse=True)
def minis_own_book():
    yield
    use_book(None)


@pytest.fixture(scope="module")
def work(here, narrow, tmp_path_factory):
    """Two edits of one class by two methods, and what somebody else might have made of the first."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "narrow").symlink_to(narrow)
    here("realera.py", "--concept", "dog", "--lora-steps", 0, "--n", 1, *MODEL, cwd=folder)
    here("baselines/uce.py", "--concept", "dog", "--no-pictures", *MODEL, cwd=folder)
    W = load_file(folder / "out/dog/erased.safetensors")
    save_file(load_file(narrow / UNET) | W, folder / "whole.safetensors")
    save_file(W, folder / "part.safetensors", {"format": "pt", "edit": "by hand"})
    export_pipeline(folder / "pipeline", narrow, W, {})
    return folder


def drawn_by(model, edit, prompts, steps=1, n=2):
    model.put(read_edit(edit, model.folder) if edit else {})
    return model.draw([p for p in prompts for _ in range(n)], [*range(n)] * len(prompts), steps)


def grey(model, prompts, *_, **__):
    """In place of Model.draw, where it does not matter what is drawn."""
    return torch.full((len(prompts), 3, 32, 32), 0.5)


# ---- sample.py ----

def test_sample_draws_the_untouched_model_and_each_edit_from_the_same_noise(here, work, capsys):
    prompts = ["a photo of the dog", "barking at the postman"]
    two = ["--edit", "out/dog", "--edit", "out/dog-uce"]
    here("sample.py", *prompts, *two, *FEW, "--out", "sheet.png", cwd=work)
    sheet, model = PIL.Image.open(work / "sheet.png"), Model(work / "narrow")
    side, zoom = (sheet.width - 2) // 6 - 2, max(1, 96 // SIZE)
    cells = [[np.asarray(sheet)[2 + i * (side + 2):, 2 + j * (side + 2):][:side:zoom, :side:zoom]
              for j in range(6)] for i in range(2)]
    assert side == zoom * SIZE
    for k, edit in enumerate((None, work / "out/dog", work / "out/dog-uce")):
        for i, picture in enumerate(pixels(drawn_by(model, edit, prompts))):
            cell = cells[i // 2][2 * k + i % 2]
            assert np.abs(cell.astype(int) - picture).max() <= 1      # another batch: the last bit
    different = [(cells[0][0], cells[0][2]), (cells[0][2], cells[0][4]), (cells[0][0], cells[1][0])]
    assert all(np.abs(a.astype(int) - b).max() > 1 for a, b in different)
    said = {key: json.loads(value) for key, value in sheet.text.items() if key != "model"}
    assert said["prompt"] == prompts and said["columns"] == ["untouched", "dog", "dog-uce"]
    assert said["seed"] == [0, 1] and said["edit"] == ["dog", "dog-uce"]
    assert sheet.text["model"] == "narrow" and str(work) not in (work / "sheet.svg").read_text("utf-8")
    assert said["settings"]["steps"] == 1 and said["settings"]["sampler"] == "ddim"
    text = (work / "sheet.svg").read_text(encoding="utf-8")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    assert [word for word in words if word in said["columns"]] == said["columns"]
    assert text.count("<image ") == 12 and "seeds 0–1, 1 steps of ddim" in " ".join(words)
    assert capsys.readouterr().out.count("\n") == 2


def test_sample_overwrites_neither_png_nor_svg(refused, tmp_path):
    (tmp_path / "mine.svg").write_text("precious")
    refused("sample.py", "x", "--out", "mine.png", cwd=tmp_path, match="mine.svg exists")
    refused("sample.py", "x", "--out", "other.svg", cwd=tmp_path, match="names the PNG")


def test_draw_each_leaves_the_edit_that_a_model_wears(work):
    model = Model(work / "narrow")
    W = read_edit(work / "out/dog", model.folder)
    model.put(W)
    drawn = draw_each(model, ["a photo of the dog"], {"untouched": {}, "dog": W}, [3], steps=1)
    assert model.worn is W and (drawn["untouched"] - drawn["dog"]).abs().max() > 1e-3
    assert drawn["dog"].shape == (1, 1, 3, SIZE, SIZE)
    assert (model.draw("a photo of the dog", [3], steps=1) - drawn["dog"][0]).abs().max() <= 1e-5


def test_labels_are_as_short_as_they_can_be():
    assert edit_labels(["out/a", "out/b/", "x.safetensors", "c/erased.safetensors"]) == ["a", "b", "x", "c"]
    assert edit_labels(["one/dog", "two/dog"]) == ["one-dog", "two-dog"]
    assert edit_labels(["out/untouched"]) == ["out-untouched"] and edit_labels([]) == []
    with pytest.raises(UserError, match="out/a is given twice"):
        edit_labels(["out/a", "b", "out/a"])


# ---- eval_clip.py ----

def test_compared_edits_share_a_table_and_nothing_is_drawn_twice(here, work, monkeypatch, capsys):
    asked, draw = [], Model.draw

    def counted(model, prompts, *args, **more):
        asked.append(len(prompts))
        return draw(model, prompts, *args, **more)

    monkeypatch.setattr(Model, "draw", counted)
    pictures = sum(map(len, row_prompts("dog", "object", range(1)).values()))
    spent = []
    for edits in (["out/dog"], ["out/dog", "out/dog-uce"], ["out/dog", "out/dog-uce"]):
        asked.clear()
        here("eval_clip.py", *(x for edit in edits for x in ("--edit", edit)), *ONE, cwd=work)
        spent.append(sum(asked) - 8 * (1 + len(edits)))       # but for the grid
    assert spent == [2 * pictures, pictures, 0]
    assert capsys.readouterr().out.count(f"{pictures} of {pictures} pictures are known") == 2
    out = work / "out/evaluation/dog+dog-uce"
    assert sorted(path.name for path in out.parent.iterdir()) == ["dog", "dog+dog-uce"]
    rows, alone = (json.loads((path / "metrics.json").read_text()) for path in (out, out.parent / "dog"))
    assert [(row["counted"], row["variant"]) for row in rows] == [
        (how, variant) for how in ("top-1", "probability", "ten-way", "ten-way probability")
        for variant in ("untouched", "dog", "dog-uce")]
    assert [row for row in rows if row["variant"] != "dog-uce"] == alone
    for row in rows:
        value, low, high = row["Acc_s"]
        assert 0 <= low <= value <= high <= 100
    text = (out / "grid.svg").read_text(encoding="utf-8")
    assert text.count("<image ") == 8 * 3 and "erased: dog" in text
    assert json.loads(PIL.Image.open(out / "grid.png").text["columns"]) == ["untouched", "dog", "dog-uce"]
    before = (out / "metrics.json").read_bytes()
    here("eval_clip.py", "--edit", "out/dog", "--edit", "out/dog-uce", *ONE, "--seed", 1, cwd=work)
    assert (out / "metrics.json").read_bytes() == before != (
        work / "out/evaluation/dog+dog-uce-2/metrics.json").read_bytes()


def test_a_table_of_another_command_in_out_is_not_replaced(here, refused, work, tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "draw", grey)
    command = ["eval_clip.py", "--edit", work / "out/dog", "--model", work / "narrow", "--n", 1, "--out", "o"]
    here(*command, cwd=tmp_path)
    before = (tmp_path / "o/metrics.json").read_bytes()
    here(*command, cwd=tmp_path)
    for other in (["--seed", 1], ["--steps", 3], ["--n", 2]):
        refused(*command, *other, cwd=tmp_path, match="--out o has another command's table")
    assert (tmp_path / "o/metrics.json").read_bytes() == before


def test_a_long_name_is_cut_and_stays_its_own(tmp_path):
    class Args:
        out, prompts = None, Path("mine.csv")

    labels = [f"{'x' * 30}{i}" for i in range(4)]
    long, other = (eval_clip.out_folder(Args, some, {}).name for some in (labels, labels[::-1]))
    assert len(long) < 90 and long != other
    assert eval_clip.out_folder(Args, ["dog"], {}) == Path("out/evaluation/dog-mine")


# ---- edits that were made elsewhere ----

def test_an_edit_from_elsewhere_is_read_with_a_warning(work, capsys):
    narrow = work / "narrow"
    W, W0, all_of_it = read_edit(work / "out/dog", narrow), cross_attention(narrow), load_file(narrow / UNET)
    assert capsys.readouterr().err == ""
    for name, count in (("whole.safetensors", len(all_of_it)), ("part.safetensors", len(W)),
                        ("pipeline", len(all_of_it))):
        found = read_edit(work / name, narrow)
        assert found.keys() == W.keys() == W0.keys() and all(torch.equal(found[key], W[key]) for key in W)
        warning = capsys.readouterr().err
        assert warning.startswith("warning: ") and "cannot be checked" in warning
        assert f"{len(W)} of its {count} tensors differ" in warning
        assert about_edit(work / name) == {}


def test_the_file_in_an_edit_folder_is_that_edit(work, capsys):
    file = work / "out/dog/erased.safetensors"
    assert about_edit(file) == about_edit(work / "out/dog") and about_edit(file)["concepts"] == ["dog"]
    assert read_edit(file, work / "narrow").keys() == read_edit(work / "out/dog", work / "narrow").keys()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change, match", [
    (lambda key, x: {f"unet.{key}": x}, "unknown unet.down_blocks"),
    (lambda key, x: {key: x[:, :3]}, "wrong shape for .*3]"),
    (lambda key, x: {key: x * float("nan")}, "NaN"), (lambda key, x: {key: x}, "changes nothing"),
    (lambda key, x: {key: x.float() * (1 + 1e-6)}, "changes nothing")])
def test_what_does_not_fit_is_refused_by_name(tmp_path, change, match):
    key, x = next(iter(cross_attention(MINI).items()))
    file = tmp_path / "x.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(key, x).items()}, file)
    with pytest.raises(UserError, match=match):
        read_edit(file, MINI)


def test_one_must_say_what_a_strange_edit_erases(here, refused, work, monkeypatch, capsys):
    assert erased_by(["x", "y"], ["Dog"]) == [("dog", "object")]
    assert erased_by([work / "out/dog", work / "out/dog-uce"], []) == [("dog", "object")]
    refused("eval_clip.py", "--edit", "whole.safetensors", *MODEL, cwd=work, match="add --concept NAME")
    monkeypatch.setattr(Model, "draw", grey)
    here("eval_clip.py", "--edit", "whole.safetensors", "--edit", "pipeline", "--concept", "dog", *FEW,
         "--out", "strange", cwd=work)
    rows = json.loads((work / "strange/metrics.json").read_text())
    assert {(row["erased"], row["variant"]) for row in rows} == {
        ("dog", name) for name in ("untouched", "whole", "pipeline")}
    shutil.rmtree(work / "strange")


# ---- anchors and books ----

def test_a_known_class_has_its_own_anchor():
    text = Text(MINI)
    assert [make_pairs([name], None, "object", text, "tail", 0)[0].anchor
            for name in ("dog", "Truck", "teapot")] == ["ground", "street", "sky"]
    assert make_pairs(["dog"], None, "style", text, "tail", 0)[0].anchor == "an artist"
    assert make_pairs(["dog"], [""], "object", text, "tail", 0)[0].anchor == ""


def test_a_method_keeps_its_authors_anchor(work):
    anchors = [about_edit(work / "out" / name)["anchors"] for name in ("dog", "dog-uce")]
    assert anchors == [["ground"], [""]]


def test_a_book_of_ones_own_takes_the_place_of_minis(here, work, tmp_path, monkeypatch):
    (tmp_path / "pizza.json").write_text(json.dumps(PIZZA))
    monkeypatch.setattr(Model, "draw", grey)
    own = ["--book", "pizza.json"]
    here("realera.py", "--concept", "pizza", "--lora-steps", 0, "--n", 1, *own, cwd=tmp_path)
    report = json.loads((tmp_path / "out/pizza/run.json").read_text())
    assert report["anchors"] == ["plate"]
    assert [row["prompt"] for row in report["table"]][:4] == [
        f"a photo of the {name}" for name in ("pizza", "margherita", "calzone")] + ["a slice in a box"]
    here("eval_clip.py", "--edit", "out/pizza", *own, "--n", 1, cwd=tmp_path)
    rows = json.loads((tmp_path / "out/evaluation/pizza/metrics.json").read_text())
    assert {row["erased"] for row in rows} == {"pizza"}
    asked = json.loads((tmp_path / "out/evaluation/pizza/asked.json").read_text())
    use_book(None)
    assert anchor_of("pizza") == "sky" and len(asked["book"]) == 64


@pytest.mark.parametrize("change", [
    {"scenes": 3}, {"classes": {}}, {"classes": {"pizza": PIZZA["classes"]["pizza"]}}, {"scenes": [""]},
    {"classes": PIZZA["classes"] | {"Cake": PIZZA["classes"]["soup"]}},
    {"classes": PIZZA["classes"] | {"cake": {"anchor": "plate", "synonyms": [], "associated": []}}},
    {"classes": PIZZA["classes"] | {"cake": {"synonyms": ["tart"], "associated": []}}}])
def test_a_book_that_lacks_something_is_refused(refused, tmp_path, change):
    (tmp_path / "bad.json").write_text(json.dumps(PIZZA | change))
    for command in (["realera.py", "--concept", "pizza"], ["eval_clip.py", "--edit", "x"]):
        refused(*command, "--book", "bad.json", cwd=tmp_path, match="bad.json needs .*classes.*scenes")


def test_the_book_of_mini_is_one():
    use_book(BOOK)
    assert len(book()["classes"]) == 10


# ---- before and after ----

def test_before_and_after_say_what_they_show(work):
    text = (work / "out/dog/before_after.svg").read_text(encoding="utf-8")
    words = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    report = json.loads((work / "out/dog/run.json").read_text())
    assert "dog → ground" in words
    assert [word for word in words if word in ("before", "after")] == ["before", "after"]
    assert text.count("<image ") == 2 * len(report["table"]) == 16
    for row in report["table"]:
        assert row["prompt"] in text and f"{row['wanted']} {row['after']['right']}/1" in text
        assert f"presence {row['presence']:.2f}" in text
    held = {row["prompt"]: row["presence"] for row in report["table"]}
    assert held["a photo of the dog"] == 1 == max(held.values()) and min(held.values()) < 0.5
    said = PIL.Image.open(work / "out/dog/before_after.png").text
    assert json.loads(said["columns"]) == ["before", "after"] and said["edit"] == "dog → ground"
