"""An edit: its file, `erased.safetensors`, how a model draws with it, and the model that it was made for."""
import hashlib
import importlib
import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from plumbing import UserError
from plumbing.disk import is_edit, parse_json, read_json, readable, whole, write_json
from plumbing.models import fingerprint
from plumbing.prompts import TASKS
from plumbing.weights import check_tensors, find_weights, read_tensors, shards


# Methods that act while a picture is drawn, and the file whose `drawing(about, text)` says how: keyword
# arguments of Model.draw. The file stands above all that reads edits, so it is imported by its name, and only
# when such an edit is read. The names are fixed here: what else a folder says is never imported.
DRAWING = {"SLD": "baselines.sld", "Semantic Surgery": "baselines.surgery", "SPM": "baselines.spm"}


class Edit(dict):
    """What an edit changes: tensors of the U-Net by official name, {name: tensor}; and `drawing`, keyword
    arguments of Model.draw, which Model.put takes along. about: all that these depend on, as JSON's types."""

    def __init__(self, tensors: dict[str, Tensor], drawing: dict | None = None, about: dict | None = None):
        super().__init__(tensors)
        self.drawing, self.about = drawing or {}, about or {}


def refuse_weights_alone(method: str, args) -> None:
    """Raises UserError if what is asked for holds weights alone, which do not hold how this method draws."""
    if args.export or args.export_lora or args.preview:
        raise UserError(f"{method} acts while a picture is drawn, and weights alone, which --export, "
                        "--export-lora and --preview are about, do not hold that")


