"""What is graded of each of the ten exercises.

An exercise has its points, its equation, our function and `parts`, which calls an `Answer` with inputs: first
the worked number of its docstring, then values and gradients, an error, and rules that hold by the equation.
"""
from dataclasses import dataclass
from typing import Callable

import torch
from torch import Tensor

import diffusion
import realera
import rece
from course import ours
from course.checking import Answer, Wrong, equal, evenly, rows, uniform, within, x

WORKED = "the worked number of the docstring"
SHAPES = "Let torch complain: no loop, no zip, no cutting to size."


@dataclass(frozen=True)
class Exercise:
    number: int
    name: str
    points: int
    ours: Callable
    equation: str
    parts: Callable             # of an Answer; raises Wrong or ToDo


EXERCISES: list[Exercise] = []


def exercise(points: int, function: Callable, equation: str):
    """The function below becomes the parts of the next exercise."""
    return lambda parts: EXERCISES.append(Exercise(
        len(EXERCISES) + 1, parts.__name__.removeprefix("parts_of_"), points, function, equation, parts))


@exercise(2, diffusion.guided, "u + s (c − u): Ho & Salimans 2021, Eq. (6)")
def parts_of_guided(f: Answer):
    hint = "s = 0 gives u, s = 1 gives c, and a larger s goes on the same way. Which way leads from u to c?"
    f.value(hint, part=WORKED, u=x([1, 2]), c=x([2, 0]), s=7.5)
    for shape, s in (((3,), 3.0), ((2, 4, 8, 8), 7.5), ((1, 4, 2, 3), -1.0)):
        f.value(hint, "u", "c", u=rows(*shape, seed=1), c=rows(*shape, seed=2), s=s)
    f.error("u and c have different shapes", SHAPES, u=rows(2, 4, seed=1), c=rows(3, 4, seed=2), s=2.0)
    u = rows(2, 4, seed=1)
    f.rule("where u = c there is nowhere to go", u, hint, u=u, c=u, s=7.5)


@exercise(3, ours.ddim_step, "√a' (z − √(1 − a) ε)/√a + √(1 − a') ε: Song et al. 2021, Eq. (12)")
def parts_of_ddim_step(f: Answer):
    hint = ("First z_0, by a alone; then mix it with the same noise, by a_next alone. In both, the squares "
            "of the two factors add up to 1.")
    f.value(hint, part=WORKED, z=x([1]), noise=x([0.5]), a=x(0.25), a_next=x(0.64))
    for shape, a, a_next in (((3,), 0.1, 0.3), ((2, 4, 8, 8), 0.0047, 0.02), ((1, 4, 2, 3), 0.9, 0.9991)):
        f.value(hint, "z", "noise", "a", "a_next", z=rows(*shape, seed=1), noise=rows(*shape, seed=2), a=x(a),
                a_next=x(a_next))
    f.error("z and noise have different shapes", SHAPES, z=rows(2, 4, seed=1), noise=rows(3, 4, seed=2),
            a=x(0.2), a_next=x(0.4))
    z0, noise = rows(2, 4, seed=3), rows(2, 4, seed=4)
    f.rule("a picture in noise becomes the same picture in less of it", 0.8 * z0 + 0.6 * noise, hint,
           z=0.6 * z0 + 0.8 * noise, noise=noise, a=x(0.36), a_next=x(0.64))


