"""sample.py: pictures equal diffusers', grids are reproducible, and bad input is one line."""
import re
import shutil

import diffusers
import PIL.Image
import pytest
import torch

from diffusion import guided
from helpers import MINI, edit_json, run, same_pictures
from plumbing import UserError
from plumbing.edits import cross_attention
from sample import Model


@pytest.fixture(scope="module")
def model():
    model = Model(MINI)
    model.defaults["steps"] = 2
    return model


def test_sample_writes_a_grid_and_says_what_it_did(tmp_path):
    args = ["a photo of an airplane", "a photo of the sea", "--n", 3, "--seed", 5, "--steps", 4]
    done = run("sample.py", *args, cwd=tmp_path)
    path, rest = done.stdout.strip().split("  ", 1)
    assert re.fullmatch(r"seeds 5–7, 4 steps of ddim, guidance [\d.]+, [\d.]+ s per picture\n"
                        r"out/\S+\.svg  the same with labels", rest)
    picture = PIL.Image.open(tmp_path / path)
    zoom = (picture.width - 2) // 3 - 2
    assert picture.size == (3 * (zoom + 2) + 2, 2 * (zoom + 2) + 2) and picture.mode == "RGB"
    again = run("sample.py", *args, cwd=tmp_path)
    other = tmp_path / again.stdout.split("  ")[0]
    assert other != tmp_path / path and other.read_bytes() == (tmp_path / path).read_bytes()


def test_a_picture_depends_on_its_own_seed_only(model):
    prompts, seeds = ["a photo of the ship", "a photo of the cat", "a photo of the ship"], [3, 4, 5]
    together = model.draw(prompts, seeds, steps=4)
    backwards = model.draw(prompts[::-1], seeds[::-1], steps=4).flip(0)
    alone = torch.cat([model.draw([p], [s], steps=4) for p, s in zip(prompts, seeds)])
    by_two = model.draw(prompts, seeds, steps=4, batch=2)
    for other in (backwards, alone, by_two):
        assert (together - other).abs().max() <= 1 / 255
    assert (together[0] - together[2]).abs().max() > 0.1


@pytest.mark.parametrize("sampler, theirs", [("ddim", diffusers.DDIMScheduler),
                                             ("pndm", diffusers.PNDMScheduler)])
