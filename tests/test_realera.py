"""The method: each equation computed a second, naive way, and what must hold by construction; the command."""
import dataclasses
import json
import math
import random
import re
import runpy
import sys
import weakref

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import realera
from erasing import drifts, edited, erase_with, make_pairs
from helpers import AIRPLANE, CLASSES, MINI, QUICK, ROOT, SHIP, SIZE, pair, rng, same_pictures
from lora import add_lora, lora_layers
from plumbing import UserError
from plumbing.book import BOOK, nouns
from plumbing.disk import read_json
from plumbing.edits import cross_attention, read_edit
from plumbing.prompts import preserved_prompts
from realera import (Settings, Trajectories, align_noise, as_teacher, beyond_concepts, closed_form,
                     erase_in_closed_form, mine, neighbor_concepts, noise_alignment_loss, radius_at,
                     towards_noise)
from sample import Model, Text
from starts import run
from unet import UNet

S = Settings()


def block(seed=0, n=6, width=16, size=40.0):
    e = torch.randn(n, width, generator=rng(100 + seed), dtype=torch.float64)
    return e * size / e.norm()


def cosine(a, b):
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()


# ---- mining ----

def test_direction_is_unit_and_points_from_e_to_noise():
    e = block()
    v_hat = towards_noise(e, rng(3))
    v = torch.randn(e.shape, generator=rng(3), dtype=e.dtype) * e.norm() / e.numel() ** 0.5
    assert v_hat.norm().item() == pytest.approx(1)
    assert cosine(v_hat, v - e) == pytest.approx(1)


@pytest.mark.parametrize("target", [0.99, 0.8, 0.3, -0.2])
def test_radius_at_agrees_with_bisection(target):
    e = block()
    v_hat = towards_noise(e, rng(1))
    low, high = 0.0, 1e4
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if cosine(e, e + middle * v_hat) > target else (low, middle)
    assert radius_at(target, e, v_hat) == pytest.approx(low, rel=1e-6)


def test_radius_follows_the_right_angle_formula_in_high_dimension():
    """v ⟂ e, ‖v‖ = ‖e‖: r / ‖e‖ = √2 tan a / (1 + tan a), 0.71 at cosine 0.7, 0.90 at 0.5."""
    e = block(n=73, width=768, size=1.0)
    for target, expected in ((0.9, 0.46), (0.7, 0.71), (0.5, 0.90), (0.3, 1.08)):
        assert radius_at(target, e, towards_noise(e, rng(2))) == pytest.approx(expected, abs=0.015)
    assert radius_at(-0.99, e, towards_noise(e, rng(2))) == math.inf


def test_neighbors_satisfy_equations_3_to_6():
    e, e_star = block(1), block(2)
    s = Settings(M=200, D1=0.8, tolerance="own", D1_anchor=0.3, S1=0.95, S2=0.55)
    near, near_star = neighbor_concepts(e, e_star, s, rng())
    assert near.shape == near_star.shape == (200, *e.shape)
    for c, c_star in zip(near, near_star):
        eta, eta_star = c - e, c_star - e_star
        assert eta.norm() <= 0.8 * e.norm() * (1 + 1e-12)                             # Eq. 3
        assert 0.55 - 1e-9 <= cosine(e, c) <= 0.95 + 1e-9                             # Eq. 4
        assert eta_star.norm() <= 0.3 * e.norm()                                      # Algorithm 1, line 5
        assert cosine(eta, eta_star) == pytest.approx(1)                              # line 6: same direction


def test_neighbors_are_distributed_as_by_rejection():
    """Algorithm 1 draws until the filter passes. Ours gives the same radii: Kolmogorov–Smirnov at 0.1 %."""
    e = block(1, n=20, width=64)
    s = Settings(M=1500, D1=0.9, S1=0.9, S2=0.6)
    ours = sorted((c - e).norm().item() for c in neighbor_concepts(e, e, s, rng(5))[0])
    theirs, generator = [], rng(6)
    while len(theirs) < 1500:
        v = torch.randn(e.shape, generator=generator, dtype=e.dtype) * e.norm() / e.numel() ** 0.5
        r = torch.rand((), generator=generator).item() * s.D1 * e.norm()
        eta = r * (v - e) / (v - e).norm()
        if s.S2 <= cosine(e, e + eta) <= s.S1:
            theirs.append(eta.norm().item())
    merged = torch.tensor(sorted(ours + theirs))
    cdf = [torch.searchsorted(torch.tensor(sorted(x)), merged, right=True) / 1500 for x in (ours, theirs)]
    assert (cdf[0] - cdf[1]).abs().max() < 1.95 * math.sqrt(2 / 1500)


def test_beyond_concepts_lie_outside_by_distance_and_by_cosine():
    e, s = block(n=20, width=64), Settings(N=200, D1=0.9, D2=1.6, S2=0.45)
    for c in beyond_concepts(e, s, rng()):
        assert 0.9 * e.norm() <= (c - e).norm() <= 1.6 * e.norm()
        assert cosine(e, c) < 0.45 + 1e-9


@pytest.mark.parametrize("bad", [dict(D1=0.05, S1=0.9), dict(D1=1e-6, S1=0.999, S2=0.998)])
def test_thresholds_that_no_neighbor_satisfies_are_an_error_and_not_a_loop(bad):
    with pytest.raises(UserError, match="neighbor"):
        neighbor_concepts(block(), block(), Settings(**bad), rng())


