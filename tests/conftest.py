"""Set-up for every test: our modules can be imported, the reference libraries are offline and quiet; what
several test files start from."""
import importlib
import os
import re
import runpy
import shutil
import sys

import pytest
from filelock import FileLock

# Before anything imports the libraries: they read these once.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_HUB_DISABLE_PROGRESS_BARS="1",
                  TRANSFORMERS_VERBOSITY="error", DIFFUSERS_VERBOSITY="error", TOKENIZERS_PARALLELISM="false")
if any(arg.startswith(("--model", "--device")) for arg in sys.argv):
    os.environ["OWN_MODEL"] = "1"                                 # for xdist's workers, which see no flag
OWN_MODEL = "OWN_MODEL" in os.environ                             # test_parity.py alone: all threads and GPUs
if not OWN_MODEL:
    os.environ.update(OMP_NUM_THREADS="1",                        # the tests run side by side
                      CUDA_VISIBLE_DEVICES="")                    # bytes and tolerances are a CPU's
pytest.register_assert_rewrite("helpers")
from safetensors.torch import load_file

import helpers
from eval_clip import judge
from helpers import AIRPLANE, CLOSED, MINI, SHIP
from plumbing.cli import command_line
from sample import Model, Text


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests at Stable Diffusion's full size")
    parser.addoption("--model", help="only compare us with diffusers, on this folder: --model=FOLDER")
    parser.addoption("--device", default="cpu", help="of that comparison: cpu (default), cuda, mps")


def pytest_ignore_collect(collection_path):
    """With a model of one's own, test_parity.py alone."""
    others = collection_path.match("test_*.py") and collection_path.stem != "test_parity"
    return True if OWN_MODEL and others else None


ROWS = []                       # of the table of test_parity.py


def pytest_runtest_logreport(report):
    if report.when == "call":
        ROWS.extend(row for name, row in report.user_properties if name == "parity")


def pytest_terminal_summary(terminalreporter):
    if OWN_MODEL and ROWS:
        say = terminalreporter.write_line
        say(f"\n{'':<32}{'difference':>12}{'tolerance':>12}{'s ours':>10}{'theirs':>10}")
        for what, difference, tolerance, ours, theirs in ROWS:
            mark = "" if difference <= tolerance else "  too large"
            say(f"{what:<32}{difference:>12.1e}{tolerance:>12.1e}{ours:>10.2f}{theirs:>10.2f}{mark}")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Two workers, where pytest-xdist is installed and the command says nothing of them."""
    asked = getattr(config.option, "numprocesses", 0) is not None or config.option.usepdb
    if not asked and "PYTEST_XDIST_WORKER" not in os.environ:
        config.option.numprocesses, config.option.dist, config.option.loadscopereorder = 2, "loadscope", False


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: needs minutes, or gigabytes of memory; runs only with --slow")


def pytest_collection_modifyitems(config, items):
    # the longest files first, so that no worker waits for the other at the end
    items.sort(key=lambda item: item.path.stem not in (
        "test_lesson", "test_readme", "test_realera", "test_attack", "test_eval_clip", "test_tables"))
    for item in items:
        if item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: give --slow to run it"))


# ---- programs ----

@pytest.fixture(scope="session")
def here():
    """Run a script's main in this process; returns nothing, or raises SystemExit with the exit status."""
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
        errors = [line for line in capsys.readouterr().err.splitlines()
                  if not line.startswith("warning:") and not line.endswith(" …")]            # progress
        assert end.value.code == 2
        assert len(errors) == 1 and errors[0].startswith("error: ") and re.search(match, errors[0]), errors
        assert sorted(cwd.rglob("*")) == before
    return check


# ---- mini/, loaded for each test file anew, and damaged copies ----

@pytest.fixture(scope="module")
def model():
    return Model(MINI)


@pytest.fixture(scope="module")
def text():
    return Text(MINI)


@pytest.fixture(scope="module")
def clip():
    return judge(None, MINI, "cpu")


@pytest.fixture
def broken(tmp_path):
    """A copy of mini/ to damage (without its CLIP, which erasing does not need)."""
    shutil.copytree(MINI, tmp_path / "model",
                    ignore=shutil.ignore_patterns("clip", "work", "*.py", "*.jpg", "*.md"))
    return tmp_path / "model"


