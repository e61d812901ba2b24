"""What tests/fuzz.py starts from, a small random model, and the families that damage it.

A family is a function that damages a case's folder and names a command that reads it. It says what must come
of it: "refuse" (in one line), "accept" (it is harmless), or "either".
"""
import dataclasses
import json
import random
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from clip_text import CLIPTextConfig, CLIPTextModel
from eval_clip import CLIP, CLIPConfig, CLIPVisionConfig, TextHalf
from helpers import SCHEDULER, edit_json, write_vocabulary
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

NAN, INF = float("nan"), float("inf")
PRIVATE = "a private key of somebody's"
CSV = "prompt,seed,class\na photo of the cat,1,cat\na photo of the dog,2,dog\nthe sea,3,ship\n"
ERASE = "--concept airplane --anchor sky --no-pictures --out made"
COMMANDS = {                    # --model model comes behind each
    "realera": f"realera.py {ERASE} --lora-steps 0", "rece": f"rece.py {ERASE} --rounds 1",
    "uce": f"baselines/uce.py {ERASE}", "from": f"rece.py {ERASE} --rounds 1 --edit edit",
    "lora": f"realera.py {ERASE} --lora-steps 2 --set trajectories=2 batch=1",
    "early": "realera.py --concept airplane --anchor sky --preview prompts.txt",
    "draw": "sample.py cat --n 1 --out made/x.png",
    "draw edit": "sample.py cat --n 1 --out made/x.png --edit edit",
    "csv": "eval_clip.py --prompts prompts.csv --out made",
    "csv edit": "eval_clip.py --prompts prompts.csv --edit edit --out made",
    "folder": "tools/export.py --edit edit --folder made", "file": "tools/export.py --edit edit --lora 2",
    "merge": "tools/merge.py edit second --out made", "preview": "tools/preview.py prompts.txt --edit edit"}
TEXT = ["realera", "rece", "uce", "early", "draw", "csv", "preview", "merge"]
DRAW, EDIT = ["draw", "csv", "lora"], ["draw edit", "csv edit", "folder", "file", "merge", "preview", "from"]
SLOW = ["csv", "csv edit", "lora"]
NETWORKS = {                    # part -> class, configuration, file, commands that read it
    "unet": (UNet, UNetConfig(block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D",
             "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1,
             cross_attention_dim=16, attention_head_dim=2, norm_num_groups=4, sample_size=8),
             "diffusion_pytorch_model", DRAW),
    "vae": (VAE, VAEConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16),
            "diffusion_pytorch_model", DRAW),
    "text_encoder": (CLIPTextModel, CLIPTextConfig(664, 16, 32, 1, 2, 32), "model", TEXT),
    "clip": (CLIP, CLIPConfig(TextHalf(664, 16, 32, 1, 2, 32), CLIPVisionConfig(16, 32, 1, 2, 16, 4), 8),
             "model", ["csv", "csv edit"])}


# ---- the model ----

def write_model(folder: Path, seed: int = 0, **changes) -> Path:
    """A small random model; changes: part -> the values of its configuration that differ."""
    for part, (network, config, stem, _) in NETWORKS.items():
        (folder / part).mkdir(parents=True)
        config = dataclasses.replace(config, **changes.get(part, {}))
        values = dataclasses.asdict(config)
        if part == "clip":
            values |= {"text_config": values.pop("text"), "vision_config": values.pop("vision")}
        (folder / part / "config.json").write_text(json.dumps(values))
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            save_file(network(config).state_dict(), folder / part / f"{stem}.safetensors", {"format": "pt"})
    for part in ("tokenizer", "clip"):
        (folder / part).mkdir(exist_ok=True)
        write_vocabulary(folder / part)
        edit_json(folder / part / "tokenizer_config.json", model_max_length=32)
    (folder / "scheduler").mkdir()
    (folder / "scheduler/scheduler_config.json").write_text(json.dumps(SCHEDULER | {"clip_sample": False}))
    (folder / "defaults.json").write_text(json.dumps({"guidance": 3.0, "steps": 2, "size": 16}))
    names = {part: ["diffusers", "X"] for part in (*NETWORKS, "tokenizer", "scheduler") if part != "clip"}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"} | names))
    return folder


# ---- a case ----

