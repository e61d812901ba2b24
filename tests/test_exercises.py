"""The course's exercises: stubs fail, the repository's functions pass, and typical mistakes are told."""
import doctest
import functools
import inspect
import re
import subprocess
import sys
import types

import pytest
import torch

import diffusion
import realera
import rece
import unet
from course import exercises
from course.checking import Wrong, evenly, load, uniform, within
from course.grade import FILE, grade
from course.parts import EXERCISES
from helpers import ENV, ROOT
from plumbing import UserError
from plumbing.stats import wilson

BY_NAME = {exercise.name: exercise for exercise in EXERCISES}
NAMES = list(BY_NAME)
RIGHT = types.SimpleNamespace(**{name: exercise.ours for name, exercise in BY_NAME.items()})
OURS = {"guided": diffusion.guided, "ddim_step": diffusion.ddim, "cross_attention": unet.Attention,
        "derive": rece.derive} | {name: getattr(realera, name) for name in NAMES if hasattr(realera, name)}


def graded(name, function, **more):
    return grade(types.SimpleNamespace(**{name: function}), BY_NAME[name], **more)


# ---- both directions ----

@pytest.mark.parametrize("name", NAMES)
def test_stub_is_to_do_and_the_repositorys_function_passes(name):
    assert grade(exercises, BY_NAME[name]).verdict == "to do"
    right = grade(RIGHT, BY_NAME[name])
    assert right.verdict == "passed" and right.points == (BY_NAME[name].points,) * 2, right


