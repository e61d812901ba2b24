"""bench.py as a user runs it; its baseline, counts and errors."""
import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import bench
from helpers import MINI, ROOT
from plumbing import UserError
from plumbing.cli import command_line

CPU = torch.device("cpu")


def run(*args, cwd, **more):
    return subprocess.run([sys.executable, ROOT / "experiments/bench.py", *map(str, args)], cwd=cwd,
                          capture_output=True, text=True, **more)


# ---- the command ----

def test_a_short_run_prints_and_writes_a_table(here, tmp_path, capsys):
    here("experiments/bench.py", "--only", "unet-1", "closed-form-gram", "--runs", 2, "--device", "cpu",
         cwd=tmp_path)
    printed = capsys.readouterr().out
    product, unet, edit, again = json.loads((tmp_path / "out/bench/mini-cpu.json").read_text())
    best = min(product["ours, ms"][1], again["ours, ms"][1])
    assert product["GFLOP"] == pytest.approx(2 * 2048 ** 3 / 1e9, abs=1e-3)
    for row in (unet, edit):
        for name in ("ours, ms", "theirs, ms", "ours / theirs, %"):
            middle, low, high = row[name]
            assert 0 < low <= middle <= high
        ratio = sorted([row["ours / theirs, %"][1], row["ours / theirs, %"][2]])
        assert ratio[0] <= 100 * row["ours, ms"][2] / row["theirs, ms"][1]
        assert row["floor, ms"] == pytest.approx(
            row["GFLOP"] * best / product["GFLOP"], rel=0.01, abs=0.01)
    table = (tmp_path / "out/bench/mini-cpu.md").read_text()
    assert table in printed and "| UNet, batch 1 |" in table
    rows = list(csv.DictReader((tmp_path / "out/bench/mini-cpu.csv").open()))
    assert float(rows[1]["ours, ms"]) == unet["ours, ms"][0]
    errors = re.search(r"‖ΔW‖: ours (\S+), theirs (\S+)", printed)
    ours, theirs = map(float, errors.groups())
    assert ours <= 1e-6 <= theirs


@pytest.mark.parametrize("args, match", [
    (["--runs", "0"], "--runs"), (["--steps", "0"], "--steps"), (["--device", "cuda"], "not available")])
def test_bad_input_is_one_line_and_writes_nothing(args, match, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench.py", *args])
    with pytest.raises(SystemExit) as end:
        command_line(bench.main)
    assert end.value.code == 2 and match in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_without_diffusers_it_says_what_to_install(tmp_path):
    (tmp_path / "diffusers.py").write_text("raise ImportError")
    done = run(cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "pip install -r requirements-test.txt" in done.stderr


# ---- what it counts and measures ----

@pytest.mark.parametrize("run, expected", [
    (lambda: torch.nn.Linear(6, 5)(torch.ones(3, 6)), 2 * 3 * 6 * 5),
    (lambda: torch.nn.Conv2d(3, 7, 3, padding=1)(torch.ones(2, 3, 8, 8)), 2 * 2 * 8 * 8 * 7 * 3 * 9),
    (lambda: torch.nn.functional.scaled_dot_product_attention(*torch.ones(3, 2, 4, 16, 8)),
     2 * (2 * 2 * 4 * 16 * 16 * 8)),                               # q kᵀ and (q kᵀ) v
    (lambda: torch.ones(3, 6) + 1, 0)])
def test_flop_equal_a_count_by_hand(run, expected):
    assert bench.flops(run) == expected


def test_flop_of_the_gradient_are_counted():
    weight, x = torch.ones(6, 5, requires_grad=True), torch.ones(3, 6)
    assert bench.flops(lambda: (x @ weight).sum().backward()) == 2 * (2 * 3 * 6 * 5)


def test_both_sides_take_turns_after_a_warm_up():
    calls = []
    row = bench.compare("row", lambda: calls.append("ours"), lambda: calls.append("theirs"), 3, CPU)
    assert calls == ["ours", "theirs"] * 4 + ["ours"] and "ours, GiB" not in row and "GFLOP" not in row


def test_a_process_of_its_own_tells_its_seconds_and_what_it_adds_to_memory(tmp_path):
    rows = bench.Rows(Path(MINI), CPU, torch.float32, 1)
    seconds, gib = rows.child("time.sleep(0.2); x = torch.ones(2 ** 26)")()
    assert 0.2 <= seconds < 10
    if Path("/proc/self/status").exists():
        assert gib == pytest.approx(0.25, abs=0.05)


def test_a_process_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(bench, "CHILD", "{code}")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        bench.Rows(Path(MINI), CPU, torch.float32, 1).child("1 / 0")()


@pytest.mark.parametrize("outer", [True, False])
def test_the_peers_loop_solves_equation_7(outer):
    """Every sum written out row by row in float64, for blocks that do not divide the rows."""
    torch.manual_seed(0)
    E, E_star, P = torch.randn(3, 9, 6, dtype=torch.float64)
    W0 = {"a": torch.randn(4, 6, dtype=torch.float64), "b": torch.randn(5, 6, dtype=torch.float64)}
    B = sum(torch.outer(e, e) for e in E) + 0.3 * sum(torch.outer(p, p) for p in P)
    ridge = 0.2 * B.trace() / 6 * torch.eye(6, dtype=torch.float64)
    found = bench.loop_over_layers(W0, E, E_star, P, 0.3, 0.2, 4, outer)
    for name, W in W0.items():
        right = sum(torch.outer(W @ e_star, e) for e, e_star in zip(E, E_star))
        right += 0.3 * sum(torch.outer(W @ p, p) for p in P) + W @ ridge
        assert torch.allclose(found[name] @ (B + ridge), right, atol=1e-9)
    assert bench.distance(found, found, W0) == 0
    assert bench.distance(W0, found, W0) == pytest.approx(1)


@pytest.mark.slow
def test_the_unets_of_both_sides_can_be_compiled(tmp_path):
    done = run("--compile", "--only", "unet-1", "--runs", 1, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out/bench/mini-cpu.json").read_text())[1]
    eager, _ = bench.Rows(Path(MINI), CPU, torch.float32, 1).unet(1)
    with torch.no_grad():
        assert row["GFLOP"] == pytest.approx(bench.flops(eager) / 1e9, abs=1e-3)     # compiled: none