def test_thresholds_that_no_beyond_concept_satisfies_are_an_error_and_not_a_loop():
    with pytest.raises(UserError, match="beyond"):
        beyond_concepts(block(), Settings(D1=0.2, D2=0.3, S2=0.2, S1=0.9), rng())


def test_counts_of_zero_give_nothing():
    s = Settings(M=0, N=0)
    assert neighbor_concepts(block(), block(), s, rng())[0].shape == (0, 6, 16)
    assert beyond_concepts(block(), s, rng()).shape == (0, 6, 16)


def sums(E, E_star, P):
    """What Eq. (7) takes of rows: the Gram of E, the products with the targets, the Gram of P."""
    return E.T @ E, E.T @ (E_star - E), P.T @ P


@pytest.mark.parametrize("tolerance, most", [("own", 1_000), ("same", 1_000), pytest.param(
    "own", 10_000, marks=pytest.mark.slow)])
def test_sampled_sums_approach_the_expected_ones_as_one_over_the_root_of_M(tolerance, most):
    e, e_star, generator = block(n=40, width=128), block(1, n=40, width=128), rng(7)           # nD = 5,120
    s = Settings(tolerance=tolerance, M=1, N=1, **{"D1_anchor": 0.7} if tolerance == "own" else {})
    wanted, so_far, errors = sums(*realera.expected_concepts(e, e_star, s)), [0, 0, 0], []
    for M in range(100, most + 1, 100):
        some = dataclasses.replace(s, M=100, N=100 if M <= 1_000 else 0)
        rows = *neighbor_concepts(e, e_star, some, generator), beyond_concepts(e, some, generator)
        so_far = [a + b for a, b in zip(so_far, sums(*(x.flatten(0, 1) for x in rows)))]
        counts = M, M, min(M, 1_000)
        errors.append([(x / n - y).norm().item() / y.norm().item()
                       for x, y, n in zip(so_far, wanted, counts)])
    first, last, slope = errors[0], errors[-1], math.log10(most / 100)
    for a, b, decades in zip(first, last, (slope, slope, 1)):
        assert -0.65 < math.log10(b / a) / decades < -0.35 and b < 0.11


def test_expected_sums_are_the_formulas_term_by_term():
    """docs/mining.md's two formulas, their moments as integrals over the radii."""
    e, e_star = block(), block(1)
    for tolerance in ("own", "same"):
        s = Settings(tolerance=tolerance, mining="expected", M=3, N=2)
        d, (n, D) = 2 ** 0.5 * e.norm().item(), e.shape

        def mean(f, low, high):            # over a radius uniform in low … high
            xs = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000 * (high - low) + low
            return f(xs / d).mean()

        v_hat = -e / d
        r, far = realera.neighbor_radii(e, v_hat, s), realera.beyond_radii(e, v_hat, s)
        a, a2, g, g2 = (mean(f, *limits) for limits in (r, far) for f in (lambda x: x, lambda x: x * x))
        b = mean(lambda x: x, 0, s.D1_anchor * e.norm().item())
        ba = a2 if tolerance == "same" else a * b                 # E[βα]
        b = a if tolerance == "same" else b
        I, G = torch.eye(D, dtype=e.dtype) * e.norm() ** 2 / D, e.T @ e              # n σ² = ‖e‖²/D
        B = 3 * ((1 - 2 * a + a2) * G + a2 * I)
        C = 3 * ((1 - a) * e.T @ (e_star - e) - (b - a - ba + a2) * G + (ba - a2) * I)
        P = 2 * ((1 - 2 * g + g2) * G + g2 * I)
        for ours, formula in zip(sums(*realera.expected_concepts(e, e_star, s)), (B, C, P)):
            assert torch.allclose(ours, formula, rtol=1e-6, atol=1e-6)


def test_expected_mining_draws_no_number_and_is_what_many_neighbors_lead_to():
    def edit(seed, **settings):
        s = Settings(share=True, lambda1=0.1, **settings)
        return erase_in_closed_form([dataclasses.replace(concept, seed=seed)], stay, s)[0]

    concept, stay = pair(T=24, n=20, D=64), block(5, n=8, width=64)[None]
    one, other = (edit(seed, mining="expected") for seed in (1, 2))
    few, many = (edit(1, M=M, N=M) for M in (20, 2_000))
    assert torch.equal(one, other)
    assert (many - one).norm() < 0.06 * one.norm() < (few - one).norm()
    for counts in (dict(M=0), dict(N=0), dict(M=0, N=0)):
        assert torch.isfinite(edit(1, mining="expected", **counts)).all()
    none, plain = (edit(1, mining=mining, M=0, N=0) for mining in ("expected", "sampled"))
    assert torch.allclose(none, plain, atol=1e-12)


def test_the_tolerance_may_be_the_radius_itself():
    e, e_star = block(), block(1)
    near, near_star = neighbor_concepts(e, e_star, Settings(M=5, tolerance="same"), rng())
    assert torch.allclose(near - e, near_star - e_star)


@pytest.mark.parametrize("bad", [dict(S1=0.5, S2=0.5), dict(S2=0.9, S1=0.8), dict(D1=2.0, D2=1.0), dict(M=-1),
                                 dict(N=-1), dict(lambda2=-1.0), dict(rank=0), dict(lora_steps=-1),
                                 dict(rows="all"), dict(S1=1.5), dict(lr=0.0), dict(D1=0.0),
                                 dict(trajectories=1), dict(D1=math.nan), dict(mining="mean"),
                                 dict(tolerance="0.5"), dict(D1_anchor=0.5)])
