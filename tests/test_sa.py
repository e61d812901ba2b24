"""SA: Fisher information, what holds the weights, replay."""
import copy

import pytest
import torch

from baselines import sa
from erasing import erase_with
from helpers import random, rng, same
from plumbing.training import learnable
from sample import Model

FEW = {"steps": 3, "batch": 2, "surrogates": 2, "fisher_prompts": 3, "fisher_times": 2}


@pytest.fixture(scope="module")
def small(tiny):
    return Model(tiny)


@pytest.mark.parametrize("as_published", [True, False])
def test_fisher_information_equals_gradients_taken_time_by_time(small, as_published):
    s = sa.Settings(fisher_times=3, as_published=as_published)
    names = ["conv_in.bias", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"]
    z0, c = random(2, 4, 8, 8, seed=0).float(), small.text(["a photo of the cat", "the dog"])
    F = sa.fisher(small, learnable(small.unet, names), z0, c, s, rng(5))
    unet, generator = copy.deepcopy(small.unet), rng(5)           # trained as usual, with .backward()
    params = [unet.get_parameter(name).requires_grad_() for name in names]
    expected = [0, 0]
    for x, rows in zip(z0, c):
        noises = (torch.randn(3, 4, 8, 8, generator=generator) if as_published else
                  [torch.randn(1, 4, 8, 8, generator=generator)[0] for _ in range(3)])
        slopes = []
        for t, noise in zip((0, 499, 999), noises):
            unet.zero_grad()
            a = small.scheduler.alphas_cumprod[t]
            z = a.sqrt() * x + (1 - a).sqrt() * noise
            (unet(z[None], t, rows[None]) - noise).square().mean().backward()
            slopes.append([p.grad.clone() for p in params])
        for k in range(2):
            each = [slope[k] for slope in slopes]
            if as_published:
                expected[k] += (1000 / 3 * sum(each)) ** 2 / 2
            else:
                expected[k] += sum(slope ** 2 for slope in each) / 3 / 2
    for name, wanted in zip(names, expected):
        assert torch.allclose(F[name], wanted, rtol=1e-3, atol=1e-4 * wanted.max().item())


def test_with_a_huge_lambda_the_old_weights_are_the_minimum():
    """Where L's other terms have the slope g, Newton's step from θ₀ is −g / (2 λ F): below half a unit in the
    last place of θ₀ it is nothing, and one unit off θ₀ costs more than the other terms can gain."""
    W0, g, lamb = {"w": torch.tensor([0.5, -3.0])}, torch.tensor([1.0, -2.0]), 1e12
    F = {"w": torch.tensor([0.1, 2.0])}
    w = W0["w"].clone().requires_grad_()
    (g @ w + lamb * sa.consolidation({"w": w}, W0, F)).backward()
    assert torch.equal(w.grad, g)                                 # at θ₀ it pulls nowhere
    assert torch.equal(W0["w"] - w.grad / (2 * lamb * F["w"]), W0["w"])
    for up in (-torch.inf, torch.inf):
        near = torch.nextafter(W0["w"], torch.tensor(up))
        lost = lamb * sa.consolidation({"w": near}, W0, F)
        assert lost > (g * (near - W0["w"])).abs().sum() > 0


def test_a_huge_lambda_keeps_all_weights_within_one_step_of_adam(small):
    """AdamW's first step is as long as its lr, whatever λ is; from then on λ pulls back."""
    name, lr = "mid_block.resnets.0.conv1.weight", 1e-3
    for lamb, low, high in ((1e5, 0, lr), (0, 2 * lr, 6 * lr)):
        W, _ = erase_with(sa, small, "cat", "dog", lamb=lamb, **FEW | {"steps": 6, "lr": lr})
        assert low < (W[name] - small.unet.get_parameter(name)).abs().max() < high


@pytest.mark.parametrize("trains", ["unet", "rest"])
def test_what_is_named_is_trained_and_nothing_else(small, trains):
    before = {name: tensor.clone() for name, tensor in small.unet.state_dict().items()}
    W, report = erase_with(sa, small, "cat", "dog", trains=trains, **FEW)
    assert W.keys() == {name for name in before if trains == "unet" or ".attn2." not in name}
    assert all(w.dtype == torch.float32 and not torch.equal(w, before[name]) for name, w in W.items()
               if "conv" in name)
    assert same(small.unet.state_dict(), before) and report["mean of F"] > 0
    if trains == "rest":
        assert same(W, erase_with(sa, small, "cat", "dog", trains=trains, **FEW)[0])


def test_surrogates_are_the_anchors_and_as_published_only_as_many_pictures_are_replayed(small, monkeypatch):
    drawn, used = [], []
    draw, noisy = sa.drawn_latents, sa.noisy
    monkeypatch.setattr(sa, "drawn_latents", lambda *args: drawn.append(draw(*args)) or drawn[-1])
    monkeypatch.setattr(sa, "noisy", lambda *args: used.append(args[1]) or noisy(*args))
    for as_published, replayed in ((True, 2), (False, 3)):
        drawn.clear(), used.clear()
        _, report = erase_with(sa, small, "cat", "dog", as_published=as_published, **FEW | {"batch": 12})
        x, x_r = drawn
        assert torch.equal(x, draw(small, "a photo of the dog", [0, 1])) and len(x_r) == 3
        for batches, wanted in ((used[::2], x), (used[1::2], x_r[:replayed])):
            assert {tuple(z.flatten()[:9].tolist()) for batch in batches for z in batch} == {
                tuple(z.flatten()[:9].tolist()) for z in wanted}
        said = report["prompts"]
        assert len(said["retained"]) == replayed and len(said["fisher"]) == 3
        assert said["erased"] == ["a photo of the cat"] and said["anchor"] == ["a photo of the dog"]


@pytest.mark.parametrize("bad", ["trains=all", "lr=0", "lamb=-1", "fisher_times=1001", "surrogates=0"])
def test_impossible_settings_are_refused(refused, tmp_path, bad):
    refused("baselines/sa.py", "--concept", "cat", "--set", bad, cwd=tmp_path, match="the settings need")
