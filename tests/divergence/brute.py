"""Definitions of every divergence in float64, term by term from the printed formulas: the judge of the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from leibler.divergence import (
    AdaptiveKL,
    Alpha,
    CauchySchwarz,
    ChiSquared,
    Divergence,
    ForwardKL,
    Hellinger,
    Jeffreys,
    JensenShannon,
    Renyi,
    ReverseChiSquared,
    ReverseKL,
    SkewForwardKL,
    SkewReverseKL,
    Swapped,
    TotalVariation,
    Tsallis,
)

F_DIVERGENCES: list[Divergence] = [
    ForwardKL(),
    ReverseKL(),
    Jeffreys(),
    JensenShannon(),
    JensenShannon(0.1),
    SkewForwardKL(0.1),
    SkewForwardKL(0.0),
    SkewReverseKL(0.1),
    SkewReverseKL(0.0),
    Alpha(0.5),
    Alpha(-0.5),
    Alpha(2.5),
    Alpha(0.0),
    Alpha(1.0),
    Alpha(0.003),
    Alpha(0.998),
    Tsallis(2.0),
    Tsallis(0.5),
    ChiSquared(),
    ReverseChiSquared(),
    Hellinger(),
    TotalVariation(),
    Swapped(Tsallis(1.5)),
]
OTHERS: list[Divergence] = [
    Renyi(0.5),
    Renyi(2.0),
    Renyi(1.0),
    Renyi(1.004),
    CauchySchwarz(),
    AdaptiveKL(),
    Swapped(Renyi(0.3)),
    Swapped(AdaptiveKL(0.7)),
]
EVERY = F_DIVERGENCES + OTHERS


def _sum(weight: Tensor, log_ratio: Tensor) -> Tensor:
    """``sum weight * log_ratio`` with 0 * anything = 0, selected on the operand."""
    return torch.where(weight > 0, weight * torch.where(weight > 0, log_ratio, 0.0), 0.0).sum(-1)


def log_power_sum(order: float, logp: Tensor, logq: Tensor) -> Tensor:
    """``log sum p^a q^(1-a)``; an entry outside both supports does not count."""
    left = order * logp if order != 0.0 else torch.zeros_like(logp)
    right = (1.0 - order) * logq if order != 1.0 else torch.zeros_like(logq)
    either = (logp > -torch.inf) | (logq > -torch.inf)
    return torch.where(either, left + right, -torch.inf).logsumexp(-1)


def log_mixture(share: float, first: Tensor, second: Tensor) -> Tensor:
    """``log(share * a + (1 - share) * b)``."""
    log = torch.log(torch.tensor([share, 1.0 - share], dtype=torch.float64))
    return torch.logaddexp(first + log[0], second + log[1])


def brute(divergence: Divergence, model: Tensor, target: Tensor) -> Tensor:
    """The definition, on natural logits in float64; differentiable at moderate logits."""
    logp, logq = model.double().log_softmax(-1), target.double().log_softmax(-1)
    p, q = logp.exp(), logq.exp()
    match divergence:
        case Swapped():
            return brute(divergence.divergence, target, model)
        case ForwardKL():
            return _sum(q, logq - logp)
        case ReverseKL():
            return _sum(p, logp - logq)
        case Jeffreys():
            return _sum(p, logp - logq) + _sum(q, logq - logp)
        case JensenShannon():
            logm = log_mixture(divergence.beta, logq, logp)
            return divergence.beta * _sum(q, logq - logm) + (1 - divergence.beta) * _sum(p, logp - logm)
        case SkewForwardKL():
            return _sum(q, logq - log_mixture(divergence.lam, logq, logp))
        case SkewReverseKL():
            return _sum(p, logp - log_mixture(divergence.lam, logp, logq))
        case Alpha(alpha=0.0):
            return _sum(q, logq - logp)
        case Alpha(alpha=1.0) | Renyi(alpha=1.0):
            return _sum(p, logp - logq)
        case Alpha(alpha=a):
            return torch.expm1(log_power_sum(a, logp, logq)) / (a * (a - 1))
        case Tsallis(q=a):
            return torch.expm1(log_power_sum(a, logp, logq)) / (a - 1)
        case Renyi(alpha=a):
            return log_power_sum(a, logp, logq) / (a - 1)
        case ChiSquared():
            return torch.expm1(log_power_sum(2.0, logp, logq))
        case ReverseChiSquared():
            return torch.expm1(log_power_sum(-1.0, logp, logq))
        case Hellinger():
            return ((0.5 * logp).exp() - (0.5 * logq).exp()).square().sum(-1)
        case TotalVariation():
            return (p - q).abs().sum(-1) / 2
        case CauchySchwarz():
            return (2 * logp).logsumexp(-1) + (2 * logq).logsumexp(-1) - 2 * (logp + logq).logsumexp(-1)
        case AdaptiveKL():
            shares = torch.stack([_shares(a, b, divergence.head_mass) for a, b in zip(p, q)])
            forward, reverse = _sum(q, logq - logp), _sum(p, logp - logq)
            sides = torch.stack([forward, reverse], dim=-1)
            return torch.where(shares > 0, shares * sides, 0.0).sum(-1)
    raise NotImplementedError(divergence)


def _shares(p: Tensor, q: Tensor, head_mass: float) -> Tensor:
    order = q.argsort(descending=True, stable=True)
    head = (q[order].cumsum(0) <= head_mass) | (head_mass == 1.0)  # of all, whatever the sum rounds to
    head[0] = True
    gap = (p - q).abs()[order].detach()
    parts = torch.stack([gap[head].sum(), gap[~head].sum()])
    return parts / parts.sum() if parts.sum() > 0 else torch.full_like(parts, 0.5)
