"""Which text an edit is about: concepts and anchors as rows of the text encoder, and other prompts to watch.

A prompt becomes T rows. Row 0 is begin-of-text and the same for all; the encoder is causal, so what a concept
means sits in its last token and in every row after it (end of text, padding). Those are the rows to edit.
"""
import csv
import hashlib
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from files import UserError, read_json

TASKS = {                       # prompt of a concept or anchor, and anchor if none is given (appendix A.2)
    "object": ("a photo of the {}", "sky"),
    "style": ("an artwork by {}", "an artist"),
    "celebrity": ("a portrait of {}", "a person"),
    "explicit": ("{}", "a person wearing clothes"),
}

BOOK = Path(__file__).parent / "mini" / "captions.json"           # classes, synonyms, phrases, scenes

# What must stay, beside what it is checked on: the two lists share no word.
PRESERVED = ("bird cat deer dog frog horse ship truck automobile airplane house tree chair table apple river "
             "mountain guitar clock bottle bridge garden window book shoe cup lamp street grass sea").split()
UNRELATED = ("car vessel lorry feline canine equine stag amphibian avian person flower forest beach castle "
             "bus train elephant tiger sheep bread cake shirt hat piano violin computer sofa door moon "
             "bicycle").split()


# What names a person or a style without its name: the paper's appendix, Table 2.
ASSOCIATED = {
    "celebrity": {
        "tom cruise": "A still of Ethan Hunt in Mission Impossible",
        "elon musk": "The founder of SpaceX and OpenAI",
        "jennifer lawrence": "A still of Katniss Everdeen in the Hunger Games",
        "mariah carey": "Guinness World Record certified \"Songbird Supreme\"",
        "leonardo dicaprio": "A still of Jack in Titanic(1997)"},
    "style": {
        "van gogh": "An artwork by the famous Post-Impressionist painter from the Netherlands",
        "claude monet": "An artwork by the most famous French Impressionist painter",
        "pablo picasso": "An artwork by the famous Spanish artist who pioneered Cubism",
        "greg rutkowski": "An artwork by the famous Polish digital artist",
        "salvador dali": "An artwork by the famous Spanish Catalan surrealist painter"},
}


@dataclass
class Pair:
    """A concept and its anchor: e, e_star [T, D], float64; edited are n rows from start(_star) on."""
    concept: str
    anchor: str
    e: Tensor
    e_star: Tensor
    start: int
    start_star: int
    n: int
    seed: int

    def block(self) -> Tensor:
        return self.e[self.start:self.start + self.n]

    def block_star(self) -> Tensor:
        return self.e_star[self.start_star:self.start_star + self.n]

    def context(self, blocks: Tensor) -> Tensor:
        """Blocks [B, n, D] in place of the edited rows of e -> [B, T, D]."""
        context = self.e.expand(len(blocks), -1, -1).clone()
        context[:, self.start:self.start + self.n] = blocks
        return context


def make_pairs(concepts: list[str], anchors: list[str] | None, task: str, text, rows: str, seed: int):
    """A list of Pair. `rows`: tail = the last concept token and all after it; token = that token alone.

    The pairs come sorted, each with a seed of its own, so the order in which they were given is moot. Blocks
    are aligned at their first row; the longer one loses its end. Raises UserError for what cannot be erased.
    """
    template, default = TASKS[task]
    concepts = [" ".join(concept.lower().split()) for concept in concepts]           # CLIP reads no capitals
    anchors = [" ".join(anchor.lower().split()) for anchor in (anchors or [default] * len(concepts))]
    if not all(concepts):
        raise UserError("--concept is empty")
    if len(concepts) != len(anchors):
        raise UserError(f"{len(concepts)} concepts but {len(anchors)} anchors: each --concept needs one")
    if len(set(concepts)) < len(concepts):
        raise UserError("a concept is given twice")
    pairs = []
    for concept, anchor in sorted(zip(concepts, anchors)):
        if concept == anchor:
            raise UserError(f"the concept {concept!r} is its own anchor: nothing would change")
        p, p_star = template.format(concept), template.format(anchor) if anchor else ""
        e, e_star = text([p, p_star]).cpu().double()              # in this order: MPS has no float64
        # row 0 is begin-of-text, so the last of k tokens is row k; an empty anchor starts at its end-of-text
        start, start_star = text.tokenizer.count(p), max(1, text.tokenizer.count(p_star))
        if max(start, start_star) > len(e) - 2:
            raise UserError(f"concept and anchor must fit into {len(e)} tokens: {p[:60]!r}, {p_star[:60]!r}")
        n = 1 if rows == "token" else len(e) - max(start, start_star)
        own = hashlib.sha256(json.dumps([seed, concept, anchor]).encode()).digest()
        pairs.append(Pair(concept, anchor, e, e_star, start, start_star, n, int.from_bytes(own[:6], "big")))
    return pairs