class Case:
    """One input: a folder to damage, and what the family decides."""

    def __init__(self, work: Path, rng: random.Random, quick: bool = False):
        self.work, self.rng, self.quick, self.model = work, rng, quick, work / "model"
        self.args, self.what, self.expected = [], "", "refuse"
        self.outs, self.replaces = ["made"], []  # where it may write; where it may change what is there
        self.stays = []                         # what may stay when it is refused
        self.size, self.same = None, None       # of files at most, in bytes; what must come out as it was

    def one(self, *choices):
        """One of these, or of a list, or a number below this one."""
        if len(choices) == 1:
            choices = range(choices[0]) if isinstance(choices[0], int) else choices[0]
        return self.rng.choice(choices)

    def run(self, names, *more) -> None:
        """Choose one of COMMANDS; quick cases leave out those that take longest, where there is a choice."""
        if isinstance(names, list):
            names = self.one([name for name in names if not self.quick or name not in SLOW] or names)
        script, *self.args = COMMANDS[names].split()
        self.args = [script, *self.args, *more, *([] if "--model" in more else ["--model", "model"])]
        if names in ("csv", "csv edit"):        # it goes on from what it has drawn
            self.stays = ["made/results"]
        if names == "file":
            self.outs = ["edit/edit-rank2-webui.safetensors", "edit/edit-rank2-diffusers.safetensors"]

    def put(self, where: str, content) -> None:
        """Replace a file of the case: text, bytes, or what is written as JSON."""
        path = self.work / where
        path.write_bytes(content if isinstance(content, bytes) else content.encode()
                         if isinstance(content, str) else json.dumps(content).encode())

    def values(self, where: str) -> dict:
        return json.loads((self.work / where).read_text())

    def mean(self, what: str, expected: str = "refuse") -> None:
        self.what, self.expected = what, expected


def named(value) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"{text[:20]}… ({len(text)})"


# ---- families: the model ----

ODD = ["8", None, [], {}, True, -1, 0, 1.5, NAN, INF, -INF, 10 ** 9, 10 ** 400, [1, "a"]]
KEYS = {                        # file -> its whole numbers and lists of them, its real numbers, its names
    "unet/config.json": ("in_channels out_channels layers_per_block cross_attention_dim attention_head_dim "
                         "norm_num_groups block_out_channels down_block_types", "norm_eps", "act_fn"),
    "vae/config.json": ("in_channels out_channels latent_channels layers_per_block norm_num_groups "
                        "block_out_channels", "scaling_factor", "act_fn"),
    "text_encoder/config.json": ("vocab_size hidden_size intermediate_size num_hidden_layers "
                                 "num_attention_heads max_position_embeddings", "layer_norm_eps",
                                 "hidden_act"),
    "clip/config.json": ("projection_dim text_config vision_config", "", ""),
    "scheduler/scheduler_config.json": ("num_train_timesteps", "beta_start beta_end",
                                        "beta_schedule prediction_type"),
    "defaults.json": ("steps size", "guidance", ""),
    "tokenizer/tokenizer_config.json": ("model_max_length", "", "")}


def readers(where: str) -> list[str]:
    """The commands that read a file of the model."""
    part = where.split("/")[0]
    others = {"scheduler": DRAW, "defaults.json": ["draw", "csv"], "model_index.json": ["folder"]}
    return NETWORKS[part][3] if part in NETWORKS else others.get(part, TEXT)


def harmless(key: str, value, real: bool) -> bool:
    """Whether an odd value may be taken: null for absent, true for 1, and any real number from 0 on."""
    if key == "model_max_length":                                 # "no limit" is written as 1e30
        return value in (None, True, 10 ** 9, 10 ** 400)
    return (value in (None, True) or real and value in (0, 1.5, 10 ** 9)
            or key == "guidance" and value == -1)


def config(c: Case) -> None:
    """Numbers of another type, 0, negative, huge, NaN; unknown names; missing and extra keys."""
    where = c.one(list(KEYS))
    counts, reals, names = (text.split() for text in KEYS[where])
    key, values = c.one(counts + reals + names), c.values(f"model/{where}")
    how = c.one("odd", "odd", "odd", "odd", "missing", "extra")
    if how == "extra":
        values["a_newer_key"] = c.one(ODD)
        c.mean(f"{where} has a key that no version knows", "accept")
    elif how == "missing":
        if where != "defaults.json":                              # SD's 512 pixels would be drawn
            values.pop(key, None)
        c.mean(f"{where} lacks {key}", "either")
    else:
        values[key] = c.one("relu6", 5, [], {}, NAN) if key in names else c.one(ODD)
        c.mean(f"{where} {key} = {named(values[key])}",
               "either" if harmless(key, values[key], key in reals) else "refuse")
    c.put(f"model/{where}", values)
    c.run(readers(where))


