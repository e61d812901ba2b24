"""Attention probabilities, a concept's columns, and masks."""
import math

import pytest
import torch

import helpers
from plumbing.attention import attention_masks, attention_of, concept_columns, sides_of
from plumbing.training import learnable, predict
from sample import Model, Text


def test_probabilities_are_the_softmax_of_queries_and_keys_of_the_weights_in_use(tiny):
    small = Model(tiny)
    layers = {name: module for name, module in small.unet.named_modules() if name.endswith("attn2")}
    W = learnable(small.unet, [f"{name}.to_k.weight" for name in layers])
    with torch.no_grad():
        for w in W.values():
            w *= 1.5
    said, hooks = {}, []
    for name, layer in layers.items():
        for part in (layer.to_q, layer.to_k):
            hooks.append(part.register_forward_hook(
                lambda module, args, y, at=name: said.setdefault(at, []).append(y)))
    z, c = helpers.random(1, 4, 8, 8, seed=0), helpers.random(1, 77, 16, seed=1)
    with attention_of(small.unet) as seen:
        predict(small.unet, z, 500, c, W)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(said) == 4
    for found, (at, pair) in zip(seen, said.items()):
        k, q = sorted(pair, key=lambda y: y.shape[1] == 77, reverse=True)           # T is never h·w here
        heads, d = layers[at].heads, q.shape[-1] // layers[at].heads
        for h in range(heads):
            part = slice(h * d, (h + 1) * d)
            expected = torch.softmax(q[0, :, part] @ k[0, :, part].T / math.sqrt(d), -1)
            assert torch.allclose(found[0, h], expected, atol=1e-6)
    seen[0].sum().backward()                                      # its graph reaches the copies
    assert any(w.grad is not None for w in W.values())
    predict(small.unet, z, 500, c)
    assert len(seen) == 4 and all(layer.seen is None for layer in layers.values())


@pytest.mark.parametrize("version", ["tiny", "sd2"])
def test_columns_are_the_words_own_and_the_end_tokens(version, request):
    words = Text(request.getfixturevalue(version)).tokenizer
    ids = words(["an oil painting of the river at night"])[0].tolist()
    columns = concept_columns(words, "an oil {} at night", "painting of the river", padding=True)
    end = ids.index(words.eos)
    assert [i for i in columns if i >= end] == (list(range(end, 77)) if version == "tiny" else [end])
    assert words.words([ids[i] for i in columns if i < end]) == "painting of the river"
    assert concept_columns(words, "an oil {} at night", "painting of the river", False) == [
        i for i in columns if i <= end]
    assert (ids[-1] == words.eos) == (version == "tiny")           # the two do pad with different tokens


def test_every_level_of_a_latent_that_is_no_square_has_its_sides(model):
    with torch.no_grad(), attention_of(model.unet) as seen:
        model.unet(torch.zeros(1, 4, 5, 11), 3, torch.zeros(1, 32, 256))
    sides = {sides_of(A.shape[2], 5, 11) for A in seen}
    assert sides == {(3, 6), (2, 3)} and {a * b for a, b in sides} == {A.shape[2] for A in seen}


def test_masks_are_shares_of_the_largest_attention(model):
    z0, rows = helpers.random(2, 4, 16, 16, seed=0).float(), model.text("a photo of the cat")[0]

    def at(share):
        return attention_masks(model, z0, rows, [5], share)
    assert (at(0) == 1).all() and (at(1.01) == 0).all() and (at(1).sum((1, 2)) == 1).all()
    some, fewer = at(0.5), at(0.9)
    assert some.shape == (2, 16, 16) and 0 < fewer.mean() < some.mean() < 1 and (fewer <= some).all()
