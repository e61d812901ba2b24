"""SPM: adapters that are 0 change no bit, the loss a second way, strength by prompt, its folder read back."""
import copy
import dataclasses
import json
import types

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from baselines import spm
from baselines.spm import Settings, add_adapters, loss_of, merged, rate
from helpers import MINI, quick_model, rng
from plumbing.edits import original, read_edit
from plumbing.weights import put_weights

HAS, SYNONYM, LACKS = "a photo of the airplane", "a photo of the plane", "a photo of the dog"
FEW = Settings(iterations=1, lr=1e-3, steps=3)


@pytest.fixture(scope="module")
def model():
    return quick_model(2)


def strength_of(text, **settings):
    about = {"settings": dataclasses.asdict(Settings(**settings)), "concepts": ["airplane", "fire engine"]}
    return spm.drawing(about, text)["strength"]


def test_every_layer_of_the_transformers_has_adapters_that_change_no_bit_at_first(model):
    adapters = add_adapters(model.unet, 1, rng())
    blocks = [name for name, _ in model.unet.named_modules() if name.endswith("transformer_blocks.0")]
    assert len(adapters) == 12 * len(blocks) and all(".attentions." in name for name in adapters)
    W, W0 = merged(model.unet, adapters, FEW), original(MINI, adapters)
    assert all(torch.equal(W[name], W0[name].float()) for name in adapters)
    for up, down in adapters.values():
        assert up.abs().max() == 0 and 0.5 < down.abs().max() * down.shape[1] ** 0.5 <= 1


@pytest.mark.parametrize("published, anchor", [(True, ""), (False, "sky")])
def test_the_loss_equals_one_of_networks_that_were_edited(model, published, anchor):
    """Own guidance, own DDIM, each text by itself, and a copy of the network that has the weights."""
    s = dataclasses.replace(FEW, as_published=published, g=0.5, anchoring=7.0)
    adapters = add_adapters(model.unet, 1, rng())
    for up, _ in adapters.values():
        up.data += 0.05
    pair = types.SimpleNamespace(concept="airplane", anchor=anchor)
    job = types.SimpleNamespace(model=model, pairs=[pair], text=model.text)
    found = loss_of(job, adapters, s, rng(3))

    student, g = copy.deepcopy(model.unet), rng(3)
    put_weights(student, {name: W.detach() for name, W in merged(model.unet, adapters, s).items()})
    assert torch.randint(1, (), generator=g) == 0                 # which concept
    k, z = int(torch.randint(1, 3, (), generator=g)), torch.randn(1, *model.latent, generator=g)
    c, n, u = (model.text([x]) for x in ("airplane", anchor, ""))
    with torch.no_grad():
        for i in range(k):
            t = (2 - i) * 333 + 1
            a, b = (model.scheduler.alphas_cumprod[x] for x in (t, t - 333))
            noise = student(z, t, u) + 3 * (student(z, t, c) - student(z, t, u))
            z = b.sqrt() * (z - (1 - a).sqrt() * noise) / a.sqrt() + (1 - b).sqrt() * noise
        t = 999 - 1000 * k // 3 if published else t - 333
        directions = torch.randn(2 if published else 4, *c.shape[1:], generator=g)
        lengths = 0.8 + 0.4 * torch.rand(len(directions), 1, 1, generator=g)
        anchors = [r * c.norm() * a[None] / a.norm() for a, r in zip(directions, lengths)]
        anchors = [u, anchors[0], u, anchors[1]] if published else anchors
        target = model.unet(z, t, n) - s.g * (model.unet(z, t, c) - model.unet(z, t, n))
        erase = (student(z, t, c) - target).square().mean()
        keep = [(student(z, t, a) - model.unet(z, t, a)).square().mean() for a in anchors]
    assert found.item() == pytest.approx((erase + 7 * sum(keep) / 4).item(), rel=1e-3)
    assert len(keep) == 4 and min(keep) > 0


def test_the_rate_is_that_of_cosine_with_three_restarts():
    n, optimizer = 60, torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0)
    theirs = diffusers.optimization.get_scheduler("cosine_with_restarts", optimizer, num_warmup_steps=n // 6,
                                                num_training_steps=n, num_cycles=3)
    for i in range(n):
        assert rate(i, n) == pytest.approx(theirs.get_last_lr()[0], abs=1e-6)
        optimizer.step(), theirs.step()


