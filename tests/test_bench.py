"""bench.py as a user runs it; its baseline, counts and errors; and each trick that makes ours fast."""
import csv
import json
import re
import runpy
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import realera
from erasing import make_pairs
from experiments import bench
from lora import add_lora, lora_layers, lora_off
from plumbing import UserError
from plumbing.cli import command_line
from plumbing.edits import cross_attention
from plumbing.models import MINI
from plumbing.weights import NoInit, put_weights
from sample import Model
from unet import UNet

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def run(*args, cwd, **more):
    return subprocess.run([sys.executable, ROOT / "experiments/bench.py", *map(str, args)], cwd=cwd,
                          capture_output=True, text=True, **more)


# ---- the command ----

def test_a_short_run_prints_and_writes_a_table(tmp_path):
    done = run("--only", "unet-1", "closed-form-gram", "--runs", 2, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
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
    assert table in done.stdout and "| UNet, batch 1 |" in table
    rows = list(csv.DictReader((tmp_path / "out/bench/mini-cpu.csv").open()))
    assert float(rows[1]["ours, ms"]) == unet["ours, ms"][0]
    errors = re.search(r"‖ΔW‖: ours (\S+), theirs (\S+)", done.stdout)
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


# ---- what makes ours faster ----

PROMPT, T = ["a photo of an airplane"], 5


@pytest.fixture
def model():
    return Model(Path(MINI))


def without_cache(model):
    """The model's picture if every step computes the text's keys and values anew."""
    model.unet.read = lambda context: context
    try:
        return model.draw(PROMPT, [1], steps=3)
    finally:
        del model.unet.read


def test_keys_and_values_computed_once_change_no_bit(model):
    x, context = torch.randn(2, 4, 16, 16), torch.randn(2, 32, 256)
    with torch.no_grad():
        assert torch.equal(model.unet(x, T, model.unet.read(context)), model.unet(x, T, context))
    assert torch.equal(model.draw(PROMPT, [1], steps=3), without_cache(model))


def test_keys_and_values_are_never_those_of_an_earlier_edit_or_lora(model):
    """One model drawing in turn untouched, edited, with LoRA, without: every picture is the uncached one."""
    W0, pictures = cross_attention(MINI), []

    def draw():
        pictures.append(model.draw(PROMPT, [1], steps=3))
        assert torch.equal(pictures[-1], without_cache(model))
    draw()
    put_weights(model.unet, {name: 0.5 * W.float() for name, W in W0.items()})
    draw()
    add_lora(model.unet, 2)
    for layer in lora_layers(model.unet).values():
        layer.lora_B.data.fill_(0.3)
    draw()
    with lora_off(model.unet):
        draw()
    put_weights(model.unet, W0)
    with lora_off(model.unet):
        draw()
    untouched, edited, lora, off, again = pictures
    assert torch.equal(edited, off) and torch.equal(untouched, again)
    assert (untouched - edited).abs().max() > 0.01 and (edited - lora).abs().max() > 0.01


class Waits(TorchDispatchMode):
    """Counts, on the meta device in a GPU's place, what a GPU would have to be waited for: numbers, tensors
    read from it (zeros here), and tensors sent to it, indices among them, but for pinned ones. Numbers on the
    CPU, of no dimension, go along with a kernel."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        there = [x.is_meta for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)
                 and (x.is_meta or x.dim() or op is torch.ops.aten._to_copy.default)]
        if op is torch.ops.aten._local_scalar_dense.default and any(there):
            self.count += 1
            return 1.0
        if op is torch.ops.aten._to_copy.default and any(there) and kwargs.get("device") == CPU:
            self.count += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype"))
        found = op(*args, **kwargs)
        sent = not all(there) and isinstance(found, torch.Tensor) and found.is_meta
        self.count += sent and not kwargs.get("non_blocking")
        return found


def test_no_step_of_drawing_or_training_waits_for_the_gpu(model):
    def waits(run, *args):
        with Waits() as found:
            run(*args)
        return found.count

    there, s, W0 = Model(Path(MINI), "meta"), realera.Settings(lora_steps=2, batch=2), cross_attention(MINI)
    pairs = make_pairs(["airplane"], ["sky"], "object", model.text, s.rows, 0)
    way = pairs[0].e_star, torch.zeros(32, 256), 0, s.trajectories
    there.defaults["steps"] = 3
    assert waits(there.draw, PROMPT, [1]) == 3                    # ids, noise; the picture
    assert waits(realera.trajectories, there, *way) == 2          # rows, noise
    ways = [realera.trajectories(there, *way)]
    add_lora(there.unet, 2)
    assert waits(realera.align_noise, there, pairs, ways, W0, s) == len(W0) + 4      # both losses, twice


class Held(TorchDispatchMode):
    """Adds up what tensors on the meta device, in a GPU's place, would take: GiB now, and at most."""

    def __init__(self):
        super().__init__()
        self.known, self.now, self.most = set(), 0, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        found = op(*args, **kwargs or {})
        for x in tree_leaves(found):
            if isinstance(x, torch.Tensor) and (memory := x.untyped_storage())._cdata not in self.known:
                self.known.add(memory._cdata)
                self.now += memory.nbytes() / 2 ** 30
                self.most = max(self.most, self.now)
                weakref.finalize(memory, self.free, memory._cdata, memory.nbytes() / 2 ** 30)
        return found

    def free(self, key, gib):
        self.known.remove(key)
        self.now -= gib


@pytest.mark.parametrize("low_memory, weights, added", [(False, 1.6, 5.75), (True, 1.6, 1.3)])
def test_memory_of_an_even_step_at_sd_size(low_memory, weights, added, monkeypatch):
    """In bfloat16, with a GPU's attention, counted: what a GPU's convolutions need to work is not in it."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention",
                        lambda *qkv: torch.ops.aten._scaled_dot_product_flash_attention(*qkv)[0])
    with torch.device("meta"), Held() as held:
        unet = UNet().to(torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_(False)
        unet.low_memory = low_memory
        add_lora(unet, 4)
        z, c = torch.empty(8, 4, 64, 64).bfloat16(), torch.empty(8, 77, 768).bfloat16()
        before = held.most = held.now
        assert before == pytest.approx(weights, abs=0.05)
        for term in realera.noise_alignment_loss(unet, z, T, z, c, c, z):
            term.backward()
    assert held.most - before == pytest.approx(added, abs=0.05)


def test_loading_draws_no_weights_and_does_not_import_the_compiler():
    """torch.compile's machinery takes longer to import than the text encoder to load."""
    code = ("import sys, torch; from sample import Model; from pathlib import Path; torch.manual_seed(0);"
            f"Model(Path({MINI!r})); a = torch.rand(1); torch.manual_seed(0);"
            "assert torch.equal(a, torch.rand(1)) and 'torch._dynamo' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_layers_still_draw_their_weights_elsewhere():
    with NoInit():
        pass
    torch.manual_seed(0)
    assert torch.nn.Embedding(50, 20).weight.std().item() == pytest.approx(1, abs=0.1)


def lora_gradients(low_memory):
    """Of the square of mini's prediction, and how many numbers the forward pass keeps for the backward."""
    unet, kept = UNet.from_pretrained(Path(MINI) / "unet"), []
    add_lora(unet, 2)
    for layer in lora_layers(unet).values():
        layer.lora_B.data.fill_(0.1)
    unet.low_memory = low_memory
    generator = torch.Generator().manual_seed(0)
    x, context = torch.randn(2, 4, 16, 16, generator=generator), torch.randn(2, 32, 256, generator=generator)
    with torch.autograd.graph.saved_tensors_hooks(lambda y: kept.append(y.numel()) or y, lambda y: y):
        loss = unet(x, T, context).square().mean()
    loss.backward()
    with torch.no_grad():
        assert torch.equal(unet(x, T, context).square().mean(), loss)
    return {k: p.grad for k, p in unet.named_parameters() if p.requires_grad}, sum(kept)


def test_low_memory_gives_the_same_gradients_and_keeps_less():
    (expected, all_kept), (found, few_kept) = lora_gradients(False), lora_gradients(True)
    assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in found)
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    assert few_kept < all_kept / 2


def test_low_memory_erases_to_the_same_bytes(tmp_path, monkeypatch):
    """The teacher's matrices are in place while it predicts, not while the student's blocks run again."""
    monkeypatch.chdir(tmp_path)
    flags = ["--concept", "airplane", "--anchor", "sky", "--no-pictures", "--lora-steps", "2",
             "--device", "cpu", "--set", "trajectories=2", "batch=2"]
    for out, more in (("a", []), ("b", ["--low-memory"])):
        monkeypatch.setattr(sys, "argv", ["realera.py", *flags, "--out", out, *more])
        runpy.run_path(str(ROOT / "realera.py"), run_name="__main__")
    a, b = (load_file(tmp_path / out / "erased.safetensors") for out in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
def test_the_unets_of_both_sides_can_be_compiled(tmp_path):
    done = run("--compile", "--only", "unet-1", "--runs", 1, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "out/bench/mini-cpu.json").read_text())[1]
    eager, _ = bench.Rows(Path(MINI), CPU, torch.float32, 1).unet(1)
    with torch.no_grad():
        assert row["GFLOP"] == pytest.approx(bench.flops(eager) / 1e9, abs=1e-3)     # compiled: none


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_once_for_all_steps(model, backend):
    """A second trace fails. torch.compile's front half alone, and with its back half, a C++ compiler."""
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("needs g++")
    import torch._dynamo
    torch._dynamo.reset()                                         # an earlier model may be compiled
    expected = model.draw(PROMPT, [1], steps=5)
    model.unet.compile(backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert (model.draw(PROMPT, [1], steps=5) - expected).abs().max() < 1e-5
