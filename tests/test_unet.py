"""The U-Net against diffusers': names, shapes, norms and numbers; keys and values, memory and compiling.

Every parameter of a reference gets noise, as a norm that starts with ones and zeros would hide that two norms
were swapped.
"""
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from clip_text import CLIPTextModel
from experiments.bench import full_size
from helpers import (MINI, OFFICIAL_UNET, OFFICIAL_UNET_21, UNETS, near, norms, same_at_full_size, shapes,
                     theirs_unet)
from lora import add_lora, lora_layers, lora_off
from plumbing.edits import cross_attention
from plumbing.weights import put_weights
from sample import Model
from unet import UNet, UNetConfig
from vae import VAE

# ---- names, shapes and norms at full size, without memory ----

def test_full_size_names_shapes_and_norms(tmp_path):
    config, ours, _ = same_at_full_size(UNet, UNetConfig, OFFICIAL_UNET,
                                        diffusers.UNet2DConditionModel.from_config, 859_520_964, tmp_path)
    assert config == UNetConfig() and len(shapes(ours)) == 686     # our defaults are SD v1.4


def test_full_size_names_shapes_norms_and_heads_of_sd_2_1_base(tmp_path):
    _, ours, theirs = same_at_full_size(UNet, UNetConfig, OFFICIAL_UNET_21,
                                        diffusers.UNet2DConditionModel.from_config, 865_910_724, tmp_path)
    heads = {name: module.heads for name, module in theirs.named_modules() if hasattr(module, "heads")}
    assert {name: ours.get_submodule(name).heads for name in heads} == heads
    levels = [heads[f"down_blocks.{i}.attentions.0.transformer_blocks.0.attn2"] for i in range(3)]
    assert levels == [5, 10, 20]


# ---- numbers ----

@pytest.mark.parametrize("size", [(8, 16), (9, 13)], ids=str)
@pytest.mark.parametrize("name", UNETS)
def test_unet_numbers(name, size, tmp_path):
    theirs = theirs_unet(**UNETS[name])
    theirs.save_pretrained(tmp_path)
    ours = UNet.from_pretrained(tmp_path)
    assert norms(ours) == norms(theirs)
    x = torch.randn(3, theirs.config.in_channels, *size)
    context = torch.randn(3, 7, theirs.config.cross_attention_dim)
    for t in (torch.tensor([0, 500, 999]), 321, torch.tensor(7)):
        near(ours(x, t, context), theirs(x, t, context).sample)


def test_unet_numbers_where_eps_matters(tmp_path):
    """One channel per group and a faint picture: its variance is below eps, so a wrong eps is seen."""
    theirs = theirs_unet(**UNETS["attention below only"] | {"norm_num_groups": 16, "norm_eps": 1e-5})
    theirs.save_pretrained(tmp_path)
    x, context = 1e-3 * torch.randn(2, 4, 8, 8), torch.randn(2, 7, 20)
    ours = UNet.from_pretrained(tmp_path)
    near(ours(x, 10, context), theirs(x, 10, context).sample)
    ours.down_blocks[0].resnets[0].norm1.eps = 1e-6
    assert (ours(x, 10, context) - theirs(x, 10, context).sample).abs().max() > 1e-3


@pytest.mark.slow
def test_full_size_numbers():
    """Random weights; matrices keep their own start, as noise on 859 million of them would explode."""
    def full(part):
        network = full_size(part).eval().requires_grad_(False)
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter += 0.05 * torch.randn_like(parameter)
        return network

    def twin(ours_class, theirs):
        with torch.device("meta"):
            ours = ours_class()
        ours.load_state_dict(theirs.state_dict(), assign=True)     # shares the memory
        return ours.eval().requires_grad_(False)

    theirs = full("text_encoder")
    ids = torch.randint(49408, (2, 77))
    context = twin(CLIPTextModel, theirs)(ids)
    near(context, theirs(ids).last_hidden_state)

    # In float32 theirs and ours are each about 2e-5 from the float64 result: so both in float64 here.
    theirs = full("vae").double()
    ours, x, z = twin(VAE, theirs), torch.rand(1, 3, 64, 64) * 2 - 1, torch.randn(1, 4, 8, 8)
    near(ours.encode(x.double())[0], theirs.encode(x.double()).latent_dist.mean)
    near(ours.decode(z.double()), theirs.decode(z.double()).sample)

    theirs = full("unet")
    near(twin(UNet, theirs)(z, 981, context[:1]), theirs(z, 981, context[:1]).sample)


