"""Intervals, distances of clouds, rank correlation; tables as JSON, CSV and Markdown."""
import csv
import io
import math
from pathlib import Path

import torch
from torch import Tensor

from plumbing.disk import whole, write_json


def wilson(mean: float, n: int) -> tuple[float, float]:
    """95 % interval of a proportion seen in n tries (Wilson 1927): within [0, 1], honest at 0 and 1."""
    z = 1.959964
    middle, half = mean + z * z / (2 * n), z * math.sqrt(mean * (1 - mean) / n + (z / (2 * n)) ** 2)
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def bootstrap(rows: list[dict[str, Tensor]], statistic, draws: int = 1000) -> tuple[float, float]:
    """95 % interval of a statistic of group means, averaged over rows, by drawing pictures again.

    rows: per row {group: [n]}. statistic: {group: mean} -> a number.
    """
    generator, means = torch.Generator().manual_seed(0), []
    for row in rows:
        again = {name: x.double()[torch.randint(len(x), (draws, len(x)), generator=generator)].mean(1)
                 for name, x in row.items()}
        again = {name: x.tolist() for name, x in again.items()}
        means.append([statistic({name: x[i] for name, x in again.items()}) for i in range(draws)])
    low, high = torch.tensor(means).mean(0).quantile(torch.tensor([0.025, 0.975])).tolist()
    return low, high


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two clouds [n, F], [m, F] of features, as if Gaussian (Heusel et al. 2017)."""
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors @ (values.clamp(min=0).sqrt()[:, None] * vectors.T)               # Σa^½
    both = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()  # tr (Σa Σb)^½
    apart = (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * both
    return max(0.0, apart.item())                                 # equal clouds: zero but for rounding


def as_markdown(rows: list[dict]) -> str:
    """Flat rows -> a table; [value, low, high] becomes "12.5 (3.1–30.2)"."""
    def cell(value) -> str:
        shown = f"{value[0]:.1f} ({value[1]:.1f}–{value[2]:.1f})" if isinstance(value, list) else str(value)
        return " ".join(shown.split()).replace("|", "\\|")        # of prompts: no line and no cell ends there

    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([cell(row.get(name, "–")) for name in names] for row in rows)]
    note = "\nten-way: no “none of them” among the choices, so plain sky counts as an airplane.\n"
    note *= any("ten-way" in row.get("counted", "") for row in rows)
    return "".join("| " + " | ".join(line) + " |\n" for line in lines) + note


def as_csv(rows: list[dict]) -> str:
    """Flat rows -> CSV; [value, low, high] becomes three columns."""
    flat = []
    for row in rows:
        flat.append({})
        for name, value in row.items():
            triple = isinstance(value, list)
            flat[-1] |= dict(zip((name, f"{name} low", f"{name} high"), value)) if triple else {name: value}
    text, names = io.StringIO(), list(dict.fromkeys(name for row in flat for name in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def write_tables(out: Path, name: str, rows: list[dict]) -> None:
    """`rows` as name.json, name.csv and name.md."""
    write_json(out / f"{name}.json", rows, indent=1)
    for ending, text in {"csv": as_csv(rows), "md": as_markdown(rows)}.items():
        with whole(out / f"{name}.{ending}") as temporary:
            temporary.write_text(text, encoding="utf-8")


def ranks(x: Tensor) -> Tensor:
    """Rank of each value, equal ones share their mean rank."""
    return ((x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2).double()


def correlation(x: Tensor, y: Tensor) -> float:
    return torch.corrcoef(torch.stack([x, y]))[0, 1].item()
