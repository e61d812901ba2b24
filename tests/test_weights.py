"""A network from its folder, strictly: what official folders contain, precisions, and bad folders."""
import json
import re
import shutil
import subprocess
import sys

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from clip_text import CLIPTextModel, CLIPTokenizer
from eval_clip import CLIP
from helpers import (AIRPLANE, CLOSED, OFFICIAL_TEXT, OFFICIAL_UNET, OFFICIAL_VAE, QUICK, ROOT, TEXTS, UNET, UNETS,
                     VAES, edit_json, edit_tensors, nan, near, refuses, shapes, theirs_text, theirs_unet,
                     theirs_vae)
from plumbing import UserError
from plumbing.models import MINI
from plumbing.weights import NoInit
from sample import Model
from unet import UNet
from vae import VAE

# ---- what official folders contain ----

def test_half_precision_twin_alone_and_beside(unet_folder):
    full = unet_folder / "diffusion_pytorch_model.safetensors"
    half = unet_folder / "diffusion_pytorch_model.fp16.safetensors"
    tensors = load_file(full)
    save_file({key: tensor.half() for key, tensor in tensors.items()}, half)
    key = "conv_in.weight"
    assert torch.equal(UNet.from_pretrained(unet_folder).state_dict()[key], tensors[key])
    full.unlink()
    ours = UNet.from_pretrained(unet_folder).state_dict()
    assert torch.equal(ours[key], tensors[key].half().float())
    assert ours[key].dtype == torch.float32


def test_short_official_configs(tmp_path):
    """The official config.json files lack every key that came later; reading them must not need those."""
    for make, ours_class, official, small in ((theirs_unet, UNet, OFFICIAL_UNET, UNETS["as in SD"]),
                                              (theirs_vae, VAE, OFFICIAL_VAE, VAES["as in SD"]),
                                              (theirs_text, CLIPTextModel, OFFICIAL_TEXT, TEXTS["as in SD"])):
        theirs = make(**small)
        theirs.save_pretrained(tmp_path / ours_class.__name__)
        (tmp_path / ours_class.__name__ / "config.json").write_text(json.dumps(official | small))
        assert shapes(ours_class.from_pretrained(tmp_path / ours_class.__name__)) == shapes(theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_and_device(dtype, unet_folder, vae_folder, text_folder):
    for ours_class, folder in ((UNet, unet_folder), (VAE, vae_folder), (CLIPTextModel, text_folder)):
        ours = ours_class.from_pretrained(folder, dtype=dtype, device="meta")
        assert {(p.dtype, p.device.type) for p in ours.parameters()} == {(dtype, "meta")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_networks_run_in_other_precisions(dtype, unet_folder, vae_folder, text_folder):
    """bfloat16 keeps 8 bits, so 3 % may get lost; sinusoids in it, where 998 is 1000, would lose more."""
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 16)
    for ours_class, folder, inputs in ((UNet, unet_folder, (x, torch.tensor([3, 998]), context)),
                                       (VAE, vae_folder, (x,)),
                                       (CLIPTextModel, text_folder, (torch.arange(16)[None],))):
        results = []
        for kind in (torch.float32, dtype):
            network = ours_class.from_pretrained(folder, dtype=kind)
            cast = [value.to(kind) if value.is_floating_point() else value for value in inputs]
            results.append(network.decode(*cast) if ours_class is VAE else network(*cast))
        assert results[1].dtype == dtype
        if dtype == torch.float64:
            near(results[1].float(), results[0])
        assert (results[1] - results[0]).abs().max() <= 0.03 * results[0].abs().max()


def test_loading_draws_nothing_and_copies_nothing(unet_folder, monkeypatch):
    read = {}
    monkeypatch.setattr("plumbing.weights.load_file", lambda path: read.update(load_file(path)) or read)
    state = torch.get_rng_state()
    ours = UNet.from_pretrained(unet_folder)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.data_ptr() == read[name].data_ptr() for name, parameter in ours.named_parameters())
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert not any(module.training for module in ours.modules())