def texts(c: Case) -> None:
    """JSON that is none, or that breaks a reader."""
    where = c.one([*KEYS, "model_index.json", "tokenizer/vocab.json"])
    content, what = c.one([
        ("[" * 100_000 + "]" * 100_000, "nested 100,000 deep"), ('{"a":' * 50_000, "open 50,000 deep"),
        ("[]", "a list"), ("5", "a number"), ("null", "null"), ('"text"', "a string"), ("", "empty"),
        ("{", "cut"), (b"\xff\xfe{\x00}\x00", "UTF-16"), (b'{"a": "\xff"}', "not UTF-8"), ("NaN", "NaN"),
        ("{'a': 1}", "single quotes"), ('{"a": 1} {"b": 2}', "two objects"), (b"\0" * 100, "NUL bytes")])
    if where in KEYS and c.one(3) == 0:
        key = KEYS[where][0].split()[0]
        number = c.one("1" * 5000, "-" + "9" * 5000, "1e999", "-Infinity", "NaN")
        content = json.dumps(c.values(f"model/{where}") | {key: 0})
        content = content.replace(f'"{key}": 0', f'"{key}": {number}')
        what = f"{key} = {number[:9]}"
    c.put(f"model/{where}", content)
    c.mean(f"{where}: {what}")
    c.run(readers(where))


def one_tensor(c: Case, tensors: dict) -> str:
    """Damage a tensor of a file; returns how."""
    key = c.one(sorted(tensors))
    x = tensors[key]
    how = c.one("int8", "int64", "bool", "complex64", "uint8", "NaN", "inf", "one more", "flat", "empty",
                "scalar", "missing", "renamed")
    if how in ("NaN", "inf"):
        x.view(-1)[c.one(x.numel())] = NAN if how == "NaN" else c.one(INF, -INF)
    elif how == "missing":
        del tensors[key]
    elif how == "renamed":
        tensors[f"{key}_"] = tensors.pop(key)
    else:
        shapes = {"one more": torch.cat([x.view(-1), x.view(-1)[:1]]), "flat": x[None],
                  "empty": torch.zeros(0), "scalar": torch.tensor(1.0)}
        tensors[key] = shapes[how] if how in shapes else x.to(getattr(torch, how))
    return f"{how} {key}"


def tensors(c: Case) -> None:
    """A tensor of another type, shape or name, or with NaN; all in another precision."""
    part = c.one(list(NETWORKS))
    path, names = c.model / part / f"{NETWORKS[part][2]}.safetensors", NETWORKS[part][3]
    found, how = load_file(path), c.one("one", "one", "one", "precision", "integers")
    if how == "one":
        c.mean(f"{part}: {one_tensor(c, found)}")
    else:
        kind, expected = c.one([("float16", "accept"), ("bfloat16", "accept"), ("float64", "either"),
                                ("float8_e4m3fn", "either")] if how == "precision" else
                               [("int8", "refuse"), ("int32", "refuse"), ("bool", "refuse")])
        found = {name: x.to(getattr(torch, kind)) for name, x in found.items()}
        c.mean(f"{part} all in {kind}", expected)
        names = [*names, "realera"] if part == "unet" else names
    save_file({name: x.contiguous() for name, x in found.items()}, path)
    c.run(names)


