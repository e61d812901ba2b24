"""Models in an original single file of Stable Diffusion v1.

Each is a small random model with the real one's structure, written by diffusers and transformers.
"""
import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file

from experiments import tables
from helpers import AIRPLANE, MINI, NETWORKS, same_pictures, write_single_file, write_vocabulary
from plumbing import UserError
from plumbing.edits import base_hash, cross_attention, read_edit, write_edit
from plumbing.models import fingerprint, model_folder
from sample import Model
from unet import UNet


def test_the_tests_single_file_is_an_original_one(sd1):
    """diffusers' conversion of it gives the folder's tensors back."""
    folder, file = sd1
    tensors = load_file(file)
    for part, convert in {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}.items():
        found = convert(dict(tensors), json.loads((folder / part / "config.json").read_text()))
        expected = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_single_file_holds_the_folders_networks(sd1, dtype, tmp_path):
    folder, file = sd1
    if dtype == torch.float16:
        file = tmp_path / "half.safetensors"
        shutil.copytree(sd1[1].parent, tmp_path, ignore=shutil.ignore_patterns("dream*"), dirs_exist_ok=True)
        save_file({key: tensor.to(dtype) if tensor.is_floating_point() else tensor
                   for key, tensor in load_file(sd1[1]).items()}, file)
    for part, (network, _) in NETWORKS.items():
        ours, expected = (network.from_pretrained(place / part).state_dict() for place in (file, folder))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key].to(dtype).float()) for key in expected)
    assert base_hash(cross_attention(file)) == base_hash(cross_attention(folder))
    assert {tensor.dtype for tensor in cross_attention(file).values()} == {dtype}


def test_pictures_of_a_single_file_equal_diffusers_from_single_file(sd1):
    folder, file = sd1
    pipe = diffusers.StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, safety_checker=None)
    same_pictures(Model(file), pipe)


def test_every_script_takes_a_single_file(sd1, here, monkeypatch, tmp_path):
    """And an edit made with the file fits the folder, and vice versa; nothing appears beside the file."""
    folder, file = sd1
    before = sorted(file.parent.rglob("*"))
    closed, few = ["--lora-steps", 0, "--no-pictures"], ["--n", 1, "--steps", 1]
    here("realera.py", *AIRPLANE, "--model", file, *closed, "--out", "by-file", cwd=tmp_path)
    here("realera.py", *AIRPLANE, "--model", folder, *closed, "--out", "by-folder", cwd=tmp_path)
    one, other = read_edit(tmp_path / "by-file", folder), read_edit(tmp_path / "by-folder", file)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    here("sample.py", "a cat", "--model", file, "--edit", "by-folder", *few, cwd=tmp_path)
    (tmp_path / "mine.csv").write_text("prompt\na cat\n")
    few += ["--model", file, "--clip", MINI / "clip"]
    csv = ["--prompts", "mine.csv", "--edit", "by-file", "--out", "evaluation"]
    here("eval_clip.py", *csv, *few, cwd=tmp_path)
    monkeypatch.setattr(tables, "TABLES", {"3": {"1 closed form": tables.CLOSED}})
    here("experiments/tables.py", "--table", 3, *few, "--out", "tables", cwd=tmp_path)
    assert (tmp_path / "evaluation/metrics.csv").exists() and (tmp_path / "tables/table3.csv").exists()
    assert sorted(file.parent.rglob("*")) == before


def test_an_edit_is_refused_for_another_single_file(sd1, tmp_path):
    folder, file = sd1
    W0 = cross_attention(folder)
    write_edit(tmp_path, W0, {"concepts": ["x"], "anchors": ["y"], "task": "object",
                              "base_hash": base_hash({name: 1.01 * matrix for name, matrix in W0.items()})})
    with pytest.raises(UserError, match="another model"):
        read_edit(tmp_path, file)


