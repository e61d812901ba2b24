"""LoRA: changes nothing at first, learns everywhere, merges exactly, and works in diffusers."""
import diffusers
import pytest
import torch

from lora import add_lora, load_lora, lora_layers, lora_off, merge_lora, save_lora
from plumbing import UserError
from unet import UNet

SMALL = dict(block_out_channels=(16, 32), down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
             up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=24,
             attention_head_dim=4, norm_num_groups=8, sample_size=8)


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    diffusers.UNet2DConditionModel(**SMALL).save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


def inputs():
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=g), torch.tensor([5, 900]), torch.randn(2, 7, 24, generator=g)


def trained(unet, rank=3, **kwargs):
    """A LoRA that is not zero any more."""
    names = add_lora(unet, rank, **kwargs)
    with torch.no_grad():
        for i, layer in enumerate(lora_layers(unet).values()):
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape,
                                                 generator=torch.Generator().manual_seed(i)))
    return names


@pytest.mark.parametrize("targets", [("attn2.to_k", "attn2.to_v"),
                                     ("attn1.to_q", "attn2.to_out.0", "ff.net.2")])
def test_fresh_lora_changes_nothing_and_every_layer_learns(folder, targets):
    unet = UNet.from_pretrained(folder)
    before = unet(*inputs())
    keys = set(unet.state_dict())
    names = add_lora(unet, 4, targets)
    assert names and all(name.endswith(targets) for name in names)
    assert torch.equal(unet(*inputs()), before)
    assert keys < set(unet.state_dict())                          # official keys stay, A and B come on top
    unet(*inputs()).square().mean().backward()
    for name, layer in lora_layers(unet).items():
        assert layer.lora_B.grad.abs().max() > 0, name
        assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32


def test_output_is_equation_2():
    linear = torch.nn.Linear(6, 5)
    network = torch.nn.ModuleDict({"to_k": linear})
    trained(network, rank=2, targets=("to_k",), scale=0.7)
    layer, x = network["to_k"], torch.randn(3, 6)
    expected = [[sum((linear.weight[o, i]
                      + 0.7 * sum(layer.lora_B[o, r] * layer.lora_A[r, i] for r in range(2))) * row[i]
                     for i in range(6)) + linear.bias[o] for o in range(5)] for row in x]
    assert torch.allclose(layer(x), torch.tensor(expected), atol=1e-5)


def test_off_merged_and_unmerged(folder):
    unet = UNet.from_pretrained(folder)
    plain, keys = unet(*inputs()), list(unet.state_dict())
    trained(unet)
    learned = unet(*inputs())
    assert (learned - plain).abs().max() > 1e-3
    with pytest.raises(RuntimeError), lora_off(unet):
        assert torch.equal(unet(*inputs()), plain)
        raise RuntimeError
    assert torch.equal(unet(*inputs()), learned)                  # on again, whatever happened inside
    merge_lora(unet)
    assert (unet(*inputs()) - learned).abs().max() <= 1e-6
    assert list(unet.state_dict()) == keys and not lora_layers(unet)


def test_parameters_stay_float32_in_a_half_precision_network(folder):
    unet = UNet.from_pretrained(folder, dtype=torch.bfloat16)
    trained(unet)
    x, t, c = inputs()
    y = unet(x.bfloat16(), t, c.bfloat16())
    assert y.dtype == torch.bfloat16
    assert {p.dtype for layer in lora_layers(unet).values()
            for p in (layer.lora_A, layer.lora_B)} == {torch.float32}
    merge_lora(unet)
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}


def test_same_seed_same_lora(folder):
    a, b, other = (UNet.from_pretrained(folder) for _ in range(3))
    add_lora(a, 2, seed=5), add_lora(b, 2, seed=5), add_lora(other, 2, seed=6)
    for x, y, z in zip(*(lora_layers(unet).values() for unet in (a, b, other))):
        assert torch.equal(x.lora_A, y.lora_A) and not torch.equal(x.lora_A, z.lora_A)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_saved_file_comes_back_and_works_in_diffusers(folder, tmp_path, scale):
    unet = UNet.from_pretrained(folder)
    names = trained(unet, scale=scale)
    ours = unet(*inputs())
    save_lora(unet, tmp_path / "lora.safetensors", {"needs": "nothing"})

    again = UNet.from_pretrained(folder)
    assert load_lora(again, tmp_path / "lora.safetensors") == names
    assert (again(*inputs()) - ours).abs().max() <= 1e-6

    pipe = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, scheduler=diffusers.DDIMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False,
        unet=diffusers.UNet2DConditionModel.from_pretrained(folder))
    plain = pipe.unet(*inputs()).sample
    pipe.load_lora_weights(str(tmp_path / "lora.safetensors"))
    theirs = pipe.unet(*inputs()).sample
    assert (theirs - ours).abs().max() <= 1e-5 and (theirs - plain).abs().max() > 1e-3


def test_bad_requests_are_refused(folder, tmp_path):
    unet = UNet.from_pretrained(folder)
    with pytest.raises(UserError, match="rank"):
        add_lora(unet, 0)
    with pytest.raises(UserError, match="no layer"):
        add_lora(unet, 2, ("attn3.to_k",))
    trained(unet)
    save_lora(unet, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="does not fit"):          # already wrapped: not a plain Linear
        load_lora(unet, tmp_path / "lora.safetensors")
    (tmp_path / "broken.safetensors").write_bytes((tmp_path / "lora.safetensors").read_bytes()[:200])
    with pytest.raises(UserError, match="broken"):
        load_lora(UNet.from_pretrained(folder), tmp_path / "broken.safetensors")
