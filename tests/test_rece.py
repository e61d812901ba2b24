"""RECE: the one-matrix algebra against the authors' loop over layers, and the command as typed by a user."""
import json
import types

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file

import rece
from erasing import Pair, edited
from helpers import AIRPLANE, MINI, SIZE, random
from plumbing import UserError
from plumbing.edits import about_edit, cross_attention, gram, read_edit, write_edit
from rece import Settings, derive, erase_rows, iterate, regained
from sample import Model
from starts import run

D, I = 8, torch.eye(8, dtype=torch.float64)


def problem(started: bool):
    """Two concepts of five rows in 8 dimensions, ten matrices: W₀, W₁, e, e*, "". W₁ ≠ W₀ T for any T if not
    started from W₀: an edit with a LoRA."""
    W0 = {str(i): random(3 + i, D, seed=i) for i in range(10)}
    W1 = W0 if started else {name: W + 0.3 * random(*W.shape, seed=50 + i)
                             for i, (name, W) in enumerate(W0.items())}
    return W0, W1, random(10, D, seed=90), random(10, D, seed=91), random(5, D, seed=92)


# ---- the authors' formulation: every matrix for itself, sums row by row, explicit inverses ----

def naive_erase(W, rows, targets, stay, l1, s_e, s_p):
    """W ← (l₁ W + s_e Σ (W e_t) e_advᵀ + s_p Σ (W r) rᵀ) (l₁ I + s_e Σ e_adv e_advᵀ + s_p Σ r rᵀ)⁻¹."""
    out = {}
    for name, matrix in W.items():
        left, B = l1 * matrix, l1 * torch.eye(matrix.shape[1], dtype=matrix.dtype)
        for weight, x, t in [(s_e, *row) for row in zip(rows, targets)] + [(s_p, r, r) for r in stay]:
            left, B = left + weight * torch.outer(matrix @ t, x), B + weight * torch.outer(x, x)
        out[name] = left @ torch.linalg.inv(B)
    return out


def naive_derive(W, W0, e, lam, towards):
    A = sum(matrix.T @ matrix for matrix in W.values())
    inverse = torch.linalg.inv(A + lam * torch.eye(len(A), dtype=A.dtype))
    return torch.stack([inverse @ (sum(W[name].T @ (W0[name] @ row) for name in W) + lam * t)
                        for row, t in zip(e, towards)])


def naive_missed(W, W0, e_adv, e):
    return sum((W[name] @ x - W0[name] @ y).square().sum() for name in W for x, y in zip(e_adv, e))


def apart(W, V):
    return max((W[name] - V[name]).abs().max().item() for name in W)


# ---- the algebra ----

def test_as_lambda_vanishes_the_untouched_model_needs_the_concept_itself():
    W0, _, e, e_star, _ = problem(True)
    G = gram(W0, W0)
    assert torch.linalg.eigvalsh(G).min() > 1
    assert (derive(I, G, G, e, 1e-12) - e).abs().max() < 1e-10
    assert (derive(I, G, G, e, 10.0) - e).abs().max() > 0.1
    assert derive(I, G, G, e, 1e12).abs().max() < 1e-8
    assert (derive(I, G, G, e, 1e12, e_star) - e_star).abs().max() < 1e-8


