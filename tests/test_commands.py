"""Every command as typed by a user, on `mini/`: outputs, determinism, bad input, interruption, diffusers."""
import ast
import contextlib
import functools
import io
import json
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import realera
from clip_text import CLIPTokenizer
from erasing import drifts, make_pairs
from eval_clip import CLIP
from plumbing import UserError
from plumbing.cli import command_line, pick_device
from plumbing.disk import whole, whole_folder
from plumbing.edits import about_edit, base_hash, cross_attention, read_edit
from plumbing.models import fingerprint
from plumbing.prompts import PRESERVED, UNRELATED, preserved_prompts
from plumbing.weights import put_weights
from sample import Model

ROOT = Path(__file__).parent.parent
MINI = ROOT / "mini"
QUICK = ["--lora-steps", "2", "--n", "1", "--set", "trajectories=2", "batch=2"]
AIRPLANE = ["--concept", "airplane", "--anchor", "sky"]
SHIP = ["--concept", "ship", "--anchor", "street"]


def run(script, *args, cwd, status=0):
    done = subprocess.run([sys.executable, ROOT / script, *map(str, args)], cwd=cwd,
                          capture_output=True, text=True)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_bad_input_ends_a_process_with_status_2_and_one_line(tmp_path):
    """The same as a user sees it, once."""
    done = run("realera.py", "--concept", "", cwd=tmp_path, status=2)
    assert done.stderr == "error: --concept is empty\n" and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def pixels(path):
    return np.asarray(PIL.Image.open(path)).astype(int)


@pytest.fixture(scope="module")
def model():
    return Model(MINI)


@pytest.fixture(scope="module")
def edit(tmp_path_factory):
    """An erasure with two LoRA steps, made once."""
    folder = tmp_path_factory.mktemp("edit")
    done = run("realera.py", "--concept", "airplane", "--anchor", "sky", *QUICK, cwd=folder)
    return folder / "out/airplane", done.stdout


@pytest.fixture
def broken(tmp_path):
    """A copy of mini/ to damage (without its CLIP, which erasing does not need)."""
    shutil.copytree(MINI, tmp_path / "model",
                    ignore=shutil.ignore_patterns("clip", "work", "*.py", "*.png", "*.md"))
    return tmp_path / "model"


# ---- sample.py ----

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


# ---- realera.py ----

def test_erasing_writes_the_edit_and_reports(edit):
    out, printed = edit
    assert sorted(p.name for p in out.iterdir()) == ["before_after.png", "before_after.svg",
                                                     "erased.safetensors",
                                                     "residual_lora.safetensors", "run.json"]
    for part in ("cond(B)", "‖ΔW‖/‖W‖", 'drift of ""', "Eq. 8", "Eq. 9", "a photo of the airplane",
                 "seconds:"):
        assert part in printed
    report = json.loads((out / "run.json").read_text())
    assert report["seconds"].keys() == {"text", "closed form", "trajectories", "noise alignment", "pictures"}
    assert len(report["table"]) == 8 and report["table"][0]["prompt"] == "a photo of the airplane"
    with safe_open(out / "erased.safetensors", "pt") as file:
        about = json.loads(file.metadata()["edit"])
    assert about["concepts"] == ["airplane"] and about["anchors"] == ["sky"] and about["method"] == "RealEra"
    assert about["settings"]["lora_steps"] == 2 and len(about["base_hash"]) == 64


def test_the_edit_is_closed_form_plus_lora_in_the_dtype_of_the_file(edit):
    out, _ = edit
    W0, W = cross_attention(MINI), load_file(out / "erased.safetensors")
    assert W.keys() == W0.keys() and all(W[k].dtype == W0[k].dtype and W[k].shape == W0[k].shape for k in W)
    text, s = realera_text(), realera.Settings()
    pairs = realera.make_pairs(["airplane"], ["sky"], "object", text, s.rows, 0)
    stay = text(preserved_prompts("object", pairs))
    expected = realera.edited(W0, realera.erase_in_closed_form(pairs, stay, s)[0])
    lora = load_file(out / "residual_lora.safetensors")
    for name, matrix in expected.items():
        layer = f"unet.{name.removesuffix('.weight')}"
        matrix = matrix + lora[f"{layer}.lora_B.weight"] @ lora[f"{layer}.lora_A.weight"]
        assert torch.equal(W[name], matrix.to(W[name].dtype))


def realera_text():
    import sample
    return sample.Text(MINI)


