"""How an answer is called and compared: without the repository's modules, with the repository's own function.

An `Answer` is a student's function beside ours. A part that is not right raises `Wrong`, with all that is to
be shown; an answer that is not written yet raises `ToDo`.
"""
import contextlib
import importlib.util
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from torch import Tensor

from plumbing import UserError

TOLERANCE = 1e-6                # times the largest number wanted: on a CPU and on a GPU
ROOT = Path(__file__).resolve().parents[1]
OURS = ({path.stem for folder in (ROOT, ROOT / "course") for path in folder.glob("*.py")}
        | {path.parent.name for path in ROOT.glob("*/*.py")})


class ToDo(Exception):
    """The answer, or one that it calls, is not written yet; its argument is that one's name."""


class Wrong(Exception):
    """A part is wrong; its arguments: part, inputs by name, wanted, got, hint."""


# ---- a file of answers ----

class NoneOfOurs:
    """Asked first where a module is. Of the repository's it does not tell."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ImportError(f"an answer cannot import the repository's own {name}")


@contextlib.contextmanager
def without_ours():
    """Inside, the repository's modules cannot be imported, nor found among those that were."""
    hidden = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] in OURS}
    finder = NoneOfOurs()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(hidden)


def load(file: Path):
    """The module of a file of answers. Raises UserError if Python cannot run it."""
    if not file.is_file():
        raise UserError(f"{file} is not there")
    spec = importlib.util.spec_from_file_location("answers", file)
    module = sys.modules["answers"] = importlib.util.module_from_spec(spec)
    with without_ours():
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(f"{file.name} does not run: {told(error)}") from None
    return module


def told(error: BaseException) -> str:
    """"TypeError: …, in line 7 of towards_noise": the last line of the answers that was reached."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__)
           if frame.filename == getattr(sys.modules.get("answers"), "__file__", None)]
    where = f", in line {own[-1].lineno} of {own[-1].name}" if own else ""
    return f"{type(error).__name__}: {error}{where}"


# ---- an answer ----

@dataclass
class Answer:
    """A student's function, and the repository's, which takes the same arguments."""
    function: Callable
    ours: Callable
    device: torch.device

    def __call__(self, part: str, **inputs):
        """What the student's function returns for copies of the inputs, on the CPU."""
        try:
            with without_ours():
                got = self.function(*(x.clone().to(self.device) if isinstance(x, Tensor) else x
                                      for x in inputs.values()))
        except NotImplementedError as error:
            raise ToDo(told(error).rpartition(" ")[2]) from None
        except (Exception, SystemExit) as error:
            raise Wrong(part, inputs, "no error", told(error), "These inputs have an answer: print "
                        "shapes and numbers before that line.") from None
        return tuple(map(on_cpu, got)) if isinstance(got, (tuple, list)) else on_cpu(got)

    def value(self, hint: str, *learned: str, part: str = "values", **inputs) -> None:
        """The value is the repository's, and so is the gradient in the inputs that are named in `learned`."""
        equal(part, inputs, self.ours(**inputs), self(part, **inputs), hint)
        if learned:
            leaves = {name: inputs[name].clone().requires_grad_() for name in learned}
            own, got = self.ours(**inputs | leaves), self("gradient", **inputs | leaves)
            hint = "Compute with tensors to the end: .item(), .detach(), float() and torch.tensor() lose it."
            if not (isinstance(got, Tensor) and got.requires_grad):
                raise Wrong("gradient", inputs, "a result that can be differentiated", got, hint)
            weights = rows(*own.shape, seed=99)
            wanted = torch.autograd.grad((own * weights).sum(), leaves.values())
            found = torch.autograd.grad((got * weights).sum(), leaves.values(), allow_unused=True)
            for name, a, b in zip(learned, wanted, found):
                equal(f"gradient in {name}", inputs, a, torch.zeros_like(a) if b is None else b, hint)

    def error(self, what: str, hint: str, **inputs) -> None:
        """An exception is raised, as it is by the repository's function."""
        part = f"an error where {what}"
        try:
            got = self(part, **inputs)
        except Wrong:
            return
        raise Wrong(part, inputs, "an exception", got, hint)

    def rule(self, what: str, wanted, hint: str, of: Callable = lambda got: got, /, **inputs) -> None:
        """of(what is returned) is `wanted`, as follows from the equation."""
        equal(f"rule: {what}", inputs, wanted, of(self(f"rule: {what}", **inputs)), hint)


def on_cpu(x):
    return x.cpu() if isinstance(x, Tensor) else x


def equal(part: str, inputs: dict, wanted, got, hint: str) -> None:
    """Raises Wrong unless `got` has the shape of `wanted`, and its numbers within TOLERANCE."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64).detach()
    if isinstance(got, (float, int)):
        got = torch.tensor(got, dtype=torch.float64)
    largest = wanted.where(wanted.isfinite(), 0).abs().max().item() or 1.0
    if not (isinstance(got, Tensor) and got.shape == wanted.shape
            and torch.allclose(got.detach().double(), wanted, rtol=0, atol=TOLERANCE * largest)):
        raise Wrong(part, inputs, wanted, got, hint)


def within(part: str, inputs: dict, numbers: Tensor, low, high, hint: str) -> None:
    """Raises Wrong unless low ≤ numbers ≤ high, all [M] or limits that are numbers; NaN lies nowhere."""
    low, high = (torch.as_tensor(limit, dtype=torch.float64).expand_as(numbers) for limit in (low, high))
    outside = ~((low - TOLERANCE * high.abs() <= numbers) & (numbers <= high + TOLERANCE * high.abs()))
    if outside.any():
        i = outside.nonzero()[0].item()
        place = f" for noise[{i}]" if len(numbers) > 1 else ""
        raise Wrong(part, inputs, f"{low[i]:.4g} … {high[i]:.4g}", f"{numbers[i]:.4g}{place}", hint)


def evenly(part: str, inputs: dict, shares: Tensor, hint: str) -> None:
    """Raises Wrong unless shares [M] are uniform in 0 … 1: Kolmogorov's and Smirnov's test, at 0.1 %."""
    steps = (torch.arange(len(shares)) + 0.5) / len(shares)
    if not (shares.sort().values - steps).abs().max() < 1.95 / len(shares) ** 0.5:
        quarters = torch.histc(shares, 4, 0, 1) / len(shares)
        raise Wrong(part, inputs, "a quarter in each quarter of the interval", quarters, hint)


def rows(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    """From N(0, size²), float64."""
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(m: int, seed: int) -> Tensor:
    return torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def x(numbers) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)
