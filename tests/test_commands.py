"""What the README says: its commands run, its numbers are those of the files."""
import contextlib
import dataclasses
import functools
import io
import os
import re
import runpy
import shlex
import sys

import pytest
from torch.distributed.run import get_args_parser

from helpers import MINI, ROOT
from realera import Settings


def readme_commands():
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    lines = [line.split(" #")[0].strip() for block in blocks
             for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("python ")]


def test_readme_has_commands():
    assert len(readme_commands()) >= 6


def test_every_command_of_the_readme_runs(tmp_path, monkeypatch):
    """With fewer steps and pictures; what needs SD v1.4, CIFAR-10 or long, and what test_tables.py and
    test_bench.py run, has only its flags checked. In this process, as twenty starts would take a minute."""
    os.symlink(MINI, tmp_path / "mini")
    monkeypatch.chdir(tmp_path)

    def start(script, *args):
        monkeypatch.setattr(sys, "argv", [script, *args])
        runpy.run_path(str(ROOT / script), run_name="__main__")

    @functools.cache
    def shown(script):
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit, match="0"):
            start(script, "--help")
        return out.getvalue()

    (tmp_path / "mine.csv").write_text("prompt,seed\na photo of the ship,1\n")
    (tmp_path / "prompts.txt").write_text("a photo of the ship\na photo of the jet\n")
    for command in readme_commands():
        script, *args = shlex.split(command)[1:]
        if script == "-m":
            assert args == ["pytest"]                             # as these tests were started
        elif "CompVis/stable-diffusion-v1-4" in args or script.startswith(("experiments/", "mini/")):
            assert all(flag in shown(script) for flag in args if flag.startswith("--")), command
        else:
            quick = ["--lora-steps", "1", "--no-pictures", "--overwrite", "--set", "trajectories=2",
                     "batch=1"]
            few = ["--n", "1", "--steps", "2"]
            small = {"realera.py": quick, "rece.py": quick[2:4], "sample.py": few, "eval_clip.py": few,
                     "tools/export.py": [], "tools/merge.py": []}[script]
            start(script, *args, *small)


def test_readme_states_line_counts_and_files_keep_their_ceilings():
    """The file guide's numbers are those of the files. No file exceeds 110 columns, nor 320 lines in the root
    and 330 elsewhere."""
    readme = (ROOT / "README.md").read_text()
    folders = ("plumbing", "baselines", "tools", "experiments")
    for path in [*ROOT.glob("*.py"), *(path for folder in folders for path in (ROOT / folder).glob("*.py"))]:
        lines, name = path.read_text().splitlines(), path.relative_to(ROOT).as_posix()
        assert len(lines) <= (320 if path.parent == ROOT else 330) and max(map(len, lines)) <= 110, path
        row = rf"\| `{name}` \| {len(lines)} \|"
        assert re.search(row, readme), f"{name} has {len(lines)} lines"


def test_settings_are_printed_in_the_readme_as_they_are():
    readme = (ROOT / "README.md").read_text()
    for field in dataclasses.fields(Settings):
        assert f"`{field.name}`" in readme, field.name


def test_torchrun_understands_the_command_lines_that_are_given_for_it():
    """Under Python 3.11 it takes tables.py's --n for short for a flag of its own, unless -- comes first."""
    paths = [ROOT / "README.md", *ROOT.glob("*.py"),
             *(path for path in ROOT.glob("*/*.py") if path.parent.name != "tests")]
    lines = [line.split("torchrun ")[1].split("#")[0] for path in paths
             for line in path.read_text().splitlines() if "torchrun --" in line]
    assert lines
    for line in lines:
        parsed = get_args_parser().parse_args([x for x in shlex.split(line.split("`")[0]) if x != "…"])
        assert (ROOT / parsed.training_script).exists(), line