def test_settings_that_make_no_sense_are_refused(bad):
    with pytest.raises(UserError):
        Settings(**bad)


# ---- the closed form ----

def naive_loss(W, W0, E, E_star, P, lambda1, ridge):
    return ((E @ W.T - E_star @ W0.T).square().sum() + lambda1 * (P @ W.T - P @ W0.T).square().sum()
            + ridge * (W - W0).square().sum())


def problem(width=8, seed=0):
    g = rng(seed)
    return [torch.randn(rows, width, generator=g, dtype=torch.float64) for rows in (20, 20, 12)] + [
        [torch.randn(out, width, generator=g, dtype=torch.float64) for out in (3, 5, 8)]]


def test_closed_form_is_the_minimum_of_equation_7():
    """Gradient zero at the solution, by autograd on the printed sum plus the ridge, for every W₀ alone."""
    E, E_star, P, W0s = problem()
    delta, _ = closed_form([(E, E_star, P)], 0.1, 0.05)
    ridge = 0.05 * ((E.T @ E).trace() + 0.1 * (P.T @ P).trace()).item() / 8
    for W0 in W0s:
        W = (W0 + W0 @ delta).requires_grad_()
        loss = naive_loss(W, W0, E, E_star, P, 0.1, ridge)
        loss.backward()
        assert W.grad.abs().max() < 1e-10 * loss.item()
        nearby = W.detach() + 1e-3 * torch.randn(W.shape, generator=rng(1), dtype=W.dtype)
        assert naive_loss(nearby, W0, E, E_star, P, 0.1, ridge) > loss


def test_one_matrix_equals_separate_solutions_per_layer():
    """32 layers solved one by one with an explicit inverse, as the peers do it."""
    E, E_star, P, _ = problem(width=12)
    delta, _ = closed_form([(E, E_star, P)], 0.1, 0.1)
    B = E.T @ E + 0.1 * P.T @ P
    ridge = 0.1 * B.trace() / 12 * torch.eye(12, dtype=B.dtype)
    W0 = {str(i): torch.randn(5 + i, 12, generator=rng(i), dtype=torch.float64) for i in range(32)}
    W = edited(W0, delta)
    for name in W0:
        right = sum(torch.outer(W0[name] @ t, c) for c, t in zip(E, E_star))
        right += 0.1 * sum(torch.outer(W0[name] @ p, p) for p in P) + W0[name] @ ridge
        assert torch.allclose(W[name].double(), right @ torch.linalg.inv(B + ridge), atol=1e-5)
        assert (W0[name] + W0[name] @ delta - right @ torch.linalg.inv(B + ridge)).abs().max() < 1e-10


def test_no_op_edit_gives_exactly_the_original():
    E, _, P, _ = problem()
    delta, _ = closed_form([(E, E, P)], 0.1, 0.1)
    W0 = {"a": torch.randn(5, 8)}
    assert torch.equal(delta, torch.zeros(8, 8, dtype=torch.float64))
    assert torch.equal(edited(W0, delta)["a"], W0["a"])


def test_a_lid_closes_the_hole_at_one_and_opens_it_at_three_and_moves_the_anchor():
    """docs/mining.md: with reach s and the lid, e* goes (s − 1)/2 of the way, and e comes back from
    e* + m (e* − e) at m = 1 + 2/(s − 1), no longer at 1/(s − 1)."""
    p, s = pair(D=64, n=3), 2.5
    e, anchor = p.block(), p.block_star()
    for lid, m in ((0.0, 1 / (s - 1)), (1.0, 1 + 2 / (s - 1))):
        one = Settings(M=0, N=0, reach=s, lid=lid)
        stay = anchor[:0] if lid else anchor                      # without a lid: the anchor stays
        E, E_star, _ = mine(p, one)
        delta, _ = closed_form([(E, E_star, stay)], 1.0, 1e-10)
        moved = anchor @ delta.T
        assert torch.allclose(moved, lid * (s - 1) / 2 * (anchor - e), atol=1e-5)
        hole = anchor + m * (anchor - e)
        assert torch.allclose(hole + hole @ delta.T, e, atol=1e-5)
    mirrored = 2 * anchor - e
    assert torch.allclose(mirrored + mirrored @ delta.T, anchor, atol=1e-5)


def test_large_ridge_gives_the_original():
    E, E_star, P, _ = problem()
    assert closed_form([(E, E_star, P)], 0.1, 1e12)[0].norm() < 1e-10


def test_one_row_is_interpolated_exactly_as_the_ridge_vanishes():
    E, E_star, P, W0s = problem()
    delta, _ = closed_form([(E[:1], E_star[:1], P[:0])], 0.1, 1e-10)
    assert torch.allclose((W0s[0] + W0s[0] @ delta) @ E[0], W0s[0] @ E_star[0], atol=1e-7)


def test_too_few_rows_without_ridge_are_refused_and_enough_are_not():
    E, E_star, P, _ = problem()
    with pytest.raises(UserError, match="lambda2"):
        closed_form([(E[:3], E_star[:3], P[:2])], 0.1, 0.0)
    assert closed_form([(E, E_star, P)], 0.1, 0.0)[0].isfinite().all()


def test_condition_number_is_that_of_B():
    E, E_star, P, _ = problem()
    B = E.T @ E + 0.1 * P.T @ P
    B += 0.2 * B.trace() / 8 * torch.eye(8, dtype=B.dtype)
    assert closed_form([(E, E_star, P)], 0.1, 0.2)[1] == pytest.approx(torch.linalg.cond(B, 1).item())