def keys_values(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a U-Net's tensors the matrices that read the text, in the order of their names."""
    return {name: tensors[name] for name in sorted(tensors)
            if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}


def cross_attention(folder: str | Path) -> dict[str, Tensor]:
    """The matrices that erasure edits, all `attn2.to_k` and `to_v`, by official name, as in the file."""
    path, tensors = read_tensors(Path(folder) / "unet", "diffusion_pytorch_model")
    tensors = keys_values(tensors)
    if not tensors:
        raise UserError(f"{path} lacks attn2.to_k.weight: this is not a Stable Diffusion U-Net")
    check_tensors(path, tensors)
    return tensors


def base_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the unedited matrices in half precision: fp32 and fp16 downloads of a model agree."""
    return bytes_hash({name: tensor.to(torch.float16) for name, tensor in tensors.items()})


def text_hash(model: str | Path) -> str:
    """`base_hash` of a model's text encoder, whichever way its file spells the names."""
    _, tensors = read_tensors(Path(model) / "text_encoder", "model")
    return base_hash({name.removeprefix("text_model."): tensor for name, tensor in tensors.items()
                      if tensor.is_floating_point()})             # position_ids are no weights


def bytes_hash(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of tensors as they are: says whether a file still holds what was written."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(name.encode() + tensors[name].flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def write_edit(folder: Path, tensors: dict[str, Tensor], about: dict) -> None:
    """`erased.safetensors`: the edited matrices under their official names, and how they came about: one JSON
    text under the key "edit" of its metadata (safetensors writes several keys in random order); the
    tensors' hash is added to it. Raises UserError, and writes nothing, if a number is not finite."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    check_tensors("the edit", tensors)
    about["hash"] = bytes_hash(tensors)
    with whole(folder / "erased.safetensors") as temporary:
        save_file(tensors, temporary, {"edit": json.dumps(about)})


def edit_file(edit: str | Path) -> Path | None:
    """Where an edit's tensors lie: erased.safetensors of an edit folder, a file of somebody else's, or the
    U-Net of a whole diffusers folder. None if it is an edit folder of a method that changes no weights."""
    path = Path(edit)
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if (path / "erased.safetensors").exists():
        return path / "erased.safetensors"
    if (path / "model_index.json").exists():
        return find_weights(path / "unet", "diffusion_pytorch_model")
    if not is_edit(path):
        raise UserError(f"--edit {edit}: no erased.safetensors there (realera.py writes it); a .safetensors "
                        "file or a diffusers folder with a model_index.json will do, too")
    return None


def about_edit(edit: str | Path) -> dict:
    """How an edit came about: method, concepts, anchors, settings, base_hash; {} if it was made elsewhere."""
    path = edit_file(edit)
    if path is None:                                              # of a method that changes no weights
        about = read_json(where := Path(edit) / "run.json")
    else:
        with readable(where := shards(path)[0]), safe_open(where, "pt") as file:
            said = (file.metadata() or {}).get("edit", "{}")
        try:
            about = parse_json(said, path)
        except UserError:                                         # somebody else's "edit"
            return {}
    if "base_hash" in about:                                      # ours
        said = [about.get("concepts"), about.get("anchors"), about.get("tasks", [about.get("task")])]
        texts = all(isinstance(some, list) and all(isinstance(x, str) for x in some) for some in said)
        if not texts or not said[0] or not {*said[2]} <= {*TASKS}:
            raise UserError(f"{where} is damaged: it does not say what was erased; make the edit again")
    return about


def edit_labels(edits: list[str]) -> list[str]:
    """What edits are called side by side: their folders' names, and as much of the path before as tells them
    apart. Raises UserError for an edit that is given twice."""
    paths = [Path(edit).absolute() for edit in edits]
    paths = [path.parent if path.name == "erased.safetensors" else path for path in paths]
    if twice := [edit for edit, path in zip(edits, paths) if paths.count(path) > 1]:
        raise UserError(f"--edit {twice[0]} is given twice")
    for k in range(1, 1 + max((len(path.parts) for path in paths), default=1)):
        labels = ["-".join(path.parts[-k:]).removesuffix(".safetensors") for path in paths]
        if len({*labels, "untouched"}) > len(labels):             # which the model itself is called
            break
    return labels


def concepts_of(about: dict) -> list[tuple[str, str]]:
    """(concept, task) of each concept that an edit erases."""
    concepts = about.get("concepts", [])
    return list(zip(concepts, about.get("tasks") or [about.get("task", "object")] * len(concepts)))


def erased_by(edits: list[str], concepts: list[str], task: str = "object") -> list[tuple[str, str]]:
    """(concept, task) of all that these edits erase together; `concepts` (--concept) says it in their place.
    Raises UserError for an edit that does not say it."""
    found = [(concept.lower(), task) for concept in concepts]
    for edit in () if concepts else edits:
        said = concepts_of(about_edit(edit))
        if not said:
            raise UserError(f"--edit {edit} does not say what it erases: add --concept NAME")
        found += said
    return list(dict.fromkeys(found))


def drawing_of(edit: str | Path, about: dict, text) -> Edit:
    """How a model draws with an edit, as an Edit without tensors: {} but for methods that act while a picture
    is drawn. Raises UserError where these cannot be had: without `text`, and of methods that are not ours."""
    method, acts = about.get("method"), about.get("drawing") or edit_file(edit) is None
    if "base_hash" not in about or not (method in DRAWING or acts):
        return Edit({})
    if method not in DRAWING or text is None:
        raise UserError(f"--edit {edit} is of a method that changes how pictures are drawn ({method}): " + (
            "weights alone, which is what is asked for here, do not hold it" if method in DRAWING else
            "from its folder it can be neither drawn nor measured"))
    module = importlib.import_module(DRAWING[method])
    keys = ("method", "settings", "concepts", "anchors", "task", "safety_text")
    try:
        return Edit({}, module.drawing(about, text), {key: about.get(key) for key in keys}
                    | {"code": fingerprint(Path(module.__file__))})
    except (KeyError, TypeError):
        raise UserError(f"{edit} is damaged or was written by another version of {DRAWING[method]}: make it "
                        "again") from None


def read_edit(edit: str | Path, model: str | Path, text=None) -> Edit:
    """The edited tensors of out/<name>, after checking that they were made from this model, and how it draws.

    text: the model's Text, of whoever draws with the edit; without it, edits of methods that act while a
    picture is drawn are refused. Also of an edit that was made elsewhere, part of a U-Net or all of it: those
    that differ from the model's in half precision, in the dtype of its file. A warning says what cannot be
    checked. Raises UserError for what does not fit.
    """
    path, about, tensors = edit_file(edit), about_edit(edit), {}
    made_for, how = about.get("base_hash"), drawing_of(edit, about, text)
    for part in shards(path) if path else ():
        with readable(part), safe_open(part, "pt") as file:
            tensors |= {key: file.get_tensor(key) for key in file.keys()}
    if path and not tensors:
        raise UserError(f"--edit {edit} holds no tensor")
    _, base = read_tensors(Path(model) / "unet", "diffusion_pytorch_model")
    if made_for is not None and made_for != base_hash(cross_attention(model)):
        raise UserError(f"--edit {edit} was made for another model than {model}")
    if about.get("text_hash") not in (None, text_hash(model)):
        raise UserError(f"--edit {edit} was made with another text encoder than {model}'s")
    check_tensors(f"--edit {edit} does not fit {model}: it", tensors, {k: v.shape for k, v in base.items()})
    if made_for is not None and (path is None or path.name == "erased.safetensors"):
        if about.get("hash") not in (None, bytes_hash(tensors)):
            raise UserError(f"{path} is damaged: it does not hold what was written; make it again")
        return Edit(tensors, how.drawing, how.about)
    changed = {name: tensor.to(base[name].dtype) for name, tensor in tensors.items()
               if not torch.equal(tensor.half(), base[name].half())}
    if not changed:
        raise UserError(f"--edit {edit} changes nothing: its {len(tensors)} tensors are those of {model}")
    if made_for is None:
        print(f"warning: --edit {edit} does not say which model it was made for, so that cannot be checked; "
              f"{len(changed)} of its {len(tensors)} tensors differ from {model}'s", file=sys.stderr)
    return Edit(changed, how.drawing, how.about)


def original(folder: str | Path, names) -> dict[str, Tensor]:
    """The U-Net's own tensors of these official names, as in its file: an edit has their dtype and shape."""
    path, tensors = read_tensors(Path(folder) / "unet", "diffusion_pytorch_model")
    if absent := sorted(set(names) - tensors.keys()):
        raise UserError(f"{path} has no {absent[0]}")
    return {name: tensors[name] for name in names}


def change(W0: dict[str, Tensor], W: dict[str, Tensor]) -> float:
    """‖ΔW‖/‖W₀‖ over all matrices of W together."""
    moved = sum((W[name].double() - W0[name].double()).square().sum() for name in W)
    return (moved / sum(W0[name].double().square().sum() for name in W)).sqrt().item()


def gram(W: dict[str, Tensor], V: dict[str, Tensor]) -> Tensor:
    """Σ WᵀV over all cross-attention matrices [out, D] -> [D, D], float64."""
    return sum(W[name].double().T @ V[name].double() for name in W)


def as_filed(W: dict[str, Tensor], folder: str | Path, trained: bool = False) -> dict[str, Tensor]:
    """W in the dtype of the model's file; what was trained stays in float32, as half precision loses most
    changes of 1e-5. Raises UserError for NaN and infinity there."""
    W = {name: W[name].detach().cpu().to(torch.float32 if trained else W0.dtype)
         for name, W0 in original(folder, W).items()}
    check_tensors("the edit", W)
    return W


def write_report(folder: Path, report: dict) -> None:
    """run.json: how an edit came about and what was found."""
    write_json(folder / "run.json", report, indent=2)
