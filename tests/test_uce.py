"""UCE against its own quadratic and its authors' sums, row by row; with templates it is the start of RECE."""
import json

import pytest
import torch
from safetensors.torch import load_file

from baselines import uce
from erasing import Job, make_pairs
from helpers import AIRPLANE, MINI, same
from plumbing.book import nouns
from plumbing.prompts import retained_words

KINDS = [dict(), dict(technique="tensor"), dict(rows="token", retain="bird, Cat"),
         dict(rows="token", technique="tensor", lamb=3.0), dict(retain="bird, Cat", lamb=2.0)]


def made(s, concepts="airplane", anchors="sky"):
    job = Job(MINI, concepts, anchors, rows=s.rows, prompts=s.prompts)
    return job, uce.erase(job, s)


def asked(text, s, concepts=(("airplane", "sky"),)):
    """From words alone: rows k and their twins of each concept, and rows r with their weight."""
    def rows(word):
        return text([word])[0].double(), text.tokenizer.count(word)
    blocks = []
    for concept, anchor in concepts:
        (e, i), (e_star, j) = rows(concept), rows(anchor)
        n = 1 if s.rows == "token" else len(e) - max(i, j)
        blocks.append((e[i:i + n], e_star[j:j + n]))
    words = [word.strip().lower() for word in s.retain.split(",") if word]
    if s.rows == "token":
        return blocks, [rows(word)[0][rows(word)[1]][None] for word in words], 1
    return blocks, [rows(word)[0] for word in ["", *words]], max(0.1, 1 / (1 + len(words)))


def targets(k, k_star, W0, s):
    """v [n, out]; of `tensor` the anchor's flattened values without their part along the concept's."""
    y = k_star @ W0.T
    if s.technique == "replace":
        return y
    o = (k @ W0.T).flatten()
    u = o / o.norm()
    return (y.flatten() - (u @ y.flatten()) * u).view_as(y)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_matrix_equals_the_authors_own_solve_and_the_quadratics_gradient_is_zero_there(kind):
    s = uce.Settings(**kind)
    job, W = made(s)
    blocks, kept, s_p = asked(job.text, s)
    assert job.about["settings"]["preserve_scale"] == pytest.approx(s_p) and W.keys() == job.W0.keys()
    for name in list(W)[::3]:
        W0, v = job.W0[name].double(), [targets(*block, job.W0[name].double(), s) for block in blocks]
        left, right = s.lamb * W0, s.lamb * torch.eye(W0.shape[1]).double()
        for (k, _), aim in zip(blocks, v):
            for row, value in zip(k, aim):
                left, right = left + torch.outer(value, row), right + torch.outer(row, row)
        for row in torch.cat([W0.new_zeros(0, W0.shape[1]), *kept]):
            left, right = left + s_p * torch.outer(W0 @ row, row), right + s_p * torch.outer(row, row)
        theirs = left @ torch.inverse(right)
        assert (W[name].double() - theirs).norm() < 1e-5 * (theirs - W0).norm()

        def gradient(at):
            X = at.clone().requires_grad_()
            loss = sum((k @ X.T - aim).square().sum() for (k, _), aim in zip(blocks, v))
            loss = loss + s_p * sum((r @ X.T - r @ W0.T).square().sum() for r in kept)
            return torch.autograd.grad(loss + s.lamb * (X - W0).square().sum(), X)[0].norm()
        assert gradient(W[name].double()) < 1e-4 * gradient(W0)


def test_values_of_the_tensor_target_are_orthogonal_to_the_concepts_over_the_whole_block():
    g = torch.Generator().manual_seed(0)
    k, k_star, W0 = (torch.randn(n, 8, generator=g, dtype=torch.float64) for n in (5, 5, 3))
    v, o = uce.apart(k, k_star, W0) @ W0.T, k @ W0.T
    assert (v * o).sum().abs() < 1e-12 and (v * o).sum(1).abs().max() > 0.1          # and not row by row


def test_words_templates_and_rows(text):
    """The bare word's rows from its last token on; "" begins with begin-of-text, as its authors count."""
    plain, = make_pairs("fire engine", "sky", "object", text, "tail", 0, "word")
    assert (plain.prompt, plain.prompt_star) == ("fire engine", "sky")
    last, e = text.tokenizer.count("fire engine"), text(["fire engine"])[0].double()
    assert last > 1 and torch.equal(plain.block(), e[last:])
    nothing, = make_pairs("airplane", "", "object", text, "token", 0, "word")
    assert nothing.n == 1 and torch.equal(nothing.block_star(), text([""])[0, :1].double())
    template, = make_pairs("airplane", "", "object", text, "token", 0)
    assert torch.equal(template.block_star(), text([""])[0, 1:2].double())


def test_retained_words_leave_out_what_is_erased(text):
    pairs = make_pairs("airplane", "sky", "object", text, "tail", 0)
    assert retained_words("Bird, an Airplane,, cat , bird,airplanes", pairs) == ["bird", "cat", "airplanes"]
    assert set(retained_words("nouns", pairs)) == {*nouns("preserved")} - {"airplane", "sky"}
    assert retained_words("", pairs) == []


def test_uce_with_templates_is_rece_without_rounds_bit_for_bit(here, tmp_path):
    flags = ["--concept", "airplane", "--anchor", "sky", "--no-pictures"]
    here("baselines/uce.py", *flags, "--set", "prompts=template", cwd=tmp_path)
    here("rece.py", *flags, "--rounds", 0, cwd=tmp_path)
    a, b = (load_file(tmp_path / f"out/airplane-{name}/erased.safetensors") for name in ("uce", "rece"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_the_command_writes_the_same_twice_and_says_what_it_took(here, tmp_path):
    for out in "ab":
        here("baselines/uce.py", *AIRPLANE, "--no-pictures", "--retain", "bird, ship", "--out", out,
             cwd=tmp_path)
    a, b = (load_file(tmp_path / out / "erased.safetensors") for out in "ab")
    said = json.loads((tmp_path / "a/run.json").read_text())
    assert same(a, b) and said["dtype"] == "float16"
    assert said["prompts"] == {"erased": ["airplane"], "anchor": ["sky"], "retained": ["", "bird", "ship"]}
    assert said["settings"] == {"rows": "tail", "prompts": "word", "technique": "replace", "lamb": 0.5,
                                "erase_scale": 1.0, "preserve_scale": pytest.approx(1 / 3),
                                "retain": "bird, ship"}


@pytest.mark.parametrize("args, match", [
    (["--set", "lamb=0"], "lamb"), (["--set", "technique=other"], "replace or tensor, not other"),
    (["--set", "rows=all"], "tail or token"), (["--set", "prompts=x"], "word or template"),
    (["--set", "preserve_scale=-2"], "preserve_scale"), (["--set", "lamb=nan"], "lamb"),
    (["--retain", "an airplane"], "nothing but what is erased")])
def test_uce_refuses_bad_input(refused, tmp_path, args, match):
    refused("baselines/uce.py", *AIRPLANE, "--no-pictures", *args, cwd=tmp_path, match=match)
