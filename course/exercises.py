"""Ten exercises, from guidance to RECE: functions of one to a dozen lines, graded by the repository's own.

    python course/exercises.py                # grade all ten
    python course/exercises.py 3              # grade the third
    python -m pytest course -m ex3            # the same by pytest; without -m all ten

Replace `raise NotImplementedError` by an answer. The docstring says all that is needed: formula, shapes and a
number to check by hand. An exercise may call the ones before it, torch, math and helpers of your own in this
file; the repository's modules cannot be imported from here.

    no  function              difficulty  minutes  points  what it is
     1  guided                *                 5       2  classifier-free guidance
     2  ddim_step             *                10       3  one step of the sampler
     3  cross_attention       **               20       5  where the picture reads the text
     4  towards_noise         *                10       3  RealEra: the direction of a neighbor
     5  radius_at             **               15       4  RealEra: how far the cosine lets a neighbor go
     6  neighbor_concepts     ***              25       6  RealEra: Eqs. (3)-(6)
     7  beyond_concepts       **               10       4  RealEra: what must stay
     8  closed_form           ***              25       6  RealEra: Eq. (7)
     9  noise_alignment_loss  *                10       3  RealEra: Eqs. (8) and (9)
    10  derive                **               15       4  RECE: what brings the concept back

What is graded, part by part: the worked number; values for several shapes; gradients, so compute with tensors
to the end (not in 5, 6 and 7); an error, where any exception will do; and a rule that always holds. All parts
right gives all points. A number may be off by a millionth of the largest one wanted, on a CPU or a GPU. In 6
and 7 the values are your own choice: what counts are the equations and how the radii are distributed.

T tokens, D text width; e, e*: the n rows of concept and anchor (what is drawn instead) that are edited. ‖e‖,
and the cosine of two blocks of rows [n, D], are of all n·D numbers at once. Floating-point numbers come in
float64, but where a docstring says otherwise.
"""
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # our modules lie one folder up


def guided(u: Tensor, c: Tensor, s: float) -> Tensor:
    """Classifier-free guidance: from u towards c, s times the way. Ho & Salimans 2021, Eq. (6), s = 1 + w.

        u + s (c − u)

    u, c of one shape, the noise predicted without and with the prompt -> the same shape.
    An error if u and c cannot be subtracted.

    >>> guided(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0]), 7.5)
    tensor([  8.5000, -13.0000])
    """
    raise NotImplementedError


def ddim_step(z: Tensor, noise: Tensor, a: Tensor, a_next: Tensor) -> Tensor:
    """One step of DDIM with η = 0, from ᾱ_t = a to ᾱ_t' = a_next. Song et al. 2021, Eq. (12).

        z_0 = (z − √(1 − a) ε) / √a             what the picture would be, if ε were all of its noise
        z'  = √a_next z_0 + √(1 − a_next) ε

    z, noise (ε) of one shape, a and a_next single numbers as tensors [] -> z', the shape of z.
    An error if z and noise cannot be subtracted.

    >>> z, noise = torch.tensor([1.0]), torch.tensor([0.5])
    >>> ddim_step(z, noise, torch.tensor(0.25), torch.tensor(0.64))
    tensor([1.2072])
    """
    raise NotImplementedError


def cross_attention(x: Tensor, context: Tensor, W_q: Tensor, W_k: Tensor, W_v: Tensor, heads: int) -> Tensor:
    """Every pixel asks the rows of the text, and takes a mean of their values. Vaswani et al. 2017, Eq. (1).

        q, k, v = W_q x, W_k c, W_v c           for every pixel x and every text row c
        softmax(q kᵀ / √d) v                    in every head; the weights of a pixel add up to 1

    x [B, L, C] pixels, context [B, T, D] rows, W_q [C, C], W_k and W_v [C, D] (a torch Linear's weight: out,
    in) -> [B, L, C]. Head i owns the i-th d = C / heads numbers of q, k, v and of the result.
    An error if C is no multiple of heads.

    >>> I = torch.eye(2)
    >>> W_v = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    >>> cross_attention(torch.tensor([[[1.0, 0.0]]]), I[None], I, I, W_v, 1)
    tensor([[[0.6698, 0.9907]]])
    """
    raise NotImplementedError


