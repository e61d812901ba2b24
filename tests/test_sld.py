"""SLD: the untouched model where it is off, a whole trajectory a second way, and its folder read back."""
import dataclasses
import json

import numpy as np
import PIL.Image
import pytest
import torch

from baselines import sld
from baselines.sld import Settings
from helpers import edit_json, quick_model
from plumbing.cli import parse_settings, settings_of
from plumbing.edits import Edit
from plumbing.progress import peak_memory
from plumbing.results import evaluate

PROMPT = ["a photo of the airplane"]
STRONG = {"preset": "max", "threshold": 0.05, "warmup": 1}


@pytest.fixture(scope="module")
def model():
    return quick_model(3)


def drawing(model, **settings):
    about = {"settings": dataclasses.asdict(settings_of(Settings, settings)), "safety_text": "airplane"}
    return sld.drawing(about, model.text)


def test_presets_are_the_papers_and_single_settings_change_them():
    for changes, values in (([], (1000, 10, 0.01, 0.3, 0.4)), (["preset=medium"], (1000, 10, 0.01, 0.3, 0.4)),
                            (["preset=weak"], (200, 15, 0, 0, 0)),
                            (["preset=strong"], (2000, 7, 0.025, 0.5, 0.7)),
                            (["warmup=3", "preset=max"], (5000, 3, 1, 0.5, 0.7))):
        assert dataclasses.astuple(parse_settings(Settings, changes)) == values


@pytest.mark.parametrize("sampler, calls", [("ddim", 3), ("pndm", 4)])
def test_before_the_warm_up_ends_every_bit_is_the_untouched_models(model, sampler, calls):
    """PNDM evaluates its second step twice, so there is one index more."""
    plain = model.draw(PROMPT, [1], sampler=sampler)
    for warmup in (calls - 1, calls):
        drawn = model.draw(PROMPT, [1], sampler=sampler, **drawing(model, preset="max", warmup=warmup))
        assert torch.equal(drawn, plain) == (warmup == calls)


def test_a_scale_of_0_and_no_guidance_switch_it_off(model):
    assert drawing(model, preset="max", scale=0) == {}
    plain = model.draw(PROMPT, [1], guidance=1.0)
    assert torch.equal(model.draw(PROMPT, [1], guidance=1.0, **drawing(model, preset="max")), plain)