def test_loading_draws_no_weights_and_does_not_import_the_compiler():
    """torch.compile's machinery takes longer to import than the text encoder to load."""
    code = ("import sys, torch; from sample import Model; from pathlib import Path; torch.manual_seed(0);"
            f"Model(Path({MINI!r})); a = torch.rand(1); torch.manual_seed(0);"
            "assert torch.equal(a, torch.rand(1)) and 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_layers_still_draw_their_weights_elsewhere():
    with NoInit():
        pass
    torch.manual_seed(0)
    assert torch.nn.Embedding(50, 20).weight.std().item() == pytest.approx(1, abs=0.1)


def in_shards(folder, variant=None):
    """`folder`'s U-Net as diffusers saves it in several files; the names of all that it writes."""
    theirs = diffusers.UNet2DConditionModel.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    theirs.save_pretrained(folder, max_shard_size="100KB", variant=variant)
    names = sorted(path.name for path in folder.glob("*.safetensors*"))
    assert len(names) > 2 and not (folder / "diffusion_pytorch_model.safetensors").exists()
    return theirs, names


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_in_several_files(variant, unet_folder):
    theirs, _ = in_shards(unet_folder, variant)
    ours, expected = UNet.from_pretrained(unet_folder).state_dict(), theirs.state_dict()
    assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/x.safetensors", ".safetensors", "x.bin", "", 5,
                                  None, ["x.safetensors"], "a/b.safetensors", "a\\b.safetensors", "lost"])
def test_an_index_names_files_beside_it_alone(name, unet_folder):
    _, names = in_shards(unet_folder)
    index = unet_folder / "diffusion_pytorch_model.safetensors.index.json"
    save_file({"x": torch.ones(2)}, unet_folder.parent / "out.safetensors")
    if name == "lost":
        (unet_folder / names[0]).unlink()
        return refuses(UNet, unet_folder, names[0], "download")
    edit_json(index, weight_map={"conv_in.weight": name})
    refuses(UNet, unet_folder, index, "weight_map")


@pytest.mark.parametrize("error, match", [
    (OSError("No such device (os error 19)"), "cannot map files: copy it to a local disk"),
    (OSError("The paging file is too small for this operation to complete. (os error 1455)"), "enough memory"),
    (RuntimeError("unable to mmap 438 bytes from file <x>: Cannot allocate memory (12)"), "enough memory"),
    (MemoryError(), "not enough memory")], ids=str)
def test_why_weights_cannot_be_mapped(error, match, unet_folder, monkeypatch):
    def broken(path):
        raise error
    monkeypatch.setattr("plumbing.weights.load_file", broken)
    refuses(UNet, unet_folder, "cannot be read", match)


# ---- bad folders ----

@pytest.mark.parametrize("problem, change", [
    ("lacks mid_block.resnets.0.norm1.bias", lambda tensors: tensors.pop("mid_block.resnets.0.norm1.bias")),
    ("has unknown surplus.weight", lambda tensors: tensors.update({"surplus.weight": torch.zeros(2)})),
    ("wrong shape for conv_in.bias", lambda tensors: tensors.update({"conv_in.bias": torch.zeros(33)})),
    ("NaN or infinity in conv_out.weight", nan("conv_out.weight")),
    ("NaN or infinity in conv_norm_out.bias", nan("conv_norm_out.bias", float("inf"))),
    ("NaN or infinity in time_embedding.linear_1.bias", nan("time_embedding.linear_1.bias", -float("inf")))])
def test_bad_tensors_are_named(problem, change, unet_folder):
    path = unet_folder / "diffusion_pytorch_model.safetensors"
    edit_tensors(path, change)
    refuses(UNet, unet_folder, path, problem)


def test_bad_tensors_in_the_other_networks(vae_folder, text_folder):
    edit_tensors(vae_folder / "diffusion_pytorch_model.safetensors", nan("decoder.conv_out.bias"))
    refuses(VAE, vae_folder, "decoder.conv_out.bias")
    edit_tensors(text_folder / "model.safetensors", lambda tensors: tensors.pop("final_layer_norm.bias"))
    refuses(CLIPTextModel, text_folder, "lacks final_layer_norm.bias")


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(keep, unet_folder):
    path = unet_folder / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuses(UNet, unet_folder, path, "download")


def test_pointer_instead_of_weights(unet_folder):
    """What `git clone` without LFS leaves in the place of a large file."""
    path = unet_folder / "diffusion_pytorch_model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:145a07e0\nsize 3438167534\n")
    refuses(UNet, unet_folder, path, "download")


