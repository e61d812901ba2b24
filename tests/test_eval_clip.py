"""CLIP against transformers', the paper's metrics, and the command: killed ten times, and with bad input.

But for transformers', nothing here rests on what mini/ draws, so its weights may change.
"""
import contextlib
import csv
import json
import random
import re
import time
from functools import partial

import numpy as np
import PIL.Image
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from eval_clip import CLIP, MEAN, STD, h_o, harmonic, outcomes, summary
from helpers import (CLASSES, MINI, OFFICIAL_TEXT, TEXTS, edit_json, free_port, near, no_drawing, norms,
                     random_network, shapes, write_vocabulary)
from plumbing.book import other_sights
from plumbing.disk import read_json
from plumbing.prompts import row_prompts
from plumbing.results import Results
from plumbing.stats import wilson
from sample import Model
from starts import run, start

# ---- CLIP ----

def theirs_clip(text, vision, **changes):
    config = transformers.CLIPConfig(
        text_config=OFFICIAL_TEXT | text, vision_config={"num_attention_heads": 4} | vision, **changes)
    return random_network(lambda: transformers.CLIPModel(config))


CLIPS = {
    "old end-of-text id": (
        TEXTS["as in SD"] | {"eos_token_id": 2},
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "image_size": 32,
         "patch_size": 8}, 24),
    "gelu picture tower": (
        TEXTS["short"] | {"max_position_embeddings": 77},
        {"hidden_size": 48, "intermediate_size": 100, "num_hidden_layers": 3, "image_size": 30,
         "patch_size": 7, "hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_attention_heads": 3}, 40),
    "one layer": (
        TEXTS["gelu"] | {"num_hidden_layers": 1},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "image_size": 16,
         "patch_size": 16}, 16)}


