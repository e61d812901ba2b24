"""An edit folder fits the model that it was made from, whatever the precision of its file."""
import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers import MINI, run
from plumbing import UserError
from plumbing.edits import base_hash, cross_attention, read_edit


def test_sample_takes_the_edit_and_refuses_it_for_another_model(edit, broken, tmp_path):
    run("sample.py", "a photo of the airplane", "--n", 1, "--steps", 2, "--edit", edit, cwd=tmp_path)
    path = broken / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("attn2.to_k.weight"))
    save_file(tensors | {key: tensors[key] * 1.01}, path)
    with pytest.raises(UserError, match="another model"):
        read_edit(edit, broken)


def test_hash_is_the_same_for_full_and_half_precision_files():
    W0 = cross_attention(MINI)
    assert base_hash(W0) == base_hash({k: v.float() for k, v in W0.items()})
    assert base_hash(W0) != base_hash({k: v * 1.01 for k, v in W0.items()})


def test_a_folder_without_weights_is_not_drawn_as_if_untouched(refused, tmp_path):
    """A method that changes how pictures are drawn leaves a run.json alone: nobody can read it back yet."""
    (tmp_path / "sampled").mkdir()
    about = {"method": "SLD", "base_hash": base_hash(cross_attention(MINI)), "concepts": ["dog"]}
    (tmp_path / "sampled/run.json").write_text(json.dumps(about))
    for script, *args in (["sample.py", "a dog", "--n", 1, "--steps", 1], ["eval_clip.py", "--n", 1, "--quick"],
                          ["tools/export.py", "--folder", "sd"]):
        refused(script, *args, "--edit", "sampled", cwd=tmp_path, match="--edit sampled is of a method that")


def test_a_whole_u_net_in_several_files_is_an_edit(tmp_path):
    unet = diffusers.UNet2DConditionModel.from_pretrained(MINI / "unet")
    weight = unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
    weight.data *= 2
    (tmp_path / "model_index.json").write_text("{}")
    unet.half().save_pretrained(tmp_path / "unet", max_shard_size="1MB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    (name, found), = read_edit(tmp_path, MINI).items()
    assert name == "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    assert torch.equal(found, weight)