UNSUPPORTED = [
    (UNet, "use_linear_projection", "yes"), (UNet, "act_fn", "gelu"), (UNet, "class_embed_type", "timestep"),
    (UNet, "down_block_types", ["AttnDownBlock2D"]), (UNet, "up_block_types", ["SimpleCrossAttnUpBlock2D"]),
    (UNet, "mid_block_type", "UNetMidBlock2D"), (UNet, "resnet_time_scale_shift", "scale_shift"),
    (UNet, "flip_sin_to_cos", False), (UNet, "freq_shift", 1), (UNet, "only_cross_attention", True),
    (UNet, "dual_cross_attention", True), (UNet, "mid_block_scale_factor", 0.5), (UNet, "conv_in_kernel", 1),
    (UNet, "transformer_layers_per_block", 2), (UNet, "addition_embed_type", "text"),
    (UNet, "time_embedding_type", "fourier"), (UNet, "center_input_sample", True),
    (UNet, "time_embedding_act_fn", "silu"), (UNet, "timestep_post_act", "silu"),
    (UNet, "attention_head_dim", "8"), (UNet, "layers_per_block", [1]),
    (VAE, "act_fn", "relu"), (VAE, "mid_block_add_attention", False), (VAE, "use_quant_conv", False),
    (VAE, "shift_factor", 0.1), (VAE, "latents_mean", [0.1, 0.0, 0.0, 0.0]),
    (CLIPTextModel, "hidden_act", "relu")]


@pytest.mark.parametrize("ours_class, key, value", UNSUPPORTED,
                         ids=[f"{ours_class.__name__}-{key}" for ours_class, key, value in UNSUPPORTED])
def test_unsupported_config_is_named(ours_class, key, value, request):
    folder = request.getfixturevalue({UNet: "unet_folder", VAE: "vae_folder"}.get(ours_class, "text_folder"))
    edit_json(folder / "config.json", **{key: value})
    refuses(ours_class, folder, "config.json", key if "types" not in key else value[0])


def test_widths_that_do_not_divide(unet_folder):
    edit_json(unet_folder / "config.json", norm_num_groups=5)
    refuses(UNet, unet_folder, "norm_num_groups")


@pytest.mark.parametrize("key, value", [("block_out_channels", [32, 64]), ("attention_head_dim", [8, 8])])
def test_levels_that_do_not_match(key, value, unet_folder):
    edit_json(unet_folder / "config.json", **{key: value})
    refuses(UNet, unet_folder, key)


def test_heads_of_each_level_must_divide_its_width(tmp_path):
    theirs_unet(**UNETS["as in SD 2.1-base"]).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", attention_head_dim=[2, 4, 8, 7])
    refuses(UNet, tmp_path, "attention_head_dim")


@pytest.mark.parametrize("content", [b'{"in_channels": 4,', b"\xff\xfe", b"", b"[4, 4]"],
                         ids=["cut off", "not UTF-8", "empty", "a list"])
def test_config_is_not_json(content, unet_folder):
    (unet_folder / "config.json").write_bytes(content)
    refuses(UNet, unet_folder, unet_folder / "config.json")


@pytest.mark.parametrize("ours_class", [UNet, VAE, CLIPTextModel, CLIP, CLIPTokenizer])
def test_missing_folder_and_file_for_a_folder(ours_class, tmp_path):
    refuses(ours_class, tmp_path / "nowhere", tmp_path / "nowhere")
    (tmp_path / "sd-v1-4.ckpt").touch()                            # the single file of the original release
    refuses(ours_class, tmp_path / "sd-v1-4.ckpt", "sd-v1-4.ckpt")


def test_missing_files(unet_folder):
    weights = unet_folder / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    refuses(UNet, unet_folder, unet_folder, "diffusion_pytorch_model.safetensors")
    (unet_folder / "config.json").unlink()
    refuses(UNet, unet_folder, unet_folder / "config.json", "missing")


