"""Divergences to a mixture of both rows: Jensen-Shannon and the skewed KLs. All are finite for every pair of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.divergence.base import Divergence
from leibler.divergence.generators import bounded_exp, log_mix
from leibler.divergence.kl import ForwardKL, ReverseKL
from leibler.divergence.pair import EXTREME, pair, vecdot
from leibler.divergence.rows import LN2, Row
from leibler.errors import RecipeError

FAR = 100.0
"""Base-2 log-ratios are cut off here: beyond, the smaller probability adds nothing to the mixture or to the sum."""
SMALL = 0.01
"""Below this many nats a row is computed again from log-ratios. The logarithms of probabilities leave an absolute error
of about 1e-6 in float32, whatever the value; the log-ratios cost as much again, so only close rows pay for them."""


def _tilt(first: Row, second: Row, share: float) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "rows vocab"]]:
    """``x = log2(b / a)`` and ``y = m / a - 1`` for rows a, b and ``m = (1 - share) a + share b``.

    Ratios rather than probabilities: log1p(y) takes half the time of the logarithm of m, and is more accurate.
    """
    x = (second.logits - first.logits).add_(first.normaliser - second.normaliser).clamp_(-FAR, FAR)
    return x, torch.exp2(x).sub_(1.0).mul_(share)


def _close(plain: Float[Tensor, " rows"]) -> Int[Tensor, " close"] | None:
    small = plain < SMALL
    return small.nonzero().squeeze(-1) if bool(small.any()) else None


def _add_centred(
    grad: Tensor,
    coefficient: Float[Tensor, "rows 1"],
    model: Row,
    k: Float[Tensor, "rows vocab"],
    mean: Float[Tensor, "rows 1"],
) -> None:
    """Add ``coefficient * p * (k - E_p k)``: the logit gradient of a functional with h = p * (k + const)."""
    grad.addcmul_((k - mean).mul_(model.weights), coefficient / model.total)


def _mean(row: Row, k: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows 1"]:
    return vecdot(row.weights, k) / row.total


@dataclass(frozen=True, eq=False)
class JensenShannon(Divergence):
    """``beta KL(q || m) + (1 - beta) KL(p || m)`` with ``m = beta q + (1 - beta) p``; at most ``log 2`` for beta = 1/2.

    Generator ``f(u) = (1 - beta) u log u - w log w`` with ``w = beta + (1 - beta) u``. Divided by beta it tends to
    ``ForwardKL`` as beta tends to 0, divided by 1 - beta to ``ReverseKL`` as beta tends to 1. Source: J. Lin,
    "Divergence Measures Based on the Shannon Entropy" (1991); R. Agarwal et al., "On-Policy Distillation of Language
    Models: Learning from Self-Generated Mistakes" (2024).

    Raises:
        RecipeError: beta is not strictly between 0 and 1.

    >>> import torch
    >>> left, right = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
    >>> round(JensenShannon()(left, right).item(), 4)
    0.6931
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 < self.beta < 1.0:
            raise RecipeError(
                f"JensenShannon(beta={self.beta}) is 0 everywhere or undefined: take 0 < beta < 1, or the limits "
                "ForwardKL() (beta to 0) and ReverseKL() (beta to 1)."
            )

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        beta = self.beta
        x, y = _tilt(model, target, beta)
        log_m_p = y.log1p_()
        mean = _mean(model, log_m_p)
        log_m_q = torch.sub(log_m_p, x, alpha=LN2, out=x)
        values = (mean * (beta - 1.0)).sub_(_mean(target, log_m_q), alpha=beta).squeeze(-1)
        index = _close(values)
        if index is not None:
            x = pair(model, target).log_ratio[index].clamp_(-EXTREME, EXTREME)
            close = torch.log1p(torch.expm1(-x).mul_(beta))
            p_part = vecdot(model.weights[index], close) / model.total[index]
            q_part = vecdot(target.weights[index], x.add_(close)) / target.total[index]
            log_m_p[index], mean[index] = close, p_part
            close = (p_part * (beta - 1.0)).sub_(q_part, alpha=beta).squeeze(-1)
            values = values.index_copy(0, index, close.clamp_(min=0.0).abs_())  # abs: no -0.0 for identical rows
        return values, (log_m_p, mean)

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        # h = (1 - beta) p log(p / m): what passes through m cancels between the two KLs.
        _add_centred(grad, coefficient * (self.beta - 1.0), model, *saved)

    def f(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        # In terms of log w and of log(w / u), each of them bounded on one side, so that no large terms cancel.
        log_w = log_mix(log_u, self.beta, 1.0 - self.beta)
        log_w_u = log_mix(-log_u, 1.0 - self.beta, self.beta)
        return (self.beta - 1.0) * bounded_exp(log_u) * log_w_u - self.beta * log_w

    def f_prime(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return (self.beta - 1.0) * log_mix(-log_u, 1.0 - self.beta, self.beta)

    @property
    def inadmissible(self) -> str | None:
        return None

    def inverse_conjugate(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``(1 - beta) log((1 - beta exp(-z / beta)) / (1 - beta))`` on ``z > beta log beta``; tangent near it."""
        beta = self.beta
        edge = beta * (math.log(beta) + 0.01)
        inside = z.clamp(min=edge)
        value = torch.log1p(-beta * torch.exp(-inside / beta)) - math.log1p(-beta)
        rest = beta * math.exp(-edge / beta)
        slope = rest / beta / (1.0 - rest)
        return (1.0 - beta) * (value - slope * torch.relu(edge - z))

    def swapped(self) -> Divergence:
        return JensenShannon(1.0 - self.beta)


@dataclass(frozen=True, eq=False)
class SkewForwardKL(Divergence):
    """``KL(q || lam q + (1 - lam) p)``, at most ``-log lam``; ``ForwardKL`` at lam = 0.

    Generator ``f(u) = -log(lam + (1 - lam) u)``. Source: J. Ko et al., "DistiLLM: Towards Streamlined Distillation
    for Large Language Models" (2024); L. Lee, "Measures of Distributional Similarity" (1999).

    Raises:
        RecipeError: lam is not in [0, 1).

    >>> import torch
    >>> left, right = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
    >>> round(SkewForwardKL(lam=0.1)(left, right).item(), 4)
    2.3026
    """

    lam: float = 0.1

    def __post_init__(self) -> None:
        _check_lam(self, self.lam)

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        if self.lam == 0.0:
            return ForwardKL()._value(model, target)
        share = 1.0 - self.lam
        x, y = _tilt(target, model, share)
        ratio = torch.add(y, 1.0, out=x).reciprocal_()
        values = _mean(target, y.log1p_()).neg_().squeeze(-1)
        index = _close(values)
        if index is not None:
            x = pair(model, target).log_ratio[index]
            values = values.index_copy(0, index, _close_skew(x, target, index, share))
            y = torch.expm1(x.clamp_(-EXTREME, EXTREME)).mul_(share)
            ratio[index] = -y / (1.0 + y)
        return values, ratio

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        if self.lam == 0.0:
            ForwardKL()._add_gradient(grad, coefficient, model, target, saved)
            return
        _add_centred(grad, coefficient * (self.lam - 1.0), model, saved, _mean(model, saved))

    def f(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return ForwardKL().f(log_u) if self.lam == 0.0 else -log_mix(log_u, self.lam, 1.0 - self.lam)

    def f_prime(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.lam == 0.0:
            return ForwardKL().f_prime(log_u)
        return (self.lam - 1.0) * torch.exp(-log_mix(log_u, self.lam, 1.0 - self.lam))

    @property
    def inadmissible(self) -> str | None:
        if self.lam == 0.0:
            return None
        return (
            f"f'(0) = {(self.lam - 1.0) / self.lam:g} of SkewForwardKL is finite, so an optimum may leave entries at 0"
        )

    def swapped(self) -> Divergence:
        return SkewReverseKL(self.lam)


@dataclass(frozen=True, eq=False)
class SkewReverseKL(Divergence):
    """``KL(p || lam p + (1 - lam) q)``, at most ``-log lam``; ``ReverseKL`` at lam = 0.

    Generator ``f(u) = u log(u / (lam u + 1 - lam))``. Source: J. Ko et al., "DistiLLM: Towards Streamlined
    Distillation for Large Language Models" (2024); L. Lee, "Measures of Distributional Similarity" (1999).

    Raises:
        RecipeError: lam is not in [0, 1).

    >>> import torch
    >>> left, right = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
    >>> round(SkewReverseKL(lam=0.1)(left, right).item(), 4)
    2.3026
    """

    lam: float = 0.1

    def __post_init__(self) -> None:
        _check_lam(self, self.lam)

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        if self.lam == 0.0:
            return ReverseKL()._value(model, target)
        lam, share = self.lam, 1.0 - self.lam
        x, y = _tilt(model, target, share)
        ratio = torch.add(y, 1.0, out=x).reciprocal_()
        log_m_p = y.log1p_()
        values = _mean(model, log_m_p).neg_().squeeze(-1)
        # h = p (log(p / m) + 1 - lam p / m); constants cancel in the gradient.
        k = ratio.mul_(-lam).sub_(log_m_p)
        index = _close(values)
        if index is not None:
            x = pair(model, target).log_ratio[index].neg_()
            values = values.index_copy(0, index, _close_skew(x, model, index, share))
            y = torch.expm1(x.clamp_(-EXTREME, EXTREME)).mul_(share)
            k[index] = (y * lam / (1.0 + y)).sub_(torch.log1p(y))
        return values, k

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        if self.lam == 0.0:
            ReverseKL()._add_gradient(grad, coefficient, model, target, saved)
            return
        _add_centred(grad, coefficient, model, saved, _mean(model, saved))

    def f(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.lam == 0.0:
            return ReverseKL().f(log_u)
        return -bounded_exp(log_u) * log_mix(-log_u, self.lam, 1.0 - self.lam)

    def f_prime(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.lam == 0.0:
            return ReverseKL().f_prime(log_u)
        log_w = log_mix(log_u, 1.0 - self.lam, self.lam)
        return (1.0 - self.lam) * torch.exp(-log_w) - log_mix(-log_u, self.lam, 1.0 - self.lam)

    @property
    def inadmissible(self) -> str | None:
        return None

    def swapped(self) -> Divergence:
        return SkewForwardKL(self.lam)


def _check_lam(divergence: Divergence, lam: float) -> None:
    if not 0.0 <= lam < 1.0:
        name = type(divergence).__name__
        raise RecipeError(f"{name}(lam={lam}) mixes with a share outside [0, 1): take 0 <= lam < 1.")


def _close_skew(
    x: Float[Tensor, "close vocab"], first: Row, index: Int[Tensor, " close"], share: float
) -> Float[Tensor, " close"]:
    """``KL(a || (1 - share) a + share b)`` for close rows, with ``x = log(b / a)`` in nats and ``first`` the row of a.

    With y = share * expm1(x), m / a = 1 + y and E_a y = 0, so KL = E_a[y - log1p y]: no first-order term left. The
    identity fails numerically where b has an entry that a lacks (exp(x) overflows); such rows keep E_a[-log1p y].
    """
    extreme = x.amax(dim=-1) > EXTREME
    y = torch.expm1(x.clamp(-EXTREME, EXTREME)).mul_(share)
    logarithm = torch.log1p(y)
    weights, total = first.weights[index], first.total[index].squeeze(-1)
    centred = y.sub_(logarithm).mul_(weights).sum(dim=-1) / total
    if bool(extreme.any()):
        centred = torch.where(extreme, -vecdot(weights, logarithm).squeeze(-1) / total, centred)
    return centred.clamp_(min=0.0)