@exercise(5, ours.cross_attention, "softmax(q kᵀ / √d) v: Vaswani et al. 2017, Eq. (1)")
def parts_of_cross_attention(f: Answer):
    hint = ("A pixel's weights for all rows add up to 1: over which axis? d is the width of one head. The "
            "weights are [out, in]. Heads are cut from the last axis, [B, L, C] -> [B, heads, L, d].")
    I = torch.eye(2, dtype=torch.float64)
    f.value(hint, part=WORKED, x=x([[[1, 0]]]), context=I[None], W_q=I, W_k=I, W_v=x([[1, 0], [0, 3]]),
            heads=1)

    def inputs(B, L, C, T, D, heads):
        return dict(x=rows(B, L, C, seed=1), context=rows(B, T, D, seed=2), W_q=rows(C, C, seed=3),
                    W_k=rows(C, D, seed=4), W_v=rows(C, D, seed=5), heads=heads)

    for sizes in ((1, 3, 4, 5, 4, 1), (2, 6, 8, 5, 7, 2), (2, 4, 8, 3, 8, 4)):
        f.value(hint, "x", "context", "W_q", "W_k", "W_v", **inputs(*sizes))
    f.error("C = 8 is no multiple of 3 heads", "unflatten and reshape complain, slices do not.",
            **inputs(1, 2, 8, 3, 4, 3))
    one, many = inputs(2, 3, 4, 1, 6, 2), inputs(2, 3, 4, 5, 6, 2)
    f.rule("of a single row every pixel gets the value", (one["context"] @ one["W_v"].T).expand(-1, 3, -1),
           hint, **one)
    f.rule("the order of the rows is no matter", f.ours(**many), hint,
           **many | {"context": many["context"].flip(1)})


@exercise(3, ours.towards_noise, "v̂ = (v − e)/‖v − e‖, v = ‖e‖/√(nD) · noise: RealEra, above Eq. (5)")
def parts_of_towards_noise(f: Answer):
    hint = "Which way is v from e? The whole block has one norm, ‖e‖, and v is about as large."
    f.value(hint, part=WORKED, e=x([[3, 4]]), noise=x([[1, 1]]))
    for n, D, size in ((2, 3, 1.0), (6, 16, 4.0), (1, 5, 0.1)):
        f.value(hint, "e", "noise", e=rows(n, D, seed=1, size=size), noise=rows(n, D, seed=2))
    f.error("noise and e have different shapes", SHAPES, e=rows(6, 4, seed=1), noise=rows(5, 4, seed=2))
    e, noise = rows(6, 16, seed=3), rows(6, 16, seed=4)
    f.rule("the norm of v̂ is 1", 1.0, hint, torch.linalg.norm, e=e, noise=noise)
    f.rule("an e of 7 times the size has the same direction", f.ours(e, noise), hint, e=7 * e, noise=noise)


@exercise(4, realera.radius_at, "r = ‖e‖ sin a / sin(w − a): how far RealEra's Eq. (4) lets a neighbor go")
def parts_of_radius_at(f: Answer):
    hint = ("a and w are angles, math.acos of cosines. That of e and v̂ needs a division by ‖e‖, the norm of "
            "the whole block. Where e is twice as large, so is r.")
    f.value(hint, part=WORKED, cosine=0.5, e=x([[3, 4]]), v_hat=x([[-0.8, 0.6]]))
    for i, (n, D, size) in enumerate(((1, 3, 1.0), (6, 16, 4.0), (4, 64, 0.1))):
        e = rows(n, D, seed=i, size=size)
        v_hat = ours.towards_noise(e, rows(n, D, seed=10 + i))
        for cosine in (0.99, 0.7, 0.1, -0.2):
            f.value(hint, cosine=cosine, e=e, v_hat=v_hat)
        f.value("The cosine never falls below that of v̂ itself, however large r is: return math.inf.",
                part="math.inf where no r is enough", cosine=-0.99, e=e, v_hat=v_hat)
    f.error("the cosine is 1.5", "math.acos complains; torch.acos gives NaN, which has to be asked for.",
            cosine=1.5, e=e, v_hat=v_hat)
    f.rule("cos(e, e + r v̂) is the cosine that was asked for", x([0.4]), hint,
           lambda r: cosines(e, (e + r * v_hat)[None]), cosine=0.4, e=e, v_hat=v_hat)


def cosines(e: Tensor, blocks: Tensor) -> Tensor:
    """e [n, D], blocks [M, n, D] -> [M]."""
    return torch.nn.functional.cosine_similarity(e.flatten()[None], blocks.flatten(1))


def radii(inputs: dict, start: Tensor, v_hat: Tensor, blocks, hint: str) -> Tensor:
    """r [M] of blocks = start + r v̂. Raises Wrong for other shapes, and where a block lies elsewhere."""
    if not isinstance(blocks, Tensor) or blocks.shape != v_hat.shape:
        raise Wrong("shapes", inputs, f"a tensor {list(v_hat.shape)}", blocks, "Each noise gives one block.")
    r = ((blocks - start) * v_hat).sum((1, 2))
    equal("Eq. (5), the direction", inputs, start + r[:, None, None] * v_hat, blocks, hint)
    return r


