"""Models from the Hugging Face hub, by id: downloaded once (with a progress bar), then read from its cache.

    folder = model("CompVis/stable-diffusion-v1-4")

Only what our networks read is downloaded: no pickles, no checker, weights in half precision only where a
repository has no others. What the cache holds needs no network.
"""
from pathlib import Path

from huggingface_hub import snapshot_download

SD = "CompVis/stable-diffusion-v1-4"
PINNED = {SD: "133a221b8aa7292a167afc5127cb63fb5005638b"}         # results must not change with the branch
SETTINGS = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer/*", "defaults.json",
            "config.json", "vocab.json", "merges.txt", "tokenizer_config.json",
            "special_tokens_map.json"]                            # the last five: CLIP's own
WEIGHTS = ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "model"]


def snapshot(name: str, patterns: list[str], cached: bool = False) -> Path:
    """The cached folder of a hub id, with all files that match; `cached`: without looking at the network.
    Raises FileNotFoundError if the cache lacks some and there is no network, the library's errors else."""
    return Path(snapshot_download(name, revision=PINNED.get(name), allow_patterns=patterns,
                                  local_files_only=cached))


def model(name: str) -> Path:
    """A whole model, or a CLIP. Raises like `snapshot`."""
    full, half = ([f"{stem}{twin}.safetensors" for stem in WEIGHTS] for twin in ("", ".fp16"))
    try:
        folder = snapshot(name, SETTINGS + full)
    except FileNotFoundError:                                     # no network: the cache may have the others
        return snapshot(name, SETTINGS + half, cached=True)
    missing = [twin for path, twin in zip(full, half)
               if (folder / path).with_name("config.json").exists() and not (folder / path).exists()]
    return snapshot(name, SETTINGS + missing) if missing else folder


def tokenizer() -> Path:
    """SD v1's tokenizer folder, 2 MB. Raises like `snapshot`."""
    return snapshot(SD, ["tokenizer/*"]) / "tokenizer"