def test_pictures_equal_diffusers_pipeline(model, sampler, theirs):
    """The end-to-end oracle, with trained weights: same folder, same latents, at most 1/255 apart."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(MINI)
    pipe.scheduler = theirs.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a photo of the airplane", "a photo of the frog"]
    expected = pipe(prompts, latents=model.noise([1, 2]), num_inference_steps=12, guidance_scale=3.0,
                    height=32, width=32, output_type="pt").images
    ours = model.draw(prompts, [1, 2], steps=12, guidance=3.0, sampler=sampler)
    assert (ours - expected.float()).abs().max() <= 1 / 255
    assert (ours[0] - ours[1]).abs().max() > 0.2


def test_pictures_of_sd_2_1_base_equal_diffusers(sd2):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd2)
    assert pipe.tokenizer.pad_token == "!" and pipe.unet.config.attention_head_dim == [2, 4, 8, 6]
    same_pictures(Model(sd2), pipe)


def test_rows_in_place_of_prompts_draw_the_same_pictures(model):
    prompts, seeds = ["a photo of the airplane", "a photo of the ship", "a photo of the airplane"], [1, 2, 3]
    pictures = model.draw(prompts, seeds)
    for batch in (None, 2):
        assert torch.equal(model.draw(model.text(prompts).double(), seeds, batch=batch),
                           model.draw(prompts, seeds, batch=batch))
    assert (pictures[0] - pictures[1]).abs().max() > 0.1 < (pictures[0] - pictures[2]).abs().max()


PROMPT = ["a photo of the airplane"]


def test_draw_takes_other_rows_another_guidance_and_a_part_of_an_edit(model):
    plain, seen, scale = model.draw(PROMPT, [1]), [], model.defaults["guidance"]

    def guide(u, c, t, more):
        seen.append((u - more).abs().max().item())
        return guided(u, c, scale)

    assert torch.equal(model.draw(PROMPT, [1], rows=lambda c: c), plain)
    assert torch.equal(model.draw(["a cat"], [1], rows=lambda c: model.text(PROMPT)), plain)
    same = model.draw(PROMPT, [1], guide=guide, beside=model.text([""]))
    assert (same - plain).abs().max() < 1e-3 and len(seen) == 2 and max(seen) < 1e-4
    W = {name: 0.5 * tensor for name, tensor in cross_attention(MINI).items()}
    model.put(W)
    whole = model.draw(PROMPT, [1])
    for m, expected in ((0.0, plain), (1.0, whole)):
        assert torch.equal(model.draw(PROMPT, [1], strength=lambda c: m), expected)
    many = model.draw(["a cat", *PROMPT], [2, 1], strength=lambda c: 1.0 if torch.equal(
        c, model.text(["a cat"])[0]) else 0.0)
    assert torch.equal(many[1], plain[0]) and torch.equal(many[0], model.draw(["a cat"], [2])[0])
    half = model.draw(PROMPT, [1], strength=lambda c: 0.5)
    model.put({name: 0.75 * tensor.float() for name, tensor in cross_attention(MINI).items()})
    assert torch.allclose(half, model.draw(PROMPT, [1]), atol=1e-5)
    model.put({})
    assert torch.equal(model.draw(PROMPT, [1]), plain) and (whole - plain).abs().max() > 0.05


@pytest.mark.parametrize("network, dtype, match", [
    ("vae", torch.float16, "the VAE gave NaN in float16: try --dtype bfloat16 or float32"),
    ("unet", torch.bfloat16, "the U-Net gave NaN in bfloat16: try --dtype float32"),
    ("unet", torch.float32, "the U-Net gave NaN in float32: .*guidance")])
def test_a_picture_of_nan_ends_the_run(model, monkeypatch, network, dtype, match):
    def overflown(z, *_):
        return torch.full_like(z, float("nan"))

    monkeypatch.setattr(*((model.vae, "decode") if network == "vae" else (model.unet, "forward")), overflown)
    monkeypatch.setattr(model, "dtype", dtype)
    monkeypatch.setattr(model.unet, "read", lambda rows: rows)
    if network == "vae":
        monkeypatch.setattr(model.unet, "forward", lambda z, *_: torch.zeros_like(z))
    with pytest.raises(UserError, match=match):
        model.draw("a photo of the cat", [0], steps=1)


@pytest.mark.parametrize("guidance", ["nan", "inf"])
def test_guidance_is_a_number(refused, tmp_path, guidance):
    refused("sample.py", "x", "--guidance", guidance, "--steps", 1, cwd=tmp_path, match="--guidance must be")


def test_long_prompts_are_cut_with_a_warning_that_says_where(tmp_path):
    words = " ".join(["airplane"] * 40)
    done = run("sample.py", words + " zebra", "--n", 1, "--steps", 1, cwd=tmp_path)
    assert done.stderr.startswith("warning:") and done.stderr.rstrip().endswith("zebra'")


@pytest.mark.parametrize("args, match", [
    (["x", "--model", "nowhere"], "no such folder"), (["x", "--n", "0"], "--n"),
    (["x", "--steps", "0"], "steps"), (["x", "--steps", "2000"], "steps"), (["x", "--seed", "-1"], "seed"),
    (["x", "--seed", "9" * 20], "seed"), (["x", "--device", "cuda"], "not available"),
    (["x", "--device", "cpu:foo"], "cpu:foo is not available"),
    (["x", "--edit", "nowhere"], "no erased.safetensors"),
    (["x", "--model", "nobody/nothing"], "could not be downloaded")])
def test_sample_refuses_bad_input(refused, tmp_path, args, match):
    refused("sample.py", *args, cwd=tmp_path, match=match)


def test_sample_does_not_overwrite(refused, tmp_path):
    (tmp_path / "mine.png").write_text("precious")
    refused("sample.py", "x", "--out", "mine.png", cwd=tmp_path, match="exists")
    assert (tmp_path / "mine.png").read_text() == "precious"


def test_velocity_prediction_is_refused(sd2, tmp_path, refused):  # noqa: F811
    """Stable Diffusion 2.1 (768×768) predicts v, not the noise."""
    model, work = shutil.copytree(sd2, tmp_path / "model"), tmp_path / "work"
    work.mkdir()
    edit_json(model / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    refused("sample.py", "x", "--model", model, cwd=work, match="prediction_type = 'v_prediction'")
