"""A network from its folder, loaded strictly: `config.json`, `*.safetensors`, and the class.

Weights are read from safetensors only, never from a pickle, and nothing that a model folder says is executed.
A single file in the original form stands for a folder: dream.safetensors/unet is that part of it which a
folder has in unet/.
"""
import dataclasses
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from plumbing import UserError, single_file
from plumbing.disk import read_json, readable


def read_config(folder: Path, config_class, supported: dict, file: str = "config.json", section: str = ""):
    """A `config_class` from a folder's JSON: absent keys keep their defaults, newer keys are ignored. A value
    outside `supported` (key -> the tuple of what the network implements), of another type, or outside what
    its field's type can mean here is an error that names it: no size or scale is 0, negative or gigantic."""
    path = beside(folder / file)
    there = path.exists() or path == folder / file                # a single file is SD v1
    values = read_json(path, infinite=True) if there else {}      # DPM++: lambda_min_clipped is -Infinity
    values = values.get(section, {}) if section else values
    if not isinstance(values, dict):
        raise UserError(f"{path}: {section} should be a JSON object")
    for key, allowed in supported.items():
        if key in values and values[key] not in allowed:
            raise UserError(f"{path}: {key} = {values[key]!r} is not supported "
                            f"(only {' or '.join(map(repr, allowed))})")
    chosen = {}
    for field in dataclasses.fields(config_class):
        value = values.get(field.name, field.default)
        value = tuple(value) if isinstance(value, list) else value
        if not isinstance(value, (int, float) if field.type is float else field.type) or \
                isinstance(value, bool) and field.type is not bool:
            raise UserError(f"{path}: {field.name} = {value!r} is not supported (the type differs)")
        least = 0 if field.name == "steps_offset" else 1 if field.type is int else 1e-12
        most = 100 if "layers" in field.name else 10 ** 6
        for number in value if isinstance(value, tuple) else (value,):
            if type(number) in (int, float) and not least <= number <= most:
                raise UserError(f"{path}: {field.name} = {value!r} is not supported (only {least} … {most})")
        chosen[field.name] = value
    return config_class(**chosen)


def beside(path: Path) -> Path:
    """`path`; or, for what a single file cannot hold, as dream.safetensors/unet/config.json, beside it."""
    file = next((p for p in path.parents if p.suffix == ".safetensors" and p.is_file()), None)
    return file.parent / path.relative_to(file) if file else path


def find_weights(folder: str | Path, stem: str) -> Path:
    """`stem.safetensors`, or the index of its shards, or the official half-precision twin of either, or the
    single file."""
    folder = Path(folder)
    if folder.parent.is_file():
        return folder.parent
    if not folder.is_dir():
        raise UserError(f"{folder} is missing; a model has tokenizer, text_encoder, unet, vae, scheduler")
    for name in (f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}.fp16.safetensors",
                 f"{stem}.safetensors.index.fp16.json"):
        if (folder / name).exists():
            return folder / name
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".ckpt", ".pt", ".pth"))
    if pickles:
        raise UserError(f"{folder} has {pickles[0]} but no {stem}.safetensors. Pickles can run code: "
                        "convert it in a sandbox: python -c \"import torch, safetensors.torch as s; "
                        f"s.save_file(torch.load('{pickles[0]}', weights_only=True), '{stem}.safetensors')\"")
    raise UserError(f"{folder} has no {stem}.safetensors")


def plain_name(name) -> bool:
    """Is it the name of a file or folder and no more, so that it cannot lead anywhere else?"""
    return isinstance(name, str) and re.fullmatch(r"\w[\w.+-]*", name) is not None


def shards(path: Path) -> list[Path]:
    """The files that hold what `path` stands for: itself, or those that an index names."""
    if path.suffix != ".json":
        return [path]
    names = read_json(path).get("weight_map")
    names = list(names.values()) if isinstance(names, dict) else [None]
    if not all(plain_name(name) and name.endswith(".safetensors") for name in names):
        raise UserError(f"{path}: weight_map must name .safetensors files that lie beside it")
    return [path.with_name(name) for name in sorted(set(names))]


