"""README.md and docs/: every command runs, every link leads somewhere, every name that is given exists."""
import ast
import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

from erasing import make_pairs, text_change
from helpers import AIRPLANE, CLOSED, link_mini
from plumbing.edits import cross_attention, read_edit
from realera import Settings
from sample import Model, Text
from starts import run

ROOT = Path(__file__).parent.parent
MINI = ROOT / "mini"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COURSE = sorted((ROOT / "course").glob("*.md"))

# Lines that are no command of ours.
SHELL = ["git clone <this repository's address> realera", "cd realera", "pip install -r requirements.txt",
         "pip install -r requirements.txt --extra-index-url https://download.pytorch.org/whl/cpu",
         "pip install safetensors tokenizers", "pip install -r requirements-test.txt", "python -m pytest",
         "python -m pytest --model=models/stable-diffusion-v1-4",
         "python -m pytest --model=models/stable-diffusion-v1-4 --device=cuda"]
# What a command must contain to be left out here, and why. Its flags are checked against its --help.
LEFT_OUT = {"CompVis/stable-diffusion-v1-4": "needs the weights of SD v1.4",
            "--data emoji": "needs the emoji, and hours",
            "experiments/tables.py": "needs minutes: other tests run it small",
            "experiments/many_concepts.py": "needs minutes: other tests run it small",
            "experiments/frontier.py": "needs minutes: other tests run it small",
            "experiments/compare.py": "needs minutes: other tests run it small",
            "experiments/tasks.py": "needs minutes: other tests run it small",
            "experiments/bench.py": "needs minutes: other tests run it small"}
# What makes the others quick.
FEW = ["--n", "1", "--steps", "1"]
ERASE = ["--no-pictures", "--overwrite"]
LORA = ["--lora-steps", "1", "--set", "trajectories=2", "batch=1"]
QUICK = {"realera.py": ERASE, "rece.py": ERASE, "baselines/uce.py": ERASE,
         "baselines/speed.py": ERASE, "baselines/vocabulary.py": ERASE,
         "baselines/sld.py": ERASE, "baselines/surgery.py": ERASE,
         "baselines/spm.py": [*ERASE, "--set", "iterations=1"], "my_method.py": ERASE,
         "baselines/esd.py": [*ERASE, "--set", "iterations=1"],
         "sample.py": FEW, "eval_clip.py": FEW,
         "experiments/attack.py": [*FEW, "--choose", "1", "--budget", "1"], "experiments/lora_rank.py": FEW,
         "experiments/preview_worth.py": [*FEW, "--classes", "1"]}


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text("utf-8"), re.S)


def commands(path: Path) -> list[str]:
    lines = [line for block in blocks(path, "bash") for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in (line.split(" #")[0].strip() for line in lines) if line]


def test_the_python_of_the_docs_runs_in_another_folder(narrow, tmp_path):
    os.symlink(narrow, tmp_path / "mini")
    code = blocks(ROOT / "docs/commands.md", "python")[0] + "\nassert W.keys() and numbers['numbers']\n"
    (tmp_path / "notebook.py").write_text(code, encoding="utf-8")
    run(tmp_path / "notebook.py", cwd=tmp_path, PYTHONPATH=ROOT)


def own_method() -> str:
    return blocks(ROOT / "docs/own-method.md", "python")[0]


def test_readme_has_two_pages():
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1300


