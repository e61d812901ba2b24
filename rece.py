"""RECE: erase a concept, derive what would bring it back, erase that too, and again.

Paper: Gong et al. 2024, "Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models".

    python rece.py --concept airplane                              # towards "", three rounds
    python rece.py --concept airplane --anchor sky --rounds 1
    python rece.py --concept airplane --anchor sky --edit out/airplane          # on top of RealEra
    python rece.py --concept "van gogh" --task style --rounds 1 --lambda 1e-3 \\
        --model CompVis/stable-diffusion-v1-4

All closed forms, and all in one matrix: every cross-attention matrix becomes W₁ T, where W₁ are the weights
of the start (the original's W₀, or an edit's) and T is [D, D]. A round needs two sums over the matrices:

    G = Σ W₁ᵀ W₁,  C = Σ W₁ᵀ W₀                     [D, D], once
    e_adv = (Tᵀ G T + λ I)⁻¹ (Tᵀ C e + λ e′)        what makes W₁ T do what W₀ does on e
    T ← T (I + Δ),  Δ = s_e Σ (e_t − e_adv) e_advᵀ (s_e Σ e_adv e_advᵀ + s_p Σ r rᵀ + l₁ I)⁻¹

The last is Eq. 7 again. e′ is 0 or the target ("regularizer"), e_t the target's rows, r those of ""; λ, l₁,
s_e and s_p are the settings lam, l1, erase and retain. The authors' λ and rounds, in the units of SD v1.4's
text space: 1e-1 and 3 for nudity, 1e-1 and 2 for other unsafe concepts, 1e-3 and 1 for styles and hard
objects, 1e-1 and 1 for easy ones (none where UCE alone does). Nothing guarantees that what is regained falls
from round to round; it is printed. As here, of the task's prompt: a round has all rows, the start
those from the concept's last token on, an empty target's from the one after begin-of-text on. As coded: of
the bare concept, and an empty target's from begin-of-text on.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from erasing import Job, edited, run
from eval_clip import CLIP
from plumbing import UserError, svg
from plumbing.edits import about_edit, gram, read_edit
from plumbing.pictures import write_sheet
from plumbing.prompts import TASKS, filled, names_to_choose
from plumbing.weights import put_weights
from realera import closed_form


@dataclass(frozen=True)
class Settings:
    """The authors' values; sums are over rows of the text encoder in its own units, unlike realera.py's."""
    rounds: int = 3             # of deriving and erasing; 0: the start alone
    lam: float = 0.1            # --lambda: how far the derived embedding is held back
    regularizer: str = "zero"   # the derived embedding is drawn to: zero, or the target's embedding
    l1: float = 0.1             # ridge of a round
    erase: float = 1.0          # weight of the rows to erase
    retain: float = 0.1         # weight of the rows of "", which must stay
    start_l1: float = 0.5       # the same three for the first erasure, of the concept's own rows
    start_erase: float = 1.0
    start_retain: float = 1.0
    real_prompts: bool = False  # True: realera.py's real prompts must stay, too; the authors keep "" alone

    def __post_init__(self):
        above = (self.lam, self.l1, self.start_l1, self.erase, self.start_erase)
        if not (self.rounds >= 0 and all(0 < x < math.inf for x in above)
                and all(0 <= x < math.inf for x in (self.retain, self.start_retain))):
            raise UserError("the settings need rounds and weights (retain) at least 0, weights (erase) and "
                            "ridges (lambda, l1, start_l1) above 0")
        if self.regularizer not in ("zero", "target"):
            raise UserError(f"the settings need regularizer = zero or target, not {self.regularizer}")


def derive(T: Tensor, G: Tensor, C: Tensor, e: Tensor, lam: float, towards: Tensor | None = None) -> Tensor:
    """The rows that make W₁ T act like W₀ does on e: argmin Σ ‖W₁ T e_adv − W₀ e‖² + λ ‖e_adv − towards‖².

    T, G, C [D, D], e [rows, D] -> [rows, D], float64. `towards`: 0. UserError if λ is lost beside G.
    """
    right = T.T @ (C @ e.T) + (0 if towards is None else lam * towards.T)
    factor, failed = torch.linalg.cholesky_ex(T.T @ G @ T + lam * torch.eye(len(T), dtype=T.dtype))
    if failed:
        raise UserError(f"nothing can be derived with --lambda {lam}: use a larger one")
    return torch.cholesky_solve(right, factor).T


def regained(T: Tensor, G: Tensor, C: Tensor, G0: Tensor, e: Tensor, e_star: Tensor, e_adv: Tensor) -> float:
    """The share of the squared distance from target to concept that e_adv regains, 1 − Σ‖W₁Te_adv − W₀e‖² /
    Σ‖W₀(e* − e)‖²: 1 where keys and values are the concept's again, 0 where as far off as the target's."""
    seen, shift = e_adv @ T.T, e_star - e                         # W₁ meets T e_adv
    missed = ((seen @ G) * seen).sum() - 2 * ((seen @ C) * e).sum() + ((e @ G0) * e).sum()
    return 1 - (missed / ((shift @ G0) * shift).sum()).item()


def erase_rows(E: Tensor, E_star: Tensor, stay: Tensor, l1: float, erase: float, retain: float) -> Tensor:
    """Δ of Eq. 7 in absolute units, [D, D]: UCE's edit. E, E_star, stay [rows, D]; l1 is the ridge."""
    E, E_star = erase ** 0.5 * E, erase ** 0.5 * E_star
    trace = E.square().sum() + retain * stay.square().sum()
    return closed_form([(E, E_star, stay)], retain, (l1 * E.shape[1] / trace).item())[0]