def damage(c: Case, path: Path) -> str:
    """Cut a file, replace it by something else, or remove it; returns how."""
    data, headers = path.read_bytes(), ["a huge header", "another header"] * (path.suffix == ".safetensors")
    how = c.one(["cut", "cut", "half", "empty", "missing", "a directory", "a link to nothing",
                 "a link to itself", "random bytes", "a pickle", *headers])
    path.unlink()
    if how == "a directory":
        path.mkdir()
    elif how.startswith("a link"):
        path.symlink_to("nothing" if how.endswith("nothing") else path.name)
    elif how != "missing":
        path.write_bytes({
            "cut": data[:1 + c.one(len(data) - 4)], "half": data[:len(data) // 2], "empty": b"",
            "random bytes": c.rng.randbytes(300), "a pickle": b"\x80\x04K\x01.",
            "a huge header": b"\xff" * 8 + data[8:], "another header": data[:8] + b"[]" + data[10:]}[how])
    return how


def files(c: Case) -> None:
    """A file of the model cut, emptied, removed, or something else in its place."""
    weights = [f"{part}/{stem}.safetensors" for part, (_, _, stem, _) in NETWORKS.items()]
    where = c.one(*weights, *weights, *(f"{part}/config.json" for part in NETWORKS), "tokenizer/vocab.json",
                  "tokenizer/tokenizer_config.json", "clip/vocab.json", "scheduler/scheduler_config.json",
                  "model_index.json")
    how = damage(c, c.model / where)
    c.mean(f"{where}: {how}", "either" if "tokenizer_config" in where else "refuse")
    c.run(readers(where))


def parts(c: Case) -> None:
    """Parts that do not fit each other, each whole in itself."""
    part, changes, names = c.one([
        ("text_encoder", {"hidden_size": 24}, TEXT), ("text_encoder", {"max_position_embeddings": 16}, TEXT),
        ("text_encoder", {"vocab_size": 100}, TEXT), ("vae", {"latent_channels": 3}, DRAW),
        ("vae", {"out_channels": 1}, ["draw", "csv"]), ("unet", {"in_channels": 9}, DRAW),
        ("unet", {"out_channels": 8}, DRAW), ("unet", {"cross_attention_dim": 24}, TEXT),
        ("clip", {"projection_dim": 5}, ["csv"]), ("text_encoder", {}, ["draw edit", "csv edit"]),
        ("unet", {}, EDIT)])
    write_model(c.work / "odd", seed=3, **{part: changes})
    shutil.rmtree(c.model / part)
    (c.work / "odd" / part).rename(c.model / part)
    c.mean(f"{part} of another model, {changes}", "accept" if part == "clip" else "refuse")
    c.run(names)


def words(c: Case) -> None:
    """A tokenizer's files: merges cut, tokens missing, ids that no row has, odd settings."""
    folder = c.model / "tokenizer"
    merges, vocab = (folder / "merges.txt").read_text("utf-8"), c.values("model/tokenizer/vocab.json")
    first = "\n".join(merges.split("\n")[:2 + c.one(138)]) + "\n"
    odd_bytes = merges.encode()[:200] + b"\xff\xfe" + merges.encode()[200:]

    def ids(new):
        return {token: new(i) for token, i in vocab.items()}

    name, content, what, expected = c.one([
        ("merges.txt", first, "cut at a line's end", "refuse"), ("merges.txt", "", "empty", "refuse"),
        ("merges.txt", merges[:-2], "cut inside a line", "refuse"),
        ("merges.txt", merges.replace("\n", "\r\n"), "Windows' line ends", "either"),
        ("merges.txt", merges + "q zq\n", "a merge that gives no token", "refuse"),
        ("merges.txt", odd_bytes, "not UTF-8", "refuse"),
        ("vocab.json", {k: v for k, v in vocab.items() if "start" not in k}, "no begin of text", "refuse"),
        ("vocab.json", {k: v for k, v in vocab.items() if v != 70}, "an id is missing", "refuse"),
        ("vocab.json", ids(lambda i: i + 5), "ids that no row has", "refuse"),
        ("vocab.json", ids(lambda i: -i), "negative ids", "refuse"),
        ("vocab.json", ids(str), "text", "refuse"),
        ("vocab.json", ids(lambda i: 2 ** 40 + i), "huge ids", "refuse"),
        ("vocab.json", {}, "no token", "refuse"),
        ("vocab.json", ids(lambda i: 7), "all ids alike", "refuse"),
        ("vocab.json", ids(lambda i: i / 2), "halves", "refuse"),
        ("tokenizer_config.json", {"pad_token": c.one(5, [], {}, "", "<nothing>")}, "odd padding", "either"),
        ("special_tokens_map.json", c.one([], 5, {"pad_token": 5}, {"pad_token": None}), "odd", "either"),
        ("tokenizer.json", c.one("{", {}, [], {"model": 5}, {"version": "1.0", "model": {"type": "BPE"}}),
         "damaged", "refuse")])
    c.put(f"model/tokenizer/{name}", content)
    if name == "tokenizer.json":
        (folder / "merges.txt").unlink()                          # then the newer file counts
    c.mean(f"{name}: {what}", expected)
    c.run(TEXT)
