"""sample.py: pictures equal diffusers', grids are reproducible, and bad input is one line."""
import json
import re
import shutil
from pathlib import Path

import diffusers
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffusion import guided
from helpers import MINI, SIZE, edit_json, edit_tensors, same_pictures
from plumbing import UserError
from plumbing.edits import cross_attention
from sample import Model, Text
from starts import run


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
                    height=SIZE, width=SIZE, output_type="pt").images
    ours = model.draw(prompts, [1, 2], steps=12, guidance=3.0, sampler=sampler)
    assert (ours - expected.float()).abs().max() <= 1 / 255
    assert (ours[0] - ours[1]).abs().max() > 0.2


def test_pictures_of_sd_2_1_base_equal_diffusers(sd2):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd2)
    assert pipe.tokenizer.pad_token == "!" and pipe.unet.config.attention_head_dim == [2, 4, 8, 6]
    same_pictures(Model(sd2), pipe)


def test_a_model_without_defaults_draws_in_the_size_it_was_made_for(sd21, tmp_path):
    """As diffusers has it: SD v1's 64 latent pixels are 512, SD 2.1's 96 are 768."""
    shutil.copytree(sd21, tmp_path / "model")
    (tmp_path / "model/defaults.json").unlink()
    edit_json(tmp_path / "model/unet/config.json", sample_size=12)
    assert Model(tmp_path / "model").size == (96, 96) and Model(tmp_path / "model", size=64).size == (64, 64)


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_pictures_of_sd_2_1_which_predicts_velocity_equal_diffusers(sd21, sampler):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd21)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pipe.scheduler = {"ddim": diffusers.DDIMScheduler, "pndm": diffusers.PNDMScheduler}[sampler].from_config(
        pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    model, prompts = Model(sd21), ["a photo of a cat!", "a river at night"]
    expected = pipe(prompts, latents=model.noise([1, 2]), num_inference_steps=6, guidance_scale=3.0,
                    height=64, width=64, output_type="pt").images
    ours = model.draw(prompts, [1, 2], steps=6, guidance=3.0, sampler=sampler)
    assert (ours - expected.float()).abs().max() <= 1 / 255
    other = model.draw(prompts[::-1], [1, 2], steps=6, guidance=3.0, sampler=sampler)
    assert (ours - other).abs().max() > 10 / 255                  # the text matters in this model


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
        assert torch.equal(model.draw(PROMPT, [1], strength=lambda c, prompt: m), expected)
    many = model.draw(["a cat", *PROMPT], [2, 1], strength=lambda c, prompt: 1.0 if torch.equal(
        c, model.text([prompt])[0]) and prompt == "a cat" else 0.0)
    assert torch.equal(many[1], plain[0]) and torch.equal(many[0], model.draw(["a cat"], [2])[0])
    half = model.draw(PROMPT, [1], strength=lambda c, prompt: 0.5)
    model.put({name: 0.75 * tensor.float() for name, tensor in cross_attention(MINI).items()})
    assert torch.allclose(half, model.draw(PROMPT, [1]), atol=1e-5)
    model.put({})
    assert torch.equal(model.draw(PROMPT, [1]), plain) and (whole - plain).abs().max() > 0.05


@pytest.mark.parametrize("skip, size", [(1, (72, 40)), (2, (64, 64))])
def test_negative_prompt_clip_skip_and_size_equal_diffusers(sd1, skip, size):
    """Sides that the U-Net's levels do not divide, too. diffusers skips no layer for the negative prompt by
    itself; a fine-tune that was trained so, and every web UI, does it for both."""
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd1[0])
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)     # as transformers 4 had it
    negative, _ = pipe.encode_prompt("a photo of the sky", "cpu", 1, False, clip_skip=skip)
    ours = Model(sd1[0], clip_skip=skip, size=size)
    noise = ours.noise([3])
    assert noise.shape[2:] == (size[1] // 8, size[0] // 8)
    expected = pipe(PROMPT[0], negative_prompt_embeds=negative, latents=noise, num_inference_steps=4,
                    guidance_scale=3.0, clip_skip=skip, width=size[0], height=size[1],
                    output_type="pt").images
    drawn = ours.draw(PROMPT, [3], steps=4, guidance=3.0, negative="a photo of the sky")
    assert drawn.shape == expected.shape == (1, 3, size[1], size[0])
    assert (drawn - expected.float()).abs().max() <= 1 / 255
    assert (drawn - ours.draw(PROMPT, [3], steps=4, guidance=3.0)).abs().max() > 0.02
    plain = Model(sd1[0], size=size).draw(PROMPT, [3], steps=4, guidance=3.0, negative="a photo of the sky")
    assert (drawn - plain).abs().max() > 0.02


def brighter(tensors):
    return tensors | {"decoder.conv_out.bias": tensors["decoder.conv_out.bias"] + 0.5}


def test_another_vae_from_a_folder_a_model_or_a_file(sd1, tmp_path, here):
    """As a folder, in a whole model, alone in a file by today's names or by the original ones."""
    folder, file = sd1
    for part in ("vae", "model/vae"):
        shutil.copytree(folder / "vae", tmp_path / part)
        edit_tensors(tmp_path / part / "diffusion_pytorch_model.safetensors",
                     lambda tensors: tensors.update(brighter(tensors)))
    wanted = brighter(load_file(folder / "vae/diffusion_pytorch_model.safetensors"))
    shutil.copy(tmp_path / "vae/diffusion_pytorch_model.safetensors", tmp_path / "today.safetensors")
    original = {key: tensor + 0.5 * (key == "first_stage_model.decoder.conv_out.bias")
                for key, tensor in load_file(file).items() if key.startswith("first_stage_model.")}
    save_file(original, tmp_path / "prefix.safetensors")
    save_file({key.removeprefix("first_stage_model."): tensor for key, tensor in original.items()}
              | {"loss.logvar": torch.ones(1)}, tmp_path / "original.safetensors")
    before = Model(folder).vae.decode(torch.zeros(1, 4, 4, 4))
    for place in ("vae", "model", "today.safetensors", "prefix.safetensors", "original.safetensors"):
        vae = Model(folder, vae=tmp_path / place).vae
        assert all(torch.equal(vae.state_dict()[key], wanted[key]) for key in wanted), place
    assert torch.allclose(vae.decode(torch.zeros(1, 4, 4, 4)), before + 0.5, atol=1e-5)
    here("sample.py", "a cat", "--model", folder, "--vae", "today.safetensors", "--size", "40x64",
         "--steps", 1, "--n", 2, "--negative", "red", "--clip-skip", 1, "--out", "x.png", cwd=tmp_path)
    said = json.loads(PIL.Image.open(tmp_path / "x.png").text["settings"])
    assert said == {"steps": 1, "guidance": 3.0, "sampler": "ddim", "dtype": "float32", "negative": "red",
                    "size": [40, 64], "clip_skip": 1, "vae": "today.safetensors"}


def test_a_name_that_appears_while_it_draws_is_not_overwritten(here, tmp_path, monkeypatch, capsys):
    def draw(model, prompts, *args, **how):
        (tmp_path / "x.png").write_text("precious")
        return torch.zeros(len(prompts), 3, 32, 32)
    monkeypatch.setattr(Model, "draw", draw)
    here("sample.py", "a cat", "--out", "x.png", cwd=tmp_path)
    assert (tmp_path / "x.png").read_text() == "precious"
    assert (tmp_path / "x-2.svg").exists() and capsys.readouterr().out.startswith("x-2.png  ")


def test_encoder_and_tokenizer_must_know_the_same_words(sd1, tmp_path):
    """Textual inversion adds to both; a tokenizer without the added word would spell it in pieces."""
    model = Path(shutil.copytree(sd1[0], tmp_path / "model"))
    path = model / "text_encoder/model.safetensors"
    rows = load_file(path)["embeddings.token_embedding.weight"]
    edit_tensors(path, lambda tensors: tensors.update({"embeddings.token_embedding.weight": torch.cat(
        [rows, torch.ones(1, rows.shape[1])])}))
    edit_json(model / "text_encoder/config.json", vocab_size=len(rows) + 1)
    with pytest.raises(UserError, match=f"rows for {len(rows) + 1} tokens, the tokenizer {len(rows)}"):
        Text(model)
    (model / "tokenizer/added_tokens.json").write_text(json.dumps({"<toy>": len(rows)}))
    text = Text(model)
    assert text.tokenizer(["a <toy>"])[0, 2] == len(rows) and text("a <toy>").shape == (1, 77, 24)
    edit_json(model / "tokenizer/tokenizer_config.json", model_max_length=8192)
    assert torch.equal(Text(model)(["a <toy>"]), text(["a <toy>"]))
    shutil.copytree(sd1[0] / "text_encoder", model / "text_encoder", dirs_exist_ok=True)
    with pytest.raises(UserError, match=f"rows for {len(rows)} tokens, the tokenizer {len(rows) + 1}"):
        Text(model)


def test_one_prompt_as_a_string_is_one_prompt(model):
    assert torch.equal(model.text("a cat"), model.text(["a cat"]))
    assert torch.equal(model.draw("a cat", steps=1), model.draw(["a cat"], [0], steps=1))
    with pytest.raises(UserError, match="2 prompts need as many seeds, not 1"):
        model.draw(["a cat", "a dog"], [0])


@pytest.mark.parametrize("network, dtype, match", [
    ("vae", torch.float16, "the VAE gave NaN in float16: try --dtype bfloat16 or float32"),
    ("unet", torch.bfloat16, "the U-Net gave NaN in bfloat16: try --dtype float32"),
    ("unet", torch.float32, "the U-Net gave NaN in float32: .*guidance")])
def test_a_picture_of_nan_ends_the_run(model, monkeypatch, network, dtype, match):
    def overflown(z, *_):
        return torch.full_like(z, float("nan"))

    monkeypatch.setattr(model, "dtype", dtype)
    monkeypatch.setattr(model.unet, "read", lambda rows: rows)
    for part, run in ((model.unet, "forward"), (model.vae, "decode")):
        wrong = part is (model.vae if network == "vae" else model.unet)
        monkeypatch.setattr(part, run, overflown if wrong else lambda z, *_: z)
    with pytest.raises(UserError, match=match):
        model.draw("a photo of the cat", [0], steps=1)


@pytest.mark.parametrize("guidance", ["nan", "inf"])
def test_guidance_is_a_number(refused, tmp_path, guidance):
    refused("sample.py", "x", "--guidance", guidance, "--steps", 1, cwd=tmp_path, match="--guidance must be")


def test_long_prompts_are_cut_with_a_warning_that_says_where(tmp_path):
    words = " ".join(["airplane"] * 40)
    done = run("sample.py", words + " zebra", "--n", 1, "--steps", 1, cwd=tmp_path)
    warning = done.stderr.splitlines()[0]
    assert warning.startswith("warning:") and warning.endswith("zebra'")


@pytest.mark.parametrize("args, match", [
    (["x", "--model", "nowhere"], "no such folder"), (["x", "--n", "0"], "--n"),
    (["x", "--steps", "0"], "steps"), (["x", "--steps", "2000"], "steps"), (["x", "--seed", "-1"], "seed"),
    (["x", "--seed", "9" * 20], "seed"), (["x", "--device", "cuda"], "not available"),
    (["x", "--device", "cpu:foo"], "cpu:foo is not available"),
    (["x", "--edit", "nowhere"], "no erased.safetensors"),
    (["x", "--model", "nobody/nothing"], "could not be downloaded"),
    (["x", "--size", "33"], "33 pixels wide or high: 32 or 3. are possible"),
    (["x", "--size", "32x0"], "possible"), (["x", "--size", "big"], "512x768"),
    (["x", "--clip-skip", "4"], "0 … 3"), (["x", "--clip-skip", "-1"], "0 … 3"),
    (["x", "--vae", "nowhere"], "--vae nowhere: no such folder or file"),
    (["x", "--vae", "v.ckpt"], "a pickle can run code")])
def test_sample_refuses_bad_input(refused, tmp_path, args, match):
    (tmp_path / "v.ckpt").write_bytes(b"\x80\x02pickle")
    refused("sample.py", *args, cwd=tmp_path, match=match)


def test_sample_does_not_overwrite(refused, tmp_path):
    (tmp_path / "mine.png").write_text("precious")
    refused("sample.py", "x", "--out", "mine.png", cwd=tmp_path, match="exists")
    assert (tmp_path / "mine.png").read_text() == "precious"
