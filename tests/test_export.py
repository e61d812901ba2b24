"""tools/export.py: a pipeline folder that diffusers opens, and bad input."""
import json
import os
import shutil

import diffusers
import pytest
import torch
from safetensors import safe_open

from helpers import MINI, UNET
from plumbing.edits import about_edit, read_edit
from sample import Model


def drawn_by_diffusers(pipe, noise):
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe("a photo of the airplane", latents=noise, num_inference_steps=5, guidance_scale=3.0,
                height=32, width=32, output_type="pt").images.float()


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
    assert os.path.samefile(tmp_path / "new/one/vae/config.json", MINI / "vae/config.json")
    with safe_open(tmp_path / "new/one" / UNET, "pt") as file:
        assert json.loads(file.metadata()["edit"]) == about_edit(edits / "a")


@pytest.mark.parametrize("args, match", [
    ([], "give --folder"), (["--lora", "0"], "at least 1"), (["--folder", "there"], "there exists"),
    (["--edit", "nowhere", "--lora", "1"], "no erased.safetensors"), (["--lora", "1"], "lora_rank1.*exists")])
def test_export_refuses_bad_input(refused, edits, tmp_path, args, match):
    (tmp_path / "there").mkdir()
    shutil.copytree(edits / "a", tmp_path / "a")
    (tmp_path / "a/lora_rank1_kohya.safetensors").write_text("precious")
    edit = [] if "--edit" in args else ["--edit", "a"]
    refused("tools/export.py", *edit, *args, cwd=tmp_path, match=match)
    assert (tmp_path / "a/lora_rank1_kohya.safetensors").read_text() == "precious"