@pytest.mark.parametrize("name", CLIPS)
def test_clip_numbers(name, tmp_path):
    tokenizer = transformers.CLIPTokenizer.from_pretrained(write_vocabulary(tmp_path))
    text, vision, width = CLIPS[name]
    text = {"eos_token_id": tokenizer.eos_token_id} | text | {"vocab_size": len(tokenizer)}
    theirs = theirs_clip(text, vision, projection_dim=width)
    theirs.save_pretrained(tmp_path)
    ours = CLIP.from_pretrained(tmp_path)
    assert norms(ours) == norms(theirs)
    assert shapes(ours) == shapes(theirs)

    size = theirs.config.vision_config.image_size
    pictures = torch.randint(256, (5, 3, size, size)) / 255
    prompts = ["a photo of a cat", "", "the river 1984, at night", "a very long picture " * 30]
    inputs = dict(tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt"))
    inputs["pixel_values"] = (pictures - MEAN) / STD

    states = []
    for module in (ours.vision_model.pre_layrnorm, *ours.vision_model.encoder.layers):
        module.register_forward_hook(lambda module, inputs, output: states.append(output))
    expected = theirs(**inputs)
    near(ours.image_features(inputs["pixel_values"]), expected.image_embeds)
    near(ours.text_features(inputs["input_ids"]), expected.text_embeds)
    hidden = theirs.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states
    assert len(states) == len(hidden) == theirs.config.vision_config.num_hidden_layers + 1
    for state, other in zip(states, hidden):
        near(state, other)
    near(ours.classify(pictures, prompts), expected.logits_per_image.softmax(dim=-1))


@pytest.mark.parametrize("size", [(224, 224), (300, 400), (500, 227), (100, 151), (37, 101), (64, 64),
                                  (230, 225)], ids=str)
@pytest.mark.parametrize("image_size", [224, 32])
def test_preprocess_as_transformers(size, image_size):
    """Within 2/255: Pillow rounds to whole numbers after each of its two passes, and we do not.

    The noise makes a wrong filter visible; no pixel is near black or white, where Pillow also clips twice.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, size[0] // 8 + 2, size[1] // 8 + 2, generator=generator)
    picture = nn.functional.interpolate(coarse, size=size, mode="bilinear") * 0.2 + 0.25
    picture = (picture + 0.3 * torch.rand(picture.shape, generator=generator)).mul(255).round()
    config = {"size": {"shortest_edge": image_size}, "crop_size": {"height": image_size, "width": image_size}}
    image = PIL.Image.fromarray(picture[0].permute(1, 2, 0).numpy().astype(np.uint8))
    theirs = CLIPImageProcessorPil(**config)(image, return_tensors="pt")["pixel_values"]
    with torch.device("meta"):
        clip = CLIP()
    vision = type(clip.config.vision)(image_size=image_size)
    clip.config = type(clip.config)(vision=vision)
    ours = clip.preprocess(picture / 255)
    assert ours.shape == theirs.shape
    assert ((ours - theirs) * STD * 255).abs().max() <= 2


def test_classify_in_another_precision(tmp_path):
    """Pictures come in float32 whatever the network's precision is."""
    tokens = len(transformers.CLIPTokenizer.from_pretrained(write_vocabulary(tmp_path)))
    text, vision, width = CLIPS["one layer"]
    theirs_clip(text | {"vocab_size": tokens}, vision, projection_dim=width).save_pretrained(tmp_path)
    pictures, prompts = torch.rand(2, 3, 16, 16), ["a cat", "the river"]
    expected = CLIP.from_pretrained(tmp_path).classify(pictures, prompts)
    near(CLIP.from_pretrained(tmp_path, dtype=torch.float64).classify(pictures, prompts).float(), expected)


def test_clip_config_without_default_values(tmp_path):
    """transformers 4 left out what equals its defaults: for CLIP's text half 512, 2048 and 8."""
    theirs = theirs_clip({"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8,
                          "vocab_size": 500, "num_hidden_layers": 1},
                         CLIPS["one layer"][1], projection_dim=16)
    theirs.save_pretrained(write_vocabulary(tmp_path))
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
        del text[key]
    edit_json(tmp_path / "config.json", text_config=text)
    ours = CLIP.from_pretrained(tmp_path)
    assert shapes(ours) == shapes(transformers.CLIPModel.from_pretrained(tmp_path))
    assert ours.config.text.num_attention_heads == 8


# ---- the paper's metrics ----

def made_up(seed, sizes=(20, 90, 60, 40), share=(0.2, 0.8, 0.3, 0.4)):
    generator = torch.Generator().manual_seed(seed)
    return {group: (torch.rand(n, generator=generator) < p).float()
            for group, n, p in zip("esga", sizes, share)}


@pytest.mark.parametrize("who, e, s, g, printed", [
    ("MACE automobile", 6.97, 95.18, 14.22, 91.15), ("UCE airplane", 40.32, 98.79, 49.83, 64.09),
    ("UCE cat", 2.35, 98.02, 2.58, 97.70), ("MACE airplane", 9.06, 95.39, 10.03, 92.03),
    ("RealEra airplane", 3.38, 96.18, 8.87, 94.58), ("RealEra bird", 9.03, 94.08, 9.33, 91.88),
    ("ESD-u deer", 18.14, 73.81, 6.93, 82.17), ("MACE frog", 11.45, 97.75, 13.08, 90.83)])
def test_harmonic_mean_is_the_one_the_paper_prints(who, e, s, g, printed):
    assert 100 * harmonic(e / 100, s / 100, g / 100) == pytest.approx(printed, abs=0.011)  # they rounded, too


def test_harmonic_mean_is_0_where_one_part_fails_and_1_where_all_are_perfect():
    assert harmonic(1, 0.9, 0.1) == harmonic(0.1, 0, 0.1) == harmonic(0.1, 0.9, 1) == 0
    assert harmonic(0, 1, 0) == 1
    assert h_o({"e": 0.1, "s": 0.8, "g": 0.3, "a": 0.9}) == harmonic(0.1, 0.8, 0.3)
    assert h_o({"e": 0.1, "s": 0.8, "a": 0.3}) == harmonic(0.1, 0.8, 0.3)       # no synonyms: phrases


def test_average_h_o_is_the_mean_of_rows_not_of_their_accuracies():
    rows = [made_up(0), made_up(1, sizes=(10, 45, 30, 20), share=(0.7, 0.5, 0.8, 0.9)), made_up(2)]
    found, single = summary(rows), [summary([row]) for row in rows]
    assert list(found) == ["Acc_e", "Acc_s", "Acc_g", "Acc_a", "H_o"]
    for name, (value, low, high) in found.items():
        assert value == pytest.approx(sum(row[name][0] for row in single) / 3, abs=0.011)
        assert low < value < high
    of_means = 100 * harmonic(*(found[f"Acc_{g}"][0] / 100 for g in "esg"))
    assert abs(found["H_o"][0] - of_means) > 1


def test_counts_of_equally_many_pictures_a_row_have_wilsons_interval_of_all():
    zeros = [{"e": torch.zeros(20), "s": torch.ones(9), "g": torch.zeros(6)} for _ in range(5)]
    found = summary(zeros)
    assert found["Acc_e"] == [0, 0, round(100 * wilson(0, 100)[1], 2)]
    assert found["Acc_s"] == [100, round(100 * wilson(1, 45)[0], 2), 100]
    found = summary([*zeros, zeros[0] | {"e": torch.ones(60)}])   # an average of rows, not of pictures
    assert found["Acc_e"][0] == pytest.approx(100 / 6, abs=0.01) and found["Acc_g"][2] > 0


def test_an_average_is_over_the_rows_that_have_the_group():
    rows = [{"e": torch.zeros(4), "s": torch.ones(4), "g": torch.zeros(4)}, made_up(0), made_up(0)]
    for some in (rows, rows[::-1]):                               # a book may have a class without phrases
        found, others = summary(some), summary(rows[1:])
        assert found["Acc_a"] == others["Acc_a"] and found["Acc_e"][0] < others["Acc_e"][0]


def test_one_rows_counts_have_wilsons_interval_and_probabilities_a_bootstrapped_one():
    row = made_up(0) | {"a": torch.full((40,), 0.5)}
    found = summary([row])
    e = row["e"].mean().item()
    assert found["Acc_e"] == [round(100 * x, 2) for x in (e, *wilson(e, 20))]
    assert found["Acc_a"] == [50, 50, 50]
    assert found["H_o"][0] == pytest.approx(100 * h_o({g: x.mean().item() for g, x in row.items()}), abs=0.01)


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
    assert list(counted) == ["top-1", "probability", "ten-way", "ten-way probability"]
    for how in ("top-1", "ten-way"):
        for group, prompts in {"e": 1, "s": 9, "g": 3, "a": 4}.items():
            assert counted[how][group].tolist() == [1, 0, 1] * prompts
    scenes = text_features(clip, [*CLASSES, *other_sights()])
    for seed, said in ((4, "cat"), (5, "dog")):
        logits = clip.logit_scale.exp() * torch.stack(list(scenes.values())) @ text[said]
        expected = logits.double().softmax(0)[CLASSES.index("cat")].item()
        assert counted["probability"]["e"][seed - 4].item() == pytest.approx(expected, abs=1e-4)
        expected = logits[:len(CLASSES)].double().softmax(0)[CLASSES.index("cat")].item()
        assert counted["ten-way probability"]["e"][seed - 4].item() == pytest.approx(expected, abs=1e-4)


def test_a_picture_of_a_scene_is_nothing_by_top_1_but_something_by_ten_way(clip):
    text, sky = text_features(clip, CLASSES), text_features(clip, ["sky"])["sky"]
    nearest = max(CLASSES, key=lambda name: (text[name] @ sky).item())
    rows = row_prompts(nearest, "object", range(1)).values()
    found = {job[1:]: sky for group in rows for job in group}
    counted = outcomes(clip, nearest, found, range(1))
    assert not any(x.any() for x in counted["top-1"].values())
    assert all(counted["ten-way"][group].all() for group in "ega") and not counted["ten-way"]["s"].any()


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
        (variant, how) for how in ("top-1", "probability", "ten-way", "ten-way probability")
        for variant in ("untouched", "airplane")]
    for row in rows:
        assert list(row) == ["erased", "variant", "counted", "Acc_e", "Acc_s", "Acc_g", "Acc_a", "H_o",
                             "Fréchet"]
        assert row["erased"] == "airplane" and (row["Fréchet"] == 0) == (row["variant"] == "untouched")
        for name in list(row)[3:-1]:
            value, low, high = row[name]
            assert 0 <= low <= value <= high <= 100, (row, name)
        groups = row_prompts("airplane", "object", range(2)) if "probability" not in row["counted"] else {}
        for group, asked in groups.items():
            right = row[f"Acc_{group}"][0] * len(asked) / 100
            assert abs(right - round(right)) < 0.01
    assert (out / "metrics.md").read_text() in printed and f"wrote {out.name}/" in printed
    with open(out / "metrics.csv", newline="") as file:
        for row, line in zip(rows, csv.DictReader(file), strict=True):
            assert [float(line[f"H_o{end}"]) for end in ("", " low", " high")] == row["H_o"]
    width, height = PIL.Image.open(out / "grid.png").size         # 8 prompts, 2 pictures before and 2 after
    assert (width - 2) * 2 == height - 2 and (width - 2) % 4 == 0