def test_strength_is_the_larger_of_cosine_and_share_of_tokens_squared_as_published(text):
    plain, squared = (strength_of(text, as_published=x) for x in (False, True))
    rows = {prompt: text([prompt])[0].double() for prompt in (HAS, SYNONYM, LACKS, "airplane", "fire engine")}

    def cosine(prompt, name):
        a, b = rows[prompt].flatten(), rows[name].flatten()
        return (a @ b / (a.norm() * b.norm())).item()

    for prompt in (HAS, SYNONYM, LACKS):
        wanted = 1.0 if prompt == HAS else max(cosine(prompt, "airplane"), cosine(prompt, "fire engine"))
        assert plain(rows[prompt].float(), prompt) == pytest.approx(wanted, abs=1e-5)
        assert squared(rows[prompt].float(), prompt) == pytest.approx(wanted ** 2, abs=1e-5)
    assert plain(rows[HAS].float(), None) == pytest.approx(cosine(HAS, "airplane"), abs=1e-5) != 1
    tokens = len(set(text.tokenizer(["fire engine"])[0].tolist())) - 2
    share = len({*text.tokenizer(["fire"])[0].tolist()} - {*text.tokenizer([""])[0].tolist()}) / tokens
    assert plain(text(["fire"])[0] * 0 + 1e-9, "fire") == pytest.approx(share, abs=0.05) and 0 < share < 1


@pytest.fixture(scope="module")
def folder(here, once):
    def make(root):
        for out in "ab":
            here("baselines/spm.py", "--concept", "airplane", "--no-pictures", "--out", out,
                 "--set", "iterations=2", "steps=2", "lr=0.05", cwd=root)
    return once("spm", make)


def test_the_folder_holds_the_change_in_float32_and_the_adapters_that_make_it(folder, model):
    files = [(folder / x / f"{name}.safetensors").read_bytes() for name in ("erased", "spm") for x in "ab"]
    assert files[0] == files[1] and files[2] == files[3]          # same seed, same bytes
    W, adapters = (load_file(folder / "a" / f"{name}.safetensors") for name in ("erased", "spm"))
    assert len(adapters) == 3 * len(W) and any(W0.ndim == 4 for W0 in W.values())
    for name, W0 in original(MINI, W).items():
        key = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        up, down = adapters[f"{key}.lora_up.weight"], adapters[f"{key}.lora_down.weight"]
        assert up.shape[1] == down.shape[0] == adapters[f"{key}.alpha"] == 1
        assert up.ndim == down.ndim == W0.ndim
        change = torch.einsum("or,r...->o...", up.flatten(1), down)
        assert W[name].dtype == torch.float32 and torch.allclose(W[name], W0.float() + change, atol=1e-6)
    assert max((W[name] - W0.float()).abs().max() for name, W0 in original(MINI, W).items()) > 1e-4
    with safe_open(folder / "a/spm.safetensors", "pt") as file:
        assert json.loads(file.metadata()["spm"]) == {"prompts": ["airplane"], "rank": 1}
    about = json.loads((folder / "a/run.json").read_text("utf-8"))
    assert about["settings"] | {"rank": 1, "alpha": 1, "as_published": True} == about["settings"]
    assert about["prompts"] == {"erased": ["airplane"], "anchor": [""], "retained": [""]}
    assert about["strength"].endswith("squared") and about["drawing"] == ["strength"]
    assert about["loss"].keys() == {"first", "last", "first tenth", "last tenth"}


def test_a_prompt_is_drawn_with_its_strength_0_is_the_base_and_1_the_merged_weights(folder, model):
    edit = read_edit(folder / "a", MINI, model.text)
    plain, how = model.draw([HAS, LACKS], [1, 1]), edit.drawing["strength"]
    model.put(edit)
    own, none, whole = (model.draw([HAS, LACKS], [1, 1], strength=x) for x in
                        (None, lambda c, prompt: 0, lambda c, prompt: 1))
    model.put(dict(edit))
    all_of_it, alone = model.draw([HAS, LACKS], [1, 1]), model.draw([HAS], [1])
    W0, m = original(MINI, edit), how(model.text([LACKS])[0], LACKS)
    model.put({name: W0[name].float() + m * (W - W0[name].float()) for name, W in edit.items()})
    partly = model.draw([LACKS], [1])
    model.put({})
    assert torch.equal(none, plain) and torch.equal(whole, all_of_it) and torch.equal(own[:1], alone)
    assert 0.1 < m < 0.5 and torch.allclose(own[1:], partly, atol=1e-5)
    assert (own[1:] - none[1:]).abs().max() > 1e-4 and not torch.equal(whole, none)


def test_sample_takes_a_strength_and_what_holds_weights_alone_refuses(folder, here, refused, tmp_path):
    args = ["sample.py", HAS, "--edit", folder / "a", "--n", 1, "--steps", 1]
    here(*args, "--strength", 0, "--out", "x.png", cwd=tmp_path)
    refused(*args, "--strength", "nan", cwd=tmp_path, match="--strength is a finite number")
    refused("tools/export.py", "--edit", folder / "a", "--folder", "sd", cwd=tmp_path, match="weights alone")


@pytest.mark.parametrize("setting, match", [
    ("preset=huge", "preset = mini, not huge"), ("rank=0", "rank at least 1"), ("steps=1", "steps in 2"),
    ("lr=0", "lr and alpha above 0")])
def test_bad_settings_are_one_line(refused, tmp_path, setting, match):
    refused("baselines/spm.py", "--concept", "airplane", "--set", setting, cwd=tmp_path, match=match)
