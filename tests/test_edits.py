"""An edit folder fits the model that it was made from, whatever the precision of its file."""
import pytest
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