def test_metrics_follow_from_the_features_that_are_kept(evaluated, clip):
    out, _ = evaluated
    rows = json.loads((out / "metrics.json").read_text())
    recomputed = []
    for folder in (out / "results").iterdir():
        results = Results(out / "results", read_json(folder / "settings0.json"), clip.config.projection_dim)
        assert results.folder == folder
        recomputed += [summary([x]) for x in outcomes(clip, "airplane", results.found, range(2)).values()]
    assert len(recomputed) == 8
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
            assert all(process.is_alive() for process in processes)
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.05))
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [process.exitcode for process in processes] == [-9] * len(starts)


def test_killed_ten_times_the_same_command_ends_with_the_same_bytes(edit, evaluated, tmp_path):
    """kill -9: every fourth time two processes at once, else one; once a line is torn as well."""
    out, chance, seen = tmp_path / "out", random.Random(0), set()
    args = ["--edit", edit, *SMALL, "--out", out]

    for i in range(10):
        group = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": free_port()}
        kill_midway([partial(start, "eval_clip.py", *args, cwd=tmp_path, **more) for more in
                     ([group | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(2)]
                      if i % 4 == 0 else [{}])], out, chance)
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


# ---- bad input ----

def test_bad_input_ends_a_process_with_status_2_and_one_line(tmp_path):
    """The same as a user sees it, once."""
    done = run("eval_clip.py", cwd=tmp_path, status=2)
    assert re.fullmatch(r"error: give --edit .*--prompts.*\n", done.stderr) and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [
    ["eval_clip.py", "--prompts", "mine.csv"], ["experiments/tables.py", "--sweep"],
    ["experiments/attack.py", "--concept", "cat"]])
def test_a_folder_of_other_things_is_left_alone(refused, tmp_path, monkeypatch, command):
    (tmp_path / "mine.csv").write_text("prompt\na cat\n")
    (tmp_path / "t/pictures/untouched").mkdir(parents=True)
    (tmp_path / "t/pictures/untouched/holiday.png").write_text("precious")
    monkeypatch.setattr(Model, "draw", no_drawing)
    refused(*command, "--keep-pictures", "--out", "t", cwd=tmp_path, match="--out t holds other things")


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
