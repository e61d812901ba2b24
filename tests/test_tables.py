"""Tables and figures: any number of processes, what is asked for, bad input.

Nothing here rests on what mini/ draws, so its weights may change.
"""
import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import realera
from erasing import make_pairs
from eval_clip import harmonic
from experiments import tables
from helpers import CLASSES, ENV, MINI, ROOT, free_port, no_drawing
from plumbing import making
from plumbing.book import BOOK
from plumbing.disk import read_json
from plumbing.edits import about_edit
from plumbing.prompts import preserved_prompts
from sample import Model, Text
from starts import finished, start

SVG = "{http://www.w3.org/2000/svg}"


def test_one_two_and_three_processes_write_the_same_bytes(here, narrow, tmp_path, monkeypatch):
    args = ["--table", 3, "--n", 1, "--steps", 1, "--set", "lora_steps=0", "--batch", 8, "--device", "cpu",
            "--model", narrow, "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(making.subprocess, "run", finished)
        here("experiments/tables.py", *args, "1", cwd=tmp_path)
    for n in "23":
        shutil.copytree(tmp_path / "1/edits", tmp_path / n / "edits")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port(), "--"]
    command = [sys.executable, *map(str, [*torchrun, ROOT / "experiments/tables.py", *args, 2])]
    done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("wrote 2/") == 1
    group = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": free_port()}                          # what torchrun sets
    started = [start("experiments/tables.py", *args, "3", cwd=tmp_path, out=tmp_path / f"out{rank}",
                     RANK=rank, LOCAL_RANK=rank, **group) for rank in range(3)]
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0, 0]
    assert [(tmp_path / f"out{rank}").read_text("utf-8").count("wrote 3/") for rank in range(3)] == [1, 0, 0]
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").glob("results/*/results.jsonl"))
    assert len(files) == 4                                        # without LoRA steps, variants 1 and 2 agree
    for n in "23":
        for path in [*files, Path("table3.json"), Path("table3.csv"), Path("table3.md")]:
            assert (tmp_path / n / path).read_bytes() == (tmp_path / "1" / path).read_bytes(), (n, path)
        assert sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).glob("results/*/*.jsonl")) == files
    rows = json.loads((tmp_path / "1/table3.json").read_text())
    assert [(row["counted"], row["variant"]) for row in rows] == [
        (how, variant) for how in ("top-1", "probability", "ten-way", "ten-way probability") for variant in (
            "untouched", "1 closed form", "2 + noise alignment", "3 + neighbor mining", "4 + beyond-concept")]
    assert all((row["drift"] > 0) == (row["variant"] != "untouched") for row in rows)
    assert rows[1] == rows[2] | {"variant": "1 closed form"}
    assert {row["erased"] for row in rows} == {"automobile"}


def fake_measure(asked):
    """In place of tables.measure: notes what is asked for, and makes up outcomes."""
    def measure(rows, args, *_):
        asked.extend(rows)
        found, generator = [], torch.Generator().manual_seed(0)
        for i, (concept, variant, settings) in enumerate(rows):
            groups = {g: (torch.rand(n, generator=generator) < p).float()
                      for g, n, p in (("e", 20, 0.3), ("s", 180, 0.8), ("g", 60, 0.4), ("a", 80, 0.5))}
            found.append(({"erased": concept, "variant": variant, "drift": i / 100},
                          {"top-1": groups, "ten-way": {g: 1 - x for g, x in groups.items()},
                           "probability": {g: x * 0.75 for g, x in groups.items()}}))
        return found
    return measure


def test_table_1_has_ten_classes_and_their_average(monkeypatch):
    asked = []
    monkeypatch.setattr(tables, "measure", fake_measure(asked))
    rows = tables.table("1", argparse.Namespace(set=["lora_steps=5", "D1=0.8"], prompts=[]))
    closed = ["lora_steps=5", "D1=0.8", "M=0", "N=0", "lora_steps=0", "lambda1=0.1"]
    assert asked == [(concept, *variant) for concept in CLASSES for variant in (
        ("untouched", None), ("closed form", closed), ("closed form, reach 2", [*closed, "reach=2"]),
        ("RealEra, as printed", ["lora_steps=5", "D1=0.8", *tables.PRINTED_WAY]),
        ("RealEra", ["lora_steps=5", "D1=0.8"]))]
    assert len(rows) == 3 * 55
    for i, how in enumerate(("top-1", "ten-way", "probability")):
        part = rows[55 * i:55 * i + 55]
        assert {row["counted"] for row in part} == {how}
        assert [row["erased"] for row in part] == [
            name for name in (*CLASSES, "average of ten") for _ in range(5)]
        for average in part[50:]:
            ten = [row for row in part[:50] if row["variant"] == average["variant"]]
            for name in ("Acc_e", "Acc_s", "Acc_g", "Acc_a", "H_o"):
                assert average[name][0] == pytest.approx(sum(row[name][0] for row in ten) / 10, abs=0.011)
                assert average[name][1] < average[name][0] < average[name][2]
            assert average["drift"] == pytest.approx(sum(row["drift"] for row in ten) / 10, abs=0.001)


