"""ESD: negative guidance as the target, on latents drawn part of the way."""
import dataclasses
import json
import math

import pytest
import torch
from safetensors.torch import load_file

from baselines import esd
from baselines.esd import esd_loss, part_of_the_way, trained_names
from diffusion import Scheduler, guided
from erasing import erase_with
from helpers import MINI, original_key, random, same
from plumbing.edits import original
from plumbing.training import learnable
from unet import UNet, UNetConfig


@pytest.fixture
def point(model):
    """z, t, rows of "airplane", rows of ""."""
    empty, c = model.text(["", "airplane"]).split(1)
    return random(1, *model.latent, seed=0).float(), 500, c, empty


def test_the_target_is_guidance_at_minus_eta(model, point):
    (z, t, c, empty), eta = point, 2.5
    W = {name: w.detach() + 0.01 for name, w in learnable(model.unet, trained_names(model.unet, "x")).items()}
    e_0, e_c = model.unet(z, t, empty), model.unet(z, t, c)
    model.put(W)
    learned = model.unet(z, t, c)
    model.put({})
    found = esd_loss(model.unet, W, z, t, c, empty, eta).item()
    assert found == pytest.approx((learned - guided(e_0, e_c, -eta)).square().mean().item(), rel=1e-4)
    assert found == pytest.approx((learned - (1 + eta) * e_0 + eta * e_c).square().mean().item(), rel=1e-4)
    at_first = esd_loss(model.unet, {}, z, t, c, empty, eta).item()
    assert at_first == pytest.approx((1 + eta) ** 2 * (e_c - e_0).square().mean().item(), rel=1e-4)


def test_of_the_empty_word_there_is_nothing_to_learn(model, point):
    z, t, c, empty = point
    W = learnable(model.unet, trained_names(model.unet, "x"))
    sizes = []
    for word in (c, empty):
        loss = esd_loss(model.unet, W, z, t, word, empty, 1.0)
        gradients = torch.autograd.grad(loss, list(W.values()))
        sizes.append((loss.item(), max(g.abs().max().item() for g in gradients)))
    assert sizes[0][0] > 1e-4 and sizes[0][1] > 1e-5
    assert sizes[1][0] < 1e-11 and sizes[1][1] < 1e-7


def test_each_variant_trains_what_the_authors_rule_names():
    with torch.device("meta"):
        unet = UNet(UNetConfig())                                 # of SD v1.4
    theirs = {name: original_key("unet", name).removeprefix("model.diffusion_model.")
              for name, _ in unet.named_parameters()}
    rules = {"x": lambda name: "attn2" in name,
             "u": lambda name: not (name.startswith("out.") or "attn2" in name or "time_embed" in name)}
    for variant, rule in rules.items():
        assert trained_names(unet, variant) == [name for name in theirs if rule(theirs[name])]
    assert len(trained_names(unet, "x")) == 16 * 5                # to_q, to_k, to_v, to_out.0 with its bias


@pytest.mark.parametrize("steps", [50, 25])
def test_the_first_code_tells_a_time_two_steps_too_noisy(steps):
    scheduler, gap, differences = Scheduler(), 1000 // steps, []
    for t_enc in range(steps):
        times, taken = [i * gap + 1 for i in range(steps)][:-1], []                  # the last one is lost
        for i, t in enumerate(reversed(times)):
            index = len(times) - i - 1
            taken.append(t)
            if index + 1 == t_enc:
                break
        for u in (0.0, 0.5, 0.9999):
            part, told = part_of_the_way(scheduler, steps, t_enc, u, True)
            assert scheduler.timesteps(steps)[part] == taken
            assert told in range(gap * t_enc, gap * (t_enc + 1))
            if t_enc > 1:                                         # below, z is the picture's own latent
                differences.append(told - (taken[-1] - gap))
    assert (min(differences), max(differences)) == {50: (39, 58), 25: (79, 118)}[steps]


def test_without_the_quirk_the_time_told_is_that_of_the_next_step():
    times = Scheduler().timesteps(50)
    for t_enc in range(50):
        part, told = part_of_the_way(Scheduler(), 50, t_enc, 0.5, False)
        assert times[part] + [told] == times[:50 - t_enc]


FEW = {"iterations": 2, "steps": 3}


def test_an_edit_has_the_named_weights_alone_and_the_model_stays(model):
    before = {name: w.clone() for name, w in model.unet.state_dict().items()}
    W, found = erase_with(esd, model, "airplane", lr=1e-3, variant="u", **FEW)
    assert list(W) == trained_names(model.unet, "u")
    assert {w.dtype for w in W.values()} == {torch.float32}
    moved = {name: (W[name] - w).abs().max().item() for name, w in original(MINI, W).items()}
    assert max(moved.values()) < 2.1e-3                           # two of Adam's steps
    assert sum(far > 0 for far in moved.values()) > 0.99 * len(moved)
    assert same(model.unet.state_dict(), before)
    assert found["loss"]["first"] > 0 and math.isfinite(found["loss"]["last"])


def test_the_tuned_network_draws_unless_it_is_frozen(model, capsys):
    tuned, frozen = (erase_with(esd, model, "airplane", lr=0.05, frozen=frozen, **FEW)[1]["loss"]
                     for frozen in (False, True))
    assert tuned["first"] == frozen["first"]                      # nothing was learned yet
    assert tuned["last"] != frozen["last"]
    assert "far more than the concept; try a smaller lr" in capsys.readouterr().err  # it has no other cure


def test_same_seed_same_tensors_from_the_command_too_and_the_report_says_how(model, here, refused, tmp_path,
                                                                             capsys):
    W, found = erase_with(esd, model, "airplane", "", **FEW)
    here("baselines/esd.py", "--concept", "airplane", "--no-pictures", "--set", "iterations=2", "steps=3",
         cwd=tmp_path)
    folder = tmp_path / "out/airplane-esd"
    assert same(load_file(folder / "erased.safetensors"), W)
    about = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    assert about["prompts"] == {"erased": ["airplane"], "anchor": [], "retained": []}
    assert about["settings"] == dataclasses.asdict(esd.Settings(**FEW)) and about["loss"] == found["loss"]
    assert "no anchor" not in capsys.readouterr().err
    erase_with(esd, model, "airplane", "sky", iterations=1, steps=1)
    assert "ESD looks at no anchor" in capsys.readouterr().err
    refused("tools/export.py", "--edit", folder, "--lora", 4, cwd=tmp_path, match="matrices alone")
    refused("tools/merge.py", folder, folder, cwd=tmp_path, match="made by ESD: only edits of realera.py")


@pytest.mark.parametrize("flags, match", [
    (["--set", "variant=y"], "variant = x or u, not y"),
    (["--set", "iterations=0"], "iterations and lr above 0"),
    (["--set", "steps=1000"], r"steps must lie in 1 … 999")])
def test_what_cannot_be_done_is_refused_before_training(refused, tmp_path, monkeypatch, flags, match):
    monkeypatch.setattr("plumbing.training.descend", None)
    (tmp_path / "prompts.txt").write_text("a prompt")
    refused("baselines/esd.py", "--concept", "airplane", *flags, cwd=tmp_path, match=match)
