"""SPEED against the paper's expression and the rank-one form; what must stay does not move."""
import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from baselines import speed
from erasing import Job
from helpers import AIRPLANE, MINI, random, same
from plumbing import UserError
from plumbing.book import nouns
from plumbing.prompts import retained_words

PLAIN = speed.Settings(as_published=False, aug_num=0, filter=False)


def small(concepts, D=12):
    """t, a [D, concepts], retained rows [6, D] of very different sizes, K₂ [D, 2] and W₀ [5, D]."""
    rows = random(6, D, seed=3) * torch.tensor([3, 2, 1, 0.05, 0.04, 0.03], dtype=torch.float64)[:, None]
    t, a = (random(D, concepts, seed=seed) for seed in (1, 2))
    return t, a, rows, random(D, 2, seed=4), random(5, D, seed=5)


def published(t, a, rows, K2, W0, s):
    """The expression as the authors print it, with two inverses."""
    I, T, A = torch.eye(len(t)).double(), t @ t.T / t.shape[1], a @ t.T / t.shape[1]
    U, S, _ = torch.svd(rows.T @ rows / len(rows))
    P = U[:, S < s.threshold] @ U[:, S < s.threshold].T
    M = (T @ P + s.retain_scale * I).inverse()
    inner = (K2.T @ P @ M @ K2 + s.lamb * torch.eye(K2.shape[1]).double()).inverse()
    return W0 @ (A - T) @ P @ (I - M @ K2 @ inner @ K2.T @ P) @ M


@pytest.mark.parametrize("concepts, lamb", [(1, 0), (1, 0.5), (3, 0), (3, 2)])
def test_the_projector_equals_the_published_expression_and_keeps_what_must_stay(concepts, lamb):
    s = dataclasses.replace(PLAIN, lamb=float(lamb), retain_scale=0.7)
    t, a, rows, K2, W0 = small(concepts)
    T, A = t @ t.T / concepts, a @ t.T / concepts
    right, kept = speed.solve(T, rows, K2, s)
    delta = W0 @ (A - T) @ right
    assert (delta - published(t, a, rows, K2, W0, s)).norm() < 1e-9 * delta.norm() and kept == 3
    assert (delta @ rows[:3].T).norm() < 0.1 * (delta @ t).norm()        # nearly in the span of B
    assert ((delta @ K2).norm() < 1e-12) == (lamb == 0)
    right, kept = speed.solve(T, rows, K2, dataclasses.replace(s, threshold=1e-9))
    assert kept == 6 and (W0 @ (A - T) @ right @ rows.T).norm() < 1e-12              # every kept row, exactly


def test_of_one_concept_the_edit_has_rank_one_in_the_same_direction_for_every_matrix():
    t, a, rows, K2, W0 = small(1)
    right, _ = speed.solve(t @ t.T, rows, K2, PLAIN)
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    still = torch.linalg.qr(torch.cat([vectors[:, values >= PLAIN.threshold], K2], 1))[0]
    u = t[:, 0] - still @ (still.T @ t[:, 0])
    for W in (W0, random(9, 12, seed=6)):
        delta = W @ (a @ t.T - t @ t.T) @ right
        expected = torch.outer(W @ (a - t)[:, 0], u) / (PLAIN.retain_scale + u @ u)
        assert (delta - expected).norm() < 1e-12 * expected.norm()


def test_the_edit_is_the_minimum_among_all_that_leave_b_and_k2_alone():
    t, a, rows, K2, W0 = small(2)
    T, A = t @ t.T / 2, a @ t.T / 2
    X = (W0 @ (A - T) @ speed.solve(T, rows, K2, PLAIN)[0]).requires_grad_()
    ((X @ t - W0 @ (a - t)).square().sum() / 2 + PLAIN.retain_scale * X.square().sum()).backward()
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    still = torch.linalg.qr(torch.cat([vectors[:, values >= PLAIN.threshold], K2], 1))[0]
    assert (X.grad - X.grad @ still @ still.T).norm() < 1e-11 and X.grad.norm() > 0.1


