"""Semantic Surgery: a prompt that holds the concept loses the concept's way in its text rows, others stay.

Paper: Xiong et al. 2025, "Semantic Surgery: Zero-Shot Concept Erasure in Diffusion Models" (NeurIPS).

    python baselines/surgery.py --concept airplane                # out/airplane-surgery
    python baselines/surgery.py --concept airplane --anchor sky   # the way from "sky", not from ""
    python baselines/surgery.py --concept airplane --set beta=-0.12

Nothing is trained and no weight changes: the folder holds run.json and pictures alone. It needs the word, and
takes an anchor as the neutral text n. With e(·) [T, D] the text rows and Δ_c = e(c) − e(n):

    s_c = mean over the T rows of cos(Δ_c, e(p))                  how much of c the prompt p holds
    α_c = sigmoid((s_c + β) / γ)                                  C = all concepts with α_c > τ
    e(p) ← e(p) − max α_c · (e("c₁, c₂, …") − e(n))               c in C: Co-Occurrence Encoding

Where C is empty the rows are the prompt's own, bit for bit. s_c is `presence` of plumbing/drift.py.

- As published: the same, and a visual loop: a detector looks at the picture, and what it still finds is taken
  off in a second drawing (its own weight λ_vis). A detector is a network of its own.
- As coded: β = −0.06, γ = 0.02, τ = 0.5 (with airplane, β = −0.12); the bare words. The cosine is to e(p),
  not to e(p) − e(""). Guidance's other half, "", goes through the same formula: its score counts if it is
  larger than the prompt's; its rows stay. (Read in somebody's copy of the authors' file.)
- As here: no visual loop. The score of "" is not looked at: it is far below 0 (−0.5 on `mini`), so it is not
  the larger one where the concept is. Of several anchors, n is those of C with commas. On `mini`, s is
  0.37 to 0.41 where the prompt has the class's name, 0.04 to 0.37 with a synonym's, and up to 0.28 with
  another class's (cat's in a dog's prompt): 49 pairs of 90 lie above the authors' 0.06, so other classes
  are touched, too.
"""
import dataclasses
import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up
from erasing import Job, run
from plumbing import UserError
from plumbing.cli import settings_of
from plumbing.drift import presence


@dataclass(frozen=True)
class Settings:
    """The values of the authors' README. Where the cosines lie depends on the text space."""
    beta: float = -0.06         # β: minus the score at which half of the way is taken off
    gamma: float = 0.02         # γ: how wide the change from none to all is
    tau: float = 0.5            # τ: α up to here counts as absent

    def __post_init__(self):
        if not (math.isfinite(self.beta) and 0 < self.gamma < math.inf and 0 <= self.tau <= 1):
            raise UserError("the settings need gamma above 0 and tau in 0 … 1")


def drawing(about: dict, text) -> dict:
    """Of an edit's description, what Model.draw is given: `rows`, with the concepts taken off."""
    s, pairs = settings_of(Settings, about["settings"]), list(zip(about["concepts"], about["anchors"]))

    @functools.cache
    def way(*found: tuple[str, str]) -> Tensor:
        """e("c₁, c₂, …") − e(n) [T, D] of these (concept, anchor)."""
        c, n = (", ".join(dict.fromkeys(filter(None, words))) for words in zip(*found))
        e, neutral = text([c, n])
        return e - neutral

    def rows(c: Tensor) -> Tensor:                                # [B, T, D] -> [B, T, D]
        scores = torch.stack([presence(way(pair).to(c), c) for pair in pairs])       # [concepts, B]
        alpha, changed = torch.sigmoid((scores + s.beta) / s.gamma), c.clone()
        for i, a in enumerate(alpha.T):
            if found := [pair for pair, x in zip(pairs, a) if x > s.tau]:
                changed[i] -= a.max() * way(*found).to(c)
        return changed

    return {"rows": rows}


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    said = {"concepts": [pair.concept for pair in job.pairs], "anchors": [pair.anchor for pair in job.pairs]}
    job.report["prompts"] = {"erased": said["concepts"], "anchor": said["anchors"], "retained": []}
    job.drawing = drawing(said | {"settings": dataclasses.asdict(s)}, job.text)
    job.report["presence"] = {}
    for pair in job.pairs:
        c, n = job.text([pair.concept, pair.anchor])
        score = job.report["presence"][pair.concept] = presence(c - n, pair.e.to(c)).item()
        print(f"presence of {pair.concept} in its own prompt: {score:.3f}, "
              f"α {torch.sigmoid(torch.tensor((score + s.beta) / s.gamma)):.2f}")
    return {}


if __name__ == "__main__":
    run("Semantic Surgery", __doc__, Settings, erase, anchor="", suffix="-surgery")