def towards_noise(e: Tensor, noise: Tensor) -> Tensor:
    """The direction of a neighbor, RealEra section 4.1: from e towards noise v as large as e.

        v = ‖e‖ / √(n D) · noise                 so that ‖v‖ is ‖e‖, but for chance
        v̂ = (v − e) / ‖v − e‖

    e [n, D], noise [n, D] drawn from N(0, 1) -> v̂ [n, D]. ‖·‖ is the norm of the whole block.
    An error if e and noise cannot be subtracted.

    >>> towards_noise(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 1.0]]))
    tensor([[ 0.7555, -0.6552]])
    """
    raise NotImplementedError


def radius_at(cosine: float, e: Tensor, v_hat: Tensor) -> float:
    """How far to go from e along v̂ until cos(e, e + r v̂) has fallen to `cosine`.

    The law of sines in the triangle with the corners 0, e and e + r v̂: let w be the angle from e to v̂, and
    a = arccos(cosine) the angle at 0. The angle at the far corner is then w − a, and

        r = ‖e‖ sin(a) / sin(w − a)

    If a ≥ w no r is far enough: return math.inf. e, v_hat [n, D], ‖v̂‖ = 1 -> r, a number.
    An error if `cosine` is none: below −1 or above 1.

    >>> round(radius_at(0.5, torch.tensor([[3.0, 4.0]]), torch.tensor([[-0.8, 0.6]])), 4)
    8.6603
    """
    raise NotImplementedError


def neighbor_concepts(e: Tensor, e_star: Tensor, noise: Tensor, u: Tensor, u_star: Tensor, D1: float,
                      D1_anchor: float, S1: float, S2: float) -> tuple[Tensor, Tensor]:
    """M neighbors of a concept and where to send them. RealEra, Algorithm 1, lines 4-12. For each i of M:

        d(e, e + η) ≤ D1 ‖e‖                     Eq. (3)
        S2 ≤ cos(e, e + η) ≤ S1                  Eq. (4)
        η = r v̂,  v̂ by noise[i]                  Eq. (5)
        the neighbor is e + η, and it is sent to e* + r' v̂ with the same v̂

    Algorithm 1 draws r from U[0, D1 ‖e‖) and, Eq. (6), draws again until Eq. (4) holds. As the cosine falls
    with r, the r that pass lie in one interval: let r be uniform in it. r' is uniform in [0, D1_anchor ‖e‖),
    and has nothing to do with r. All chance comes from the arguments.

    e, e_star [n, D], noise [M, n, D] from N(0, 1), u and u_star [M] from U[0, 1)
    -> neighbors [M, n, D] and their targets [M, n, D].
    An error if no r satisfies both Eq. (3) and Eq. (4).

    >>> e, e_star = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    >>> noise = torch.tensor([[[-1.0, 7.0]]]) * 2 ** 0.5 / 5         # v̂ = [−0.8, 0.6], at a right angle to e
    >>> half = torch.tensor([0.5])
    >>> near, near_star = neighbor_concepts(e, e_star, noise, half, half, 1.1, 0.6, 0.8, 0.5)
    >>> near, near_star
    (tensor([[[-0.7000,  6.7750]]]), tensor([[[-0.2000,  0.9000]]]))

    Here r = 4.625 and r' = 1.5, in the middle of 3.75 … 5.5 and 0 … 3.
    """
    raise NotImplementedError


def beyond_concepts(e: Tensor, noise: Tensor, u: Tensor, D1: float, D2: float, S2: float) -> Tensor:
    """N points outside the neighborhood, which must stay. RealEra section 4.2, Algorithm 1, lines 13-22:

        e' = e + l v̂,  D1 ‖e‖ ≤ l < D2 ‖e‖  and  cos(e, e') < S2

    v̂ by noise[i], l uniform among those that satisfy both. All chance comes from the arguments.

    e [n, D], noise [N, n, D] from N(0, 1), u [N] from U[0, 1) -> [N, n, D].
    An error if no l satisfies both.

    >>> noise = torch.tensor([[[-1.0, 7.0]]]) * 2 ** 0.5 / 5         # v̂ = [−0.8, 0.6]
    >>> beyond_concepts(torch.tensor([[3.0, 4.0]]), noise, torch.tensor([0.5]), 1.1, 1.8, 0.5)
    tensor([[[-4.0641,  9.2981]]])

    Here l = 8.8301, in the middle of 8.6603 … 9.
    """
    raise NotImplementedError