def test_a_single_file_is_not_copied_in_memory(sd1, monkeypatch):
    read = {}
    monkeypatch.setattr("plumbing.weights.load_file", lambda path: read.update(load_file(path)) or read)
    ours = {parameter.data_ptr() for parameter in UNet.from_pretrained(sd1[1] / "unet").parameters()}
    assert ours == {t.data_ptr() for key, t in read.items() if key.startswith("model.diffusion_model.")}


def test_different_single_files_have_different_results_folders(sd1, tmp_path):
    """Pictures that were counted are found again by a hash of the weights."""
    copy = Path(shutil.copytree(sd1[1].parent, tmp_path / "alone")) / "dream.safetensors"
    assert fingerprint(sd1[1]) == fingerprint(copy)
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    assert fingerprint(sd1[1]) != fingerprint(copy)


@pytest.mark.parametrize("problem, change", [
    ("has unknown time_embed.4.weight",
     lambda t: t.update({"model.diffusion_model.time_embed.4.weight": torch.ones(2)})),
    ("has unknown input_blocks.1.2.weight",
     lambda t: t.update({"model.diffusion_model.input_blocks.1.2.weight": torch.ones(2)})),
    ("lacks down_blocks.3.resnets.1.conv2.bias",
     lambda t: t.pop("model.diffusion_model.input_blocks.11.0.out_layers.3.bias")),
    ("wrong shape for conv_in.bias",
     lambda t: t.update({"model.diffusion_model.input_blocks.0.0.bias": torch.ones(3)}))])
def test_what_a_single_file_should_not_hold_is_named(sd1, tmp_path, problem, change):
    tensors = load_file(sd1[1])
    change(tensors)
    shutil.copytree(sd1[1].parent / "unet", tmp_path / "unet")
    save_file(tensors, tmp_path / "dream.safetensors")
    with pytest.raises(UserError, match=re.escape(problem)):
        UNet.from_pretrained(tmp_path / "dream.safetensors" / "unet")


LEFTOVERS = """cond_stage_model.logit_scale cond_stage_model.text_projection
    cond_stage_model.transformer.text_projection.weight cond_stage_model.transformer.logit_scale
    embedding_manager.embedder.transformer.text_model.x bundle_emb.easynegative.string_to_param.*
    control_model.input_blocks.0.0.weight first_stage_model.loss.logvar
    first_stage_model.loss.discriminator.main.0.weight first_stage_model.model_ema.decay
    first_stage_model.model_ema.encoderconv_inweight logvar scale_factor global_step
    lora_unet_mid_block_attentions_0_proj_in.lora_up.weight lora_te_text_model_x.alpha""".split()


def test_leftovers_that_other_loaders_ignore_are_ignored(sd1, tmp_path):
    folder, file = sd1
    save_file(load_file(file) | {key: torch.ones(2) for key in LEFTOVERS}, tmp_path / "dream.safetensors")
    for part in ("unet", "vae", "text_encoder"):
        shutil.copytree(folder / part, tmp_path / part, ignore=shutil.ignore_patterns("*.safetensors"))
        model = model_folder(str(tmp_path / "dream.safetensors"))
        ours, expected = (NETWORKS[part][0].from_pretrained(place / part).state_dict()
                          for place in (model, folder))
        assert ours.keys() == expected.keys() and all(torch.equal(ours[key], expected[key]) for key in ours)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_an_edit_of_weights_in_8_bits_is_in_16(sd1, dtype, here, tmp_path):
    """Steps of 6 % or 12 % would swallow the edit; every number of 8 bits is one of 16."""
    folder, file = sd1
    shutil.copytree(file.parent, tmp_path / "m", ignore=shutil.ignore_patterns("dream*"))
    file, tensors = tmp_path / "m/dream.safetensors", load_file(file)
    save_file({key: tensor.to(dtype) if key.startswith("model.diffusion_model.") else tensor
               for key, tensor in tensors.items()}, file)
    W0 = cross_attention(file)
    assert {tensor.dtype for tensor in W0.values()} == {torch.float16}
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    original = tensors[f"model.diffusion_model.{key.replace('mid_block.attentions.0', 'middle_block.1')}"]
    assert torch.equal(W0[key].float(), original.to(dtype).float())
    here("realera.py", *AIRPLANE, "--model", file, "--lora-steps", 0, "--no-pictures", "--out", "e",
         cwd=tmp_path)
    W = read_edit(tmp_path / "e", file)
    assert {tensor.dtype for tensor in W.values()} == {torch.float16} and not torch.equal(W[key], W0[key])


