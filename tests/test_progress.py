"""Progress: a bar in a terminal, a line per part elsewhere."""
import io

import pytest

from plumbing import progress as module
from plumbing.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def nothing_begun(monkeypatch):
    monkeypatch.setattr(module, "BEGUN", set())


def test_without_a_terminal_a_line_as_each_part_begins(capsys):
    for _ in range(2):
        assert list(progress(range(3), "noise alignment", "step")) == [0, 1, 2]
    progress(0, "nothing", "step"), progress(5, "hidden", "step", quiet=True)
    with progress(7, "b", "edit") as bar:
        bar.update(7)
    progress(1, "c", "picture"), progress(2, "d", "class"), progress(20, "e", "batch")
    assert capsys.readouterr().err == (
        "noise alignment: 3 steps …\nb: 7 edits …\nc: 1 picture …\nd: 2 classes …\ne: 20 batches …\n")


def test_in_a_terminal_a_bar(monkeypatch):
    monkeypatch.setattr(module.sys, "stderr", Terminal())
    for _ in progress(range(3), "noise alignment", "step"):
        pass
    said = module.sys.stderr.getvalue()
    assert "noise alignment: " in said and "0/3" in said and " …" not in said
