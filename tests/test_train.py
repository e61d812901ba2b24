"""mini/train.py on a handful of made-up photos: every stage, what it writes, interruption, resuming."""
import argparse
import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch

from eval_clip import CLIP
from helpers import ROOT
from mini import train
from sample import Model
from starts import run as start


def run(*args, status=0):
    return start("mini/train.py", *args, cwd=ROOT, status=status)


@pytest.fixture(scope="module")
def trained(trained, data, tmp_path_factory):
    """A copy of conftest.py's, as it is gone on from here."""
    root = tmp_path_factory.mktemp("trained")
    for new, old in zip(("model", "work"), trained):
        shutil.copytree(old, root / new)
    args = ["--data", data, "--out", root / "model", "--work", root / "work", "--recipe", "tiny"]
    return root / "model", root / "work", args, trained[3]


@pytest.mark.slow                                                 # until the next mini moves in
def test_three_stages_make_a_model_that_we_and_diffusers_open(trained):
    out, work, _, printed = trained
    for part in ("clip: 4 of 4 steps", "zero-shot top-1", "vae: 4 of 4 steps", "PSNR", "unet: 4 of 4 steps"):
        assert part in printed
    assert {p.name for p in work.iterdir()} == {
        "clip.safetensors", "clip.png", "vae.safetensors", "vae.png", "unet.safetensors", "unet.png",
        *(f"unet-{step:06}.png" for step in range(1, 5))}
    model = Model(out)
    ours = model.draw(["a photo of the airplane"], [0], steps=2)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(out)
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe("a photo of the airplane", latents=model.noise([0]), num_inference_steps=2, height=32,
                  width=32, guidance_scale=3.0, output_type="pt").images
    assert (ours - theirs.float()).abs().max() <= 1 / 255


@pytest.mark.slow                                                 # until the next mini moves in
def test_what_is_trained_can_be_gone_on_from(trained, tmp_path):
    """A finished stage is only written again; --init starts from weights; the image tower goes on alone."""
    out, _, args, _ = trained
    files = {part: out / part / "model.safetensors" for part in ("text_encoder", "clip")}
    files["unet"] = out / "unet/diffusion_pytorch_model.safetensors"
    before = {part: path.read_bytes() for part, path in files.items()}
    assert "unet: 4 of 4 steps" in run(*args, "--stage", "unet").stdout
    assert "vision: 4 of 4 steps" in run(*args, "--stage", "vision").stdout
    assert {part for part, path in files.items() if path.read_bytes() != before[part]} == {"clip"}
    more = run(*args, "--stage", "vae", "--work", tmp_path / "new", "--init", out, "--steps", 1)
    assert "vae: 1 of 1 steps" in more.stdout


def test_missing_data_is_one_clear_line(tmp_path):
    done = run("--data", tmp_path, "--work", tmp_path / "w", status=2)
    assert done.stderr.startswith("error: ") and "data_batch_1.bin" in done.stderr
    assert "Traceback" not in done.stderr


def toy_run(work, stop_at=None, width=3):
    """Eight steps on a toy; with `stop_at`, Ctrl-C arrives in the middle of that step."""
    torch.manual_seed(0)
    net = torch.nn.Linear(width, 2)
    args = argparse.Namespace(work=work, minutes=1e9)
    steps = train.Run("toy", net, 8, 0.1, 0.01, args, ema=0.9)

    def loss(generator, step):
        if step == stop_at:
            raise KeyboardInterrupt
        return (net(torch.randn(4, width, generator=generator)) - 1).square().mean()

    steps.train(loss)
    return steps