def test_every_command_runs(narrow, tmp_path, monkeypatch):
    """In the order of the pages, the README first, in one folder, with fewer steps and pictures; in one
    process, as fifty starts would take minutes."""
    os.symlink(narrow, tmp_path / "mini")
    (tmp_path / "mine.csv").write_text("prompt,seed\na photo of the ship,1\n")
    (tmp_path / "prompts.txt").write_text("a photo of the ship\na photo of the jet\n")
    (tmp_path / "my_method.py").write_text(own_method(), "utf-8")
    monkeypatch.chdir(tmp_path)

    draw = Model.draw

    def grey(model, prompts, seeds, *args, **more):
        """One look at the model, for all the pictures: what is counted is looked at by other tests."""
        one = draw(model, prompts[:1], seeds[:1], *args, **more)
        return one.expand(len(prompts), -1, -1, -1).clone()

    def start(script: str, *args: str) -> None:
        path = tmp_path / script if script == "my_method.py" else ROOT / script
        monkeypatch.setattr(sys, "argv", [script, *args])
        with monkeypatch.context() as patch:
            patch.syspath_prepend(path.parent)                    # as Python does
            runpy.run_path(str(path), run_name="__main__")

    @functools.cache
    def shown(script: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit, match="0"):
            start(script, "--help")
        return out.getvalue()

    lines, ran = list(dict.fromkeys(line for page in PAGES + COURSE for line in commands(page))), 0
    assert set(SHELL) <= set(lines)
    for line in lines:
        if line in SHELL:
            continue
        python, script, *args = shlex.split(line.removeprefix("PYTHONPATH=. "))
        assert python == "python", line
        if any(why in line for why in LEFT_OUT):
            flags = [arg for arg in args if arg.startswith("--")]
            assert all(re.search(rf"{flag}\b", shown(script)) for flag in flags), line
            continue
        aligns = script == "realera.py" and "--lora-steps" in args
        with monkeypatch.context() as patch:
            if script == "eval_clip.py" or script.startswith("experiments/"):
                patch.setattr(Model, "draw", grey)
            start(script, *args, *QUICK.get(script, []), *(LORA if aligns else []))
        ran += 1
    assert ran >= 25


def test_own_method_is_a_method_like_ours(tmp_path):
    """The page's file in a folder of its own, as typed: it writes an edit that does what the page says."""
    (tmp_path / "my_method.py").write_text(own_method(), "utf-8")
    (tmp_path / "mini").mkdir()
    link_mini(tmp_path / "mini", steps=8)
    line = next(line for line in commands(ROOT / "docs/own-method.md") if "my_method.py" in line)
    args = shlex.split(line)[2:]
    done = run(tmp_path / args[0], *args[1:], "--n", 1, cwd=tmp_path, PYTHONPATH=ROOT)
    out = tmp_path / "out/airplane-least"
    assert "wrote out/airplane-least/\n" in done.stdout and (out / "before_after.png").exists()

    W0, pair = cross_attention(MINI), make_pairs(["airplane"], ["sky"], "object", Text(MINI), "tail", 0)[0]
    W = read_edit(out, MINI)
    delta, e, e_star = text_change(W0, W), pair.block().mean(0), pair.block_star().mean(0)
    assert ((e + delta @ e) - e_star).norm() < 0.01 * (e_star - e).norm()            # but for float16
    singular = torch.linalg.svdvals(delta)
    assert singular[1] < 0.02 * singular[0]                       # rank one

    table = json.loads((out / "run.json").read_text("utf-8"))["table"]
    after = {row["prompt"]: row["after"]["mostly"] for row in table}
    assert after["a photo of the airplane"] != "airplane"
    assert after["a photo of the automobile"] == "automobile" and after["a photo of the horse"] == "horse"


def test_what_the_readme_quotes_is_printed(tmp_path):
    """The lines on rows and closed form; those on the LoRA and the pictures would take a minute."""
    quoted = blocks(ROOT / "README.md", "text")[0].splitlines()[:2]
    done = run("realera.py", *AIRPLANE, *CLOSED, cwd=tmp_path)
    assert done.stdout.splitlines()[:2] == quoted


# ---- links and names ----

def anchors(path: Path) -> list[str]:
    """GitHub's: lower case, punctuation gone, spaces to hyphens."""
    text = re.sub(r"```.*?```", "", path.read_text("utf-8"), flags=re.S)
    return [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.M)]


@pytest.mark.parametrize("page", [*PAGES, *COURSE, ROOT / "CHANGELOG.md", MINI / "README.md"],
                         ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    text = re.sub(r"```.*?```|`[^`]*`", "", page.read_text("utf-8"), flags=re.S)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchors(target).count(anchor) == 1, f"{page.name}: {link}"


def test_every_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text("utf-8")
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in text] == []