# ---- attention probabilities ----

def test_attention_probabilities_on_request_are_what_attention_uses():
    unet, kept = UNet.from_pretrained(f"{MINI}/unet"), []
    layers = [module for name, module in unet.named_modules() if name.endswith("attn2")]
    layer, inputs = layers[0], []
    layer.register_forward_hook(lambda module, args, y: inputs.append((*args, y)))
    z, c = torch.randn(1, 4, 16, 16), torch.randn(1, 32, 256)
    plain = unet(z, 500, c)
    layer.seen = kept
    assert torch.equal(unet(z, 500, c), plain) and len(kept) == 1
    x, context, y = inputs[-1]
    assert torch.allclose(kept[0].sum(-1), torch.ones(kept[0].shape[:-1])) and kept[0].shape[-1] == 32
    v = layer.to_v(context).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
    assert torch.allclose(layer.to_out((kept[0] @ v).transpose(1, 2).flatten(2)), y, atol=1e-5)


# ---- keys and values, memory, compiling ----

PROMPT, T = ["a photo of an airplane"], 5


@pytest.fixture
def model():
    return Model(Path(MINI))


def without_cache(model):
    """The model's picture if every step computes the text's keys and values anew."""
    model.unet.read = lambda context: context
    try:
        return model.draw(PROMPT, [1], steps=3)
    finally:
        del model.unet.read


def test_keys_and_values_computed_once_change_no_bit(model):
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 32, 256)
    with torch.no_grad():
        assert torch.equal(model.unet(x, T, model.unet.read(context)), model.unet(x, T, context))
    assert torch.equal(model.draw(PROMPT, [1], steps=3), without_cache(model))


def test_keys_and_values_are_never_those_of_an_earlier_edit_or_lora(model):
    """One model drawing in turn untouched, edited, with LoRA, without: every picture is the uncached one."""
    W0, pictures = cross_attention(MINI), []

    def draw():
        pictures.append(model.draw(PROMPT, [1], steps=3))
        assert torch.equal(pictures[-1], without_cache(model))
    draw()
    put_weights(model.unet, {name: 0.5 * W.float() for name, W in W0.items()})
    draw()
    add_lora(model.unet, 2)
    for layer in lora_layers(model.unet).values():
        layer.lora_B.data.fill_(0.3)
    draw()
    with lora_off(model.unet):
        draw()
    put_weights(model.unet, W0)
    with lora_off(model.unet):
        draw()
    untouched, edited, lora, off, again = pictures
    assert torch.equal(edited, off) and torch.equal(untouched, again)
    assert (untouched - edited).abs().max() > 0.01 and (edited - lora).abs().max() > 0.01


def lora_gradients(low_memory):
    """Of the square of mini's prediction, and how many numbers the forward pass keeps for the backward."""
    unet, kept = UNet.from_pretrained(Path(MINI) / "unet"), []
    add_lora(unet, 2)
    for layer in lora_layers(unet).values():
        layer.lora_B.data.fill_(0.1)
    unet.low_memory = low_memory
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 32, 256, generator=generator)
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.numel()) or y, lambda y: y):
        loss = unet(x, T, context).square().mean()
    loss.backward()
    with torch.no_grad():
        assert torch.equal(unet(x, T, context).square().mean(), loss)
    return {k: p.grad for k, p in unet.named_parameters() if p.requires_grad}, sum(kept)


def test_low_memory_gives_the_same_gradients_and_keeps_less():
    (expected, all_kept), (found, few_kept) = lora_gradients(False), lora_gradients(True)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert few_kept < all_kept / 2


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_once_for_all_steps(model, backend):
    """A second trace fails. torch.compile's front half alone, and with its back half, a C++ compiler."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("needs g++")
    import torch._dynamo
    torch._dynamo.reset()                                         # an earlier model may be compiled
    expected = model.draw(PROMPT, [1], steps=5)
    model.unet.compile(backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert (model.draw(PROMPT, [1], steps=5) - expected).abs().max() < 1e-5
