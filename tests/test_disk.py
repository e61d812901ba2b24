"""Whole files and folders or none."""
import contextlib
import os

import pytest

from helpers import AIRPLANE, CLOSED
from plumbing import UserError
from plumbing.cli import command_line
from plumbing.disk import link, read_json, whole, whole_folder, write_json


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


def test_two_commands_with_one_folder_the_second_is_refused_at_once(refused, tmp_path):
    with whole_folder(tmp_path / "out/both") as new:
        (new / "half").write_text("the first one's")
        refused("realera.py", *AIRPLANE, *CLOSED, "--out", "out/both", cwd=tmp_path,
                match="being written by another command")
    assert [p.relative_to(tmp_path).as_posix() for p in sorted(tmp_path.rglob("*"))] == [
        "out", "out/both", "out/both/half"]


def test_killed_between_its_two_renames_the_old_edit_comes_back(tmp_path):
    """--overwrite moves the old folder aside, then the new one in: a kill can fall between."""
    old = tmp_path / ".edit.old"
    old.mkdir()
    (old / "erased.safetensors").write_text("precious")
    with pytest.raises(UserError, match="exists"), whole_folder(tmp_path / "edit"):
        pass
    assert (tmp_path / "edit/erased.safetensors").read_text() == "precious" and not old.exists()
    old.mkdir()
    with pytest.raises(ValueError), whole_folder(tmp_path / "edit", overwrite=True):
        raise ValueError
    assert [path.name for path in tmp_path.iterdir()] == ["edit"]


def test_a_file_that_fails_takes_the_folders_along_that_it_made(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError), whole(tmp_path / "there/new/deep/x.png"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.rglob("*")) == [tmp_path / "there"]
    with whole(tmp_path / "new/deep/x.png") as temporary:
        temporary.write_text("picture")
    assert (tmp_path / "new/deep/x.png").read_text() == "picture"


def test_what_safetensors_leaves_behind_is_cleared(tmp_path):
    for _ in range(2):                                            # a killed run, then one that ends well
        with contextlib.suppress(OSError), whole(tmp_path / "a.safetensors") as temporary:
            (temporary.parent / ".tmpAbC").write_text("half of it")
            raise OSError
    with whole(tmp_path / "a.safetensors") as temporary:
        temporary.write_text("all of it")
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("text, match", [
    ("[" * 100_000, "not valid JSON"), ('{"a": NaN}', "finite"), ('{"a": -Infinity}', "finite"),
    ('{"a": 1e999}', "finite"), ('{"a": ' + "9" * 5000 + "}", "not valid JSON"), ("[1]", "JSON object"),
    ('{"a": 1', "not valid JSON")], ids=str.__len__)
def test_odd_json_is_one_line(text, match, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match=match):
        read_json(tmp_path / "run.json")


def test_no_json_with_nan_is_written(tmp_path):
    with pytest.raises(UserError, match="not finite"):
        write_json(tmp_path / "a.json", {"loss": [float("nan")]})
    assert not list(tmp_path.iterdir())


def test_a_symbolic_link_is_never_overwritten(tmp_path):
    (tmp_path / "edit").mkdir()
    (tmp_path / "edit/erased.safetensors").touch()
    (tmp_path / "link").symlink_to("edit")
    (tmp_path / "broken").symlink_to("nowhere")
    for name in ("link", "broken"):
        with pytest.raises(UserError, match="no edit folder"), whole_folder(tmp_path / name, overwrite=True):
            pass
    with pytest.raises(UserError, match="exists"), whole_folder(tmp_path / "broken"):
        pass
