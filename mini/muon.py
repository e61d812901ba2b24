"""Muon: momentum, made orthogonal, for the matrices inside a network (Jordan et al. 2024).

AdamW takes a step of the same size for each number of a matrix; Muon one of the same size in each direction:
the momentum U S Vᵀ becomes U Vᵀ, so that rare directions are learned as fast as common ones. Of the U-Net
here the held-out loss was 1.3 % lower after 400 steps than with AdamW, for 1.2 times the seconds (README).
"""
from collections import defaultdict

import torch
from torch import Tensor


def orthogonal(G: Tensor) -> Tensor:
    """U S Vᵀ -> about U Vᵀ, [k, m, n] with m ≤ n, by five steps X ← a X + b (XXᵀ) X + c (XXᵀ)² X.
    Every X is a polynomial in GGᵀ times G, so only [m, m] matrices are multiplied on the way."""
    a, b, c = 3.4445, -4.7750, 2.0315
    G = G / (G.norm(dim=(1, 2), keepdim=True) + 1e-7)
    S, P = G @ G.mT, torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
    for _ in range(5):
        Q = torch.baddbmm(S, S, S, beta=b, alpha=c)
        Q.diagonal(dim1=1, dim2=2).add_(a)
        P, S = Q @ P, Q @ (S @ Q)
    return P @ G


class Muon(torch.optim.Optimizer):
    """For weights [out, in] and [out, in, h, w]. lr as AdamW's: a step is about as long (Liu et al. 2025)."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            alike = defaultdict(list)                             # matrices of one shape are computed at once
            for p in group["params"]:
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                p.mul_(1 - group["lr"] * group["weight_decay"])
                update = p.grad.lerp(mean, group["momentum"]).flatten(1)             # Nesterov's
                wide = update.shape[0] <= update.shape[1]
                alike[tuple(sorted(update.shape))].append((p, update if wide else update.mT, wide))
            for (_, longer), some in alike.items():
                found = orthogonal(torch.stack([update for _, update, _ in some]))
                for (p, _, wide), update in zip(some, found):
                    update = (update if wide else update.mT).reshape(p.shape)
                    p.add_(update, alpha=-group["lr"] * 0.2 * longer ** 0.5)