def test_order_of_concepts_is_moot_and_the_seed_gives_the_same_bytes():
    stay = torch.randn(1, 10, 16, generator=rng(9))
    pairs = [pair("airplane", 7), pair("ship", 8)]
    a, b = (erase_in_closed_form(pairs, stay, S)[0] for _ in range(2))
    assert torch.equal(a, b)
    mined = [realera.mine(p, S) for p in pairs]
    again = [realera.mine(p, S) for p in reversed(pairs)][::-1]
    assert all(torch.equal(x, y) for m, n in zip(mined, again) for x, y in zip(m, n))


def test_shares_weigh_like_repeated_rows():
    """share = True puts weight 1/M on each neighbor: Eq. 7 with every neighbor term divided by M."""
    p, s = pair(), Settings(M=4, N=2, share=True)
    E, E_star, P = realera.mine(p, s)
    near, near_star = neighbor_concepts(p.block(), p.block_star(), s, rng(p.seed))
    gram = p.block().T @ p.block() + sum(c.T @ c for c in near) / 4
    assert torch.allclose(E.T @ E, gram)
    assert torch.allclose(E_star.T @ E, p.block_star().T @ p.block()
                          + sum(t.T @ c for c, t in zip(near, near_star)) / 4)
    assert len(P) == 2 * p.n


def test_reach_moves_the_target_beyond_the_anchor():
    """reach = 2: e goes to e + 2 (e* − e), and the neighbors' targets along; E and P stay as they are."""
    p = pair()
    once, twice = (realera.mine(p, Settings(M=3, N=2, reach=reach)) for reach in (1.0, 2.0))
    assert torch.equal(once[0], twice[0]) and torch.equal(once[2], twice[2])
    shift = (p.block_star() - p.block()).repeat(4, 1)
    assert torch.allclose(twice[1] - once[1], shift)


def stacked(pairs, stay, s, times):
    """Eq. 7 with every concept's rows stacked, as E, E*, P; rows of `stay` count `times` each, those of
    beyond-concepts together as much as one concept's."""
    E, E_star, P = (torch.cat(rows) for rows in zip(*(realera.mine(p, s) for p in pairs)))
    P = torch.cat([P / math.sqrt(len(pairs)), *[stay.double().flatten(0, 1)] * times])
    B = E.T @ E + s.lambda1 * P.T @ P
    B += s.lambda2 * B.trace() / len(B) * torch.eye(len(B), dtype=B.dtype)
    return torch.cholesky_solve(E.T @ (E_star - E), torch.linalg.cholesky(B)).T


def test_one_concept_has_the_bytes_of_stacked_rows_and_many_count_what_must_stay_for_each():
    stay = torch.randn(3, 10, 16, generator=rng(9))
    for lambda1 in (1.0, 0.1):
        s = Settings(M=8, N=3, lambda1=lambda1)
        assert torch.equal(erase_in_closed_form([pair()], stay, s)[0], stacked([pair()], stay, s, 1))
        for n in (2, 5, 10):
            pairs = [pair(f"concept {i}", i) for i in range(n)]
            found = erase_in_closed_form(pairs, stay, s)[0]
            assert (found - stacked(pairs, stay, s, n)).abs().max() < 1e-10 < 1e-4 < (
                found - stacked(pairs, stay, s, 1)).abs().max()


def test_the_rows_of_one_concept_at_a_time_are_held(monkeypatch):
    """A hundred of them at SD's size would be 10 GB."""
    alive, mine = [], realera.mine

    def watched(p, s):
        assert sum(x() is not None for x in alive) <= 6           # the last concept's, and their joined P's
        found = mine(p, s)
        alive.extend(map(weakref.ref, found))
        return found

    monkeypatch.setattr(realera, "mine", watched)
    pairs = [pair(f"concept {i}", i) for i in range(20)]
    erase_in_closed_form(pairs, torch.randn(1, 10, 16), Settings(M=3, N=2))
    assert len(alive) == 60


TEXTS = [text for entry in read_json(BOOK)["classes"].values()
         for text in entry["synonyms"] + entry["associated"]]
WORDS = [word for text in TEXTS for word in text.split()
         if len(word) > 3 and word not in [*nouns("preserved"), *nouns("watched")]]
MANY = list(dict.fromkeys(CLASSES + WORDS))[:100]


@pytest.mark.parametrize("n, most", [(1, 0.22), (2, 0.21), (5, 0.28), (10, 0.34), (100, 0.55)])
def test_other_prompts_drift_little_more_when_more_is_erased(text, n, most):
    """0.21, 0.22, 0.29, 0.38, 0.70 if what must stay counted once. The concepts still arrive at their
    anchors: their mean share of the way is 1 or more. (Few neighbors, for speed, so a tenth of λ1.)"""
    pairs, s = make_pairs(MANY[:n], None, "object", text, "tail", 0), Settings(M=10, N=3, lambda1=3)
    delta = erase_in_closed_form(pairs, text(preserved_prompts("object", pairs)), s)[0]
    assert drifts(delta, pairs, text)["median drift of unrelated prompts"] < most
    shifts = [p.block_star() - p.block() for p in pairs]
    shares = [(p.block() @ delta.T * shift).sum() / shift.square().sum() for p, shift in zip(pairs, shifts)]
    assert len(pairs) == n and sum(shares) / n > 0.99


