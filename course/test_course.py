"""The exercises as tests: `python -m pytest course -m ex3` grades the third, without -m all ten."""
import pytest

from course.checking import load
from course.grade import FILE, grade
from course.parts import EXERCISES
from plumbing import UserError


@pytest.mark.parametrize("exercise", [pytest.param(exercise, id=exercise.name,
                                                   marks=getattr(pytest.mark, f"ex{exercise.number}"))
                                      for exercise in EXERCISES])
def test_exercise(exercise, record_property):
    try:
        graded = grade(load(FILE), exercise)
    except UserError as error:
        pytest.fail(str(error), pytrace=False)
    record_property("points", graded.points)
    if graded.verdict != "passed":
        pytest.fail(str(graded), pytrace=False)
