"""SPEED: erase within the null space of what must stay, which then does not move at all.

Paper: Li et al. 2026, "SPEED: Scalable, Precise, and Efficient Concept Erasure for Diffusion Models" (ICLR).
Of the value matrices alone, with columns t of the concepts and a of their anchors,

    min Σ ‖(W₀ + Δ) t − W₀ a‖² + s_r ‖Δ‖²    so that    Δ B = 0,  Δ K₂ = 0      Σ: mean over concepts

B: eigenvectors of R, the mean of r rᵀ over what must stay, whose eigenvalues reach a threshold. K₂: columns
of "", its first row and three centres of the others. N: a basis of what is orthogonal to B and K₂. So
Δ = X Nᵀ, and the gradient in X is 0 for

    Δ = W₀ (A − T) N (Nᵀ T N + s_r I)⁻¹ Nᵀ,    T = Σ t tᵀ,  A = Σ a tᵀ                      [out, D]

The paper's W₀ (A − T) P [I − M K₂ (K₂ᵀ P M K₂ + λ I)⁻¹ K₂ᵀ P] M, with P = I − B Bᵀ and M = (T P + s_r I)⁻¹,
is the same for λ = 0, but its inner inverse fails where P leaves nearly nothing of a column of K₂. For one t
tᵀ N (Nᵀ t tᵀ N + s_r I)⁻¹ Nᵀ = uᵀ / (s_r + ‖u‖²), u = N Nᵀ t, and A − T = (a − t) tᵀ. So the edit
W₀ (a − t) uᵀ / (s_r + ‖u‖²) has rank one, and, but for the noise below, one direction u in every layer.

    python baselines/speed.py --concept airplane --anchor sky --retain nouns [--set as_published=false]

It trains nothing, and needs text encoder and matrices alone. Coded, and if not said the same here:

    t, a     the last token of the bare word (for "nudity" all rows but the first: as rows=tail, nearly)
    r        last tokens of a list, here --retain; without one all rows of "" but the first
    filter   of r stay those with ‖W_e r‖ above the mean, W_e = W₀ (A − T)(I + T)⁻¹; for one concept
             |tᵀ r|. filter=false: all; as_published=false: no filter, no noise, though both are published
    noise    copies r + z v, z ~ N(0, 1), v what W₀ shrinks most of its row space, those with ‖W_e r‖ above
             the copies' mean (there of each 128 rows, here of all). aug_num=0: none, and no filter
    threshold  0.1 (paper: "zero") is in the text encoder's units: a row's square is 768 in SD v1.4, 205 here
    K₂, λ    k-means from random rows, here from --seed and kept in K2.safetensors; λ = 0
"""
import dataclasses
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import Job, run
from plumbing import UserError
from plumbing.drift import last_tokens
from plumbing.prompts import retained_words


@dataclass(frozen=True)
class Settings:
    threshold: float = 0.1      # eigenvalues of R from here on stay (all values are the authors')
    retain_scale: float = 1.0   # s_r; 0.05 for many celebrities
    lamb: float = 0.0           # λ
    aug_num: int = 10           # noisy copies of each retained row
    filter: bool = True         # retain only rows that the edit would move much
    as_published: bool = True   # False: aug_num 0 and filter False
    retain: str = ""            # --retain: words, separated by commas; or nouns: those that realera.py keeps
    rows: str = "token"         # or tail: the last token and all after it
    prompts = "word"            # not to be set

    def __post_init__(self):
        if not (0 < self.threshold < math.inf and 0 < self.retain_scale < math.inf and self.aug_num >= 0
                and 0 <= self.lamb < math.inf and self.rows in ("token", "tail")):
            raise UserError("needed: threshold, retain_scale > 0, lamb, aug_num ≥ 0, rows = token or tail")


