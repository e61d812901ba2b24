"""Drawing and keeping features: results that survive a torn file, drawn once.

Nothing here rests on what mini/ draws, so its weights may change.
"""
import json
import random
import re
import threading

import pytest
import torch

from helpers import MINI, no_drawing
from plumbing import UserError, results as results_module
from plumbing.disk import read_json
from plumbing.edits import cross_attention, read_edit
from plumbing.results import Results, evaluate
from plumbing.weights import put_weights

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
    b'{"prompt": "a", "seed": 1, "feature": "AH4AfgB+AH4AfgB+AH4Afg=="}',                # eight NaNs
    b'{"prompt": 5, "seed": 1, "feature": "AAAAAAAAAAAAAAAAAAAAAA=="}',
    pytest.param(b"[" * 100_000, id="deep"),
    b'{"prompt": "a", "seed": Infinity, "feature": "AAAAAAAAAAAAAAAAAAAAAA=="}',
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


# ---- several processes ----

def test_a_barrier_says_after_a_while_for_whom_it_waits(monkeypatch, capsys):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(results_module, "store", lambda: store, raising=False)
    monkeypatch.setattr(results_module, "WORLD", 3)
    monkeypatch.setattr(results_module, "PATIENCE", 0.05, raising=False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    store.add("barriers of 1", 1)
    timer = threading.Timer(0.3, store.add, ["barriers of 2", 1])
    timer.start()
    results_module.barrier()
    assert not timer.is_alive()
    assert capsys.readouterr().err == "process 0 of 3 waits for process 2\n"


# ---- evaluate ----

FEW = [("a photo of the ship", 0), ("a photo of the cat", 1), ("purring in the dark", 2),
       ("a photo of the ship", 3), ("a photo of the cat", 0)]


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


def test_more_seeds_draw_the_new_pictures_alone(tmp_path, model, clip, monkeypatch):
    draw, drawn = model.draw, []
    monkeypatch.setattr(model, "draw", lambda prompts, seeds, *args, **more: (
        drawn.extend(zip(prompts, seeds)), draw(prompts, seeds, *args, **more))[1])
    for n in (2, 3):
        jobs = [(prompt, seed) for prompt, _ in FEW[:2] for seed in range(n)]
        found = evaluate(model, clip, jobs, tmp_path, steps=2, batch=2)
        assert list(found) == jobs and sorted(drawn) == sorted(jobs)


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


def test_a_picture_in_which_clip_sees_nan_is_not_kept(tmp_path, model, clip, monkeypatch):
    width = clip.config.vision.hidden_size
    monkeypatch.setattr(clip.vision_model, "forward", lambda x: torch.full((len(x), width), float("nan")))
    with pytest.raises(UserError, match="CLIP gave NaN in float32"):
        evaluate(model, clip, FEW[:1], tmp_path, steps=1)
    assert not list(tmp_path.rglob("*.jsonl"))


@pytest.mark.parametrize("jobs, batch", [(FEW, 0), (FEW, -1), ([("a", -1)], None), ([("a", 2 ** 63)], None)])
def test_impossible_seeds_and_batches_are_refused_at_once(tmp_path, model, clip, jobs, batch):
    with pytest.raises(UserError, match="--batch must be at least 1|seeds must be at least 0"):
        evaluate(model, clip, jobs, tmp_path, steps=2, batch=batch)
    assert list(tmp_path.iterdir()) == []
