"""tools/merge.py: edits undone, stacked and merged in any order; what does not go together."""
import json
import shutil

import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

import realera
from helpers import MINI, UNET, same
from plumbing.book import nouns
from plumbing.edits import about_edit, cross_attention, read_edit, write_edit
from plumbing.prompts import preserved_prompts
from plumbing.weights import put_weights
from sample import Model
from tools.merge import how_made, joint_closed_form, merged, weights
from unet import UNet


def merged_weights(folders, model, text):
    return merged(folders, model, text)[0]


def test_applied_removed_and_applied_in_another_order_gives_the_same_bytes(edits, text):
    a, b = str(edits / "a"), str(edits / "b")
    unet, W0 = UNet.from_pretrained(MINI / "unet"), cross_attention(MINI)
    clean = {name: value.clone() for name, value in unet.state_dict().items()}
    for W in (read_edit(a, MINI), merged_weights([a, b], MINI, text), read_edit(b, MINI)):
        put_weights(unet, W)
    backwards = {name: value.clone() for name, value in unet.state_dict().items()}
    put_weights(unet, W0)
    assert same(unet.state_dict(), clean) and not same(backwards, clean)
    put_weights(unet, read_edit(b, MINI))
    assert same(unet.state_dict(), backwards)
    assert same(merged_weights([a, b], MINI, text), merged_weights([b, a], MINI, text))
    full = {name: matrix.float() for name, matrix in W0.items()}          # no rounding to float16 to hide it
    made = [how_made(folder, text) for folder in (a, b)]
    assert same(weights(made, full, text), weights(made[::-1], full, text))


def test_merged_closed_forms_are_what_one_command_for_both_writes(edits, text):
    both = merged_weights([str(edits / "b closed"), str(edits / "a closed")], MINI, text)
    joint = load_file(edits / "joint/erased.safetensors")
    assert same(both, joint) and not same(both, load_file(edits / "a closed/erased.safetensors"))


def test_merged_closed_form_is_the_sum_of_grams_with_preserved_rows_for_each(edits, text):
    """Σ(e* − e)eᵀ and Σeeᵀ + λ1 Σppᵀ of either edit, solved together, another way and in another order; of
    two edits' beyond-concepts each counts half."""
    made = [how_made(str(edits / name), text) for name in ("b", "a")]
    s, right, B = made[0].settings, 0, 0
    for one in made:
        E, E_star, P = realera.mine(one.pairs[0], one.settings)
        right, B = right + (E_star - E).T @ E, B + E.T @ E + s.lambda1 * P.T @ P / 2
    own = {word for one in made for pair in one.pairs for word in (pair.concept, pair.anchor)}
    stay = set(preserved_prompts("object", made[0].pairs)) & set(preserved_prompts("object", made[1].pairs))
    assert own == {"airplane", "sky", "ship", "street"} and len(stay) == 2 + len({*nouns("preserved")} - own)
    # encoded once: another batch would differ in the last bits of float32, but the algebra is float64
    encoded = dict(zip(sorted(stay), text(sorted(stay))))
    for rows in encoded.values():
        B = B + len(made) * s.lambda1 * rows.double().T @ rows.double()
    B = B + s.lambda2 * B.trace() / len(B) * torch.eye(len(B), dtype=B.dtype)
    expected = right @ torch.linalg.inv(B)
    delta = joint_closed_form(made, lambda prompts: torch.stack([encoded[p] for p in prompts]))
    assert (delta - expected).abs().max() <= 1e-9 * expected.abs().max()


def test_merging_adds_what_the_loras_learned(edits, text):
    both = merged_weights([str(edits / "a"), str(edits / "b")], MINI, text)
    made = [how_made(str(edits / name), text) for name in ("a", "b")]
    closed = realera.edited(cross_attention(MINI), joint_closed_form(made, text))
    for name, matrix in both.items():
        layer, expected = f"unet.{name.removesuffix('.weight')}", closed[name].double()
        for folder in ("a", "b"):
            lora = load_file(edits / folder / "residual_lora.safetensors")
            B, A = lora[f"{layer}.lora_B.weight"].double(), lora[f"{layer}.lora_A.weight"].double()
            assert len(A) == {"a": 4, "b": 2}[folder] and B.abs().max() > 0
            expected += B @ A
        assert (matrix.double() - expected).abs().max() <= 2 ** -11 * expected.abs().max()        # float16


def test_the_order_of_merged_edits_is_moot_and_sample_draws_with_them(here, edits, tmp_path):
    a, b = edits / "a", edits / "b"
    for name, order in (("ab", (a, b)), ("ba", (b / "erased.safetensors", a))):
        here("tools/merge.py", *order, "--out", name, cwd=tmp_path)
    for name, edit in (("ab", "ab"), ("ba", "ba"), ("a", a)):
        here("sample.py", "a photo of the ship", "--edit", edit, "--n", 1, "--steps", 2,
             "--out", f"{name}.png", cwd=tmp_path)
    ab, ba = ((tmp_path / name / "erased.safetensors").read_bytes() for name in ("ab", "ba"))
    assert ab == ba
    pictures = [PIL.Image.open(tmp_path / f"{name}.png").tobytes() for name in ("ab", "ba", "a")]
    assert pictures[0] == pictures[1] != pictures[2]