def read_tensors(folder: str | Path, stem: str) -> tuple[Path, dict[str, Tensor]]:
    """The weights' path, and its tensors by the names of a model folder, memory-mapped: read when used.

    Tensors in 8 bits become float16, which holds them exactly: so does an edit of them.
    """
    path, tensors = find_weights(folder, stem), {}
    for file in shards(path):
        with readable(file):
            tensors |= load_file(file)
    tensors = {key: tensor.half() if tensor.is_floating_point() and tensor.itemsize == 1 else tensor
               for key, tensor in tensors.items()}
    return path, single_file.part_of(tensors, Path(folder).name) if path == Path(folder).parent else tensors


def finite(tensor: Tensor) -> bool:
    return bool(tensor.sum(dtype=torch.float32).isfinite())       # one pass: NaN and infinity survive a sum


def check_finite(tensor: Tensor, network: str, dtype) -> None:
    """Raises UserError where a network gave NaN or infinity: what follows from it would mean nothing."""
    if not tensor.isfinite().all():
        what, advice = "NaN" if tensor.isnan().any() else "infinity", {
            torch.float16: "try --dtype bfloat16 or float32", torch.bfloat16: "try --dtype float32"}
        raise UserError(f"{network} gave {what} in {str(dtype).removeprefix('torch.')}: "
                        + advice.get(dtype, "is the guidance too large, or the edit damaged?"))


def check_tensors(what: str | Path, tensors: dict[str, Tensor],
                  shapes: dict[str, torch.Size] | None = None) -> None:
    """Every tensor that is read passes here: of a name and shape in `shapes` (None: any), floating point,
    finite. Raises UserError naming the first that is not, and how many."""
    shapes = {name: tensor.shape for name, tensor in tensors.items()} if shapes is None else shapes
    known = {name: tensor for name, tensor in tensors.items() if name in shapes}
    real = {name: tensor for name, tensor in known.items() if tensor.is_floating_point()}
    for problem, names in {"has unknown": tensors.keys() - known.keys(),
                           "has the wrong shape for": {n for n in known if shapes[n] != known[n].shape},
                           "has no floating-point numbers in": known.keys() - real.keys(),
                           "has NaN or infinity in": {n for n in real if not finite(real[n])}}.items():
        if names:
            shape = f": {list(known[min(names)].shape)}" if "shape" in problem else ""
            raise UserError(f"{what} {problem} {min(names)}{shape}"
                            + f" and {len(names) - 1} more" * (len(names) > 1))


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
    try:
        with torch.device("meta"), NoInit():                      # shapes only: no random numbers, no memory
            network = network_class(config)
    except (ValueError, RuntimeError, ZeroDivisionError, IndexError, TypeError, KeyError) as error:
        raise UserError(f"{folder}/config.json: its numbers do not fit each other ({error})") from None
    tensors = {rename(key): tensor for key, tensor in tensors.items() if rename(key) is not None}
    wanted = {key: tensor.shape for key, tensor in network.state_dict().items()}
    if absent := wanted.keys() - tensors.keys():
        raise UserError(f"{path} lacks {min(absent)}" + f" and {len(absent) - 1} more" * (len(absent) > 1))
    check_tensors(path, tensors, wanted)
    network.load_state_dict({k: v.to(device, dtype) for k, v in tensors.items()}, strict=True, assign=True)
    return network.eval().requires_grad_(False)


@torch.no_grad()
def put_weights(network, tensors: dict[str, Tensor]) -> None:
    """Let `tensors` (official names) take the place of the network's weights, in the network's dtype."""
    for name, tensor in tensors.items():
        old = network.get_parameter(name)
        old.data = tensor.to(old.device, old.dtype)
