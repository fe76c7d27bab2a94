"""A mixture of both KL divergences whose weights follow where the model is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from leibler.divergence.base import Divergence
from leibler.divergence.kl import ForwardKL, ReverseKL
from leibler.divergence.pair import pair
from leibler.divergence.rows import Row
from leibler.errors import RecipeError

LOOKS = (64, 1024)
"""The head is looked for among this many largest entries first: few rows need more, and a full sort is slow."""


@dataclass(frozen=True)
class AdaptiveKL(Divergence):
    """``w KL(q || p) + (1 - w) KL(p || q)``, ``w = g_head / (g_head + g_tail)`` held constant in the gradient.

    The head is the longest prefix of the target's entries, largest first, whose mass is at most ``head_mass``, and
    always holds the largest; ``g`` is the sum of ``|p - q|`` over head or tail. Where p equals q, w is 1/2. The
    gradient is that of the two KLs with w fixed, so it is not the gradient of the value. A side whose weight rounds
    to 0 takes no part, even if it is infinite. Source: T. Wu et al.,
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

    def _shares(self, model: Row, target: Row) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
        """Weights of the forward and of the reverse KL."""
        return _head_and_tail(target, model, self.head_mass)

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        forward, reverse = self._shares(model, target)
        both = pair(model, target)
        values = _times(forward.squeeze(-1), both.forward_kl) + _times(reverse.squeeze(-1), both.reverse_kl)
        return values, (forward, reverse)

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        forward, reverse = saved
        ForwardKL()._add_gradient(grad, coefficient * forward, model, target, None)
        ReverseKL()._add_gradient(grad, coefficient * reverse, model, target, None)

    def swapped(self) -> Divergence:
        return _ExchangedAdaptiveKL(self.head_mass)


@dataclass(frozen=True)
class _ExchangedAdaptiveKL(AdaptiveKL):
    """``AdaptiveKL`` of (target, model): the head is the model's."""

    def _shares(self, model: Row, target: Row) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
        head, tail = _head_and_tail(model, target, self.head_mass)
        return tail, head

    def swapped(self) -> Divergence:
        return AdaptiveKL(self.head_mass)


def _head_and_tail(
    ranked: Row, other: Row, head_mass: float
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """The head's and the tail's part of ``sum |p - q|``; both 1/2 where that sum is 0."""
    mass, vocab = ranked.p, ranked.p.shape[-1]
    gap = (mass - other.p).abs_()
    head, complete = _split_head(mass, gap, head_mass, min(LOOKS[0], vocab))
    tail = gap.sum(dim=-1)
    for count in (*LOOKS[1:], vocab):
        if bool(complete.all()):
            break
        # The look before has set part of the head to 0 in these rows: their gaps are made again.
        rest = (~complete).nonzero().squeeze(-1)
        again = (mass[rest] - other.p[rest]).abs_()
        head[rest], complete[rest] = _split_head(mass[rest], again, head_mass, min(count, vocab))
        tail[rest] = again.sum(dim=-1)
    total = head + tail
    silent, scale = total == 0.0, total.clamp(min=torch.finfo(total.dtype).tiny)
    return (head / scale).masked_fill_(silent, 0.5).unsqueeze(-1), (tail / scale).masked_fill_(silent, 0.5).unsqueeze(
        -1
    )


def _split_head(
    mass: Float[Tensor, "rows vocab"], gap: Float[Tensor, "rows vocab"], head_mass: float, count: int
) -> tuple[Float[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Sum of ``gap`` over the head, which is set to 0 there; and the rows whose head ends within ``count`` entries.

    The tail is then a sum of its own: as total minus head it would round to 0 while it still decides between a
    finite and an infinite value.
    """
    largest, index = mass.topk(count, dim=-1)
    inside = largest.cumsum(dim=-1) <= head_mass
    complete = ~inside[:, -1] | (count == mass.shape[-1])
    inside[:, 0] = True
    of_head = gap.gather(-1, index)
    gap.scatter_(-1, index, of_head.masked_fill(inside, 0.0))
    return (of_head * inside).sum(dim=-1), complete


def _times(weight: Float[Tensor, " rows"], value: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """``weight * value`` with ``0 * inf = 0``: a side without weight takes no part."""
    return torch.where(weight == 0.0, 0.0, weight * value)  # NaN passes
