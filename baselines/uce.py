"""UCE: move a concept's keys and values to another's in closed form, and keep those of a list of prompts.

Paper: Gandikota et al. 2024, "Unified Concept Editing in Diffusion Models". For each cross-attention matrix
W₀, with rows k of the concept, their twins k* of the anchor and rows r of what must stay (realera.py's e, e*
and p), it minimizes

    s_e Σ ‖W k − v‖² + s_p Σ ‖W r − W₀ r‖² + λ ‖W − W₀‖²,    v = W₀ k*                     (replace)

As every target is W₀ times something, one right factor solves it for all matrices, W = W₀ (I + Δ):

    Δ = s_e Σ (k* − k) kᵀ B⁻¹,    B = λ I + s_e Σ k kᵀ + s_p Σ r rᵀ                        [D, D]

With `technique=tensor`, v is W₀ k* less its part along W₀ k, by one inner product over all rows:
W₀ (k* − c k), where c = Σ ⟨W₀ k, W₀ k*⟩ / Σ ‖W₀ k‖² differs from matrix to matrix. So each has its own Δ.

    python baselines/uce.py --concept airplane --anchor sky
    python baselines/uce.py --concept airplane                    # towards "", the authors' choice
    python baselines/uce.py --concept airplane --anchor sky --set rows=token         # their second code
    python baselines/uce.py --concept airplane --anchor sky --set prompts=template   # as rece.py starts

It trains nothing; it needs the text encoder and the matrices alone. As published, as coded, as here:

    λ        paper: free. Both codes: 0.5, in squared units of the text encoder. Here: the same
    k        first code (2023): from the word's last token to the end; k* from the anchor's last token on, the
             longer one cropped at its end. Second (2025): the last token alone. Here: rows=tail, rows=token
    prompts  codes: the bare word. Here: the same; or prompts=template, the task's, which is another edit
    r, s_p   first code: all rows of "" and of each retained text, s_p = max(0.1, 1 / number of texts).
             Second: each text's last token, without "", s_p = 1. Here: the same, with the texts of --retain
    no anchor  codes: k* are the rows of "" from begin-of-text on. Here: the same; with prompts=template from
             the row after it on
    left out  1,734 artists that the first code retains for a style, and more prompts for a concept
"""
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import Job, edited, run
from plumbing import UserError
from plumbing.drift import last_tokens
from plumbing.prompts import TASKS, retained_words


@dataclass(frozen=True)
class Settings:
    """The authors' values; sums are over rows of the text encoder in its own units."""
    rows: str = "tail"          # k: the word's last token and all after it; token: that token alone
    prompts: str = "word"       # the bare word; template: the task's prompt
    technique: str = "replace"  # or tensor
    lamb: float = 0.5           # λ
    erase_scale: float = 1.0    # s_e
    preserve_scale: float = -1  # s_p; -1: the authors' rule
    retain: str = ""            # --retain: words, separated by commas; or nouns: those that realera.py keeps

    def __post_init__(self):
        for name, values in (("rows", ("tail", "token")), ("prompts", ("word", "template")),
                             ("technique", ("replace", "tensor"))):
            if getattr(self, name) not in values:
                raise UserError(f"the settings need {name} = {' or '.join(values)}, "
                                f"not {getattr(self, name)}")
        if not (0 < self.lamb < math.inf and 0 < self.erase_scale < math.inf
                and (self.preserve_scale == -1 or 0 <= self.preserve_scale < math.inf)):
            raise UserError("the settings need lamb and erase_scale above 0, preserve_scale at least 0 or "
                            "-1")


def uce(E: Tensor, E_star: Tensor, stay: Tensor, s: Settings) -> Tensor:
    """Δ [D, D], float64; rows E, E_star [n, D], and stay [p, D]."""
    B = s.erase_scale * E.T @ E + s.preserve_scale * stay.T @ stay
    B += s.lamb * torch.eye(len(B), dtype=B.dtype)
    return torch.cholesky_solve(s.erase_scale * E.T @ (E_star - E), torch.linalg.cholesky(B)).T


def apart(k: Tensor, k_star: Tensor, W0: Tensor) -> Tensor:
    """k* − c k [n, D]: W₀ times it, as one long vector, is orthogonal to W₀ k."""
    values, wanted = k @ W0.T, k_star @ W0.T                      # [n, out]
    return k_star - (values * wanted).sum() / values.square().sum() * k


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    job.larger = {"ridge": "lamb", "stay": "lamb"}
    template = "{}" if s.prompts == "word" else TASKS[job.task][0]
    texts = ["", *map(template.format, retained_words(s.retain, job.pairs))]
    texts = texts[1:] if s.rows == "token" else texts
    stay = last_tokens(job.text, texts) if s.rows == "token" else job.text(texts).cpu().double().flatten(0, 1)
    if s.preserve_scale == -1:
        s = dataclasses.replace(s, preserve_scale=1.0 if s.rows == "token" else max(0.1, 1 / len(texts)))
    job.about["settings"], job.report["prompts"]["retained"] = dataclasses.asdict(s), texts
    job.report["units"] = {"lamb": "absolute, squared units of the text encoder"}

    k, k_star = zip(*((pair.block(), pair.block_star()) for pair in job.pairs))
    if s.technique == "replace":
        W = edited(job.W0, uce(torch.cat(k), torch.cat(k_star), stay, s))
    else:
        W = {}
        for name, W0 in job.W0.items():
            targets = [apart(*both, W0.double()) for both in zip(k, k_star)]
            W |= edited({name: W0}, uce(torch.cat(k), torch.cat(targets), stay, s))
    job.clock("closed form")
    return W


if __name__ == "__main__":
    run("UCE", __doc__, Settings, erase, anchor="", own={
        "--retain": {"metavar": "WORDS", "help": "what must stay: \"bird, cat\"; nouns: as realera.py"}})
