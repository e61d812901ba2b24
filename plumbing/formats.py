"""An edit in other people's formats: a pipeline folder for diffusers, and LoRA files."""
import contextlib
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from plumbing import UserError
from plumbing.disk import link, parents_of, read_json, refuse_existing, whole, whole_folder
from plumbing.weights import find_weights, plain_name, read_tensors, shards


UNET = "diffusion_pytorch_model"


def part_files(folder: Path) -> dict[str, Path]:
    """What diffusers reads of one part of a pipeline, {name to give it: file}; nothing if a network has no
    safetensors. Weights get their plain name, so no `.fp16` or `.non_ema` twin comes along."""
    found = {path.name: path for path in sorted(folder.glob("*"))
             if path.suffix in (".json", ".txt") and ".index." not in path.name}
    complete = "config.json" not in found
    for stem in ("model", UNET):
        with contextlib.suppress(UserError):                      # transformers' name, diffusers', or none
            source, complete = find_weights(folder, stem), True
            pieces = shards(source)
            found |= {path.name: path for path in pieces if path != source}
            found[f"{stem}.safetensors" + ".index.json" * (pieces != [source])] = source
    return found if complete else {}


def pipeline_files(model: Path) -> tuple[dict, dict[str, Path], list[str]]:
    """What an export of `model` holds besides the U-Net's weights: its model_index.json, {place in the new
    folder: file}, and the parts that are not there.

    Raises UserError for a part whose name leads elsewhere, and for a link to anything but the model's own
    files: an export of a folder from the net could carry away what it points to.
    """
    home, files, lost = model.resolve(), {}, []                   # the hub's cache is symbolic links to blobs
    homes = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]

    def own(path: Path) -> Path:
        if not any(path.resolve().is_relative_to(place) for place in homes):
            raise UserError(f"{path} leads out of the model, to {path.resolve()}: put a copy there instead")
        return path

    index = read_json(own(model / "model_index.json"))
    for part in [name for name, kind in index.items() if isinstance(kind, list) and any(kind)] + ["clip"]:
        if not plain_name(part):
            raise UserError(f"{model / 'model_index.json'}: {part!r} is no plain name of a part")
        found = part_files(model / part)                          # clip/: the judge of our own eval_clip.py
        if not found and part in index:
            index[part] = [None, None]
            lost.append(part)
        for name, path in found.items():
            if own(path) and (part != "unet" or ".safetensors" not in name):
                files[f"{part}/{name}"] = path
    if (model / "defaults.json").exists():
        files["defaults.json"] = own(model / "defaults.json")
    return index, files, lost


def check_export(export: Path, out: Path, model: Path) -> None:
    """Refuse an --export that cannot be made, or lies in the edit folder `out`, before minutes of work."""
    refuse_existing(export, "choose another --export")
    if not (model / "model_index.json").exists():
        raise UserError("--export needs a model folder with a model_index.json, or a hub id")
    with parents_of(export):                                      # an impossible place is found out now
        pipeline_files(model)
    if out.resolve().is_relative_to(export.resolve()) or export.resolve().is_relative_to(out.resolve()):
        raise UserError(f"--export {export} and the edit folder {out} must lie apart")


