"""Other people's formats: pipeline folders and LoRA files."""
import json
import os
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import realera
from erasing import make_pairs
from helpers import MINI, UNET, same
from plumbing import formats
from plumbing.edits import cross_attention, read_edit
from plumbing.formats import export_pipeline, low_rank, write_lora
from plumbing.prompts import preserved_prompts
from plumbing.weights import put_weights
from unet import UNet


@pytest.fixture
def model(tmp_path):
    """A copy of mini/ without its CLIP, where the hub's cache would have it."""
    without = shutil.ignore_patterns("clip", "work", "*.py", "*.jpg", "*.md")
    return Path(shutil.copytree(MINI, tmp_path / "models--some--mini/snapshots/0123", ignore=without))


def test_export_takes_no_twin_no_pickle_and_no_missing_part(edits, model, monkeypatch, capsys):
    """A folder of the hub's cache: links, half-precision files only, a safety checker without weights."""
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
    blob = model.parents[1] / "blobs/4567"
    blob.parent.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.fp16.safetensors"):
        (model / "vae" / name).rename(blob.with_name(name))
        (model / "vae" / name).symlink_to(f"../../../blobs/{name}")
    W = read_edit(edits / "a", model)
    for how in ("links", "copies", "no links there"):
        if how == "no links there":
            monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(18, "another disk")))
        new = model.parents[2] / how
        export_pipeline(new, model, W, {}, how != "copies")
        said = capsys.readouterr().out
        assert "left out: safety_checker, which is there as a pickle alone" in said
        assert "left out: feature_extractor, which the model lacks" in said
        assert os.path.samefile(new / "vae/diffusion_pytorch_model.safetensors", blob.with_name(
            "diffusion_pytorch_model.fp16.safetensors")) == (how == "links")
        assert not os.path.samefile(new / "vae/config.json", blob.with_name("config.json"))
        assert not [path for path in new.rglob("*") if path.is_symlink()]
        assert (new / "vae/config.json").read_bytes() == blob.with_name("config.json").read_bytes()
        found = sorted(str(path.relative_to(new)) for path in new.rglob("*") if path.is_file())
        assert [path for path in found if not path.startswith("tokenizer")] == [
            "defaults.json", "model_index.json", "scheduler/scheduler_config.json",
            "text_encoder/config.json", "text_encoder/model.safetensors", "unet/config.json", UNET,
            "vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
        assert same(load_file(new / UNET), load_file(MINI / UNET) | W)
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(new)
        assert pipe.safety_checker is None and pipe.feature_extractor is None
        assert same({k: v.half() for k, v in pipe.unet.state_dict().items()}, load_file(new / UNET))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_a_model_in_several_files_is_exported(edits, model, tmp_path, variant):
    before = load_file(model / "vae/diffusion_pytorch_model.safetensors")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, dtype=torch.float16)
    for path in model.rglob("*.safetensors"):
        path.unlink()
    pipe.save_pretrained(model, max_shard_size="500KB", variant=variant)
    assert all(len(list((model / part).glob("*.safetensors"))) > 1 for part in ("vae", "unet"))
    W = read_edit(edits / "a", model)
    export_pipeline(tmp_path / "new", model, W, {})
    assert [path.name for path in (tmp_path / "new/unet").glob("*.safetensors*")] == [Path(UNET).name]
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "new", dtype=torch.float16)
    assert same(pipe.unet.state_dict(), load_file(MINI / UNET) | W)
    assert same(pipe.vae.state_dict(), {key: tensor.half() for key, tensor in before.items()})


# ---- LoRA files ----

@pytest.fixture(scope="module")
def pipe():
    return diffusers.StableDiffusionPipeline.from_pretrained(MINI)


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
    s, W0 = realera.Settings(M=0, N=0, lambda1=1, rows=rows), cross_attention(MINI)
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


@pytest.mark.parametrize("ending", ["diffusers", "webui"])
def test_diffusers_draws_the_edit_from_the_untouched_model_and_the_lora(edits, pipe, text, tmp_path, ending):
    W0, W = cross_attention(MINI), read_edit(edits / "a", MINI)
    full = max(min(w.shape) for w in W0.values())
    write_lora(tmp_path, "a", W0, W, full, {})                        # the longest of the shorter sides
    unet = UNet.from_pretrained(MINI / "unet")
    c = text(["a photo of the airplane"])
    z, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    before = unet(z, t, c)
    put_weights(unet, W)
    ours = unet(z, t, c)
    with torch.no_grad():
        pipe.load_lora_weights(tmp_path / f"a-rank{full}-{ending}.safetensors")
        theirs = pipe.unet(z, t, c).sample
        pipe.unload_lora_weights()
        plain = pipe.unet(z, t, c).sample
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max() + 1e-5
    assert (plain - before).abs().max() <= 1e-5 and (before - ours).abs().max() > 0.05


def test_the_loras_names_and_the_console_say_for_whom_they_are(edits, here, tmp_path, capsys):
    """Of two edits' files in one folder, as web UIs have it, none replaces another."""
    for name, concept in (("a", "airplane"), ("b", "ship")):
        shutil.copytree(edits / name, tmp_path / name)
        here("tools/export.py", "--edit", f"{name}/erased.safetensors" if name == "b" else name, "--lora", 2,
             cwd=tmp_path)
        said = capsys.readouterr().out
        assert f"{name}-rank2-webui.safetensors: for web UIs" in said
        assert f"{name}-rank2-diffusers.safetensors: for diffusers" in said
        assert "a web UI loads nothing of it" in said
    webui, plain = (load_file(tmp_path / f"a/a-rank2-{who}.safetensors") for who in ("webui", "diffusers"))
    assert all(key.startswith("lora_unet_") for key in webui) and all(key[:5] == "unet." for key in plain)
    assert {path.name for path in tmp_path.glob("?/*rank2*")} == {
        f"{name}-rank2-{who}.safetensors" for name in "ab" for who in ("webui", "diffusers")}


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
        write_lora(tmp_path, "a", W0, W, 2, {})
    assert list(tmp_path.iterdir()) == []
