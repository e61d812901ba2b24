"""Progress: a bar in a terminal; where output goes to a file or a pipe, a line as each part begins."""
import sys
from typing import Iterable

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
