"""Models that are not Stable Diffusion v1 in a folder: SD 2.1-base, an original single file, a hub id.

Each is a small random model with the real one's structure, written by diffusers and transformers.
"""
import json
import re
import shutil
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from safetensors.torch import load_file, save_file
from test_commands import AIRPLANE, MINI, QUICK
from test_networks import UNETS, edit_json, theirs_text, theirs_unet, theirs_vae
from test_tokenizer import reference, write_padding, write_vocabulary

from clip_text import CLIPTextModel
from erasing import make_pairs
from experiments import tables
from plumbing import UserError
from plumbing.edits import base_hash, cross_attention, read_edit, write_edit
from plumbing.models import SETTINGS, fingerprint, model_folder, snapshot, tokenizer_folder
from sample import Model, Text
from unet import UNet
from vae import VAE

SCHEDULER = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear",
             "num_train_timesteps": 1000, "set_alpha_to_one": False, "skip_prk_steps": True,
             "steps_offset": 1}
V1 = {"unet": UNETS["as in SD"], "text": {"hidden_act": "quick_gelu"}, "padding": "SD 1"}
V2 = {"unet": UNETS["as in SD 2.1-base"], "text": {"hidden_act": "gelu"}, "padding": "SD 2.1-base"}


def write_model(folder, version):
    """A pipeline's folder with random weights: 4 levels of 2 layers as SD has them, 32×32 pictures."""
    (folder / "tokenizer").mkdir(parents=True)
    write_padding(folder / "tokenizer", version["padding"])
    tokenizer = reference(folder / "tokenizer")
    text = theirs_text(hidden_size=version["unet"]["cross_attention_dim"], intermediate_size=64,
                       num_attention_heads=4, num_hidden_layers=3, vocab_size=len(tokenizer),
                       **version["text"])
    vae = theirs_vae(block_out_channels=[16, 16, 32, 32], norm_num_groups=8)
    scheduler = diffusers.PNDMScheduler.from_config(SCHEDULER)
    scheduler.register_to_config(clip_sample=False)                # as in the official file: for DDIM
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=theirs_unet(**version["unet"]),
        scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    shutil.move(folder / "tokenizer", folder / "official")
    pipe.save_pretrained(folder)
    shutil.rmtree(folder / "tokenizer")                            # written in the form of today
    shutil.move(folder / "official", folder / "tokenizer")
    (folder / "defaults.json").write_text(json.dumps({"guidance": 3.0, "steps": 3, "size": 64}))
    return folder


@pytest.fixture(scope="module")
def sd2(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("sd2") / "model", V2)


def same_pictures(model, pipe):
    """Two prompts drawn by both, from the same noise: at most 1/255 apart."""
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    prompts = ["a photo of a cat!", "an oil painting of the river at night, unseen"]
    expected = pipe(prompts, latents=model.noise([1, 2]), num_inference_steps=4, guidance_scale=3.0,
                    height=64, width=64, output_type="pt").images
    ours = model.draw(prompts, [1, 2], steps=4, guidance=3.0)
    assert (ours - expected.float()).abs().max() <= 1 / 255
    other = model.draw(prompts[::-1], [1, 2], steps=4, guidance=3.0)
    assert (ours - other).abs().max() > 10 / 255                   # the text matters in this model


# ---- Stable Diffusion 2.1-base ----

def test_pictures_of_sd_2_1_base_equal_diffusers(sd2):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd2)
    assert pipe.tokenizer.pad_token == "!" and pipe.unet.config.attention_head_dim == [2, 4, 8, 6]
    same_pictures(Model(sd2), pipe)


def test_erasing_from_sd_2_1_base(sd2, here, tmp_path, capsys):
    """Closed form and LoRA; what they write means the same in diffusers."""
    here("realera.py", *AIRPLANE, "--model", sd2, *QUICK, "--out", "edit", cwd=tmp_path)
    printed = capsys.readouterr().out
    assert "Eq. 8" in printed and "Eq. 9" in printed
    edit, W0 = load_file(tmp_path / "edit/erased.safetensors"), cross_attention(sd2)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(sd2)
    assert edit.keys() == W0.keys() and not any(torch.equal(edit[name], W0[name]) for name in W0)
    assert pipe.unet.load_state_dict(edit, strict=False).unexpected_keys == []
    ours = Model(sd2)
    ours.put(read_edit(tmp_path / "edit", sd2))
    same_pictures(ours, pipe)


