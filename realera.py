"""RealEra: erase a concept, and what lies near it, from a text-to-image model.

Paper: Liu et al., "RealEra: Semantic-level Concept Erasure via Neighbor-Concept Mining", Algorithm 1.

    python realera.py --concept airplane --anchor sky                    # on mini/, half a minute on a laptop
    python realera.py --concept airplane --anchor sky --lora-steps 200   # with Eqs. (8) and (9): a minute
    python realera.py --concept "van gogh" --anchor art --task style --model CompVis/stable-diffusion-v1-4 \\
        --device cuda --dtype bfloat16

The paper's symbols, as they are called here (T tokens, D text width, n rows that are edited):

    e, e*      e, e_star    [n, D]   rows of "a photo of the airplane", "… sky" from the last token on
    v̂          v_hat        [n, D]   unit direction from e towards noise
    r, r', l   r, r_anchor, l        radii of a neighbor, its target, a beyond-concept; D1 … are in ‖e‖
    η          eta          [n, D]   perturbation r v̂: e + η is a neighbor concept
    E, E*, P   E, E_star, P [m, D]   rows that are moved, where to, and rows that must stay (P: [p, D])
    W₀, Δ      W0, delta    [D, D]   the model's matrices; the edit, W = W₀ (I + Δ) for all of them at once
    ε, ε̂       eps, target           noise predicted by the edited network (student), the original (teacher)
    z_t, t     z, t                  latents on the original's way to a picture of the anchor
"""
import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import Callable, Iterable, Iterator

import torch
from torch import Tensor

from erasing import Job, Pair, edited, run
from lora import add_lora, lora_layers, lora_off, save_lora
from plumbing import UserError
from plumbing.training import descend
from plumbing.weights import put_weights

WORDS = {"tolerance": ("own", "same"), "mining": ("sampled", "expected"), "rows": ("tail", "token"),
         "aim": ("anchor", "closed")}


@dataclass(frozen=True)
class Settings:
    """The method's numbers. lambda1, tolerance and lora_steps were chosen on `mini`, on words that no table
    reports; lr is the paper's; most others were best on the first `mini`."""
    D1: float = 1.1             # largest distance of a neighbor, in ‖e‖ (section 4.1)
    D1_anchor: float = 1.1      # the same around the anchor: the tolerance at the end of section 4.1
    tolerance: str = "same"     # same: r' = r; own, as printed: r' is drawn by itself, up to D1_anchor
    mining: str = "sampled"     # expected: what sampling gives on average, without a random number
    D2: float = 1.8             # beyond-concepts lie between D1 and D2 (section 4.2)
    S1: float = 0.7             # a neighbor's cosine lies between S2 and S1; a beyond-concept's below S2
    S2: float = 0.3
    M: int = 100                # neighbors per concept; 0: none, and every LoRA step is an odd one (Eq. 8)
    N: int = 30                 # beyond-concepts per concept; 0: none, and Eq. 9 keeps its first term alone
    lambda1: float = 40.0       # weight of what must stay; with section 5's 0.1 other classes are lost here
    lambda2: float = 0.01       # ridge, times trace(B)/D; not in Eq. 7, but B must be invertible
    real_prompts: bool = True   # P holds real prompts too: the bare template and nouns; "" in any case
    rows: str = "tail"          # tail: the last concept token and all after it; token: that token alone
    reach: float = 1.0          # e ↦ e + reach (e* − e) in Eq. 7: not in the paper, a rival to mining
    lid: float = 0.0            # weight of 2e* − e ↦ e* in Eq. 7: against the mirror attack (docs/mining.md)
    share: bool = False         # True: neighbors weigh 1/M and beyond-concepts 1/N each; Eq. 7 has 1 each
    rank: int = 4               # of the LoRA
    lora_steps: int = 0         # 200 "epochs" in section 5; at this lr they add nothing: docs/results.md
    aim: str = "anchor"         # of the alignment; closed: not e* but where the closed form sends e (ours)
    lr: float = 1e-5            # section 5; 5e-4 leads phrases back: docs/results.md
    batch: int = 8              # latents per LoRA step
    trajectories: int = 8       # pictures of the anchor whose latents are learned from; a quarter is held out

    def __post_init__(self):
        for right, rule in ((-1 <= self.S2 < self.S1 <= 1, f"cosines S2 < S1, not {self.S2} and {self.S1}"),
                            (0 < self.D1 < self.D2, f"0 < D1 < D2, not {self.D1} and {self.D2}"),
                            (min(self.D1_anchor, self.M, self.N, self.lambda1, self.lambda2, self.lid) >= 0,
                             "D1_anchor, M, N, lambda1, lambda2 and lid at least 0"),
                            (self.lora_steps >= 0 and self.lr > 0, "lora_steps at least 0 and lr above 0"),
                            (self.tolerance == "own" or self.D1_anchor == type(self).D1_anchor,
                             "tolerance=own with a D1_anchor, which does nothing otherwise"),
                            (self.rank > 0 and self.batch > 0 and self.trajectories > 1,
                             "rank and batch at least 1, trajectories at least 2"),
                            *((getattr(self, name) in words, f"{name} = {' or '.join(words)}, not "
                               f"{getattr(self, name)}") for name, words in WORDS.items())):
            if not right:
                raise UserError(f"the settings need {rule}")


