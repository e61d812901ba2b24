"""An edit's file, `erased.safetensors`, and the model that it was made for."""
import hashlib
import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from plumbing import UserError
from plumbing.disk import is_edit, read_json, readable, whole
from plumbing.weights import finite, read_tensors


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


def write_edit(folder: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """`erased.safetensors`: the edited matrices under their official names, and how they came about: one JSON
    text under the key "edit" of its metadata (safetensors writes several keys in random order)."""
    with whole(folder / "erased.safetensors") as temporary:
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"edit": json.dumps(about)})


def about_edit(folder: str | Path) -> dict:
    """How an edit came about: method, concepts, anchors, settings, base_hash."""
    path, report = Path(folder) / "erased.safetensors", Path(folder) / "run.json"
    if not path.exists() and is_edit(Path(folder)):               # of a method that changes no weights
        return read_json(report)
    if not path.exists():
        raise UserError(f"--edit {folder}: no erased.safetensors there (realera.py writes it)")
    with readable(path), safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("edit", "{}"))


def concepts_of(about: dict) -> list[tuple[str, str]]:
    """(concept, task) of each concept that an edit erases."""
    concepts = about.get("concepts", [])
    return list(zip(concepts, about.get("tasks") or [about.get("task", "object")] * len(concepts)))


def read_edit(folder: str | Path, model: str | Path) -> dict[str, Tensor]:
    """The edited tensors of `out/<name>`, after checking that they were made from this model; {} if the
    method changes no weights."""
    path, made_for, tensors = Path(folder) / "erased.safetensors", about_edit(folder).get("base_hash"), {}
    if path.exists():
        with readable(path), safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
    _, base = read_tensors(Path(model) / "unet", "diffusion_pytorch_model")
    fits = all(name in base and tensor.shape == base[name].shape for name, tensor in tensors.items())
    if made_for != base_hash(cross_attention(model)) or not fits:
        raise UserError(f"--edit {folder} was made for another model than {model}")
    return tensors


def original(folder: str | Path, names) -> dict[str, Tensor]:
    """The U-Net's own tensors of these official names, as in its file: an edit has their dtype and shape."""
    path, tensors = read_tensors(Path(folder) / "unet", "diffusion_pytorch_model")
    if absent := sorted(set(names) - tensors.keys()):
        raise UserError(f"{path} has no {absent[0]}")
    return {name: tensors[name] for name in names}


def write_report(folder: Path, report: dict) -> None:
    """run.json: how an edit came about and what was found."""
    with whole(folder / "run.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
