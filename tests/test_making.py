"""Edits for the experiments: each made once, by one process, under a name of its own."""
import argparse
import subprocess
from pathlib import Path

import pytest

from experiments import tables
from helpers import MINI
from plumbing import making


@pytest.mark.parametrize("world", [2, 3])
def test_no_two_processes_make_the_same_edit_at_once(tmp_path, monkeypatch, world):
    """Two rows may be the same edit: variants 1 and 2 of Table 3 without LoRA steps."""
    made = []

    def note(command, **_):
        made.append((making.RANK, command[command.index("--out") + 1]))
        return subprocess.CompletedProcess(command, 0, "", "")

    def stop():
        raise InterruptedError
    monkeypatch.setattr(making.subprocess, "run", note)
    monkeypatch.setattr(making, "barrier", stop)
    monkeypatch.setattr(making, "WORLD", world)
    args = argparse.Namespace(model=str(MINI), out=tmp_path, edit_seed=0, device="cpu", dtype="float32",
                              clip=None, seed=0, n=1)
    settings = [None, *[["lora_steps=0", *more] for more in tables.TABLES["3"].values()]]
    rows = [("automobile", str(some), some) for some in settings]
    for rank in range(world):
        monkeypatch.setattr(making, "RANK", rank)
        with pytest.raises(InterruptedError):
            tables.measure(rows, args)
    by = {folder: {rank for rank, other in made if other == folder} for _, folder in made}
    assert len(by) == 3 and all(len(ranks) == 1 for ranks in by.values()), by


def test_an_edit_trained_in_another_dtype_is_another_edit():
    def folder(dtype, *settings):
        return tables.recipe_of("cat", settings, 0, dtype).folder(Path(), "")
    trained = "lora_steps=200"
    assert folder("float32", trained) != folder("bfloat16", trained) and folder("float32", "M=3") == folder(
        "float32", "M=3")
    assert folder("float32", "lora_steps=0") == folder("bfloat16", "lora_steps=0")


def test_an_edit_depends_on_what_the_book_holds_and_not_on_where_it_lies(tmp_path, monkeypatch):
    own = making.BOOK.read_bytes()
    for name, words in (("a", own), ("b", own), ("c", own + b"\n")):
        (tmp_path / f"{name}.json").write_bytes(words)
    folders, given = {}, []
    monkeypatch.setattr(making.subprocess, "run", lambda command, **_: given.append(command) or
                        subprocess.CompletedProcess(command, 0, "", ""))
    for path in (making.BOOK, *(tmp_path / f"{name}.json" for name in "abc")):
        monkeypatch.setattr(making, "CHOSEN", [path])
        one = making.recipe("rece.py", "cat")
        folders[path.stem] = one.folder(tmp_path, "")
        assert (f"--book {path}" in one.command("mini")) == (path != making.BOOK)
        making.make_edits([one], tmp_path, "", "mini", "cpu")
        assert (str(path) in given[-1]) == (path != making.BOOK)
    assert folders["captions"] == folders["a"] == folders["b"] != folders["c"]
    monkeypatch.setattr(making, "CHOSEN", [making.ROOT / "mini/characters.json"])
    assert "--book mini/characters.json " in one.command("mini")
