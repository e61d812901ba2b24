"""AC: the concept's prompt learns the anchor's noise."""

import json

import pytest
import torch
from torch.nn import functional as F

from baselines import ac
from baselines.ac import FAR, NEAR, ac_loss, augmented, captions, read
from erasing import erase_with
from helpers import MINI, SIZE, random, rng, same
from plumbing.book import BOOK, nouns
from plumbing.disk import read_json
from plumbing.edits import cross_attention
from plumbing.training import learnable, predict
from sample import Model


@pytest.fixture
def batch(model):
    """W a little off the network's, z, t, rows of "… airplane" and "… sky", a mask."""
    W = learnable(model.unet, cross_attention(MINI))
    with torch.no_grad():
        for i, w in enumerate(W.values()):
            w += 0.02 * random(*w.shape, seed=i).float()
    c, c_star = model.text(["a photo of the airplane", "a photo of the sky"])[:, None].expand(-1, 2, -1, -1)
    mask = torch.zeros(2, 1, *model.latent[1:])
    mask[0, :, 2:9, 3:7], mask[1] = 1, 1
    return W, random(2, *model.latent, seed=0).float(), torch.tensor([30, 700]), c, c_star, mask


@pytest.mark.parametrize("as_published", [True, False])
def test_the_loss_is_the_masked_mean_of_squares_and_as_coded_four_times_that(model, batch, as_published):
    W, z, t, c, c_star, mask = batch
    with torch.no_grad():
        far = predict(model.unet, z, t, c, W) - predict(model.unet, z, t, c_star, W)
        means = [far[b][:, mask[b, 0] == 1].square().mean().item() for b in range(2)]
        found = ac_loss(model.unet, W, z, t, c, c_star, mask, as_published).item()
    assert found == pytest.approx((4 if as_published else 1) * sum(means) / 2, rel=1e-4)


def test_a_concept_that_is_its_own_anchor_teaches_nothing(model, batch):
    W, z, t, c, c_star, mask = batch
    for other, nothing in ((c_star, False), (c, True)):
        loss = ac_loss(model.unet, W, z, t, c, other, mask)
        gradients = torch.autograd.grad(loss, list(W.values()))
        assert (loss.item() == 0) == all(not g.any() for g in gradients) == nothing


def test_begin_of_text_adds_nothing_to_the_gradient(model, batch):
    W, z, t, c, c_star, mask = batch
    name = [name for name in W if "mid_block" in name and name.endswith("to_v.weight")][0]
    found, = torch.autograd.grad(ac_loss(model.unet, W, z, t, c, c_star, mask), W[name])
    # a second way: dL/dW = Σ dL/dv c over batch and rows, from v alone
    own = model.unet.read
    model.put({name: w.detach() for name, w in W.items()})
    context, layer = own(c), model.unet.get_submodule(name.removesuffix(".to_v.weight"))
    v = context[layer][1].detach().requires_grad_()
    context[layer] = context[layer][0], v
    with torch.no_grad():
        target = model.unet(z, t, c_star)
    square = mask * (model.unet(z, t, context) - target).square()
    dv, = torch.autograd.grad((square.sum((1, 2, 3)) / mask.sum((1, 2, 3))).mean(), v)           # [B, T, C]
    model.put({})
    without, whole = (torch.einsum("btc,btd->cd", dv[:, first:], c[:, first:]) for first in (1, 0))
    assert torch.allclose(found, without, rtol=1e-3, atol=1e-5 * without.abs().max().item())
    assert (whole - without).norm() > 0.01 * without.norm()       # it would have taught something


def test_keys_and_values_are_those_of_the_network(model):
    c = model.text(["a photo of the sky"])
    mine, its = read(model.unet, cross_attention(MINI), c), model.unet.read(c)
    assert mine.keys() == its.keys()
    assert all(torch.allclose(a, b, atol=1e-5) for layer in its for a, b in zip(mine[layer], its[layer]))


def test_objects_are_shrunk_with_a_mask_inside_or_enlarged_and_words_say_which():
    g, sides = rng(), []
    for _ in range(200):
        x, mask, words = augmented(torch.ones(3, 32, 32), 2, True, g)
        assert x.shape == (3, 32, 32) and mask.shape == (1, 16, 16)
        there = x[0] != 0
        side = there.any(1).sum().item()
        assert there.sum() == side * side == there.any(0).sum() ** 2                 # one square
        assert 10 <= side <= 32
        grown = F.max_pool2d(F.interpolate(mask[None], scale_factor=2.0), 3, 1, 1)[0, 0] > 0
        assert mask.any() and (side == 32 and mask.all() or not (grown & ~there).any())
        enlarged = bool(mask.all())
        assert words in (NEAR if enlarged else FAR if side < 19.2 else [""])
        sides.append(0 if enlarged else side)
    assert 0.55 < sum(side > 0 for side in sides) / 200 < 0.77
    assert {10, 31} <= set(sides)


def test_without_augmentation_pictures_stay_and_the_mask_leaves_out_their_edge():
    x = random(3, 32, 32, seed=0).float()
    same_x, mask, words = augmented(x, 2, False, rng())
    assert torch.equal(same_x, x) and words == ""
    assert torch.equal(mask, F.pad(torch.ones(1, 14, 14), (1, 1, 1, 1)))


def test_a_prompt_and_its_anchors_differ_in_the_word_alone():
    pairs = captions(("river", "sky"), "object")
    assert pairs[0] == ("a photo of the river", "a photo of the sky")
    kept = {*nouns("preserved")} - {*read_json(BOOK)["classes"], "river", "sky"}
    assert {c.partition(" and the ")[2] for c, _ in pairs[1:]} == kept and len(pairs) == 1 + len(kept)
    for c, c_star in pairs:
        assert c_star == c.replace("river", "sky", 1) and c.count("river") == c_star.count("sky") == 1
    style = captions(("van gogh", "an artist"), "style")
    assert ("an artwork by van gogh", "an artwork by an artist") in style


FEW = {"steps": 2, "batch": 2, "pictures": 2}


def test_an_edit_has_keys_and_values_alone_and_the_seed_decides_it(other):
    (other / "defaults.json").unlink()                            # a link: its own draws in two steps
    (other / "defaults.json").write_text(json.dumps({"guidance": 3.0, "steps": 2, "size": SIZE}))
    model = Model(other)
    (W, found), (again, _) = (erase_with(ac, model, "airplane", "sky", **FEW) for _ in range(2))
    W0 = cross_attention(MINI)
    assert same(W, again) and W.keys() == W0.keys()
    assert all(0 < (W[name] - W0[name]).abs().max() < 2.1 * 1.6e-5 for name in W)    # two of AdamW's steps
    assert found["prompts"]["anchor"] == ["a photo of the sky", captions(("airplane", "sky"), "object")[1][1]]
    assert found["loss"]["first"] > 0


@pytest.mark.parametrize("flags, match", [
    (["--anchor", ""], "AC needs an --anchor"), (["--set", "pictures=0"], "pictures above 0")])
def test_bad_input_is_refused_in_one_line(refused, tmp_path, flags, match):
    (tmp_path / "prompts.txt").write_text("a prompt")
    refused("baselines/ac.py", "--concept", "airplane", *flags, cwd=tmp_path, match=match)