def test_the_advice_of_the_warning_helps(here, tmp_path, capsys):
    """Ten concepts, hardly a weight on what must stay: the warning names lambda1, and a larger one helps."""
    (tmp_path / "many.txt").write_text("\n".join(CLASSES))
    args = ["--concepts", "many.txt", "--lora-steps", 0, "--no-pictures", "--set", "M=10", "N=3"]
    here("realera.py", *args, "lambda1=0.005", cwd=tmp_path)
    error = capsys.readouterr().err
    assert "moves far more than the concept; try a larger lambda1, or fewer concepts" in error
    here("realera.py", *args, "lambda1=1", "--out", "b", cwd=tmp_path)
    assert "far more" not in capsys.readouterr().err


def test_pairs_shuffled_give_the_same_edit_through_make_pairs():
    text = Text(ROOT / "mini")
    names = [("airplane", "sky"), ("ship", "street"), ("frog", "ground")]
    edits = []
    for order in range(2):
        random.Random(order).shuffle(names)
        pairs = make_pairs([c for c, _ in names], [a for _, a in names], "object", text, "tail", 0)
        edits.append(erase_in_closed_form(pairs, text([""]), S)[0])
    assert torch.equal(*edits)


# ---- noise alignment ----

class Toy(torch.nn.Module):
    """A noise predictor with one cross-attention of width 8: eps(z, t, c) [B, 4, 2, 2]."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.attn2 = torch.nn.Module()
        self.attn2.to_k, self.attn2.to_v = (torch.nn.Linear(16, 8, bias=False),
                                            torch.nn.Linear(16, 8, bias=False))
        self.to_q, self.out = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

    def forward(self, z, t, c):
        q = self.to_q(z.flatten(2).transpose(1, 2))                                   # [B, 4, 8]
        a = (q @ self.attn2.to_k(c).transpose(1, 2)).softmax(-1) @ self.attn2.to_v(c)
        return (self.out(a).transpose(1, 2).reshape(z.shape)
                * (1 + torch.as_tensor(t).view(-1, 1, 1, 1) / 1000))


class ToyModel:
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        self.unet = Toy().requires_grad_(False)


def test_losses_equal_equations_8_and_9_term_by_term():
    eps, g = Toy(), rng()
    z, target, beyond_target = (torch.randn(3, 4, 2, 2, generator=g) for _ in range(3))
    c, beyond = (torch.randn(3, 10, 16, generator=g) for _ in range(2))
    t = torch.tensor([1, 500, 981])
    odd = sum(((eps(z[i:i + 1], t[i], c[i:i + 1]) - target[i]) ** 2).sum() for i in range(3)) / z.numel()
    second = sum(((eps(z[i:i + 1], t[i], beyond[i:i + 1]) - beyond_target[i]) ** 2).sum()
                 for i in range(3)) / z.numel()
    for args, terms in (((), [odd]), ((beyond, beyond_target), [odd, second])):
        found = [term.item() for term in noise_alignment_loss(eps, z, t, target, c, *args)]
        assert found == pytest.approx([term.item() for term in terms], rel=1e-5)


def aligned(lora_steps=60, lr=1e-2, **counts):
    model, p = ToyModel(), pair()
    W0 = {f"attn2.{k}.weight": model.unet.get_parameter(f"attn2.{k}.weight").clone()
          for k in ("to_k", "to_v")}
    s = Settings(**{"lora_steps": lora_steps, "lr": lr, "trajectories": 4, "M": 3, "N": 3} | counts)
    W = edited(W0, erase_in_closed_form([p], torch.randn(1, 10, 16, generator=rng(9)), s)[0])
    z, t = torch.randn(4, 5, 4, 2, 2, generator=rng(2)), torch.tensor([981, 781, 581, 381, 181])
    c = p.e_star.float().expand(5, -1, -1)
    ways = Trajectories(z, t, torch.stack([model.unet(z[i], t, c) for i in range(4)]))
    before = {k: v.clone() for k, v in model.unet.named_parameters()}
    add_lora(model.unet, 4)
    realera.put_weights(model.unet, {name: matrix.clone() for name, matrix in W.items()})
    losses = align_noise(model, [p], [ways], W0, s)
    return model, W0, W, losses, before


def test_alignment_lowers_both_losses_on_held_out_latents_and_touches_only_the_lora():
    model, W0, W, losses, before = aligned()
    assert losses["Eq. 8"][1] < 0.9 * losses["Eq. 8"][0]
    assert losses["Eq. 9"][1] < losses["Eq. 9"][0]
    for name, value in model.unet.named_parameters():
        if "lora" not in name:
            assert torch.equal(value, W.get(name, before.get(name)))


def test_a_loss_that_becomes_nan_ends_the_run_and_says_where(monkeypatch):
    calls = []

    def loss(eps, z, *args):
        calls.append(len(z) == S.batch)                           # training; what is measured is larger
        for term in noise_alignment_loss(eps, z, *args):
            yield term * (math.nan if sum(calls) >= 4 and calls[-1] else 1)

    monkeypatch.setattr(realera, "noise_alignment_loss", loss)
    with pytest.raises(UserError, match="the loss became NaN at step 4: try a smaller lr"):
        aligned(lora_steps=6)


def test_no_steps_change_no_loss():
    _, _, _, losses, _ = aligned(lora_steps=0)
    assert losses["Eq. 8"][0] == losses["Eq. 8"][1] and losses["Eq. 9"][0] == losses["Eq. 9"][1]


def test_without_neighbors_or_beyond_concepts_alignment_has_neither(monkeypatch):
    """Table 3: variant 2 trains on Eq. 8 alone, variant 3 on Eq. 9 without its second term."""
    terms = []

    def loss(eps, z, t, target, c, beyond=None, beyond_target=None):
        terms.append((not torch.equal(c, pair().e.expand(len(z), -1, -1)), beyond is not None))
        return noise_alignment_loss(eps, z, t, target, c, beyond, beyond_target)

    monkeypatch.setattr(realera, "noise_alignment_loss", loss)
    for counts, kinds, names in (({}, {(False, False), (True, True)}, {"Eq. 8", "Eq. 9"}),
                                 ({"N": 0}, {(False, False), (True, False)}, {"Eq. 8", "Eq. 9"}),
                                 ({"M": 0, "N": 0}, {(False, False)}, {"Eq. 8"})):
        terms.clear()
        assert aligned(4, **counts)[3].keys() == names
        assert set(terms) == kinds


def test_a_terms_graph_is_freed_before_the_next_terms_is_built(monkeypatch):
    """At SD's size each takes 5 GiB in bfloat16: see test_memory_of_an_even_step_at_sd_size."""
    kept, steps = [], []

    def loss(eps, *args):
        def watched(*inputs):
            assert not any(y() is not None for y in kept)
            y = eps(*inputs)
            kept.append(weakref.ref(y))
            return y.sin()                                        # whose graph holds y
        steps.append(len(args))
        return noise_alignment_loss(watched, *args)

    monkeypatch.setattr(realera, "noise_alignment_loss", loss)
    aligned(lora_steps=4)
    assert steps.count(6) >= 2