def test_edited_rows_where_padding_is_no_end_of_text(sd2):
    """The last token of the concept, the one end-of-text token, and padding."""
    text = Text(sd2)
    pair, = make_pairs(["airplane!"], ["sky"], "object", text, "tail", 0)
    ids = text.tokenizer(["a photo of the airplane!"])[0].tolist()
    assert ids[pair.start:pair.start + 3] == [0, text.tokenizer.eos, 0] and set(ids[pair.start + 2:]) == {0}
    assert pair.n == 77 - pair.start


def test_velocity_prediction_is_refused(sd2, tmp_path, refused):  # noqa: F811
    """Stable Diffusion 2.1 (768×768) predicts v, not the noise."""
    model, work = shutil.copytree(sd2, tmp_path / "model"), tmp_path / "work"
    work.mkdir()
    edit_json(model / "scheduler/scheduler_config.json", prediction_type="v_prediction")
    refused("sample.py", "x", "--model", model, cwd=work, match="prediction_type = 'v_prediction'")


# ---- Stable Diffusion v1 in a single file ----

def original_key(part, key):
    """A model folder's key under its original name. That it is right, diffusers' own conversion says."""
    if part == "text_encoder":
        return "cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")
    if part == "unet":
        def count(found):
            way, i, what, j, rest = found.groups()
            i, j = int(i), int(j)
            if what == "downsamplers":
                return f"input_blocks.{3 * i + 3}.0.op.{rest.removeprefix('conv.')}"
            if what == "upsamplers":
                return f"output_blocks.{3 * i + 2}.{1 if i == 0 else 2}.{rest}"
            n, index = 3 * i + j + (way == "down"), {"resnets": 0, "attentions": 1}[what]
            return f"{'input' if way == 'down' else 'output'}_blocks.{n}.{index}.{rest}"
        key = re.sub(r"^(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", count, key)
        words = {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1",
                 "mid_block.resnets.1": "middle_block.2", "conv_in": "input_blocks.0.0",
                 "conv_norm_out": "out.0", "conv_out": "out.2",
                 "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
                 "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0",
                 "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
        if "transformer_blocks" in key:                            # inside, names are the same
            words = {"mid_block.attentions.0": "middle_block.1"}
    else:
        key = re.sub(r"up_blocks\.(\d)", lambda found: f"up.{3 - int(found[1])}", key)
        words = {"down_blocks.": "down.", "resnets.": "block.", "downsamplers.0": "downsample",
                 "upsamplers.0": "upsample", "mid_block.block.0": "mid.block_1", "conv_norm_out": "norm_out",
                 "mid_block.block.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1", "to_q": "q",
                 "to_k": "k", "to_v": "v", "to_out.0": "proj_out", "group_norm": "norm",
                 "conv_shortcut": "nin_shortcut"}
    for new, old in words.items():
        key = key.replace(new, old)
    return {"unet": "model.diffusion_model.", "vae": "first_stage_model."}[part] + key


NETWORKS = {"unet": (UNet, "diffusion_pytorch_model"), "vae": (VAE, "diffusion_pytorch_model"),
            "text_encoder": (CLIPTextModel, "model")}
EXTRA = {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000),
         "sqrt_recipm1_alphas_cumprod": torch.ones(2), "posterior_mean_coef1": torch.ones(2),
         "model_ema.decay": torch.tensor(0.9999),
         "model_ema.diffusion_modelinput_blocks00weight": torch.ones(3),
         "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}


def write_single_file(path, parts, dtype=torch.float32):
    """The three networks' tensors (by part and today's name) as CompVis wrote them, and what else they do."""
    tensors = dict(EXTRA)
    for part, network in parts.items():
        for key, tensor in network.items():
            square = part == "vae" and "attentions.0.to_" in key and tensor.ndim == 2
            tensors[original_key(part, key)] = (tensor[:, :, None, None] if square else tensor).to(dtype)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


@pytest.fixture(scope="module")
def sd1(tmp_path_factory):
    """A folder, and the same model as a single file with everything else beside it."""
    folder = write_model(tmp_path_factory.mktemp("sd1") / "model", V1)
    alone = folder.parent / "alone"
    shutil.copytree(folder, alone, ignore=shutil.ignore_patterns("*.safetensors"))
    parts = {part: load_file(folder / part / f"{stem}.safetensors") for part, (_, stem) in NETWORKS.items()}
    return folder, write_single_file(alone / "dream.safetensors", parts)


def test_the_tests_single_file_is_an_original_one(sd1):
    """diffusers' conversion of it gives the folder's tensors back."""
    folder, file = sd1
    tensors = load_file(file)
    for part, convert in {"unet": convert_ldm_unet_checkpoint, "vae": convert_ldm_vae_checkpoint}.items():
        found = convert(dict(tensors), json.loads((folder / part / "config.json").read_text()))
        expected = load_file(folder / part / "diffusion_pytorch_model.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_single_file_holds_the_folders_networks(sd1, dtype, tmp_path):
    folder, file = sd1
    if dtype == torch.float16:
        file = tmp_path / "half.safetensors"
        shutil.copytree(sd1[1].parent, tmp_path, ignore=shutil.ignore_patterns("dream*"), dirs_exist_ok=True)
        save_file({key: tensor.to(dtype) if tensor.is_floating_point() else tensor
                   for key, tensor in load_file(sd1[1]).items()}, file)
    for part, (network, _) in NETWORKS.items():
        ours, expected = (network.from_pretrained(place / part).state_dict() for place in (file, folder))
        assert ours.keys() == expected.keys()
        assert all(torch.equal(ours[key], expected[key].to(dtype).float()) for key in expected)
    assert base_hash(cross_attention(file)) == base_hash(cross_attention(folder))
    assert {tensor.dtype for tensor in cross_attention(file).values()} == {dtype}


def test_pictures_of_a_single_file_equal_diffusers_from_single_file(sd1):
    folder, file = sd1
    pipe = diffusers.StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, safety_checker=None)
    same_pictures(Model(file), pipe)


def test_every_script_takes_a_single_file(sd1, here, monkeypatch, tmp_path):
    """And an edit made with the file fits the folder, and vice versa; nothing appears beside the file."""
    folder, file = sd1
    before = sorted(file.parent.rglob("*"))
    closed, few = ["--lora-steps", 0, "--no-pictures"], ["--n", 1, "--steps", 1]
    here("realera.py", *AIRPLANE, "--model", file, *closed, "--out", "by-file", cwd=tmp_path)
    here("realera.py", *AIRPLANE, "--model", folder, *closed, "--out", "by-folder", cwd=tmp_path)
    one, other = read_edit(tmp_path / "by-file", folder), read_edit(tmp_path / "by-folder", file)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    here("sample.py", "a cat", "--model", file, "--edit", "by-folder", *few, cwd=tmp_path)
    (tmp_path / "mine.csv").write_text("prompt\na cat\n")
    few += ["--model", file, "--clip", MINI / "clip"]
    csv = ["--prompts", "mine.csv", "--edit", "by-file", "--out", "evaluation"]
    here("eval_clip.py", *csv, *few, cwd=tmp_path)
    monkeypatch.setattr(tables, "TABLES", {3: {"1 closed form": tables.CLOSED}})
    here("experiments/tables.py", "--table", 3, *few, "--out", "tables", cwd=tmp_path)
    assert (tmp_path / "evaluation/metrics.csv").exists() and (tmp_path / "tables/table3.csv").exists()
    assert sorted(file.parent.rglob("*")) == before


def test_an_edit_is_refused_for_another_single_file(sd1, tmp_path):
    folder, file = sd1
    W0 = cross_attention(folder)
    write_edit(tmp_path, W0, {"base_hash": base_hash({name: 1.01 * matrix for name, matrix in W0.items()})})
    with pytest.raises(UserError, match="another model"):
        read_edit(tmp_path, file)


def test_a_single_file_is_not_copied_in_memory(sd1, monkeypatch):
    read = {}
    monkeypatch.setattr("plumbing.weights.load_file", lambda path: read.update(load_file(path)) or read)
    ours = {parameter.data_ptr() for parameter in UNet.from_pretrained(sd1[1] / "unet").parameters()}
    assert ours == {t.data_ptr() for key, t in read.items() if key.startswith("model.diffusion_model.")}


def test_different_single_files_have_different_results_folders(sd1, tmp_path):
    """Pictures that were counted are found again by a hash of the weights."""
    copy = Path(shutil.copytree(sd1[1].parent, tmp_path / "alone")) / "dream.safetensors"
    assert fingerprint(sd1[1]) == fingerprint(copy)
    content = bytearray(copy.read_bytes())
    content[-1] ^= 1
    copy.write_bytes(content)
    assert fingerprint(sd1[1]) != fingerprint(copy)


@pytest.mark.parametrize("problem, change", [
    ("has unknown embedding_manager.weight", lambda t: t.update({"embedding_manager.weight": torch.ones(2)})),
    ("has unknown input_blocks.1.2.weight",
     lambda t: t.update({"model.diffusion_model.input_blocks.1.2.weight": torch.ones(2)})),
    ("lacks down_blocks.3.resnets.1.conv2.bias",
     lambda t: t.pop("model.diffusion_model.input_blocks.11.0.out_layers.3.bias")),
    ("wrong shape for conv_in.bias",
     lambda t: t.update({"model.diffusion_model.input_blocks.0.0.bias": torch.ones(3)}))])
def test_what_a_single_file_should_not_hold_is_named(sd1, tmp_path, problem, change):
    tensors = load_file(sd1[1])
    change(tensors)
    shutil.copytree(sd1[1].parent / "unet", tmp_path / "unet")
    save_file(tensors, tmp_path / "dream.safetensors")
    with pytest.raises(UserError, match=re.escape(problem)):
        UNet.from_pretrained(tmp_path / "dream.safetensors" / "unet")


def test_files_that_are_no_single_file_of_sd_v1(sd1, tmp_path, refused):  # noqa: F811
    tensors, work = load_file(sd1[1]), tmp_path / "work"
    work.mkdir()
    (tmp_path / "sd-v1-4.ckpt").write_bytes(b"\x80\x02pickle")
    save_file({re.sub("^cond_stage_model.transformer", "cond_stage_model.model", key): tensor
               for key, tensor in tensors.items()}, tmp_path / "v2-1.safetensors")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2)}, tmp_path / "lora.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(sd1[1].read_bytes()[:5000])
    for name, match in {"sd-v1-4.ckpt": "pickle",
                        "lora.safetensors": "no key begins with model.diffusion_model",
                        "v2-1.safetensors": "no key begins with cond_stage_model.transformer",
                        "cut.safetensors": "download complete"}.items():
        refused("sample.py", "x", "--model", tmp_path / name, cwd=work, match=match)


