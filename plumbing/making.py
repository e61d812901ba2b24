"""Edits for the experiments: what method, of what, with which flags; each made once and kept."""
import hashlib
import json
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from plumbing import UserError
from plumbing.book import BOOK, CHOSEN
from plumbing.progress import progress
from plumbing.prompts import anchor_of
from plumbing.results import RANK, WORLD, barrier


@dataclass(frozen=True)
class Recipe:
    """One edit: a method's file, what it erases, and every flag that its result depends on."""
    method: str                 # realera.py, baselines/uce.py, or a file of yours that ends in `run`
    concept: str
    flags: tuple[str, ...]      # --anchor sky --set M=0 …
    start: "Recipe | None" = None                                 # the edit that it goes on from: --edit

    def text(self) -> list:
        """All that the edit depends on, the method's own file and the book included, but for model and
        machine, and for the modules that the methods share."""
        code, words = (hashlib.sha256(path.read_bytes()).hexdigest()
                       for path in (ROOT / self.method, CHOSEN[0]))
        return [self.method, code, words, self.concept, self.flags, self.start and self.start.text()]

    def command(self, model: str) -> str:
        """As a user types it. Of an edit that goes on from another, the other's comes first."""
        own = shlex.join(["python", self.method, "--concept", self.concept, *self.flags, *own_book(),
                          "--model", model]).replace(f"{ROOT}/", "")
        return f"{self.start.command(model)}; {own} --edit …" if self.start else own

    def folder(self, out: Path, base: str) -> Path:
        """Where it lies: named by a hash of all that it depends on. base: the model's hash."""
        text = json.dumps([self.text(), base])
        name = f"{self.concept}-{Path(self.method).stem}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"
        return out / "edits" / name


ROOT = Path(__file__).resolve().parents[1]


def own_book() -> list[str]:
    """The flag of a book that is not mini's own. An edit's name depends on what that holds (`Recipe.text`),
    not on where it lies."""
    return [] if CHOSEN[0] == BOOK else ["--book", str(CHOSEN[0])]


def commit() -> str:
    """This repository's, with -dirty if files have changed since; "" where git or its folder is missing."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        return subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], check=True,
                              capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def recipe(method: str, concept: str, settings: list[str] = (), seed: int = 0, dtype: str = "float32",
           start: Recipe | None = None, task: str = "object", anchor: str | None = None) -> Recipe:
    """The recipe for a concept with `--set settings`; of a setting that is given twice the last counts.
    anchor: if not its own in the book, or the task's. dtype: only where something is trained: closed forms
    are the same in all."""
    last = {setting.partition("=")[0]: setting for setting in settings}
    flags = ["--set", *(last[name] for name in sorted(last))] if last else []
    own = () if task == "object" else ("--task", task)
    anchor = anchor_of(concept, task) if anchor is None else anchor
    return Recipe(method, concept, (*flags, "--seed", str(seed), "--dtype", dtype, "--anchor", anchor, *own),
                  start)


def make_edits(recipes: list[Recipe], out: Path, base: str, model: str, device: str,
               may_fail: bool = False) -> None:
    """Let the methods make every edit that is not there yet, dealt to the processes. Raises UserError with
    what a method said if it failed; may_fail: that is a warning."""
    if starts := [one.start for one in recipes if one.start]:
        make_edits(starts, out, base, model, device, may_fail)
    wanted = {one.folder(out, base): one for one in recipes}      # equal ones once
    # neighbors in this order take about as long, so each process gets its part of the slow ones
    in_turn = sorted(wanted, key=lambda folder: (wanted[folder].method, wanted[folder].flags,
                                                 wanted[folder].start is not None, folder))
    todo = [folder for folder in in_turn[RANK::WORLD] if not folder.exists()]
    for folder in progress(todo, "edits", "edit", quiet=RANK > 0):
        one = wanted[folder]
        more = [*own_book(), *(["--edit", one.start.folder(out, base)] if one.start else [])]
        command = [sys.executable, ROOT / one.method, "--concept", one.concept, *one.flags, *more, "--model",
                   model, "--device", device, "--out", folder, "--no-pictures"]
        done = subprocess.run(list(map(str, command)), capture_output=True, encoding="utf-8",
                              env=os.environ | {"RANK": "0", "WORLD_SIZE": "1"})     # each is alone
        if done.returncode:
            said = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
            said = f"erasing {one.concept} failed: {said.removeprefix('error: ')}"
            if not may_fail:
                raise UserError(said)
            print(f"warning: {said} ({Path(one.method).stem} {' '.join(one.flags)})", file=sys.stderr)
    barrier()