def test_the_filter_keeps_rows_along_the_concept_and_noise_lies_along_one_direction():
    t, a, rows, _, W0 = small(1)
    W_e = W0 @ (a - t) @ t.T @ torch.inverse(torch.eye(12).double() + t @ t.T)
    generator = torch.Generator().manual_seed(0)
    found = speed.retained_rows(rows, W0, W_e, speed.Settings(aug_num=2), generator)
    along = (rows @ t).abs()[:, 0]
    passed = rows[along > along.mean()]
    assert torch.equal(found[:len(passed)], passed) and 0 < len(passed) < 6 and len(found) < 3 * len(passed)
    without = dataclasses.replace(PLAIN, filter=True)             # as coded: the filter comes with the copies
    assert torch.equal(speed.retained_rows(rows, W0, W_e, without, generator), rows)
    noisy = speed.retained_rows(rows, W0, W_e, speed.Settings(filter=False, aug_num=4), generator)
    assert torch.equal(noisy[:6], rows) and 6 < len(noisy) < 6 + 24
    v, near = torch.linalg.svd(W0)[2][4], torch.cdist(noisy[6:], rows)               # W₀ has rank 5
    apart = noisy[6:] - rows[near.argmin(1)]
    assert torch.allclose(apart, torch.outer(apart @ v, v), atol=1e-9)


def made(tmp_path, **settings):
    s = speed.Settings(**settings)
    job = Job(MINI, "airplane", "sky", rows=s.rows, prompts=s.prompts)
    job.folder = tmp_path
    return job, {name: W.double() - job.W0[name].double() for name, W in speed.erase(job, s).items()}


def test_retained_words_of_mini_stay_and_so_does_the_empty_prompts_summary(tmp_path):
    job, delta = made(tmp_path, as_published=False, retain="nouns", threshold=1e-6)
    K2, text = load_file(tmp_path / "K2.safetensors")["K2"], job.text
    words = retained_words("nouns", job.pairs)
    stay = torch.stack([text([word])[0, text.tokenizer.count(word)].double() for word in words], 1)
    word = text(["airplane"])[0, 1].double()
    assert set(words) == {*nouns("preserved")} - {"airplane", "sky"}
    assert torch.equal(K2[:, 0], text([""])[0, 0].double()) and K2.shape[1] == 4
    for change in delta.values():                                 # kept in float32: 1e-7 of W
        assert torch.cat([change @ stay, change @ K2], 1).norm(dim=0).max() < 1e-4 * (change @ word).norm()
    assert all(name.endswith("attn2.to_v.weight") for name in delta) and set(delta) == {
        name for name in job.W0 if "to_v" in name}
    assert set(job.report["directions kept"].values()) == {len(words)}


def test_where_the_empty_prompt_itself_is_retained_the_published_inverse_has_no_digits_left(tmp_path):
    job, delta = made(tmp_path, as_published=False)
    K2, empty = load_file(tmp_path / "K2.safetensors")["K2"], job.text([""])[0, 1:].double()
    values, vectors = torch.linalg.eigh(empty.T @ empty / len(empty))
    P = vectors[:, values < 0.1] @ vectors[:, values < 0.1].T
    assert torch.linalg.cond(K2.T @ P @ K2) > 1e7                 # beyond float32
    word = job.text(["airplane"])[0, 1].double()
    for change in delta.values():
        assert (change @ K2).norm(dim=0).max() < 1e-4 * (change @ word).norm()
    assert job.report["prompts"]["retained"] == [""]


def test_the_command_writes_the_same_twice_and_says_what_it_took(here, tmp_path):
    flags = [*AIRPLANE, "--no-pictures", "--retain", "bird, ship, house, cup"]
    for out, more in (("a", []), ("b", []), ("c", ["--seed", 1])):
        here("baselines/speed.py", *flags, "--out", out, *more, cwd=tmp_path)
    a, b, c = (load_file(tmp_path / out / "erased.safetensors") for out in "abc")
    said = json.loads((tmp_path / "a/run.json").read_text())
    assert same(a, b) and not same(a, c)
    assert said["prompts"] == {"erased": ["airplane"], "anchor": ["sky"],
                               "retained": ["bird", "ship", "house", "cup"]}
    assert said["directions kept"].keys() == a.keys() and said["K2"]["columns"] == 4
    assert said["settings"]["aug_num"] == 10 and said["settings"]["filter"] is True


@pytest.mark.parametrize("args, match", [
    (["--set", "threshold=0"], "threshold"), (["--set", "retain_scale=0"], "retain_scale"),
    (["--set", "aug_num=-1"], "aug_num"),
    (["--set", "lamb=-1"], "lamb"), (["--set", "rows=all"], "token or tail"),
    (["--retain", "airplane"], "nothing but what is erased"), (["--set", "filter=maybe"], "filter=True")])
def test_speed_refuses_bad_input(refused, tmp_path, args, match):
    refused("baselines/speed.py", *AIRPLANE, "--no-pictures", *args, cwd=tmp_path, match=match)


def test_a_threshold_that_leaves_nothing_to_edit_is_refused():
    t, _, _, K2, _ = small(1)
    with pytest.raises(UserError, match="keeps all 12 directions"):
        speed.solve(t @ t.T, random(20, 12, seed=8), K2, dataclasses.replace(PLAIN, threshold=1e-3))