def test_figure_5_sweeps_its_grid_and_paints_it(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tables, "measure", fake_measure(asked))
    monkeypatch.setattr(tables, "FIGURE", {"D-S": ("D1", [0.5, 0.9], "S2", [0.3, 0.5, 0.8]),
                                           "M-N": ("M", [1, 20], "N", [0, 30])})
    rows = tables.figure(argparse.Namespace(concept="cat", set=["D2=3"], out=tmp_path))
    assert [settings for _, _, settings in asked] == [
        ["lora_steps=0", "D2=3", f"D1={d}", f"S2={s}"] for d in (0.5, 0.9) for s in (0.3, 0.5, 0.8)] + [
        ["lora_steps=0", "D2=3", f"M={m}", f"N={n}"] for m in (1, 20) for n in (0, 30)]
    assert {concept for concept, _, _ in asked} == {"cat"}
    assert [(row["figure"], row["D1 or M"], row["S2 or N"]) for row in rows[:7]] == [
        *[("D-S", d, s) for d in (0.5, 0.9) for s in (0.3, 0.5, 0.8)], ("M-N", 1, 0)]
    for row, (_, counted) in zip(rows, fake_measure([])(asked, None), strict=True):
        means = {g: 100 * x.mean().item() for g, x in counted["top-1"].items()}
        assert row["Acc_s - Acc_e"] == pytest.approx(means["s"] - means["e"], abs=0.011)
        assert row["Acc_g"] == pytest.approx(means["g"], abs=0.006)
    drawn = ElementTree.parse(tmp_path / "figure5.svg").getroot()
    said = {group.find(f"{SVG}title").text: group for group in drawn.iter(f"{SVG}g")}
    for column in ("Acc_s - Acc_e", "Acc_a"):                     # a map each, for both sweeps
        assert [element.text for element in drawn.iter(f"{SVG}title")].count(f"{column}, cat") == 2
        for row in rows[:6]:                                      # D1 = 0.5, S2 = 0.3: a cell of its own name
            assert f"{row['D1 or M']}, {row['S2 or N']}" in said
    words = [element.text for element in drawn.iter(f"{SVG}text")]
    for row in rows:
        assert f"{row['Acc_a']:.1f}" in words and f"{row['Acc_s - Acc_e']:.1f}".replace("-", "−") in words


def test_the_sweep_says_how_far_each_group_goes_along(monkeypatch):
    """Against the paper's geometry, one row at a time: cat's synonyms and phrases under two settings."""
    monkeypatch.setattr(tables, "SWEEP", ["M=0 N=0", "M=0 N=0 reach=2"])
    classes = {"cat": read_json(BOOK)["classes"]["cat"]} | {"dog": read_json(BOOK)["classes"]["dog"]}
    monkeypatch.setattr(tables, "book", lambda: {"classes": classes})
    args = argparse.Namespace(model=str(MINI), set=["lambda2=0.1"], edit_seed=3)
    once, twice = tables.sweep(args)
    assert [once["settings"], twice["settings"]] == tables.SWEEP
    text, expected = Text(MINI), {"concept": [], "synonyms": [], "phrases": [], "other classes": []}
    for name, entry in classes.items():
        pairs = make_pairs([name], [entry["anchor"]], "object", text, "tail", 3)
        delta, _ = realera.erase_in_closed_form(
            pairs, text(preserved_prompts("object", pairs)), realera.Settings(M=0, N=0, lambda2=0.1))
        e, e_star = pairs[0].block(), pairs[0].block_star()
        others = [other for other in classes if other != name]
        some = entry.get("choosing", entry)
        for group, names in zip(expected, ([name], some["synonyms"], some["associated"], others)):
            shares = []
            for prompt in (f"a photo of a {name}" for name in names):
                last, rows, along, length = text.tokenizer.count(prompt), text([prompt])[0].double(), 0.0, 0.0
                for i in range(min(len(e), 32 - last)):
                    moved = delta @ rows[last + i]
                    along += (moved @ (e_star[i] - e[i])).item()
                    length += (e_star[i] - e[i]).square().sum().item()
                shares.append(along / length)
            expected[group].append(sum(shares) / len(shares))
    for group, shares in expected.items():
        assert once[group] == pytest.approx(sum(shares) / 2, abs=1e-3)
        assert twice[group] == pytest.approx(sum(shares), abs=2e-3)           # Δ is linear in the shift
    assert once["concept"] > once["synonyms"] > once["phrases"] and twice["drift"] > once["drift"] > 0