def centres(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k-means (Lloyd): rows [n, D] -> [k, D], from k of the rows at random."""
    found = rows[torch.randperm(len(rows), generator=generator)[:k]]
    for _ in range(100):
        near = torch.cdist(rows, found).argmin(1)
        found = torch.stack([rows[near == i].mean(0) if i in near else found[i] for i in range(k)])
    return found


def retained_rows(rows: Tensor, W0: Tensor, W_e: Tensor, s: Settings, generator: torch.Generator) -> Tensor:
    """What R is made of in one layer: rows [n, D] that pass the filter, and their noisy copies."""
    def moved_most(rows: Tensor) -> Tensor:
        moved = (rows @ W_e.T).norm(dim=1)
        return rows[moved > moved.mean()] if len(rows) > 1 else rows
    rows = moved_most(rows) if s.filter and s.aug_num else rows   # as coded: without copies no filter either
    copies, v = rows.repeat(s.aug_num, 1), torch.linalg.svd(W0, full_matrices=False).Vh[-1]     # v [D]
    z = torch.randn(len(copies), 1, generator=generator, dtype=rows.dtype)
    return torch.cat([rows, moved_most(copies + z * v)])


def solve(T: Tensor, rows: Tensor, K2: Tensor, s: Settings) -> tuple[Tensor, int]:
    """What Δ is W₀ (A − T) times, [D, D], and the number of columns of B. rows [n, D], K2 [D, columns]."""
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    N = vectors[:, values < s.threshold]                                             # [D, m]: P = N Nᵀ
    if not s.lamb:
        left, sizes, _ = torch.linalg.svd(N.T @ K2)
        N = N @ left[:, (sizes > 1e-6 * K2.norm()).sum():]                           # less is rounding
    if not N.shape[1]:
        raise UserError(f"threshold = {s.threshold} keeps all {len(T)} directions: nothing can be erased")
    G = N @ torch.linalg.solve(N.T @ T @ N + s.retain_scale * torch.eye(N.shape[1]).double(), N.T)
    if s.lamb:
        inner = K2.T @ G @ K2 + s.lamb * torch.eye(K2.shape[1]).double()
        G = G - G @ K2 @ torch.linalg.solve(inner, K2.T @ G)
    return G, (values >= s.threshold).sum().item()


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    job.larger = dict.fromkeys(("ridge", "stay"), "retain_scale")
    s = s if s.as_published else dataclasses.replace(s, aug_num=0, filter=False)
    words, empty = retained_words(s.retain, job.pairs), job.stay(False)[0]           # [T, D]
    generator = torch.Generator().manual_seed(job.seed)
    rows = last_tokens(job.text, words) if words else empty[1:]
    K2 = torch.cat([empty[:1], centres(empty[1:], 3, generator)]).T                  # [D, 4]
    t, a = (torch.cat(x).T for x in zip(*((p.block(), p.block_star()) for p in job.pairs)))
    T, A, W, kept = t @ t.T / len(job.pairs), a @ t.T / len(job.pairs), {}, {}
    for name in (name for name in job.W0 if name.endswith("to_v.weight")):
        W0 = job.W0[name].double()
        W_e = torch.linalg.solve(torch.eye(len(T)).double() + T, W0 @ (A - T), left=False)
        right, kept[name] = solve(T, retained_rows(rows, W0, W_e, s, generator), K2, s)
        W[name] = (W0 + W0 @ (A - T) @ right).float()
    job.clock("closed form")
    job.about["settings"], job.report["prompts"]["retained"] = dataclasses.asdict(s), words or [""]
    job.report |= {"directions kept": kept, "retained rows": "last token" if words else "all but the first",
                   "K2": {"rule": "begin-of-text, k-means of the rest of \"\"", "columns": K2.shape[1]},
                   "units": {"threshold": "absolute, squared units of the text encoder"}}
    if not job.preview:
        save_file({"K2": K2.contiguous()}, job.folder / "K2.safetensors")
    return W


if __name__ == "__main__":
    run("SPEED", __doc__, Settings, erase, anchor="", own={
        "--retain": {"metavar": "WORDS", "help": "what must stay: \"bird, cat\"; nouns: as realera.py"}})
