"""tools/export.py: a pipeline folder that diffusers opens, and bad input."""
import json
import os
import shutil

import diffusers
import pytest
import torch
from safetensors import safe_open

from helpers import MINI, SIZE, UNET, edit_json
from plumbing.edits import about_edit, read_edit
from sample import Model


def drawn_by_diffusers(pipe, noise):
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a photo of the airplane", latents=noise, num_inference_steps=5, guidance_scale=3.0,
                height=SIZE, width=SIZE, output_type="pt").images.float()


def test_diffusers_opens_the_exported_folder_and_draws_our_picture(here, edits, tmp_path):
    here("tools/export.py", "--edit", edits / "a", "--folder", "new/one", cwd=tmp_path)
    ours = Model(MINI)
    ours.put(read_edit(edits / "a", MINI))
    prompt = (["a photo of the airplane"], [1], 5, 3.0)
    picture = ours.draw(*prompt)
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "new/one")
    assert (picture - drawn_by_diffusers(theirs, ours.noise([1]))).abs().max() <= 1 / 255
    assert (picture - Model(MINI).draw(*prompt)).abs().max() > 0.1
    assert torch.equal(Model(tmp_path / "new/one").draw(*prompt), picture)           # our tools open it, too
    with safe_open(tmp_path / "new/one" / UNET, "pt") as file:
        assert json.loads(file.metadata()["edit"]) == about_edit(edits / "a")


@pytest.mark.parametrize("args, match", [
    ([], "give --folder"), (["--lora", "0"], "at least 1"), (["--folder", "there"], "there exists"),
    (["--edit", "nowhere", "--lora", "1"], "no erased.safetensors"), (["--link", "--lora", "2"], "--folder"),
    (["--lora", "1"], "a-rank1-webui.*exists"), (["--lora", "2", "--folder", "a"], "a exists"),
    (["--lora", "2", "--folder", "there/new", "--model", "evil"], "no plain name")])
def test_export_refuses_bad_input(refused, edits, tmp_path, args, match):
    (tmp_path / "there").mkdir()
    shutil.copytree(edits / "a", tmp_path / "a")
    (tmp_path / "a/a-rank1-webui.safetensors").write_text("precious")
    shutil.copytree(MINI, tmp_path / "evil", ignore=shutil.ignore_patterns("clip", "*.py", "*.md"))
    edit_json(tmp_path / "evil/model_index.json", **{"../evil": ["x", "y"]})
    edit = [] if "--edit" in args else ["--edit", "a"]
    refused("tools/export.py", *edit, *args, cwd=tmp_path, match=match)
    assert (tmp_path / "a/a-rank1-webui.safetensors").read_text() == "precious"


def everything(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_original_stays_when_diffusers_saves_over_the_export(edits, broken, here, tmp_path):
    """It writes into files that are there: through a hard link, into the original's."""
    before = everything(broken)
    here("tools/export.py", "--edit", edits / "a", "--model", broken, "--folder", "sd", cwd=tmp_path)
    shared = [path for path in everything(tmp_path / "sd") if (broken / path).exists()
              and os.path.samefile(tmp_path / "sd" / path, broken / path)]
    assert not shared
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    pipe.vae.register_to_config(scaling_factor=0.5)
    pipe.to(torch.float16).save_pretrained(tmp_path / "sd")
    for path in (tmp_path / "sd").rglob("*"):                     # as other versions of its libraries do
        if path.is_file():
            path.open("r+b").write(b"other")
    assert everything(broken) == before


def test_weights_are_linked_only_if_one_says_so(edits, here, tmp_path):
    here("tools/export.py", "--edit", edits / "a", "--folder", "sd", "--link", cwd=tmp_path)
    shared = [str(path) for path in everything(tmp_path / "sd") if (MINI / path).exists()
              and os.path.samefile(tmp_path / "sd" / path, MINI / path)]
    assert sorted(shared) == ["clip/model.safetensors", "text_encoder/model.safetensors",
                              "vae/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("place", ["tokenizer/secret.txt", "vae/config.json", "model_index.json",
                                   "defaults.json", "text_encoder/model.safetensors"])
def test_a_link_out_of_the_model_carries_nothing_into_an_export(edits, broken, refused, tmp_path, place):
    secret, work = tmp_path / "private", tmp_path / "work"
    work.mkdir()
    if (broken / place).exists():
        (broken / place).rename(secret)
    else:
        secret.write_text("my keys")
    (broken / place).symlink_to(secret)
    refused("tools/export.py", "--edit", edits / "a", "--model", broken, "--folder", "sd", cwd=work,
            match="leads out of the model")