def test_files_that_are_no_single_file_of_sd_v1(sd1, tmp_path, refused):  # noqa: F811
    tensors, work = load_file(sd1[1]), tmp_path / "work"
    work.mkdir()
    (tmp_path / "sd-v1-4.ckpt").write_bytes(b"\x80\x02pickle")
    save_file({re.sub("^cond_stage_model.transformer", "cond_stage_model.model", key): tensor
               for key, tensor in tensors.items()}, tmp_path / "v2-1.safetensors")
    save_file({re.sub("^cond_stage_model.transformer", "conditioner.embedders.0.transformer", key): tensor
               for key, tensor in tensors.items()}, tmp_path / "sdxl.safetensors")
    save_file({"model.diffusion_model.joint_blocks.0.x": torch.ones(2)}, tmp_path / "v3.safetensors")
    conv = "model.diffusion_model.input_blocks.0.0.weight"
    for name, channels in (("inpaint", 9), ("pix2pix", 8)):
        wide = torch.ones(len(tensors[conv]), channels, 3, 3)
        save_file(tensors | {conv: wide}, tmp_path / f"{name}.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(sd1[1].read_bytes()[:5000])
    for name, match in {"sd-v1-4.ckpt": "pickle",
                        "lora.safetensors": "no key begins with model.diffusion_model",
                        "v2-1.safetensors": "is Stable Diffusion 2", "sdxl.safetensors": "is SDXL",
                        "v3.safetensors": "is Stable Diffusion 3", "inpaint.safetensors": "is an inpainting",
                        "pix2pix.safetensors": "is an InstructPix2Pix", "absent.ckpt": "no such file",
                        "absent.safetensors": "no such file",
                        "cut.safetensors": "download complete"}.items():
        refused("sample.py", "x", "--model", tmp_path / name, cwd=work, match=match)


@pytest.mark.slow
def test_full_size_single_file_with_nothing_but_a_tokenizer_beside(tmp_path):
    """SD v1.4's own shapes in half precision; the configs are our defaults. 2 GB on disk."""
    parts = {}
    for part, (network, _) in NETWORKS.items():
        with torch.device("meta"):
            shapes = network().state_dict()
        parts[part] = {key: torch.randn(t.shape, dtype=torch.float16) * 0.02 for key, t in shapes.items()}
    file = write_single_file(tmp_path / "dream.safetensors", parts, torch.float16)
    vocabulary = json.loads((write_vocabulary(tmp_path) / "vocab.json").read_text())
    more = {chr(0x20000 + i): i for i in range(len(vocabulary), 49408)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary | more))
    (tmp_path / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.move(tmp_path / name, tmp_path / "tokenizer")
    model = Model(file, dtype=torch.float16)
    for part, network in {"unet": model.unet, "vae": model.vae, "text_encoder": model.text.encoder}.items():
        found = network.state_dict()
        assert found.keys() == parts[part].keys()
        assert all(torch.equal(found[key].half(), parts[part][key]) for key in found)
    tensors = load_file(file)
    config = {"layers_per_block": 2, "up_block_types": [0] * 4, "down_block_types": [0] * 4}
    theirs = {"unet": convert_ldm_unet_checkpoint(dict(tensors), config | {"class_embed_type": None,
                                                                         "addition_embed_type": None}),
              "vae": convert_ldm_vae_checkpoint(dict(tensors), config)}
    for part, converted in theirs.items():
        assert converted.keys() == parts[part].keys()
        assert all(torch.equal(converted[key], parts[part][key]) for key in converted)