def drawn(M: int, n: int, D: int, size: float, **limits: float) -> dict:
    return limits | dict(e=rows(n, D, seed=1, size=size), e_star=rows(n, D, seed=2, size=size),
                         noise=rows(M, n, D, seed=3), u=uniform(M, 4), u_star=uniform(M, 5))


# The inputs of exercises 6 and 7: the docstrings' first; hundreds of draws show a distribution.
HALF = x([0.5])
MINED = (dict(e=x([[3, 4]]), e_star=x([[1, 0]]), noise=x([[[-1, 7]]]) * 2 ** 0.5 / 5, u=HALF, u_star=HALF,
              D1=1.1, D1_anchor=0.6, D2=1.8, S1=0.8, S2=0.5),
         drawn(250, 4, 8, size=3.0, D1=0.9, D1_anchor=0.4, D2=1.6, S1=0.9, S2=0.6),
         drawn(5, 6, 16, size=0.2, D1=1.1, D1_anchor=1.1, D2=1.8, S1=0.7, S2=0.3),
         drawn(250, 1, 32, size=1.0, D1=0.6, D1_anchor=0.5, D2=2.0, S1=0.95, S2=0.2))


def limits(S: float, e: Tensor, v_hat: Tensor) -> Tensor:
    """[M]: how far the cosine S lets each direction go."""
    return x([realera.radius_at(S, e, way) for way in v_hat])


@exercise(6, ours.neighbor_concepts, "d(e, e+η) ≤ D1, S2 ≤ cos(e, e+η) ≤ S1, η = r v̂: RealEra, Eqs. (3)–(6)")
def parts_of_neighbor_concepts(f: Answer):
    hint = ("The cosine is S1 at the nearest r and S2 at the farthest, unless D1 ‖e‖ comes first: radius_at "
            "tells both. u says where between them.")
    along = "Each block has its own noise[i]; it starts at e, its target at e*, and both go along its v̂."

    def blocks(part, **inputs):
        got = f(part, **inputs)
        if not isinstance(got, tuple) or len(got) != 2:
            raise Wrong(part, inputs, "two tensors, neighbors and targets", got, along)
        return got

    for case in MINED:
        inputs = {name: case[name] for name in "e e_star noise u u_star D1 D1_anchor S1 S2".split()}
        e, size = inputs["e"], inputs["e"].norm()
        near, near_star = blocks("Eqs. (3)–(6)", **inputs)
        v_hat = torch.stack([ours.towards_noise(e, one) for one in inputs["noise"]])
        r = radii(inputs, e, v_hat, near, along)
        r_star = radii(inputs, inputs["e_star"], v_hat, near_star, along)
        within("Eq. (3), d(e, e + η) = r", inputs, r, 0, case["D1"] * size, "D1 is in units of ‖e‖.")
        within("Eq. (4), cos(e, e + η)", inputs, cosines(e, near), case["S2"], case["S1"], hint)
        within("Algorithm 1, line 5, r'", inputs, r_star, 0, case["D1_anchor"] * size,
               "r' lies between 0 and D1_anchor ‖e‖: no cosine limits it.")
        if len(r) > 100:
            low, high = limits(case["S1"], e, v_hat), limits(case["S2"], e, v_hat).minimum(case["D1"] * size)
            shares, shares_star = (r - low) / (high - low), r_star / (case["D1_anchor"] * size)
            evenly("the distribution of r, Eq. (6)", inputs, shares, hint)
            evenly("the distribution of r'", inputs, shares_star, "r' is uniform, by u_star.")
            together = torch.corrcoef(torch.stack([shares, shares_star]))[0, 1:]
            within("the correlation of r and r'", inputs, together, -0.2, 0.2, "r' has its own draw: u_star.")
    f.error("D1 lets no neighbor be as far as S1 demands", "Compare the nearest r with the farthest.",
            **inputs | {"D1": 0.01})
    part, inputs = "rule: a text space twice as large has neighbors twice as far", inputs | {
        "e": 2 * e, "e_star": 2 * inputs["e_star"]}
    for once, twice in zip((near, near_star), blocks(part, **inputs)):
        equal(part, inputs, 2 * once, twice, "All lengths are in units of ‖e‖.")


