"""tests/fuzz.py: ten quick cases of each family, and that it sees whatever may go wrong."""
import random
import sys
import time

import pytest
import torch
from safetensors.torch import save_file

import fuzz

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and files are Linux's")


def test_at_most_one_percent_of_odd_inputs_misbehaves():
    bad = fuzz.fuzz(seed=1, n=100, quick=True, say=lambda line: None)
    assert len(bad) <= 1, "\n".join(bad)


def test_a_seed_makes_the_same_cases_again(tmp_path, monkeypatch):
    def made(seed):
        cases = []
        monkeypatch.setattr(fuzz, "judge", lambda c, *_: cases.append((c.what, c.args, c.expected)))
        for i in range(len(fuzz.FAMILIES)):
            fuzz.run_case(base, seed, i)
        return cases

    base = fuzz.write_base(tmp_path / "work")
    monkeypatch.setattr(fuzz, "start", lambda *_: (0, "", "", None))                 # nothing runs
    first = made(4)
    assert len(first) == len(fuzz.FAMILIES) and first == made(4) and first != made(5)


def complain(*lines):
    print(*lines, sep="\n", file=sys.stderr)


# What a program may do wrong in the case's folder; its exit status; and what must be said of it.
NAN = torch.tensor([float("nan")])
WRONG = {
    "a traceback": (lambda work: 1 / 0, 0, "traceback: ZeroDivisionError"),
    "it hangs": (lambda work: time.sleep(9), 0, "hangs"),
    "another status": (lambda work: None, 1, "exit status 1"),
    "no line": (lambda work: None, 2, "0 lines that begin with error:"),
    "two lines": (lambda work: complain("error: a", "error: b"), 2, "2 lines that begin with error:"),
    "a line, status 0": (lambda work: complain("error: a"), 0, "exit status 0 and 1 lines"),
    "something is left": (lambda work: (complain("error: a"), (work / "made").mkdir()), 2, "left"),
    "the model changes": (lambda work: (work / "model/defaults.json").write_text("{}"), 0, "changed or rem"),
    "a file is lost": (lambda work: (work / "model/defaults.json").unlink(), 0, "changed or removed"),
    "a file outside": (lambda work: (work.parent / "evil").write_text(""), 0, "left evil"),
    "NaN in tensors": (lambda work: save_file({"a": NAN}, work / "made.safetensors"), 0, "has NaN in a"),
    "NaN in JSON": (lambda work: (work / "made.json").write_text("[NaN]"), 0, "not valid JSON"),
    "NaN in a table": (lambda work: (work / "made.csv").write_text("a,nan"), 0, "has NaN"),
    "NaN on the screen": (lambda work: print("drift nan"), 0, "prints nan"),
    "a secret": (lambda work: (work / "made.txt").write_text(fuzz.PRIVATE), 0, "holds a private file"),
    "it is accepted": (lambda work: None, 0, "accepted what must be refused")}


@pytest.mark.parametrize("what", WRONG)
def test_whatever_goes_wrong_is_seen(what, tmp_path, monkeypatch):
    action, status, said = WRONG[what]

    def main():
        action(tmp_path / "work")
        sys.exit(status)

    (tmp_path / "work/model").mkdir(parents=True)
    (tmp_path / "work/model/defaults.json").write_text("[]")
    monkeypatch.setattr(fuzz, "SECONDS", 1)
    monkeypatch.setattr("sample.main", main)
    case = fuzz.Case(tmp_path / "work", random.Random(0))
    case.outs = ["made", "made.safetensors", "made.json", "made.csv", "made.txt"]
    before = fuzz.snapshot(tmp_path)
    outcome = fuzz.start("sample.py", [], case.work)
    wrong = fuzz.judge(case, before, fuzz.snapshot(tmp_path), *outcome)
    assert wrong and said in wrong