@pytest.mark.parametrize("regularizer", ["zero", "target"])
@pytest.mark.parametrize("started", [True, False])
def test_three_rounds_equal_a_loop_over_layers(started, regularizer):
    """Derived rows, all weights and regained() after each round; from Eq. 7's start and from another edit."""
    W0, W1, e, e_star, stay = problem(started)
    s, W, T = Settings(regularizer=regularizer, lam=0.7, l1=0.4, erase=1.3, retain=0.2), W1, I
    if started:
        T = I + erase_rows(e[3:], e_star[3:], stay, 0.5, 0.8, 0.9)
        W = naive_erase(W1, e[3:], e_star[3:], stay, 0.5, 0.8, 0.9)
        assert apart({name: W1[name] @ T for name in W1}, W) < 1e-8 < 0.1 < apart(W, W1)
    G, C, G0 = gram(W1, W1), gram(W1, W0), gram(W0, W0)
    rounds = list(iterate(e, e_star, stay, T, G, C, s))
    assert len(rounds) == 3
    for before, e_adv, T in rounds:
        expected = naive_derive(W, W0, e, 0.7, e_star if regularizer == "target" else 0 * e)
        assert (e_adv - expected).abs().max() < 1e-8 < 0.1 < (e_adv - e).abs().max()
        W, old = naive_erase(W, expected, e_star, stay, 0.4, 1.3, 0.2), W
        assert apart({name: W1[name] @ T for name in W1}, W) < 1e-8 < 0.1 < apart(W, old)
        for at, weights in ((before, old), (T, W)):
            share = 1 - naive_missed(weights, W0, expected, e) / naive_missed(W0, W0, e_star, e)
            assert regained(at, G, C, G0, e, e_star, e_adv) == pytest.approx(share.item(), abs=1e-8)


@pytest.mark.parametrize("regularizer", ["zero", "target"])
def test_what_is_derived_is_the_minimum(regularizer):
    W0, W1, e, e_star, stay = problem(False)
    T = I + erase_rows(e, e_star, stay, 0.5, 1.0, 1.0)
    towards = e_star if regularizer == "target" else torch.zeros_like(e)

    def loss(x):
        return (sum((x @ (W1[name] @ T).T - e @ W0[name].T).square().sum() for name in W1)
                + 0.3 * (x - towards).square().sum())

    x = derive(T, gram(W1, W1), gram(W1, W0), e, 0.3, None if regularizer == "zero" else e_star)
    x.requires_grad_()
    loss(x).backward()
    assert x.grad.abs().max() < 1e-9 and loss(e).item() > 2 * loss(x).item()
    for seed in range(5):
        assert loss(x + 1e-3 * random(*x.shape, seed=seed)) > loss(x)


def test_after_a_round_keys_and_values_are_the_targets_but_for_the_predicted_residual():
    """By Woodbury's identity what is left of T (e* − e_adv) is a matrix over the m erased rows alone:
    T′ E_advᵀ − T E*ᵀ = −T (E* − E_adv)ᵀ (I + s_e H)⁻¹,  H = E_adv R⁻¹ E_advᵀ,  R = s_p Σ r rᵀ + l₁ I."""
    W0, W1, e, e_star, stay = problem(False)
    e, e_star, left = e[:4], e_star[:4], []                       # fewer rows than dimensions
    for l1, retain in ((0.1, 0.1), (1e-3, 0.0), (1e-4, 0.0)):
        s = Settings(rounds=1, l1=l1, retain=retain, erase=0.7)
        (T, e_adv, after), = iterate(e, e_star, stay, I, gram(W1, W1), gram(W1, W0), s)
        R = retain * stay.T @ stay + l1 * I
        H = e_adv @ torch.linalg.inv(R) @ e_adv.T
        predicted = -(e_star - e_adv).T @ torch.linalg.inv(torch.eye(4, dtype=H.dtype) + 0.7 * H)
        for W in W1.values():
            residual = W @ after @ e_adv.T - W @ T @ e_star.T     # [out, rows]: keys or values
            assert (residual - W @ T @ predicted).abs().max() < 1e-8
        left.append((predicted.norm() / (e_star - e_adv).norm()).item())
    assert 0.01 < left[0] < 0.5 and left[2] < 1e-3                # it vanishes like l₁ without "" to retain
    assert left[1] / left[2] == pytest.approx(10, rel=0.05)


def test_regained_is_1_for_the_concept_and_0_for_the_target():
    W0, _, e, e_star, _ = problem(True)
    G = gram(W0, W0)
    assert regained(I, G, G, G, e, e_star, e) == pytest.approx(1, abs=1e-12)
    assert regained(I, G, G, G, e, e_star, e_star) == pytest.approx(0, abs=1e-12)


