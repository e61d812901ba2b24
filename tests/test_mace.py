"""MACE: rows, closed form, masked attention, LoRA and fusion."""
import json

import pytest
import torch
from safetensors.torch import load_file

from baselines import mace
from erasing import erase_with
from helpers import random, same
from plumbing.edits import cross_attention
from plumbing.attention import shared_rows
from plumbing.prompts import templates_of
from sample import Model

FEW = {"pictures": 2, "lora_steps": 3, "lr": 0.1}


@pytest.fixture(scope="module")
def small(tiny):
    return Model(tiny)


def test_rows_are_those_of_equal_tokens_and_of_all_after_them(small):
    words = small.text.tokenizer
    p, p_star = "a photo of the cat at night", "a photo of the oil painting at night"
    (ids, ids_star), n, m = words([p, p_star]).tolist(), words.count("cat"), words.count("oil painting")
    rows, rows_star = shared_rows(words, p, p_star)
    assert rows[:5] == rows_star[:5] == [0, 1, 2, 3, 4] and rows[5] == 5 + n and rows_star[5] == 5 + m
    assert [ids[i] for i in rows] == [ids_star[i] for i in rows_star]                # a padding is one token
    assert len(rows) == len(rows_star) == 77 - max(n, m) and max(rows + rows_star) == 76
    assert shared_rows(words, p, p) == ([*range(77)], [*range(77)])


def test_there_are_thirty_templates_and_the_concept_stands_in_each():
    assert len(set(templates_of("object"))) == 30
    for task in ("object", "style", "celebrity", "explicit"):
        assert all(template.count("{}") == 1 for template in templates_of(task))


def test_the_closed_form_is_the_minimum_of_its_objective(small):
    W, report = erase_with(mace, small, "cat", "dog", lora_steps=0, lamb=3.0)
    name, W0 = next(iter(cross_attention(small.folder).items()))

    def slope(X):
        X, loss = X.double().requires_grad_(), 0
        for p, p_star in zip(report["prompts"]["erased"], report["prompts"]["anchor"]):
            rows, rows_star = shared_rows(small.text.tokenizer, p, p_star)
            e, e_star = small.text(p)[0, rows].double(), small.text(p_star)[0, rows_star].double()
            loss = loss + (e @ X.T - e_star @ W0.double().T).square().sum()
        loss = loss + 3.0 * (X - W0.double()).square().sum()
        return torch.autograd.grad(loss, X)[0].abs().max()
    assert len(report["prompts"]["erased"]) == 30 and slope(W[name]) < 1e-4 * slope(W0)


def test_masked_attention_is_a_sum_of_norms_over_layers():
    mask = torch.tensor([[1.0, 0, 0, 0]] * 2 + [[0] * 4] * 2)     # 4 × 4; 2 × 2 of it: the first pixel alone
    seen, total = [random(1, 2, 16, 7, seed=0), random(1, 3, 4, 7, seed=1)], 0
    for A, pixels in zip(seen, ([0, 4], [0])):
        total += sum(A[0, h, i, c].item() ** 2
                     for h in range(A.shape[1]) for i in pixels for c in (2, 6)) ** 0.5
    assert mace.masked_attention(seen, mask, [2, 6]).item() == pytest.approx(total, rel=1e-5)


def test_empty_masks_give_no_loss_and_the_closed_form_bit_for_bit(small):
    closed, _ = erase_with(mace, small, "cat", "dog", lora_steps=0)
    W, report = erase_with(mace, small, "cat", "dog", mask_threshold=1.5, **FEW)
    assert report["losses"] == [[0, 0]] and same(W, closed)
    W, report = erase_with(mace, small, "cat", "dog", mask_threshold=0, **FEW)
    still = [name for name in W if torch.equal(W[name], closed[name])]
    assert report["losses"][0][0] > 0 and len(still) == 1 and still[0].endswith("to_v.weight")  # the last's
    again, _ = erase_with(mace, small, "cat", "dog", mask_threshold=0, **FEW)
    assert same(W, again)


def test_training_takes_attention_from_the_concepts_tokens(small, monkeypatch):
    losses, asked = [], []
    plain, loss = mace.descend, mace.masked_attention
    monkeypatch.setattr(mace, "descend", lambda *args: losses.append(plain(*args)) or losses[-1])
    monkeypatch.setattr(mace, "masked_attention", lambda *args: asked.append(args[2]) or loss(*args))
    monkeypatch.setattr(mace, "noisy", lambda model, z0, generator: (                # always the same
        model.scheduler.add_noise(z0, torch.ones_like(z0), torch.tensor([300])), torch.tensor([300]), None))
    n, how = small.text.tokenizer.count("cat"), {"pictures": 1, "lr": 0.1, "mask_threshold": 0.0}
    erase_with(mace, small, "cat", "dog", as_published=False, lora_steps=15, **how)
    assert losses[0][-1] < 0.95 * losses[0][0]
    assert asked == [[*range(5, 6 + n)]] * 15                     # the picture's prompt, one end token
    asked.clear()
    erase_with(mace, small, "cat", "dog", lora_steps=6, **how)
    assert len({tuple(columns) for columns in asked}) > 1 and all(columns[-1] == 76 for columns in asked)


def test_the_command_writes_the_lora_whose_fusion_is_least_squares(here, tiny, tmp_path):
    flags = ["--concept", "cat", "--anchor", "dog", "--no-pictures", "--model", tiny]
    here("baselines/mace.py", *flags, "--out", "closed", "--set", "lora_steps=0", cwd=tmp_path)
    here("baselines/mace.py", *flags, "--out", "edit", "--set", "pictures=2", "lora_steps=3", "lr=0.1",
         "mask_threshold=0", cwd=tmp_path)
    W1, W2 = (load_file(tmp_path / f"{name}/erased.safetensors") for name in ("closed", "edit"))
    lora = load_file(tmp_path / "edit/lora-cat.safetensors")
    report = json.loads((tmp_path / "edit/run.json").read_text())
    assert W2.keys() == W1.keys() == cross_attention(tiny).keys() and len(lora) == 2 * len(W2)
    assert {w.dtype for w in [*W1.values(), *W2.values(), *lora.values()]} == {torch.float32}
    assert report["dtype"] == "float32" and report["settings"]["rank"] == 1
    E = Model(tiny).text(report["prompts"]["erased"]).flatten(0, 1).double()       # [30 · T, D]
    X = torch.cat([E, report["settings"]["lamb"] ** 0.5 * torch.eye(E.shape[1], dtype=E.dtype)])
    for name in sorted(W2)[:4]:
        layer = f"unet.{name.removesuffix('.weight')}"
        BA = (lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]).double()
        Y = torch.cat([E @ BA.T, torch.zeros(E.shape[1], len(BA), dtype=E.dtype)])   # λ ‖X‖²: towards W'
        fused = torch.linalg.lstsq(X, Y).solution.T
        assert fused.abs().max() > 1e-3 and torch.allclose(W2[name] - W1[name], fused.float(), atol=1e-6)
        assert torch.linalg.matrix_rank(fused, rtol=1e-6) == 1


@pytest.mark.parametrize("bad", ["lamb=0", "rank=0", "lora_steps=-1", "mask_threshold=-0.1", "pictures=0"])
def test_impossible_settings_are_refused(refused, tmp_path, bad):
    refused("baselines/mace.py", "--concept", "cat", "--set", bad, cwd=tmp_path, match="the settings need")
