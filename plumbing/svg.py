"""Labelled sheets of pictures, heat maps, curves and scatters as SVG: text is text, pictures are PNG inside.

    svg.write(out / "sheet.svg", svg.sheet(pictures, rows=prompts, columns=["untouched", "RealEra"]))

Each maker returns a Drawing. `write` puts one or several into one file, side by side while they fit into a
README's width. In a notebook a Drawing shows itself. No plotting library is needed.
"""
import base64
import math
import re
import struct
import textwrap
import unicodedata
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from xml.sax.saxutils import escape

import torch

from plumbing import UserError
from plumbing.disk import whole
from plumbing.pictures import as_png, pixels

WIDTH, GAP = 900, 14                                              # of a README, in pixels; between parts
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#b0568c", "#8a6d00", "#3f9fd8", "#555555"]
MARKS = ["M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z", "M-4.5-4.5h9v9h-9z", "M0-6.5L6.5 0 0 6.5-6.5 0z",
         "M0-6L6 5H-6z", "M-6-5H6L0 6z"]                          # circle, square, diamond, triangles


@dataclass(frozen=True, repr=False)
class Drawing:
    width: float                                                  # pixels
    height: float
    body: str                                                     # SVG elements, from (0, 0) on
    title: str

    def __repr__(self) -> str:                                    # in a terminal
        return f"<drawing, {self.width:.0f} x {self.height:.0f}: svg.write(\"x.svg\", it) writes it>"

    def _repr_svg_(self) -> str:
        return page(self)


def page(*drawings: Drawing) -> str:
    """The drawings as one SVG, from left to right while they fit into WIDTH, then below."""
    x, y, right, bottom, body = GAP, GAP, 0.0, 0.0, ""
    for drawing in drawings:
        if x > GAP and x + drawing.width > WIDTH - GAP:
            x, y = GAP, bottom + 2 * GAP
        body += (f'<g transform="translate({x:.0f} {y:.0f})"><title>{clean(drawing.title)}</title>\n'
                 f"{drawing.body}</g>\n")
        right, bottom = max(right, x + drawing.width), max(bottom, y + drawing.height)
        x += drawing.width + 2 * GAP
    width, height = math.ceil(right) + GAP, math.ceil(bottom) + GAP
    size = f'width="{width}" height="{height}"'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width} {height}" '
            'font-family="Helvetica,Arial,sans-serif" fill="#222">\n'
            f'<title>{clean("; ".join(drawing.title for drawing in drawings))}</title>\n'
            f'<rect {size} fill="#fff"/>\n{body}</svg>\n')


def write(path: str | Path, *drawings: Drawing) -> None:
    """The drawings as the file `path`: all of it or nothing."""
    with whole(path) as temporary:
        temporary.write_text(page(*drawings), encoding="utf-8", newline="\n")


# ------------------------------------------------------------------------------------------------ parts