def test_pickle_is_refused_and_the_printed_command_converts_it(unet_folder, monkeypatch):
    weights = unet_folder / "diffusion_pytorch_model.safetensors"
    expected = load_file(weights)
    weights.unlink()
    torch.save(expected, unet_folder / "diffusion_pytorch_model.bin")
    refuses(UNet, unet_folder, "diffusion_pytorch_model.bin", "convert")
    with pytest.raises(UserError) as caught:
        UNet.from_pretrained(unet_folder)
    command = str(caught.value).split('python -c "')[1].split('"')[0]
    monkeypatch.chdir(unet_folder)
    exec(command, {})
    ours = UNet.from_pretrained(unet_folder).state_dict()
    assert all(torch.equal(ours[key], expected[key]) for key in expected)


def damage(model, what):
    """Break a copy of mini/ in one way; return what the error must say."""
    unet = model / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    if what == "no text encoder":
        shutil.rmtree(model / "text_encoder")
        return "text_encoder"
    if what == "missing":
        del tensors[key]
        save_file(tensors, unet)
        return key
    if what == "extra":
        save_file(tensors | {"surplus.weight": tensors[key].clone()}, unet)
        return "surplus.weight"
    if what == "misshapen":
        save_file(tensors | {key: tensors[key][:8].clone()}, unet)
        return key
    if what == "NaN":
        tensors[key][0, 0] = float("nan")
        save_file(tensors, unet)
        return key
    if what == "truncated":
        unet.write_bytes(unet.read_bytes()[:100000])
        return "cannot be read"
    if what in ("class_embed_type", "in_channels"):
        config = json.loads((model / "unet/config.json").read_text())
        (model / "unet/config.json").write_text(json.dumps(config | {what: 9}))
        if what == "class_embed_type":
            return "class_embed_type = 9"
        wide = tensors["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9]
        save_file(tensors | {"conv_in.weight": wide.contiguous()}, unet)
        return "no text-to-image model"                           # inpainting, for instance
    unet.rename(unet.with_suffix(".bin"))
    return "save_file"                                            # says how to convert


@pytest.mark.parametrize("what", ["no text encoder", "missing", "extra", "misshapen", "NaN", "truncated",
                                  "class_embed_type", "in_channels", "bin"])
def test_broken_folders_are_named_and_leave_nothing(refused, broken, tmp_path, what):
    match = damage(broken, what)
    work = tmp_path / "work"
    work.mkdir()
    refused("realera.py", *AIRPLANE, "--model", broken, *QUICK, cwd=work, match=re.escape(match))


@pytest.mark.parametrize("file, key, value", [
    ("unet/config.json", "norm_eps", -1e-5), ("unet/config.json", "layers_per_block", 10_000_000),
    ("unet/config.json", "block_out_channels", []), ("unet/config.json", "block_out_channels", [8, "16"]),
    ("unet/config.json", "cross_attention_dim", True), ("vae/config.json", "scaling_factor", 0),
    ("vae/config.json", "block_out_channels", [[32]]),
    ("text_encoder/config.json", "num_attention_heads", 3),
    ("text_encoder/config.json", "intermediate_size", -1),
    ("scheduler/scheduler_config.json", "beta_start", 0),
    ("scheduler/scheduler_config.json", "beta_end", 10 ** 400), ("defaults.json", "size", True),
    ("defaults.json", "guidance", {}), ("defaults.json", "steps", 0)], ids=str)
def test_values_that_no_model_can_have_are_named(file, key, value, broken):
    edit_json(broken / file, **{key: value})
    with pytest.raises(UserError, match=f"{key}|do not fit each other"):
        Model(broken)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64], ids=str)
def test_weights_that_are_no_real_numbers_are_named(dtype, unet_folder):
    edit_tensors(unet_folder / "diffusion_pytorch_model.safetensors",
                 lambda W: W.update({"conv_in.bias": W["conv_in.bias"].to(dtype)}))
    refuses(UNet, unet_folder, "no floating-point numbers in conv_in.bias")


def test_text_that_the_unet_cannot_read_is_refused_before_any_work(broken, refused, tmp_path):
    tensors = {name: W[:, :-8].contiguous() if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")) else W
               for name, W in load_file(broken / UNET).items()}
    save_file(tensors, broken / UNET)
    (tmp_path / "work").mkdir()
    refused("realera.py", *AIRPLANE, *CLOSED, "--model", broken, cwd=tmp_path / "work",
            match="U-Net reads others")