def test_edit_loads_in_diffusers_and_gives_our_pictures(edit):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(MINI)
    missing, unexpected = pipe.unet.load_state_dict(load_file(edit[0] / "erased.safetensors"), strict=False)
    assert unexpected == []
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    ours = Model(MINI)
    ours.put(read_edit(edit[0], MINI))
    theirs = pipe("a photo of the airplane", latents=ours.noise([1]), num_inference_steps=5,
                  guidance_scale=3.0, height=32, width=32, output_type="pt").images
    picture = ours.draw(["a photo of the airplane"], [1], steps=5, guidance=3.0)
    assert (picture - theirs.float()).abs().max() <= 1 / 255
    before = Model(MINI).draw(["a photo of the airplane"], [1], steps=5, guidance=3.0)
    assert (picture - before).abs().max() > 0.1


def test_before_after_picture_has_a_row_per_prompt(edit):
    height, width, _ = pixels(edit[0] / "before_after.png").shape
    side = (width - 2) // 2
    assert height == 8 * side + 2


def test_what_is_preserved_and_what_drift_is_measured_on_are_apart():
    assert len(set(PRESERVED)) == len(set(UNRELATED)) == 30 and not set(PRESERVED) & set(UNRELATED)
    pairs = realera.make_pairs(["airplane"], ["grass"], "object", realera_text(), "tail", 0)
    prompts = preserved_prompts("object", pairs)
    assert prompts[:2] == ["", "a photo of the"] and len(prompts) == 30
    assert not {"a photo of the airplane", "a photo of the grass"} & set(prompts)


@pytest.mark.parametrize("concept, left_out", [("truck", {"lorry"}), ("moon", {"moon"}), ("airplane", set())])
def test_drift_is_the_median_over_what_names_neither_concept_nor_anchor(concept, left_out):
    text = realera_text()
    pairs, delta = make_pairs([concept], ["sky"], "object", text, "tail", 0), torch.randn(256, 256).double()
    nouns = [noun for noun in UNRELATED if noun not in left_out]
    rows = text([f"a photo of the {noun}" for noun in nouns]).double()
    moved = (rows @ delta.T).flatten(1).norm(dim=1) / rows.flatten(1).norm(dim=1)
    assert len(nouns) == 30 - len(left_out)
    found = drifts(delta, pairs, text)["median drift of unrelated prompts"]
    assert found == pytest.approx(np.median(moved.numpy()), rel=1e-6)


def test_same_seed_same_bytes_and_the_order_of_concepts_is_moot(tmp_path):
    args = ["--lora-steps", 0, "--no-pictures"]
    run("realera.py", *AIRPLANE, *SHIP, *args, "--out", "a", cwd=tmp_path)
    run("realera.py", *SHIP, *AIRPLANE, *args, "--out", "b", cwd=tmp_path)
    run("realera.py", *SHIP, *AIRPLANE, *args, "--out", "c", "--seed", 1, cwd=tmp_path)
    paths = [tmp_path / x / "erased.safetensors" for x in "abc"]
    a, b, c = map(load_file, paths)
    assert all(torch.equal(a[k], b[k]) for k in a) and not all(torch.equal(a[k], c[k]) for k in a)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_capitals_are_moot_as_clip_reads_none(here, tmp_path):
    for out, concept, anchor in (("a", "airplane", "sky"), ("b", "AirPlane", "SKY")):
        here("realera.py", "--concept", concept, "--anchor", anchor, "--lora-steps", 0, "--no-pictures",
             "--out", out, cwd=tmp_path)
    a, b = ((tmp_path / out / "erased.safetensors").read_bytes() for out in "ab")
    assert a == b and about_edit(tmp_path / "b")["concepts"] == ["airplane"]      # as in captions.json


def test_gradients_of_half_precision_do_not_underflow():
    """The first Adam step has the signs of the gradient: nearly the same ones in float16 as in float32."""
    signs = []
    for dtype in (torch.float32, torch.float16):
        model = Model(MINI, dtype=dtype)
        model.defaults["steps"] = 2
        s = realera.Settings(lora_steps=1, trajectories=2, batch=1, M=0, N=0)
        pairs = make_pairs(["airplane"], ["sky"], "object", model.text, s.rows, 0)
        W0 = cross_attention(MINI)
        delta, _ = realera.erase_in_closed_form(pairs, model.text([""]), s)
        ways = [realera.trajectories(model, pairs[0].e_star, model.text([""])[0], pairs[0].seed, 2)]
        realera.add_lora(model.unet, s.rank)
        realera.put_weights(model.unet, realera.edited(W0, delta))
        realera.align_noise(model, pairs, ways, W0, s)
        signs.append(torch.cat([layer.lora_B.detach().flatten().sign()
                                for layer in realera.lora_layers(model.unet).values()]))
    assert (signs[0] == signs[1]).float().mean() > 0.9


