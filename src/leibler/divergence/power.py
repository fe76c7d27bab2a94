"""The alpha family: every divergence that is a function of ``S = sum p^a q^(1 - a)``. One kernel, seven names.

With ``u = a log p + (1 - a) log q`` the sum is a difference of three log-normalisers, and the gradient of log S by
the model's logits is ``a (softmax(u) - p)``: no power, no ratio, no logarithm of a probability.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from leibler.divergence.base import HUGE, Divergence
from leibler.divergence.generators import bounded_expm1
from leibler.divergence.kl import ForwardKL, ReverseKL
from leibler.divergence.pair import EXTREME, infinite, pair, vecdot
from leibler.divergence.rows import LN2, Row
from leibler.errors import RecipeError

LIMIT = 1e-6
"""Orders this close to 0 or 1 are the KL divergences."""
BAND = 1e-2
"""Orders this close to 0 or 1 take S - 1 as a mean of ``expm1``, since dividing log S by a tiny number loses digits."""
SMALL = 0.01
"""|log S| below this is computed again from log-ratios, without any term of first order."""


class _Saved(NamedTuple):
    log_s: Float[Tensor, "rows 1"]
    slope: Float[Tensor, "rows 1"]
    """Derivative of the value by log S."""
    blend: Row | None
    in_band: Bool[Tensor, "rows 1"] | None
    """Rows whose S - 1 is a mean of ``expm1``."""


@dataclass(frozen=True, eq=False)
class PowerKernel(Divergence):
    """``weight * (S - 1) / (a (a - 1))``, or ``weight * log S / (a (a - 1))`` if ``logarithmic``; a is the ``order``.

    Everything but these three numbers is common to the family; order 0 is ``weight`` times ``ForwardKL``, order 1
    ``weight`` times ``ReverseKL``.
    """

    @property
    def order(self) -> float:
        raise NotImplementedError(f"{type(self).__name__} must state its order")

    @property
    def weight(self) -> float:
        return 1.0

    @property
    def logarithmic(self) -> bool:
        return False

    @property
    def _limit(self) -> Divergence | None:
        if abs(self.order) < LIMIT:
            return ForwardKL()
        return ReverseKL() if abs(self.order - 1.0) < LIMIT else None

    @property
    def ceiling(self) -> float:
        # Infinity of a power is told by the supports; any finite value, however large, is meant.
        return HUGE if self.logarithmic else math.inf

    @property
    def _scale(self) -> float:
        return self.weight / (self.order * (self.order - 1.0))

    # --- the kernel -----------------------------------------------------------------------------------------------
    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        if self._limit is not None:
            values, saved = self._limit._value(model, target)
            return values * self.weight, saved
        order, scale, both = self.order, self._scale, pair(model, target)
        blend = None
        log_s, in_band = self._banded(model, target)
        if in_band is None or not bool(in_band.all()):
            blend = Row(torch.lerp(target.logits, model.logits, order))
            plain = LN2 * (blend.normaliser - order * model.normaliser - (1.0 - order) * target.normaliser)
            plain = self._refined(plain, model, target)
            log_s = plain if log_s is None or in_band is None else torch.where(in_band, log_s, plain)
        assert log_s is not None
        values = (scale * (log_s if self.logarithmic else torch.expm1(log_s))).squeeze(-1)
        values = values.clamp_(min=0.0).abs_()  # abs: no -0.0 for identical rows
        if order < 0.0:
            values = infinite(values, both.model_lacks)
        if order > 1.0:
            values = infinite(values, both.target_lacks)
        slope = torch.full_like(log_s, scale) if self.logarithmic else scale * torch.exp(log_s)
        # An infinite row has a coefficient of 0 later; it must meet a finite number there.
        slope = torch.where(values.unsqueeze(-1).isfinite(), slope, 0.0)
        return values, _Saved(log_s, slope, blend, in_band)

    def _banded(self, model: Row, target: Row) -> tuple[Float[Tensor, "rows 1"] | None, Bool[Tensor, "rows 1"] | None]:
        """log S for orders near 0 or 1, and the rows where that is safe: their exponentials cannot overflow."""
        if abs(self.order) < BAND:
            row, power = target, self.order
        elif abs(self.order - 1.0) < BAND:
            row, power = model, self.order - 1.0
        else:
            return None, None
        # Entries of no weight may have any ratio, infinite ones too; they do not count.
        exponent = (pair(model, target).log_ratio * power).masked_fill_(row.weights == 0.0, 0.0)
        safe = exponent.amax(dim=-1, keepdim=True) < EXTREME
        return torch.log1p(vecdot(row.weights, exponent.expm1_()) / row.total), safe

    def _refined(self, log_s: Float[Tensor, "rows 1"], model: Row, target: Row) -> Float[Tensor, "rows 1"]:
        """log S of close rows from ``S - 1 = E_q[expm1(a x) - a expm1(x)]``, x the log-ratio: relatively accurate."""
        small = (log_s.abs() < SMALL).squeeze(-1)
        if not bool(small.any()):
            return log_s
        order = self.order
        x = pair(model, target).log_ratio
        # Beyond this the exponentials overflow; such rows keep the plain value.
        safe = torch.maximum(x.amax(dim=-1) * max(1.0, order), x.amin(dim=-1) * min(0.0, order)) < EXTREME
        index = (small & safe).nonzero().squeeze(-1)
        if index.numel() == 0:
            return log_s
        x = x[index]
        integrand = torch.expm1(order * x).sub_(torch.expm1(x), alpha=order)
        excess = integrand.mul_(target.weights[index]).sum(dim=-1, keepdim=True) / target.total[index]
        return log_s.index_copy(0, index, torch.log1p(excess))

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        if self._limit is not None:
            self._limit._add_gradient(grad, coefficient * self.weight, model, target, saved)
            return
        scaled, near_one = coefficient * (saved.slope * self.order), saved.in_band
        if near_one is not None and abs(self.order) > BAND:
            # d log S = a p (exp((a - 1) x - log S) - 1): as a difference w - p it would lose digits to 1 / (a - 1).
            exponent = (pair(model, target).log_ratio * (self.order - 1.0)).sub_(saved.log_s).clamp_(max=EXTREME)
            inside = torch.where(near_one, scaled, 0.0)
            grad.addcmul_(exponent.expm1_().mul_(model.weights), inside / model.total)
            if saved.blend is None:
                return
            scaled = scaled - inside
        blend = saved.blend or Row(torch.lerp(target.logits, model.logits, self.order))
        grad.addcmul_(blend.weights, scaled / blend.total)
        grad.addcmul_(model.weights, -scaled / model.total)

    # --- the generator --------------------------------------------------------------------------------------------
    def f(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.logarithmic:
            return super().f(log_u)
        order, linear = self.order, bounded_expm1(log_u)
        if self._limit is not None:
            return self.weight * (self._limit.f(log_u) + (linear if abs(order) < LIMIT else -linear))
        direct = bounded_expm1(order * log_u) - order * linear
        if abs(order - 1.0) < BAND:
            x = log_u.clamp(-20.0, 20.0)
            near = torch.exp(x) * torch.expm1((order - 1.0) * x) - (order - 1.0) * torch.expm1(x)
            direct = torch.where(log_u.abs() < 20.0, near, direct)
        return self._scale * direct

    def f_prime(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        if self.logarithmic:
            return super().f_prime(log_u)
        if self._limit is not None:
            return self.weight * (self._limit.f_prime(log_u) + (1.0 if abs(self.order) < LIMIT else -1.0))
        return self.weight / (self.order - 1.0) * bounded_expm1((self.order - 1.0) * log_u)

    @property
    def inadmissible(self) -> str | None:
        if self.logarithmic:
            return super().inadmissible
        if self.order <= 1.0 + LIMIT:
            return None
        end = -self.weight / (self.order - 1.0)
        return f"f'(0) = {end:g} of {type(self).__name__} is finite, so an optimum may leave entries at 0"

    def inverse_conjugate(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``w ((1 + a z / w)^((a - 1) / a) - 1) / (a - 1)`` for order a and weight w.

        Defined for ``a z / w > -1``; continued by its tangent where ``1 + a z / w < 0.01``.
        """
        if self.logarithmic:
            return super().inverse_conjugate(z)
        order, weight = self.order, self.weight
        if self._limit is not None:
            # f is the KL's generator plus c (u - 1), and (f + c (u - 1))*(t) = f*(t - c) + c.
            c = 1.0 if abs(order) < LIMIT else -1.0
            return weight * (self._limit.inverse_conjugate(z / weight - c) + c)
        base = 1.0 + order / weight * z
        value = bounded_expm1((order - 1.0) / order * torch.log(base.clamp(min=0.01))) / (order - 1.0)
        slope = 0.01 ** (-1.0 / order) / order
        return weight * (value - slope * torch.relu(0.01 - base))

    def swapped(self) -> Divergence:
        return Power(1.0 - self.order, self.weight, self.logarithmic)


