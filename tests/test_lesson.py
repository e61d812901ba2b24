"""The course's lesson: its snippets print and draw what the page says, and the notebook is the same page."""
import json
import os
import shutil
import sys

import pytest

from course import lesson
from helpers import ROOT
from plumbing import UserError

PAGE = lesson.PAGE.read_text("utf-8")
PARTS = lesson.parts_of(PAGE)
SNIPPETS = [part for part in PARTS if isinstance(part, lesson.Snippet)]


def test_page_is_taken_apart_and_put_together():
    assert lesson.page_of(PARTS) == PAGE
    assert PAGE.count("```python") == len(SNIPPETS)
    assert PAGE.count("\n## ") == 9 and len(SNIPPETS) >= 8
    assert sum(bool(snippet.text or snippet.picture) for snippet in SNIPPETS) >= 8
    assert all(3 <= snippet.code.count("\n") <= 12 for snippet in SNIPPETS)          # short enough to read
    for step in PAGE.split("\n## ")[1:-1]:                        # each step ends with two questions
        assert step.count("\n1. ") == step.count("\n2. ") == 1 and "\n3. " not in step, step[:40]


def test_pictures_exist_and_no_other_lies_there():
    pictures = [snippet.picture for snippet in SNIPPETS if snippet.picture]
    assert len(pictures) == len(set(pictures)) >= 6
    assert {f"lesson/{path.name}" for path in (lesson.HERE / "lesson").iterdir()} == set(pictures)
    assert all(snippet.alt for snippet in SNIPPETS if snippet.picture)


def test_notebook_is_the_page():
    notebook = json.loads(lesson.NOTEBOOK.read_text("utf-8"))
    assert lesson.NOTEBOOK.read_text("utf-8") == lesson.notebook_of(PARTS, lesson.HERE)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = notebook["cells"]
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"][1:] == [
        snippet.code.strip("\n") for snippet in SNIPPETS]
    assert all({"outputs", "execution_count"} <= cell.keys() for cell in cells if cell["cell_type"] == "code")
    assert not any({"outputs", "execution_count"} & cell.keys() for cell in cells
                   if cell["cell_type"] == "markdown")


def test_cells_print_and_draw_what_the_page_says(monkeypatch, capsys):
    """As Jupyter runs them: in the notebook's folder, one after the other, the first cell first."""
    monkeypatch.chdir(lesson.HERE)
    monkeypatch.setattr(sys, "path", list(sys.path))
    codes = ["".join(cell["source"]) for cell in json.loads(lesson.NOTEBOOK.read_text("utf-8"))["cells"]
             if cell["cell_type"] == "code"]
    lesson.run(lesson.Snippet(codes[0], "", "", ""), {})
    assert os.path.samefile(os.getcwd(), ROOT)
    assert lesson.run_all([lesson.Snippet(code, s.text, s.alt, s.picture)
                           for code, s in zip(codes[1:], SNIPPETS, strict=True)], lesson.HERE, False) == []
    assert capsys.readouterr().out.count("snippet ") == len(SNIPPETS)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A page of one's own in a folder of its own."""
    def made(text):
        (tmp_path / "lesson.md").write_text(text, "utf-8")
        monkeypatch.setattr(lesson, "HERE", tmp_path)
        monkeypatch.setattr(lesson, "PAGE", tmp_path / "lesson.md")
        monkeypatch.setattr(lesson, "NOTEBOOK", tmp_path / "lesson.ipynb")
        return tmp_path / "lesson.md"
    return made


def called(monkeypatch, *flags):
    monkeypatch.setattr(sys, "argv", ["lesson.py", *flags])
    lesson.main()


DRAWN = """# A page
```python
from plumbing import svg
print(1 + 1)
svg.heat_map([[x]], ["row"], ["column"])
```

![a number](pictures/one.svg)
"""


def test_write_puts_output_into_the_page_and_then_it_agrees(page, monkeypatch):
    path = page("```python\nx = 2\n```\nThen\n" + DRAWN)
    called(monkeypatch, "--write")
    assert "```\n\n```text\n2\n```\n\n![a number](pictures/one.svg)\n" in path.read_text("utf-8")
    assert "svg" in (path.parent / "pictures/one.svg").read_text("utf-8")
    before = path.read_text("utf-8"), lesson.NOTEBOOK.read_text("utf-8")
    called(monkeypatch)
    called(monkeypatch, "--write")
    assert before == (path.read_text("utf-8"), lesson.NOTEBOOK.read_text("utf-8"))
    path.write_text(path.read_text("utf-8").replace("Then", "Now"), "utf-8")
    with pytest.raises(UserError, match="lesson.ipynb is not what lesson.md says"):
        called(monkeypatch)


def test_another_output_is_told_with_both_lines(page, monkeypatch):
    page("```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    with pytest.raises(UserError, match="snippet 1 prints something else:(.|\n)*\n-3\n\\+2"):
        called(monkeypatch)


@pytest.mark.parametrize("text", [DRAWN.replace("svg.heat", "x = svg.heat"),
                                  DRAWN.partition("\n![")[0] + "\n"])
def test_a_picture_that_is_missing_on_either_side_is_told(page, monkeypatch, text):
    page(text.replace("[[x]]", "[[1]]"))
    with pytest.raises(UserError, match="snippet 1: its last line is a drawing, or the page has one"):
        called(monkeypatch, "--write")


def test_first_cell_fetches_the_repository_where_there_is_none(tmp_path, monkeypatch):
    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("subprocess.run", lambda line, check: (asked.append(line), shutil.copytree(
        ROOT / "course", tmp_path / "realera", dirs_exist_ok=True)))
    fetch = lesson.FETCH.replace('ADDRESS = ""', 'ADDRESS = "https://x.test/y"')
    lesson.run(lesson.Snippet(fetch, "", "", ""), {})
    assert asked[0] == ["git", "clone", "https://x.test/y", "realera"]
    assert asked[1][:5] == [sys.executable, "-m", "pip", "install", "-q"]
    assert os.path.samefile(os.getcwd(), tmp_path / "realera") and sys.path[0] == os.getcwd()