def test_cuda_is_the_processs_own_gpu_and_mps_must_be_asked_for(monkeypatch):
    """By torchrun's LOCAL_RANK, also where a process sees fewer GPUs than there are processes."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "cpu" and pick_device("mps").type == "mps"
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto").type == "cpu"              # as where the driver is too old for torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name, rank, index in (("auto", "3", 1), ("cuda", "1", 1), ("cuda", "2", 0), ("cuda:1", "0", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert pick_device(name) == torch.device("cuda", index)
        assert current.pop() == f"cuda:{index}" and not current
    for name in ("cuda:2", "cuda:x", "tpu"):
        with pytest.raises(UserError, match=f"{name} is not available"):
            pick_device(name)


def test_too_little_gpu_memory_is_one_line(capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(SystemExit) as end:
        command_line(full)
    assert end.value.code == 2 and "--dtype bfloat16" in capsys.readouterr().err


def test_fingerprint_is_of_the_networks_only(tmp_path):
    """mini/train.py's checkpoints, for instance, are no part of the model."""
    shutil.copytree(MINI, tmp_path / "mini", ignore=shutil.ignore_patterns("work"))
    before = fingerprint(tmp_path / "mini")
    (tmp_path / "mini/work").mkdir(exist_ok=True)
    save_file({"x": torch.ones(3)}, tmp_path / "mini/work/judge.safetensors")
    assert fingerprint(tmp_path / "mini") == before
    save_file({"x": torch.ones(3)}, tmp_path / "mini/vae/diffusion_pytorch_model.safetensors")
    assert fingerprint(tmp_path / "mini") != before


def test_sample_takes_the_edit_and_refuses_it_for_another_model(edit, broken, tmp_path):
    run("sample.py", "a photo of the airplane", "--n", 1, "--steps", 2, "--edit", edit[0], cwd=tmp_path)
    path = broken / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    key = next(k for k in tensors if k.endswith("attn2.to_k.weight"))
    save_file(tensors | {key: tensors[key] * 1.01}, path)
    with pytest.raises(UserError, match="another model"):
        read_edit(edit[0], broken)


def test_hash_is_the_same_for_full_and_half_precision_files():
    W0 = cross_attention(MINI)
    assert base_hash(W0) == base_hash({k: v.float() for k, v in W0.items()})
    assert base_hash(W0) != base_hash({k: v * 1.01 for k, v in W0.items()})


@pytest.mark.parametrize("args, match", [
    (["--concept", ""], "empty"), (["--concept", "  "], "empty"),
    (["--concept", "sky", "--anchor", " Sky"], "own anchor"),
    (["--concept", "a", "--concept", "b", "--anchor", "sky"], "2 concepts but 1 anchor"),
    (["--concept", "cat", "--concept", "Cat"], "twice"), (["--concept", "cat " * 60], "fit into 32"),
    ([*AIRPLANE, "--set", "S1=0.5", "S2=0.6"], "S2"), ([*AIRPLANE, "--set", "D2=0.1"], "D2"),
    ([*AIRPLANE, "--set", "M=-1"], "M"), ([*AIRPLANE, "--lora-steps", "-1"], "lora_steps"),
    ([*AIRPLANE, "--set", "lambda2=0", "M=0", "N=0", "real_prompts=false"], "lambda2"),
    ([*AIRPLANE, "--set", "M=five"], "M="),
    ([*AIRPLANE, "--set", "D7=1"], "no setting"), ([*AIRPLANE, "--set", "D1=0.01"], "neighbor"),
    ([*AIRPLANE, "--n", "0"], "--n"), ([*AIRPLANE, "--device", "cuda"], "not available"),
    ([*AIRPLANE, "--model", "nowhere"], "no such folder"), ([*AIRPLANE, "--seed", "-1"], "seed"),
    ([*AIRPLANE, "--out", ".", "--overwrite"], "no edit folder")])
def test_realera_refuses_bad_input(refused, tmp_path, args, match):
    refused("realera.py", *args, cwd=tmp_path, match=match)


