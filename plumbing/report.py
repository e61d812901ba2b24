"""report.html in an edit's folder: pictures, numbers, settings, losses, the edit itself, what to try next."""
import contextlib
import html
import json
import math
import shlex
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from plumbing import svg
from plumbing.book import book
from plumbing.disk import whole
from plumbing.drift import drift_of, synonyms_and_near

FRAME = Path(__file__).with_name("page.html")                     # course/explore.html has the same


# ------------------------------------------------------------------------------------------ losses

REPORTS: list[dict] = []        # of the commands that run, the innermost last


@contextlib.contextmanager
def recorded(report: dict):
    """Inside a `with` block every training leaves its curve in report["curves"], of at most 50 points:
    {name: {"each": steps, "means": [mean loss of so many steps, …]}}."""
    REPORTS.append(report)
    try:
        yield
    finally:
        REPORTS.pop()


def record(what: str, losses: list[float]) -> None:
    for report in REPORTS[-1:] if losses else ():
        curves, each = report.setdefault("curves", {}), math.ceil(len(losses) / 50)
        names = (f"{what} {i}" if i > 1 else what for i in range(1, len(curves) + 2))
        name = next(name for name in names if name not in curves)     # MACE trains once for each concept
        parts = [losses[i:i + each] for i in range(0, len(losses), each)]
        curves[name] = {"each": each, "means": [sum(part) / len(part) for part in parts]}


# ------------------------------------------------------------------------------------------ HTML

