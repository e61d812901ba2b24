"""Devices, errors as one line, and texts in UTF-8."""
import ast
import dataclasses
import errno
import importlib
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError

from helpers import AIRPLANE, CLOSED, ENV, ROOT
from plumbing import UserError
from plumbing.cli import command_line, edit_name, parse_settings, pick_device, slug
from plumbing.disk import whole_folder


@pytest.mark.parametrize("env, shared, out, err", [
    ({"RANK": "3", "WORLD_SIZE": "8"}, True, "0 1\n", "RANK and WORLD_SIZE are not torchrun's"),
    ({"RANK": "", "WORLD_SIZE": ""}, True, "0 1\n", ""),
    ({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, True, "1 2\n", ""),
    ({"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, False, "0 2\n", "one of 2 processes"),
    ({"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}, False, "", "")])
def test_processes_are_torchruns_and_one_works_alone(monkeypatch, capsys, env, shared, out, err):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    cli = runpy.run_path(str(ROOT / "plumbing/cli.py"))           # which reads them once
    how = {"shared": True} if shared and "WORLD" in cli else {}
    cli["command_line"](lambda: print(cli.get("RANK"), cli.get("WORLD")), **how)
    printed, warned = capsys.readouterr()
    assert printed == out and err in warned and warned.count("\n") == (err != "")


def test_cuda_is_the_processs_own_gpu_and_mps_must_be_asked_for(monkeypatch):
    """By torchrun's LOCAL_RANK, also where a process sees fewer GPUs than there are processes."""
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "cpu" and pick_device("mps").type == "mps"
    current = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto").type == "cpu"              # as where the driver is too old for torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    for name, rank, index in (("auto", "3", 1), ("cuda", "1", 1), ("cuda", "2", 0), ("cuda:1", "0", 1)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert pick_device(name) == torch.device("cuda", index)
        assert current.pop() == f"cuda:{index}" and not current
    for name in ("cuda:2", "cuda:x", "tpu"):
        with pytest.raises(UserError, match=f"{name} is not available"):
            pick_device(name)


def test_a_name_keeps_the_letters_of_every_script():
    assert slug("飞机") == "飞机" != slug("汽车") and slug("Van  Gogh!") == "van-gogh" and slug("../a_b") == "a-b"
    assert slug("कि") != slug("का") and slug("Cafe\u0301") == slug("café") == "café" and slug("🛩") == ""
    assert len(slug("飞" * 99).encode()) <= 60 and slug("飞" * 99)
    names = [edit_name(["飞机", "汽车"]), edit_name(["!"], "-uce"), edit_name([f"thing {i}" for i in range(100)])]
    assert list(map(str, names)) == ["out/飞机+汽车", "out/edit-uce", "out/thing-0+99-more"]


@pytest.mark.parametrize("script, said", [
    ("sample.py", 'prompts; try: python sample.py "a photo of an airplane" --n 8 --seed 0'),
    ("eval_clip.py", "give --edit .*; try: python eval_clip.py --edit out/airplane"),
    ("rece.py", "--concept.*; try: python rece.py --concept airplane")])
def test_a_program_without_arguments_shows_an_example(refused, tmp_path, script, said):
    refused(script, cwd=tmp_path, match=said + "$")


def test_too_little_gpu_memory_is_one_line(capsys):
    def full():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(SystemExit) as end:
        command_line(full)
    assert end.value.code == 2 and "--dtype bfloat16" in capsys.readouterr().err


def test_texts_are_utf_8_wherever_they_go(tmp_path):
    """On Windows, Python before 3.15 would take the country's own encoding, which has no ‖ΔW‖ and no →."""
    for path in (*ROOT.glob("*.py"), *ROOT.glob("*/*.py")):
        if path.parent.name == "tests":
            continue
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                assert "utf-8" in ast.unparse(node), f"{path.name}, line {node.lineno}"
    (tmp_path / "prompts.txt").write_text("a café → a bar", encoding="utf-8")
    done = subprocess.run([sys.executable, ROOT / "realera.py", "--concept", "airplane", "--anchor", "sky",
                           "--preview", "prompts.txt"], cwd=tmp_path, capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "cp1252"})
    assert "‖Δe‖/‖e‖  prompt" in done.stdout.decode("utf-8"), done.stderr
    assert "a café → a bar" in done.stdout.decode("utf-8")


@pytest.mark.parametrize("error, match", [
    (OSError(errno.ENAMETOOLONG, "File name too long", "out/x"), "out/x: File name too long"),
    (OSError(errno.ELOOP, "Too many levels of symbolic links", "out/x"), "symbolic links"),
    (SafetensorError("I/O error: No space left on device (os error 28)"), "No space left"),
    (MemoryError(), "not enough memory")], ids=["name", "loop", "disk", "memory"])
def test_what_the_system_refuses_is_one_line(error, match, capsys):
    def main():
        raise error
    with pytest.raises(SystemExit) as end:
        command_line(main)
    said = capsys.readouterr().err
    assert end.value.code == 2 and re.fullmatch(f"error: .*{match}.*\n", said), said


def test_arguments_that_are_not_utf_8_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", os.fsdecode(b"caf\xe9")])
    with pytest.raises(SystemExit) as end:
        command_line(lambda: print("drawn"))
    assert end.value.code == 2 and capsys.readouterr().err == "error: an argument is not UTF-8\n"


def test_sigterm_leaves_nothing_hidden_behind(tmp_path, capsys):
    def main():
        with whole_folder(tmp_path / "edit"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
    with pytest.raises(SystemExit) as end:
        command_line(main)
    assert end.value.code == 130 and not list(tmp_path.iterdir()) and "interrupted" in capsys.readouterr().err


def test_a_reader_that_goes_away_takes_no_edit_along(tmp_path):
    """As `python realera.py … | head -1`."""
    command = [sys.executable, ROOT / "realera.py", *AIRPLANE, *CLOSED, "--out", "edit"]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().decode()
    assert process.wait() == 0 and "Traceback" not in said and "BrokenPipe" not in said, said
    assert sorted(path.name for path in tmp_path.glob("edit/*")) == [
        "erased.safetensors", "report.html", "run.json"]


@pytest.mark.parametrize("file", sorted(path.name for path in (ROOT / "baselines").glob("*.py")))
def test_named_settings_are_their_methods_and_what_else_is_set_comes_after(file):
    module = importlib.import_module(f"baselines.{file.removesuffix('.py')}")
    named = getattr(module.Settings, "PRESETS", {})
    for name, values in named.items():
        s = parse_settings(module.Settings, [f"preset={name}"])
        assert dataclasses.asdict(s) == dataclasses.asdict(module.Settings()) | values
        each = [f"{setting}={value}" for setting, value in values.items()]
        assert parse_settings(module.Settings, [*each, f"preset={name}"]) == s
    first = next((name for name, values in named.items() if "lr" in values), None)
    if first:
        assert parse_settings(module.Settings, ["lr=0.25", f"preset={first}"]).lr == 0.25
    with pytest.raises(UserError, match="need preset = .*, not none" if named else "no setting 'preset'"):
        parse_settings(module.Settings, ["preset=none"])
