"""Set-up for every test: our modules can be imported, the reference libraries are offline and quiet."""
import importlib
import os
import re
import runpy
import sys

import pytest

# Before anything imports the libraries: they read these once.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1",
                  TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false",
                  OMP_NUM_THREADS="1",                            # pytest.ini starts two workers
                  CUDA_VISIBLE_DEVICES="")                        # bytes and tolerances are a CPU's


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests at Stable Diffusion's full size")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs gigabytes of memory and minutes; runs only with --slow")


def pytest_collection_modifyitems(config, items):
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow to run it"))


@pytest.fixture(scope="session")
def here():
    """Run a script's main in this process; returns nothing, or raises SystemExit with the exit status."""
    from plumbing.cli import command_line                         # imports torch: after os.environ

    def start(script, *args, cwd):
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(cwd)
            patch.setattr(sys, "argv", [script, *map(str, args)])
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            if hasattr(module, "main"):
                command_line(module.main)
            else:                                                 # a method: its last line is `run`
                runpy.run_path(module.__file__, run_name="__main__")
    return start


@pytest.fixture
def refused(here, capsys):
    """Run a script's main on bad input: one clear line on stderr, exit status 2, and nothing left behind."""
    def check(script, *args, cwd, match):
        before = sorted(cwd.rglob("*"))
        with pytest.raises(SystemExit) as end:
            here(script, *args, cwd=cwd)
        errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
        assert end.value.code == 2
        assert len(errors) == 1 and errors[0].startswith("error: ") and re.search(match, errors[0]), errors
        assert sorted(cwd.rglob("*")) == before
    return check