def as_data(value) -> str:
    """`value` as JSON that may stand inside a <script>: no "<" could end it or begin another."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def page(title: str, body: str, script: bool = False) -> str:
    """A whole HTML page that loads nothing. title is text, body is HTML; script: whether one may run."""
    parts = {"title": html.escape(title), "script": "script-src 'unsafe-inline';" * script, "body": body}
    first, *rest = FRAME.read_text(encoding="utf-8").split("<!--")                   # <!--title-->…
    return first + "".join(parts[name] + more for name, _, more in (part.partition("-->") for part in rest))


def table(rows: list[tuple], heads: tuple = ()) -> str:
    """An HTML table: the first cell of each row is its head. Everything is escaped."""
    def cell(tag: str, value, more: str = "") -> str:
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        return f"<{tag}{more}>{html.escape(shown)}</{tag}>"

    above = "".join(cell("th", head, ' scope="col"') for head in heads)
    body = "".join("<tr>" + cell("th", first, ' scope="row"') + "".join(cell("td", x) for x in rest)
                   + "</tr>\n" for first, *rest in rows)
    above = f"<thead><tr>{above}</tr></thead>" if heads else ""
    return f"<table>{above}<tbody>\n{body}</tbody></table>\n" if rows else ""


def section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{html.escape(title)}</h2>\n{''.join(parts)}</section>\n" if any(parts) else ""


def inline(*drawings: svg.Drawing) -> str:
    return f'<div class="wide">{"".join(map(svg.page, drawings))}</div>\n'


def delta_parts(delta: Tensor) -> str:
    """Δ [D, D] as a picture, and its singular values."""
    side = min(len(delta), 256)                                   # larger: the greatest of each block
    up, down = (F.adaptive_max_pool2d(x[None].float(), side)[0] for x in (delta, -delta))
    x = torch.where(up >= down, up, -down)
    x = x / x.abs().max().clamp(min=1e-12)
    depth = x.abs().sqrt()[None]                                  # so that small numbers are seen
    ink = torch.where(x[None] > 0, torch.tensor([0.76, 0.29, 0.0])[:, None, None],
                      torch.tensor([0.0, 0.37, 0.58])[:, None, None])
    shown = svg.sheet([[1 - depth * (1 - ink)]], ["rows"], ["columns of Δ"], side=340,
                      footer="orange: above 0, blue: below; the darker the larger (as its root)")
    values = torch.linalg.svdvals(delta)
    values = values[values > 1e-9 * values[0]]
    power = values.square().cumsum(0) / values.square().sum()
    most = int((power < 0.9).sum()) + 1
    said = (f"W = W₀ (I + Δ). {most} of Δ’s {len(delta)} directions hold{'s' * (most == 1)} nine tenths of "
            f"its square. The largest singular value is {values[0]:.3g}.")
    fall = svg.curve({"singular values of Δ": list(enumerate(values.tolist(), 1))}, "index", "singular value",
                     log="y", width=400)
    return f"<p>{html.escape(said)}</p>\n" + inline(shown, fall)


def curves_of(losses: dict[str, dict]) -> list[svg.Drawing]:
    """A drawing for each training that `recorded` has seen."""
    found = []
    for name, curve in losses.items():
        each, means = curve["each"], curve["means"]
        points = [(each * i, value) for i, value in enumerate(means, 1)]
        log = "y" * (min(means) > 0 and max(means) > 10 * min(means))
        found.append(svg.curve({name: points}, "step", "mean loss of the steps", log=log, width=420))
    return found


# ------------------------------------------------------------------------------------------ what to try next

def nameless(word: str) -> str:
    """A word of a command line without the folders of this machine: "--model=/home/me/sd" -> "--model=sd"."""
    flag, equals, path = word.rpartition("=")
    return flag + equals + Path(path).name if Path(path).is_absolute() else word


def command(*changes: str, out: Path) -> str:
    """The command as it was typed, with these settings changed and a new folder."""
    typed, kept = [*map(nameless, sys.argv[1:])], []
    while typed:
        flag, *typed = typed
        if flag in ("--out", "--export"):
            typed = typed[1:]
        elif flag != "--overwrite" and not flag.startswith(("--out=", "--export=")):
            kept.append(flag)
    program = Path(sys.argv[0])
    program = program.name if program.parent.name != "baselines" else f"baselines/{program.name}"
    name = "-".join([out.name, *(change.replace("=", "-") for change in changes)])
    return shlex.join(["python", program, *kept, "--set", *changes, "--out", str(out.with_name(name))])


def advice(report: dict, larger: dict[str, str], out: Path) -> list[tuple[str, str]]:
    """(why, command): what these numbers suggest. larger: as in Job."""
    settings, numbers, out = report.get("settings", {}), report.get("numbers", {}), Path(nameless(str(out)))
    found: dict[str, str] = {}                                    # {command: why}, each command once
    model = "" if report.get("model", "mini") == "mini" else f" --model {shlex.quote(report['model'])}"

    def say(why: str, *changes: str) -> None:
        if all(change.partition("=")[0] in settings for change in changes):
            found.setdefault(command(*changes, out=out), why)

    def times(name: str, factor: float) -> list[str]:
        """"l1 and start_l1" -> each of these settings, larger."""
        return [f"{one}={settings[one] * factor:g}" for one in name.split(" and ") if settings.get(one)]

    def stronger() -> list[str]:
        if settings.get("reach"):
            return [f"reach={settings['reach'] + 1:g}"]
        return next((times(name, 2) for name in ("iterations", "steps", "erase") if settings.get(name)), [])

    drift = drift_of(report) or 0
    if drift > 0.15 and (change := times(larger.get("stay", ""), 10)):
        say(f"Unrelated prompts drift by {drift:.2f} of their length: more weight for what stays.", *change)
    if numbers.get("cond(B)", 0) > 1e8 and (change := times(larger.get("ridge", ""), 10)):
        say(f"cond(B) is {numbers['cond(B)']:.1e}: a larger ridge makes the solution steadier.", *change)
    for pair, shares in report.get("shares", {}).items():
        concept = pair.partition(" → ")[0]
        goes, near = synonyms_and_near(concept, shares)
        stays = {name: share for name, share in shares.items()
                 if name in near or name in book()["classes"] and name != concept}
        if goes and min(goes.values()) < 0.6:
            name = min(goes, key=goes.get)
            why = f"The synonym “{name}” goes {goes[name]:.2f} of the way: it may still draw the concept."
            if settings.get("M") == 0:
                say(why, "M=100")
            elif settings.get("threshold"):                       # of words that go along
                say(why, f"threshold={settings['threshold'] - 0.1:g}")
            elif change := stronger():
                say(why, *change)
        if stays and max(stays.values()) > 0.3:
            name = max(stays, key=stays.get)
            line = ["python", "baselines/vocabulary.py", "--concept", concept, "--keep", name]
            why = (f"“{name}” goes along, {stays[name]:.2f} of the way. Noise cannot tell it from a synonym; "
                   "words of the vocabulary can, and --keep names it.")
            found.setdefault(shlex.join(line) + model, why)
    rows = [row for row in report.get("table", []) if "after" in row]
    still = [row for row in rows if row["wanted"] in report.get("concepts", ()) and row["after"]["right"]]
    lost = [row for row in rows if row["wanted"] not in report.get("concepts", ())
            and row["after"]["right"] < row["before"]["right"] / 2]
    if still and (change := stronger()):
        say(f"“{still[0]['prompt']}” still draws {still[0]['wanted']}: a stronger edit.", *change)
    if lost and (change := times(larger.get("stay", ""), 10)):
        say(f"“{lost[0]['prompt']}” is no longer drawn: what must stay needs more weight.", *change)
    for name, curve in report.get("curves", {}).items():
        means, tenth = curve["means"], max(1, len(curve["means"]) // 10)
        if sum(means[-tenth:]) > 0.97 * sum(means[:tenth]) and settings.get("lr"):
            say(f"The loss of {name} has not fallen: a larger learning rate.", f"lr={3 * settings['lr']:g}")
    here = shlex.quote(str(out)) + model
    found |= {f"python eval_clip.py --edit {here}": "Count with more pictures, beside the untouched model.",
              f"python experiments/attack.py --edit {here}": "See what an adversary gets back."}
    return [(why, line) for line, why in found.items()]


# ------------------------------------------------------------------------------------------ the page

def write_page(folder: Path, report: dict, delta: Tensor | None, larger: dict[str, str]) -> None:
    """report.html in an edit's folder. report: what run.json holds; delta [D, D]: the change of text, None if
    keys and values are untouched; larger: Job's."""
    pairs = [f"{c} → {a or 'nothing'}" for c, a in zip(report["concepts"], report["anchors"])]
    title = f"{', '.join(pairs[:5])}{', …' * (len(pairs) > 5)}, {report['method']}"
    pictures = [path.read_text(encoding="utf-8") for path in
                sorted(folder.glob("before_after.svg")) + sorted(folder.glob("round*.svg"))]
    shares = "".join(f"<h3>{html.escape(pair)}</h3>\n" + table(
        [(name, share) for name, share in near.items()], ("name, the nearest first", "share of the way"))
        for pair, near in report.get("shares", {}).items())
    next_ = "".join(f"<p>{html.escape(why)}</p>\n<pre>{html.escape(line)}</pre>\n"
                    for why, line in advice(report, larger, folder))
    losses = report.get("losses", {})                             # RealEra's
    told = table([(name, *values) for name, values in losses.items()], (
        "on held-out latents", "before", "after")) if isinstance(losses, dict) else ""
    body = "".join([
        f"<header>\n<h1>{html.escape(title)}</h1>\n<p>What this edit of {html.escape(report['model'])} does. "
        "Every number stands in run.json, too.</p>\n</header>\n<main>\n",
        section("Before and after, from the same noise", *(
            f'<div class="wide">{one}</div>\n' for one in pictures)),
        '<div class="two">\n',
        section("Numbers", table([*report.get("numbers", {}).items()])),
        section("How far names go", "<p>0: a name stays where it is; 1: as far as the anchor.</p>\n"
                * bool(shares), shares),
        section("Seconds and memory", table([*report.get("seconds", {}).items(), *(
            [("peak GiB", report["peak GiB"])] if "peak GiB" in report else [])])),
        section("Settings", table([*report.get("settings", {}).items(), ("seed", report["seed"]),
                                   ("task", report["task"]), ("model", report["model"])])),
        "</div>\n",
        section("Losses", told, inline(*curves_of(report["curves"])) if report.get("curves") else ""),
        section("The edit itself, Δ", delta_parts(delta) if delta is not None and delta.any() else ""),
        section("What to try next", next_, "<p>Type these in the repository’s folder.</p>\n"), "</main>"])
    with whole(folder / "report.html") as temporary:
        temporary.write_text(page(title, body), encoding="utf-8", newline="\n")