def export_pipeline(target: Path, model: Path, W: dict[str, Tensor], about: dict,
                    link_weights: bool = False) -> None:
    """Write a folder that `StableDiffusionPipeline.from_pretrained(target)` opens: `model` with W in place of
    those matrices, and copies of the rest; with `link_weights`, the other weights are hard links.

    A part that model_index.json names but `model` lacks is written as absent (a download of ours has no
    safety checker). `about` goes into the U-Net's metadata. Raises UserError if `target` exists.
    """
    refuse_existing(target, "an export replaces nothing, choose another folder")
    index, files, lost = pipeline_files(model)
    for part in lost:
        pickle = any(path.suffix in (".bin", ".ckpt") for path in (model / part).glob("*"))
        print(f"left out: {part}, which " + ("is there as a pickle alone" if pickle else "the model lacks"))
    with whole_folder(target) as new:
        for place, path in files.items():
            (new / place).parent.mkdir(exist_ok=True)
            (link if link_weights and path.suffix == ".safetensors" else shutil.copyfile)(path, new / place)
        (new / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        _, tensors = read_tensors(model / "unet", UNET)
        tensors |= {name: matrix.contiguous() for name, matrix in W.items()}
        with whole(new / "unet" / f"{UNET}.safetensors") as temporary:
            save_file(tensors, temporary, {"edit": json.dumps(about)})
    print(f"wrote {target}/ for diffusers")


def matrices_alone(W: dict[str, Tensor]) -> None:
    """Raises UserError for tensors of which no LoRA can be made."""
    if not W or any(tensor.ndim != 2 for tensor in W.values()):
        raise UserError("a LoRA holds changes of matrices alone: this edit changes something else or nothing")


def low_rank(W0: dict[str, Tensor], W: dict[str, Tensor], rank: int) -> tuple[dict, float]:
    """The nearest B A of this rank to every W − W₀ (truncated SVD; Eckart and Young 1936).

    Returns {name: (B [out, r], A [r, in])} in float32, where r is `rank` or a shorter side of the matrix, and
    the relative error ‖ΔW − B A‖/‖ΔW‖ over all matrices together. A closed form without noise alignment is
    W₀ Δ, and Δ = Σ (e* − e) eᵀ · B⁻¹ has the rank of the edited rows at most: from there on it is exact.
    """
    matrices_alone(W)
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


def kohya_key(name: str) -> str:
    """What kohya's scripts call the layer of a weight, without .lora_up.weight and the like."""
    return "lora_unet_" + name.removesuffix(".weight").replace(".", "_")


def write_adapters(path: Path, unet, adapters: dict[str, list[Tensor]], alpha: float, about: dict) -> None:
    """Write a method's own adapters, {name of a weight: up [out, rank], down [rank, in · kernel]}, in kohya's
    spelling; about: how the file says what they are, under the file's own name."""
    tensors = {}
    for name, (up, down) in adapters.items():
        W0, key = unet.get_parameter(name), kohya_key(name)
        tensors |= {f"{key}.lora_up.weight": up.detach().cpu().view(*up.shape, *[1] * (W0.ndim - 2)),
                    f"{key}.lora_down.weight": down.detach().cpu().view(len(down), *W0.shape[1:]),
                    f"{key}.alpha": torch.tensor(alpha)}
    with whole(path) as temporary:
        save_file(tensors, temporary, {path.stem: json.dumps(about)})


def write_lora(folder: Path, name: str, W0: dict[str, Tensor], W: dict[str, Tensor], rank: int,
               about: dict) -> float:
    """Write <name>-rank<r>-webui.safetensors, in kohya's spelling, and <name>-rank<r>-diffusers.safetensors,
    of which web UIs load nothing. Print and return the relative error. Raises UserError if rank < 1 or one of
    them exists."""
    if rank < 1:
        raise UserError(f"the LoRA's rank must be at least 1, not {rank}")
    tensors = {"webui": {}, "diffusers": {}}
    paths = {who: folder / f"{name}-rank{rank}-{who}.safetensors" for who in tensors}
    for path in paths.values():
        refuse_existing(path, "move it away first")
    factors, error = low_rank(W0, W, rank)
    for weight, (B, A) in factors.items():
        layer, key = weight.removesuffix(".weight"), kohya_key(weight)
        tensors["diffusers"] |= {f"unet.{layer}.lora_A.weight": A, f"unet.{layer}.lora_B.weight": B}
        # no alpha: everybody takes its absence for scale 1, and diffusers misreads it where ranks differ
        tensors["webui"] |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B}
    folder.mkdir(exist_ok=True)
    about = {"edit": json.dumps(about | {"LoRA rank": rank, "error": error})}
    for who, path in paths.items():
        with whole(path) as temporary:
            save_file(tensors[who], temporary, about)
    print(f"LoRA of rank {rank}: relative error {error:.2g}\n"
          f"  {paths['webui'].name}: for web UIs (ComfyUI, A1111) and kohya's scripts\n"
          f"  {paths['diffusers'].name}: for diffusers' load_lora_weights; a web UI loads nothing of it and "
          "erases nothing")
    return error
