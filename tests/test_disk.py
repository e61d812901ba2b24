"""Whole files and folders or none."""
import os

import pytest

from plumbing.cli import command_line
from plumbing.disk import link, whole, whole_folder


def test_what_fails_takes_nothing_of_another_run_along(tmp_path):
    """Both make out/; one is done when the other is interrupted."""
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out/tables/a"):
        with whole_folder(tmp_path / "out/b") as new:
            (new / "edit").write_text("finished")
        raise KeyboardInterrupt
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "out", tmp_path / "out/b", tmp_path / "out/b/edit"]


def test_full_disk_leaves_nothing_behind_and_the_old_edit_in_place(tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("precious")
    (target / "erased.safetensors").write_text("an edit")
    with pytest.raises(OSError), whole_folder(target, overwrite=True) as new:
        (new / "half").write_text("written")
        raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and (target / "old").read_text() == "precious"
    with pytest.raises(OSError), whole(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]

    def full():
        raise OSError(28, "No space left on device", "out/x")
    with pytest.raises(SystemExit) as end:
        command_line(full)
    assert end.value.code == 2


def test_a_disk_without_hard_links_gets_copies(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_text("picture")
    link(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "picture"