def _check_order(divergence: Divergence, name: str, order: float, positive: bool) -> None:
    if not math.isfinite(order) or (positive and order <= 0.0):
        kind = "positive and finite" if positive else "finite"
        raise RecipeError(f"{type(divergence).__name__}({name}={order}) is not a divergence: {name} must be {kind}.")


@dataclass(frozen=True, eq=False)
class Power(PowerKernel):
    """The family with its numbers spelled out; what ``swapped()`` of a member gives."""

    power: float
    factor: float = 1.0
    log: bool = False

    @property
    def order(self) -> float:
        return self.power

    @property
    def weight(self) -> float:
        return self.factor

    @property
    def logarithmic(self) -> bool:
        return self.log


@dataclass(frozen=True, eq=False)
class Alpha(PowerKernel):
    """``(sum p^alpha q^(1 - alpha) - 1) / (alpha (alpha - 1))``; alpha 0 is ``ForwardKL``, alpha 1 ``ReverseKL``.

    Generator ``f(u) = (u^alpha - alpha u + alpha - 1) / (alpha (alpha - 1))``. inf for alpha <= 0 where the target
    has mass outside the model's support, for alpha >= 1 where the model has mass outside the target's. Source:
    S. Amari, "Differential-Geometrical Methods in Statistics" (1985).

    >>> import torch
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(Alpha(alpha=0.5)(half, quarter).item(), 4)
    0.1363
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        _check_order(self, "alpha", self.alpha, positive=False)

    @property
    def order(self) -> float:
        return self.alpha

    def swapped(self) -> Divergence:
        return Alpha(1.0 - self.alpha)


@dataclass(frozen=True, eq=False)
class Tsallis(PowerKernel):
    """``(sum p^r q^(1 - r) - 1) / (r - 1)`` of order r (the argument ``q``); order 1 is ``ReverseKL``.

    It is r times ``Alpha(r)``. Source: C. Tsallis, "Possible Generalization of Boltzmann-Gibbs Statistics" (1988);
    S. Furuichi, K. Yanagi, K. Kuriyama, "Fundamental Properties of Tsallis Relative Entropy" (2004).

    Raises:
        RecipeError: the order is not positive.

    >>> import torch
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(Tsallis(q=2.0)(half, quarter).item(), 4)
    0.3333
    """

    q: float = 2.0

    def __post_init__(self) -> None:
        _check_order(self, "q", self.q, positive=True)

    @property
    def order(self) -> float:
        return self.q

    @property
    def weight(self) -> float:
        return self.q


@dataclass(frozen=True, eq=False)
class Renyi(PowerKernel):
    """``log(sum p^alpha q^(1 - alpha)) / (alpha - 1)``; order 1 is ``ReverseKL``. Not an f-divergence.

    inf for alpha >= 1 where the model has mass outside the target's support, for alpha < 1 only where the supports
    are disjoint. Source: A. Renyi, "On Measures of Entropy and Information" (1961).

    Raises:
        RecipeError: the order is not positive.

    >>> import torch
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(Renyi(alpha=2.0)(half, quarter).item(), 4)
    0.2877
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        _check_order(self, "alpha", self.alpha, positive=True)

    @property
    def order(self) -> float:
        return self.alpha

    @property
    def weight(self) -> float:
        return self.alpha

    @property
    def logarithmic(self) -> bool:
        return True