# Of an exercise: what is mistaken, in our function's source what is replaced, and by what.
MISTAKES = {
    "guided": [
        ("sign", "(c - u)", "(u - c)"),
        ("from c on", "u + s", "c + s"),
        ("nothing of u", "u + s * (c - u)", "s * (c - u)"),
        ("no gradient", "(c - u)", "(c - u.detach())"),
        ("broadcast", "u + s * (c - u)", "u[:1] + s * (c[:1] - u[:1])")],
    "ddim_step": [
        ("no root", "(z - (1 - a).sqrt()", "(z - (1 - a)"),
        ("a for its root", "/ a.sqrt()", "/ a"),
        ("old noise level", "(1 - a_next).sqrt()", "(1 - a).sqrt()"),
        ("old picture level", "a_next.sqrt() * z0", "a.sqrt() * z0"),
        ("sign", "+ (1 - a_next)", "- (1 - a_next)")],
    "cross_attention": [
        ("wrong axis", "F.scaled_dot_product_attention(q, k, v)",
         "(q @ k.mT / math.sqrt(q.shape[-1])).softmax(-2) @ v"),
        ("no √d", "F.scaled_dot_product_attention(q, k, v)", "(q @ k.mT).softmax(-1) @ v"),
        ("√ of all heads", "F.scaled_dot_product_attention(q, k, v)",
         "(q @ k.mT / math.sqrt(q.shape[-1] * self.heads)).softmax(-1) @ v"),
        ("k and v changed places", "self.to_k(context), self.to_v(context)",
         "self.to_v(context), self.to_k(context)"),
        ("heads not put back", "y.transpose(1, 2).flatten(2)", "y.reshape(x.shape)"),
        ("heads cut across", "y.unflatten(-1, (self.heads, -1)).transpose(1, 2)",
         "y.unflatten(-1, (-1, self.heads)).permute(0, 3, 1, 2)"),
        ("one head", "(self.heads, -1)", "(1, -1)")],
    "towards_noise": [
        ("sign", "return (v - e)", "return (e - v)"),
        ("norm per row", "(v - e).norm()", "(v - e).norm(dim=1, keepdim=True)"),
        ("no norm", "/ (v - e).norm()", ""),
        ("noise of size 1", "* (e.norm() / math.sqrt(e.numel()))", ""),
        ("√D for √(nD)", "math.sqrt(e.numel())", "math.sqrt(e.shape[1])"),
        ("the noise itself", "(v - e) / (v - e).norm()", "v / v.norm()")],
    "radius_at": [
        ("e not normed", "(e * v_hat).sum() / e.norm()", "min(1, max(-1, (e * v_hat).sum()))"),
        ("norm of a row", "(e * v_hat).sum() / e.norm()", "(e[0] * v_hat[0]).sum() / e[0].norm()"),
        ("sines upside down", "math.sin(angle) / math.sin(widest - angle)",
         "math.sin(widest - angle) / math.sin(angle)"),
        ("wrong angle", "math.sin(widest - angle)", "math.sin(widest)"),
        ("in units of ‖e‖", "e.norm().item() * math.sin", "math.sin"),
        ("no infinity", "math.inf if angle >= widest else ", ""),
        ("no error", "math.acos(cosine)", "math.acos(min(1, cosine))")],
    "neighbor_concepts": [
        ("sign", "eta = r * v_hat", "eta = -r * v_hat"),
        ("D1 without ‖e‖", "min(s.D1 * e.norm().item()", "min(s.D1"),
        ("the farther limit", "min(s.D1", "max(s.D1"),
        ("S1 forgotten", "radius_at(s.S1, e, v_hat)", "0.0"),
        ("S2 forgotten", "radius_at(s.S2, e, v_hat))", "9e9)"),
        ("no tolerance", "near_star[i] += r_anchor * v_hat", "r_anchor"),
        ("one radius for both", "near_star[i] += r_anchor", "near_star[i] += r"),
        ("r' by r's draw", "r_anchor * v_hat",
         "(r - nearest) / (farthest - nearest) * s.D1_anchor * e.norm() * v_hat"),
        ("another direction for targets", "r_anchor * v_hat", "r_anchor * v_hat.flip(1)"),
        ("targets at the concept", "e_star.repeat", "e.repeat"),
        ("not uniform", "eta = r * v_hat",
         "eta = (nearest + (r - nearest) ** 2 / (farthest - nearest)) * v_hat"),
        ("norm per row", "eta = r * v_hat", "eta = r * v_hat / v_hat.norm(dim=1, keepdim=True)"),
        ("no error", "return room(", "return (lambda low, high, what: (low, max(high, low + 1e-9)))(")],
    "beyond_concepts": [
        ("sign", "+= l * v_hat", "-= l * v_hat"),
        ("D1 or S2", "max(s.D1 * size", "min(s.D1 * size"),
        ("S2 forgotten", "radius_at(s.S2, e, v_hat)", "0"),
        ("D2 without ‖e‖", "s.D2 * size", "s.D2"),
        ("η alone", "e.repeat(s.N, 1, 1)", "0 * e.repeat(s.N, 1, 1)"),
        ("nearest alone", "far[i] += l", "far[i] += beyond_radii(e, v_hat, s)[0]"),
        ("no error", "s.D2 * size, \"beyond", "(s.D2 if s.D2 > 0.2 else 9) * size, \"beyond")],
    "closed_form": [
        ("sign", "(E_star - E)", "(E - E_star)"),
        ("missing transpose", "torch.linalg.cholesky(B)).T", "torch.linalg.cholesky(B))"),
        ("e* for e* − e", "E.T @ (E_star - E)", "E.T @ E_star"),
        ("(e* − e) e*ᵀ", "E.T @ (E_star - E)", "E_star.T @ (E_star - E)"),
        ("λ1 forgotten", "lambda1 * P.T @ P", "P.T @ P"),
        ("ridge in no units", "lambda2 * B.trace() / len(B)", "lambda2"),
        ("ridge by the sum", "B.trace() / len(B)", "B.trace()"),
        ("in float32", "E, E_star, P = E.double(), E_star.double(), P.double()", "pass"),
        ("W, not Δ", "torch.linalg.cholesky(B)).T", "torch.linalg.cholesky(B)).T + torch.eye(len(B))"),
        ("no error", "if not cond < 1e14:", "if 0 * (B := B + 1e-9 * torch.eye(len(B))).sum():")],
    "noise_alignment_loss": [
        ("sum for mean", "mean()", "sum()"),
        ("no square", "square()", "abs()"),
        ("root", "(eps(z, t, c) - target).square().mean()", "(eps(z, t, c) - target).square().mean().sqrt()"),
        ("the concept's target", "- beyond_target", "- target"),
        ("the concept's prompt", "eps(z, t, beyond)", "eps(z, t, c)"),
        ("Eq. (8) alone", "if beyond is not None", "if False"),
        ("no gradient", "eps(z, t, c) -", "eps(z, t, c).detach() -")],
    "derive": [
        ("missing transpose, right", "T.T @ (C", "T @ (C"),
        ("missing transpose, left", "T.T @ G @ T", "T @ G @ T"),
        ("G for C", "C @ e.T", "G @ e.T"),
        ("Cᵀ", "C @ e.T", "C.T @ e.T"),
        ("no λ", "+ lam * torch.eye", "+ 0 * lam * torch.eye"),
        ("T e_adv", "torch.cholesky_solve(right, factor).T", "(T @ torch.cholesky_solve(right, factor)).T"),
        ("no error", "torch.linalg.cholesky_ex(T", "torch.linalg.cholesky_ex(1e-12 * torch.eye(len(T)) + T")]}


