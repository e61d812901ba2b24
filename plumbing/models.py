"""A model by name: a folder, a single file of SD v1, or an id of the Hugging Face hub.

    folder = model_folder("CompVis/stable-diffusion-v1-4")

From the hub only what our networks read is downloaded, once, with a progress bar: no pickles, no checker,
weights in half precision only where a repository has no others. What the hub's cache holds needs no network.
"""
import dataclasses
import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from plumbing import UserError, single_file
from plumbing.disk import readable
from plumbing.weights import beside, read_config

MINI = str(Path(__file__).resolve().parents[1] / "mini")                        # the default model


def model_folder(name: str, flag: str = "--model") -> Path:
    """A folder, or a single file of SD v1, as it is; "mini" from whichever folder; a hub id such as
    CompVis/stable-diffusion-v1-4 downloaded (as needed) or cached."""
    path = Path(name)
    if path.is_dir():
        return path
    if name == "mini":
        return Path(MINI)
    if path.is_file():
        check_single_file(path, flag)
        return path
    if path.suffix in (".safetensors", ".ckpt"):
        raise UserError(f"{flag} {name}: no such file")
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"{flag} {name}: no such folder, nor a hub id like CompVis/stable-diffusion-v1-4")
    try:
        folder = download(name)
    except Exception as error:                                    # no network, no permission, unknown id, …
        why = "no network, and the cache lacks some of it" if isinstance(error, FileNotFoundError) else \
            f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        raise UserError(f"{flag} {name}: no such folder here, and as a hub id it could not be downloaded "
                        f"({why}); give the folder of a model that you have") from None
    if lost := lacking(folder):
        raise UserError(f"{flag} {name}: {folder} is incomplete, as it lacks {lost}. Run it again with a "
                        "network to download the rest, if the repository has it in safetensors")
    return folder


def lacking(folder: Path) -> str:
    """What a model or a CLIP in the hub's cache does not have, "" if it has all."""
    clip = (folder / "config.json").exists() and not (folder / "model_index.json").exists()
    wanted = [f"{stem}*.safetensors" for stem in (WEIGHTS[3:] if clip else WEIGHTS[:3])]
    wanted += [] if clip else ["scheduler/scheduler_config.json", "tokenizer/*"]
    return next((name for name in wanted if not any(path.exists() for path in folder.glob(name))), "")


def model_name(model: str) -> str:
    """What files that travel say of --model: a folder's own name, without where it lies, or the hub's id."""
    return Path(model).resolve().name if Path(model).exists() else model


def check_single_file(path: Path, flag: str) -> None:
    """It must hold all networks of SD v1 under their original names, or else a UserError says what to do."""
    refuse_pickle(path, flag)
    with readable(path), safe_open(path, "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    if what := single_file.what_else(shapes):
        raise UserError(f"{flag} {path} is {what}")


def refuse_pickle(path: Path, flag: str) -> None:
    if path.suffix != ".safetensors":
        raise UserError(f"{flag} {path} is no .safetensors file; a pickle can run code: convert it first")


@dataclass(frozen=True)
class Defaults:
    """What a model draws with if nobody says otherwise: SD's numbers."""
    guidance: float = 7.5
    steps: int = 50
    size: int = 512


def vae_folder(name: str | Path) -> Path:
    """Of --vae: a VAE's folder or a whole model's, or a file that holds a VAE alone or among others."""
    path = Path(name)
    if path.is_file():
        refuse_pickle(path, "--vae")
    elif not path.is_dir():
        raise UserError(f"--vae {name}: no such folder or file")
    return path / "vae" if path.is_file() or (path / "vae").is_dir() else path


def defaults(folder: Path, size: int = Defaults.size) -> dict:
    """Guidance, steps and picture size of a model: its `defaults.json`, or SD's numbers and `size`."""
    there = beside(folder / "defaults.json").exists()
    return dataclasses.asdict(read_config(folder, Defaults, {}, "defaults.json") if there
                              else Defaults(size=size))


def fingerprint(folder: Path) -> str:
    """A hash of what a model's folder holds that is drawn with, weights, settings and words; or a file's."""
    sha, parts = hashlib.sha256(), ("text_encoder", "unet", "vae", "scheduler", "tokenizer")
    files = [path for part in parts for path in sorted((folder / part).glob("*.*"))
             if path.suffix in (".safetensors", ".json", ".txt")]
    for path in files or [folder]:
        sha.update(f"{path.parent.name}/{path.name} {file_hash(path, path.stat().st_mtime_ns)}".encode())
    return sha.hexdigest()


@functools.cache
def file_hash(path: Path, changed: int) -> str:
    """SHA-256 of a whole file, remembered until it is `changed`: of gigabytes it takes seconds."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2 ** 24):
            sha.update(block)
    return sha.hexdigest()


def tokenizer_folder(model: Path) -> Path:
    """tokenizer/ of a model. A single file has none: the one beside it or, from the hub (2 MB), SD v1.4's."""
    folder = beside(model / "tokenizer")
    if folder == model / "tokenizer" or folder.is_dir():
        return folder
    try:
        return download_tokenizer()
    except Exception as error:                                    # no network, …
        raise UserError(f"{model} has no tokenizer and {SD}'s could not be downloaded "
                        f"({type(error).__name__}): put that tokenizer/ folder beside the file") from None


SD = "CompVis/stable-diffusion-v1-4"
PINNED = {SD: "133a221b8aa7292a167afc5127cb63fb5005638b"}         # results must not change with the branch
SETTINGS = ["model_index.json", "*/config.json", "scheduler/*.json", "tokenizer/*", "defaults.json",
            "*/*.safetensors.index.json",                         # of weights in several files: shards
            "config.json", "vocab.json", "merges.txt", "tokenizer_config.json",
            "special_tokens_map.json", "tokenizer.json", "added_tokens.json"]       # the last seven: CLIP's
WEIGHTS = ["text_encoder/model", "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "model"]


def snapshot(name: str, patterns: list[str], cached: bool = False) -> Path:
    """The cached folder of a hub id, with all files that match; `cached`: without looking at the network.
    Raises FileNotFoundError if the cache lacks some and there is no network, the library's errors else."""
    from huggingface_hub import snapshot_download                 # slow to import
    return Path(snapshot_download(name, revision=PINNED.get(name), allow_patterns=patterns,
                                  local_files_only=cached))


def download(name: str) -> Path:
    """A whole model, or a CLIP. Raises like `snapshot`."""
    full, half = ([f"{stem}{twin}.safetensors" for stem in WEIGHTS] for twin in ("", ".fp16"))
    try:
        folder = snapshot(name, SETTINGS + full)
    except FileNotFoundError:                                     # no network: the cache may have the others
        return snapshot(name, SETTINGS + half, cached=True)
    missing = [path.replace(".s", "-*.s") if (folder / f"{path}.index.json").exists() else twin
               for path, twin in zip(full, half)
               if (folder / path).with_name("config.json").exists() and not (folder / path).exists()]
    return snapshot(name, SETTINGS + missing) if missing else folder


def download_tokenizer() -> Path:
    """SD v1's tokenizer folder, 2 MB. Raises like `snapshot`."""
    return snapshot(SD, ["tokenizer/*"]) / "tokenizer"
