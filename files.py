"""What is on disk: model folders, edits, safetensors; and writing that never leaves a half-written file.

Nothing of ours is imported here but names of tensors and, where a hub id is given, the hub. Weights are read
from safetensors only, never from a pickle, and nothing that a model folder says is executed. A single file in
the original form stands for a folder: dream.safetensors/unet is that part of it which a folder has in unet/.
"""
import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

import single_file


class UserError(Exception):
    """Something that the person at the keyboard can fix. The scripts print it as one line and exit with 2."""


# ------------------------------------------------------------------------------------------ reading networks

def read_json(path: str | Path) -> dict:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: is this a model folder in the diffusers layout?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold a JSON object")
    return values


def read_config(folder: Path, config_class, supported: dict, file: str = "config.json", section: str = ""):
    """A `config_class` from a folder's JSON: absent keys keep their defaults, newer keys are ignored, a value
    outside `supported` (key -> the tuple of what the network implements) is an error that names it."""
    path = beside(folder / file)
    values = read_json(path) if path.exists() or path == folder / file else {}    # a single file is SD v1
    values = values.get(section, {}) if section else values
    for key, allowed in supported.items():
        if key in values and values[key] not in allowed:
            raise UserError(f"{path}: {key} = {values[key]!r} is not supported "
                            f"(only {' or '.join(map(repr, allowed))})")
    chosen = {}
    for field in dataclasses.fields(config_class):
        value = values.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if not isinstance(value, (int, float) if field.type is float else field.type):
            raise UserError(f"{path}: {field.name} = {value!r} is not supported (the type differs)")
        chosen[field.name] = value
    return config_class(**chosen)


def beside(path: Path) -> Path:
    """`path`; or, for what a single file cannot hold, as dream.safetensors/unet/config.json, beside it."""
    file = next((p for p in path.parents if p.suffix == ".safetensors" and p.is_file()), None)
    return file.parent / path.relative_to(file) if file else path


def find_weights(folder: str | Path, stem: str) -> Path:
    """`stem.safetensors`, or the official half-precision twin `stem.fp16.safetensors`, or the single file."""
    folder = Path(folder)
    if folder.parent.is_file():
        return folder.parent
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; a model has tokenizer, text_encoder, unet, vae, scheduler")
    for name in (f"{stem}.safetensors", f"{stem}.fp16.safetensors"):
        if (folder / name).exists():
            return folder / name
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".ckpt", ".pt", ".pth"))
    if pickles:
        raise UserError(f"{folder} has {pickles[0]} but no {stem}.safetensors. Pickles can run code: "
                        "convert it in a sandbox: python -c \"import torch, safetensors.torch as s; "
                        f"s.save_file(torch.load('{pickles[0]}', weights_only=True), '{stem}.safetensors')\"")
    raise UserError(f"{folder} has no {stem}.safetensors")


@contextlib.contextmanager
def readable(path: str | Path):
    """Turn safetensors' errors about a damaged or missing file into a UserError."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): is the download complete?") from None


def read_tensors(folder: str | Path, stem: str) -> tuple[Path, dict[str, Tensor]]:
    """The weights' path, and its tensors by the names of a model folder, memory-mapped: read when used."""
    path = find_weights(folder, stem)
    with readable(path):
        tensors = load_file(path)
    return path, single_file.part_of(tensors, Path(folder).name) if path == Path(folder).parent else tensors


def finite(tensor: Tensor) -> bool:
    return bool(tensor.sum(dtype=torch.float32).isfinite())       # one pass: NaN and infinity survive a sum


class NoInit(TorchFunctionMode):
    """Inside a `with` block layers draw no weights: on "meta" that imports torch's compiler, for 1.7 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def load_network(network_class, config, folder, stem, dtype, device, rename=lambda key: key):
    """Build `network_class(config)` without allocating it, then let the file's tensors become its parameters.

    `rename` maps a key of the file to ours, or to None for a tensor that is no weight. Loading is strict; a
    missing, extra, misshapen or non-finite tensor is a UserError that names it.
    """
    path, tensors = read_tensors(folder, stem)
    with torch.device("meta"), NoInit():                          # shapes only: no random numbers, no memory
        network = network_class(config)
    tensors = {rename(key): tensor for key, tensor in tensors.items() if rename(key) is not None}
    wanted = {key: tensor.shape for key, tensor in network.state_dict().items()}
    both = wanted.keys() & tensors.keys()
    for problem, keys in {"lacks": wanted.keys() - both, "has unknown": tensors.keys() - both,
                          "has the wrong shape for": {k for k in both if wanted[k] != tensors[k].shape},
                          "has NaN or infinity in": {k for k in both if not finite(tensors[k])}}.items():
        if keys:
            raise UserError(f"{path} {problem} {min(keys)}" + f" and {len(keys) - 1} more" * (len(keys) > 1))
    network.load_state_dict({k: v.to(device, dtype) for k, v in tensors.items()}, strict=True, assign=True)
    return network.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ writing

@contextlib.contextmanager
def whole(path: str | Path):
    """Yield a temporary name beside `path`, renamed when the block ends well: all of it or nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        temporary.chmod(0o644)                                    # safetensors makes its files private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def link(path: Path, there: Path) -> None:
    """A hard link costs no space; other disks and some file systems need a copy."""
    try:
        os.link(path.resolve(), there)                            # the hub's cache is symbolic links
    except OSError:
        shutil.copyfile(path, there)


