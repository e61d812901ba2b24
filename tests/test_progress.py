"""Progress: a bar in a terminal, a line per part elsewhere; what a program takes."""
import io
from pathlib import Path

import pytest
import torch

from plumbing import progress as module
from plumbing.progress import Clock, peak_memory, progress


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


def test_a_clock_has_each_parts_seconds_and_the_memory():
    clock = Clock()
    clock("text"), clock("closed form")
    spent = clock.spent()
    assert [*spent["seconds"]] == ["text", "closed form"] and min(spent["seconds"].values()) >= 0
    assert spent.get("peak GiB") == (round(peak, 2) if (peak := peak_memory()) else None)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells")
def test_peak_memory_is_at_least_what_is_held():
    held = torch.ones(2 ** 26)                                    # a quarter of a GiB, written to
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    assert held[-1] == 1 and 0.25 < int(lines["VmRSS"].split()[0]) / 2 ** 20 <= peak_memory() < 64


def test_peak_memory_is_the_gpus_where_one_was_used_and_nothing_where_nobody_tells(monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert peak_memory() is None and "peak GiB" not in Clock().spent()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2 ** 30)
    assert peak_memory() == 3