# ---- tables whose rows are methods ----

SMALL = ["--n", 1, "--steps", 1, "--device", "cpu", "--out", "o"]


@pytest.mark.parametrize("number, concept, methods, ways, printed", [
    ("A3", "Tom Cruise", ["UCE", "SLD-M"], ["top-1", "probability", "ten-way", "ten-way probability"],
     "| tom cruise | MACE | 6.03 | 96.97 | 5.11 | 95.26 |"),
    ("A4", "van gogh", ["RECE"], ["CLIP score"], "| van gogh | MACE | 24.29 | 28.56 | 24.83 | 48.76 |")],
    ids=["A3", "A4"])
def test_each_method_is_a_row_beside_what_the_paper_prints(here, tmp_path, monkeypatch, capsys, number,
                                                           concept, methods, ways, printed):
    monkeypatch.setattr(making.subprocess, "run", finished)
    here("experiments/tables.py", "--table", number, "--concept", concept, "--method", *methods, *SMALL,
         cwd=tmp_path)
    said, rows = capsys.readouterr().out, json.loads((tmp_path / f"o/table{number}.json").read_text())
    assert [(row["counted"], row["variant"]) for row in rows] == [
        (how, name) for how in ways for name in ("untouched", *methods)]
    assert printed in said and said.count("| MACE |") == 1
    edits = {about["method"]: about for about in map(about_edit, (tmp_path / "o/edits").iterdir())}
    assert {about["task"] for about in edits.values()} == {tables.TASKS[number]}
    assert all(about["anchors"] == [""] for about in edits.values())                 # as the authors have it
    assert len(edits) == len(methods)


def test_a_csv_of_artists_says_what_must_stay(here, tmp_path, monkeypatch):
    monkeypatch.setattr(making.subprocess, "run", finished)
    (tmp_path / "artists.csv").write_text(                        # headers as published
        "prompt,artist,evaluation_seed\nImage in the style of Ivan Aivazovsky,Ivan Aivazovsky,7\n")
    here("experiments/tables.py", "--table", "A4", "--concept", "van gogh", "--method", "UCE", "--prompts",
         "artists.csv", *SMALL, cwd=tmp_path)
    row = json.loads((tmp_path / "o/tableA4.json").read_text())[0]
    jobs = [json.loads(line) for line in next((tmp_path / "o/results").glob("*/results.jsonl")).open()]
    assert [job["seed"] for job in jobs if job["prompt"] == "Image in the style of Ivan Aivazovsky"] == [7]
    assert len(jobs) == 3 and row.keys() >= {"Acc_e", "Acc_s", "Acc_g"}


def test_table_2_counts_parts_and_scores_other_prompts_and_draws_nothing_twice(here, tmp_path, monkeypatch,
                                                                               capsys):
    monkeypatch.setattr(making.subprocess, "run", finished)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "judges_of_parts.py").write_text(
        "def count(folder):\n    return {'Total': len(list(folder.glob('*.png')))}\n")
    (tmp_path / "i2p.csv").write_text(                            # headers as published
        ",prompt,categories,evaluation_seed\n0,a cat,hate,7\n1,\"a, dog\",,8\n2,ship,,9\n")
    (tmp_path / "coco.csv").write_text(
        "image_id,source,prompt,evaluation_seed\n00,coco,a truck,1\n01,coco,a frog,2\n")
    command = ["experiments/tables.py", "--table", 2, "--i2p", "i2p.csv", "--coco", "coco.csv", "--method",
               "UCE", "Surgery", "--detector", "judges_of_parts:count", *SMALL]
    here(*command, cwd=tmp_path)
    rows = json.loads((tmp_path / "o/table2.json").read_text())
    assert [(row["method"], row["Total"]) for row in rows] == [("untouched", 3), ("UCE", 3), ("Surgery", 3)]
    for row in rows:
        assert row["CLIP score"][1] <= row["CLIP score"][0] <= row["CLIP score"][2]
    assert rows[0]["Fréchet"] == 0 and "| RealEra | 19 | 6 | 2 |" in capsys.readouterr().out
    about = about_edit(next((tmp_path / "o/edits").glob("nudity-uce-*")))
    assert (about["concepts"], about["anchors"], about["task"]) == (["nudity"], [""], "explicit")
    monkeypatch.setattr(Model, "draw", no_drawing)
    here(*command, cwd=tmp_path)
    assert json.loads((tmp_path / "o/table2.json").read_text()) == rows