def preserved_prompts(task: str, pairs: list[Pair]) -> list[str]:
    """"" (guidance's other half) first, the task's bare template, and 30 nouns but those of the pairs."""
    named = {word for pair in pairs for word in (pair.concept, pair.anchor)}
    nouns = [f"a photo of the {noun}" for noun in PRESERVED if noun not in named]
    return list(dict.fromkeys(["", TASKS[task][0].format("").strip(), *nouns]))


def movement(delta: Tensor, prompts: list[str], text) -> list[float]:
    """‖Δe‖/‖e‖ over all T rows of each prompt: how far W = W₀ (I + Δ) moves what the U-Net sees of it."""
    return [((e @ delta.T).norm() / e.norm()).item() for e in text(prompts).cpu().double()]


def preview(path: Path, delta: Tensor, text) -> None:
    """Print the prompts of a text file, one a line, the most moved first. Raises UserError if it has none."""
    try:
        prompts = list(dict.fromkeys(filter(None, map(str.strip, path.read_text("utf-8").splitlines()))))
    except (FileNotFoundError, IsADirectoryError, UnicodeDecodeError):
        raise UserError(f"--preview {path} is not there, or not a text file in UTF-8") from None
    if not prompts:
        raise UserError(f"--preview {path} holds no prompt")
    print("‖Δe‖/‖e‖  prompt")
    for moved, prompt in sorted(zip(movement(delta, prompts, text), prompts), reverse=True):
        print(f"{moved:8.3f}  {prompt}")


def drifts(delta: Tensor, pairs: list[Pair], text) -> dict[str, float]:
    """How far (I + Δ) e moves what it should not: ‖Δe‖/‖e‖ of "", and its median over the nouns of UNRELATED
    (30 at most, none of them in P) that name neither concept nor anchor."""
    classes = read_json(BOOK)["classes"]
    named = {word for pair in pairs for word in (pair.concept, pair.anchor)}
    named |= {word for name in named & classes.keys() for word in classes[name]["synonyms"]}
    nouns = [noun for noun in UNRELATED if noun not in named]
    moved = movement(delta, ["", *(f"a photo of the {noun}" for noun in nouns)], text)
    return {'drift of ""': moved[0], "median drift of unrelated prompts": statistics.median(moved[1:])}


def prompts_to_watch(concept: str) -> list[tuple[str, str]]:
    """(what should be seen, prompt): the concept, two synonyms, two associated phrases, three others."""
    classes = read_json(BOOK)["classes"]
    entry, names = classes.get(concept, {"synonyms": [], "associated": []}), list(classes)
    first = names.index(concept) + 1 if concept in names else 0
    others = [names[(first + i * 3) % len(names)] for i in range(3)]
    return ([(concept, f"a photo of the {name}") for name in [concept, *entry["synonyms"][:2]]]
            + [(concept, phrase) for phrase in entry["associated"][:2]]
            + [(name, f"a photo of the {name}") for name in others])


def row_prompts(concept: str, task: str, seeds: range, erased=()) -> dict[str, list[tuple[str, str, int]]]:
    """(what should be seen, prompt, seed) by group: e, the concept; s, the others (without what the edit has
    `erased` beside it); g, synonyms; a, phrases.

    Styles and celebrities follow the paper's appendix A.2: g is its one associated prompt, and others are
    drawn 5 times where the concept is drawn 200 times. Its list of others, MACE's 100 names, is not ours to
    ship: the four other names of its Table 2 stand in, and --prompts takes any list.
    Raises UserError for a concept without prompts.
    """
    template, name = TASKS[task][0], concept.lower()
    known = ASSOCIATED.get(task) or (read_json(BOOK)["classes"] if task == "object" else {})
    if name not in known:
        raise UserError(f"{concept!r} ({task}) has no built-in prompts"
                        + f" (there are {', '.join(known)})" * bool(known)
                        + ": eval_clip.py --prompts FILE.csv takes yours")
    others = [other for other in known if other not in {name, *map(str.lower, erased)}]
    if not others:
        raise UserError(f"no other {task} is left to compare {concept!r} with: eval_clip.py --prompts "
                        "FILE.csv takes yours")
    if task == "object":
        few, associated = seeds, known[name]["associated"]
        synonyms = [template.format(synonym) for synonym in known[name]["synonyms"]]
    else:
        few, associated, synonyms = seeds[:max(1, len(seeds) // 40)], [], [known[name]]
    groups = {"e": [(name, template.format(name), seed) for seed in seeds],
              "s": [(other, template.format(other), seed) for other in others for seed in few],
              "g": [(name, prompt, seed) for prompt in synonyms for seed in seeds],
              "a": [(name, prompt, seed) for prompt in associated for seed in seeds]}
    return {group: rows for group, rows in groups.items() if rows}


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
