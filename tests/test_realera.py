"""The method: each equation computed a second, naive way, and what must hold by construction."""
import math
import random
import re
import weakref
from pathlib import Path

import pytest
import torch

import realera
from erasing import Pair, edited, make_pairs
from lora import add_lora, lora_layers
from plumbing import UserError
from realera import (Settings, Trajectories, align_noise, beyond_concepts, closed_form, erase_in_closed_form,
                     neighbor_concepts, noise_alignment_loss, original, radius_at, towards_noise)
from sample import Text

ROOT = Path(__file__).parent.parent
S = Settings()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


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
    for target, expected in ((0.9, 0.46), (0.7, 0.71), (0.5, 0.90), (0.3, 1.07)):
        assert radius_at(target, e, towards_noise(e, rng(2))) == pytest.approx(expected, abs=0.015)
    assert radius_at(-0.99, e, towards_noise(e, rng(2))) == math.inf


def test_neighbors_satisfy_equations_3_to_6():
    e, e_star = block(1), block(2)
    s = Settings(M=200, D1=0.8, D1_anchor=0.3, S1=0.95, S2=0.55)
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


@pytest.mark.parametrize("bad", [dict(S1=0.5, S2=0.5), dict(S2=0.9, S1=0.8), dict(D1=2.0, D2=1.0), dict(M=-1),
                                 dict(N=-1), dict(lambda2=-1.0), dict(rank=0), dict(lora_steps=-1),
                                 dict(rows="all"), dict(S1=1.5), dict(lr=0.0), dict(D1=0.0),
                                 dict(trajectories=1), dict(D1=math.nan)])
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
    delta, _ = closed_form(E, E_star, P, 0.1, 0.05)
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
    delta, _ = closed_form(E, E_star, P, 0.1, 0.1)
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
    delta, _ = closed_form(E, E, P, 0.1, 0.1)
    W0 = {"a": torch.randn(5, 8)}
    assert torch.equal(delta, torch.zeros(8, 8, dtype=torch.float64))
    assert torch.equal(edited(W0, delta)["a"], W0["a"])


def test_large_ridge_gives_the_original():
    E, E_star, P, _ = problem()
    assert closed_form(E, E_star, P, 0.1, 1e12)[0].norm() < 1e-10


def test_one_row_is_interpolated_exactly_as_the_ridge_vanishes():
    E, E_star, P, W0s = problem()
    delta, _ = closed_form(E[:1], E_star[:1], P[:0], 0.1, 1e-10)
    assert torch.allclose((W0s[0] + W0s[0] @ delta) @ E[0], W0s[0] @ E_star[0], atol=1e-7)


def test_too_few_rows_without_ridge_are_refused_and_enough_are_not():
    E, E_star, P, _ = problem()
    with pytest.raises(UserError, match="lambda2"):
        closed_form(E[:3], E_star[:3], P[:2], 0.1, 0.0)
    assert closed_form(E, E_star, P, 0.1, 0.0)[0].isfinite().all()


def test_condition_number_is_that_of_B():
    E, E_star, P, _ = problem()
    B = E.T @ E + 0.1 * P.T @ P
    B += 0.2 * B.trace() / 8 * torch.eye(8, dtype=B.dtype)
    assert closed_form(E, E_star, P, 0.1, 0.2)[1] == pytest.approx(torch.linalg.cond(B, 1).item())


def pair(name="airplane", seed=7, T=10, D=16, n=6):
    g = rng(seed)
    e, e_star = (torch.randn(T, D, generator=g, dtype=torch.float64) for _ in range(2))
    return Pair(name, "sky", e, e_star, T - n, T - n - 1, n, seed)


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


def test_pair_puts_blocks_where_they_belong():
    p = pair()
    assert torch.equal(p.block(), p.e[4:]) and torch.equal(p.block_star(), p.e_star[3:9])
    context = p.context(torch.zeros(2, 6, 16, dtype=torch.float64))
    assert torch.equal(context[1, :4], p.e[:4]) and context[:, 4:].abs().max() == 0


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
    with pytest.raises(RuntimeError), original(model.unet, W0) as teacher:
        assert torch.equal(teacher(x, 5, c), clean(x, 5, c))
        raise RuntimeError
    assert torch.equal(model.unet(x, 5, c), student) and not torch.equal(student, clean(x, 5, c))


# ---- how the code reads ----

def test_every_displayed_equation_is_named_exactly_once():
    sources = [*ROOT.glob("*.py"), ROOT / "mini/train.py"]
    named = re.findall(r"# Eq\. \((\d+)\)", "\n".join(path.read_text() for path in sources))
    assert sorted(map(int, named)) == list(range(1, 10))


def test_pairs_shuffled_give_the_same_edit_through_make_pairs():
    text = Text(ROOT / "mini")
    names = [("airplane", "sky"), ("ship", "street"), ("frog", "ground")]
    edits = []
    for order in range(2):
        random.Random(order).shuffle(names)
        pairs = make_pairs([c for c, _ in names], [a for _, a in names], "object", text, "tail", 0)
        edits.append(erase_in_closed_form(pairs, text([""]), S)[0])
    assert torch.equal(*edits)
