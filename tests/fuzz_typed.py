"""Families of tests/fuzz.py beside the model: edits, what is typed, what lies there from before."""
import base64
import dataclasses
import json
import os
import shutil

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import realera
import rece
from baselines import uce
from fuzz_models import (CSV, EDIT, INF, NAN, Case, config, damage, files, named, one_tensor, parts, tensors,
                         texts, words)


def edits(c: Case) -> None:
    """An edit damaged: its tensors, its metadata, its file; or another model's."""
    path = c.work / "edit/erased.safetensors"
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["edit"])
    found, text, expected = load_file(path), json.dumps(about), "refuse"
    how = c.one("tensor", "some", "all", "about", "no about", "file", "other")
    if how == "tensor":
        what = one_tensor(c, found)
    elif how == "some":
        found = dict(list(found.items())[:c.one(0, 0, 1, len(found) // 2)])
        what = f"{len(found)} of its tensors"
    elif how == "all":
        kind, expected = c.one([("int8", "refuse"), ("bool", "refuse"), ("float16", "either"),
                                ("float64", "either")])
        found, what = {name: x.to(getattr(torch, kind)) for name, x in found.items()}, f"all in {kind}"
    elif how == "about":
        key, value = c.one([
            ("task", "nothing"), ("task", 5), ("concepts", []), ("concepts", 5), ("concepts", [5]),
            ("concepts", [""]),
            ("concepts", "airplane"), ("anchors", 5), ("anchors", []), ("anchors", [None]),
            ("base_hash", "0" * 64),
            ("base_hash", 5), ("settings", 5), ("settings", {"M": "many"}), ("settings", {"D1": NAN}),
            ("seed", "x"),
            ("seed", INF), ("method", 5), ("model", 5), ("settings", {"unknown": 1})])
        text, what = json.dumps(about | {key: value}), f"{key} = {named(value)}"
        expected = "refuse" if key == "base_hash" else "either"
    elif how == "no about":
        text = c.one("[]", "5", "null", '"text"', "{}", "[" * 100_000, "{", "", "\0", "[" + "1" * 5000 + "]")
        what, expected = f"metadata {named(text)}", "either"
    elif how == "other":
        what = "of another model"
        shutil.copy(c.work / "stranger/erased.safetensors", path)
    else:
        what = damage(c, path)
    if how not in ("other", "file"):
        save_file({name: x.contiguous() for name, x in found.items()}, path, {"edit": text})
    c.mean(f"edit: {what}", expected)
    c.run(EDIT)


# ---- what is typed ----

ODD_PATHS = ["x" * 300, "x/" * 3000, os.fsdecode(b"caf\xe9"), "loop", "loop/x", "full", "afile", "afile/x",
             "dangling", "/dev/null", "/dev/null/x", "/proc/nothing/x", "", ".", "..", "model", "edit", "/",
             "full/../full"]
FINE_PATHS = ["a b", "été", "日本", "a'b\"c", "new/one", "a\nb", "made/", "./made", "x" * 100]


def paths(c: Case) -> None:
    """Odd paths for each flag that takes one: those to write, and those to read."""
    (c.work / "loop").symlink_to("loop")
    (c.work / "dangling").symlink_to("nothing")
    (c.work / "full").mkdir()
    for name in ("full/thesis.txt", "afile"):
        (c.work / name).write_text("precious")
    flag = c.one(["--out"] * 3 + ["--folder", "--export", "--model", "--edit", "--prompts", "--book", ""])
    writes = flag in ("--out", "--folder", "--export")
    path = c.one(FINE_PATHS if writes and c.one(3) == 0 else ODD_PATHS)
    if not writes:
        c.mean(f"{flag} {named(path)}", "either" if path in ("model", "edit", "afile") else "refuse")
        if not flag:
            c.args = ["tools/preview.py", path, "--edit", "edit", "--model", "model"]
            return
        name = {"--model": c.one("realera", "draw", "csv"), "--edit": c.one("from", "draw edit", "folder"),
                "--book": "realera", "--prompts": "csv"}[flag]
        return c.run(name, flag, path)
    name = c.one("realera", "draw", "csv", "merge", "lora")
    name = {"--folder": "folder", "--export": "realera"}.get(flag, name)
    path += ".png" * (name == "draw" and len(path) < 200 and c.one(2))
    fine = path in FINE_PATHS and name != "draw" and not (flag == "--export" and "made" in path)
    c.mean(f"{flag} {named(path)}", "accept" if fine else "either")
    c.outs = [path, f"{os.path.splitext(path)[0]}.svg"] if len(path) < 200 and path[:1] != "/" else []
    c.outs += ["made"] * (flag == "--export")
    more = ["--overwrite"] if name in ("realera", "merge", "lora") and c.one(3) == 0 else []
    c.replaces = ["edit"] if more and path == "edit" else []
    c.run(name, flag, path, *more)


def csvs(c: Case) -> None:
    """--prompts: broken quotes, columns twice, odd seeds, odd encodings."""
    seed, right = c.one([
        ("-1", "refuse"), (str(2 ** 63), "refuse"), ("1.5", "refuse"), ("nan", "refuse"), ("inf", "refuse"),
        ("1" * 5000, "refuse"), ("3016.0", "either"), (" 7 ", "accept"), ("", "accept"), ("0x10", "refuse"),
        ("1e3", "either"), ("١", "either"), ("1_0", "either"), ("seven", "refuse")])
    ours = c.one("CLIP score", "CLIP says", "variant", "file")

    def changed(old, new):
        return CSV.replace(old, new)

    content, what, expected = c.one([
        *[(changed("photo of the cat,1", f"photo of the cat,{seed}"), f"seed {seed[:20]}", right)] * 4,
        (changed("a photo of the dog", '"a photo of the dog'), "unclosed quote", "refuse"),
        (changed("the sea", '"the sea'), "unclosed quote in the last row", "refuse"),
        (changed("class", "prompt"), "the column prompt twice", "refuse"),
        (changed("class", "seed"), "the column seed twice", "refuse"),
        (changed("class", ours), f"a column {ours}", "either"),
        (changed("class", ""), "a column ''", "either"),
        (changed("a photo of the dog", ""), "an empty prompt", "either"),
        (changed("a photo of the dog", " "), "a blank prompt", "either"),
        (changed(",2,dog", ",2,dog,too,many"), "more fields than columns", "refuse"),
        (changed(",2,dog", ""), "a row with one field", "either"),
        (changed("dog", " dog "), "blanks", "accept"),
        (changed(",dog", ","), "no class in a row", "either"),
        ("\ufeff" + CSV, "a byte order mark", "accept"),
        (changed("\n", "\r\n"), "Windows' line ends", "accept"), (CSV + "\n\n", "empty lines", "accept"),
        (changed("\n", "\r"), "line ends of old Macs", "either"), (changed("sea", "s\0a"), "NUL", "refuse"),
        (CSV.encode("utf-16"), "UTF-16", "refuse"), ("", "empty", "refuse"),
        (CSV.split("\n")[0], "no rows", "refuse"),
        (changed("sea", "café").encode("latin-1"), "Latin 1", "refuse"),
        (c.rng.randbytes(500), "bytes", "refuse"),
        (changed(",", ";"), "semicolons", "refuse"),
        (changed("sea", "s" * 200_000), "a huge field", "refuse"),
        (changed("prompt", "text"), "no column prompt", "refuse"),
        (changed("sea", "日本 😀 {} %s <b>&"), "odd signs", "accept"),
        (changed("seed", "evaluation_seed"), "the column evaluation_seed", "accept")])
    c.put("prompts.csv", content)
    c.mean(f"CSV: {what}", expected)
    c.run(["csv", "csv", "csv edit"])


METHODS = {"realera": realera.Settings, "lora": realera.Settings, "rece": rece.Settings, "uce": uce.Settings}


def settings(c: Case) -> None:
    """--set: NaN, infinity, huge, other types and names."""
    if c.one(8) == 0:
        change = c.one("m=3", "=3", "M", "lambda=1", "__class__=3", "M:3", "", "M==3")
        c.mean(f"--set {named(change)}")
        return c.run("realera", "--set", change)
    name = c.one(list(METHODS))
    field = c.one([f for f in dataclasses.fields(METHODS[name]) if f.name != "trajectories"])
    wrong = ["nan", "NaN", "inf", "-inf", "1e999", "", "abc", "1,5", "0x10", "None", "1" * 5000]
    value = c.one(wrong + ["1e30", "1e300", "-1", "0", "1e-300", "1000000000", "٣", " 1", "true"])
    if field.name in ("lora_steps", "rounds") and value == "1000000000":
        value = "-1"                                              # it would work for days, as asked
    fits = (value == "true" if field.type is bool else value not in wrong and field.type is not str
            and value != "true" and (field.type is float or not value.startswith("1e")))
    c.mean(f"--set {field.name}={value[:30]}", "either" if fits else "refuse")
    c.run(name, "--set", f"{field.name}={value}")


def flags(c: Case) -> None:
    """Flags out of their range."""
    seed = c.one("-1", "1.5", "nan", str(2 ** 62), str(2 ** 64), "1" * 5000)
    steps = c.one("0", "-1", "1000", str(10 ** 12), "2.5", "x")
    odd = c.one("{}", "{0}", "%s", "é", "日本", "😀", "\0", "<|endoftext|>")
    any_of = c.one("realera", "draw", "csv")
    name, more, expected = c.one([
        ("realera", ["--n", "0"], "refuse"), ("lora", ["--n", "-3"], "refuse"),
        ("draw", ["--n", "0"], "refuse"),
        ("csv", ["--n", "0"], "refuse"), ("csv", ["--batch", "0"], "refuse"),
        ("draw", ["--batch", "-1"], "refuse"),
        *[(any_of, ["--seed", seed], "refuse")] * 3,
        *[(c.one("draw", "csv"), ["--steps", steps], "refuse")] * 3,
        (any_of, ["--seed", str(2 ** 62 - 1)], "accept"), ("draw", ["--sampler", "euler"], "refuse"),
        *[("draw", ["--guidance", c.one("nan", "inf", "-inf", "x", "1e999", "1e300")], "refuse")] * 2,
        ("draw", ["--guidance", c.one("0", "-1", "30")], "either"), ("draw", ["--dtype", "int8"], "refuse"),
        (any_of, ["--device", c.one("tpu", "cuda:99", "cuda:x", "", "cpu:7", "meta")], "refuse"),
        ("draw", ["--dtype", "float16"], "either"), ("realera", ["--task", "colour"], "refuse"),
        ("realera", ["--task", c.one("style", "celebrity")], "accept"),
        ("realera", ["--concept", c.one("", " ", "a " * 500, "airplane", "AIRPLANE")], "refuse"),
        ("realera", ["--concept", "ship"], "refuse"), ("realera", ["--anchor", "sea"], "refuse"),
        ("realera", ["--concept", odd, "--anchor", "sea"], "either"),
        ("realera", ["--concept", os.fsdecode(b"caf\xe9"), "--anchor", "sea"], "refuse"),
        ("realera", ["--concept", "ship", "--anchor", c.one("ship", "SHIP", "Ship ", "a " * 500)], "refuse"),
        ("lora", ["--lora-steps", c.one("-1", "1.5", "nan")], "refuse"),
        ("rece", ["--rounds", "-1"], "refuse"),
        ("rece", ["--lambda", c.one("0", "-1", "nan", "inf", "x")], "refuse"),
        ("realera", ["--export-lora", c.one("0", "-1", "1.5", "nan")], "refuse"),
        ("realera", ["--export-lora", c.one("1", "1000000000")], "accept"),
        ("folder", ["--lora", c.one("0", "-7")], "refuse"), ("folder", ["--edit", "second"], "refuse"),
        ("realera", ["--preview", "prompts.txt", "--export", "made"], "refuse"),
        ("merge", ["edit"], "refuse"),
        ("csv", ["--detector", c.one("nudenet", "json:decoder", "nothing:x", "json", ":")], "refuse"),
        ("csv edit", ["--edit", "edit/"], "refuse"), ("draw edit", ["--edit", "edit"], "refuse"),
        ("csv", ["--clip", c.one("nowhere", "edit", "model")], "refuse"), ("draw", ["--unknown"], "refuse"),
        ("realera", ["--model", c.one("nowhere", "a/b/c", "", "http://x", "..", "prompts.csv")], "refuse"),
        ("prompt", [c.one("", " ", "a " * 5000, "\n", "日本 😀", "{} %s", "<|startoftext|>")], "accept"),
        ("prompt", [os.fsdecode(b"caf\xe9")], "refuse"), ("realera", ["extra"], "refuse")])
    c.mean(" ".join(map(named, more)), expected)
    if name == "prompt":
        c.args = ["sample.py", *more, "--n", "1", "--out", "made/x.png", "--model", "model"]
    else:
        c.run(name, *more)


# ---- files beside the model, and what lies there from before ----

def results(c: Case) -> None:
    """Results of an earlier run, damaged, gone on from: the table must come out as it was."""
    (c.work / "results").rename(c.work / "made")
    path = next((c.work / "made/results").glob("*/results.jsonl"))
    lines = path.read_text().splitlines()
    i = c.one(len(lines))
    good = json.loads(lines[i])
    nan = base64.b64encode(np.full(8, c.one(NAN, INF), np.float16).tobytes()).decode()
    where = c.one("line", "line", "line", "process0", "asked", "metrics", "settings", "all")
    if where in ("line", "process0"):
        lines[i], what = c.one([
            (lines[i][:1 + c.one(40)], "torn"), (json.dumps(good | {"feature": nan}), "NaN"), ("", "empty"),
            (json.dumps(good | {"feature": "AAAA"}), "too short"),
            (json.dumps(good | {"feature": 5}), "no feature"),
            ("[" * 100_000, "nested"), ('{"seed": ' + "1" * 5000 + "}", "5,000 digits"), ("[]", "a list"),
            (json.dumps(good | {"seed": "x"}), "a seed that is none"),
            (json.dumps(good | {"prompt": []}), "no prompt"),
            ("\0\0\0", "NUL"), (json.dumps(good | {"feature": "é" * 9}), "not ASCII"), ("NaN", "NaN")])
        path.write_text("\n".join(lines) + "\n")
        if where == "process0":
            path.rename(path.with_name("process0.jsonl"))
    else:
        target = {"settings": next(path.parent.glob("settings*.json")), "all": path}.get(where)
        what = f"{where}: {damage(c, target or c.work / 'made' / f'{where}.json')}"
    c.mean(f"results: {what}", "either")
    c.same, c.replaces = "work/made/metrics.json" if where != "metrics" else None, ["made"]
    c.run("csv")


def books(c: Case) -> None:
    """--book in a wrong form."""
    entry = {"anchor": "sky", "synonyms": ["jet"], "associated": ["antonov"]}
    key, value = c.one([
        ("anchor", None), ("anchor", 5), ("anchor", []), ("synonyms", []), ("synonyms", "jet"),
        ("synonyms", [5]),
        ("synonyms", [""]), ("synonyms", [None]), ("synonyms", {"jet": 1}), ("synonyms", None),
        ("associated", "jet"),
        ("associated", [5]), ("associated", [[]]), ("associated", None), ("associated", {"a": 1})])
    good = {"classes": {"airplane": entry, "ship": entry}, "scenes": ["sky"]}

    def classes(**new):
        return good | {"classes": {"airplane": entry, "ship": entry} | new}

    content, what = c.one([
        *[(classes(airplane=entry | {key: value}), f"{key} = {value!r}")] * 8,
        (good | {"scenes": [5]}, "scenes numbers"),
        (good | {"classes": {"airplane": entry}}, "one class"), (good | {"classes": []}, "classes a list"),
        (good | {"classes": {}}, "no class"), (classes(Airplane=entry), "a capital"),
        (classes(ship=[]), "a class a list"),
        (classes(**{"": entry}), "no name"), (good | {"scenes": "sky"}, "scenes a text"),
        ({"scenes": []}, "no classes"),
        (good | {"scenes": None}, "scenes null"), (good | {"scenes": {"sky": 1}}, "scenes an object"),
        ([], "a list"),
        ({"classes": good["classes"]}, "no scenes"), ("{", "cut"), ("[" * 100_000, "nested")])
    c.put("book.json", content)
    c.mean(f"book: {what}")
    c.run(["realera", "csv", "lora", "csv edit"], "--book", "book.json")


def lists(c: Case) -> None:
    """--preview's text file."""
    many = "\n".join(f"cat {i}" for i in range(1500))
    content, what, expected = c.one([
        ("", "empty", "refuse"), ("\n \n\t\n", "blank", "refuse"),
        ("\ufeffa cat\n", "a byte order mark", "accept"),
        ("café".encode("latin-1"), "Latin 1", "refuse"), ("a cat\0\n", "NUL", "either"),
        (many, "1,500 lines", "accept"),
        ("x" * 100_000, "a long line", "accept"), ("a cat\r\nthe sea\r\n", "Windows' line ends", "accept"),
        ("a cat\n" * 3000, "the same line again", "accept"), ("日本 😀\n", "other scripts", "accept"),
        ("a cat".encode("utf-16"), "UTF-16", "refuse"), (c.rng.randbytes(400) + b"\xff", "bytes", "refuse"),
        ("<|endoftext|>\n<|startoftext|>", "special tokens", "accept"),
        ("a\u2028b\x85c\x0cd", "line ends", "either")])
    c.put("prompts.txt", content)
    c.mean(f"prompts: {what}", expected)
    c.run(["early", "preview"])


def disk(c: Case) -> None:
    """No file may exceed some bytes, as on a disk that is full."""
    c.size = c.one(c.one(300, 20_000))
    c.mean(f"files of {c.size} bytes at most", "either")
    c.run(["realera", "lora", "rece", "draw", "csv", "folder", "file", "merge"])
    c.stays = ["made"] if c.stays else []                         # tables that were complete, too


def strangers(c: Case) -> None:
    """A model folder that would write or read elsewhere; somebody's files in the way."""
    how, index = c.one("key", "key", "link", "part", "taken", "taken"), c.values("model/model_index.json")
    c.expected = "either"
    if how == "taken":
        name, place = c.one([
            ("csv", "made/grid.png"), ("csv", "made/grid.svg"), ("csv", "made/metrics.csv"),
            ("realera", "made/thesis"),
            ("csv", "made/pictures/untouched/thesis.png"), ("draw", "made/x.svg"), ("draw", "made/x.png"),
            ("merge", "made/run.json"), ("folder", "made/thesis"),
            ("file", "edit/edit-rank2-webui.safetensors")])
        (c.work / place).parent.mkdir(parents=True, exist_ok=True)
        (c.work / place).write_text("precious")
        c.what = f"somebody's {place}"
        return c.run(name, *["--keep-pictures"] * ("pictures" in place))
    if how == "key":
        key = c.one("../evil", "a/../../evil", "..", ".", "unet/../../evil", "", "x" * 300, "a\0b",
                    str(c.work / "evil"))
        shutil.copytree(c.model / "scheduler", c.work / "evil")
        c.what, index[key] = f"model_index.json has {named(key)}", ["diffusers", "X"]
        c.outs = ["new/made"]                                     # with new/evil beside it
    elif how == "link":
        where = c.one("tokenizer", "scheduler", "vae", "text_encoder")
        (c.model / where / c.one("notes.txt", "notes.json")).symlink_to("../../../private.txt")
        c.what = f"a link in {where}/ to a private file"
    else:
        key, index[key] = (part := c.one(list(index))), c.one(None, 5, [], ["x"], [5, 5], {}, "x", [None, 1])
        c.what = f"model_index.json {part} = {index[part]}"
    c.put("model/model_index.json", index)
    c.run("folder", *["--folder", "new/made"] * (how == "key"))


FAMILIES = {family.__name__: family for family in (
    config, texts, tensors, files, parts, words, edits, paths, csvs, settings, flags, results, books, lists,
    disk, strangers)}
