"""Models that are not Stable Diffusion v1 in a folder: SD 2.1-base, an original single file, a hub id.

Each is a small random model with the real one's structure, written by diffusers and transformers.
"""
import json
import shutil

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file
from test_commands import AIRPLANE, QUICK, refused, run  # noqa: F401  (refused is a fixture)
from test_networks import OFFICIAL_VAE, UNETS, edit_json, theirs_text, theirs_unet, theirs_vae
from test_tokenizer import reference, write_padding

import files
from concepts import make_pairs
from sample import Model, Text

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True, "steps_offset": 1}
V2 = {"unet": UNETS["as in SD 2.1-base"], "text": {"hidden_act": "gelu"}, "padding": "SD 2.1-base"}


def write_model(folder, version=V2):
    """A pipeline's folder with random weights: 4 levels of 2 layers as SD has them, 32×32 pictures."""
    (folder / "tokenizer").mkdir(parents=True)
    write_padding(folder / "tokenizer", version["padding"])
    tokenizer = reference(folder / "tokenizer")
    text = theirs_text(hidden_size=version["unet"]["cross_attention_dim"], intermediate_size=64,
                       num_attention_heads=4, num_hidden_layers=3, vocab_size=len(tokenizer),
                       **version["text"])
    vae = theirs_vae(block_out_channels=[16, 16, 32, 32], norm_num_groups=8)
    scheduler = diffusers.PNDMScheduler.from_config(SCHEDULER)
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=theirs_unet(**version["unet"]),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    shutil.move(folder / "tokenizer", folder / "official")
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")                            # written in the form of today
    shutil.move(folder / "official", folder / "tokenizer")
    edit_json(folder / "scheduler/scheduler_config.json", clip_sample=False)      # as in the official file
    (folder / "defaults.json").write_text(json.dumps({"guidance": 3.0, "steps": 3, "size": 64}))
    return folder


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("sd2") / "model", V2)


def same_pictures(model, pipe):
    """Two prompts drawn by both, from the same noise: at most 1/255 apart."""
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a photo of a cat!", "an oil painting of the river at night, unseen"]
    expected = pipe(prompts, latents=model.noise([1, 2]), num_inference_steps=4, guidance_scale=3.0,
                    height=64, width=64, output_type="pt").images
    ours = model.draw(prompts, [1, 2], steps=4, guidance=3.0)
    assert (ours - expected.float()).abs().max() <= 1 / 255
    other = model.draw(prompts[::-1], [1, 2], steps=4, guidance=3.0)
    assert (ours - other).abs().max() > 10 / 255                   # the text matters in this model


# ---- Stable Diffusion 2.1-base ----

def test_pictures_of_sd_2_1_base_equal_diffusers(sd2):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd2)
    assert pipe.tokenizer.pad_token == "!" and pipe.unet.config.attention_head_dim == [2, 4, 8, 6]
    same_pictures(Model(sd2), pipe)


def test_erasing_from_sd_2_1_base(sd2, tmp_path):
    """Closed form and LoRA; what they write means the same in diffusers."""
    done = run("realera.py", *AIRPLANE, "--model", sd2, *QUICK, "--out", "edit", cwd=tmp_path)
    assert "Eq. 8" in done.stdout and "Eq. 9" in done.stdout
    edit, W0 = load_file(tmp_path / "edit/erased.safetensors"), files.cross_attention(sd2)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd2)
    assert edit.keys() == W0.keys() and not any(torch.equal(edit[name], W0[name]) for name in W0)
    assert pipe.unet.load_state_dict(edit, strict=False).unexpected_keys == []
    same_pictures(Model(sd2, edit=tmp_path / "edit"), pipe)


def test_edited_rows_where_padding_is_no_end_of_text(sd2):
    """The last token of the concept, the one end-of-text token, and padding."""
    text = Text(sd2)
    pair, = make_pairs(["airplane!"], ["sky"], "object", text, "tail", 0)
    ids = text.tokenizer(["a photo of the airplane!"])[0].tolist()
    assert ids[pair.start:pair.start + 3] == [0, text.tokenizer.eos, 0] and set(ids[pair.start + 2:]) == {0}
    assert pair.n == 77 - pair.start


def test_velocity_prediction_is_refused(sd2, tmp_path, refused):  # noqa: F811
    """Stable Diffusion 2.1 (768×768) predicts v, not the noise."""
    model, work = shutil.copytree(sd2, tmp_path / "model"), tmp_path / "work"
    work.mkdir()
    edit_json(model / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    refused("sample.py", "x", "--model", model, cwd=work, match="prediction_type = 'v_prediction'")