@dataclass(frozen=True, eq=False)
class ChiSquared(PowerKernel):
    """``sum (p - q)^2 / q`` (Pearson). Generator ``f(u) = (u - 1)^2``; ``log(1 + D)`` is ``Renyi(2)``.

    inf where the model has mass outside the target's support, or where the value overflows; ``Renyi(2)`` stays
    finite there. Source: K. Pearson, "On the Criterion that a Given System of Deviations..." (1900).

    >>> import torch
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(ChiSquared()(half, quarter).item(), 4)
    0.3333
    """

    @property
    def order(self) -> float:
        return 2.0

    @property
    def weight(self) -> float:
        return 2.0

    def swapped(self) -> Divergence:
        return ReverseChiSquared()


@dataclass(frozen=True, eq=False)
class ReverseChiSquared(PowerKernel):
    """``sum (p - q)^2 / p`` (Neyman). Generator ``f(u) = (u - 1)^2 / u``.

    inf where the target has mass outside the model's support, or where the value overflows. Source: J. Neyman,
    "Contribution to the Theory of the Chi-Square Test" (1949).

    >>> import torch
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(ReverseChiSquared()(half, quarter).item(), 4)
    0.25
    """

    @property
    def order(self) -> float:
        return -1.0

    @property
    def weight(self) -> float:
        return 2.0

    def swapped(self) -> Divergence:
        return ChiSquared()


@dataclass(frozen=True, eq=False)
class Hellinger(PowerKernel):
    """``sum (sqrt p - sqrt q)^2 = 2 (1 - sum sqrt(p q))``, between 0 and 2; symmetric. ``f(u) = (sqrt u - 1)^2``.

    Source: E. Hellinger, "Neue Begruendung der Theorie quadratischer Formen von unendlichvielen Veraenderlichen"
    (1909).

    >>> import torch
    >>> left, right = torch.tensor([0.0, -torch.inf]), torch.tensor([-torch.inf, 0.0])
    >>> Hellinger()(left, right).item()
    2.0
    """

    @property
    def order(self) -> float:
        return 0.5

    @property
    def weight(self) -> float:
        return 0.5

    def swapped(self) -> Divergence:
        return self