def test_interrupted_training_resumes_to_the_same_bytes(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole = toy_run(tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        toy_run(tmp_path / "b", stop_at=5)
    resumed = toy_run(tmp_path / "b")
    assert whole.step == resumed.step == 8
    for kept in ("net", "average"):
        for p, q in zip(getattr(whole, kept).parameters(), getattr(resumed, kept).parameters()):
            assert torch.equal(p, q)


def test_weights_of_another_recipe_are_refused(tmp_path):
    toy_run(tmp_path)
    with pytest.raises(train.UserError, match="toy.safetensors goes on from another --recipe"):
        toy_run(tmp_path, width=4)
    with pytest.raises(train.UserError, match="mini has other sizes than this --recipe: .*laptop"):
        train.start_from(torch.nn.Linear(4, 2), torch.nn.Linear(3, 2), Path("mini"))


def test_damaged_checkpoints_and_photos_cut_short_are_named(data, tmp_path):
    toy_run(tmp_path)
    path = tmp_path / "toy.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(train.UserError, match="toy.safetensors cannot be read"):
        toy_run(tmp_path)
    shutil.copytree(data, tmp_path / "data")
    with open(tmp_path / "data/data_batch_3.bin", "ab") as file:
        file.truncate(1000)
    with pytest.raises(train.UserError, match="no whole data_batch_3.bin"):
        train.Photos(tmp_path / "data")


@pytest.mark.parametrize("flags", [("--steps", 0), ("--steps", -1), ("--minutes", "nan"), ("--minutes", -1)],
                         ids=str)
@pytest.mark.parametrize("script", ["mini/train.py", "mini/next/train.py"])
def test_no_length_leaves_a_model_untrained(script, flags, refused, tmp_path):
    stage = ["--stage", "vae"] if "next" in script else []
    refused(script, "--data", tmp_path, "--out", "o", "--work", "w", *stage, *flags, cwd=tmp_path,
            match="--steps must be at least 1")


def test_held_out_scores_are_kept_with_the_checkpoint(tmp_path):
    assert [step for step, _ in toy_run(tmp_path).scores] == list(range(1, 9))
    assert len(toy_run(tmp_path).scores) == 8                     # done: none is added


def test_the_same_captions_give_the_same_vocabulary(tmp_path):
    for name in ("a", "b"):
        train.train_tokenizer(train.Captions(), tmp_path / name)
    assert (tmp_path / "a/merges.txt").read_bytes() == (tmp_path / "b/merges.txt").read_bytes()


def test_merges_join_the_commonest_pair_first_and_the_text_breaks_ties():
    # a-b three times; then x-d</w> and ab-c</w> twice each: the later one in the alphabet
    assert train.merges_of(["abc abc abe", "xd xd"], 3) == [("a", "b"), ("x", "d</w>"), ("ab", "c</w>")]


def test_closeness_puts_synonyms_nearer_than_phrases_nearer_than_the_rest():
    captions = train.Captions()
    close, at = captions.closeness(), captions.names.index
    assert torch.equal(close, close.T) and torch.equal(close.diag(), torch.ones(len(close)))
    assert len(close) == len(captions.names) + len(captions.words)
    own = close[at("airplane")]
    assert own[at("jet")] > own[at("boeing 747 on the runway")] > own[at("ship")] == own[at("sky")] == own[-1]
    assert close[at("jet"), at("plane")] > close[at("jet"), at("boat")]


def test_shifted_moves_and_mirrors_each_photo_by_itself():
    x = torch.arange(32.0).expand(1, 3, 32, 32).repeat(64, 1, 1, 1)
    y = train.shifted(x, 3, torch.Generator().manual_seed(0))
    found = {tuple(row.tolist()) for row in y[:, 0, 10]}
    line = [3, 2, 1, *range(32), 30, 29, 28]                      # mirrored at its ends
    allowed = {tuple(way[i:i + 32]) for way in (line, line[::-1]) for i in range(7)}
    assert found <= allowed and len(found) > 8


def test_looking_at_all_patches_is_clips_own_feature():
    clip = CLIP.from_pretrained(ROOT / "mini/clip")
    pixels, rng = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.Generator()
    assert torch.allclose(train.look(clip, pixels, 1, rng), clip.image_features(pixels), atol=1e-6)
    half = train.look(clip, pixels, 0.5, rng.manual_seed(1))
    assert not torch.allclose(half, clip.image_features(pixels), atol=1e-2)


def test_groups_are_numbered_from_bright_to_dark(data):
    photos = train.Photos(data)
    for c in range(10):
        own = [photos.x[(photos.y == c) & (photos.g == g)].float().mean() for g in range(4)]
        assert own == sorted(own, reverse=True)


def test_captions_are_a_distribution_and_synonyms_belong_to_their_groups():
    captions = train.Captions()
    assert torch.allclose(captions.p.sum(-1), torch.ones(15, 4))
    plane, aircraft = captions.names.index("plane"), captions.names.index("aircraft")
    assert captions.p[0, 0, aircraft] > 10 * captions.p[0, 0, plane] and captions.p[0, 3, plane] > 0
    assert captions.caption(captions.names.index("airplane"), 0) == "a photo of an airplane"
    assert captions.caption(captions.names.index("boeing 747 on the runway"), 0) == "boeing 747 on the runway"
    assert json.loads((ROOT / "mini/captions.json").read_text())["scenes"] == captions.scenes
