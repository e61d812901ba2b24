"""The order of the house: which files, which floor, arrows only down; every program starts from anywhere."""
import ast
import importlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = ["plumbing/", "clip_text unet vae diffusion lora", "sample", "eval_clip", "erasing",
          "realera rece baselines/", "tools/", "experiments/", "mini/", "course/"]
LINE = ("sys.path.insert(0, str(Path(__file__).resolve().parents[1]))"
        "       # our modules lie one folder up")
FILES = sorted(path.relative_to(ROOT) for pattern in ("*.py", "*/*.py", "*/*/*.py")
               for path in ROOT.glob(pattern)
               if path.relative_to(ROOT).parts[0] not in ("tests", "out") and path.parent.name[0] != ".")
NAMES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def floor(path):
    """Of realera.py or baselines/uce.py: its index in FLOORS."""
    key = f"{path.parts[0]}/" if len(path.parts) > 1 else path.stem
    return next(i for i, names in enumerate(FLOORS) if key in names.split())


def imported(path):
    """Names of the modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def arrows_between(files):
    return {path: {NAMES[name] for name in imported(path) if name in NAMES} - {path} for path in files}


def reached(path, arrows):
    """All files that a file's imports lead to."""
    found, todo = set(), [path]
    while todo:
        new = arrows[todo.pop()] - found
        found |= new
        todo += new
    return found


def is_program(path):
    return 'if __name__ == "__main__":' in (ROOT / path).read_text(encoding="utf-8")


def test_the_root_holds_ten_files():
    assert {path.stem for path in FILES if len(path.parts) == 1} == set(
        "realera rece erasing unet clip_text vae diffusion lora sample eval_clip".split())


def test_what_is_taken_from_our_modules_is_there():
    """A name that a module no longer has, in a line that no other test runs."""
    seen = 0
    for path in FILES:
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules |= {a.asname or a.name: a.name for a in node.names if a.name in NAMES}
            elif isinstance(node, ast.ImportFrom):
                modules |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names
                            if f"{node.module}.{a.name}" in NAMES}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in modules:
                name, seen = modules[node.value.id], seen + 1
                assert hasattr(importlib.import_module(name), node.attr), f"{path}: {name}.{node.attr}"
    assert seen > 100


def test_arrows_point_down_and_in_no_circle():
    arrows = arrows_between(FILES)
    assert sum(map(len, arrows.values())) > 100                   # it does see them
    assert not [(str(a), str(b)) for a in FILES for b in arrows[a] if floor(b) > floor(a)]
    assert not [str(a) for a in FILES if a in reached(a, arrows)]


def test_an_import_inside_a_function_is_of_somebody_elses_library():
    for path in FILES:
        for outer in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
            for node in ast.walk(outer) if isinstance(outer, ast.FunctionDef) else ():
                names = ([node.module] if isinstance(node, ast.ImportFrom) else
                         [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])
                assert not NAMES.keys() & set(names), (str(path), names)


def test_programs_in_folders_find_the_root_by_one_line():
    for path in FILES:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        wanted = len(path.parts) > 1 and path.parts[0] != "plumbing" and is_program(path)
        assert (lines.count(LINE), sum("sys.path" in one for one in lines)) == (wanted, wanted), path


# As typed, one after the other in a process that imports torch once: each finds our modules by itself.
ASK = """
import runpy, sys
import torch
plain, modules = sys.path[1:], set(sys.modules)
for i, program in enumerate(sys.argv[1:]):
    print(end="\\0" * (i > 0), flush=True)
    sys.path[:], sys.argv = [program.rpartition("/")[0], *plain], [program, "--help"]
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(ROOT):
            del sys.modules[name]
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        assert end.code == 0, (program, end.code)
""".replace("ROOT", repr(f"{ROOT}/"))


def test_every_program_answers_help_from_another_folder(tmp_path):
    programs = [path for path in FILES if is_program(path)]
    assert len(programs) >= 16

    done = subprocess.run([sys.executable, "-c", ASK, *(str(ROOT / path) for path in programs)], cwd=tmp_path,
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    for path, said in zip(programs, done.stdout.split("\0"), strict=True):
        doc = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        assert doc.splitlines()[0] in said, str(path)
    assert list(tmp_path.iterdir()) == []


def test_a_folders_program_runs_as_a_module_too():
    done = subprocess.run([sys.executable, "-m", "baselines.uce", "--help"], cwd=ROOT, capture_output=True)
    assert done.returncode == 0


def test_the_list_of_methods_names_each_with_its_first_line(tmp_path):
    done = subprocess.run([sys.executable, ROOT / "erasing.py"], cwd=tmp_path, capture_output=True,
                          encoding="utf-8")
    for path in [Path("realera.py"), Path("rece.py"), *(p for p in FILES if p.parts[0] == "baselines")]:
        doc = ast.get_docstring(ast.parse((ROOT / path).read_text(encoding="utf-8")))
        assert f"{path.as_posix()} " in done.stdout and doc.splitlines()[0] in done.stdout


def test_files_keep_their_ceilings():
    """No file exceeds 110 columns, nor 330 lines (training: 700)."""
    for path in FILES:
        lines = (ROOT / path).read_text(encoding="utf-8").splitlines()
        most = 700 if path.name == "train.py" else 330
        assert len(lines) <= most and max(map(len, lines), default=0) <= 110, path
