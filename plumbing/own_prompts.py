"""Prompts of one's own: the CSV of `eval_clip.py --prompts`, and what CLIP says about its pictures."""
import csv
from pathlib import Path

import torch
from torch import Tensor

from plumbing import UserError
from plumbing.stats import bootstrap, wilson


def read_prompts(path: Path, seed: int) -> list[dict]:
    """The CSV of --prompts: its rows, each with prompt, seed (int) and class (or None) made sure of."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows, columns = list(reader), reader.fieldnames or []
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"--prompts {path}: no such file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"--prompts {path} is not a CSV in UTF-8: {error}") from None
    if "prompt" not in columns or not rows:
        raise UserError(f"--prompts {path} needs a column 'prompt' and a row (columns: {', '.join(columns)})")
    for i, row in enumerate(rows, 2):
        if None in row:
            raise UserError(f"--prompts {path}, line {i}: more fields than columns; a prompt with commas "
                            "needs quotes")
        given = row.get("seed") or row.get("evaluation_seed") or seed
        try:
            row["seed"] = int(given)
        except ValueError:
            raise UserError(f"--prompts {path}, line {i}: the seed {given!r} is not a number") from None
        if row["seed"] < 0 or not (row["prompt"] or "").strip():
            raise UserError(f"--prompts {path}, line {i}: "
                            + ("the seed is negative" if row["seed"] < 0 else "the prompt is empty"))
        row["class"] = row.get("class") or row.get("concept") or None
    return rows


@torch.no_grad()
def score_prompts(clip, rows: list[dict], found) -> tuple[list[dict], list[dict]]:
    """Per row of the CSV its CLIP score, 100 · cosine of picture and prompt, and CLIP's choice of class; and
    a summary per class and over all."""
    features = torch.stack([found[row["prompt"], row["seed"]] for row in rows])      # [rows, P]
    device, names = clip.logit_scale.device, list(dict.fromkeys(row["class"] for row in rows if row["class"]))

    def text(prompts: list[str]) -> Tensor:
        ids = clip.tokenizer(prompts).to(device)
        return torch.cat([clip.text_features(part).cpu() for part in ids.split(64)])

    scores = 100 * (features * text([row["prompt"] for row in rows])).sum(1)
    for row, score in zip(rows, scores.tolist()):
        row["CLIP score"] = round(score, 3)
    if names:
        for row, i in zip(rows, (features @ text([f"a photo of the {name}" for name in names]).T).argmax(1)):
            row["CLIP says"] = names[i]
    groups = []
    for name in [*names, None]:
        some = [i for i, row in enumerate(rows) if name is None or row["class"] == name]
        part = scores[some]
        groups.append({"class": name or "all", "pictures": len(some), "CLIP score": [
            round(x, 2) for x in (part.mean().item(), *bootstrap([{"": part}], lambda m: m[""]))]})
        if name:
            right = sum(rows[i]["CLIP says"] == name for i in some) / len(some)
            groups[-1]["top-1"] = [round(100 * x, 2) for x in (right, *wilson(right, len(some)))]
    return rows, groups
