"""What every method shares: pairs, drift, the folder that it writes, its exports, and interruption;
edits of any tensor, methods that change how a model draws, the change of text."""
import json
import re
import runpy
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import erasing
import realera
from erasing import drifts, make_pairs
from helpers import AIRPLANE, CLOSED, MINI, ROOT, SHIP, UNET, pair, same
from lora import lora_deltas
from plumbing import UserError, drift
from plumbing import book as the_book
from plumbing.book import UNRELATED
from plumbing.edits import about_edit, cross_attention, original, read_edit
from plumbing.prompts import prompt_of
from plumbing.results import evaluate
from sample import Model, Text
from starts import run


def test_pair_puts_blocks_where_they_belong():
    p = pair()
    assert torch.equal(p.block(), p.e[4:]) and torch.equal(p.block_star(), p.e_star[3:9])
    context = p.context(torch.zeros(2, 6, 16, dtype=torch.float64))
    assert torch.equal(context[1, :4], p.e[:4]) and context[:, 4:].abs().max() == 0


def test_edited_rows_where_padding_is_no_end_of_text(sd2):
    """The last token of the concept, the one end-of-text token, and padding."""
    text = Text(sd2)
    pair, = make_pairs(["airplane!"], ["sky"], "object", text, "tail", 0)
    ids = text.tokenizer(["a photo of the airplane!"])[0].tolist()
    assert ids[pair.start:pair.start + 3] == [0, text.tokenizer.eos, 0] and set(ids[pair.start + 2:]) == {0}
    assert pair.n == 77 - pair.start


@pytest.mark.parametrize("concept, left_out", [("truck", {"lorry"}), ("moon", {"moon"}), ("airplane", set())])
def test_drift_is_the_median_over_what_names_neither_concept_nor_anchor(monkeypatch, concept, left_out):
    text = Text(MINI)
    pairs, delta = make_pairs([concept], ["sky"], "object", text, "tail", 0), torch.randn(256, 256).double()
    monkeypatch.setattr(drift, "nouns", lambda kind: UNRELATED)   # a book may have others
    nouns = [noun for noun in UNRELATED if noun not in left_out]
    rows = text([f"a photo of the {noun}" for noun in nouns]).double()
    moved = (rows @ delta.T).flatten(1).norm(dim=1) / rows.flatten(1).norm(dim=1)
    assert len(nouns) == 30 - len(left_out)
    found = drifts(delta, pairs, text)["median drift of unrelated prompts"]
    assert found == pytest.approx(np.median(moved.numpy()), rel=1e-6)


def test_plain_strings_are_one_pair(text):
    one, = make_pairs("airplane", "sky", "object", text, "tail", 0)
    same_one, = make_pairs(["airplane"], ["sky"], "object", text, "tail", 0)
    assert (one.concept, one.anchor, one.seed) == ("airplane", "sky", same_one.seed)
    assert make_pairs(["cat", "dog"], [None, "street"], "object", text, "tail", 0)[0].anchor == "ground"


ASKED = {                                                         # flags, and what the warning must say
    "unknown": (["--concept", "quokka"], "mini does not know “quokka” .*no such word.*--list"),
    "misspelt": (["--concept", "airplan"], "does not know “airplan”.*nearest: airplane"),
    "whole token": (["--concept", "dusk"], r"does not know “dusk”(?!.*no such word).*--list"),
    "unknown anchor": (["--concept", "cat", "--anchor", "plate"], "does not know “plate”"),
    "plural": (["--concept", "Airplanes"], "“airplanes” is another name of airplane.*--concept airplane"),
    "synonym": (["--concept", "jet"], "“jet” is another name of airplane"),
    "one phrase": (["--concept", "airplane, fire engine"],
                   "erased as one phrase; for a concept each: --concept airplane --concept 'fire engine'"),
    "erased anchor": (["--concept", "airplane", "--anchor", "ships", *SHIP],
                      "airplane → ships, but ship is erased, too: “airplane” will draw what “ships” drew")}


@pytest.mark.parametrize("args, said", ASKED.values(), ids=list(ASKED))
def test_what_may_not_be_meant_is_said_before_any_work(here, tmp_path, capsys, monkeypatch, args, said):
    def work(*_):
        raise UserError("now the work begins")
    monkeypatch.setattr(erasing, "whole_folder", work)
    with pytest.raises(SystemExit):
        here("baselines/uce.py", *args, cwd=tmp_path)
    *warnings, last = capsys.readouterr().err.splitlines()
    assert "now the work begins" in last
    assert any(line.startswith("warning: ") and re.search(said, line) for line in warnings), warnings


