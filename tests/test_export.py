"""An edit in other tools and beside other edits: pipeline folders, LoRA files, merging; previews."""
import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import erasing
import realera
from erasing import make_pairs
from lora import lora_deltas
from plumbing import formats
from plumbing.edits import about_edit, cross_attention, read_edit, write_edit
from plumbing.formats import export_pipeline, low_rank, write_lora
from plumbing.prompts import preserved_prompts
from plumbing.weights import put_weights
from sample import Model, Text
from tools.merge import how_made, joint_closed_form, merged, weights
from unet import UNet

ROOT = Path(__file__).parent.parent
MINI = ROOT / "mini"
AIRPLANE = ["--concept", "airplane", "--anchor", "sky"]
SHIP = ["--concept", "ship", "--anchor", "street"]
CLOSED = ["--lora-steps", "0", "--no-pictures"]
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def edits(here, tmp_path_factory):
    """Two edits made apart, with LoRAs of different ranks and seeds; and the same closed forms without."""
    folder = tmp_path_factory.mktemp("edits")
    few = ["--lora-steps", 1, "--no-pictures", "--set", "trajectories=2", "batch=1"]
    here("realera.py", *AIRPLANE, *few, "--out", "a", cwd=folder)
    here("realera.py", *SHIP, *few, "rank=2", "--seed", 5, "--out", "b", cwd=folder)
    for name, concept in (("a closed", AIRPLANE), ("b closed", SHIP), ("joint", AIRPLANE + SHIP)):
        here("realera.py", *concept, *CLOSED, "--out", name, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def text():
    return Text(MINI)


@pytest.fixture(scope="module")
def pipe():
    return diffusers.StableDiffusionPipeline.from_pretrained(MINI)


@pytest.fixture
def model(tmp_path):
    """A copy of mini/ without its CLIP."""
    shutil.copytree(MINI, tmp_path / "model",
                    ignore=shutil.ignore_patterns("clip", "work", "*.py", "*.png", "*.md", "*.svg"))
    return tmp_path / "model"


def merged_weights(folders, model, text):
    return merged(folders, model, text)[0]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- a pipeline folder ----

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


def test_export_takes_no_twin_no_pickle_and_no_missing_part(edits, model, monkeypatch):
    """A folder like a hub's cache: links, half-precision files only, a safety checker without weights."""
    for part in ("text_encoder", "vae", "unet"):
        path = next((model / part).glob("*.safetensors"))
        path.rename(path.with_suffix(".fp16.safetensors"))
    for name in ("diffusion_pytorch_model.non_ema.safetensors", "diffusion_pytorch_model.bin"):
        (model / "unet" / name).write_bytes(b"stale")
    (model / "safety_checker").mkdir()
    (model / "safety_checker/config.json").write_text("{}")
    (model / "safety_checker/pytorch_model.bin").write_bytes(b"pickle")
    index = json.loads((model / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
              "feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (model / "model_index.json").write_text(json.dumps(index))
    blob = model.parent / "blob"
    (model / "vae/config.json").rename(blob)
    (model / "vae/config.json").symlink_to("../../blob")
    W = read_edit(edits / "a", model)
    for how in ("links", "copies"):
        if how == "copies":
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "another disk")))
        new = model.parent / how
        export_pipeline(new, model, W, {})
        assert os.path.samefile(new / "vae/config.json", blob) == (how == "links")
        assert not (new / "vae/config.json").is_symlink()
        assert (new / "vae/config.json").read_bytes() == blob.read_bytes()
        found = sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file())
        assert [path for path in found if not path.startswith("tokenizer")] == [
            "defaults.json", "model_index.json", "scheduler/scheduler_config.json",
            "text_encoder/config.json", "text_encoder/model.safetensors", "unet/config.json", UNET,
            "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
        assert same(load_file(new / UNET), load_file(MINI / UNET) | W)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(new)
        assert pipe.safety_checker is None and pipe.feature_extractor is None
        assert same({k: v.half() for k, v in pipe.unet.state_dict().items()}, load_file(new / UNET))


def test_flags_of_realera_export_what_it_wrote(here, tmp_path):
    here("realera.py", *AIRPLANE, *CLOSED, "--export", "sd", "--export-lora", 8, cwd=tmp_path)
    out = tmp_path / "out/airplane"
    erased = load_file(out / "erased.safetensors")
    assert same(load_file(tmp_path / "sd" / UNET), load_file(MINI / UNET) | erased)
    assert sorted(path.name for path in out.iterdir()) == [
        "erased.safetensors", "lora_rank8.safetensors", "lora_rank8_kohya.safetensors", "run.json"]
    error = json.loads((out / "run.json").read_text())["LoRA error"]
    with safe_open(out / "lora_rank8.safetensors", "pt") as file:
        assert json.loads(file.metadata()["edit"])["error"] == error
    W0, W = cross_attention(MINI), read_edit(out, MINI)
    missed = [(W[name] - W0[name]).float() - delta for name, delta in
              lora_deltas(out / "lora_rank8.safetensors").items()]
    moved = [(W[name] - W0[name]).float() for name in W0]
    norms = [sum(x.square().sum() for x in group).sqrt().item() for group in (missed, moved)]
    assert error == pytest.approx(norms[0] / norms[1], rel=1e-2)          # the file is rounded to float16


# ---- LoRA files ----

def test_low_rank_is_numpys_truncated_svd():
    g = torch.Generator().manual_seed(0)
    W0 = {name: torch.randn(out, 12, generator=g) for name, out in (("k", 7), ("v", 20))}
    W = {name: matrix + torch.randn(matrix.shape, generator=g) for name, matrix in W0.items()}
    for rank in (1, 5, 12):
        factors, error = low_rank(W0, W, rank)
        missed = moved = 0
        for name in W0:
            U, S, Vh = np.linalg.svd((W[name].double() - W0[name].double()).numpy(), full_matrices=False)
            B, A = (x.double().numpy() for x in factors[name])
            assert B.shape[1] == A.shape[0] == min(rank, len(W[name]))
            assert np.abs(B @ A - (U * S)[:, :rank] @ Vh[:rank]).max() < 1e-5
            missed, moved = missed + (S[rank:] ** 2).sum(), moved + (S ** 2).sum()
        assert error == pytest.approx((missed / moved) ** 0.5, abs=1e-6)


@pytest.mark.parametrize("rows, rank", [("token", 1), ("tail", 27)])
def test_few_edited_rows_are_a_lora_of_that_rank_with_one_shared_A(text, rows, rank):
    """W − W₀ = W₀ [Σ (e* − e) eᵀ] B⁻¹: exact at the number of rows, and not below where they are few."""
    s, W0 = realera.Settings(M=0, N=0, rows=rows), cross_attention(MINI)
    pairs = make_pairs(["airplane"], ["sky"], "object", text, rows, 0)
    assert pairs[0].n == rank
    delta, _ = realera.erase_in_closed_form(pairs, text(preserved_prompts("object", pairs)), s)
    factors, error = low_rank(W0, realera.edited(W0, delta), rank)
    assert error < 1e-6
    if rank == 1:
        directions = torch.cat([A / A.norm() for _, A in factors.values()])
        assert (directions @ directions.T).abs().min() > 1 - 1e-5
    else:
        assert low_rank(W0, realera.edited(W0, delta), 1)[1] > 0.01


@pytest.mark.parametrize("ending", ["", "_kohya"])
def test_diffusers_draws_the_edit_from_the_untouched_model_and_the_lora(edits, pipe, text, tmp_path, ending):
    W0, W = cross_attention(MINI), read_edit(edits / "a", MINI)
    write_lora(tmp_path, W0, W, 160, {})                           # the longest of the shorter sides
    unet = UNet.from_pretrained(MINI / "unet")
    c = text(["a photo of the airplane"])
    z, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    before = unet(z, t, c)
    put_weights(unet, W)
    ours = unet(z, t, c)
    with torch.no_grad():
        pipe.load_lora_weights(tmp_path / f"lora_rank160{ending}.safetensors")
        theirs = pipe.unet(z, t, c).sample
        pipe.unload_lora_weights()
        plain = pipe.unet(z, t, c).sample
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max() + 1e-5
    assert (plain - before).abs().max() <= 1e-5 and (before - ours).abs().max() > 0.05


# ---- undo and stack ----

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


def test_merged_closed_form_is_the_sum_of_grams_with_preserved_rows_once(edits, text):
    """Σ(e* − e)eᵀ and Σeeᵀ + λ1 Σppᵀ of either edit, solved together, another way and in another order."""
    made = [how_made(str(edits / name), text) for name in ("b", "a")]
    s, right, B = made[0].settings, 0, 0
    for one in made:
        E, E_star, P = realera.mine(one.pairs[0], one.settings)
        right, B = right + (E_star - E).T @ E, B + E.T @ E + s.lambda1 * P.T @ P
    own = {word for one in made for pair in one.pairs for word in (pair.concept, pair.anchor)}
    stay = set(preserved_prompts("object", made[0].pairs)) & set(preserved_prompts("object", made[1].pairs))
    assert own == {"airplane", "sky", "ship", "street"} and len(stay) == 2 + 30 - 3         # sky is not in it
    # encoded once: another batch would differ in the last bits of float32, but the algebra is float64
    encoded = dict(zip(sorted(stay), text(sorted(stay))))
    for rows in encoded.values():
        B = B + s.lambda1 * rows.double().T @ rows.double()
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
    for name, order in (("ab", (a, b)), ("ba", (b, a))):
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
        "erased.safetensors", "lora_rank4.safetensors", "lora_rank4_kohya.safetensors", "run.json"]
    W = merged_weights([str(edits / "a"), str(edits / "b")], MINI, text)
    assert same(load_file(tmp_path / "sd" / UNET), load_file(MINI / UNET) | W)


