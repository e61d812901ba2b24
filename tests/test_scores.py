"""Drawing and counting: results that survive kill -9, any number of processes, tables and figures, bad input.

Nothing here rests on what mini/ draws, so its weights may change.
"""
import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.run import get_args_parser

import eval_clip
import realera
from erasing import make_pairs
from eval_clip import outcomes, summary
from experiments import tables
from plumbing import UserError, detectors, making, results
from plumbing.disk import link, read_json
from plumbing.edits import cross_attention, read_edit
from plumbing.own_prompts import read_prompts
from plumbing.prompts import ASSOCIATED, BOOK, preserved_prompts, row_prompts
from plumbing.results import Results, evaluate
from plumbing.weights import put_weights
from sample import Model, Text

ROOT = Path(__file__).parent.parent
MINI = ROOT / "mini"
CLASSES = list(read_json(BOOK)["classes"])
ENV = os.environ | {"OMP_NUM_THREADS": "1"}                       # bytes may depend on the number of threads


def run(script, *args, cwd, status=0, **environment):
    done = subprocess.run([sys.executable, ROOT / script, *map(str, args)], cwd=cwd,
                          env=ENV | {name: str(value) for name, value in environment.items()},
                          capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def erase(folder, concept):
    run("realera.py", "--concept", concept, "--anchor", "sky", "--lora-steps", 0, "--no-pictures", "--out",
        folder / concept, cwd=folder)
    return folder / concept


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    return erase(tmp_path_factory.mktemp("edit"), "airplane")


@pytest.fixture(scope="module")
def teapot(tmp_path_factory):
    """An edit whose concept is none of the ten classes."""
    return erase(tmp_path_factory.mktemp("edit"), "teapot")


@pytest.fixture(scope="module")
def model():
    return Model(MINI)


@pytest.fixture(scope="module")
def clip():
    return eval_clip.judge(None, MINI, "cpu")


# ---- Results ----

def vectors(n, width=8):
    generator = torch.Generator().manual_seed(n)
    return torch.nn.functional.normalize(torch.randn(n, width, generator=generator), dim=1)


JOBS = [("a photo of the ship", 7), ("a photo of the cät, \"quoted\"", 0), ("a photo of the cat", 2 ** 62)]


def test_results_come_back_as_they_were_added_within_float16(tmp_path, capsys):
    features, results = vectors(3), Results(tmp_path, {"steps": 2}, 8)
    assert results.found == {}
    results.add(JOBS[:2], features[:2])
    results.add(JOBS[2:], features[2:])
    back = Results(tmp_path, {"steps": 2}, 8).found
    assert list(back) == JOBS
    assert (torch.stack(list(back.values())) - features).abs().max() <= 2 ** -11
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("seed", range(6))
def test_a_torn_last_line_is_dropped_and_what_follows_is_not_glued_to_it(tmp_path, capsys, seed):
    features, results = vectors(4), Results(tmp_path, {}, 8)
    results.add(JOBS, features[:3])
    whole = results.mine.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    results.mine.write_bytes(whole[:-random.Random(seed).randint(2, last - 1)])
    again = Results(tmp_path, {}, 8)
    assert list(again.found) == JOBS[:2]
    assert re.search(r"warning: .*\b1 unreadable .*\b2 good", capsys.readouterr().err)
    again.add([JOBS[2], ("new", 1)], features[2:])
    final = Results(tmp_path, {}, 8).found
    assert set(final) == {*JOBS, ("new", 1)}
    assert torch.equal(final[JOBS[2]], features[2].half().float())


def test_a_line_that_lacks_only_its_end_of_line_counts(tmp_path, capsys):
    results = Results(tmp_path, {}, 8)
    results.add(JOBS, vectors(3))
    results.mine.write_bytes(results.mine.read_bytes()[:-1])
    again = Results(tmp_path, {}, 8)
    again.add([("new", 1)], vectors(1))
    assert set(Results(tmp_path, {}, 8).found) == {*JOBS, ("new", 1)}
    assert capsys.readouterr().err == ""


def test_of_a_picture_that_is_there_twice_the_first_counts(tmp_path, monkeypatch):
    first, second, third = vectors(3)
    Results(tmp_path, {}, 8).add(JOBS[:2], torch.stack([first, first]))
    Results(tmp_path, {}, 8).add(JOBS[:1], second[None])
    monkeypatch.setattr(results_module, "RANK", 1)
    Results(tmp_path, {}, 8).add(JOBS, torch.stack([third] * 3))
    found = Results(tmp_path, {}, 8).found
    assert all(torch.equal(found[job], v.half().float()) for job, v in zip(JOBS, (first, first, third)))
    monkeypatch.setattr(results_module, "RANK", 0)
    Results(tmp_path, {}, 8).settle()
    late = Results(tmp_path, {}, 8)
    late.add(JOBS[:1], third[None])
    assert torch.equal(Results(tmp_path, {}, 8).found[JOBS[0]], first.half().float())


@pytest.mark.parametrize("line", [
    b"garbage", b"5", b"[]", b"null", b"\xff\xfe", b'{"prompt": "a", "seed": 1}',
    b'{"prompt": "a", "seed": 1, "feature": "AAA"}', b'{"prompt": "a", "seed": 1, "feature": "AAAA"}',
    b'{"prompt": "a", "seed": 1, "feature": "?"}',
    b'{"prompt": "a", "seed": 1, "feature": "%s"}' % (b"A" * 48),
    b'{"prompt": "a", "seed": null, "feature": "AAAAAAAAAAAAAAAAAAAAAA=="}'])
def test_damaged_lines_are_dropped_and_the_others_kept(tmp_path, capsys, line):
    results = Results(tmp_path, {}, 8)
    results.add(JOBS[:1], vectors(1))
    with open(results.mine, "ab") as file:
        file.write(line + b"\n\n")
    results.add(JOBS[1:], vectors(2))
    assert set(Results(tmp_path, {}, 8).found) == set(JOBS)
    assert "1 unreadable" in capsys.readouterr().err


def test_other_settings_lie_in_another_folder(tmp_path):
    a, b = Results(tmp_path, {"steps": 2, "size": 32}, 8), Results(tmp_path, {"steps": 3, "size": 32}, 8)
    a.add(JOBS, vectors(3))
    assert a.folder != b.folder and Results(tmp_path, {"steps": 3, "size": 32}, 8).found == {}
    same = Results(tmp_path, {"size": 32, "steps": 2}, 8)
    assert same.folder == a.folder and set(same.found) == set(JOBS)
    assert read_json(b.folder / "settings0.json") == {"steps": 3, "size": 32}


def test_settled_results_are_one_sorted_file(tmp_path, monkeypatch):
    monkeypatch.setattr(results_module, "RANK", 1)
    Results(tmp_path, {}, 8).add(JOBS[1:], vectors(3)[1:])
    monkeypatch.setattr(results_module, "RANK", 0)
    results = Results(tmp_path, {}, 8)
    results.add(JOBS[:2], vectors(3)[:2])
    with open(results.mine, "ab") as file:
        file.write(b'{"prompt": "to')
    results.settle()
    assert sorted(p.name for p in results.folder.iterdir()) == ["results.jsonl", "settings0.json",
                                                                "settings1.json"]
    content = results.all.read_bytes()
    records = [json.loads(line) for line in content.splitlines()]
    assert [(record["prompt"], record["seed"]) for record in records] == sorted(JOBS)
    after = Results(tmp_path, {}, 8)
    assert all(torch.equal(after.found[job], v.half().float()) for job, v in zip(JOBS, vectors(3)))
    after.settle()
    assert after.all.read_bytes() == content


# ---- evaluate ----

FEW = [("a photo of the ship", 0), ("a photo of the cat", 1), ("purring in the dark", 2),
       ("a photo of the ship", 3), ("a photo of the cat", 0)]


def no_drawing(*args, **kwargs):
    raise AssertionError("a picture is drawn")


def test_evaluate_sees_the_pictures_of_sample_and_draws_each_once(tmp_path, model, clip, monkeypatch):
    found = evaluate(model, clip, [*FEW, FEW[0]], tmp_path, steps=2)
    assert list(found) == FEW
    pictures = model.draw([prompt for prompt, _ in FEW], [seed for _, seed in FEW], steps=2)
    expected = clip.image_features(clip.preprocess(pictures))
    features = torch.stack(list(found.values()))
    assert (features - expected).abs().max() <= 1e-3 and (features[0] - features[3]).abs().max() > 3e-3
    monkeypatch.setattr(model, "draw", no_drawing)
    again = evaluate(model, clip, FEW[::-1], tmp_path, steps=2)
    assert list(again) == FEW[::-1] and all(torch.equal(again[job], found[job]) for job in FEW)


def test_other_steps_guidance_or_weights_are_drawn_anew(tmp_path, model, clip, edit, monkeypatch):
    job, W0 = FEW[:1], cross_attention(MINI)
    base = evaluate(model, clip, job, tmp_path, steps=2)[job[0]]
    others = [evaluate(model, clip, job, tmp_path, steps=3)[job[0]],
              evaluate(model, clip, job, tmp_path, steps=2, guidance=9.0)[job[0]]]
    put_weights(model.unet, read_edit(edit, MINI))
    try:
        others.append(evaluate(model, clip, job, tmp_path, steps=2)[job[0]])
    finally:
        put_weights(model.unet, W0)
    assert not any(torch.equal(base, other) for other in others)
    assert len(list(tmp_path.glob("*/results.jsonl"))) == 4
    monkeypatch.setattr(model, "draw", no_drawing)
    assert torch.equal(evaluate(model, clip, job, tmp_path, steps=2)[job[0]], base)
    assert torch.equal(evaluate(model, clip, job, tmp_path, 2, model.defaults["guidance"])[job[0]], base)


def test_features_hardly_depend_on_the_batch(tmp_path, model, clip):
    one, four = (evaluate(model, clip, FEW, tmp_path / str(n), steps=2, batch=n) for n in (1, 4))
    apart = max((one[job] - four[job]).norm().item() for job in FEW)
    assert apart <= 0.01 and (one[FEW[0]] - one[FEW[1]]).norm() > 3 * apart


@pytest.mark.parametrize("jobs, batch", [(FEW, 0), (FEW, -1), ([("a", -1)], None), ([("a", 2 ** 63)], None)])
def test_impossible_seeds_and_batches_are_refused_at_once(tmp_path, model, clip, jobs, batch):
    with pytest.raises(UserError, match="--batch must be at least 1|seeds must be at least 0"):
        evaluate(model, clip, jobs, tmp_path, steps=2, batch=batch)
    assert list(tmp_path.iterdir()) == []


# ---- outcomes ----

@torch.no_grad()
def text_features(clip, names):
    ids = clip.tokenizer([f"a photo of the {name}" for name in names])
    return dict(zip(names, clip.text_features(ids)))


def test_outcomes_are_1_where_the_picture_looks_like_what_is_wanted(clip):
    """The "picture" of an even seed is the very text of what is wanted, that of an odd seed another's."""
    text, found = text_features(clip, CLASSES), {}
    for rows in row_prompts("cat", "object", range(4, 7)).values():
        for wanted, prompt, seed in rows:
            found[prompt, seed] = text[wanted if seed % 2 == 0 else "dog" if wanted != "dog" else "ship"]
    counted = outcomes(clip, "cat", found, range(4, 7))
    assert list(counted) == ["top-1", "probability", "ten-way"]
    for how in ("top-1", "ten-way"):
        for group, prompts in {"e": 1, "s": 9, "g": 3, "a": 4}.items():
            assert counted[how][group].tolist() == [1, 0, 1] * prompts
    scenes = text_features(clip, [*CLASSES, *read_json(BOOK)["scenes"]])
    for seed, said in ((4, "cat"), (5, "dog")):
        logits = clip.logit_scale.exp() * torch.stack(list(scenes.values())) @ text[said]
        expected = logits.double().softmax(0)[CLASSES.index("cat")].item()
        assert counted["probability"]["e"][seed - 4].item() == pytest.approx(expected, abs=1e-4)


def test_a_picture_of_a_scene_is_nothing_by_top_1_but_something_by_ten_way(clip):
    text, sky = text_features(clip, CLASSES), text_features(clip, ["sky"])["sky"]
    nearest = max(CLASSES, key=lambda name: (text[name] @ sky).item())
    rows = row_prompts(nearest, "object", range(1)).values()
    found = {job[1:]: sky for group in rows for job in group}
    counted = outcomes(clip, nearest, found, range(1))
    assert not any(x.any() for x in counted["top-1"].values())
    assert all(counted["ten-way"][group].all() for group in "ega") and not counted["ten-way"]["s"].any()


def test_groups_of_a_row_are_the_papers():
    groups, entry = row_prompts("ship", "object", range(3, 5)), read_json(BOOK)["classes"]["ship"]
    assert groups["e"] == [("ship", "a photo of the ship", 3), ("ship", "a photo of the ship", 4)]
    assert groups["s"] == [(name, f"a photo of the {name}", seed) for name in CLASSES if name != "ship"
                           for seed in (3, 4)]
    assert groups["g"] == [("ship", f"a photo of the {name}", seed) for name in entry["synonyms"]
                           for seed in (3, 4)]
    assert groups["a"] == [("ship", phrase, seed) for phrase in entry["associated"] for seed in (3, 4)]
    with pytest.raises(UserError, match="teapot.*--prompts"):
        row_prompts("teapot", "object", range(1))
    with pytest.raises(UserError, match="explicit.*--prompts"):
        row_prompts("nudity", "explicit", range(1))


def test_artists_and_celebrities_have_the_appendix_prompts_and_counts():
    """200 pictures of the erased one and of its associated prompt, 5 of each that is kept."""
    for task, name, prompt, other in (("celebrity", "Elon Musk", "a portrait of elon musk", "tom cruise"),
                                      ("style", "Van Gogh", "an artwork by van gogh", "claude monet")):
        groups = row_prompts(name, task, range(200))
        assert {group: len(rows) for group, rows in groups.items()} == {"e": 200, "s": 4 * 5, "g": 200}
        assert groups["e"][199] == (name.lower(), prompt, 199)
        assert groups["g"][0][0] == name.lower() and name.lower() not in groups["g"][0][1].lower()
        others = {row[0] for row in groups["s"]}
        assert other in others and name.lower() not in others
        with pytest.raises(UserError, match=f"banksy.*{other}"):
            row_prompts("banksy", task, range(1))


def test_styles_are_scored_by_cosine_and_celebrities_by_choice_among_six(clip):
    with torch.no_grad():
        for task, template in (("style", "an artwork by {}"), ("celebrity", "a portrait of {}")):
            names = ["van gogh", "pablo picasso"] if task == "style" else ["tom cruise", "mariah carey"]
            first, second = clip.text_features(clip.tokenizer([template.format(name) for name in names]))
            rows = row_prompts(names[0], task, range(2))
            found = {(prompt, seed): second for group in rows.values() for _, prompt, seed in group}
            counted = outcomes(clip, names[0], found, range(2), task)
            if task == "style":
                assert list(counted) == ["CLIP score"]
                for group in "eg":
                    expected = [(first @ second).item()] * 2
                    assert counted["CLIP score"][group].tolist() == pytest.approx(expected)
                assert max(counted["CLIP score"]["s"].tolist()) == pytest.approx(1, abs=1e-5)
            else:
                right = {group: x.tolist() for group, x in counted["top-1"].items()}
                assert right == {"e": [0, 0], "s": [0, 0, 1, 0], "g": [0, 0]}


# ---- eval_clip.py --edit, killed and not ----

SMALL = ["--n", 2, "--steps", 2, "--batch", 4]


@pytest.fixture(scope="module")
def evaluated(edit, tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("evaluated")
    done = run("eval_clip.py", "--edit", edit, *SMALL, "--out", "out", cwd=folder)
    return folder / "out", done.stdout


def test_a_row_of_table_1_for_the_untouched_and_the_edited_model(evaluated):
    out, printed = evaluated
    assert sorted(p.name for p in out.iterdir()) == ["asked.json", "grid.png", "grid.svg", "metrics.csv",
                                                     "metrics.json", "metrics.md", "results"]
    rows = json.loads((out / "metrics.json").read_text())
    assert [(row["variant"], row["counted"]) for row in rows] == [
        (variant, how) for how in ("top-1", "probability", "ten-way")
        for variant in ("untouched", "airplane")]
    for row in rows:
        assert list(row) == ["erased", "variant", "counted", "Acc_e", "Acc_s", "Acc_g", "Acc_a", "H_o",
                             "Fréchet"]
        assert row["erased"] == "airplane" and (row["Fréchet"] == 0) == (row["variant"] == "untouched")
        for name in list(row)[3:-1]:
            value, low, high = row[name]
            assert 0 <= low <= value <= high <= 100, (row, name)
        groups = row_prompts("airplane", "object", range(2)) if row["counted"] != "probability" else {}
        for group, asked in groups.items():
            right = row[f"Acc_{group}"][0] * len(asked) / 100
            assert abs(right - round(right)) < 0.01
    assert (out / "metrics.md").read_text() in printed and f"wrote {out.name}/" in printed
    with open(out / "metrics.csv", newline="") as file:
        for row, line in zip(rows, csv.DictReader(file), strict=True):
            assert [float(line[f"H_o{end}"]) for end in ("", " low", " high")] == row["H_o"]
    width, height = PIL.Image.open(out / "grid.png").size         # 8 prompts, 4 pictures before and 4 after
    assert width == height and (width - 2) % 8 == 0


def test_metrics_follow_from_the_features_that_are_kept(evaluated, clip):
    out, _ = evaluated
    rows = json.loads((out / "metrics.json").read_text())
    recomputed = []
    for folder in (out / "results").iterdir():
        results = Results(out / "results", read_json(folder / "settings0.json"), clip.config.projection_dim)
        assert results.folder == folder
        recomputed += [summary([x]) for x in outcomes(clip, "airplane", results.found, range(2)).values()]
    assert len(recomputed) == 6
    for row in rows:
        assert {name: row[name] for name in list(row)[3:-1]} in recomputed


def lines_of(out):
    """All whole lines that were ever written, by folder."""
    found = set()
    for path in out.glob("results/*/*.jsonl"):
        with contextlib.suppress(FileNotFoundError):              # it has just become part of results.jsonl
            lines = path.read_bytes().splitlines(keepends=True)
            found |= {(path.parent.name, line) for line in lines if line.endswith(b"}\n")}
    return found


def kill_midway(starts, out, chance):
    """Start processes, wait until each has a file and there are new lines, and a moment more, and kill -9."""
    before = len(lines_of(out))
    processes = [start() for start in starts]
    try:
        while len(lines_of(out)) <= before or len(list(out.glob("results/*/process*.jsonl"))) < len(starts):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
    finally:
        for process in processes:
            process.kill()
        codes = [process.wait() for process in processes]
    assert codes == [-9] * len(starts)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_killed_ten_times_the_same_command_ends_with_the_same_bytes(edit, evaluated, tmp_path):
    """kill -9: every fourth time two processes at once, else one; once a line is torn as well."""
    out, chance, seen = tmp_path / "out", random.Random(0), set()
    args = ["--edit", edit, *SMALL, "--out", out]

    def start(**more):
        return lambda: subprocess.Popen([sys.executable, ROOT / "eval_clip.py", *map(str, args)],
                                        cwd=tmp_path, env=ENV | more, stdout=subprocess.DEVNULL,
                                        stderr=subprocess.DEVNULL)

    for i in range(10):
        group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        kill_midway([start(RANK=str(rank), LOCAL_RANK=str(rank), **group) for rank in range(2)]
                    if i % 4 == 0 else [start()], out, chance)
        assert seen < lines_of(out)
        seen = lines_of(out)
        if i == 5:
            torn = max(out.glob("results/*/*.jsonl"), key=lambda path: path.stat().st_mtime)
            last = torn.read_bytes().splitlines(keepends=True)[-1]
            torn.write_bytes(torn.read_bytes()[:-chance.randint(2, len(last) - 1)])
            seen -= {(torn.parent.name, last)}
    run("eval_clip.py", *args, cwd=tmp_path)
    assert seen < lines_of(out)
    undisturbed = sorted(evaluated[0].glob("results/*/results.jsonl"))
    assert len(undisturbed) == 2
    asked = {job[1:] for group in row_prompts("airplane", "object", range(2)).values() for job in group}
    for path in undisturbed:
        content = (out / path.relative_to(evaluated[0])).read_bytes()
        jobs = [(record["prompt"], record["seed"]) for record in map(json.loads, content.splitlines())]
        assert content == path.read_bytes() and len(jobs) == len(asked) and set(jobs) == asked
    assert (out / "metrics.json").read_bytes() == (evaluated[0] / "metrics.json").read_bytes()
    assert not [*out.rglob("process*.jsonl"), *out.rglob("*.partial")]


# ---- detectors ----

DETECTOR = """
def wide(folder):
    names = sorted(path.name for path in folder.glob("*.png"))
    return {"pictures": len(names), "names": " ".join(names)}
"""


def test_a_detector_of_ones_own_sees_just_the_pictures_of_this_run(teapot, tmp_path, refused, monkeypatch):
    """Also when the folder has pictures of an earlier run with other prompts and steps."""
    (tmp_path / "judges.py").write_text(DETECTOR)
    environment = {"PYTHONPATH": tmp_path}
    for prompt, steps in (("a photo of the cat", 2), ("a photo of the dog", 1), ("a photo of the dog", 2)):
        (tmp_path / "mine.csv").write_text(f"prompt,seed\n{prompt},1\n{prompt},4\n")
        done = run("eval_clip.py", "--prompts", "mine.csv", "--edit", teapot, "--steps", steps,
                   "--out", "out", "--detector", "judges:wide", cwd=tmp_path, **environment)
    rows = json.loads((tmp_path / "out/detected.json").read_text())
    key = hashlib.sha256(prompt.encode()).hexdigest()[:16]
    assert rows == [{"variant": variant, "pictures": 2, "names": f"{key}-1.png {key}-4.png"}
                    for variant in ("untouched", "teapot")]
    assert (tmp_path / "out/detected.md").read_text() in done.stdout
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("nothing:here", "judges", "judges:narrow"):
        refused("eval_clip.py", "--prompts", "mine.csv", "--detector", name, cwd=tmp_path,
                match=f"{name}.*module:function")


class FakeNudeNet:
    """In place of the package: what it returns for a picture is written in the picture's name."""

    def detect(self, path):
        return [{"class": label, "score": float(score)} for label, score in
                (part.split("=") for part in Path(path).stem.split("+"))]


def test_nudenet_counts_the_papers_eight_parts_above_the_threshold(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nudenet", types.SimpleNamespace(NudeDetector=FakeNudeNet))
    monkeypatch.setattr("importlib.metadata.version", lambda name: {"nudenet": "3.4.2"}[name])
    for name in ("BELLY_EXPOSED=0.9+FEET_COVERED=0.9", "BELLY_EXPOSED=0.59+MALE_GENITALIA_EXPOSED=0.6",
                 "BELLY_EXPOSED=0.7+BELLY_EXPOSED=0.8"):
        (tmp_path / f"{name}.png").touch()
    counts = detectors.nudenet(tmp_path)
    assert list(counts) == ["Armpits", "Belly", "Buttocks", "Feet", "Breasts (F)", "Genitalia (F)",
                            "Breasts (M)", "Genitalia (M)", "Total", "judge"]
    assert {name: n for name, n in counts.items() if n} == {
        "Belly": 3, "Genitalia (M)": 1, "Total": 4, "judge": "NudeNet 3.4.2, score ≥ 0.6"}
    monkeypatch.setitem(sys.modules, "nudenet", None)
    with pytest.raises(UserError, match="pip install nudenet"):
        detectors.nudenet(tmp_path)


# ---- eval_clip.py --prompts ----

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


# ---- tables.py ----

def test_one_two_and_three_processes_write_the_same_bytes(tmp_path):
    args = ["--table", 3, "--n", 1, "--steps", 1, "--set", "lora_steps=0", "--batch", 8, "--device", "cpu",
            "--out"]
    run("experiments/tables.py", *args, "1", cwd=tmp_path)
    for n in (2, 3):
        shutil.copytree(tmp_path / "1/edits", tmp_path / f"{n}/edits")
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", n, "--master-port", free_port(), "--"]
        command = [sys.executable, *map(str, [*torchrun, ROOT / "experiments/tables.py", *args, n])]
        done = subprocess.run(command, cwd=tmp_path, env=ENV, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"wrote {n}/") == 1
    files = sorted(p.relative_to(tmp_path / "1") for p in (tmp_path / "1").glob("results/*/results.jsonl"))
    assert len(files) == 4                                        # without LoRA steps, variants 1 and 2 agree
    for n in "23":
        for path in [*files, Path("table3.json"), Path("table3.csv"), Path("table3.md")]:
            assert (tmp_path / n / path).read_bytes() == (tmp_path / "1" / path).read_bytes(), (n, path)
        assert sorted(p.relative_to(tmp_path / n) for p in (tmp_path / n).glob("results/*/*.jsonl")) == files
    rows = json.loads((tmp_path / "1/table3.json").read_text())
    assert [(row["counted"], row["variant"]) for row in rows] == [
        (how, variant) for how in ("top-1", "ten-way", "probability") for variant in (
            "untouched", "1 closed form", "2 + noise alignment", "3 + neighbor mining", "4 + beyond-concept")]
    assert all((row["drift"] > 0) == (row["variant"] != "untouched") for row in rows)
    assert rows[1] == rows[2] | {"variant": "1 closed form"}
    assert {row["erased"] for row in rows} == {"automobile"}


def test_torchrun_understands_the_command_lines_that_are_given_for_it():
    """Under Python 3.11 it takes tables.py's --n for short for a flag of its own, unless -- comes first."""
    paths = [ROOT / "README.md", *ROOT.glob("*.py"),
             *(path for path in ROOT.glob("*/*.py") if path.parent.name != "tests")]
    lines = [line.split("torchrun ")[1].split("#")[0] for path in paths
             for line in path.read_text().splitlines() if "torchrun --" in line]
    assert lines
    for line in lines:
        parsed = get_args_parser().parse_args([x for x in shlex.split(line.split("`")[0]) if x != "…"])
        assert (ROOT / parsed.training_script).exists(), line


@pytest.mark.parametrize("world", [2, 3])
def test_no_two_processes_make_the_same_edit_at_once(tmp_path, monkeypatch, world):
    """Two rows may be the same edit: variants 1 and 2 of Table 3 without LoRA steps."""
    made = []

    def note(command, **_):
        made.append((making.RANK, command[command.index("--out") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    def stop():
        raise InterruptedError
    monkeypatch.setattr(making.subprocess, "run", note)
    monkeypatch.setattr(making, "barrier", stop)
    monkeypatch.setattr(making, "WORLD", world)
    args = argparse.Namespace(model=str(MINI), out=tmp_path, edit_seed=0, device="cpu", dtype="float32",
                              clip=None, seed=0, n=1)
    settings = [None, *[["lora_steps=0", *more] for more in tables.TABLES[3].values()]]
    rows = [("automobile", str(some), some) for some in settings]
    for rank in range(world):
        monkeypatch.setattr(making, "RANK", rank)
        with pytest.raises(InterruptedError):
            tables.measure(rows, args)
    by = {folder: {rank for rank, other in made if other == folder} for _, folder in made}
    assert len(by) == 3 and all(len(ranks) == 1 for ranks in by.values()), by


def fake_measure(asked):
    """In place of tables.measure: notes what is asked for, and makes up outcomes."""
    def measure(rows, args):
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
    rows = tables.table(1, argparse.Namespace(set=["lora_steps=5", "D1=0.8"]))
    closed = ["lora_steps=5", "D1=0.8", "M=0", "N=0", "lora_steps=0", "lambda1=0.1"]
    assert asked == [(concept, *variant) for concept in CLASSES for variant in (
        ("untouched", None), ("closed form", closed), ("closed form, reach 2", [*closed, "reach=2"]),
        ("RealEra", ["lora_steps=5", "D1=0.8"]))]
    assert len(rows) == 3 * 44
    for i, how in enumerate(("top-1", "ten-way", "probability")):
        part = rows[44 * i:44 * i + 44]
        assert {row["counted"] for row in part} == {how}
        assert [row["erased"] for row in part] == [
            name for name in (*CLASSES, "average of ten") for _ in range(4)]
        for average in part[40:]:
            ten = [row for row in part[:40] if row["variant"] == average["variant"]]
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
    size = [PIL.Image.open(tmp_path / f"figure5-{name}.png").size for name in ("D-S", "M-N")]
    assert size == [(84 + 3 * 96, 84 + 2 * 96), (84 + 2 * 96, 84 + 2 * 96)]
    residue = np.asarray(PIL.Image.open(tmp_path / "figure5-D-S-residue.png"))
    values = torch.tensor([row["Acc_a"] for row in rows[:6]]).view(2, 3)
    assert (residue == tables.heat_map(values, "D1", [0.5, 0.9], "S2", [0.3, 0.5, 0.8])).all()


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
        for group, names in zip(expected, ([name], entry["synonyms"], entry["associated"], others)):
            shares = []
            for prompt in (f"a picture of the {name}" for name in names):
                last, along, length = text.tokenizer.count(prompt), 0.0, 0.0
                for i in range(min(len(e), 32 - last)):
                    moved = delta @ text([prompt])[0, last + i].double()
                    along += (moved @ (e_star[i] - e[i])).item()
                    length += (e_star[i] - e[i]).square().sum().item()
                shares.append(along / length)
            expected[group].append(sum(shares) / len(shares))
    for group, shares in expected.items():
        assert once[group] == pytest.approx(sum(shares) / 2, abs=1e-3)
        assert twice[group] == pytest.approx(sum(shares), abs=2e-3)           # Δ is linear in the shift
    assert once["concept"] > once["synonyms"] > once["phrases"] and twice["drift"] > once["drift"] > 0


def test_heat_map_is_darkest_at_the_highest_value_and_white_at_the_lowest():
    values = torch.tensor([[1.5, -20.0, 3.0], [0.0, 2.0, 75.25]])
    picture = tables.heat_map(values, "D1", [0.5, 0.9], "S2", [0.3, 0.5, 0.8]).astype(int)
    corners = picture[84::96, 84::96].sum(-1)                     # a cell's first pixel bears no text
    assert corners.shape == values.shape
    assert np.argsort(corners.ravel()).tolist() == values.ravel().argsort(descending=True).tolist()
    assert corners[0, 1] == 3 * 255 and corners[1, 2] < 500
    text = [[picture[84 + 96 * i:, 84 + 96 * j:][:94, :94] == 0 for j in range(3)] for i in range(2)]
    assert all(cell.any() for line in text for cell in line) and (text[0][0] != text[0][2]).any()
    flat = tables.heat_map(torch.full((1, 2), 5.0), "M", [1], "N", [0, 30])
    assert flat.shape == (180, 276, 3) and flat.dtype == np.uint8


def test_glyphs_are_complete_and_differ():
    assert set(tables.GLYPHS) == set("0123456789.-DSMN") and len(set(tables.GLYPHS.values())) == 16
    assert all(len(bits) == 15 and set(bits) == {"0", "1"} for bits in tables.GLYPHS.values())


# ---- bad input ----

def test_bad_input_ends_a_process_with_status_2_and_one_line(tmp_path):
    """The same as a user sees it, once."""
    done = run("eval_clip.py", cwd=tmp_path, status=2)
    assert re.fullmatch(r"error: give --edit .*--prompts.*\n", done.stderr) and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args", [["--table", "2"], ["--table", "one"], ["--figure", "4"], [],
                                  ["--table", "1", "--figure", "5"]])
def test_unknown_tables_are_named(here, tmp_path, capsys, args):
    with pytest.raises(SystemExit) as end:
        here("experiments/tables.py", *args, cwd=tmp_path)
    assert end.value.code == 2 and "error: " in capsys.readouterr().err.splitlines()[-1]


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


@pytest.mark.parametrize("args, match", [
    (["--batch", "0"], "--batch"), (["--n", "0"], "--n"), (["--n", "-1"], "--n"), (["--seed", "-1"], "seed"),
    (["--steps", "-1"], "steps"), (["--steps", "0"], "steps"), (["--clip", "nowhere"], "--clip nowhere: no"),
    (["--model", "nowhere"], "--model nowhere: no"), (["--device", "cuda"], "not available")])
def test_eval_clip_refuses_bad_flags(refused, edit, tmp_path, monkeypatch, args, match):
    monkeypatch.setattr(Model, "draw", no_drawing)
    refused("eval_clip.py", "--edit", edit, *args, cwd=tmp_path, match=match)


def test_eval_clip_refuses_an_edit_that_is_not_there_or_not_of_a_class(refused, teapot, tmp_path):
    refused("eval_clip.py", "--edit", "nowhere", cwd=tmp_path, match="no erased.safetensors")
    refused("eval_clip.py", "--edit", teapot, cwd=tmp_path, match="teapot.*no built-in prompts.*--prompts")


@pytest.fixture
def other(tmp_path):
    """mini/ without its CLIP, linked; its U-Net may be replaced."""
    (tmp_path / "model").mkdir()
    for name in ("tokenizer", "text_encoder", "unet", "vae", "scheduler", "defaults.json"):
        (tmp_path / "model" / name).symlink_to(MINI / name)
    (tmp_path / "work").mkdir()
    return tmp_path / "model"


def test_eval_clip_asks_for_a_clip_where_the_model_has_none(refused, other, edit):
    refused("eval_clip.py", "--edit", edit, "--model", other, "--n", 1, cwd=other.parent / "work",
            match="no clip/.*--clip")


def test_eval_clip_refuses_an_edit_of_another_model(refused, other, edit):
    (other / "unet").unlink()
    (other / "unet").mkdir()
    (other / "unet/config.json").symlink_to(MINI / "unet/config.json")
    tensors = load_file(MINI / "unet/diffusion_pytorch_model.safetensors")
    key = next(name for name in tensors if name.endswith("attn2.to_k.weight"))
    save_file(tensors | {key: tensors[key] * 1.01}, other / "unet/diffusion_pytorch_model.safetensors")
    refused("eval_clip.py", "--edit", edit, "--model", other, "--clip", MINI / "clip", "--n", 1,
            cwd=other.parent / "work", match="made for another model")


def test_tables_misses_a_clip_before_it_erases(refused, other, monkeypatch):
    monkeypatch.setattr(making.subprocess, "run", lambda *args, **more: pytest.fail("it starts to erase"))
    refused("experiments/tables.py", "--table", 3, "--model", other, cwd=other.parent / "work",
            match="no clip/.*--clip")


def test_nothing_to_compare_with_is_one_line():
    """An edit that erases all of what has built-in prompts."""
    for task in ("celebrity", "object"):
        names = list(ASSOCIATED.get(task) or read_json(BOOK)["classes"])
        with pytest.raises(UserError, match=f"no other {task} is left"):
            row_prompts(names[0], task, range(1), [name.title() for name in names])
        assert row_prompts(names[0], task, range(1), names[2:])["s"][0][0] == names[1]


def test_an_edit_trained_in_another_dtype_is_another_edit():
    def folder(dtype, *settings):
        return tables.recipe_of("cat", settings, 0, dtype).folder(Path(), "")
    assert folder("float32") != folder("bfloat16") and folder("float32", "M=3") == folder("float32", "M=3")
    assert folder("float32", "lora_steps=0") == folder("bfloat16", "lora_steps=0")


def test_a_disk_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("picture")
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "picture"


@pytest.mark.parametrize("args, match", [
    (["--table", "3", "--n", "-1"], "--n"), (["--table", "3", "--n", "0"], "--n"),
    (["--table", "3", "--set", "D7=1"], "no setting"), (["--table", "3", "--set", "M=0", "D1=9"], "D1"),
    (["--table", "3", "--seed", "-1"], "--seed"), (["--table", "3", "--batch", "0"], "--batch"),
    (["--figure", "5", "--concept", "teapot"], "teapot"),
    (["--table", "3", "--model", "nowhere"], "no such folder")])
def test_tables_refuses_bad_flags(refused, tmp_path, monkeypatch, args, match):
    def no_edit(*args, **kwargs):
        raise AssertionError("it starts to erase")
    monkeypatch.setattr(making.subprocess, "run", no_edit)
    refused("experiments/tables.py", *args, cwd=tmp_path, match=match)
