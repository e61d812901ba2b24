"""An edit in other people's formats: a pipeline folder for diffusers, and LoRA files."""
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from plumbing import UserError
from plumbing.disk import link, read_json, readable, refuse_existing, whole, whole_folder
from plumbing.weights import find_weights


def part_files(folder: Path) -> dict[str, Path]:
    """What diffusers reads of one part of a pipeline, {name to give it: file}; nothing if a network has no
    safetensors. Weights get their plain name, so no `.fp16` or `.non_ema` twin comes along."""
    found = {path.name: path for path in sorted(folder.glob("*")) if path.suffix in (".json", ".txt")}
    for stem in ("model", "diffusion_pytorch_model"):
        for name in (f"{stem}.fp16.safetensors", f"{stem}.safetensors"):             # the second one wins
            if (folder / name).exists():
                found[f"{stem}.safetensors"] = folder / name
    complete = "config.json" not in found or any(name.endswith(".safetensors") for name in found)
    return found if complete else {}


def export_pipeline(target: Path, model: Path, W: dict[str, Tensor], about: dict) -> None:
    """Write a folder that `StableDiffusionPipeline.from_pretrained(target)` opens: `model` with W in place of
    those matrices. Whatever else it needs is a hard link: change those files in neither folder.

    A part that model_index.json names but `model` lacks is written as absent (a download of ours has no
    safety checker). `about` goes into the U-Net's metadata. Raises UserError if `target` exists.
    """
    refuse_existing(target, "an export replaces nothing, choose another folder")
    index = read_json(model / "model_index.json")
    parts = [name for name, kind in index.items() if isinstance(kind, list) and kind[0]]
    with whole_folder(target) as new:
        for part in [*parts, "clip"]:                             # clip/: the judge of our own eval_clip.py
            found = part_files(model / part)
            if found:
                (new / part).mkdir()
            elif part in parts:
                index[part] = [None, None]
            for name, path in found.items():
                if part != "unet" or not name.endswith(".safetensors"):
                    link(path, new / part / name)
        if (model / "defaults.json").exists():
            link(model / "defaults.json", new / "defaults.json")
        (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        source = find_weights(model / "unet", "diffusion_pytorch_model")
        with readable(source):
            tensors = load_file(source) | {name: matrix.contiguous() for name, matrix in W.items()}
        with whole(new / "unet" / "diffusion_pytorch_model.safetensors") as temporary:
            save_file(tensors, temporary, {"edit": json.dumps(about)})
    print(f"wrote {target}/ for diffusers")


def low_rank(W0: dict[str, Tensor], W: dict[str, Tensor], rank: int) -> tuple[dict, float]:
    """The nearest B A of this rank to every W − W₀ (truncated SVD; Eckart and Young 1936).

    Returns {name: (B [out, r], A [r, in])} in float32, where r is `rank` or a shorter side of the matrix, and
    the relative error ‖ΔW − B A‖/‖ΔW‖ over all matrices together. A closed form without noise alignment is
    W₀ Δ, and Δ = Σ (e* − e) eᵀ · B⁻¹ has the rank of the edited rows at most: from there on it is exact.
    """
    if not W or any(tensor.ndim != 2 for tensor in W.values()):
        raise UserError("a LoRA holds changes of matrices alone: this edit changes something else, or nothing")
    factors, missed, moved = {}, 0.0, 0.0
    for name in W0:
        change = W[name].double() - W0[name].double()
        U, S, Vh = torch.linalg.svd(change, full_matrices=False)
        root = S[:rank].sqrt()                                    # half to either side: both fit float16
        B, A = (U[:, :rank] * root).float().contiguous(), (root[:, None] * Vh[:rank]).float().contiguous()
        missed += (change - B.double() @ A.double()).square().sum().item()
        moved += change.square().sum().item()
        factors[name] = B, A
    return factors, (missed / moved) ** 0.5


def write_lora(folder: Path, W0: dict[str, Tensor], W: dict[str, Tensor], rank: int, about: dict) -> float:
    """Write lora_rank<r>.safetensors for diffusers' `load_lora_weights` and lora_rank<r>_kohya.safetensors
    for web UIs. Print and return the relative error. Raises UserError if rank < 1 or one of them exists."""
    if rank < 1:
        raise UserError(f"the LoRA's rank must be at least 1, not {rank}")
    paths = [folder / f"lora_rank{rank}{ending}.safetensors" for ending in ("", "_kohya")]
    for path in paths:
        refuse_existing(path, "move it away first")
    factors, error = low_rank(W0, W, rank)
    plain, kohya = {}, {}
    for name, (B, A) in factors.items():
        layer = name.removesuffix(".weight")
        plain |= {f"unet.{layer}.lora_A.weight": A, f"unet.{layer}.lora_B.weight": B}
        layer = "lora_unet_" + layer.replace(".", "_")
        # no alpha: everybody takes its absence for scale 1, and diffusers misreads it where ranks differ
        kohya |= {f"{layer}.lora_down.weight": A, f"{layer}.lora_up.weight": B}
    folder.mkdir(exist_ok=True)
    for path, tensors in zip(paths, (plain, kohya)):
        with whole(path) as temporary:
            save_file(tensors, temporary, {"edit": json.dumps(about | {"LoRA rank": rank, "error": error})})
    print(f"LoRA of rank {rank}: relative error {error:.2g}")
    return error
