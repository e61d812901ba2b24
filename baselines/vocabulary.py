"""Vocabulary mining: a concept's neighbors are the tokenizer's own words, not noise. Ours, in no paper.

    python baselines/vocabulary.py --concept airplane --anchor sky
    python baselines/vocabulary.py --concept airplane --anchor sky --also jet --keep helicopter
    python baselines/vocabulary.py --concept twemoji --task style --set reach=1     # 3 ruins what is drawn

RealEra's two sets around a concept e, what goes with it and what stays, are noise, alike in all directions.
So it cannot tell a synonym from another thing as near. But the text encoder knows real points there: words.
Each whole word w of the tokenizer is put into the task's template. From its token on it has a row of its own,
then rows of the end of the text, nearly copies of each other. By its cosine to e over these rows:

    E = e, the words with a cosine ≥ threshold, and --also       go to the anchor, e*
    K = the words that come next, `contrast` of them             stay, μ each: near, but no part of it
    P = all words that do not go, "" and --keep                  stay

    Δ = reach Σ (e* − e) eᵀ B⁻¹,    B = Σ e eᵀ + μ Σ k kᵀ + λ1 G + λ2 I

where G is the mean of Σ w wᵀ over P's words, plus "" and --keep. Since K stays, Δ must read a concept by what
its neighbors lack; docs/mining.md measures what that does. The words' rows and their sum are made once for a
model and kept in a file: an erasure takes the few words out of the sum that go. λ1 multiplies a mean, so it
does not depend on how many words there are.
"""
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import Job, Pair, edited, run
from plumbing import UserError
from plumbing.book import measured_words
from plumbing.disk import parse_json, readable, whole
from plumbing.drift import edited_rows
from plumbing.edits import text_hash
from plumbing.models import model_name
from plumbing.progress import progress
from plumbing.prompts import TASKS, prompt_of


@dataclass(frozen=True)
class Settings:
    """Chosen on the text alone, on words that no table reports: docs/mining.md."""
    threshold: float = 0.9      # words with at least this cosine to the concept go with it
    contrast: int = 50          # so many of those that follow stay by a weight of their own:
    mu: float = 0.3             # of each (1: as much as a word that goes)
    lambda1: float = 10.0       # weight of the mean word, which stays, and of "" and --keep
    lambda2: float = 0.01       # ridge, times trace(B)/D
    reach: float = 3.0          # e ↦ e + reach (e* − e): so that synonyms arrive, which go a third of the way
    measured: bool = True       # false: the words that this repository measures with are taken for unknown

    def __post_init__(self):
        numbers = self.contrast, self.mu, self.lambda1, self.reach
        if not (-1 <= self.threshold <= 1 and all(0 <= x < math.inf for x in numbers)
                and 0 < self.lambda2 < math.inf):
            raise UserError("the settings need a threshold from -1 to 1, lambda2 above 0, others at least 0")


@dataclass
class Vocabulary:
    """A model's whole words in the task's template."""
    words: list[str]
    rows: Tensor                # [words, 2, D], float16: the word's own row, and that of the end of the text
    times: int                  # that the end's row counts
    gram: Tensor                # [D, D], float64, of all words: see `gram_of`


def gram_of(rows: Tensor, times: int) -> Tensor:
    """Σ w wᵀ + times · z zᵀ over rows [words, 2, D], a word's own w and the end's z -> [D, D], float64."""
    w, z = rows.double().unbind(1)
    return w.T @ w + times * z.T @ z


def whole_words(tokenizer) -> list[str]:
    """All words of plain letters that are one token, in alphabetical order."""
    found = (token[:-4] for token in tokenizer.vocabulary() if token.endswith("</w>"))
    return sorted(word for word in found if word.isascii() and word.isalpha() and word.islower())


@torch.no_grad()
def make_vocabulary(text, task: str) -> Vocabulary:
    """Encode every whole word up to the end of its text (the encoder is causal: what follows takes no part).
    Shows progress: SD's 34,000 words take minutes on a CPU."""
    words, rows, G, template = whole_words(text.tokenizer), [], 0, TASKS[task][0]
    at = text.tokenizer.count(template.format(words[0]))          # the row of the word, its only token
    times = text.tokenizer.length - at - 1
    for i in progress(range(0, len(words), 256), "vocabulary, 256 words each", "batch"):
        ids = text.tokenizer([template.format(word) for word in words[i:i + 256]])[:, :at + 2]
        found = text.encoder(ids.to(text.encoder.final_layer_norm.weight.device))[:, at:]
        rows.append(found.half().cpu())
        G = G + gram_of(rows[-1], times)
    return Vocabulary(words, torch.cat(rows), times, G)


def vocabulary_of(path: Path, text, model: Path, task: str) -> Vocabulary:
    """The vocabulary in a file; made and written if it is not there. Raises UserError if it is of another
    encoder, tokenizer or task."""
    about = {"text_hash": text_hash(model), "task": task, "words": whole_words(text.tokenizer),
             "length": text.tokenizer.length}
    if not path.exists():
        found = make_vocabulary(text, task)
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temporary:
            save_file({"rows": found.rows, "gram": found.gram, "times": torch.tensor(found.times)}, temporary,
                      {"about": json.dumps(about)})
        return found
    with readable(path), safe_open(path, "pt") as file:
        if parse_json((file.metadata() or {}).get("about", "{}"), path) != about:
            raise UserError(f"{path} is not of {model}'s text encoder and tokenizer and of the task {task}: "
                            "give another --vocabulary, or delete it")
        return Vocabulary(about["words"], file.get_tensor("rows"), file.get_tensor("times").item(),
                          file.get_tensor("gram"))


