"""The paper's metrics (section 5), each with an interval. Arithmetic only: no model, no pictures.

Outcomes of one row of a table are four groups of numbers per picture: e, the erased class under its own name;
s, the other classes; g, the synonyms; a, the associated phrases: the concept residue, which the paper counts
for celebrities and styles (as their Acc_g), but not for objects. A number is 1 or 0 (top-1: CLIP's first
choice is what was erased; for s: what was asked for), or a probability. Papers mix the two: MACE's script,
which RealEra follows, averages the probability.
"""
import csv
import io
import math

import torch
from torch import Tensor


def harmonic(acc_e: float, acc_s: float, acc_g: float) -> float:
    """H_o of accuracies in [0, 1]: 3 / (1/(1 − Acc_e) + 1/Acc_s + 1/(1 − Acc_g)), 0 if a term is 0."""
    terms = (1 - acc_e, acc_s, 1 - acc_g)
    return 3 / sum(1 / term for term in terms) if min(terms) > 0 else 0.0


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


def h_o(means: dict[str, float]) -> float:
    return harmonic(means["e"], means["s"], means["g"])


def summary(rows: list[dict[str, Tensor]]) -> dict[str, list[float]]:
    """Metrics of one row, or the average of several, in percent: {"Acc_e": [value, low, high], …, "H_o": …}.

    Accuracies that count pictures, as many in each row, have Wilson's interval, which says something at 0 and
    100, too; everything else is bootstrapped. The average H_o is the mean of the rows' H_o, as in Table 1.
    """
    found = {}
    for group in rows[0]:
        x = torch.cat([row[group].double() for row in rows])
        value = sum(row[group].double().mean().item() for row in rows) / len(rows)
        if len({len(row[group]) for row in rows}) == 1 and bool(((x == 0) | (x == 1)).all()):
            low, high = wilson(value, len(x))
        else:
            low, high = bootstrap([{group: row[group]} for row in rows], lambda m: m[group])
        found[f"Acc_{group}"] = [value, low, high]
    means = [{group: x.double().mean().item() for group, x in row.items()} for row in rows]
    found["H_o"] = [sum(map(h_o, means)) / len(rows), *bootstrap(rows, h_o)]
    return {name: [round(100 * number, 2) for number in numbers] for name, numbers in found.items()}


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
        return f"{value[0]:.1f} ({value[1]:.1f}–{value[2]:.1f})" if isinstance(value, list) else str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ["---"] * len(names), *([cell(row.get(name, "–")) for name in names] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


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