def test_what_the_paper_prints_adds_up_but_for_its_slips():
    """H_o from the accuracies beside it; the total from the parts. The slips are the paper's."""
    printed = read_json(tables.PRINTED)
    wrong = {(row["erased"], row["method"], row["H_o"])
             for number in ("1", "A3", "A4") for row in printed[number]
             if row["H_o"] is not None and not row["erased"].startswith("average")
             and abs(100 * harmonic(*(row[f"Acc_{g}"] / 100 for g in "esg")) - row["H_o"]) > 0.05}
    assert wrong == {("airplane", "AC", 6.11), ("elon musk", "AC", 94.81), ("mariah carey", "ESD", 65.44)}
    for row in printed["2"]:
        assert row["Total"] == sum(list(row.values())[1:9])
    assert {row["method"] for row in printed["2"]} - {"SD v1.4", "SD v2.1"} <= tables.METHODS.keys()


def test_a_class_may_be_typed_in_capitals(here, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tables, "measure", fake_measure(asked))
    (tmp_path / "o").mkdir()
    here("experiments/tables.py", "--figure", 5, "--concept", "Airplane", "--out", "o", cwd=tmp_path)
    assert {concept for concept, _, _ in asked} == {"airplane"}


# ---- bad input ----

@pytest.mark.parametrize("args", [["--table", "4"], ["--table", "one"], ["--figure", "4"], [],
                                  ["--table", "1", "--figure", "5"]])
def test_unknown_tables_are_named(here, tmp_path, capsys, args):
    with pytest.raises(SystemExit) as end:
        here("experiments/tables.py", *args, cwd=tmp_path)
    assert end.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


def test_tables_misses_a_clip_before_it_erases(refused, other, monkeypatch):
    monkeypatch.setattr(making.subprocess, "run", lambda *args, **more: pytest.fail("it starts to erase"))
    refused("experiments/tables.py", "--table", 3, "--model", other, cwd=other.parent / "work",
            match="no clip/.*--clip")


@pytest.mark.parametrize("args, match", [
    (["--table", "3", "--n", "-1"], "--n"), (["--table", "3", "--n", "0"], "--n"),
    (["--table", "3", "--set", "D7=1"], "no setting"), (["--table", "3", "--set", "M=0", "D1=9"], "D1"),
    (["--table", "3", "--seed", "-1"], "--seed"), (["--table", "3", "--batch", "0"], "--batch"),
    (["--figure", "5", "--concept", "teapot"], "teapot"), (["--table", "A4", "--concept", "cat"], "cat"),
    (["--table", "A3", "--set", "M=0"], "leave out --set"), (["--table", "2"], "--i2p FILE.csv"),
    (["--table", "A3", "--prompts", "mine.csv"], "needs a class"),
    (["--table", "1", "--prompts", "mine.csv"], "A3 and A4"),
    (["--table", "2", "--coco", "nowhere.csv"], "nowhere.csv: no such file"),
    (["--table", "2", "--i2p", "mine.csv", "--detector", "nothing:here"], "nothing:here"),
    (["--table", "3", "--model", "nowhere"], "no such folder")])
def test_tables_refuses_bad_flags(refused, tmp_path, monkeypatch, args, match):
    def no_edit(*args, **kwargs):
        raise AssertionError("it starts to erase")
    monkeypatch.setattr(making.subprocess, "run", no_edit)
    (tmp_path / "mine.csv").write_text("prompt\na cat\n")
    refused("experiments/tables.py", *args, cwd=tmp_path, match=match)
