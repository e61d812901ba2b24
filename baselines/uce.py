"""UCE: move a concept's keys and values to another's in closed form, and keep those of a list of prompts.

Paper: Gandikota et al. 2024, "Unified Concept Editing in Diffusion Models", as in the authors' first code.

    python baselines/uce.py --concept airplane --anchor sky
    python baselines/uce.py --concept airplane                    # towards "", the authors' choice

The same as `rece.py --rounds 0`: rows from the concept's last token on go to the anchor's, those of "" stay.
All matrices get one right factor, W = W₀ (I + Δ), with e, e*, r [D] rows of concept, anchor and "":

    Δ = s_e Σ (e* − e) eᵀ (l₁ I + s_e Σ e eᵀ + s_p Σ r rᵀ)⁻¹      [D, D]
"""
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import Job, edited, run
from plumbing import UserError


@dataclass(frozen=True)
class Settings:
    """The authors' values; sums are over rows of the text encoder in its own units."""
    l1: float = 0.5             # ridge
    s_e: float = 1.0            # weight of the rows to erase
    s_p: float = 1.0            # weight of the rows of "", which must stay

    def __post_init__(self):
        if not (0 < self.l1 < math.inf and 0 < self.s_e < math.inf and 0 <= self.s_p < math.inf):
            raise UserError("the settings need l1 and s_e above 0, and s_p at least 0")


def uce(E: Tensor, E_star: Tensor, stay: Tensor, s: Settings) -> Tensor:
    """Δ [D, D], float64, for all matrices at once; E, E_star, stay [rows, D]."""
    B = s.s_e * E.T @ E + s.s_p * stay.T @ stay + s.l1 * torch.eye(E.shape[1], dtype=E.dtype)
    return torch.cholesky_solve(s.s_e * E.T @ (E_star - E), torch.linalg.cholesky(B)).T


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    job.larger = {"ridge": "l1", "stay": "l1"}
    E, E_star = (torch.cat(rows) for rows in zip(*((p.block(), p.block_star()) for p in job.pairs)))
    return edited(job.W0, uce(E, E_star, job.stay(False).flatten(0, 1), s))


if __name__ == "__main__":
    run("UCE", __doc__, Settings, erase, anchor="")