# -------------------------------------------------------------------------- mining, sections 4.1, 4.2

def towards_noise(e: Tensor, generator: torch.Generator) -> Tensor:
    """v̂ = (v − e)/‖v − e‖, v ~ N(0, σ²). The paper's σ = 1 is read as the text space's own, ‖e‖/√(nD)."""
    v = torch.randn(e.shape, generator=generator, dtype=e.dtype) * (e.norm() / math.sqrt(e.numel()))
    return (v - e) / (v - e).norm()


def radius_at(cosine: float, e: Tensor, v_hat: Tensor) -> float:
    """The r at which cos(e, e + r v̂) has fallen to `cosine`, by the law of sines; infinite if never."""
    widest, angle = math.acos((e * v_hat).sum() / e.norm()), math.acos(cosine)      # from e to v̂: about 135°
    return math.inf if angle >= widest else e.norm().item() * math.sin(angle) / math.sin(widest - angle)


def neighbor_radii(e: Tensor, v_hat: Tensor, s: Settings) -> tuple[float, float]:
    """The limits of r. The cosine falls with r, so r can be drawn from those that pass: none is rejected."""
    # Eq. (6): both of these at once
    return room(radius_at(s.S1, e, v_hat),
                min(s.D1 * e.norm().item(),                       # Eq. (3): d(e, e + η) = r ≤ D1
                    radius_at(s.S2, e, v_hat)), "neighbor")       # Eq. (4): S2 ≤ cos(e, e + η) ≤ S1


def beyond_radii(e: Tensor, v_hat: Tensor, s: Settings) -> tuple[float, float]:
    size = e.norm().item()
    return room(max(s.D1 * size, radius_at(s.S2, e, v_hat)), s.D2 * size, "beyond-concept")


def room(low: float, high: float, what: str) -> tuple[float, float]:
    if low >= high:
        raise UserError(f"no {what} satisfies both distance and cosine limits: change D1, D2, S1 or S2")
    return low, high


