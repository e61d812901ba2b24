"""The lesson's snippets: run them all and compare with lesson.md what they print; or write page and notebook.

    python course/lesson.py                # runs every snippet, and says where the page differs
    python course/lesson.py --write        # puts what they print, and draw, into the page; and lesson.ipynb

In lesson.md a ```python block is a snippet. The ```text block and the picture below it are its output: what
it prints, and the drawing that its last line is. All snippets share their names, as in a notebook.
lesson.ipynb is the same page; its first cell fetches the repository where there is none.
"""
import ast
import contextlib
import difflib
import io
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from plumbing import UserError, svg
from plumbing.cli import command_line, program
from plumbing.disk import whole

HERE = Path(__file__).resolve().parent
PAGE, NOTEBOOK = HERE / "lesson.md", HERE / "lesson.ipynb"
SNIPPET = re.compile(r"```python\n(?P<code>.*?)```\n(?:\n```text\n(?P<text>.*?)```\n)?"
                     r"(?:\n!\[(?P<alt>[^\]]*)\]\((?P<picture>[^)]*)\)\n)?", re.S)
FETCH = '''\
# On Colab: put this repository's address here, and run. On your own machine, in the repository: just run.
ADDRESS = ""
import os, subprocess
from sys import executable, path
if os.path.exists("../realera.py"):
    os.chdir("..")
if not os.path.exists("realera.py"):
    subprocess.run(["git", "clone", ADDRESS, "realera"], check=True)
    os.chdir("realera")
    subprocess.run([executable, "-m", "pip", "install", "-q", "safetensors", "tokenizers"], check=True)
path.insert(0, os.getcwd())'''


@dataclass
class Snippet:
    code: str
    text: str                   # what the page says it prints
    alt: str                    # of its picture; "": it draws none
    picture: str                # the file, from the page's folder


def parts_of(page: str) -> list:
    """The page as strings of text and Snippets, in order."""
    parts, end = [], 0
    for found in SNIPPET.finditer(page):
        parts += [page[end:found.start()], Snippet(*(found[name] or "" for name in
                                                     ("code", "text", "alt", "picture")))]
        end = found.end()
    return [*parts, page[end:]]


def page_of(parts: list) -> str:
    def written(s: Snippet) -> str:
        return (f"```python\n{s.code}```\n" + (f"\n```text\n{s.text}```\n" if s.text else "")
                + (f"\n![{s.alt}]({s.picture})\n" if s.picture else ""))
    return "".join(part if isinstance(part, str) else written(part) for part in parts)


def run(snippet: Snippet, names: dict) -> tuple[str, object]:
    """What it prints, and the value of its last line if that is an expression. Its progress bars go on."""
    tree, said, value = ast.parse(snippet.code), io.StringIO(), None
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(said):
        exec(compile(tree, PAGE.name, "exec"), names)             # our own page
        if last:
            value = eval(compile(ast.Expression(last.value), PAGE.name, "eval"), names)
    return said.getvalue(), value


def cell(kind: str, text: str, number: int, **more) -> dict:
    return {"cell_type": kind, "id": f"lesson-{number:02}", "metadata": {},
            "source": text.strip("\n").splitlines(keepends=True)} | more


def notebook_of(parts: list, folder: Path) -> str:
    """The page as a notebook, with what it prints and its pictures."""
    cells = [cell("code", FETCH, 0, execution_count=None, outputs=[])]
    for part in parts:
        if isinstance(part, str):
            if part.strip():
                cells.append(cell("markdown", part, len(cells)))
            continue
        outputs = []
        if part.text:
            outputs.append({"output_type": "stream", "name": "stdout",
                            "text": part.text.splitlines(keepends=True)})
        if part.picture:
            drawn = (folder / part.picture).read_text("utf-8")
            data = {"image/svg+xml": drawn.splitlines(keepends=True), "text/plain": [part.alt]}
            outputs.append({"output_type": "display_data", "metadata": {}, "data": data})
        cells.append(cell("code", part.code, len(cells), execution_count=None, outputs=outputs))
    about = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
             "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": about, "nbformat": 4, "nbformat_minor": 5}, indent=1,
                      ensure_ascii=False) + "\n"


def run_all(parts: list, folder: Path, write: bool) -> list[str]:
    """Run the snippets in order; returns how the page differs. write: put text and pictures there instead."""
    names, wrong = {"__name__": "lesson"}, []
    for number, snippet in enumerate((part for part in parts if isinstance(part, Snippet)), 1):
        start = time.perf_counter()
        said, drawn = run(snippet, names)
        seconds = time.perf_counter() - start
        if isinstance(drawn, svg.Drawing) != bool(snippet.picture):
            wrong.append(f"snippet {number}: its last line is a drawing, or the page has one, not both")
        elif write and snippet.picture:
            (folder / snippet.picture).parent.mkdir(parents=True, exist_ok=True)
            svg.write(folder / snippet.picture, drawn)
        if write:
            snippet.text = said
        elif said != snippet.text:
            wrong += [f"snippet {number} prints something else:", *difflib.unified_diff(
                snippet.text.splitlines(), said.splitlines(), "lesson.md", "now", lineterm="", n=0)]
        print(f"snippet {number}: {seconds:.1f} s")
    return wrong


def main() -> None:
    parser = program(__doc__)
    parser.add_argument("--write", action="store_true", help="write what they print, pictures and notebook")
    args = parser.parse_args()
    parts = parts_of(PAGE.read_text("utf-8"))
    if wrong := run_all(parts, HERE, args.write):
        raise UserError("\n".join(wrong))
    for path, text in ((PAGE, page_of(parts)), (NOTEBOOK, notebook_of(parts, HERE))):
        if args.write:
            with whole(path) as temporary:
                temporary.write_text(text, encoding="utf-8", newline="\n")
        elif text != path.read_text("utf-8"):
            raise UserError(f"{path.name} is not what lesson.md says: python course/lesson.py --write")


if __name__ == "__main__":
    command_line(main)
