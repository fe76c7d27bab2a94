"""A mixture of both KL divergences whose weights follow where the model is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from leibler.divergence.base import HUGE, Divergence
from leibler.divergence.kl import ForwardKL, ReverseKL
from leibler.divergence.pair import pair
from leibler.divergence.rows import Row
from leibler.errors import RecipeError

FIRST = 64
"""The head is looked for among this many largest entries first; few rows need more, and a full sort is slow."""


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """``w KL(q || p) + (1 - w) KL(p || q)``, ``w = g_head / (g_head + g_tail)`` held constant in the gradient.

    The head is the longest prefix of the target's entries, largest first, whose mass is at most ``head_mass``, and
    always holds the largest; ``g`` is the sum of ``|p - q|`` over head or tail. Where p equals q, w is 1/2. The
    gradient is that of the two KLs with w fixed, so it is not the gradient of the value. Source: T. Wu et al.,
    "Rethinking Kullback-Leibler Divergence in Knowledge Distillation for Large Language Models" (2025).

    Raises:
        RecipeError: head_mass is not in [0, 1].

    >>> import torch
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(AdaptiveKL()(half, quarter).item(), 4)
    0.1373
    """

    head_mass: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.head_mass <= 1.0:
            raise RecipeError(f"AdaptiveKL(head_mass={self.head_mass}) is not a mass: take 0 <= head_mass <= 1.")

    def _forward_weight(self, model: Row, target: Row) -> Float[Tensor, "rows 1"]:
        return _head_share(target, model, self.head_mass)

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        weight, both = self._forward_weight(model, target), pair(model, target)
        share = weight.squeeze(-1)
        return _times(share, both.forward_kl) + _times(1.0 - share, both.reverse_kl), weight

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        ForwardKL()._add_gradient(grad, coefficient * saved, model, target, None)
        ReverseKL()._add_gradient(grad, coefficient * (1.0 - saved), model, target, None)

    def swapped(self) -> Divergence:
        return _ExchangedAdaptiveKL(self.head_mass)


@dataclass(frozen=True)
class _ExchangedAdaptiveKL(AdaptiveKL):
    """``AdaptiveKL`` of (target, model): the head is the model's."""

    def _forward_weight(self, model: Row, target: Row) -> Float[Tensor, "rows 1"]:
        return 1.0 - _head_share(model, target, self.head_mass)

    def swapped(self) -> Divergence:
        return AdaptiveKL(self.head_mass)


def _head_share(ranked: Row, other: Row, head_mass: float) -> Float[Tensor, "rows 1"]:
    """The head's part of ``sum |p - q|``, 1/2 where that sum is 0."""
    gap = (ranked.p - other.p).abs_()
    total, head = gap.sum(dim=-1), head_sum(ranked.p, gap, head_mass)
    share = torch.where(total > 0.0, head / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)
    return share.clamp(max=1.0).unsqueeze(-1)


def _times(weight: Float[Tensor, " rows"], value: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """``weight * value`` with ``0 * inf = 0``: a side without weight takes no part."""
    return torch.where(weight > 0.0, weight * value.clamp(max=2.0 * HUGE), 0.0)


def head_sum(
    mass: Float[Tensor, "rows vocab"], amount: Float[Tensor, "rows vocab"], head_mass: float
) -> Float[Tensor, " rows"]:
    """Sum of ``amount`` over the head of ``mass``: its largest entries up to ``head_mass``, at least one."""
    count = min(FIRST, mass.shape[-1])
    sums, complete = _head_of(mass, amount, head_mass, count)
    if not bool(complete.all()):
        rest = (~complete).nonzero().squeeze(-1)
        sums = sums.index_copy(0, rest, _head_of(mass[rest], amount[rest], head_mass, mass.shape[-1])[0])
    return sums


def _head_of(
    mass: Float[Tensor, "rows vocab"], amount: Float[Tensor, "rows vocab"], head_mass: float, count: int
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    largest, index = mass.topk(count, dim=-1)
    inside = largest.cumsum(dim=-1) <= head_mass
    complete = ~inside[:, -1] | (count == mass.shape[-1])
    inside[:, 0] = True
    return (amount.gather(-1, index) * inside).sum(dim=-1), complete