def test_existing_folder_is_kept_unless_overwrite_is_given(refused, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("precious")
    args = [*AIRPLANE, "--lora-steps", 0, "--no-pictures", "--out", "out"]
    refused("realera.py", *args, "--overwrite", cwd=tmp_path, match="out is no edit folder")
    (tmp_path / "out/erased.safetensors").write_text("an edit")
    refused("realera.py", *args, cwd=tmp_path, match="--overwrite")
    (tmp_path / ".out.old").mkdir()                               # as a killed run may leave it
    (tmp_path / ".out.old/half").write_text("left over")
    run("realera.py", *args, "--overwrite", cwd=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["erased.safetensors", "run.json"]


def damage(model, what):
    """Break a copy of mini/ in one way; return what the error must say."""
    unet = model / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(unet)
    key = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    if what == "no text encoder":
        shutil.rmtree(model / "text_encoder")
        return "text_encoder"
    if what == "missing":
        del tensors[key]
        save_file(tensors, unet)
        return key
    if what == "extra":
        save_file(tensors | {"surplus.weight": tensors[key].clone()}, unet)
        return "surplus.weight"
    if what == "misshapen":
        save_file(tensors | {key: tensors[key][:8].clone()}, unet)
        return key
    if what == "NaN":
        tensors[key][0, 0] = float("nan")
        save_file(tensors, unet)
        return key
    if what == "truncated":
        unet.write_bytes(unet.read_bytes()[:100000])
        return "cannot be read"
    if what in ("class_embed_type", "in_channels"):
        config = json.loads((model / "unet/config.json").read_text())
        (model / "unet/config.json").write_text(json.dumps(config | {what: 9}))
        if what == "class_embed_type":
            return "class_embed_type = 9"
        wide = tensors["conv_in.weight"].repeat(1, 3, 1, 1)[:, :9]
        save_file(tensors | {"conv_in.weight": wide.contiguous()}, unet)
        return "no text-to-image model"                           # inpainting, for instance
    unet.rename(unet.with_suffix(".bin"))
    return "save_file"                                            # says how to convert


@pytest.mark.parametrize("what", ["no text encoder", "missing", "extra", "misshapen", "NaN", "truncated",
                                  "class_embed_type", "in_channels", "bin"])
def test_broken_folders_are_named_and_leave_nothing(refused, broken, tmp_path, what):
    match = damage(broken, what)
    work = tmp_path / "work"
    work.mkdir()
    refused("realera.py", *AIRPLANE, "--model", broken, *QUICK, cwd=work, match=re.escape(match))


def test_interruption_leaves_nothing_behind(tmp_path):
    process = subprocess.Popen([sys.executable, ROOT / "realera.py", *AIRPLANE, "--lora-steps", "2000"],
                               cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("out/.*.partial")):
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors and "interrupted" in errors
    assert list(tmp_path.iterdir()) == []


def test_what_fails_takes_nothing_of_another_run_along(tmp_path):
    """Both make out/; one is done when the other is interrupted."""
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out/tables/a"):
        with whole_folder(tmp_path / "out/b") as new:
            (new / "edit").write_text("finished")
        raise KeyboardInterrupt
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "out", tmp_path / "out/b", tmp_path / "out/b/edit"]


def test_full_disk_leaves_nothing_behind_and_the_old_edit_in_place(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("precious")
    (target / "erased.safetensors").write_text("an edit")
    with pytest.raises(OSError), whole_folder(target, overwrite=True) as new:
        (new / "half").write_text("written")
        raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (target / "old").read_text() == "precious"
    with pytest.raises(OSError), whole(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def full():
        raise OSError(28, "No space left on device", "out/x")
    with pytest.raises(SystemExit) as end:
        command_line(full)
    assert end.value.code == 2


# ---- README and mini ----

def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split(" #")[0].strip() for block in blocks
             for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("python ")]


def test_readme_has_commands():
    assert len(readme_commands()) >= 6


def test_every_command_of_the_readme_runs(tmp_path, monkeypatch):
    """With fewer steps and pictures; what needs SD v1.4, CIFAR-10 or long, and what test_scores.py and
    test_bench.py run, has only its flags checked. In this process, as twenty starts would take a minute."""
    os.symlink(MINI, tmp_path / "mini")
    monkeypatch.chdir(tmp_path)

    def start(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *args])
        runpy.run_path(str(ROOT / script), run_name="__main__")

    @functools.cache
    def shown(script):
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit, match="0"):
            start(script, "--help")
        return out.getvalue()

    (tmp_path / "mine.csv").write_text("prompt,seed\na photo of the ship,1\n")
    (tmp_path / "prompts.txt").write_text("a photo of the ship\na photo of the jet\n")
    for command in readme_commands():
        script, *args = shlex.split(command)[1:]
        if script == "-m":
            assert args == ["pytest"]                             # as these tests were started
        elif "CompVis/stable-diffusion-v1-4" in args or script.startswith(("experiments/", "mini/")):
            assert all(flag in shown(script) for flag in args if flag.startswith("--")), command
        else:
            quick = ["--lora-steps", "1", "--no-pictures", "--overwrite", "--set", "trajectories=2",
                     "batch=1"]
            few = ["--n", "1", "--steps", "2"]
            small = {"realera.py": quick, "rece.py": quick[2:4], "sample.py": few, "eval_clip.py": few,
                     "tools/export.py": [], "tools/merge.py": []}[script]
            start(script, *args, *small)