def iterate(e: Tensor, e_star: Tensor, stay: Tensor, T: Tensor, G: Tensor, C: Tensor, s: Settings):
    """The rounds, from T on; e, e_star [concepts · tokens, D]. Yields (T before, derived rows, T after)."""
    for _ in range(s.rounds):
        e_adv = derive(T, G, C, e, s.lam, e_star if s.regularizer == "target" else None)
        before, T = T, T + T @ erase_rows(e_adv, e_star, stay, s.l1, s.erase, s.retain)
        yield before, e_adv, T


def draw_rounds(job: Job, given: dict[str, Tensor], W1: dict[str, Tensor], rounds: list, n: int) -> list[str]:
    """round<i>.png and .svg: a row per concept, drawn from what was derived, before and after its erasure.
    given: the weights of the start, keys and values or others.
    Returns what CLIP sees of the concepts, if the model's folder has one: ["airplane 4/4 → 0/4", …]."""
    model, pairs, said = job.model, job.pairs, []
    clip = CLIP.from_pretrained(model.folder / "clip") if (model.folder / "clip").is_dir() else None
    names = names_to_choose(pairs, job.task)
    texts = [filled(TASKS[job.task][0], name) for name in names]
    for i, (before, e_adv, after) in enumerate(rounds, 1):
        rows = e_adv.float().unflatten(0, (len(pairs), -1)).repeat_interleave(n, 0)  # [concepts · n, T, D]
        drawn = []
        for T in (before, after):
            put_weights(model.unet, given | edited(W1, T - torch.eye(len(T), dtype=T.dtype)))
            drawn.append(model.draw(rows, [job.seed + j for _ in pairs for j in range(n)]))
        drawn = [pictures.unflatten(0, (-1, n)) for pictures in drawn]               # [concepts, n, 3, H, W]
        write_sheet(job.folder / f"round{i}.png", *drawn)
        svg.write(job.folder / f"round{i}.svg", svg.sheet(
            list(zip(*drawn)), [pair.concept for pair in pairs], ["before", "after"],
            f"Round {i}: drawn from what was derived, before and after its erasure"))
        if clip:
            first = [clip.classify(x.flatten(0, 1), texts).argmax(1).view(-1, n) for x in drawn]
            said += [f"round {i}, {pair.concept}: " + " → ".join(
                f"{(guess[j] == names.index(pair.concept)).sum()}/{n}" for guess in first)
                for j, pair in enumerate(pairs)]
    return said


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    """The start, the rounds on top of it, and what each of them regained."""
    pairs, W0, start = job.pairs, job.W0, job.args.edit
    job.larger = dict.fromkeys(("ridge", "stay"), "l1 and start_l1")                 # retain keeps "" alone
    e, e_star = torch.cat([pair.e for pair in pairs]), torch.cat([pair.e_star for pair in pairs])
    stay = job.stay(s.real_prompts).flatten(0, 1)
    given = read_edit(start, job.model_folder) if start else {}
    W1 = {name: given.get(name, W) for name, W in W0.items()}     # an edit may leave some alone
    G = C = G0 = gram(W0, W0)
    if start:
        G, C = gram(W1, W1), gram(W1, W0)
    job.clock("G")
    T = I = torch.eye(len(G), dtype=G.dtype)
    if not start:
        E, E_star = (torch.cat(rows) for rows in zip(*((p.block(), p.block_star()) for p in pairs)))
        T = I + erase_rows(E, E_star, stay, s.start_l1, s.start_erase, s.start_retain)
    rounds = list(iterate(e, e_star, stay, T, G, C, s))
    T = rounds[-1][-1] if rounds else T
    W = edited(W1, T - I)
    job.clock("rounds")
    if job.preview:
        return W
    job.say("closed form", W, **{"cond(G)": torch.linalg.cond(G, 1).item()})
    shares = [[regained(at, G, C, G0, e, e_star, e_adv) for at in (before, after)]
              for before, e_adv, after in rounds]
    for i, (before, after) in enumerate(shares, 1):
        print(f"round {i}: the derived rows regain {before:.1%} of the squared distance; "
              f"after their erasure {after:.1%}")
    last = derive(T, G, C, e, s.lam, e_star if s.regularizer == "target" else None)
    left = regained(T, G, C, G0, e, e_star, last)
    print(f"rows derived now would regain {left:.1%} of the squared distance")
    job.about["start"] = about_edit(start) if start else None
    job.report |= {"regained": shares, "left": left}

    def draw() -> None:
        said = job.report["rounds"] = draw_rounds(job, given, W1, rounds, job.args.n)
        if said:
            print("drawn from what was derived, before → after its erasure", *said, sep="\n")
        job.clock("pictures of the rounds")

    job.later.append(draw)
    return given | W


if __name__ == "__main__":
    run("RECE", __doc__, Settings, erase, anchor="", own={        # the authors' " " has the same tokens as ""
        "--rounds": {"type": int, "help": "of deriving and erasing (default 3; 0: the start alone)"},
        "--lambda": {"type": float, "dest": "lam", "help": "holds the derived embedding back (default 0.1)"},
        "--edit": {"help": "start from this edit of the model, not from a first erasure"}})