# ---- the preview ----

def test_preview_sorts_prompts_by_what_eq_7_does_to_them_without_a_unet(here, tmp_path, text, monkeypatch,
                                                                        capsys):
    for module, name in ((UNet, "from_pretrained"), (erasing, "whole_folder")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("this needs no U-Net and no folder"))
    prompts = ["a photo of the ship", "a photo of the airplane", "", "jet", "a photo of the ship"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    here("realera.py", *AIRPLANE, "--preview", "prompts.txt", cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.txt"]
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["‖Δe‖/‖e‖", "prompt"] and len(lines) == 3
    found = {line.split(maxsplit=1)[1]: float(line.split()[0]) for line in lines}
    assert list(found) == sorted(found, key=found.get, reverse=True) and list(found)[0] == prompts[1]
    pairs, s = make_pairs(["airplane"], ["sky"], "object", text, "tail", 0), realera.Settings()
    delta, _ = realera.erase_in_closed_form(pairs, text(preserved_prompts("object", pairs)), s)
    for prompt, value in found.items():
        e = text([prompt])[0].double()
        moved, size = (sum(float((x @ row).square().sum()) for row in e)
                       for x in (delta, torch.eye(len(delta)).double()))
        assert value == pytest.approx((moved / size) ** 0.5, abs=6e-4)


# ---- bad input and interruption ----

@pytest.mark.parametrize("args, match", [
    (["--export-lora", "0"], "at least 1"), (["--export", "there"], "there exists.*--export"),
    (["--export", "out/airplane"], "apart"), (["--export", "out/airplane/sd"], "apart"),
    (["--export", "deep", "--out", "deep/edit"], "apart"),
    (["--preview", "there/p.txt", "--export", "sd"], "writes nothing"),
    (["--preview", "nowhere.txt"], "not a text file"), (["--preview", "there"], "not a text file"),
    (["--preview", "there/binary"], "not a text file"), (["--preview", "there/empty"], "no prompt")])
def test_realera_refuses_bad_exports_and_previews(refused, tmp_path, args, match):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/p.txt").write_text("a cat\n")
    (tmp_path / "there/binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "there/empty").write_text("\n \n")
    refused("realera.py", *AIRPLANE, *CLOSED, *args, cwd=tmp_path, match=match)


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


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interruption_leaves_nothing(edits, tmp_path, monkeypatch, error):
    def broken(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(formats, "save_file", broken)
    W0, W = cross_attention(MINI), read_edit(edits / "a", MINI)
    with pytest.raises(type(error)):
        export_pipeline(tmp_path / "new/folder", MINI, W, {})
    with pytest.raises(type(error)):
        write_lora(tmp_path, W0, W, 2, {})
    assert list(tmp_path.iterdir()) == []