def uniform(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()


def neighbor_concepts(e: Tensor, e_star: Tensor, s: Settings, generator) -> tuple[Tensor, Tensor]:
    """M neighbors of the concept, and where to map them: e, e_star [n, D] -> [M, n, D], [M, n, D].
    Algorithm 1, lines 4–12. Raises UserError if D1, S1, S2 leave no room."""
    near, near_star = e.repeat(s.M, 1, 1), e_star.repeat(s.M, 1, 1)
    for i in range(s.M):
        v_hat = towards_noise(e, generator)
        nearest, farthest = neighbor_radii(e, v_hat, s)
        r = uniform(nearest, farthest, generator)
        eta = r * v_hat                                           # Eq. (5)
        r_anchor = r if s.tolerance == "same" else uniform(0, s.D1_anchor * e.norm().item(), generator)
        near[i] += eta
        near_star[i] += r_anchor * v_hat                          # the same direction: some tolerance
    return near, near_star


def beyond_concepts(e: Tensor, s: Settings, generator: torch.Generator) -> Tensor:
    """N points outside the neighborhood, to be left where they are: e [n, D] -> [N, n, D].
    Algorithm 1, lines 13–22; its line 21 would stop after one draw, which we take for a slip."""
    far = e.repeat(s.N, 1, 1)
    for i in range(s.N):
        v_hat = towards_noise(e, generator)
        l = uniform(*beyond_radii(e, v_hat, s), generator)
        far[i] += l * v_hat
    return far


def expected_concepts(e: Tensor, e_star: Tensor, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Few rows with the sums in Eq. (7) that M neighbors and N beyond-concepts have on average over noise:
    multiples of e and of the unit matrix, see docs/mining.md. [n, D], [n, D] -> E, E*, P [n + D, D]."""
    d, D = math.sqrt(2) * e.norm().item(), e.shape[1]             # d = ‖v − e‖, but for O(1/√nD)
    noise = e.norm() / math.sqrt(D) * torch.eye(D, dtype=e.dtype)                    # √n σ I

    def moments(low: float, high: float) -> tuple[float, float]:  # of α = r/d, r uniform in low … high
        return (low + high) / (2 * d), (low * low + low * high + high * high) / (3 * d * d)

    a, a2 = moments(*neighbor_radii(e, -e / d, s))                # E[α], E[α²]
    beta = moments(0, s.D1_anchor * e.norm().item())[0]           # E[β], β = r'/d: independent of α
    back, more = (0, 0) if s.tolerance == "same" else (beta * (1 - a) - a + a2, beta * a - a2)
    left, g = math.sqrt(1 - 2 * a + a2), moments(*beyond_radii(e, -e / d, s))
    E = torch.cat([left * e, math.sqrt(a2) * noise])
    E_star = E + torch.cat([((1 - a) * (e_star - e) - back * e) / left, more / math.sqrt(a2) * noise])
    P = torch.cat([math.sqrt(1 - 2 * g[0] + g[1]) * e, math.sqrt(g[1]) * noise])
    return math.sqrt(s.M) * E, math.sqrt(s.M) * E_star, math.sqrt(s.N) * P


# -------------------------------------------------------------------------- closed form, Eq. 7

def closed_form(parts: Iterable[tuple], lambda1: float, lambda2: float) -> tuple[Tensor, float]:
    """The edit Δ [D, D] with W = W₀ (I + Δ), and B's condition number (1-norm). parts: E, E_star [m, D] and P
    [p, D] of each concept. Only their sums are kept: at SD's size the rows of 100 concepts fill 10 GB.

    Every target is W₀ times something, so one right factor solves it for every W₀: with a ridge λ2 ‖W − W₀‖²
    the gradient is 0 where W B = W₀ (Σ e* eᵀ + λ1 Σ p pᵀ + λ2 I). λ2 is `lambda2` times the mean of B's
    diagonal. Raises UserError if it is 0 and the rows do not span all D dimensions."""
    B = C = 0
    for E, E_star, P in parts:
        E, E_star, P = E.double(), E_star.double(), P.double()    # squares of fp32 rows need more than fp32
        B, C = B + (E.T @ E + lambda1 * P.T @ P), C + E.T @ (E_star - E)             # Cᵀ in docs/mining.md
    B += lambda2 * B.trace() / len(B) * torch.eye(len(B), dtype=B.dtype)
    cond = torch.linalg.cond(B, 1).item()                         # the 2-norm's would cost all eigenvalues
    if not cond < 1e14:
        raise UserError("Eq. 7 has no unique solution: too few rows; raise the ridge (lambda2; RECE: l1)")
    # Eq. (7): Δ = Σ (e* − e) eᵀ · B⁻¹
    return torch.cholesky_solve(C, torch.linalg.cholesky(B)).T, cond


# -------------------------------------------------------------------------- noise alignment, Eqs. 8, 9

def noise_alignment_loss(eps: Callable, z: Tensor, t: Tensor, target: Tensor, c: Tensor,
                         beyond: Tensor | None = None, beyond_target: Tensor | None = None) -> Iterator:
    """Mean squared distances of the student's eps(z, t, c) to the teacher's, term by term: each can be
    differentiated, and its graph freed, before the next is computed. z [B, 4, h, w], c [B, T, D].

    Odd steps: c is the concept, `target` = ε̂(z, t, e*). Even steps: c is a neighbor, and `beyond` must give
    what it gave, ε̂(z, t, beyond). The paper prints squared norms; the mean only rescales them."""
    yield (eps(z, t, c) - target).square().mean()                 # Eq. (8)
    if beyond is not None:
        yield (eps(z, t, beyond) - beyond_target).square().mean()                    # Eq. (9) adds this


# -------------------------------------------------------------------------- Algorithm 1

def mine(pair: Pair, s: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """Algorithm 1, lines 1–23, for one concept: its rows of E, E* and P, each [rows, D]."""
    e, anchor = pair.block(), pair.block_star()
    e_star = e + s.reach * (anchor - e)
    if s.mining == "expected":
        near, near_star, far = expected_concepts(e, e_star, s)
    else:
        generator = torch.Generator().manual_seed(pair.seed)
        near, near_star = (rows.flatten(0, 1) for rows in neighbor_concepts(e, e_star, s, generator))
        far = beyond_concepts(e, s, generator).flatten(0, 1)
    # A row times √x counts x times in Eq. 7; if they share, x is 1/M and 1/N.
    w, u = (max(s.M, 1) ** -0.5, max(s.N, 1) ** -0.5) if s.share else (1, 1)
    E, E_star = [e, w * near], [e_star, w * near_star]
    if s.lid:
        E, E_star = [*E, s.lid ** 0.5 * (2 * anchor - e)], [*E_star, s.lid ** 0.5 * anchor]
    return torch.cat(E), torch.cat(E_star), u * far


def erase_in_closed_form(pairs: list[Pair], stay: Tensor, s: Settings) -> tuple[Tensor, float]:
    """Algorithm 1, lines 1–24: Δ [D, D] and cond(B). `stay` [prompts, T, D] is in each concept's P, or many
    would outweigh it. Beyond-concepts are noise, which holds the other concepts, too: of n they count 1/n."""
    stay, u = stay.cpu().double().flatten(0, 1), len(pairs) ** -0.5
    parts = ((E, E_star, torch.cat([u * P, stay])) for E, E_star, P in (mine(pair, s) for pair in pairs))
    return closed_form(parts, s.lambda1, s.lambda2)


@contextlib.contextmanager
def as_teacher(unet, W0: dict[str, Tensor]):
    """The teacher ε̂, inside a `with` block: the student's network with W₀ in place and LoRA off."""
    student = {name: unet.get_parameter(name).data for name in W0}
    put_weights(unet, W0)
    try:
        with lora_off(unet):
            yield unet
    finally:
        put_weights(unet, student)                                # before any backward pass


@dataclass
class Trajectories:
    """Latents on the way to an anchor's pictures, and the noise that the original network predicts there."""
    z: Tensor                   # [pictures, steps, 4, h, w]
    t: Tensor                   # [steps]
    target: Tensor              # [pictures, steps, 4, h, w], ε̂(z, t, e*)

    def pick(self, pictures: range, batch: int, generator: torch.Generator):
        i = torch.randint(pictures.start, pictures.stop, (batch,), generator=generator)
        j = torch.randint(len(self.t), (batch,), generator=generator)
        found = [(self.z[k, l], self.t[l], self.target[k, l]) for k, l in zip(i.tolist(), j.tolist())]
        return map(torch.stack, zip(*found))                      # z[i, j] would wait to send i, j to a GPU


def align_noise(model, pairs: list[Pair], ways: list[Trajectories], W0: dict[str, Tensor],
                s: Settings) -> dict[str, list[float]]:
    """Algorithm 1, lines 25–31: train the network's LoRA on Eqs. 8 and 9 in turn. Returns both losses, before
    and after, on latents and perturbations that were held out: {"Eq. 8": [before, after], "Eq. 9": […]}."""
    unet, held_out = model.unet, max(1, s.trajectories // 4)
    W0 = {name: W.to(unet.get_parameter(name)) for name, W in W0.items()}     # so that a swap copies nothing

    def eps(z: Tensor, t: Tensor, c: Tensor) -> Tensor:
        c = c.to(model.dtype).pin_memory() if model.device.type == "cuda" else c.to(model.dtype)
        return unet(z.to(model.dtype), t, c.to(model.device, non_blocking=True)).float()       # no waiting

    def loss(step: int, generator: torch.Generator, pictures: range, batch: int) -> Iterator[Tensor]:
        i = (step - 1) // 2 % len(pairs)
        pair, (z, t, target) = pairs[i], ways[i].pick(pictures, batch, generator)
        if step % 2 or not s.M:                                   # without neighbors every step is odd
            return noise_alignment_loss(eps, z, t, target, pair.e.expand(batch, -1, -1))
        many = dataclasses.replace(s, M=batch, N=batch)           # fresh ones, one of each per latent
        near = pair.context(neighbor_concepts(pair.block(), pair.block_star(), many, generator)[0])
        if not s.N:                                               # Table 3's variant 3
            return noise_alignment_loss(eps, z, t, target, near)
        beyond = pair.context(beyond_concepts(pair.block(), many, generator))
        with torch.no_grad(), as_teacher(unet, W0):
            beyond_target = eps(z, t, beyond)
        return noise_alignment_loss(eps, z, t, target, near, beyond, beyond_target)

    @torch.no_grad()
    def measure() -> dict[str, float]:
        generator = torch.Generator().manual_seed(1)              # the same draws both times
        pictures = range(s.trajectories - held_out, s.trajectories)
        return {name: torch.stack([sum(loss(step, generator, pictures, 4 * s.batch))
                                   for step in range(first, 4 * len(pairs) + 1, 2)]).mean().item()
                for name, first in (("Eq. 8", 1), ("Eq. 9", 2))[:2 if s.M else 1]}

    lora = [p for name, p in unet.named_parameters() if ".lora_" in name]
    before, generator = measure(), torch.Generator().manual_seed(pairs[0].seed)
    descend(lora, lambda step: loss(step, generator, range(s.trajectories - held_out), s.batch), s.lora_steps,
            torch.optim.Adam(lora, s.lr), "noise alignment", dtype=model.dtype)
    after = measure()
    if not all(map(math.isfinite, after.values())):
        raise UserError("the loss became NaN after the last step: try a smaller lr, or --dtype float32")
    return {name: [before[name], after[name]] for name in after}


def erase(job: Job, s: Settings) -> dict[str, Tensor]:
    """Algorithm 1: the closed form, and a LoRA that aligns the noise, in one matrix each."""
    job.larger = {"ridge": "lambda2", "stay": "lambda1"}
    stay = job.stay(s.real_prompts)
    delta, cond = erase_in_closed_form(job.pairs, stay, s)
    W = edited(job.W0, delta)
    job.clock("closed form")
    job.say("closed form", W, **{"cond(B)": cond})
    if not s.lora_steps or job.preview:
        return W
    unet = job.model.unet
    aims = [p.e_star if s.aim == "anchor" else p.e + p.e @ delta.T for p in job.pairs]
    ways = [Trajectories(*job.model.trajectories(aim, stay[0], p.seed, s.trajectories))
            for aim, p in zip(aims, job.pairs)]
    job.clock("trajectories")
    add_lora(unet, s.rank, seed=job.seed)
    put_weights(unet, W)
    unet.low_memory = job.args.low_memory
    losses = align_noise(job.model, job.pairs, ways, job.W0, s)
    for name, (before, after) in losses.items():
        change = f" ({after / before - 1:+.1%})" if before > 1e-7 else ""            # aim=closed: 0, nearly
        print(f"{name} on held-out latents: {before:.2e} → {after:.2e}{change}")
    save_lora(unet, job.folder / "residual_lora.safetensors",
              {"needs": "the closed form of erased.safetensors: by itself this does not erase"})
    job.report["losses"] = losses
    job.clock("noise alignment")
    return W | {f"{name}.weight": W[f"{name}.weight"] + layer.delta().cpu()
                for name, layer in lora_layers(unet).items()}


if __name__ == "__main__":
    run("RealEra", __doc__, Settings, erase, suffix="", own={
        "--lora-steps": {"type": int, "help": "of the noise alignment: 200 in section 5 (default 0: none)"},
        "--low-memory": {"action": "store_true", "help": "train in less memory, more slowly"}})