def test_alignment_gives_the_same_bytes_from_the_same_seed():
    a, b = (aligned(lora_steps=6)[0] for _ in range(2))
    for x, y in zip(lora_layers(a.unet).values(), lora_layers(b.unet).values()):
        assert torch.equal(x.lora_B, y.lora_B) and x.lora_B.abs().max() > 0


def test_teacher_is_the_original_and_the_student_comes_back_even_after_an_error():
    model, W0, W, _, _ = aligned(lora_steps=4)
    clean, x = ToyModel().unet, torch.randn(1, 4, 2, 2, generator=rng(3))
    c = torch.randn(1, 10, 16, generator=rng(4))
    student = model.unet(x, 5, c)
    with pytest.raises(RuntimeError), as_teacher(model.unet, W0) as teacher:
        assert torch.equal(teacher(x, 5, c), clean(x, 5, c))
        raise RuntimeError
    assert torch.equal(model.unet(x, 5, c), student) and not torch.equal(student, clean(x, 5, c))


def test_gradients_of_half_precision_do_not_underflow():
    """The first Adam step has the signs of the gradient: nearly the same ones in float16 as in float32."""
    signs = []
    for dtype in (torch.float32, torch.float16):
        model = Model(MINI, dtype=dtype)
        model.defaults["steps"] = 2
        s = realera.Settings(lora_steps=1, trajectories=2, batch=1, M=0, N=0)
        pairs = make_pairs(["airplane"], ["sky"], "object", model.text, s.rows, 0)
        W0 = cross_attention(MINI)
        delta, _ = realera.erase_in_closed_form(pairs, model.text([""]), s)
        ways = [Trajectories(*model.trajectories(pairs[0].e_star, model.text([""])[0], pairs[0].seed, 2))]
        realera.add_lora(model.unet, s.rank)
        realera.put_weights(model.unet, realera.edited(W0, delta))
        realera.align_noise(model, pairs, ways, W0, s)
        signs.append(torch.cat([layer.lora_B.detach().flatten().sign()
                                for layer in realera.lora_layers(model.unet).values()]))
    assert (signs[0] == signs[1]).float().mean() > 0.9


# ---- what a GPU would do, counted without one ----

CPU = torch.device("cpu")
PROMPT, T = ["a photo of an airplane"], 5


class Waits(TorchDispatchMode):
    """Counts, on the meta device in a GPU's place, what a GPU would have to be waited for: numbers, tensors
    read from it (zeros here), and tensors sent to it, indices among them, but for pinned ones. Numbers on the
    CPU, of no dimension, go along with a kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = [x.is_meta for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
                 and (x.is_meta or x.dim() or op is torch.ops.aten._to_copy.default)]
        if op is torch.ops.aten._local_scalar_dense.default and any(there):
            self.count += 1
            return 1.0
        if op is torch.ops.aten._to_copy.default and any(there) and kwargs.get("device") == CPU:
            self.count += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype"))
        found = op(*args, **kwargs)
        sent = not all(there) and isinstance(found, torch.Tensor) and found.is_meta
        self.count += sent and not kwargs.get("non_blocking")
        return found


def test_no_step_of_drawing_or_training_waits_for_the_gpu(tiny):
    def waits(run, *args):
        with Waits() as found:
            run(*args)
        return found.count

    there, s, W0 = Model(tiny, "meta"), realera.Settings(lora_steps=2, batch=2), cross_attention(tiny)
    pairs = make_pairs(["airplane"], ["sky"], "object", Text(tiny), s.rows, 0)
    way = pairs[0].e_star, torch.zeros_like(pairs[0].e_star), 0, s.trajectories
    there.defaults["steps"] = 3
    assert waits(there.draw, PROMPT, [1]) == 3                    # ids, noise; the picture
    assert waits(there.trajectories, *way) == 2                   # rows, noise
    ways = [Trajectories(*there.trajectories(*way))]
    add_lora(there.unet, 2)
    assert waits(realera.align_noise, there, pairs, ways, W0, s) == len(W0) + 5  # losses, twice; each step


class Held(TorchDispatchMode):
    """Adds up what tensors on the meta device, in a GPU's place, would take: GiB now, and at most."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **kwargs or {})
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and (memory := x.untyped_storage())._cdata not in self.known:
                self.known.add(memory._cdata)
                self.now += memory.nbytes() / 2 ** 30
                self.most = max(self.most, self.now)
                weakref.finalize(memory, self.free, memory._cdata, memory.nbytes() / 2 ** 30)
        return found

    def free(self, key, gib):
        self.known.remove(key)
        self.now -= gib


