"""Files and folders: all of them or nothing, and nobody's overwritten; JSON."""
import contextlib
import json
import math
import os
import shutil
from pathlib import Path

from filelock import FileLock, Timeout                            # comes with huggingface_hub
from safetensors import SafetensorError

from plumbing import UserError


def parse_json(text: str, where: str | Path, infinite: bool = False) -> dict:
    """The JSON object in `text`. NaN, infinity (unless `infinite`), and what Python cannot hold are errors as
    any other: a UserError that begins with `where`."""
    def number(text: str) -> float:
        if not math.isfinite(value := float(text)) and not infinite:
            raise ValueError(f"{text[:20]} is no finite number")
        return value

    try:
        values = json.loads(text, parse_constant=number, parse_float=number)
    except (ValueError, RecursionError) as error:                 # not JSON, 5,000 digits; nested too deep
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{where} should hold a JSON object")
    return values


def read_json(path: str | Path, infinite: bool = False) -> dict:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")         # Windows may begin it with a mark
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: is this a model folder in the diffusers layout?") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return parse_json(text, path, infinite)


def write_json(path: str | Path, value, **how) -> None:
    """`value` as JSON, the file whole or not at all. Raises UserError if a number in it is not finite."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, **how)
    except ValueError:
        raise UserError(f"a number for {path} is not finite: nothing is written") from None
    with whole(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def readable(path: str | Path):
    """Turn errors about weights that are damaged, missing or cannot be mapped into a UserError."""
    try:
        yield
    except (SafetensorError, OSError, MemoryError, RuntimeError, ValueError, KeyError,
            AttributeError) as error:                             # odd dtypes, too
        said = str(error)
        why = ("this file system cannot map files: copy it to a local disk" if "os error 19)" in said else
               "not enough memory" if isinstance(error, MemoryError) or "os error 1455" in said
               or "allocate memory" in said else "is the download complete?")
        raise UserError(f"{path} cannot be read ({said or type(error).__name__}): {why}") from None


@contextlib.contextmanager
def parents_of(path: Path):
    """Make the folders that `path` lies in. When the block ends, those that are empty still go again."""
    made = [parent for parent in path.parents if not parent.exists()]                # innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):                        # not empty: it is there, or others use it
            for parent in made:
                parent.rmdir()


@contextlib.contextmanager
def whole(path: str | Path):
    """Yield a temporary name, renamed to `path` when the block ends well: all of it or nothing. It lies in a
    folder of its own, where safetensors may leave what it could not finish."""
    path = Path(path)
    folder = path.with_name(f".{path.name}.partial")
    with parents_of(path):
        shutil.rmtree(folder, ignore_errors=True)                 # of a killed run
        folder.mkdir()
        try:
            yield folder / path.name
            (folder / path.name).chmod(0o644)                     # safetensors makes its files private
            (folder / path.name).replace(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def link(path: Path, there: Path) -> None:
    """A hard link costs no space; other disks and some file systems need a copy."""
    try:
        os.link(path.resolve(), there)                            # the hub's cache is symbolic links
    except OSError:
        shutil.copyfile(path, there)


def is_edit(folder: Path) -> bool:
    """An edit's folder; that of a method that changes no weights holds a run.json alone."""
    report = folder / "run.json"
    return (folder / "erased.safetensors").exists() or (
        report.is_file() and "base_hash" in report.read_text(encoding="utf-8", errors="replace"))


def refuse_existing(path: Path, instead: str = "choose another --out, or add --overwrite",
                    overwrite: bool = False) -> None:
    """Raises UserError if `path` exists; with `overwrite`, only if it is anything but an edit folder."""
    there = os.path.lexists(path)                                 # a broken symbolic link is there, too
    if there and not overwrite:
        raise UserError(f"{path} exists: {instead}")
    if there and (path.is_symlink() or not is_edit(path)):
        raise UserError(f"{path} is no edit folder, and --overwrite replaces nothing else")


@contextlib.contextmanager
def alone(path: Path):
    """Inside a `with` block no other process works on `path`: a second one is refused at once. A killed one's
    lock is free again."""
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(f"{path} is being written by another command: choose another --out") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):                        # Windows keeps an open file
            os.unlink(lock.lock_file)
        lock.release()


@contextlib.contextmanager
def whole_folder(path: str | Path, overwrite: bool = False):
    """Yield an empty temporary folder, renamed to `path` when the block ends well; else leave nothing."""
    path = Path(path)
    refuse_existing(path, overwrite=overwrite)
    path = path.absolute()                                        # "." has no name
    temporary, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    with parents_of(path), alone(path):
        if old.exists() and not path.exists():                    # killed between the two renames below
            old.rename(path)
            refuse_existing(path, overwrite=overwrite)
        for left in (temporary, old):                             # by a killed run
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