def test_a_lambda_lost_beside_the_gram_matrix_is_an_error():
    G = I.clone()
    G[0, 1] = G[1, 0] = 1                                         # singular without a rounding error
    with pytest.raises(UserError, match="--lambda 1e-30"):
        derive(I, G, I, random(3, D, seed=0), 1e-30)


def test_drift_is_from_the_original_also_on_top_of_an_edit():
    """Of an edit W₁ = W₀ (I + Δ) the matrix that the drift is measured with is (I + Δ) T − I."""
    D, generator = 12, torch.Generator().manual_seed(0)
    W0 = {str(i): torch.randn(30, D, generator=generator).double() for i in range(3)}
    delta, T = (torch.randn(D, D, generator=generator).double() / 5 for _ in range(2))
    W1 = {name: W + W @ delta for name, W in W0.items()}
    I = torch.eye(D).double()
    moved = torch.linalg.solve(rece.gram(W0, W0), rece.gram(W1, W0).T @ (I + T)) - I
    assert torch.allclose(moved, (I + delta) @ (I + T) - I, atol=1e-10)


# ---- pictures ----

@pytest.fixture(scope="module")
def model():
    model = Model(MINI)
    model.defaults["steps"] = 2
    return model


def sheet(path):
    """A grid's cells, enlarged, as [rows, columns, 3, SIZE, SIZE] in [0, 1]."""
    pixels = torch.from_numpy(np.array(PIL.Image.open(path))).permute(2, 0, 1)[:, 2:, 2:]
    zoom = max(1, 96 // SIZE)
    step = zoom * SIZE + 2
    cells = pixels.unfold(1, step, step).unfold(2, step, step)[..., :step - 2:zoom, :step - 2:zoom]
    return cells.permute(1, 2, 0, 3, 4) / 255


def test_pictures_of_a_round_are_drawn_from_each_concepts_rows_before_and_after(model, tmp_path):
    W0, width = cross_attention(MINI), model.text([""]).shape[2]
    names = ["a photo of the ship", "a photo of the cat"]
    e = model.text(names).double()
    pairs = [Pair(name.split()[-1], "sky", row, row, 5, 5, 27, 0) for name, row in zip(names, e)]
    same = torch.eye(width, dtype=torch.float64)
    job = types.SimpleNamespace(folder=tmp_path, model=model, pairs=pairs, seed=7, task="object")
    said = rece.draw_rounds(job, {}, W0, [(same, e.flatten(0, 1), 0.2 * same)], 2)
    assert [line.split(":")[0] for line in said] == ["round 1, ship", "round 1, cat"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round1.png", "round1.svg"]
    left, right = sheet(tmp_path / "round1.png").split(2, 1)                  # two pictures before, two after
    rece.put_weights(model.unet, edited(W0, 0 * same))
    expected = model.draw([name for name in names for _ in range(2)], [7, 8] * 2).unflatten(0, (2, 2))
    assert (left - expected).abs().max() <= 0.5 / 255 + 1e-6 and (right - left).abs().max() > 0.1
    other = {"conv_out.bias": model.unet.conv_out.bias.data + 0.3}            # a start beyond keys and values
    rece.draw_rounds(job, other, W0, [(same, e.flatten(0, 1), 0.2 * same)], 2)
    rece.put_weights(model.unet, other | edited(W0, 0 * same))
    expected = model.draw([name for name in names for _ in range(2)], [7, 8] * 2).unflatten(0, (2, 2))
    now = sheet(tmp_path / "round1.png").split(2, 1)[0]
    assert (now - expected).abs().max() <= 0.5 / 255 + 1e-6 and (now - left).abs().max() > 0.1


# ---- the command ----

def rows_by_hand(text, concept, anchor):
    """e, e* [32, D], and the rows of the first erasure: from the last concept token on (5 tokens precede)."""
    e, e_star = text([f"a photo of the {concept}", f"a photo of the {anchor}" if anchor else ""]).double()
    assert text.tokenizer.count(f"a photo of the {concept}") == 5
    return e, e_star, e[5:], e_star[5:] if anchor else e_star[1:28]


def doubles(W):
    return {name: matrix.double() for name, matrix in W.items()}


def equals_file(W, folder):
    """The file is `W` rounded to float16; float32 products before it may turn a last bit."""
    written = load_file(folder / "erased.safetensors")
    return written.keys() == W.keys() and all(
        written[name].dtype == torch.float16
        and torch.allclose(written[name].double(), W[name], rtol=2 ** -11, atol=1e-5) for name in W)


@pytest.fixture(scope="module")
def work(here, quick, tmp_path_factory):
    """A folder with RECE of the airplane as a user makes it, in out/."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "quick").symlink_to(quick)
    args = [*AIRPLANE, "--rounds", 1, "--n", 1, "--model", "quick"]
    done = run("rece.py", *args, cwd=folder)
    (folder / "printed").write_text(done.stdout)
    here("realera.py", *AIRPLANE, "--lora-steps", 0, "--no-pictures", "--out", "realera", cwd=folder)
    return folder


def test_the_command_writes_the_edit_of_the_naive_loop_and_reports(work, model):
    out, W0 = work / "out/airplane-rece", doubles(cross_attention(MINI))
    assert sorted(path.name for path in out.iterdir()) == ["before_after.png", "before_after.svg",
                                                           "erased.safetensors", "report.html",
                                                           "round1.png", "round1.svg", "run.json"]
    about, report = about_edit(out), json.loads((out / "run.json").read_text())
    assert (about["method"], about["start"], about["concepts"], about["anchors"]) == (
        "RECE", None, ["airplane"], ["sky"])
    assert about["settings"] | {"rounds": 1, "lam": 0.1, "l1": 0.1, "start_l1": 0.5} == about["settings"]
    (e, e_star, E, E_star), stay = rows_by_hand(model.text, "airplane", "sky"), model.text([""])[0].double()
    W = naive_erase(W0, E, E_star, stay, 0.5, 1.0, 1.0)
    e_adv = naive_derive(W, W0, e, 0.1, 0 * e)
    shares = [1 - naive_missed(W, W0, e_adv, e) / naive_missed(W0, W0, e_star, e)]
    W = naive_erase(W, e_adv, e_star, stay, 0.1, 1.0, 0.1)
    shares.append(1 - naive_missed(W, W0, e_adv, e) / naive_missed(W0, W0, e_star, e))
    assert equals_file(W, out) and not equals_file(W0, out)
    assert report["regained"] == [[pytest.approx(share.item(), abs=1e-6) for share in shares]]
    last = naive_derive(W, W0, e, 0.1, 0 * e)                     # what could be derived now
    left = 1 - naive_missed(W, W0, last, e) / naive_missed(W0, W0, e_star, e)
    assert report["left"] == pytest.approx(left.item(), abs=1e-6)
    printed = (work / "printed").read_text()
    assert (f"round 1: the derived rows regain {shares[0]:.1%} of the squared distance; "
            f"after their erasure {shares[1]:.1%}"
            in printed)
    for part in ("‖ΔW‖/‖W‖", 'drift of ""', "round 1, airplane: ", "a photo of the airplane", "seconds:"):
        assert part in printed


def test_round_pictures_have_a_row_per_concept_and_two_columns(work):
    assert sheet(work / "out/airplane-rece/round1.png").shape[:2] == (1, 2)
    assert sheet(work / "out/airplane-rece/before_after.png").shape[:2] == (8, 2)


def test_no_rounds_are_the_start_alone_and_the_default_target_is_nothing(here, model, tmp_path):
    here("rece.py", "--concept", "airplane", "--rounds", 0, "--no-pictures", cwd=tmp_path)
    _, _, E, E_star = rows_by_hand(model.text, "airplane", "")
    stay = model.text([""])[0].double()
    W = naive_erase(doubles(cross_attention(MINI)), E, E_star, stay, 0.5, 1.0, 1.0)
    assert equals_file(W, tmp_path / "out/airplane-rece")
    assert sorted(path.name for path in (tmp_path / "out/airplane-rece").iterdir()) == [
        "erased.safetensors", "report.html", "run.json"]


@pytest.mark.parametrize("lam, regularizer", [(0.1, "zero"), (50.0, "target")])
def test_rounds_on_top_of_a_realera_edit(here, work, model, tmp_path, lam, regularizer):
    here("rece.py", *AIRPLANE, "--edit", work / "realera", "--rounds", 2, "--lambda", lam, "--no-pictures",
          "--set", f"regularizer={regularizer}", "--out", "both", cwd=tmp_path)
    assert about_edit(tmp_path / "both")["start"] == about_edit(work / "realera")
    W0, W = doubles(cross_attention(MINI)), doubles(read_edit(work / "realera", MINI))
    (e, e_star, *_), stay = rows_by_hand(model.text, "airplane", "sky"), model.text([""])[0].double()
    for _ in range(2):
        e_adv = naive_derive(W, W0, e, lam, e_star if regularizer == "target" else 0 * e)
        W = naive_erase(W, e_adv, e_star, stay, 0.1, 1.0, 0.1)
    assert equals_file(W, tmp_path / "both")


def test_same_seed_same_bytes_and_the_order_of_concepts_is_moot(here, tmp_path):
    two = [AIRPLANE, ["--concept", "ship", "--anchor", "street"]]
    for name, (first, second) in (("a", two), ("b", two), ("c", two[::-1])):
        here("rece.py", *first, *second, "--rounds", 1, "--no-pictures", "--out", name, cwd=tmp_path)
    a, b, c = ((tmp_path / name / "erased.safetensors").read_bytes() for name in "abc")
    assert a == b == c
    here("rece.py", *two[0], "--rounds", 1, "--no-pictures", "--out", "d", cwd=tmp_path)
    assert a != (tmp_path / "d/erased.safetensors").read_bytes()


def test_preview_writes_nothing(here, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("a photo of the airplane\na cat\n")
    here("rece.py", *AIRPLANE, "--rounds", 1, "--preview", "prompts.txt", cwd=tmp_path)
    assert [line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()] == [
        "prompt", "a photo of the airplane", "a cat"]
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]


@pytest.mark.parametrize("args, match", [
    (["--rounds", "-1"], "rounds"), (["--lambda", "0"], "lambda"), (["--lambda", "nan"], "lambda"),
    (["--lambda", "inf"], "lambda"), (["--lambda", "1e-30"], "larger one|raise the ridge"),
    (["--set", "regularizer=foo"], "zero or target, not foo"), (["--set", "l1=nan"], "l1"),
    (["--set", "D1=1"], "no setting 'D1'"), (["--set", "erase=0"], "erase"),
    (["--concept", "x"], "2 concepts"), (["--set", "l1=1e-30"], "raise the ridge .*l1"),
    (["--edit", "nowhere"], "no erased.safetensors"), (["--edit", "other"], "made for another model"),
    (["--out", "other"], "exists")])
def test_bad_input_is_one_line_and_leaves_nothing(refused, work, tmp_path, args, match):
    (tmp_path / "other").mkdir()
    write_edit(tmp_path / "other", cross_attention(MINI),
               about_edit(work / "realera") | {"base_hash": "0" * 64})
    refused("rece.py", *AIRPLANE, "--no-pictures", *args, cwd=tmp_path, match=match)


def test_sample_takes_the_edit_but_does_not_merge_it(here, refused, work, tmp_path):
    draw = ["sample.py", "a cat", "--n", 1, "--model", work / "quick", "--edit", work / "out/airplane-rece"]
    here(*draw, "--out", "one.png", cwd=tmp_path)
    here(*draw[:6], "--out", "none.png", cwd=tmp_path)
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "none.png").read_bytes()
    refused("tools/merge.py", work / "out/airplane-rece", work / "realera", cwd=tmp_path,
            match="was made by RECE: only edits of realera.py")
