"""A seeded fuzzer: damaged and odd inputs of many families, for the commands that read them.

    python tests/fuzz.py --seed 1 --n 900            # a line per input that misbehaves, counts per family
    python tests/fuzz.py --seed 1 --case 17          # one of them again, with all that it printed
    python tests/fuzz.py --seed 1 --n 160 --quick    # the cases of tests/test_fuzz.py

Each case is one command, run in this process, on a copy of a small random model in a folder of its own. It
must end with status 0, or with 2, one line that begins with "error:" and nothing left behind. It must change
no file but those of its own --out. With status 0 its results hold no NaN, and the damage was harmless: each
family says what it must come to, "accept", "refuse" or "either". More than 1 % that misbehave: exit status 1.
"""
import contextlib
import importlib
import io
import json
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

from PIL import Image
from safetensors.torch import load

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from fuzz_models import CSV, PRIVATE, Case, write_model
from fuzz_typed import FAMILIES
from plumbing.book import use_book
from plumbing.cli import command_line, program

SECONDS, MEMORY = 20, 3 * 2 ** 30


# ---- one run ----

def write_base(folder: Path) -> Path:
    """What every case starts from: a model, two edits of it, one of another model, results, prompts."""
    write_model(folder / "model")
    (folder / "prompts.csv").write_text(CSV)
    (folder / "prompts.txt").write_text("a photo of the cat\nthe sea\n")
    (folder.parent / "private.txt").write_text(PRIVATE)
    for args in (["--out", "edit"], ["--concept", "ship", "--anchor", "street", "--out", "second"]):
        concept = [] if "--concept" in args else ["--concept", "airplane", "--anchor", "sky"]
        good(folder, "realera.py", *concept, *args, "--lora-steps", 0, "--no-pictures")
    write_model(folder / "another", seed=1)
    good(folder, "realera.py", "--concept", "cat", "--anchor", "ground", "--lora-steps", 0, "--no-pictures",
         "--model", "another", "--out", "stranger")
    shutil.rmtree(folder / "another")
    good(folder, "eval_clip.py", "--prompts", "prompts.csv", "--out", "results")
    return folder


class Hang(BaseException):
    pass


def start(script: str, args: list[str], cwd: Path):
    """Run a program's main in this process: (exit status, stdout, stderr, the exception if one came out)."""
    def late(*_):
        raise Hang
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    before, argv, status, caught = os.getcwd(), sys.argv, 0, None
    handler = signal.signal(signal.SIGALRM, late)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            os.chdir(cwd)
            sys.argv = [script, *map(str, args)]
            signal.alarm(SECONDS)
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            if hasattr(module, "main"):
                command_line(module.main)
            else:                                                 # a method: its last line is `run`
                runpy.run_path(module.__file__, run_name="__main__")
        except SystemExit as end:
            status = end.code or 0
        except BaseException as error:
            caught = error
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, handler)
            os.chdir(before)
            sys.argv = argv
            use_book(None)
    return status, *(stream.buffer.getvalue().decode(errors="replace") for stream in (out, err)), caught


def good(cwd, script, *args):
    model = [] if "--model" in args else ["--model", "model"]
    status, _, err, caught = start(script, [*map(str, args), *model], cwd)
    assert status == 0 and not caught, (err, caught)


@contextlib.contextmanager
def limited(size: int | None):
    """Memory: a few GiB more than now, so that a hungry input fails alone. Files: of `size` bytes at most."""
    import resource                                               # not on Windows; /proc is Linux
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = {kind: resource.getrlimit(kind) for kind in (resource.RLIMIT_AS, resource.RLIMIT_FSIZE)}
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, old[resource.RLIMIT_AS][1]))
    if size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[resource.RLIMIT_FSIZE][1]))
    try:
        yield
    finally:
        for kind, limits in old.items():
            resource.setrlimit(kind, limits)


def snapshot(root: Path) -> dict[str, object]:
    """Every path below: a file's bytes, a link's target, None for a folder."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(folder, name)
            found[os.path.relpath(path, root)] = (
                os.readlink(path) if os.path.islink(path) else None if os.path.isdir(path) else
                Path(path).read_bytes() if os.path.isfile(path) else "special")
    return found


# ---- what is wrong with an outcome ----

def no_constant(name):
    raise ValueError(name)


def bad_result(name: str, data: bytes) -> str | None:
    """NaN and other people's secrets in a file that a command wrote."""
    if PRIVATE.encode() in data:
        return f"{name} holds a private file"
    if name.endswith(".safetensors"):
        for key, tensor in load(data).items():
            if not tensor.double().isfinite().all():
                return f"{name} has NaN in {key}"
    elif name.endswith((".json", ".jsonl")):
        try:
            for line in [data] if name.endswith("json") else data.splitlines():
                json.loads(line, parse_constant=no_constant)
        except ValueError as error:
            return f"{name} is not valid JSON: {error}"
    elif name.endswith(".csv") and re.search(rb"\b(nan|inf)\b", data, re.I):
        return f"{name} has NaN"
    elif name.endswith(".png"):
        if all(low == high for low, high in Image.open(io.BytesIO(data)).convert("RGB").getextrema()):
            return f"{name} is of one colour"