def defined(path: Path) -> set[str]:
    """Functions, classes and Class.method of a file."""
    names = set()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{inner.name}" for inner in getattr(node, "body", ())
                      if isinstance(inner, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", PAGES + COURSE, ids=lambda page: page.name)
def test_files_functions_and_tests_that_are_named_exist(page):
    text, own = page.read_text("utf-8"), {"my_method.py"}
    for path, names in re.findall(r"\[[\w/]+\.py\]\((\S+?)\): ((?:`[\w.]+`(?:, )?)+)", text):
        assert set(re.findall(r"[\w.]+", names)) <= defined(page.parent / path), (path, names)
    tests = {name for path in (ROOT / "tests").glob("test_*.py") for name in defined(path)}
    assert set(re.findall(r"`(test_\w+)`", text)) <= tests
    for name in re.findall(r"(?:python |`)([\w/]+\.py)\b", text):
        assert (ROOT / name).exists() or (MINI / name).exists() or name in own, name


def test_every_program_is_in_the_list_of_programs():
    text = (ROOT / "docs/commands.md").read_text("utf-8")
    programs = [path.relative_to(ROOT).as_posix() for pattern in ("*.py", *(f"{d}/*.py" for d in (
        "baselines", "tools", "experiments", "mini", "course"))) for path in ROOT.glob(pattern)
                if "__main__" in path.read_text("utf-8")]
    assert len(programs) >= 15
    assert [program for program in programs if f"| [{program}](../{program}) |" not in text] == []


def test_the_picture_of_the_floors_has_every_root_file_and_folder_of_code():
    text = (ROOT / "docs/floors.svg").read_text("utf-8")
    names = [path.name for path in ROOT.glob("*.py")]
    names += [f"{path.name}/" for path in ROOT.iterdir() if [*path.glob("*.py")] and path.name != "tests"]
    assert len(names) >= 15 and [name for name in names if name not in text] == []


def test_new_paths_in_the_list_of_changes_exist():
    rows = re.findall(r"^\|(.*)\|(.*)\|$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    moved = [path for _, now in rows for path in re.findall(r"python (\S+\.py)", now)]
    assert len(moved) >= 7 and all((ROOT / path).exists() for path in moved)
    modules = [name for _, now in rows
               for name in re.findall(r"`((?:plumbing|tools|experiments)\.\w+)`", now)]
    assert len(modules) >= 8 and all((ROOT / f"{name.replace('.', '/')}.py").exists() for name in modules)
    gone = [path for before, _ in rows for path in re.findall(r"python (\S+\.py)", before)]
    assert len(gone) >= 7 and not any((ROOT / path).exists() for path in gone)


def test_every_setting_of_realera_stands_among_the_readings():
    text = (ROOT / "docs/readings.md").read_text("utf-8")
    assert [field.name for field in dataclasses.fields(Settings) if f"`{field.name}`" not in text] == []


def test_torchrun_understands_the_command_lines_that_are_given_for_it():
    """Under Python 3.11 it takes tables.py's --n for short for a flag of its own, unless -- comes first."""
    lines = [line.split("torchrun ")[1].split("#")[0] for path in (*ROOT.glob("*/*.py"), *PAGES)
             for line in path.read_text("utf-8").splitlines()
             if "torchrun --" in line and path.parent.name != "tests"]
    assert len(lines) >= 2
    for line in lines:
        parsed = get_args_parser().parse_args([x for x in shlex.split(line.split("`")[0]) if x != "…"])
        assert (ROOT / parsed.training_script).exists(), line


def test_python_versions_are_said_in_one_place():
    """The README; the workflow runs the tests on the one that it names for them."""
    said = {page: re.findall(r"\b3\.1\d\b", page.read_text("utf-8")) for page in [*PAGES, MINI / "README.md"]}
    assert len(said.pop(PAGES[0])) == 2 and not any(said.values())
    tests = re.search(r"Tried with Python (3\.\d+)", PAGES[0].read_text("utf-8"))[1]
    assert f'python-version: "{tests}"' in (ROOT / ".github/workflows/tests.yml").read_text("utf-8")