def refuse_existing(path: Path, instead: str = "choose another --out, or add --overwrite",
                    overwrite: bool = False) -> None:
    """Raises UserError if `path` exists; with `overwrite`, only if it is anything but an edit folder."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: {instead}")
    if path.exists() and not (path / "erased.safetensors").exists():
        raise UserError(f"{path} is no edit folder, and --overwrite replaces nothing else")


@contextlib.contextmanager
def whole_folder(path: str | Path, overwrite: bool = False):
    """Yield an empty temporary folder, renamed to `path` when the block ends well; else leave nothing."""
    path = Path(path)
    refuse_existing(path, overwrite=overwrite)
    path = path.absolute()                                        # "." has no name
    temporary, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    made = [parent for parent in path.parents if not parent.exists()]                # innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in (temporary, old):                                 # by a killed run
        shutil.rmtree(left, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):                        # not empty: others use it by now
            for parent in made:
                parent.rmdir()


# ------------------------------------------------------------------------------------------ models and edits

MINI = str(Path(__file__).parent / "mini")                        # the default model


def model_folder(name: str, flag: str = "--model") -> Path:
    """A folder, or a single file of SD v1, as it is; a hub id such as CompVis/stable-diffusion-v1-4
    downloaded (as needed) or cached."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_file():
        check_single_file(path, flag)
        return path
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise UserError(f"{flag} {name}: no such folder, nor a hub id like CompVis/stable-diffusion-v1-4")
    import hub                                                    # only needed here, and slow to import
    try:
        return hub.model(name)
    except Exception as error:                                    # no network, no permission, unknown id, …
        why = "no network, and the cache lacks some of it" if isinstance(error, FileNotFoundError) else \
            f"{type(error).__name__}: {str(error).strip().split(chr(10))[0]}"
        raise UserError(f"{flag} {name} could not be downloaded ({why}); give the folder of a model that you "
                        "have") from None


def check_single_file(path: Path, flag: str) -> None:
    """It must hold all networks of SD v1 under their original names, or else a UserError says what to do."""
    if path.suffix != ".safetensors":
        raise UserError(f"{flag} {path} is no .safetensors file; a pickle can run code: convert it first")
    with readable(path), safe_open(path, "pt") as file:
        absent = single_file.absent_parts(file.keys())
    if absent:
        raise UserError(f"{flag} {path} is not SD v1 in a single file (no key begins with {absent[0]}); "
                        "other models are read as folders in the diffusers layout")


def defaults(folder: Path) -> dict:
    """Guidance, steps and picture size of a model: its `defaults.json`, or SD's 7.5, 50 and 512."""
    path = beside(folder / "defaults.json")
    return {"guidance": 7.5, "steps": 50, "size": 512} | (read_json(path) if path.exists() else {})


def cross_attention(folder: str | Path) -> dict[str, Tensor]:
    """The matrices that erasure edits, all `attn2.to_k` and `to_v`, by official name, as in the file."""
    path, tensors = read_tensors(Path(folder) / "unet", "diffusion_pytorch_model")
    tensors = {name: tensor for name, tensor in sorted(tensors.items())
               if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    if not tensors:
        raise UserError(f"{path} lacks attn2.to_k.weight: this is not a Stable Diffusion U-Net")
    for name, tensor in tensors.items():
        if not finite(tensor):
            raise UserError(f"{path} has NaN or infinity in {name}")
    return tensors


def base_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the unedited matrices in half precision: fp32 and fp16 downloads of a model agree."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].to(torch.float16).contiguous().numpy().tobytes())
    return sha.hexdigest()


def fingerprint(folder: Path) -> str:
    """A hash of a model's weight files by size and both ends, so that gigabytes are told apart at once."""
    sha, parts = hashlib.sha256(), ("text_encoder", "unet", "vae")
    weights = [path for part in parts for path in sorted((folder / part).glob("*.safetensors"))]
    for path in weights or [folder]:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            sha.update(f"{path.parent.name}/{path.name} {size}".encode())
            for place in (0, max(0, size - 2 ** 20)):
                file.seek(place)
                sha.update(file.read(2 ** 20))
    return sha.hexdigest()


def write_edit(folder: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """`erased.safetensors`: the edited matrices under their official names, and how they came about: one JSON
    text under the key "edit" of its metadata (safetensors writes several keys in random order)."""
    with whole(folder / "erased.safetensors") as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"edit": json.dumps(about)})


def about_edit(folder: str | Path) -> dict:
    """How an edit came about: method, concepts, anchors, settings, base_hash."""
    path = Path(folder) / "erased.safetensors"
    if not path.exists():
        raise UserError(f"--edit {folder}: no erased.safetensors there (realera.py writes it)")
    with readable(path), safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("edit", "{}"))


def read_edit(folder: str | Path, model: str | Path) -> dict[str, Tensor]:
    """The edited matrices of `out/<name>`, after checking that they were made from this model."""
    path, made_for = Path(folder) / "erased.safetensors", about_edit(folder).get("base_hash")
    with readable(path), safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
    base = cross_attention(model)
    fits = all(name in base and tensor.shape == base[name].shape for name, tensor in tensors.items())
    if made_for != base_hash(base) or not fits:
        raise UserError(f"--edit {folder} was made for another model than {model}")
    return tensors


@torch.no_grad()
def put_weights(network, tensors: dict[str, Tensor]) -> None:
    """Let `tensors` (official names) take the place of the network's weights, in the network's dtype."""
    for name, tensor in tensors.items():
        old = network.get_parameter(name)
        old.data = tensor.to(old.device, old.dtype)