def closed_form(E: Tensor, E_star: Tensor, P: Tensor, lambda1: float, lambda2: float) -> Tensor:
    """The edit Δ with W = W₀ (I + Δ), one for all key and value matrices W₀. RealEra, Eq. (7), with a ridge:

        min over W  Σ ‖W e − W₀ e*‖² + λ1 Σ ‖W p − W₀ p‖² + ridge ‖W − W₀‖²
        Δ = Σ (e* − e) eᵀ · B⁻¹
        B = Σ e eᵀ + λ1 Σ p pᵀ + ridge I,  ridge = lambda2 · the mean of the diagonal of the first two terms

    e, e*, p are columns in the formula, and the rows of E, E_star [m, D] and P [p, D] here -> Δ [D, D].
    Compute in float64, also where the rows are float32: squares need more digits.
    An error if B has no inverse (its condition number is above 1e14, such as with few rows and no ridge).

    >>> e, e_star = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    >>> closed_form(e, e_star, e_star, 1.0, 1.0)
    tensor([[-0.5000,  0.0000],
            [ 0.5000,  0.0000]], dtype=torch.float64)
    """
    raise NotImplementedError


def noise_alignment_loss(eps, z: Tensor, t: Tensor, target: Tensor, c: Tensor, beyond: Tensor | None = None,
                         beyond_target: Tensor | None = None) -> Tensor:
    """What RealEra's LoRA learns from: Eq. (8), with `beyond` Eq. (9). ‖·‖² is read as a *mean* of squares:

        odd steps    ‖ε(z, t, c) − target‖²                                                Eq. (8)
        even steps   ‖ε(z, t, c) − target‖² + ‖ε(z, t, beyond) − beyond_target‖²           Eq. (9)

    eps(z, t, c) is the network that learns; target [B, 4, h, w] is the teacher's noise for the anchor, and
    beyond_target the teacher's for `beyond`. z [B, 4, h, w], t [B], c and beyond [B, T, D] -> a tensor [].
    An error if `beyond` comes without its target.

    >>> eps = lambda z, t, c: z + c.mean()
    >>> z, t, c = torch.zeros(1, 4, 2, 2), torch.tensor([9]), torch.full((1, 2, 2), 3.0)
    >>> noise_alignment_loss(eps, z, t, z, c), noise_alignment_loss(eps, z, t, z, c, c / 3, z)
    (tensor(9.), tensor(10.))
    """
    raise NotImplementedError


def derive(T: Tensor, G: Tensor, C: Tensor, e: Tensor, lam: float) -> Tensor:
    """RECE's question: which rows make the edited matrices W₁ T do on them what the original W₀ does on e?

        e_adv = argmin Σ ‖W₁ T e_adv − W₀ e‖² + λ ‖e_adv‖²      the sum is over all key and value matrices
              = (Tᵀ G T + λ I)⁻¹ Tᵀ C e,   G = Σ W₁ᵀ W₁,  C = Σ W₁ᵀ W₀

    e is a column in the formula and a row here. T, G, C [D, D], e [rows, D] -> e_adv [rows, D].
    An error if the matrix to invert has no inverse.

    >>> T, I = torch.tensor([[0.5, 0.0], [0.0, 1.0]]), torch.eye(2)
    >>> derive(T, I, I, torch.tensor([[2.0, 4.0]]), 0.25)
    tensor([[2.0000, 3.2000]])
    """
    raise NotImplementedError


if __name__ == "__main__":
    from course.grade import command_line, main
    command_line(lambda: main(__doc__, Path(__file__)))