def test_a_trajectory_equals_a_naive_loop_over_all_elements(model):
    """DDIM with ᾱ in float64, and every element by itself."""
    S, s_g, (s_S, warmup, lam, s_m, beta) = 3, 4.0, (5000, 1, 0.05, 0.5, 0.7)
    alpha_bar = np.cumprod(1 - np.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000) ** 2)
    rows = model.text(["", *PROMPT, "airplane"])
    z = torch.randn(model.latent, generator=torch.Generator().manual_seed(7)).double().numpy()
    nu = np.zeros(z.size)
    for i in range(S):
        t = (S - 1 - i) * (1000 // S) + 1
        with torch.no_grad():
            eps = model.unet(torch.tensor(z).float().expand(3, -1, -1, -1), t, rows)
        noise = np.empty(z.size)
        for j, (u, c, safe) in enumerate(eps.double().flatten(1).T.tolist()):
            d = c - safe
            mu = min(1.0, s_S * abs(d)) if d < lam else 0.0
            gamma = mu * (safe - u) + s_m * nu[j]
            nu[j] = beta * nu[j] + (1 - beta) * gamma
            noise[j] = u + s_g * (c - u - (gamma if i >= warmup else 0))
        noise, a = noise.reshape(z.shape), alpha_bar[t]
        b = alpha_bar[t - 1000 // S] if i < S - 1 else alpha_bar[0]
        z = b ** 0.5 * (z - (1 - a) ** 0.5 * noise) / a ** 0.5 + (1 - b) ** 0.5 * noise
    with torch.no_grad():
        expected = model.vae.decode(torch.tensor(z)[None].float() / model.vae.scaling_factor) / 2 + 0.5
    drawn = model.draw(PROMPT, [7], guidance=s_g, **drawing(model, **STRONG))
    assert (drawn - expected.clamp(0, 1)).abs().max() < 1 / 255
    assert (drawn - model.draw(PROMPT, [7], guidance=s_g)).abs().max() > 0.05


def test_a_batch_begins_with_no_momentum_and_at_step_0(model):
    how = drawing(model, **STRONG)
    alone = [model.draw(PROMPT, [seed], **how) for seed in (1, 2)]
    assert torch.equal(model.draw(PROMPT * 2, [1, 2], batch=1, **how), torch.cat(alone))


def test_sample_draws_from_the_folder_what_the_command_drew(here, broken, tmp_path, capsys):
    """Nothing but the model's weights, the settings and the text is needed; run.json says all of it."""
    edit_json(broken / "defaults.json", steps=1)
    flags = ["--concept", "airplane", "--model", broken, "--set", "preset=max"]
    here("baselines/sld.py", *flags, "--n", 1, "--out", "a", cwd=tmp_path)
    here("baselines/sld.py", *flags, "--no-pictures", "--out", "b", cwd=tmp_path)
    here("baselines/sld.py", *flags, "--no-pictures", "--concept", "ship", "--out", "c", cwd=tmp_path)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "run.json", "before_after.png", "before_after.svg", "report.html"}
    a, b = (json.loads((tmp_path / x / "run.json").read_text("utf-8")) for x in "ab")
    prompts = [row["prompt"] for row in a.pop("table")]
    for about in (a, b):
        assert about.pop("seconds") and (peak_memory() is None or about.pop("peak GiB") > 0.1)
    assert a == b
    assert a["safety_text"] == "airplane" and a["dtype"] == "float16" and a["seed"] == 0
    assert json.loads((tmp_path / "c/run.json").read_text("utf-8"))["safety_text"] == "airplane, ship"
    assert a["settings"] == {"scale": 5000, "warmup": 0, "threshold": 1, "momentum": 0.5, "beta": 0.7}
    here("sample.py", *prompts, "--edit", "a", "--n", 1, "--model", broken, "--out", "x.png", cwd=tmp_path)
    drawn, before = (np.asarray(PIL.Image.open(tmp_path / x)) for x in ("x.png", "a/before_after.png"))
    assert np.array_equal(drawn, before)
    width = drawn.shape[1] // 2
    assert np.abs(drawn[:, :width].astype(int) - drawn[:, -width:]).max() > 50       # and it is not untouched


def test_its_pictures_are_kept_apart_from_the_untouched_models(model, clip, tmp_path):
    job, edit = [(PROMPT[0], 1)], Edit({}, drawing(model, preset="max"), {"settings": 1})
    found = {}
    for name, worn in {"plain": {}, "edit": edit, "other": Edit({}, edit.drawing, {"settings": 2})}.items():
        model.put(worn)
        found[name] = evaluate(model, clip, job, tmp_path)[job[0]]
    model.put({})
    assert not torch.equal(found["plain"], found["edit"]) and torch.equal(found["edit"], found["other"])
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("setting, match", [
    ("preset=huge", "preset = weak or medium"), ("scale=-1", "at least 0"), ("beta=2", "beta in 0"),
    ("threshold=nan", "need|number")])
def test_bad_settings_are_one_line(refused, tmp_path, setting, match):
    refused("baselines/sld.py", "--concept", "airplane", "--set", setting, cwd=tmp_path, match=match)


@pytest.mark.parametrize("flags", [["--export", "sd"], ["--export-lora", 2], ["--preview", "p.txt"]], ids=str)
def test_what_holds_weights_alone_is_refused(refused, tmp_path, flags):
    (tmp_path / "p.txt").write_text("a cat\n")
    refused("baselines/sld.py", "--concept", "airplane", *flags, cwd=tmp_path,
            match="SLD acts while a picture is drawn, and weights alone")