@exercise(4, ours.beyond_concepts, "e + l v̂, D1 ‖e‖ ≤ l < D2 ‖e‖, cosine < S2: RealEra, section 4.2")
def parts_of_beyond_concepts(f: Answer):
    hint = "The cosine is below S2 from radius_at(S2, …) on; D1 and D2 are in units of ‖e‖. Both must hold."
    for case in MINED:
        inputs = {name: case[name] for name in "e noise u D1 D2 S2".split()}
        e, size = inputs["e"], inputs["e"].norm()
        far = f("section 4.2", **inputs)
        v_hat = torch.stack([ours.towards_noise(e, one) for one in inputs["noise"]])
        l = radii(inputs, e, v_hat, far, "Each point has its own noise[i], and lies on its way from e.")
        within("D1 ‖e‖ ≤ l < D2 ‖e‖", inputs, l, case["D1"] * size, case["D2"] * size, hint)
        within("cos(e, e + l v̂) < S2", inputs, cosines(e, far), -1, case["S2"], hint)
        if len(l) > 100:
            low = limits(case["S2"], e, v_hat).maximum(case["D1"] * size)
            evenly("the distribution of l", inputs, (l - low) / (case["D2"] * size - low), hint)
    f.error("D2 lets no point be as far as S2 demands", "Compare the nearest l with the farthest.",
            **inputs | {"D1": 0.1, "D2": 0.11})
    f.rule("in a text space twice as large all is twice as far", 2 * far, "All lengths are in units of ‖e‖.",
           **inputs | {"e": 2 * e})


@exercise(6, ours.closed_form, "Δ = Σ (e* − e) eᵀ · B⁻¹: RealEra, Eq. (7)")
def parts_of_closed_form(f: Answer):
    hint = ("A column e of the formula is a row of E: which product of E and itself is [D, D]? B⁻¹ stands on "
            "the right, a linear solve puts it on the left. λ1 weighs P alone; the ridge has B's units.")
    one = x([[0, 1]])
    f.value(hint, part=WORKED, E=x([[1, 0]]), E_star=one, P=one, lambda1=1.0, lambda2=1.0)

    def inputs(m, p, D, size=1.0):
        return dict(E=rows(m, D, seed=1, size=size), E_star=rows(m, D, seed=2, size=size),
                    P=rows(p, D, seed=3, size=size))

    for sizes, lambda1, lambda2 in (((3, 2, 4), 0.1, 0.01), ((20, 12, 8), 1.0, 0.5),
                                    ((6, 6, 6, 30.0), 3.0, 0.01)):
        f.value(hint, "E", "E_star", "P", **inputs(*sizes), lambda1=lambda1, lambda2=lambda2)
    single = {name: block.float() for name, block in inputs(4, 4, 12, 40.0).items()}
    f.value("The squares of float32 rows need more digits: .double() before the first product.",
            part="values from float32 rows", **single, lambda1=1.0, lambda2=1e-4)
    f.error("B has no inverse: 3 rows in 8 dimensions, no ridge", "A solve may give 1e16 without a word: ask "
            "torch.linalg.cond.", **inputs(2, 1, 8), lambda1=1.0, lambda2=0.0)
    given, W0 = inputs(5, 7, 6), rows(3, 6, seed=4)
    f.rule("where e* = e nothing is edited", torch.zeros(6, 6), hint, **given | {"E_star": given["E"]},
           lambda1=0.1, lambda2=0.01)
    B = sum(torch.outer(e, e) for e in given["E"]) + 0.1 * sum(torch.outer(p, p) for p in given["P"])
    ridge = 0.01 * B.trace() / 6 * torch.eye(6, dtype=torch.float64)
    right = sum(torch.outer(W0 @ a, e) for a, e in zip(given["E_star"], given["E"])) + W0 @ (
        ridge + 0.1 * sum(torch.outer(p, p) for p in given["P"]))
    f.rule("W₀ (I + Δ) is what solves Eq. (7) for a layer W₀ by itself", right @ torch.linalg.inv(B + ridge),
           hint, lambda delta: W0 + W0 @ delta, **given, lambda1=0.1, lambda2=0.01)