CALLED = {realera.neighbor_concepts: [realera.neighbor_radii],
          realera.beyond_concepts: [realera.beyond_radii]}


def mistaken(function, old, new):
    """The function, with `new` in place of `old` in its source, or in that of a part of it."""
    source = "\n\n".join(map(inspect.getsource, [*CALLED.get(function, []), function]))
    assert old in source, old
    names = dict(vars(sys.modules[function.__module__]))
    exec(source.replace(old, new), names)
    return names[function.__name__]


@pytest.mark.parametrize("name", NAMES)
def test_typical_mistakes_are_told(name):
    """By what they return, or by the function's own refusal: others would be told in any case."""
    assert len(MISTAKES[name]) >= 5
    for what, old, new in MISTAKES[name]:
        wrong, ours = mistaken(OURS[name], old, new), BY_NAME[name].ours
        result = graded(name, wrong if ours is OURS[name] else functools.partial(ours, f=wrong))
        assert result.verdict == "wrong", what
        assert not re.search("no error\n    got +(?! |UserError)", result.why), (what, result.why)


# ---- what the student sees ----

def test_a_wrong_answer_shows_part_input_wanted_got_equation_and_hint():
    shown = str(graded("guided", lambda u, c, s: u + s * (u - c)))
    assert re.fullmatch(r""" 1  guided                wrong   0 of 2 points
    part      the worked number of the docstring
    input     u = \[2\] 1, 2
              c = \[2\] 2, 0
              s = 7.5
    wanted    \[2\] 8.5, -13
    got       \[2\] -6.5, 17
    equation  .*Eq. \(6\)
    hint      .*[.?]""", shown), shown


def test_of_large_tensors_the_place_farthest_off_is_shown():
    def answer(u, c, s):
        result = u + s * (c - u)
        if result.dim() == 4:
            result[1, 2, 3, 4] += 1
        return result
    assert re.search(r"\n              farthest apart at \[1, 2, 3, 4\]: wanted \S+, got \S+\n",
                     graded("guided", answer).why)


@pytest.mark.parametrize("answer, got", [
    (lambda u, c, s: None, "None"), (lambda u, c, s: (u + s * (c - u))[None], r"\[1, 2\] 8.5, -13"),
    (lambda u, c, s: u / 0, r"\[2\] inf, inf"), (lambda u, c, s: 0 * u / 0, r"\[2\] nan, nan"),
    (lambda u: u, "TypeError: .*"), (lambda u, c, s: u + s * (c - u) + 1e-4, r"\[2\] 8.5001, -13")])
def test_answers_of_every_kind_are_wrong_and_no_crash(answer, got):
    assert re.search(rf"\n    got       {got}\n", graded("guided", answer).why)


def test_a_number_for_a_tensor_has_no_gradient_and_is_no_crash():
    loss = BY_NAME["noise_alignment_loss"].ours
    assert "part      gradient\n" in graded("noise_alignment_loss", lambda *inputs: loss(*inputs).item()).why


@pytest.mark.parametrize("answer", [lambda *_: None, lambda e, *_: e, lambda e, *_: (e, e)])
@pytest.mark.parametrize("name", ["neighbor_concepts", "beyond_concepts"])
def test_samplers_of_every_kind_are_wrong_and_no_crash(name, answer):
    assert graded(name, answer).verdict == "wrong"