def clean(label) -> str:
    """A label as XML: what may not stand there is escaped, and what no XML may hold becomes a �."""
    return escape(re.sub("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "�", str(label)))


def length(label, size: int) -> int:
    """Pixels that a label takes at most: as in DejaVu Sans, the widest of the usual fonts."""
    return math.ceil(size * sum(
        1.1 if unicodedata.east_asian_width(c) in "WF" else 1.0 if c in "mwMW@%—…" else 0.85 if c.isupper()
        else 0.42 if c in "iljftr.,:;'|!()[] -" else 0.65 if c.isalnum() else 0.85 for c in str(label)))


def wrap(label, width: float, size: int) -> list[str]:
    """A label in lines of at most `width` pixels, cut between words where that is possible."""
    n = max(1, min(len(str(label)), int(width / (0.42 * size))))
    while n > 1 and any(length(line, size) > width for line in textwrap.wrap(str(label), n)):
        n -= 1
    return textwrap.wrap(str(label), n)


def text(x: float, y: float, lines: list[str], size: int = 12, anchor: str = "start", more: str = "",
         up: float = 0) -> str:
    """Lines below each other. y: the first one's baseline; with up = 0.5 the middle's, with 1 the last's."""
    y -= 1.25 * size * (len(lines) - 1) * up
    return "".join(f'<text x="{x:.1f}" y="{y + 1.25 * size * i:.1f}" font-size="{size}" '
                   f'text-anchor="{anchor}"{more}>{clean(line)}</text>\n' for i, line in enumerate(lines))


def heading(title: str, width: float) -> tuple[str, float]:
    """A bold title in as many lines as it needs, and where it ends."""
    lines = wrap(title, width / 1.15, 15)                         # bold is wider
    return text(0, 15, lines, 15, more=' font-weight="bold"'), 19 * len(lines) + 8 * bool(lines)


def check(values, what: str) -> None:
    values = list(values)
    if not values:
        raise UserError(f"{what}: there is nothing to draw")
    if not all(map(math.isfinite, values)):
        raise UserError(f"{what}: NaN and infinity can't be drawn")


# ------------------------------------------------------------------------------------------------ tables

def check_table(cells, rows: list, columns: list, what: str) -> None:
    there = [len(line) for line in cells]
    if not rows or not columns or there != [len(columns)] * len(rows):
        raise UserError(f"{what}: {len(rows)} rows and {len(columns)} columns have labels, but there are "
                        f"{len(there)} rows of {' or '.join(map(str, sorted(set(there)))) or 0} columns")


def beside(rows: list) -> int:
    """The width of the row labels."""
    return min(180, max(length(row, 13) for row in rows)) + 12


def widest(labels) -> int:
    """Of the words in labels, as far as a column should grow with them."""
    return min(160, max([length(word, 13) for label in labels for word in str(label).split()], default=0))


def table(rows: list, columns: list, wide: float, tall: float, gap: int, cell, title: str,
          names: tuple = ("", "")) -> Drawing:
    """Labels around cells of at least `tall`; cell(i, j, x, y) -> what is drawn at x, y, and its height."""
    aside = beside([*rows, names[0]])
    width = max(aside + len(columns) * (wide + gap) - gap, 280)
    body, y = heading(title, width)
    gray, heads = ' fill="#666"', [wrap(column, wide, 13) for column in columns]
    body += text((aside + width) / 2, y + 12, wrap(names[1], width, 12), 12, "middle", gray)
    y += 16 * bool(names[1]) + 16.25 * max(map(len, heads)) + 8
    body += text(aside - 12, y - 8, wrap(names[0], aside, 12), 12, "end", gray)
    for j, head in enumerate(heads):
        body += text(aside + j * (wide + gap) + wide / 2, y - 8, head, 13, "middle", up=1)
    for i, row in enumerate(rows):
        label = wrap(row, aside - 12, 13)
        below = max(tall, 16.25 * len(label))
        body += text(aside - 12, y + below / 2 + 5, label, 13, "end", up=0.5)
        for j, column in enumerate(columns):
            drawn, height = cell(i, j, aside + j * (wide + gap), y)
            body += f"<g><title>{clean(f'{row}, {column}')}</title>\n{drawn}</g>\n"
            below = max(below, height)
        y += below + gap
    return Drawing(width, y - gap, body, title)


def images(cell, where: str) -> list[tuple[bytes, int, int]]:
    """A cell of `sheet` as PNGs, each with its width and height."""
    if isinstance(cell, (list, tuple)):
        return [image for part in cell for image in images(part, where)]
    if isinstance(cell, (str, Path)):
        data = Path(cell).read_bytes()
        return [(data, *struct.unpack(">II", data[16:24]))]       # of its header
    if isinstance(cell, torch.Tensor):
        check([cell.sum().item()], where)                         # one NaN makes the sum NaN
        cell = pixels(cell.reshape(-1, *cell.shape[-3:]))
    return [(as_png(picture), picture.shape[1], picture.shape[0])
            for picture in cell.reshape(-1, *cell.shape[-3:])]


def sheet(pictures, rows: list, columns: list, title: str = "", notes=None, footer: str = "",
          side: int = 160) -> Drawing:
    """A grid of pictures with a label at each row and above each column.

    pictures[row][column]: a tensor [3, H, W] or [N, 3, H, W] in [0, 1], an array uint8 [H, W, 3] or
    [N, H, W, 3], the path of a PNG, or a list of these. notes[row][column]: what stands below them. side: how
    wide a picture is at most.
    Raises UserError if the labels do not fit, or if a cell has no picture or holds NaN.
    """
    check_table(pictures, rows, columns, title or "sheet")
    check_table(notes or pictures, rows, columns, f"notes of {title or 'sheet'}")
    cells = [[images(cell, f"{row}, {column}") for column, cell in zip(columns, line)]
             for row, line in zip(rows, pictures)]
    if not all(chain(*cells)):
        raise UserError(f"{title or 'sheet'}: a cell has no picture")
    most, gap = max(map(len, chain(*cells))), GAP if len(columns) < 8 else 6
    space = (WIDTH - 2 * GAP - beside(rows) + gap) / len(columns) - gap              # of a cell
    for lines in range(1, most + 1):                              # few, if the pictures stay large
        across = math.ceil(most / lines)
        if space / across - 2 >= 72:
            break
    side = min(side, max(space // across - 2, 48, widest(columns) // across - 2))
    tall = max(side * h / w for _, w, h in chain(*chain(*cells))) + 2
    wide = max(across * (side + 2) - 2, widest(columns))

    def cell(i: int, j: int, x: float, y: float) -> tuple[str, float]:
        drawn, x = "", x + (wide - min(len(cells[i][j]), across) * (side + 2)) / 2 + 1
        for k, (data, _, _) in enumerate(cells[i][j]):
            drawn += (f'<image x="{x + k % across * (side + 2):.1f}" y="{y + k // across * tall:.1f}" '
                      f'width="{side:.1f}" height="{tall - 2:.1f}" '
                      f'href="data:image/png;base64,{base64.b64encode(data).decode()}"/>\n')
        note, end = wrap(notes[i][j], wide, 11) if notes else [], math.ceil(len(cells[i][j]) / across) * tall
        return drawn + text(x - 1 + wide / 2, y + end + 12, note, 11, "middle"), end + 14 * len(note)

    stack = math.ceil(most / across) * tall
    drawing = table(rows, columns, wide, stack, gap, cell, title)
    foot = wrap(footer, drawing.width, 11)
    return Drawing(drawing.width, drawing.height + 14 * len(foot) + GAP * bool(foot), drawing.body
                   + text(0, drawing.height + GAP + 8, foot, 11, more=' fill="#666"'), title or "pictures")


def heat_map(values, rows: list, columns: list, title: str = "", row_name: str = "", column_name: str = "",
             digits: int = 1) -> Drawing:
    """values[row][column] as numbers in cells, the higher the darker. row_name, column_name: what the labels
    are, such as M and N. Raises UserError for NaN, or if the labels do not fit."""
    check_table(values, rows, columns, title or "heat map")
    values = [[float(value) for value in line] for line in values]
    check(chain(*values), title or "heat map")
    low, high = min(chain(*values)), max(chain(*values))
    shown = [[f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−") for value in line]      # no −0.0
             for line in values]
    wide = max(60, widest(columns), widest(chain(*shown)) + 12)

    def cell(i: int, j: int, x: float, y: float) -> tuple[str, float]:
        depth = (values[i][j] - low) / ((high - low) or 1)
        colour = "".join(f"{round(a + depth * (b - a)):02x}" for a, b in ((240, 8), (246, 69), (252, 148)))
        ink = ' fill="#fff"' if depth > 0.71 else ' fill="#000"'                     # contrast 4.5 or more
        return (f'<rect x="{x:.1f}" y="{y:.1f}" width="{wide}" height="38" fill="#{colour}"/>'
                + text(x + wide / 2, y + 24, [shown[i][j]], 13, "middle", ink), 38)

    return table(rows, columns, wide, 38, 2, cell, title, (row_name, column_name))


# ------------------------------------------------------------------------------------------------ plots

def ticks(values: list[float], log: bool, most: int) -> list[float]:
    """Round numbers that enclose the values, about `most`; from 0 on, where the values come near it."""
    low, high = min(values), max(values)
    if log:
        if low <= 0:
            raise UserError(f"a logarithmic axis shows numbers above 0 only, not {low:g}")
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return [10.0 ** i for i in range(first, max(last, first + 1) + 1)]
    low = 0 if 0 < low <= high / 2 else low
    span = high - low or abs(high) or 1
    step = 10.0 ** math.floor(math.log10(span / most))
    step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def curve(series: dict, xlabel: str, ylabel: str, title: str = "", log: str = "", width: int = 640,
          marks: bool = False) -> Drawing:
    """Lines through series[name] = [(x, y), …], or [(x, y, low, high), …], where a band shows the interval.

    log: "x", "y" or "xy", the logarithmic axes. marks: a mark at each point, another one for each name.
    Raises UserError for no points, for NaN, and for what is not above 0 on a logarithmic axis.
    """
    for name, some in series.items():
        check(chain(*some), f"{title or ylabel}: {name}")
    points = list(chain(*series.values()))
    check(map(len, points), title or ylabel)
    xs = ticks([point[0] for point in points], "x" in log, width // 90)
    ys = ticks([y for point in points for y in point[1:]], "y" in log, 5)
    xwords, ywords = ([f"{tick:,.7g}".replace("-", "−") for tick in some] for some in (xs, ys))
    body, y = heading(title, width)
    x, keys = 0.0, []                                             # the legend
    for name in series:
        if x and x + 28 + length(name, 12) > width:
            x, y = 0.0, y + 19
        words = wrap(name, width - 28, 12)
        body, keys = body + text(x + 28, y + 12, words), [*keys, (x, y + 8)]
        x, y = x + 44 + length(name, 12), y + 15 * max(0, len(words) - 1)
    above = wrap(ylabel, width, 12)
    top = y + 39 + 15 * len(above)
    left, right = 7 + max(length(word, 11) for word in ywords), width - length(xwords[-1], 11) / 2
    base = top + width // 2
    below = wrap(xlabel, right - left, 12)
    body += text(0, top - 14, above, up=1) + text((left + right) / 2, base + 38, below, anchor="middle")

    def at(x: float, y: float) -> tuple[float, float]:
        shares = []
        for value, found, axis in ((x, xs, "x"), (y, ys, "y")):
            first, last, value = (math.log(v) if axis in log else v for v in (found[0], found[-1], value))
            shares.append((value - first) / (last - first))
        return left + (right - left) * shares[0], base - (base - top) * shares[1]

    for tick, word in zip(ys, ywords):
        y = at(xs[0], tick)[1]
        body += f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" stroke="#ddd"/>'
        body += text(left - 7, y + 4, [word], 11, "end")
    for tick, word in zip(xs, xwords):
        x = at(tick, ys[0])[0]
        body += f'<path d="M{x:.1f} {base}v5" stroke="#222"/>{text(x, base + 18, [word], 11, "middle")}'
    body += f'<path d="M{left:.1f} {base:.1f}H{right:.1f}" stroke="#222"/>\n'
    for i, (some, (x, y)) in enumerate(zip(series.values(), keys)):
        colour, mark = COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)] if marks else ""
        line = [at(*point[:2]) for point in some]
        if len(some[0]) == 4:
            edge = [at(x, low) for x, _, low, _ in some] + [at(x, high) for x, _, _, high in some[::-1]]
            body += f'<polygon points="{joined(edge)}" fill="{colour}" fill-opacity="0.18"/>\n'
        for path in (line, [(x, y), (x + 22, y)]):
            body += f'<polyline points="{joined(path)}" fill="none" stroke="{colour}" stroke-width="1.8"/>\n'
        for x, y in [*line, (x + 11, y)] if marks else []:
            body += f'<path transform="translate({x:.1f} {y:.1f})" fill="{colour}" d="{mark}"/>\n'
    return Drawing(width, base + 27 + 15 * len(below), body, title or f"{ylabel} over {xlabel}")


def joined(points: list[tuple]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def scatter(points: dict, xlabel: str, ylabel: str, title: str = "", log: str = "",
            width: int = 640) -> Drawing:
    """Marks at points[name] = [(x, y), …], joined in this order: a method's settings, the weakest first. The
    rest is as in `curve`."""
    return curve(points, xlabel, ylabel, title, log, width, marks=True)
