"""An edit folder fits the model that it was made from, whatever the precision of its file."""
import json

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers import AIRPLANE, CLOSED, MINI
from plumbing import UserError
from plumbing.edits import about_edit, base_hash, cross_attention, read_edit, text_hash, write_edit
from starts import run


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


def acting(folder, method="SLD", **more):
    """The folder of a method that acts while a picture is drawn."""
    folder.mkdir()
    about = {"method": method, "base_hash": base_hash(cross_attention(MINI)), "concepts": ["dog"],
             "anchors": [""], "task": "object", "settings": {"preset": "max"}, "safety_text": "dog"} | more
    (folder / "run.json").write_text(json.dumps(about))
    return folder


def test_a_folder_without_weights_is_not_drawn_as_if_untouched(refused, tmp_path):
    """Only our own methods' functions are found again: what a folder names is never imported."""
    acting(tmp_path / "sampled", "os")
    for script, *args in (["sample.py", "a dog", "--n", 1, "--steps", 1],
                          ["eval_clip.py", "--n", 1, "--quick"], ["tools/export.py", "--folder", "sd"]):
        refused(script, *args, "--edit", "sampled", cwd=tmp_path, match="--edit sampled is of a method that")


def test_an_own_methods_weights_are_not_drawn_without_its_functions(edit, tmp_path):
    """Of both, the folder has the weights alone."""
    about = about_edit(edit) | {"method": "Mine", "drawing": ["guide"]}
    (tmp_path / "mine").mkdir()
    save_file(load_file(edit / "erased.safetensors"), tmp_path / "mine/erased.safetensors",
              {"edit": json.dumps(about)})
    with pytest.raises(UserError, match=r"changes how pictures are drawn \(Mine\): from its folder"):
        read_edit(tmp_path / "mine", MINI)


def test_who_draws_gets_our_methods_functions_and_what_holds_weights_alone_refuses(refused, text, tmp_path):
    found = read_edit(acting(tmp_path / "sld"), MINI, text)
    assert found == {} and found.drawing.keys() == {"guide", "beside"}
    assert torch.equal(found.drawing["beside"], text(["dog"]))
    assert found.about["settings"] == {"preset": "max"} and len(found.about["code"]) == 64
    (tmp_path / "p.txt").write_text("a cat\n")
    for script, *args in (["tools/export.py", "--folder", "sd", "--edit", "sld"],
                          ["tools/export.py", "--lora", 2, "--edit", "sld"], ["tools/merge.py", "sld", "sld"],
                          ["tools/preview.py", "p.txt", "--edit", "sld"],
                          ["experiments/lora_rank.py", "--edit", "sld"],
                          ["rece.py", "--concept", "dog", "--edit", "sld"]):
        refused(script, *args, cwd=tmp_path, match=r"drawn \(SLD\): weights alone")
    refused("sample.py", "a dog", "--edit", "sld", "--strength", 0.5, cwd=tmp_path, match="changes weights")


@pytest.mark.parametrize("change, match", [({"settings": {"preset": "huge"}}, "preset = weak or"),
                                           ({"settings": {"speed": 1}}, "damaged"),
                                           ({"settings": None}, "damaged"),
                                           ({"settings": {"scale": "1"}}, "damaged"),
                                           ({"base_hash": "other"}, "another model"),
                                           ({"text_hash": "other"}, "another text encoder")], ids=str)
def test_a_folder_of_ours_that_is_damaged_or_of_another_model_is_refused(change, match, text, tmp_path):
    with pytest.raises(UserError, match=match):
        read_edit(acting(tmp_path / "sld", **change), MINI, text)


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


# ---- an edit that is damaged, or does not belong here ----

def changed(edit, folder, change, rename=None):
    """A copy of an edit whose tensors went through `change`; its metadata stay."""
    folder.mkdir()
    path = folder / (rename or "erased.safetensors")
    with safe_open(edit / "erased.safetensors", "pt") as file:
        about = file.metadata()
    save_file(change(load_file(edit / "erased.safetensors")), path, about)
    return path


def first(W, change):
    name = min(W)
    return W | {name: change(W[name])}


@pytest.mark.parametrize("change, match", [
    (lambda W: {}, "holds no tensor"),
    (lambda W: dict(sorted(W.items())[::2]), "does not hold what was written"),
    (lambda W: first(W, lambda w: w * 1.001), "does not hold what was written"),
    (lambda W: first(W, lambda w: w * float("nan")), "NaN"),
    (lambda W: {name: w.to(torch.int8) for name, w in W.items()}, "no floating-point numbers"),
    (lambda W: first(W, lambda w: w[:-1].contiguous()), "wrong shape"),
    (lambda W: W | {"other.weight": torch.zeros(2)}, "unknown other.weight")],
    ids=["none", "half", "damaged", "NaN", "int8", "shape", "unknown"])
def test_damaged_edits_are_refused(change, match, edit, tmp_path):
    changed(edit, tmp_path / "bad", change)
    with pytest.raises(UserError, match=match):
        read_edit(tmp_path / "bad", MINI)


def test_another_text_encoder_is_noticed(edit, broken):
    path = broken / "text_encoder/model.safetensors"
    save_file({name: W * 1.01 if W.is_floating_point() else W for name, W in load_file(path).items()}, path)
    with pytest.raises(UserError, match="another text encoder"):
        read_edit(edit, broken)


def test_text_hash_is_the_same_however_the_file_spells_its_names(broken):
    before, path = text_hash(broken), broken / "text_encoder/model.safetensors"
    tensors = {f"text_model.{name.removeprefix('text_model.')}": W.half()
               for name, W in load_file(path).items()}
    save_file(tensors | {"text_model.embeddings.position_ids": torch.arange(77)}, path)
    assert text_hash(broken) == before
    save_file({name.removeprefix("text_model."): W for name, W in tensors.items()}, path)
    assert text_hash(broken) == before


def test_an_edit_says_the_models_name_and_not_where_it_lies(edit, broken, here, tmp_path):
    here("realera.py", *AIRPLANE, *CLOSED, "--model", broken, "--out", "edit", cwd=tmp_path)
    for path in ((tmp_path / "edit").iterdir()):
        assert str(tmp_path).encode() not in path.read_bytes()
    assert about_edit(tmp_path / "edit")["model"] == broken.name
    mini = about_edit(edit)
    assert mini["model"] == "mini" and about_edit(tmp_path / "edit")["hash"] == mini["hash"]


@pytest.mark.parametrize("change", [{"concepts": []}, {"concepts": "airplane"}, {"task": "nothing"},
                                    {"anchors": [3]}], ids=str)
def test_metadata_that_do_not_say_what_was_erased_are_refused(change, edit, tmp_path):
    about = about_edit(edit) | change
    (tmp_path / "bad").mkdir()
    save_file(load_file(edit / "erased.safetensors"), tmp_path / "bad/erased.safetensors",
              {"edit": json.dumps(about)})
    with pytest.raises(UserError, match="does not say what was erased"):
        about_edit(tmp_path / "bad")


def test_an_edit_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(UserError, match="NaN or infinity in a"):
        write_edit(tmp_path, {"a": torch.tensor([[1.0, float("nan")]])}, {})
    assert not list(tmp_path.iterdir())