def cosines(pair: Pair, rows: Tensor) -> Tensor:
    """Of each word to the concept, over all n edited rows: rows [words, 2, D] -> [words]."""
    e = (pair.block() if pair.n > 1 else pair.block().expand(2, -1)).float()
    weight = torch.tensor([[1.0], [(pair.n - 1) ** 0.5]])         # in float32: SD's are 200 MB
    return torch.cosine_similarity((weight * rows.float()).flatten(1),
                                   (weight * torch.stack([e[0], e[1:].mean(0)])).flatten()[None])


def around(pair: Pair, vocabulary: Vocabulary, s: Settings, named: set[str]) -> tuple[dict, dict]:
    """The words that go with a concept, and those that come next and stay: {word: cosine}, the nearest first.
    named: words that are neither."""
    found = cosines(pair, vocabulary.rows)
    known = [(vocabulary.words[i], round(found[i].item(), 3)) for i in found.argsort(descending=True).tolist()
             if vocabulary.words[i] not in named]
    goes = {word: cosine for word, cosine in known if cosine >= s.threshold}
    return goes, dict(known[len(goes):len(goes) + s.contrast])


def erase_with_words(pairs: list[Pair], vocabulary: Vocabulary, stay: Tensor, s: Settings,
                     also: list[Tensor] = [], named: set[str] = set()) -> tuple[Tensor, dict[str, tuple]]:
    """Δ [D, D], and per pair what `around` finds. stay [rows, D] counts λ1. also: the edited rows [·, D] of
    names or phrases that go, too. named: words that neither go nor stay."""
    def rows(words) -> Tensor:                                    # sorted: a set's order changes each time
        return vocabulary.rows[[index[word] for word in sorted(words)]]

    index = {word: i for i, word in enumerate(vocabulary.words)}
    named = named | {word for pair in pairs for word in (pair.concept, pair.anchor)}
    found = {str(pair): around(pair, vocabulary, s, named) for pair in pairs}
    gone = {word for goes, _ in found.values() for word in goes}
    out = (gone | named - {pair.anchor for pair in pairs}) & index.keys()
    G = (vocabulary.gram - gram_of(rows(out), vocabulary.times)) / max(1, len(index) - len(out))
    B = C = 0
    for pair in pairs:                                            # what stays counts once for each concept
        goes, nearest = found[str(pair)]
        first, rest = pair.block_star()[0], pair.block_star()[1:].mean(0).nan_to_num()
        E = [pair.block(), *(x[:pair.n] for x in also)]
        E_star = [pair.block_star()[:len(x)] for x in E]
        times = min(vocabulary.times, pair.n - 1) ** 0.5          # a row times √x counts x times
        for w, z in rows(goes).double():
            E, E_star = [*E, torch.stack([w, times * z])], [*E_star, torch.stack([first, times * rest])]
        E, E_star = torch.cat(E), torch.cat(E_star)
        kept = gram_of(rows(set(nearest) - gone), vocabulary.times)
        B = B + E.T @ E + s.mu * kept + s.lambda1 * (G + stay.T @ stay)
        C = C + s.reach * E.T @ (E_star - E)
    B += s.lambda2 * B.trace() / len(B) * torch.eye(len(B), dtype=B.dtype)
    return torch.cholesky_solve(C, torch.linalg.cholesky(B)).T, found


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    job.larger = {"ridge": "lambda2", "stay": "lambda1"}
    if job.task == "style" and s.reach > 1:
        print("warning: a reach above 1 ruins whatever is asked for in an erased style: --set reach=1",
              file=sys.stderr)
    name = f"{model_name(job.model_folder)}-{job.task}-{text_hash(job.model_folder)[:10]}"
    file = Path("out/vocabulary") / f"{name}.safetensors"
    vocabulary = vocabulary_of(job.args.vocabulary or file, job.text, job.model_folder, job.task)
    job.clock("vocabulary")
    also, keep = ([" ".join(name.lower().split()) for name in names or ()]           # CLIP reads no capitals
                  for names in (job.args.also, job.args.keep))
    go, stay = (edited_rows([prompt_of(name, job.task) for name in some], job.text) for some in (also, keep))
    hidden = set() if s.measured else measured_words()
    delta, found = erase_with_words(job.pairs, vocabulary, torch.cat([job.stay(False)[0], *stay]), s,
                                    go, {*also, *keep, *hidden})
    W = edited(job.W0, delta)
    job.clock("closed form")
    for pair, sets in found.items():
        said = (", ".join(f"{word} {cosine:.2f}" for word, cosine in [*words.items()][:8]) for words in sets)
        print("{}: with it {}; near and kept {}".format(pair, *(words or "no word" for words in said)))
    job.report |= {"goes": {pair: goes for pair, (goes, _) in found.items()}, "also": also, "keep": keep,
                   "near and kept": {pair: near for pair, (_, near) in found.items()},
                   "words": len(vocabulary.words), "hidden": sorted(hidden & {*vocabulary.words})}
    return W


if __name__ == "__main__":
    run("Vocabulary", __doc__, Settings, erase, own={
        "--also": {"action": "append", "metavar": "NAME", "help": "goes with the concept; may be repeated"},
        "--keep": {"action": "append", "metavar": "NAME", "help": "stays; may be repeated"},
        "--vocabulary": {"type": Path, "help": "file of the model's words, made if it is not there "
                                               "(default out/vocabulary/MODEL-TASK-HASH.safetensors)"}})
