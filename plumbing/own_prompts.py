"""Prompts of one's own: the CSV of `eval_clip.py --prompts`, and what CLIP says about its pictures."""
import csv
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from plumbing import UserError
from plumbing.book import book, drawn_names, other_sights
from plumbing.cli import RANK
from plumbing.stats import bootstrap, wilson

SEEDS, CLASSES = ("seed", "evaluation_seed", "sd_seed"), ("class", "concept")
GROUPS = ("type", "artist", "label_str", "profession")            # lines of the table, also without --group


def column_names(path: Path, fields: list[str], groups) -> list[str]:
    """In lower case, without blanks, backslash and byte order mark; warns of columns that are not used."""
    names = [name.replace("\\", "").replace("\ufeff", "").strip().lower() or f"column {i}"
             for i, name in enumerate(fields, 1)]
    unused = [name for name in names if name not in ("prompt", *SEEDS, *CLASSES, *GROUPS, *groups)]
    wrong = [f"needs a column {name!r} and a row" for name in ("prompt", *groups) if name not in names]
    wrong += [f"has two columns {name!r}" for name in names if names.count(name) > 1]
    wrong += [f"has {name!r}, as we call a column of ours" for name in ("clip score", "clip says", "picture")
              if name in names]
    wrong += [f"has a column {name!r}: call it seed, or leave it out" for name in unused if "seed" in name]
    if wrong:
        raise UserError(f"{path} {wrong[0]} (columns: {', '.join(names)})")
    if unused and RANK == 0:
        own = any(word in name for name in unused for word in ("guidance", "width", "height"))
        print(f"warning: {path}: columns not used: {', '.join(unused)}"
              + "; guidance and size are the model's own in every row" * own, file=sys.stderr)
    return names


def read_row(names: list[str], fields: list[str], seed: int) -> dict:
    """A row's fields by name; prompt, seed (int) and class (or None) are made sure of. Raises ValueError."""
    if "\0" in "".join(fields):
        raise ValueError("a zero byte: is the file damaged?")
    if len(fields) > len(names):
        raise ValueError("more fields than columns; a prompt with commas needs quotes")
    if len(fields) <= names.index("prompt"):
        raise ValueError("the prompt is empty, as the line ends before it")
    row = dict.fromkeys(names, "") | dict(zip(names, fields))
    seeds = {re.sub(r"\.0*$", "", row.get(name, "").strip()) for name in SEEDS} - {""} or {str(seed)}
    if len(seeds) > 1 or not min(seeds).isdecimal() or int(min(seeds)) >= 2 ** 63:
        raise ValueError("the seed must be one whole number, not negative and below 2 to the 63rd, not "
                         + " and ".join(map(repr, sorted(seeds))))
    name = row.get("class", "").strip() or row.get("concept", "")
    return row | {"prompt": row["prompt"] if row["prompt"].strip() else "", "seed": int(min(seeds)),
                  "class": " ".join(name.lower().split()) or None}                   # CLIP reads no capitals


def read_prompts(path: Path, seed: int, groups=()) -> list[dict]:
    """The rows of --prompts, as `read_row` gives them. groups: columns that must be there, in lower case."""
    rows, empty, line = [], [], 1
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            names = column_names(path, next(reader, []), groups)
            line = reader.line_num + 1                            # the first of a row, which may have more
            for fields in reader:
                if fields:
                    rows.append(read_row(names, fields, seed))
                    empty += [] if rows[-1]["prompt"] else [str(line)]
                line = reader.line_num + 1
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a CSV in UTF-8: {error}") from None
    except (csv.Error, ValueError) as error:
        quotes = ": is a quote not closed, or not doubled within quotes?" * isinstance(error, csv.Error)
        raise UserError(f"{path}, line {line}: {error}{quotes}") from None
    if not rows:
        raise UserError(f"{path} needs a column 'prompt' and a row")
    if empty and RANK == 0:
        print(f"warning: {path}, line {', '.join(empty)}: an empty prompt is drawn as \"\"",
              file=sys.stderr)
    return rows


def names_among(rows: list[dict], others: str | None) -> list[str]:
    """What CLIP chooses among: the rows' classes, and --choose-from A,B,C or else the book's classes,
    other things and scenes, but for a class of which the rows have a synonym. [] where no row has a class."""
    names = [row["class"] for row in rows if row["class"]]
    meant = {own for name, own in drawn_names(book()).items() if name in names and name != own}
    known = others.lower().split(",") if others else [
        name for name in [*other_sights(), *book()["classes"]] if name not in meant]
    among = list(dict.fromkeys([*names, *filter(None, map(str.strip, known))]))
    if others and not names or len(among) < 2:
        raise UserError(f"--choose-from {others} needs a column class in --prompts, and two names or more")
    return among if names else []


@torch.no_grad()
def score_prompts(clip, rows: list[dict], found, names: list[str], groups=()):
    """Per row of the CSV its CLIP score, 100 · cosine of picture and prompt, and CLIP's choice among `names`;
    and a summary per class, per value of each column of `groups`, and over all."""
    features = torch.stack([found[row["prompt"], row["seed"]] for row in rows])      # [rows, P]
    device = clip.logit_scale.device

    def text(prompts: list[str]) -> Tensor:
        ids = clip.tokenizer(prompts).to(device)
        return torch.cat([clip.text_features(part).cpu() for part in ids.split(64)])

    scores = 100 * (features * text([row["prompt"] for row in rows])).sum(1)
    for row, score in zip(rows, scores.tolist()):
        row["CLIP score"] = round(score, 3)
    if names:
        for row, i in zip(rows, (features @ text([f"a photo of the {name}" for name in names]).T).argmax(1)):
            row["CLIP says"] = names[i]
    parts, summaries = {}, []                                     # what a line is about -> its rows' numbers
    for column in dict.fromkeys(name for name in ("class", *groups, *GROUPS) if name in rows[0]):
        for i, row in enumerate(rows):
            if value := "" if row[column] is None else str(row[column]).strip():
                name = ("class", value) if column == "class" else ("group", f"{column}: {value}")
                parts.setdefault(name, []).append(i)
    for (kind, name), some in [*parts.items(), (("class", "all"), list(range(len(rows))))]:
        part = scores[some]
        summaries.append({kind: name, "pictures": len(some), "CLIP score": [
            round(x, 2) for x in (part.mean().item(), *bootstrap([{"": part}], lambda m: m[""]))]})
        if names and all(rows[i]["class"] for i in some):
            right = sum(rows[i]["CLIP says"] == rows[i]["class"] for i in some) / len(some)
            summaries[-1]["top-1"] = [round(100 * x, 2) for x in (right, *wilson(right, len(some)))]
    return rows, summaries
