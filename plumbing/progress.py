"""What a program takes, seconds and memory. And its progress: a bar in a terminal; where output goes to a
file or a pipe, a line as each part begins."""
import sys
import time
from pathlib import Path
from typing import Iterable

import torch
from tqdm import tqdm

BEGUN = set()                                                     # parts that a line was printed for


def progress(steps: int | Iterable, what: str, unit: str, quiet: bool = False) -> tqdm:
    """A bar over so many units, or an iterable with one. Without a terminal: a line, once for each `what`."""
    how = {"total": steps} if isinstance(steps, int) else {"iterable": steps}
    bar = tqdm(**how, desc=what, unit=unit, leave=False, disable=quiet or None)
    if bar.disable and bar.total and not quiet and what not in BEGUN:
        many = "" if bar.total == 1 else "es" if unit[-1] in "sh" else "s"
        print(f"{what}: {bar.total} {unit}{many} …", file=sys.stderr)
        BEGUN.add(what)
    return bar


def peak_memory() -> float | None:
    """The most that this process has held so far, in GiB, on the GPU if it used one; None: nothing tells."""
    if torch.cuda.is_available() and (most := torch.cuda.max_memory_allocated()):
        return most / 2 ** 30
    status = Path("/proc/self/status")                            # Linux; getrusage counts the parent, too
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 2 ** 20 for line in lines if line.startswith("VmHWM")), None)


class Clock:
    """`clock("solve")` notes the seconds since the last note; printed: all of them and their sum."""

    def __init__(self):
        self.seconds, self.last = {}, time.perf_counter()

    def __call__(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self.last = round(now - self.last, 3), now

    def spent(self) -> dict:
        """What run.json says: the seconds of each part, and the process's memory so far, where known."""
        peak = peak_memory()
        return {"seconds": self.seconds} | ({} if peak is None else {"peak GiB": round(peak, 2)})

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {took:.1f}" for part, took in self.seconds.items())
        return f"seconds: {parts}, in all {sum(self.seconds.values()):.1f}"