def test_texts_are_utf_8_wherever_they_go(tmp_path):
    """On Windows, Python before 3.15 would take the country's own encoding, which has no ‖ΔW‖ and no →."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")):
        if path.parent.name == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                assert "utf-8" in ast.unparse(node), f"{path.name}, line {node.lineno}"
    (tmp_path / "prompts.txt").write_text("a café → a bar", encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "realera.py", "--concept", "airplane", "--anchor", "sky",
                           "--preview", "prompts.txt"], cwd=tmp_path, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert "‖Δe‖/‖e‖  prompt" in done.stdout.decode("utf-8"), done.stderr
    assert "a café → a bar" in done.stdout.decode("utf-8")


def test_readme_states_line_counts_and_files_keep_their_ceilings():
    """The file guide's numbers are those of the files. No file exceeds 110 columns, nor 320 lines in the root
    and 330 elsewhere."""
    readme = (ROOT / "README.md").read_text()
    folders = ("plumbing", "baselines", "tools", "experiments")
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).glob("*.py"))]:
        lines, name = path.read_text().splitlines(), path.relative_to(ROOT).as_posix()
        assert len(lines) <= (320 if path.parent == ROOT else 330) and max(map(len, lines)) <= 110, path
        row = rf"\| `{name}` \| {len(lines)} \|"
        assert re.search(row, readme), f"{name} has {len(lines)} lines"


def test_mini_is_small_and_safe():
    weights = [*MINI.rglob("*.safetensors")]
    weights = [path for path in weights if "work" not in path.relative_to(MINI).parts]
    assert sum(path.stat().st_size for path in weights) <= 40 * 2 ** 20
    assert {v.dtype for path in weights for v in load_file(path).values()} == {torch.float16}
    assert not [p for p in MINI.rglob("*")
                if p.suffix in (".bin", ".pt", ".ckpt", ".pkl") and "work" not in p.relative_to(MINI).parts]


def test_mini_draws_what_it_is_asked_for_and_not_what_was_erased(model):
    """The README's results in small: 4 pictures a class; then 8 of the erased one, closed form only."""
    book = json.loads((MINI / "captions.json").read_text())
    names = [*book["classes"], *book["scenes"]]
    clip = CLIP.from_pretrained(MINI / "clip")

    def top1(pictures):
        return clip.classify(pictures, [f"a photo of the {name}" for name in names]).argmax(1)

    prompts = [f"a photo of the {name}" for name in names[:10] for _ in range(4)]
    seen = top1(model.draw(prompts, [0, 1, 2, 3] * 10, steps=12))
    assert (seen == torch.arange(10).repeat_interleave(4)).float().mean() >= 0.8
    pairs = realera.make_pairs(["airplane"], ["sky"], "object", model.text, "tail", 0)
    stay, W0 = model.text(preserved_prompts("object", pairs)), cross_attention(MINI)
    delta, _ = realera.erase_in_closed_form(pairs, stay, realera.Settings())
    put_weights(model.unet, realera.edited(W0, delta))
    seen = top1(model.draw(["a photo of the airplane"] * 8, list(range(8)), steps=12))
    put_weights(model.unet, W0)
    assert (seen == names.index("airplane")).sum() == 0 and (seen == names.index("sky")).sum() >= 6


def test_every_caption_fits_and_names_no_class_in_an_associated_phrase():
    classes = json.loads((MINI / "captions.json").read_text())["classes"]
    tokenizer = CLIPTokenizer.from_pretrained(MINI / "tokenizer")
    for name, entry in classes.items():
        assert len(entry["synonyms"]) == 3 and len(entry["associated"]) >= 4
        for phrase in entry["associated"]:
            assert not set(phrase.split()) & {name, *entry["synonyms"]} and not tokenizer.cut(phrase)