@pytest.mark.slow
def test_full_size_single_file_with_nothing_but_a_tokenizer_beside(tmp_path):
    """SD v1.4's own shapes in half precision; the configs are our defaults. 2 GB on disk."""
    parts = {}
    for part, (network, _) in NETWORKS.items():
        with torch.device("meta"):
            shapes = network().state_dict()
        parts[part] = {key: torch.randn(t.shape, dtype=torch.float16) * 0.02 for key, t in shapes.items()}
    file = write_single_file(tmp_path / "dream.safetensors", parts, torch.float16)
    write_vocabulary(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.move(tmp_path / name, tmp_path / "tokenizer")
    model = Model(file, dtype=torch.float16)
    for part, network in {"unet": model.unet, "vae": model.vae, "text_encoder": model.text.encoder}.items():
        found = network.state_dict()
        assert found.keys() == parts[part].keys()
        assert all(torch.equal(found[key].half(), parts[part][key]) for key in found)
    tensors = load_file(file)
    config = {"layers_per_block": 2, "up_block_types": [0] * 4, "down_block_types": [0] * 4}
    theirs = {"unet": convert_ldm_unet_checkpoint(dict(tensors), config | {"class_embed_type": None,
                                                                         "addition_embed_type": None}),
              "vae": convert_ldm_vae_checkpoint(dict(tensors), config)}
    for part, converted in theirs.items():
        assert converted.keys() == parts[part].keys()
        assert all(torch.equal(converted[key], parts[part][key]) for key in converted)


# ---- the hub ----

OFFICIAL = ["README.md", "model_index.json", "sd-v1-4.ckpt", "feature_extractor/preprocessor_config.json",
            "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt",
            "tokenizer/tokenizer_config.json", "tokenizer/special_tokens_map.json",
            *(f"{part}/{name}" for part in ("unet", "vae") for name in (
                "config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors",
                "diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model.fp16.safetensors")),
            *(f"{part}/{name}" for part in ("text_encoder", "safety_checker") for name in (
                "config.json", "pytorch_model.bin", "model.safetensors", "model.fp16.safetensors")),
            "unet/diffusion_pytorch_model.non_ema.safetensors"]
CLIP = ["config.json", "flax_model.msgpack", "merges.txt", "model.safetensors", "preprocessor_config.json",
        "pytorch_model.bin", "special_tokens_map.json", "tf_model.h5", "tokenizer.json",
        "tokenizer_config.json", "vocab.json"]


class FakeHub:
    """In place of snapshot_download: repositories as lists of names; a download makes empty files."""

    def __init__(self, cache, **repositories):
        self.cache, self.repositories, self.network, self.breaks_at = cache, repositories, True, None
        self.revisions, self.downloaded = [], []

    def __call__(self, name, revision, allow_patterns, local_files_only):
        self.revisions.append(revision)
        wanted = list(huggingface_hub.utils.filter_repo_objects(self.repositories[name.split("/")[1]],
                                                                allow_patterns=allow_patterns))
        for path in wanted:
            path = self.cache / path
            if not path.exists():
                if local_files_only or not self.network or str(path).endswith(self.breaks_at or "\n"):
                    raise huggingface_hub.errors.LocalEntryNotFoundError("offline")
                self.downloaded.append(str(path.relative_to(self.cache)))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        return str(self.cache)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    def make(**repositories):
        found = FakeHub(tmp_path / "cache", **repositories)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", found)
        return found
    return make


def weights(names):
    return sorted(name for name in names if not name.endswith((".json", ".txt")))


FULL = ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors"]
HALF = [name.replace(".safetensors", ".fp16.safetensors") for name in FULL]


def test_only_what_is_needed_is_downloaded_once_and_pinned(fake):
    there = fake(**{"stable-diffusion-v1-4": OFFICIAL})
    assert model_folder("CompVis/stable-diffusion-v1-4") == there.cache
    assert weights(there.downloaded) == FULL and "tokenizer/merges.txt" in there.downloaded
    assert set(there.revisions) == {"133a221b8aa7292a167afc5127cb63fb5005638b"}
    there.downloaded, there.network = [], False
    assert model_folder("CompVis/stable-diffusion-v1-4") == there.cache and there.downloaded == []


def test_half_precision_is_downloaded_where_there_is_nothing_else(fake):
    there = fake(half=[name for name in OFFICIAL if name not in FULL],
                 mixed=[name for name in OFFICIAL if name != FULL[1]])
    model_folder("someone/half")
    assert weights(there.downloaded) == HALF and set(there.revisions) == {None}
    there.cache = there.cache.with_name("other")
    there.downloaded = []
    model_folder("someone/mixed")
    assert weights(there.downloaded) == sorted([FULL[0], HALF[1], FULL[2]])


def test_without_network_the_cache_may_hold_half_precision(fake):
    there = fake(tuned=OFFICIAL)
    snapshot("someone/tuned", [*SETTINGS, *HALF])         # as another program has left it
    there.network = False
    assert model_folder("someone/tuned") == there.cache


def test_a_broken_download_does_not_go_on_in_half_precision(fake):
    there = fake(tuned=OFFICIAL)
    there.breaks_at = FULL[1]
    with pytest.raises(UserError, match="no network"):
        model_folder("someone/tuned")
    assert not set(there.downloaded) & set(HALF)


def test_a_clip_by_its_id(fake):
    there = fake(**{"clip-vit-large-patch14": CLIP})
    model_folder("openai/clip-vit-large-patch14", "--clip")
    assert weights(there.downloaded) == ["model.safetensors"] and "vocab.json" in there.downloaded


def test_no_network_and_no_cache_names_the_folder_option(fake, tmp_path, refused):  # noqa: F811
    fake(**{"stable-diffusion-v1-4": OFFICIAL}).network = False
    (tmp_path / "work").mkdir()
    refused("sample.py", "x", "--model", "CompVis/stable-diffusion-v1-4", cwd=tmp_path / "work",
            match="no network, and the cache lacks .*give the folder of a model")


def test_the_real_cache_without_network(sd1, tmp_path, monkeypatch):
    """huggingface_hub itself, offline (conftest.py), on a cache laid out by hand: main points to a commit."""
    repository, commit = tmp_path / "models--someone--small", "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    shutil.copytree(sd1[0], repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert model_folder("someone/small") == repository / "snapshots" / commit
    assert base_hash(cross_attention(model_folder("someone/small"))) == base_hash(cross_attention(sd1[0]))


def test_tokenizer_of_a_single_file(sd1, fake, tmp_path, refused):  # noqa: F811
    """Beside it; else SD v1.4's from the hub, only that; else the error says what to put where."""
    folder, file = sd1
    assert tokenizer_folder(folder) == folder / "tokenizer"
    assert tokenizer_folder(file) == file.parent / "tokenizer"
    there = fake(**{"stable-diffusion-v1-4": OFFICIAL})
    (tmp_path / "work").mkdir()
    lonely = Path(shutil.copy(file, tmp_path))
    there.network = False
    refused("sample.py", "x", "--model", lonely, cwd=tmp_path / "work", match="tokenizer/ folder beside")
    there.network = True
    assert tokenizer_folder(lonely) == there.cache / "tokenizer"
    assert sorted(there.downloaded) == [name for name in sorted(OFFICIAL) if name.startswith("tokenizer/")]
