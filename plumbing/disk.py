"""Files and folders: all of them or nothing, and nobody's overwritten; JSON."""
import contextlib
import json
import os
import shutil
from pathlib import Path

from safetensors import SafetensorError

from plumbing import UserError


def read_json(path: str | Path) -> dict:
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: is this a model folder in the diffusers layout?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} should hold a JSON object")
    return values


@contextlib.contextmanager
def readable(path: str | Path):
    """Turn errors about a damaged or missing file of weights, or one that cannot be mapped, into a UserError."""
    try:
        yield
    except (SafetensorError, OSError, MemoryError, RuntimeError) as error:           # torch's are the last
        said = str(error)
        why = ("this file system cannot map files: copy it to a local disk" if "os error 19)" in said else
               "not enough memory" if isinstance(error, MemoryError) or "os error 1455" in said
               or "allocate memory" in said else "is the download complete?")
        raise UserError(f"{path} cannot be read ({said or type(error).__name__}): {why}") from None


@contextlib.contextmanager
def whole(path: str | Path):
    """Yield a temporary name beside `path`, renamed when the block ends well: all of it or nothing."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        yield temporary
        temporary.chmod(0o644)                                    # safetensors makes its files private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: {instead}")
    if path.exists() and not is_edit(path):
        raise UserError(f"{path} is no edit folder, and --overwrite replaces nothing else")


@contextlib.contextmanager
def whole_folder(path: str | Path, overwrite: bool = False):
    """Yield an empty temporary folder, renamed to `path` when the block ends well; else leave nothing."""
    path = Path(path)
    refuse_existing(path, overwrite=overwrite)
    path = path.absolute()                                        # "." has no name
    temporary, old = path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.old")
    made = [parent for parent in path.parents if not parent.exists()]                # innermost first
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in (temporary, old):                                 # by a killed run
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
        with contextlib.suppress(OSError):                        # not empty: others use it by now
            for parent in made:
                parent.rmdir()