def test_several_edits_name_the_program_that_merges_them(refused, edits, tmp_path):
    two = ["--edit", edits / "a", "--edit", edits / "b"]
    refused("tools/export.py", *two, "--lora", 1, cwd=tmp_path, match="tools/merge.py .*a .*b")


def test_a_merged_edit_says_what_it_is_made_of(here, refused, edits, tmp_path):
    here("tools/merge.py", edits / "b", edits / "a", cwd=tmp_path)
    about = about_edit(tmp_path / "out/a+b")
    assert about["concepts"] == ["airplane", "ship"] and about["anchors"] == ["sky", "street"]
    assert about["merged"] == [about_edit(edits / name) for name in ("a", "b")]
    assert json.loads((tmp_path / "out/a+b/run.json").read_text()) == about
    refused("tools/merge.py", edits / "b", edits / "a", cwd=tmp_path, match="exists.*--overwrite")
    refused("tools/merge.py", edits / "b", cwd=tmp_path, match="two edits or more")
    refused("tools/merge.py", "out/a+b", edits / "joint", "--out", "c", cwd=tmp_path, match="made by merged")


def test_eval_clip_has_a_row_for_every_concept_of_merged_edits(here, edits, text, tmp_path, monkeypatch,
                                                               capsys):
    """Pictures are grey here (others draw them): it is about what is in the U-Net when they are drawn."""
    name = next(iter(cross_attention(MINI)))
    used = {}

    def draw(model, prompts, *_, **__):
        used[model.unet.get_parameter(name).sum().item()] = model.unet.get_parameter(name).clone()
        return torch.full((len(prompts), 3, 32, 32), 0.5)

    monkeypatch.setattr(Model, "draw", draw)
    here("tools/merge.py", edits / "b", edits / "a", cwd=tmp_path)
    here("eval_clip.py", "--edit", "out/a+b", "--n", 1, cwd=tmp_path)
    both = merged_weights([str(edits / "a"), str(edits / "b")], MINI, text)
    for W, found in zip((cross_attention(MINI), both), used.values(), strict=True):
        assert torch.equal(W[name].float(), found)
    rows = json.loads((tmp_path / "out/evaluation/a+b/metrics.json").read_text())
    assert {(row["erased"], row["variant"]) for row in rows} == {
        (concept, variant) for concept in ("airplane", "ship") for variant in ("untouched", "a+b")}
    assert all("Acc_e" in row for row in rows) and "| airplane | a+b |" in capsys.readouterr().out


def test_merged_edits_export_under_a_name_of_both(here, edits, text, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(edits / name, tmp_path / name)
    here("tools/merge.py", "b", "a", "--out", "a+b", cwd=tmp_path)
    here("tools/export.py", "--edit", "a+b", "--lora", 4, "--folder", "sd", cwd=tmp_path)
    assert sorted(path.name for path in (tmp_path / "a+b").iterdir()) == [
        "a+b-rank4-diffusers.safetensors", "a+b-rank4-webui.safetensors", "erased.safetensors", "run.json"]
    W = merged_weights([str(edits / "a"), str(edits / "b")], MINI, text)
    assert same(load_file(tmp_path / "sd" / UNET), load_file(MINI / UNET) | W)


# ---- bad input ----

@pytest.mark.parametrize("change, match", [
    ({"concepts": ["Airplane"]}, "both erase 'airplane'"), ({"method": "RECE"}, "made by RECE"),
    ({"base_hash": "0" * 64}, "another model"), ({"seed": 6}, "not what its settings give"),
    ({"settings": {"gamma": 1}}, "another version"), ({"settings": None}, "another version"),
    ("M", "M = 9 but .* 100")])
def test_edits_that_do_not_go_together_are_refused(refused, edits, tmp_path, change, match):
    about, tensors = about_edit(edits / "b"), load_file(edits / "b/erased.safetensors")
    change = {"settings": about["settings"] | {"M": 9}} if change == "M" else change
    shutil.copytree(edits / "b", tmp_path / "c")
    write_edit(tmp_path / "c", tensors, about | change)
    refused("tools/merge.py", edits / "a", "c", "--out", "d", cwd=tmp_path, match=match)


def test_the_same_edit_twice_is_refused(refused, edits, tmp_path):
    refused("tools/merge.py", edits / "a", edits / "a", cwd=tmp_path,
            match="both erase 'airplane'")


def test_an_edit_that_lost_its_lora_or_half_of_it_cannot_be_merged(refused, edits, tmp_path):
    shutil.copytree(edits / "b", tmp_path / "c")
    path = tmp_path / "c/residual_lora.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "lora_A" in name}, path)
    refused("tools/merge.py", edits / "a", "c", "--out", "d", cwd=tmp_path, match="damaged")
    path.unlink()
    refused("tools/merge.py", edits / "a", "c", "--out", "d", cwd=tmp_path,
            match="residual_lora.*cannot be read")