def below(name: str, places: list[str]) -> bool:
    """Whether a path lies in one of `places` of work/, or is a folder made on the way there."""
    places = [os.path.normpath(os.path.join("work", place)) for place in places]
    return any(name == place or name.startswith(f"{place}/") or place.startswith(f"{name}/")
               for place in places)


def judge(case, before, after, status, out, err, caught) -> str | None:
    """What is wrong with an outcome, or None."""
    changed = sorted(name for name in before.keys() | after.keys()
                     if before.get(name, 0) != after.get(name, 0))
    kept = [name for name in changed if not below(name, case.stays)]
    left = f"; changed or left {', '.join(changed[:3])}" if changed else ""
    if isinstance(caught, Hang):
        return f"hangs: more than {SECONDS} s{left}"
    if caught:
        frames = [f for f in traceback.extract_tb(caught.__traceback__) if "site-packages" not in f.filename]
        last = next(f for f in reversed(frames) if "/lib/python" not in f.filename)
        where = f"{Path(last.filename).name}:{last.lineno}"
        return f"traceback: {type(caught).__name__} at {where}: {' '.join(str(caught).split())[:150]}{left}"
    errors = [line for line in err.splitlines() if re.match(r"(\S+\.py: )?error:", line)]
    if status not in (0, 2):
        return f"exit status {status}"
    if len(errors) != (status == 2):
        return f"exit status {status} and {len(errors)} lines that begin with error:"
    if status == 2 and kept:
        return f"refused{left}"
    if lost := [name for name in changed if name in before and not below(name, case.replaces)]:
        return f"changed or removed {', '.join(lost[:3])}"
    if outside := [name for name in changed if not below(name, case.outs)]:
        return f"left {', '.join(outside[:3])}"
    if status == 0:
        for name in changed:
            if isinstance(after.get(name), bytes) and (bad := bad_result(name, after[name])):
                return "accepted: " + bad
        if re.search(r"\b(nan|inf)\b", out, re.I):
            return "accepted: prints nan or inf"
        if case.same and after.get(case.same) != before.get(case.same):
            return f"accepted: {case.same} is another one than without the damage"
        if case.expected == "refuse":
            return "accepted what must be refused"
    if status == 2 and case.expected == "accept":
        return f"refused what is harmless: {errors[0][:120]}"


# ---- many cases ----

def run_case(base: Path, seed: int, i: int, quick: bool = False, loud: bool = False):
    """Case i of a seed, in a copy of `base`: its family, and a line about what is wrong, or None."""
    names, rng = list(FAMILIES), random.Random(f"{seed}/{i}")
    family = names[i % len(names)]
    with tempfile.TemporaryDirectory() as root:
        shutil.copytree(base.parent, root, symlinks=True, dirs_exist_ok=True)
        case = Case(Path(root) / "work", rng, quick)
        FAMILIES[family](case)
        before = snapshot(root)
        with limited(case.size):
            outcome = start(case.args[0], case.args[1:], case.work)
        wrong = judge(case, before, snapshot(root), *outcome)
        if loud:
            print(case.what, shlex.join(case.args), *outcome[1:3], sep="\n")
            traceback.print_exception(outcome[3])
    command = shlex.join(arg if len(arg) < 60 else f"{arg[:50]}… ({len(arg)})" for arg in case.args)
    again = f"--seed {seed} --case {i}{' --quick' * quick}"
    said = f"{family} | {case.what[:90]} | {command} | {wrong}  ({again})"
    return family, wrong and said.replace(root, "…").encode(errors="backslashreplace").decode()


def fuzz(seed: int, n: int, quick: bool = False, say=print) -> list[str]:
    """n cases of a seed, or quick ones: the lines about those that misbehave."""
    bad, cases, wrong = [], Counter(), Counter()
    with tempfile.TemporaryDirectory() as root:
        base = write_base(Path(root) / "work")
        for i in range(n):
            family, line = run_case(base, seed, i, quick)
            cases[family] += 1
            if line:
                wrong[family] += 1
                bad.append(line)
                say(line)
    say("\n".join(f"{family:<10}{wrong[family]:>5} of {cases[family]}" for family in cases))
    return bad


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=900, help="how many cases (default 900)")
    parser.add_argument("--case", type=int, help="only this one, with what it printed")
    parser.add_argument("--quick", action="store_true", help="leave out the commands that take longest")
    args = parser.parse_args()
    begin = time.perf_counter()
    if args.case is None:
        bad = fuzz(args.seed, args.n, args.quick, say=lambda line: print(line, flush=True))
        print(f"{len(bad)} of {args.n} misbehave, {time.perf_counter() - begin:.0f} s")
        sys.exit(len(bad) > args.n / 100)
    with tempfile.TemporaryDirectory() as root:
        base = write_base(Path(root) / "work")
        print(run_case(base, args.seed, args.case, args.quick, loud=True)[1] or "as it should")


if __name__ == "__main__":
    main()
