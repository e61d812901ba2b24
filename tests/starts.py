"""Programs as a user types them, each in a process of its own.

The processes are forked from one that has torch imported already: a start costs 0.1 s and not 3. What must
see a bare interpreter (its encodings, its paths, what is imported and when) starts one with subprocess.
"""
import multiprocessing
import os
import runpy
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "numpy", "safetensors.torch", "tokenizers",
                                "torch._dynamo"])                 # the first optimizer's 3 seconds


def as_typed(argv, cwd, environment, out, err):
    """In the new process: python SCRIPT ARGS, with stdout and stderr in files."""
    for file, stream in ((out, sys.stdout), (err, sys.stderr)):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, stream.fileno())
    os.chdir(cwd)
    os.environ.update(environment)
    own = [str(Path(argv[0]).parent), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:] = own + [path for path in sys.path if path not in ("", str(ROOT), str(ROOT / "tests"))]
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def start(script, *args, cwd, out=os.devnull, err=os.devnull, **environment):
    """Start a program of the repository; returns its multiprocessing.Process, which may be killed."""
    argv = [str(ROOT / script), *map(str, args)]
    more = {name: str(value) for name, value in environment.items()}
    process = CONTEXT.Process(target=as_typed, args=(argv, str(cwd), more, str(out), str(err)), daemon=False)
    process.start()
    return process


def finished(command, cwd=".", env=None, **_):
    """For subprocess.run([python, SCRIPT, ARGS], capture_output=True)."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = start(*command[1:], cwd=cwd, out=out, err=err, **(env or {}))
        process.join()
        return CompletedProcess(command, process.exitcode, out.read_text("utf-8"), err.read_text("utf-8"))


def run(script, *args, cwd, status=0, **environment):
    """Run a program to its end, with that exit status; returns what it printed."""
    done = finished([sys.executable, script, *args], cwd, environment)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    return done