def test_what_is_meant_is_not_doubted(text):
    doubts = the_book.doubts
    pairs = make_pairs(["airplane", "frog"], ["sky", ""], "object", text, "tail", 0)
    assert doubts(pairs, MINI, text.tokenizer.count) == []
    unknown = make_pairs(["quokka"], ["plate"], "object", text, "tail", 0)
    assert doubts(unknown, MINI.parent, text.tokenizer.count) == []                  # others may know it
    assert len(doubts(unknown, MINI, text.tokenizer.count)) == 2


def test_list_prints_what_the_book_holds(here, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        here("realera.py", "--list", cwd=tmp_path)
    printed = capsys.readouterr().out
    assert not end.value.code and "airplane → sky: aircraft, plane, jet, antonov an-225 mriya" in printed
    assert "scenes: sky, sea, street, grass, ground" in printed and list(tmp_path.iterdir()) == []


def test_a_book_of_things_says_what_is_drawn_and_what_is_only_read(text):
    said = {}
    for concept in ("pizza", "animal", "twemoji", "delivers presents at christmas", "pizzas", "haunting",
                    "mango", "velvet", "pzza"):
        pairs = make_pairs([concept], ["sky"], "object", text, "tail", 0)
        said[concept] = " ".join(the_book.doubts(pairs, MINI, lambda word: 1))
    drawn = ("pizza", "animal", "twemoji")
    assert [said[word] for word in drawn] == [""] * 3
    assert "another name of santa claus" in said["delivers presents at christmas"]
    assert "another name of pizza" in said["pizzas"] and "another name of ghost" in said["haunting"]
    assert all("reads" in said[word] and "never drew" in said[word] for word in ("mango", "velvet"))
    assert "does not know “pzza”; nearest: pizza" in said["pzza"]
    listed = the_book.listed()
    assert "pizza, police car" in listed and "santa claus (delivers presents at christmas)" in listed
    assert "styles: noto, noto classic" in listed and "mango" not in listed
    seen = the_book.sights()                                       # what CLIP may answer
    assert seen["taxi"] == "automobile" and seen["pizza"] == "pizza" and "mango" not in seen
    assert list(seen)[0] == "airplane" and not {"taxi", "cat"} & {*the_book.other_sights()} and "lion" in seen
    assert prompt_of("antonov an-225 mriya") == "antonov an-225 mriya"
    assert prompt_of("bow and arrow") == "a photo of the bow and arrow"


def test_concepts_of_a_file_have_anchors_and_the_folder_a_short_name(here, tmp_path):
    lines = ["cat → street", "dog\tgrass", "horse, sea", "bird", "", "frog -> ground", "ship,"]
    lines += [f"thing {i}" for i in range(94)]
    (tmp_path / "many.txt").write_text("\n".join(lines), encoding="utf-8-sig")       # as Windows writes it
    here("baselines/uce.py", "--concepts", "many.txt", "--no-pictures", cwd=tmp_path)
    about = about_edit(tmp_path / "out/cat+99-more-uce")
    found = dict(zip(about["concepts"], about["anchors"]))
    assert len(found) == 100 and found["thing 7"] == found["bird"] == found["ship"] == ""    # UCE's own
    assert [found[name] for name in ("cat", "dog", "horse", "frog")] == ["street", "grass", "sea", "ground"]


def test_previews_of_windows_score_as_all_others(here, tmp_path, capsys):
    for encoding in ("utf-8", "utf-8-sig"):
        (tmp_path / "p.txt").write_text("a photo of the cat\na dog\n", encoding=encoding)
        here("baselines/uce.py", *AIRPLANE, "--preview", "p.txt", cwd=tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == printed[3:]


def test_a_wrong_setting_is_said_before_an_existing_folder(refused, tmp_path):
    (tmp_path / "out/airplane").mkdir(parents=True)
    refused("realera.py", *AIRPLANE, "--set", "D7=1", cwd=tmp_path, match="no setting 'D7'")


def test_settings_are_finite_from_python_too(model):
    for name, value in (("reach", float("nan")), ("D1_anchor", float("inf")), ("M", 10 ** 9)):
        with pytest.raises(UserError, match=f"{name} = "):
            erasing.erase_with(realera, model, "dog", tolerance="own", **{name: value})


def test_capitals_are_moot_as_clip_reads_none(here, tmp_path):
    for out, concept, anchor in (("a", "airplane", "sky"), ("b", "AirPlane", "SKY")):
        here("realera.py", "--concept", concept, "--anchor", anchor, "--lora-steps", 0, "--no-pictures",
             "--out", out, cwd=tmp_path)
    a, b = ((tmp_path / out / "erased.safetensors").read_bytes() for out in "ab")
    assert a == b and about_edit(tmp_path / "b")["concepts"] == ["airplane"]      # as in captions.json


def test_existing_folder_is_kept_unless_overwrite_is_given(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("precious")
    args = [*AIRPLANE, "--lora-steps", 0, "--no-pictures", "--out", "out"]
    refused("realera.py", *args, "--overwrite", cwd=tmp_path, match="out is no edit folder")
    (tmp_path / "out/erased.safetensors").write_text("an edit")
    refused("realera.py", *args, cwd=tmp_path, match="--overwrite")
    (tmp_path / ".out.old").mkdir()                               # as a killed run may leave it
    (tmp_path / ".out.old/half").write_text("left over")
    run("realera.py", *args, "--overwrite", cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["erased.safetensors", "report.html",
                                                                    "run.json"]


def test_flags_of_realera_export_what_it_wrote(here, tmp_path):
    here("realera.py", *AIRPLANE, *CLOSED, "--set", "lambda1=1", "tolerance=own",         # of no low rank
         "--export", "sd", "--export-lora", 8, cwd=tmp_path)
    out = tmp_path / "out/airplane"
    erased = load_file(out / "erased.safetensors")
    assert same(load_file(tmp_path / "sd" / UNET), load_file(MINI / UNET) | erased)
    assert sorted(path.name for path in out.iterdir()) == [
        "airplane-rank8-diffusers.safetensors", "airplane-rank8-webui.safetensors", "erased.safetensors",
        "report.html", "run.json"]
    error = json.loads((out / "run.json").read_text())["LoRA error"]
    with safe_open(out / "airplane-rank8-diffusers.safetensors", "pt") as file:
        assert json.loads(file.metadata()["edit"])["error"] == error
    W0, W = cross_attention(MINI), read_edit(out, MINI)
    missed = [(W[name] - W0[name]).float() - delta for name, delta in
              lora_deltas(out / "airplane-rank8-diffusers.safetensors").items()]
    moved = [(W[name] - W0[name]).float() for name in W0]
    norms = [sum(x.square().sum() for x in group).sqrt().item() for group in (missed, moved)]
    assert error == pytest.approx(norms[0] / norms[1], rel=1e-2)          # the file is rounded to float16


@pytest.mark.parametrize("args, match", [
    (["--export-lora", "0"], "at least 1"), (["--export", "there"], "there exists.*--export"),
    (["--export", "out/airplane"], "apart"), (["--export", "out/airplane/sd"], "apart"),
    (["--export", "deep", "--out", "deep/edit"], "apart"),
    (["--preview", "there/p.txt", "--export", "sd"], "writes nothing"),
    (["--preview", "nowhere.txt"], "not a text file"), (["--preview", "there"], "not a text file"),
    (["--preview", "there/binary"], "not a text file"), (["--preview", "there/empty"], "no prompt")])
def test_realera_refuses_bad_exports_and_previews(refused, tmp_path, args, match):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/p.txt").write_text("a cat\n")
    (tmp_path / "there/binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "there/empty").write_text("\n \n")
    refused("realera.py", *AIRPLANE, *CLOSED, *args, cwd=tmp_path, match=match)


def test_interruption_leaves_nothing_behind(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "realera.py", *AIRPLANE, "--lora-steps", "2000"],
                               cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL))
    # (a shell's background jobs, and so what tests start in them, ignore Ctrl-C)
    while not list(tmp_path.glob("out/.*.partial")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "interrupted" in errors
    assert list(tmp_path.iterdir()) == []


# ---- methods of one's own ----

PROMPT = ["a photo of the airplane"]
CONV = '''"""A method that changes a convolution and a bias.

    python conv.py --concept airplane
"""
from dataclasses import dataclass

from erasing import run
from plumbing.edits import original


@dataclass(frozen=True)
class Settings:
    times: float = 2.0


def erase(job, s):
    W = original(job.model_folder, ["conv_out.weight", "conv_out.bias"])
    return {name: s.times * tensor.float() for name, tensor in W.items()}


if __name__ == "__main__":
    run("Conv", __doc__, Settings, erase)
'''
GUIDE = CONV.replace("changes a convolution and a bias", "changes how a model draws").replace(
    '''    W = original(job.model_folder, ["conv_out.weight", "conv_out.bias"])
    return {name: s.times * tensor.float() for name, tensor in W.items()}
''', '''    job.drawing = {"guide": lambda u, c, t: u}
    return {}
''').replace("from plumbing.edits import original\n", "")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Runs a method's text as a file of one's own: own(text, *flags)."""
    monkeypatch.chdir(tmp_path)

    def start(text, *flags):
        (tmp_path / "mine.py").write_text(text)
        monkeypatch.setattr(sys, "argv", ["mine.py", "--concept", "airplane", *map(str, flags)])
        runpy.run_path(str(tmp_path / "mine.py"), run_name="__main__")
    return start


@pytest.fixture(scope="module")
def model():
    model = Model(Path(MINI))
    model.defaults["steps"] = 2
    return model


def test_a_method_may_change_any_tensor_of_the_unet(own, tmp_path, model, capsys):
    own(CONV, "--no-pictures", "--export", "sd")
    out, base = tmp_path / "out/airplane-conv", original(MINI, ["conv_out.weight", "conv_out.bias"])
    assert {path.name for path in out.iterdir()} == {"erased.safetensors", "report.html", "run.json"}
    W = read_edit(out, MINI)
    assert W.keys() == base.keys() and all(torch.equal(W[name], 2 * base[name]) for name in W)
    assert all(W[name].dtype == base[name].dtype and W[name].shape == base[name].shape for name in W)
    assert torch.equal(load_file(tmp_path / "sd/unet/diffusion_pytorch_model.safetensors")["conv_out.bias"],
                       W["conv_out.bias"])
    numbers = json.loads((out / "run.json").read_text())["numbers"]
    assert numbers == {"‖ΔW‖/‖W‖": pytest.approx(1)} and "edit: ‖ΔW‖/‖W‖ 1" in capsys.readouterr().out
    plain = model.draw(PROMPT, [1])
    model.put(W)
    changed = model.draw(PROMPT, [1])
    model.put({})
    assert torch.equal(model.draw(PROMPT, [1]), plain) and (changed - plain).abs().max() > 0.05


@pytest.mark.parametrize("flags, match", [(["--export-lora", 2], "a LoRA holds"),
                                          (["--preview", "p.txt"], "leaves keys and values alone")])
def test_what_such_an_edit_cannot_give_is_one_line(own, tmp_path, capsys, flags, match):
    (tmp_path / "p.txt").write_text("a cat\n")
    with pytest.raises(SystemExit) as end:
        own(CONV, "--no-pictures", *flags)
    assert end.value.code == 2 and match in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("times", ["times=nan", "float('nan')", "1e6"])
def test_an_edit_that_is_not_finite_is_not_written(own, tmp_path, capsys, times):
    """Nor one that would not be in the float16 of the model's file."""
    text = CONV.replace("s.times * tensor.float()", f"{times} * tensor.float()") if "=" not in times else CONV
    with pytest.raises(SystemExit) as end:
        own(text, "--no-pictures", *(["--set", times] if "=" in times else []))
    error = capsys.readouterr().err
    assert end.value.code == 2 and not (tmp_path / "out/airplane-conv").exists()
    assert ("times = nan" if "=" in times else "the edit has NaN or infinity in conv_out") in error


def test_a_method_that_changes_how_a_model_draws_leaves_a_report_alone(own, narrow, tmp_path):
    for more in ([], ["--overwrite"]):
        own(GUIDE, "--n", 1, "--model", narrow, *more)
    out = tmp_path / "out/airplane-conv"
    assert {path.name for path in out.iterdir()} == {"before_after.png", "before_after.svg", "report.html",
                                                      "run.json"}
    assert about_edit(out)["method"] == "Conv"
    with pytest.raises(UserError, match="changes how pictures are drawn"):
        read_edit(out, MINI)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/run.json").write_text("{}")
    with pytest.raises(SystemExit):
        own(GUIDE, "--no-pictures", "--out", "other", "--overwrite")


def test_pictures_of_an_edit_beyond_keys_and_values_are_kept_apart(model, tmp_path):
    clip = erasing.CLIP.from_pretrained(f"{MINI}/clip")
    job = [(PROMPT[0], 1)]
    plain = evaluate(model, clip, job, tmp_path)[job[0]]
    model.put({"conv_out.weight": 3 * original(MINI, ["conv_out.weight"])["conv_out.weight"]})
    changed = evaluate(model, clip, job, tmp_path)[job[0]]
    model.put({})
    assert not torch.equal(plain, changed) and len(list(tmp_path.iterdir())) == 2
    assert torch.equal(evaluate(model, clip, job, tmp_path)[job[0]], plain)


def test_the_change_of_text_is_the_closed_forms_own_and_the_best_for_any_other_edit():
    W0 = {str(i): torch.randn(9, 6, generator=torch.Generator().manual_seed(i)) for i in range(4)}
    delta = torch.randn(6, 6, generator=torch.Generator().manual_seed(9)).double()
    assert (erasing.text_change(W0, erasing.edited(W0, delta)) - delta).abs().max() < 1e-5
    W = {"0": W0["0"] + 1, "3": 2 * W0["3"]}                      # "1" and "2" stay
    stacked = torch.cat([W0[name] for name in W0]).double()
    wanted = torch.cat([W.get(name, W0[name]) for name in W0]).double()
    best = torch.linalg.lstsq(stacked, wanted).solution - torch.eye(6).double()
    assert (erasing.text_change(W0, W) - best).abs().max() < 1e-5
    with pytest.raises(UserError, match="keys and values alone"):
        erasing.text_change(W0, {"conv": torch.ones(2)})
