"""Grade the ten exercises of course/exercises.py, or of a file that was handed in.

    python course/grade.py answers.py              # all ten
    python course/grade.py answers.py 3 6          # two of them

For the first part that is wrong it shows input, wanted, got, equation and a hint. Exit status: 0 if all that
was graded passed, else 1. The answers are run: grade only what you would run yourself.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from course.checking import Answer, ToDo, Wrong, load
from course.parts import EXERCISES, Exercise
from plumbing import UserError
from plumbing.cli import command_line, pick_device, program

FILE = Path(__file__).with_name("exercises.py")


@dataclass
class Grade:
    exercise: Exercise
    verdict: str                # passed, wrong or to do
    why: str = ""

    @property
    def points(self) -> tuple[int, int]:
        """Got, and how many there are."""
        return (self.verdict == "passed") * self.exercise.points, self.exercise.points

    def __str__(self) -> str:
        got, of = self.points
        line = f"{self.exercise.number:>2}  {self.exercise.name:<22}{self.verdict:<8}{got} of {of} points"
        return f"{line}\n{self.why}" if self.why else line


def grade(answers, exercise: Exercise, device=torch.device("cpu")) -> Grade:
    """answers: a module, or whatever has the functions as attributes."""
    function = getattr(answers, exercise.name, None)
    if function is None:
        return Grade(exercise, "wrong", f"    there is no function {exercise.name}")
    try:
        exercise.parts(Answer(function, exercise.ours, device))
    except ToDo as error:
        name = str(error)
        return Grade(exercise, "to do", f"    it needs {name}" * (name != exercise.name))
    except Wrong as wrong:
        return Grade(exercise, "wrong", explained(exercise, *wrong.args))
    return Grade(exercise, "passed")


def explained(exercise: Exercise, part: str, inputs: dict, wanted, got, hint: str) -> str:
    """The lines below a wrong exercise."""
    lines = [("part", part)]
    lines += [("input" if i == 0 else "", f"{name} = {shown(value)}")
              for i, (name, value) in enumerate(inputs.items())]
    lines += [("wanted", shown(wanted)), ("got", shown(got))]
    if all(isinstance(y, Tensor) and y.shape == got.shape and y.numel() > 8 for y in (got, wanted)):
        apart = (got.detach() - wanted).abs().nan_to_num(nan=torch.inf)
        i = tuple(n.item() for n in torch.unravel_index(apart.argmax(), apart.shape))
        lines.append(("", f"farthest apart at {list(i)}: wanted {shown(wanted[i])}, got {shown(got[i])}"))
    lines += [("equation", exercise.equation), ("hint", hint)]
    return "\n".join(f"    {name:<10}{text}" for name, text in lines)


def shown(x) -> str:
    """A number, or a tensor's shape and first numbers: "[2, 3] 0.5, -1, …"."""
    if isinstance(x, tuple):
        return " and ".join(map(shown, x))
    if isinstance(x, Tensor):
        first = ", ".join(f"{number:.5g}" for number in x.detach().flatten()[:8].double().tolist())
        return first if x.dim() == 0 else f"{list(x.shape)} {first}" + ", …" * (x.numel() > 8)
    return f"{x:.5g}" if isinstance(x, float) else "a function" if callable(x) else str(x)


def summary(points: list[tuple[int, int]]) -> str:
    """"7 of 10, 23 of 40 points", of each exercise's points: got, and how many there are."""
    got, of = zip(*points)
    return f"{sum(map(bool, got))} of {len(points)}, {sum(got)} of {sum(of)} points"


def main(doc: str = __doc__, file: Path | None = None) -> None:
    """The command of course/exercises.py with `file`, else of this file."""
    parser = program(doc)
    if file is None:
        parser.add_argument("file", type=Path, help="a file of answers")
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help="exercises (default: all)")
    parser.add_argument("--device", default="cpu", help="where answers compute: cpu (default), auto, cuda")
    args = parser.parse_args()
    if not set(args.numbers) <= {exercise.number for exercise in EXERCISES}:
        raise UserError(f"the exercises are 1 to {len(EXERCISES)}, not {', '.join(map(str, args.numbers))}")
    device, answers = pick_device(args.device), load(file or args.file)
    chosen = [exercise for exercise in EXERCISES if not args.numbers or exercise.number in args.numbers]
    grades = [grade(answers, exercise, device) for exercise in chosen]
    print(*grades, summary([graded.points for graded in grades]), sep="\n")
    sys.exit(any(graded.verdict != "passed" for graded in grades))


if __name__ == "__main__":
    command_line(main)
