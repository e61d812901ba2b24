"""Retrained: another U-Net, as an edit, draws what it draws by itself, and is not said to move text."""
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments import frontier
from helpers import MINI, UNET, link_mini, quick_model
from plumbing.edits import read_edit
from sample import Model

PROMPTS = ["a photo of the airplane", "a photo of the dog"]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A whole model like mini/, whose U-Net has numbers of its own."""
    folder, generator = tmp_path_factory.mktemp("other"), torch.Generator().manual_seed(0)
    link_mini(folder, steps=2)
    (folder / "unet").unlink()
    shutil.copytree(MINI / "unet", folder / "unet")
    save_file({name: (w * (1 + 0.2 * torch.randn(w.shape, generator=generator))).half()
               for name, w in load_file(MINI / UNET).items()}, folder / UNET)
    return folder


def test_the_edit_draws_as_the_other_model_and_nothing_is_said_of_text(other, here, tmp_path, capsys):
    here("baselines/retrained.py", "--concept", "airplane", "--set", f"unet={other}/unet", "--out", "edit",
         "--no-pictures", cwd=tmp_path)
    said, about = capsys.readouterr(), json.loads((tmp_path / "edit/run.json").read_text("utf-8"))
    assert "drift" not in said.out and "of the way" not in said.out and "warning" not in said.err
    assert "shares" not in about and about["anchors"] == [""]
    assert list(about["numbers"]) == ["‖ΔW‖/‖W‖"] and 0.15 < about["numbers"]["‖ΔW‖/‖W‖"] < 0.25
    assert {"seconds", "MB"} <= frontier.numbers_of(tmp_path / "edit").keys() <= {"seconds", "MB", "peak GiB"}
    model = quick_model(2)
    before = model.draw(PROMPTS, [1, 2])
    model.put(read_edit(tmp_path / "edit", MINI, model.text))
    drawn, wanted = model.draw(PROMPTS, [1, 2]), Model(other).draw(PROMPTS, [1, 2])
    assert (drawn - wanted).abs().max() < 1e-5 and (drawn - before).abs().max() > 0.1


def lacks(tensors):
    del tensors["conv_in.bias"]


def wider(tensors):
    tensors["conv_in.bias"] = torch.zeros(65)


def the_models_own(tensors):
    tensors |= load_file(MINI / UNET)


@pytest.mark.parametrize("change, match", [
    (lacks, "lacks conv_in.bias: this is a U-Net of another"), (wider, "has the wrong shape for conv_in"),
    (the_models_own, "is the model's own U-Net: give another with --set unet=")])
def test_a_unet_that_does_not_fit_or_is_no_other_is_one_line(other, refused, tmp_path, change, match):
    tensors = load_file(other / UNET)
    change(tensors)
    (tmp_path / "unet").mkdir()
    save_file(tensors, tmp_path / UNET)
    refused("baselines/retrained.py", "--concept", "airplane", "--set", "unet=unet", cwd=tmp_path,
            match=match)


def test_without_another_unet_and_for_a_preview_it_is_one_line(refused, tmp_path):
    refused("baselines/retrained.py", "--concept", "airplane", cwd=tmp_path,
            match="out/mini/unet is not there: train one")
    (tmp_path / "prompts.txt").write_text("a photo of the jet\n")
    refused("baselines/retrained.py", "--concept", "airplane", "--preview", "prompts.txt", cwd=tmp_path,
            match="another U-Net moves no text")
