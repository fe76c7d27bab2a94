"""The path from one law to another along the exponential family between them: what is gained, and at what divergence.

``p_l ~ p_0^(1-l) p_1^l``, that is ``p_0 exp(l g) / Z(l)`` with ``g = log p_1 - log p_0``; it is also the optimum of
``E_p[g] - KL(p || p_0) / l``. Source: classical (exponential tilting); the use of it, Extreme Region Policy
Distillation (2026).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def tilted(
    log_base: Float[Tensor, "*batch vocab"], log_extreme: Float[Tensor, "*batch vocab"], share: float
) -> Float[Tensor, "*batch vocab"]:
    """Log-probabilities of ``base^(1-l) extreme^l``, normalised, at ``l = share`` (beyond 1: extrapolated).

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
        >>> [round(x, 3) for x in tilted(p, q, 0.5).exp().tolist()]
        [0.75, 0.25]
    """
    # 0 * -inf is no number: a side without weight takes no part.
    parts = [w * x for w, x in ((1 - share, log_base), (share, log_extreme)) if w != 0]
    return torch.stack(parts).sum(0).log_softmax(-1)


def moments(
    log_base: Float[Tensor, "*batch vocab"], log_extreme: Float[Tensor, "*batch vocab"], share: float
) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch"]]:
    """Mean and variance of ``g = log extreme - log base`` (nats) under the law at ``share``.

    The variance is the slope of the mean: ``d/dl E[g] = Var(g)``.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
        >>> mean, variance = moments(p, q, 0.5)
        >>> round(float(mean), 4), round(float(variance), 4)
        (0.0385, 0.9052)
    """
    p = tilted(log_base, log_extreme, share).exp()
    g = torch.where(p > 0, log_extreme - log_base, torch.zeros_like(p))
    mean = (p * g).sum(-1)
    return mean, (p * (g - mean[..., None]).square()).sum(-1)


def divergence_along(
    log_base: Float[Tensor, "*batch vocab"],
    log_extreme: Float[Tensor, "*batch vocab"],
    shares: Sequence[float],
    points: int = 64,
) -> Float[Tensor, "shares *batch"]:
    """``KL(p_l || p_0) = int_0^l s Var_s(g) ds`` in nats, by Gauss-Legendre quadrature of the variances.

    What is gained, ``E_l[g] - E_0[g] = int_0^l Var_s(g) ds``, is of the order ``l`` and this of ``l^2``: the first
    steps along the path cost least for what they bring.

    Examples:
        >>> p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.9, 0.1]).log()
        >>> [round(x, 4) for x in divergence_along(p, q, [0.5, 1.0]).tolist()]  # KL of 0.75 and of 0.9 to 0.5
        [0.1308, 0.3681]
    """
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(points)
    out = []
    for share in shares:
        at = [0.5 * share * (x + 1) for x in nodes]
        terms = [w * s * moments(log_base, log_extreme, s)[1] for s, w in zip(at, weights, strict=True)]
        out.append(0.5 * share * torch.stack(terms).sum(0))
    return torch.stack(out)
