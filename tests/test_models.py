"""A model's folder: its fingerprint, and what is downloaded from the hub."""
import os
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from helpers import MINI, edit_json
from plumbing import UserError
from plumbing.edits import base_hash, cross_attention
from plumbing.models import SETTINGS, fingerprint, model_folder, snapshot, tokenizer_folder


def test_fingerprint_is_of_what_is_drawn_with(tmp_path):
    """mini/train.py's checkpoints, for instance, are no part of the model."""
    shutil.copytree(MINI, tmp_path / "mini", ignore=shutil.ignore_patterns("work"))
    before = fingerprint(tmp_path / "mini")
    work = tmp_path / "mini" / "work"
    work.mkdir(exist_ok=True)
    save_file({"x": torch.ones(3)}, work / "judge.safetensors")
    assert fingerprint(tmp_path / "mini") == before
    settings = tmp_path / "mini/scheduler/scheduler_config.json"
    said = settings.read_text()
    edit_json(settings, prediction_type="v_prediction")
    assert fingerprint(tmp_path / "mini") != before               # or noise would be found again
    settings.write_text(said)
    assert fingerprint(tmp_path / "mini") == before
    save_file({"x": torch.ones(3)}, tmp_path / "mini/vae/diffusion_pytorch_model.safetensors")
    assert fingerprint(tmp_path / "mini") != before


def test_fingerprint_sees_damage_in_the_middle_of_a_file(tmp_path):
    file = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    file.parent.mkdir()
    data = bytearray(5 * 2 ** 20)
    file.write_bytes(data)
    os.utime(file, (0, 0))                                        # some clocks tick every 10 ms only
    before = fingerprint(tmp_path), fingerprint(file)
    data[len(data) // 2] = 1
    file.write_bytes(data)
    after = fingerprint(tmp_path), fingerprint(file)
    assert before[0] != after[0] and before[1] != after[1]


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


@pytest.mark.parametrize("lost", ["unet/diffusion_pytorch_model.safetensors", "scheduler", "tokenizer",
                                  "text_encoder/model.safetensors"])
def test_a_partial_cache_is_called_incomplete(sd1, tmp_path, monkeypatch, lost):
    """The library answers with the folder, whatever it holds, if there is no network."""
    repository, commit = tmp_path / "models--someone--small", "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    folder = shutil.copytree(sd1[0], repository / "snapshots" / commit)
    shutil.rmtree(folder / lost) if (folder / lost).is_dir() else (folder / lost).unlink()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=f"incomplete, as it lacks {lost.split('.')[0]}"):
        model_folder("someone/small")


def test_weights_in_several_files_are_downloaded(fake):
    index = f"{FULL[1]}.index.json"
    pieces = [FULL[1].replace(".", f"-0000{i}-of-00002.") for i in (1, 2)]
    there = fake(large=[name for name in OFFICIAL if name != FULL[1]] + [index, *pieces])
    model_folder("someone/large")
    assert weights(there.downloaded) == sorted([FULL[0], *pieces, FULL[2]]) and index in there.downloaded


@pytest.mark.parametrize("name", ["models/sd14", "./sd14", "../sd14", "sd14"])
def test_a_mistyped_folder_is_first_of_all_no_folder(name, fake):
    fake(sd14=OFFICIAL).network = False
    with pytest.raises(UserError, match=f"--model {name}: no such folder"):
        model_folder(name)


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
