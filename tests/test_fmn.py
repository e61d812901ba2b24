"""FMN: its loss, what it trains, its columns."""
import pytest
import torch

from baselines import fmn
from erasing import erase_with
from helpers import random, same
from sample import Model

FEW = {"steps": 3, "pictures": 2, "lr": 1e-3}


@pytest.fixture(scope="module")
def small(tiny):
    return Model(tiny)


def test_the_loss_is_one_norm_over_layers_heads_pixels_and_columns():
    seen = [random(1, 2, 4, 7, seed=0), random(1, 3, 9, 7, seed=1)]
    total = 0
    for A in seen:
        for head in A[0]:
            for pixel in head:
                total += sum(pixel[column].item() ** 2 for column in (2, 5, 6))
    assert fmn.resteering(seen, [2, 5, 6]).item() == pytest.approx(total ** 0.5)


@pytest.mark.parametrize("trains", ["unet", "attn2"])
def test_what_is_named_is_trained_and_nothing_else(small, trains):
    before = {name: tensor.clone() for name, tensor in small.unet.state_dict().items()}
    W, report = erase_with(fmn, small, "cat", "", trains=trains, **FEW)
    named = {name for name in before if trains == "unet" or ".attn2." in name}
    assert W.keys() == named and all(w.dtype == torch.float32 for w in W.values())
    moved = {name for name in W if not torch.equal(W[name], before[name])}
    assert {name for name in named if "attn2.to_q" in name or "attn2.to_k" in name} <= moved
    assert same(small.unet.state_dict(), before)
    assert report["prompts"]["erased"] == ["a photo of the cat"] and len(report["losses"]) == 2
    if trains == "attn2":
        assert same(W, erase_with(fmn, small, "cat", "", trains=trains, **FEW)[0])


def test_training_takes_attention_from_the_columns_and_as_published_says_which(small, monkeypatch):
    losses, asked = [], []
    plain = fmn.descend
    monkeypatch.setattr(fmn, "descend", lambda *args, **how: losses.append(plain(*args, **how)) or losses[-1])
    monkeypatch.setattr(fmn, "noisy", lambda model, z0, generator: asked.append(z0) or (
        model.scheduler.add_noise(z0, torch.ones_like(z0), torch.tensor([300])), torch.tensor([300]), None))
    many, n = {"steps": 12, "pictures": 1, "lr": 3e-3}, small.text.tokenizer.count("cat")
    for as_published, columns in ((True, range(5, 77)), (False, range(5, 6 + n))):   # from the word on
        _, report = erase_with(fmn, small, "cat", "", as_published=as_published, **many)
        assert report["columns"] == [list(columns)]
        assert losses[-1][-1] < 0.95 * losses[-1][0]
    assert losses[0][0] > losses[1][0] and asked[0].shape == (1, 4, 8, 8)


@pytest.mark.parametrize("bad", ["trains=all", "lr=0", "steps=0", "pictures=-1"])
def test_impossible_settings_are_refused(refused, tmp_path, bad):
    refused("baselines/fmn.py", "--concept", "cat", "--set", bad, cwd=tmp_path, match="the settings need")
