"""Divergences by distance and by angle: total variation and Cauchy-Schwarz."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from leibler.divergence.base import Divergence
from leibler.divergence.generators import bounded_expm1
from leibler.divergence.pair import pair, vecdot
from leibler.divergence.rows import LN2, Row

DEAD_ZONE = 8.0
"""In units of rounding: closer probabilities count as equal, else rounding would decide the subgradient's sign."""
SMALL = 0.02
"""A Cauchy-Schwarz divergence below this is computed again from log-ratios."""


@dataclass(frozen=True, eq=False)
class TotalVariation(Divergence):
    """``sum |p - q| / 2``, between 0 and 1; symmetric. Generator ``f(u) = |u - 1| / 2``.

    The subgradient is 0 at entries where p and q are equal up to rounding.

    >>> import torch
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> TotalVariation()(half, quarter).item()
    0.25
    """

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        # Over the model's normaliser: one division less, and equal rows still differ by exactly 0.
        other = target.weights * (model.total / target.total)
        gap = model.weights - other
        distance = gap.abs()
        values = distance.sum(dim=-1).mul_(0.5).div_(model.total.squeeze(-1))
        # gap / |gap| without rounding noise: |gap| within 8 eps of the larger probability counts as 0. (Comparisons
        # are several times faster into a tensor of their operands' type than into booleans.)
        floor = torch.maximum(model.weights, other, out=other).mul_(DEAD_ZONE * torch.finfo(gap.dtype).eps)
        sign = gap.sign_().mul_(torch.gt(distance, floor, out=distance))
        return values, sign

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        centred = (saved - vecdot(model.weights, saved) / model.total).mul_(model.weights)
        grad.addcmul_(centred, 0.5 * coefficient / model.total)

    def f(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 0.5 * bounded_expm1(log_u).abs()

    def f_prime(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return 0.5 * torch.sign(log_u)

    @property
    def inadmissible(self) -> str | None:
        return "f'(0) = -0.5 of TotalVariation is finite, so an optimum may leave entries at 0"

    def inverse_conjugate(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``z``: the conjugate is the identity (on ``|t| <= 1/2``), so this imitation is plain likelihood."""
        return z.clone()

    def swapped(self) -> Divergence:
        return self


@dataclass(frozen=True, eq=False)
class CauchySchwarz(Divergence):
    """``-log((sum p q)^2 / (sum p^2 sum q^2))``: minus twice the log of the cosine; symmetric, not an f-divergence.

    inf where the supports are disjoint. Source: J. C. Principe, "Information Theoretic Learning" (2010).

    >>> import torch
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(CauchySchwarz()(half, quarter).item(), 4)
    0.2231
    """

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        product = Row(model.logits + target.logits)
        model_square, target_square = vecdot(model.weights, model.weights), vecdot(target.weights, target.weights)
        logs = torch.log2(model_square) + torch.log2(target_square) - 2.0 * torch.log2(product.total)
        values = (logs + 2.0 * (model.maximum + target.maximum - product.maximum)).mul_(LN2).squeeze(-1)
        small = values < SMALL
        if bool(small.any()):
            x = pair(model, target).log_ratio
            # With r = q^2 / sum q^2 the value is log(1 + Var_r(u) / (E_r u)^2), u = p / q: no cancellation.
            index = (small & (x.amax(dim=-1) < 20.0)).nonzero().squeeze(-1)
            u = torch.expm1(x[index])
            r = target.weights[index].square()
            r = r / r.sum(dim=-1, keepdim=True)
            mean = vecdot(r, u)
            variance = vecdot(r, (u - mean).square())
            close = torch.log1p(variance / (1.0 + mean).square()).squeeze(-1)
            values = values.index_copy(0, index, close)
        return values.clamp(min=0.0), (product, model_square)

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        product, model_square = saved
        grad.addcmul_(product.weights, -2.0 * coefficient / product.total)
        grad.addcmul_(model.weights.square(), 2.0 * coefficient / model_square)

    def swapped(self) -> Divergence:
        return self