def test_an_answer_may_go_the_other_way_through_its_draws():
    """Not the values are graded, but their distribution."""
    def neighbors(e, e_star, noise, u, u_star, *limits):
        return BY_NAME["neighbor_concepts"].ours(e, e_star, noise, 1 - u, 1 - u_star, *limits)
    assert graded("neighbor_concepts", neighbors).verdict == "passed"
    assert graded("beyond_concepts", lambda e, noise, u, *limits: BY_NAME["beyond_concepts"].ours(
        e, noise, (u + 0.5) % 1 if len(u) > 1 else u, *limits)).verdict == "passed"


def test_what_samplers_are_asked():
    inside = torch.tensor([0.1, 0.9], dtype=torch.float64)
    within("", {}, inside, 0, 1, "")
    evenly("", {}, uniform(250, 0), "")
    for wrong in (lambda: within("", {}, inside, 0.2, 1, ""), lambda: within("", {}, inside, 0, 0.8, ""),
                  lambda: within("", {}, inside * torch.nan, 0, 1, ""),
                  lambda: evenly("", {}, uniform(250, 0) ** 1.5, ""),
                  lambda: evenly("", {}, uniform(250, 0) / 2, "")):
        with pytest.raises(Wrong):
            wrong()


# ---- a file of answers ----

HEAD = "import math\nimport torch\nfrom torch import Tensor\n"


def write(path, *lines):
    path.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_an_answer_cannot_import_ours(tmp_path):
    lines = {"import diffusion": "guided = diffusion.guided", "from diffusion import guided": "",
             "from course.ours import diffusion": "guided = diffusion.guided", "import plumbing.cli": "",
             "import runpy": f"runpy.run_path({str(ROOT / 'diffusion.py')!r})"}
    for first, then in lines.items():
        path = write(tmp_path / "answers.py", first, then)
        with pytest.raises(UserError, match="ImportError: an answer cannot import the repository's own "):
            load(path)
        body = "".join(f"\n    {line}" for line in f"{first}\n{then}".splitlines())
        answers = load(write(path, f"def guided(u, c, s):{body}\n    return guided(u, c, s)"))
        assert "cannot import" in grade(answers, BY_NAME["guided"]).why
    answers = load(write(path, "import sys", "def guided(*inputs):",
                         "    return sys.modules['diffusion'].guided(*inputs)"))
    assert "KeyError: 'diffusion', in line 6 of guided" in grade(answers, BY_NAME["guided"]).why
    assert sys.modules["diffusion"] is diffusion


def test_an_answer_names_the_one_that_it_waits_for(tmp_path):
    answers = load(write(tmp_path / "answers.py", "def radius_at(*_):", "    raise NotImplementedError",
                         "def neighbor_concepts(*_):", "    return radius_at()"))
    assert str(grade(answers, BY_NAME["neighbor_concepts"])).endswith("0 of 6 points\n    it needs radius_at")
    assert grade(answers, BY_NAME["derive"]).why == "    there is no function derive"


@pytest.fixture
def some(tmp_path):
    """A file with right answers for 1, 5 and 10, and stubs: our own sources need no module of ours there."""
    answers = [inspect.getsource(f) for f in (diffusion.guided, realera.radius_at, rece.derive)]
    path = tmp_path / "some.py"
    stubs = inspect.getsource(exercises).partition("if __name__")[0]
    path.write_text("\n".join([stubs, "UserError = ValueError", *answers]), encoding="utf-8")
    return path


def test_the_command_grades_a_file(here, refused, some, tmp_path, capsys):
    def printed(*args, status):
        with pytest.raises(SystemExit) as end:
            here(*args, cwd=tmp_path)
        assert end.value.code == status
        return capsys.readouterr().out.splitlines()

    lines = printed("course/grade.py", some, status=1)
    assert lines[0] == " 1  guided                passed  2 of 2 points"
    assert lines[-1] == "3 of 10, 10 of 40 points" and len(lines) == 11
    assert printed("course/grade.py", some, 10, 1, status=0)[-1] == "2 of 2, 6 of 6 points"
    assert printed("course/exercises.py", 3, status=1) == [" 3  cross_attention       to do   0 of 5 points",
                                                           "0 of 1, 0 of 5 points"]
    refused("course/grade.py", some, 11, cwd=tmp_path, match="the exercises are 1 to 10, not 11")
    refused("course/grade.py", "none.py", cwd=tmp_path, match="none.py is not there")
    write(tmp_path / "broken.py", "def guided(")
    refused("course/grade.py", "broken.py", cwd=tmp_path, match=r"does not run: SyntaxError: .*line 4")