@pytest.mark.parametrize("low_memory, weights, added", [(False, 1.6, 5.75), (True, 1.6, 1.3)])
def test_memory_of_an_even_step_at_sd_size(low_memory, weights, added, monkeypatch):
    """In bfloat16, with a GPU's attention, counted: what a GPU's convolutions need to work is not in it."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *qkv: torch.ops.aten._scaled_dot_product_flash_attention(*qkv)[0])
    with torch.device("meta"), Held() as held:
        unet = UNet().to(torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_(False)
        unet.low_memory = low_memory
        add_lora(unet, 4)
        z, c = torch.empty(8, 4, 64, 64).bfloat16(), torch.empty(8, 77, 768).bfloat16()
        before = held.most = held.now
        assert before == pytest.approx(weights, abs=0.05)
        for term in realera.noise_alignment_loss(unet, z, T, z, c, c, z):
            term.backward()
    assert held.most - before == pytest.approx(added, abs=0.05)


# ---- the command ----

def pixels(path):
    return np.asarray(PIL.Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def edit(quick, tmp_path_factory):
    """An erasure with two LoRA steps, made once."""
    folder = tmp_path_factory.mktemp("edit")
    done = run("realera.py", *AIRPLANE, *QUICK, "--model", quick, cwd=folder)
    return folder / "out/airplane", done.stdout


def test_erasing_writes_the_edit_and_reports(edit):
    out, printed = edit
    assert sorted(p.name for p in out.iterdir()) == ["before_after.png", "before_after.svg",
                                                     "erased.safetensors", "report.html",
                                                     "residual_lora.safetensors", "run.json"]
    for part in ("cond(B)", "‖ΔW‖/‖W‖", 'drift of ""', "Eq. 8", "Eq. 9", "a photo of the airplane",
                 "seconds:"):
        assert part in printed
    report = json.loads((out / "run.json").read_text())
    assert report["seconds"].keys() == {"text", "closed form", "trajectories", "noise alignment", "pictures"}
    assert len(report["table"]) == 8 and report["table"][0]["prompt"] == "a photo of the airplane"
    with safe_open(out / "erased.safetensors", "pt") as file:
        about = json.loads(file.metadata()["edit"])
    assert about["concepts"] == ["airplane"] and about["anchors"] == ["sky"] and about["method"] == "RealEra"
    assert about["settings"]["lora_steps"] == 2 and len(about["base_hash"]) == 64


def test_where_the_closed_form_sends_the_concept_eq_8_has_nothing_to_learn(narrow):
    """The edited matrices on e are the original ones on (I + Δ) e: aimed there, Eq. 8 is 0 from the start."""
    model, losses = Model(narrow), {}
    for aim in ("anchor", "closed"):
        _, report = erase_with(realera, model, "airplane", "sky", aim=aim, lora_steps=1, trajectories=2,
                               batch=1)
        losses[aim] = report["losses"]
    assert losses["closed"]["Eq. 8"][0] < 1e-6 * losses["anchor"]["Eq. 8"][0]
    assert losses["closed"]["Eq. 9"][0] > 1e-3 * losses["anchor"]["Eq. 9"][0]   # neighbors are not there


def test_the_edit_is_closed_form_plus_lora_in_the_dtype_of_the_file(edit):
    out, _ = edit
    W0, W = cross_attention(MINI), load_file(out / "erased.safetensors")
    assert W.keys() == W0.keys() and all(W[k].dtype == W0[k].dtype and W[k].shape == W0[k].shape for k in W)
    text, s = Text(MINI), realera.Settings()
    pairs = make_pairs(["airplane"], ["sky"], "object", text, s.rows, 0)
    stay = text(preserved_prompts("object", pairs))
    expected = realera.edited(W0, realera.erase_in_closed_form(pairs, stay, s)[0])
    lora = load_file(out / "residual_lora.safetensors")
    for name, matrix in expected.items():
        layer = f"unet.{name.removesuffix('.weight')}"
        matrix = matrix + lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
        assert torch.equal(W[name], matrix.to(W[name].dtype))


def test_edit_loads_in_diffusers_and_gives_our_pictures(edit):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(MINI)
    missing, unexpected = pipe.unet.load_state_dict(load_file(edit[0] / "erased.safetensors"), strict=False)
    assert unexpected == []
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    ours = Model(MINI)
    ours.put(read_edit(edit[0], MINI))
    theirs = pipe("a photo of the airplane", latents=ours.noise([1]), num_inference_steps=5,
                  guidance_scale=3.0, height=SIZE, width=SIZE, output_type="pt").images
    picture = ours.draw(["a photo of the airplane"], [1], steps=5, guidance=3.0)
    assert (picture - theirs.float()).abs().max() <= 1 / 255
    before = Model(MINI).draw(["a photo of the airplane"], [1], steps=5, guidance=3.0)
    assert (picture - before).abs().max() > 0.1


def test_before_after_picture_has_a_row_per_prompt(edit):
    height, width, _ = pixels(edit[0] / "before_after.png").shape
    side = (width - 2) // 2
    assert height == 8 * side + 2


def test_same_seed_same_bytes_and_the_order_of_concepts_is_moot(tmp_path):
    args = ["--lora-steps", 0, "--no-pictures"]
    run("realera.py", *AIRPLANE, *SHIP, *args, "--out", "a", cwd=tmp_path)
    run("realera.py", *SHIP, *AIRPLANE, *args, "--out", "b", cwd=tmp_path)
    run("realera.py", *SHIP, *AIRPLANE, *args, "--out", "c", "--seed", 1, cwd=tmp_path)
    paths = [tmp_path / x / "erased.safetensors" for x in "abc"]
    a, b, c = map(load_file, paths)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_low_memory_erases_to_the_same_bytes(quick, tmp_path, monkeypatch):
    """The teacher's matrices are in place while it predicts, not while the student's blocks run again."""
    monkeypatch.chdir(tmp_path)
    flags = ["--concept", "airplane", "--anchor", "sky", "--no-pictures", "--lora-steps", "2",
             "--device", "cpu", "--model", str(quick), "--set", "trajectories=2", "batch=2"]
    for out, more in (("a", []), ("b", ["--low-memory"])):
        monkeypatch.setattr(sys, "argv", ["realera.py", *flags, "--out", out, *more])
        runpy.run_path(str(ROOT / "realera.py"), run_name="__main__")
    a, b = (load_file(tmp_path / out / "erased.safetensors") for out in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_erasing_from_sd_2_1(sd21, here, tmp_path, capsys):
    """Closed form and LoRA, of a network that predicts v; what they write means the same in diffusers."""
    here("realera.py", *AIRPLANE, "--model", sd21, *QUICK, "--no-pictures", "--out", "edit", cwd=tmp_path)
    printed = capsys.readouterr().out
    assert "Eq. 8" in printed and "Eq. 9" in printed
    edit, W0 = load_file(tmp_path / "edit/erased.safetensors"), cross_attention(sd21)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd21)
    assert edit.keys() == W0.keys() and not any(torch.equal(edit[name], W0[name]) for name in W0)
    assert pipe.unet.load_state_dict(edit, strict=False).unexpected_keys == []
    ours = Model(sd21)
    ours.put(read_edit(tmp_path / "edit", sd21))
    same_pictures(ours, pipe)


def test_bad_input_ends_a_process_with_status_2_and_one_line(tmp_path):
    """The same as a user sees it, once."""
    done = run("realera.py", "--concept", "", cwd=tmp_path, status=2)
    assert done.stderr == "error: --concept is empty\n" and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("args, match", [
    (["--concept", ""], "empty"), (["--concept", "  "], "empty"),
    (["--concept", "sky", "--anchor", " Sky"], "own anchor"),
    ([], "--concept.*; try: python realera.py --concept airplane --anchor sky$"),
    ([*AIRPLANE, "--n", "five"], "invalid int value: 'five'; try: python realera.py"),
    ([*AIRPLANE, "--set", "reach=nan"], "reach = nan"), ([*AIRPLANE, "--set", "reach=inf"], "reach = inf"),
    ([*AIRPLANE, "--set", "reach=1e30"], "reach = 1e"), ([*AIRPLANE, "--set", "D1_anchor=inf"], "D1_anchor"),
    ([*AIRPLANE, "--set", "lr=inf"], "lr = inf"), ([*AIRPLANE, "--set", "M=1000000000"], "M = 1000000000"),
    ([*AIRPLANE, "--lora-steps", "1000000000"], "lora_steps = 1000000000"),
    (["--concepts", "nowhere.txt"], "--concepts nowhere.txt is not there"),
    ([*AIRPLANE, "--concepts", "x.txt"], "not allowed with"),
    (["--concepts", "x.txt", "--anchor", "sky"], "anchors stand in the file"),
    (["--concept", "a", "--concept", "b", "--anchor", "sky"], "2 concepts but 1 anchor"),
    (["--concept", "cat", "--concept", "Cat"], "twice"), (["--concept", "cat " * 60], "fit into 32"),
    ([*AIRPLANE, "--set", "S1=0.5", "S2=0.6"], "S2"), ([*AIRPLANE, "--set", "D2=0.1"], "D2"),
    ([*AIRPLANE, "--set", "M=-1"], "M"), ([*AIRPLANE, "--lora-steps", "-1"], "lora_steps"),
    ([*AIRPLANE, "--set", "lambda2=0", "M=0", "N=0", "real_prompts=false"], "lambda2"),
    ([*AIRPLANE, "--set", "M=five"], "M="),
    ([*AIRPLANE, "--set", "D7=1"], "no setting"), ([*AIRPLANE, "--set", "D1=0.01"], "neighbor"),
    ([*AIRPLANE, "--n", "0"], "--n"), ([*AIRPLANE, "--device", "cuda"], "not available"),
    ([*AIRPLANE, "--model", "nowhere"], "no such folder"), ([*AIRPLANE, "--seed", "-1"], "seed"),
    ([*AIRPLANE, "--out", ".", "--overwrite"], "no edit folder")])
def test_realera_refuses_bad_input(refused, tmp_path, args, match):
    refused("realera.py", *args, cwd=tmp_path, match=match)


# ---- how the code reads ----

def test_every_displayed_equation_is_named_exactly_once():
    sources = [*ROOT.glob("*.py"), ROOT / "mini/train.py"]
    named = re.findall(r"# Eq\. \((\d+)\)", "\n".join(path.read_text() for path in sources))
    assert sorted(map(int, named)) == list(range(1, 10))