@pytest.fixture(scope="session")
def quick(once):
    """mini/, linked, whose pictures take one step."""
    return once("quick", lambda folder: helpers.link_mini(folder, steps=1))


@pytest.fixture(scope="session")
def narrow(once):
    """mini/ with tiny random networks: quick, and its pictures show nothing."""
    return once("narrow", helpers.write_narrow)


@pytest.fixture
def other(tmp_path):
    """mini/ without its CLIP, linked; its U-Net may be replaced."""
    (tmp_path / "model").mkdir()
    for name in ("tokenizer", "text_encoder", "unet", "vae", "scheduler", "defaults.json"):
        (tmp_path / "model" / name).symlink_to(MINI / name)
    (tmp_path / "work").mkdir()
    return tmp_path / "model"


# ---- small networks, saved by the reference libraries ----

@pytest.fixture
def unet_folder(tmp_path):
    helpers.theirs_unet(**helpers.UNETS["one level"]).save_pretrained(tmp_path / "unet")
    return tmp_path / "unet"


@pytest.fixture
def vae_folder(tmp_path):
    helpers.theirs_vae(**helpers.VAES["one layer"]).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def text_folder(tmp_path):
    helpers.theirs_text(**helpers.TEXTS["short"]).save_pretrained(tmp_path / "text_encoder")
    return tmp_path / "text_encoder"


# ---- what takes long to make: once for all workers, and only read by the tests ----

@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(name, make): a folder filled by make(folder), by the first worker that asks; others wait."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent                                        # which the workers share

    def filled(name, make):
        folder, made = base / name, base / f"{name}.made"
        with FileLock(base / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(folder, ignore_errors=True)         # another worker may have failed on the way
                folder.mkdir()
                make(folder)
                made.touch()
        return folder
    return filled


@pytest.fixture(scope="session")
def edit(once):
    return once("edit", lambda folder: helpers.erase(folder, "airplane")) / "airplane"


@pytest.fixture(scope="session")
def teapot(once):
    """An edit whose concept is none of the ten classes."""
    return once("teapot", lambda folder: helpers.erase(folder, "teapot")) / "teapot"


@pytest.fixture(scope="session")
def edits(here, once, quick):
    """Two edits made apart, with LoRAs of different ranks and seeds; and the same closed forms without."""
    def make(folder):
        few = ["--lora-steps", 1, "--no-pictures", "--model", quick, "--set", "trajectories=2", "batch=1"]
        here("realera.py", *AIRPLANE, *few, "--out", "a", cwd=folder)
        here("realera.py", *SHIP, *few, "rank=2", "--seed", 5, "--out", "b", cwd=folder)
        for name, concept in (("a closed", AIRPLANE), ("b closed", SHIP), ("joint", AIRPLANE + SHIP)):
            here("realera.py", *concept, *CLOSED, "--out", name, cwd=folder)
    return once("edits", make)


@pytest.fixture(scope="session")
def sd2(once):
    """The folder of a small random model with the structure of Stable Diffusion 2.1-base."""
    return once("sd2", lambda folder: helpers.write_model(folder / "model", helpers.V2)) / "model"


@pytest.fixture(scope="session")
def sd21(once, sd2):
    """The same model as if it had learned to predict v: Stable Diffusion 2.1, of 768 pixels."""
    def make(folder):
        shutil.copytree(sd2, folder / "model")
        helpers.edit_json(folder / "model/scheduler/scheduler_config.json", prediction_type="v_prediction")
    return once("sd21", make) / "model"


@pytest.fixture(scope="session")
def sd1(once):
    """A folder, and the same model as a single file with everything else beside it."""
    def make(root):
        folder, alone = helpers.write_model(root / "model", helpers.V1), root / "alone"
        shutil.copytree(folder, alone, ignore=shutil.ignore_patterns("*.safetensors"))
        parts = {part: load_file(folder / part / f"{stem}.safetensors")
                 for part, (_, stem) in helpers.NETWORKS.items()}
        helpers.write_single_file(alone / "dream.safetensors", parts)
    root = once("sd1", make)
    return root / "model", root / "alone/dream.safetensors"


@pytest.fixture(scope="session")
def tiny(once):
    """The folder of a random model with one level, small enough to train in a test."""
    version = helpers.V1 | {"unet": helpers.UNETS["one level"]}
    return once("tiny", lambda folder: helpers.write_model(folder / "model", version)) / "model"