def test_pytest_grades_without_xdist_and_what_a_student_lacks():
    """Stubs, then our functions in their place; in a process that knows no diffusers, transformers, peft."""
    code = ("import sys, types\n"
            "sys.modules |= dict.fromkeys(['diffusers', 'transformers', 'peft', 'xdist'])\n"
            "import pytest; from course import checking; from course.parts import EXERCISES\n"
            "pytest.main(['course', '--tb=short'])\n"
            "for name in ('conftest', 'test_course'): del sys.modules[name]\n"
            "checking.load = lambda file: types.SimpleNamespace(**{e.name: e.ours for e in EXERCISES})\n"
            "pytest.main(['course']), pytest.main(['course', '-m', 'ex3'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8",
                          env=ENV | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": str(ROOT)})
    said = re.findall(r"^\d+ of \d+, .*points$|^\d+ (?:failed|passed).*(?= in )", done.stdout, re.M)
    assert "warning" not in done.stdout.lower() and not done.stderr, done.stdout + done.stderr
    assert said == [
        "0 of 10, 0 of 40 points", "10 failed", "10 of 10, 40 of 40 points", "10 passed",
        "1 of 1, 5 of 5 points", "1 passed, 9 deselected"], done.stdout


def test_answers_compute_on_the_device_that_is_asked_for():
    devices = set()

    def answer(u, c, s):
        devices.update({u.device.type, c.device.type})
        raise ValueError
    graded("guided", answer, device=torch.device("meta"))
    assert devices == {"meta"}


# ---- what the file says ----

@pytest.mark.parametrize("name", NAMES)
def test_worked_numbers_are_right(name):
    doc, names = getattr(exercises, name).__doc__, vars(RIGHT) | {"torch": torch}
    test = doctest.DocTestParser().get_doctest(doc, names, name, str(FILE), 0)
    assert test.examples
    said = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


def test_the_table_of_exercises_is_right():
    rows = re.findall(r"^ +(\d+)  (\w+) +(\*+) +(\d+) +(\d+)  \S", exercises.__doc__, re.M)
    assert [(int(number), name, int(points)) for number, name, _, _, points in rows] == [
        (exercise.number, exercise.name, exercise.points) for exercise in EXERCISES]
    assert len(rows) == 10 and sum(exercise.points for exercise in EXERCISES) == 40


def test_numbers_of_the_pages_are_right():
    teacher, wrong = ((ROOT / f"course/{name}.md").read_text("utf-8")
                      for name in ("teacher", "wrong-pictures"))
    plan = re.findall(r"^\| (\d+) \| ([^|]+) \|$", teacher.partition("## Where")[0], re.M)
    assert sum(int(minutes) for minutes, _ in plan) == 120
    minutes = dict(re.findall(r"^ +(\d+)  \w+ +\*+ +(\d+)", exercises.__doc__, re.M))
    for total, what in plan:                                      # of exercises: what their header says
        if numbers := re.match(r"exercises? (\d+)(?: and (\d+))?:", what):
            assert int(total) == sum(int(minutes[number]) for number in numbers.groups() if number)
    fast = re.search(r"Short of time: exercises ([\d, and]+)\. Together they are 15 of\s+the 40", teacher)[1]
    assert sum(EXERCISES[number - 1].points for number in map(int, re.findall(r"\d+", fast))) == 15
    assert "begins at 51 %" in wrong and round(100 * wilson(1.0, 4)[0]) == 51
    assert "above 65504" in wrong and torch.finfo(torch.float16).max == 65504
    weight = torch.tensor(0.04, dtype=torch.float16)
    assert "at a distance of 0.00003" in wrong and (weight + 0.00003).item() - weight.item() > 2.5e-5
    assert "0.00001\n  is rounded away" in wrong and weight + 0.00001 == weight


def test_the_course_needs_pytest_alone_beside_the_run_requirements():
    course, tests = ([line.partition("#")[0].strip() for line in
                      (ROOT / f"requirements-{name}.txt").read_text("utf-8").splitlines()]
                     for name in ("course", "test"))
    assert course == [line for line in tests if line.startswith(("-r requirements.txt", "pytest=="))]
