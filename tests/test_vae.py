"""The autoencoder against diffusers': names, shapes, norms and numbers; official folders."""
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from helpers import OFFICIAL_VAE, VAES, edit_tensors, near, norms, same_at_full_size, shapes, theirs_vae
from vae import VAE, VAEConfig


def test_full_size_names_shapes_and_norms(tmp_path):
    config, ours, _ = same_at_full_size(VAE, VAEConfig, OFFICIAL_VAE, diffusers.AutoencoderKL.from_config,
                                        83_653_863, tmp_path)
    assert config == VAEConfig() and len(shapes(ours)) == 248      # our defaults are SD v1.4


@pytest.mark.parametrize("name", VAES)
def test_vae_numbers(name, tmp_path):
    theirs = theirs_vae(**VAES[name])
    theirs.save_pretrained(tmp_path)
    ours = VAE.from_pretrained(tmp_path)
    assert norms(ours) == norms(theirs)
    assert ours.scaling_factor == theirs.config.scaling_factor
    assert ours.factor == 2 ** (len(theirs.config.block_out_channels) - 1)
    z = torch.randn(3, theirs.config.latent_channels, 6, 10)
    near(ours.decode(z), theirs.decode(z).sample)
    for height, width in ((24, 40), (51, 70)):                     # 51: odd, so every halving rounds
        x = torch.rand(3, 3, height, width) * 2 - 1
        mean, logvar = ours.encode(x)
        latent = theirs.encode(x).latent_dist
        near(mean, latent.mean), near(logvar, latent.logvar)


def test_vae_numbers_at_a_larger_latent(tmp_path):
    theirs = theirs_vae(**VAES["one layer"])
    theirs.save_pretrained(tmp_path)
    z = torch.randn(2, 4, 24, 40)
    near(VAE.from_pretrained(tmp_path).decode(z), theirs.decode(z).sample)


def test_vae_numbers_where_eps_matters(tmp_path):
    theirs = theirs_vae(**VAES["one layer"] | {"norm_num_groups": 8})
    theirs.save_pretrained(tmp_path)
    ours, x = VAE.from_pretrained(tmp_path), 1e-3 * torch.rand(2, 3, 16, 16)
    near(ours.encode(x)[0], theirs.encode(x).latent_dist.mean)
    ours.encoder.down_blocks[0].resnets[0].norm1.eps = 1e-5
    assert (ours.encode(x)[0] - theirs.encode(x).latent_dist.mean).abs().max() > 1e-3


def test_vae_logvar_is_clamped(vae_folder):
    """Without the clamp a picture far from the training set could overflow exp(logvar)."""
    def far(tensors):
        tensors["quant_conv.bias"][4:] = torch.tensor([1e3, -1e3, 1e3, -1e3])
    edit_tensors(vae_folder / "diffusion_pytorch_model.safetensors", far)
    theirs, ours = diffusers.AutoencoderKL.from_pretrained(vae_folder), VAE.from_pretrained(vae_folder)
    x = torch.zeros(1, 3, 4, 4)
    near(ours.encode(x)[1], theirs.encode(x).latent_dist.logvar)


@pytest.mark.parametrize("style", ["2022", "today"])
def test_vae_attention_names(style, vae_folder):
    """SD v1.4's full-precision file has old names in the middle attention, its fp16 file has new ones."""
    path = vae_folder / "diffusion_pytorch_model.safetensors"
    expected = load_file(path)
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def rename(tensors):
        for key in [key for key in tensors if ".mid_block.attentions.0.to_" in key]:
            stem, name = key.split(".attentions.0.")
            name, kind = name.rsplit(".", 1)
            tensors[f"{stem}.attentions.0.{old_names[name]}.{kind}"] = tensors.pop(key)
    if style == "2022":
        edit_tensors(path, rename)
        assert "encoder.mid_block.attentions.0.query.weight" in load_file(path)
    ours = VAE.from_pretrained(vae_folder).state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def test_vae_without_scaling_factor(vae_folder):
    config = {key: value for key, value in OFFICIAL_VAE.items() if key != "scaling_factor"}
    config |= {key: value for key, value in VAES["one layer"].items() if key != "scaling_factor"}
    (vae_folder / "config.json").write_text(json.dumps(config))
    assert VAE.from_pretrained(vae_folder).scaling_factor == 0.18215