@exercise(3, ours.noise_alignment_loss, "‖ε − ε̂‖², and + ‖ε'' − ε̂''‖²: RealEra, Eqs. (8), (9)")
def parts_of_noise_alignment_loss(f: Answer):
    hint = "A mean of squares for each term; the second has its own prompt and target, the same z and t."

    def eps(z, t, c):
        return torch.tanh(z + (t / 1000).view(-1, 1, 1, 1) + c.mean((1, 2)).view(-1, 1, 1, 1))

    def plain(z, t, c):
        return z + c.mean()

    def inputs(B, even):
        z, t = rows(B, 4, 2, 3, seed=1), torch.arange(B) * 300 + 100
        odd = dict(eps=eps, z=z, t=t, target=rows(B, 4, 2, 3, seed=2), c=rows(B, 3, 5, seed=3))
        more = dict(beyond=rows(B, 3, 5, seed=4), beyond_target=rows(B, 4, 2, 3, seed=5))
        return odd | more if even else odd

    zero, c = torch.zeros(1, 4, 2, 2, dtype=torch.float64), torch.full((1, 2, 2), 3.0, dtype=torch.float64)
    odd = dict(eps=plain, z=zero, t=torch.tensor([9]), target=zero, c=c)
    f.value(hint, part=f"{WORKED}, Eq. (8)", **odd)
    f.value(hint, part=f"{WORKED}, Eq. (9)", **odd, beyond=c / 3, beyond_target=zero)
    for B in (1, 3):
        f.value(hint, "c", part="values, Eq. (8)", **inputs(B, False))
        f.value(hint, "c", "beyond", part="values, Eq. (9)", **inputs(B, True))
    f.error("beyond has no target", "Ask whether beyond is None, not whether its target is.",
            **inputs(2, True) | {"beyond_target": None})
    even = inputs(2, True)
    z, t = even["z"], even["t"]
    f.rule("where both targets are met there is nothing to learn", 0.0, hint, **even | dict(
        target=eps(z, t, even["c"]), beyond_target=eps(z, t, even["beyond"])))


@exercise(4, rece.derive, "e_adv = (Tᵀ G T + λ I)⁻¹ Tᵀ C e: RECE, as in the docstring of rece.py")
def parts_of_derive(f: Answer):
    hint = ("e is a row here and a column in the formula: transpose it on the way in, and the result on the "
            "way out. T is not symmetric: in which of its places does Tᵀ stand?")
    T, I = x([[0.5, 0], [0, 1]]), torch.eye(2, dtype=torch.float64)
    f.value(hint, part=WORKED, T=T, G=I, C=I, e=x([[2, 4]]), lam=0.25)

    def inputs(n, D, edited=0.3):
        W0 = rows(3, 2 * D, D, seed=1)                            # three matrices [2 D, D]
        W1 = W0 + edited * rows(3, 2 * D, D, seed=2)
        return dict(T=torch.eye(D, dtype=torch.float64) + edited * rows(D, D, seed=3), G=(W1.mT @ W1).sum(0),
                    C=(W1.mT @ W0).sum(0), e=rows(n, D, seed=4))

    for n, D, lam in ((1, 3, 0.1), (5, 4, 10.0), (6, 6, 1.0)):
        f.value(hint, "T", "C", "e", **inputs(n, D), lam=lam)
    nothing = torch.zeros(2, 2, dtype=torch.float64)
    f.error("G and λ are 0", "torch.linalg.solve and cholesky complain; pinv and lstsq give some answer.",
            T=T, G=nothing, C=I, e=x([[2, 4]]), lam=0.0)
    given = inputs(5, 4, edited=0)
    f.rule("of an unedited model e itself comes back as λ goes to 0", given["e"], hint, **given, lam=1e-9)
    given["T"] = inputs(5, 4)["T"]
    f.rule("of W₀ T, T⁻¹ e comes back as λ goes to 0, if there is an inverse",
           torch.linalg.solve(given["T"], given["e"].T).T, hint, **given, lam=1e-9)
