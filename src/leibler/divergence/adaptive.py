"""A mixture of both KL divergences whose weights follow where the model is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.divergence.base import Divergence
from leibler.divergence.kl import add_both_gradients
from leibler.divergence.pair import pair
from leibler.divergence.rows import Row
from leibler.errors import RecipeError

_INDEXED = 2**17
"""Indices made at a time: they take twice the bytes of the numbers, and should stay in the cache."""


@dataclass(frozen=True, eq=False)
class AdaptiveKL(Divergence):
    """``w KL(q || p) + (1 - w) KL(p || q)``, ``w = g_head / (g_head + g_tail)`` held constant in the gradient.

    The head is the longest prefix of the target's entries, largest first (of equal ones the first in the vocabulary),
    whose mass is at most ``head_mass``, and always holds the largest; ``g`` is the sum of ``|p - q|`` over head or
    tail. Where p equals q, w is 1/2. The gradient is that of the two KLs with w fixed, so it is not the gradient of the
    value. A side whose weight rounds to 0 takes no part, even if it is infinite. Source: T. Wu et al.,
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
        add_both_gradients(grad, coefficient * forward, coefficient * reverse, model, target)

    def swapped(self) -> Divergence:
        return _ExchangedAdaptiveKL(self.head_mass)


@dataclass(frozen=True, eq=False)
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
    # The same operations on both sides: equal rows differ by exactly 0.
    gap = (ranked.weights / ranked.total).sub_(other.weights / other.total).abs_()
    of_head = _in_head(ranked, head_mass).mul_(gap)
    head = of_head.sum(dim=-1, keepdim=True)
    # A sum of its own: total minus head would round to 0 while it decides between a finite and an infinite value.
    tail = gap.sub_(of_head).sum(dim=-1, keepdim=True)
    total = head + tail
    silent, scale = total == 0.0, total.clamp(min=torch.finfo(total.dtype).tiny)
    return (head / scale).masked_fill_(silent, 0.5), (tail / scale).masked_fill_(silent, 0.5)


def _in_head(row: Row, head_mass: float) -> Float[Tensor, "rows vocab"]:
    """1 at the entries of the head, else 0; without sorting the vocabulary.

    The bits of positive floating-point numbers are ordered as the numbers are, so their leading bits are buckets. A
    histogram of the mass tells which buckets lie in the head as a whole; only the one bucket where the head ends is
    sorted.
    """
    weights = row.weights
    if head_mass >= 1.0:
        return torch.ones_like(weights)
    if not bool(row.total.isfinite().all()):
        weights = weights.nan_to_num()  # such a row has no head, and its value is NaN all the same
    count, vocab = weights.shape
    integer, one = (torch.int64, 0x3FF0 << 48) if weights.dtype == torch.float64 else (torch.int32, 0x3F80 << 16)
    # The largest weight is 1. About vocab / 4 buckets: more would cost more to sum up than they spare in sorting.
    shift = max(one.bit_length() - max(vocab.bit_length() - 3, 6), 0)
    bits = weights.view(integer)
    bucket = bits >> shift
    mass = weights.new_zeros(count, (one >> shift) + 1)
    few = max(_INDEXED // vocab, 1)
    for part, index, values in zip(mass.split(few), bucket.split(few), weights.split(few)):
        part.scatter_add_(-1, index.long(), values)
    mass = mass.cumsum(dim=-1, dtype=torch.float64)  # from the smallest
    # The head may reach down to where this much mass is left below it.
    left = mass[:, -1:] - head_mass * mass[:, -1:]
    edge = torch.searchsorted(mass, left)
    room = mass.gather(-1, edge) - left  # what of the bucket at the edge fits
    edge = edge.to(integer)
    least = ((edge + 1) << shift).view(weights.dtype)
    # Comparisons are several times faster into a tensor of their operands' type than into booleans.
    inside = torch.ge(weights, least, out=torch.empty_like(weights))

    flat = _positions(torch.eq(bucket, edge, out=bucket))
    rows = flat // vocab
    # By row, then by falling weight, then as in the vocabulary.
    low = bits.view(-1)[flat] & ((1 << shift) - 1)
    if count.bit_length() + shift < 63:
        order = ((rows << shift) - low).sort(stable=True).indices
    else:  # both do not fit one number: in double precision, from 64 rows on
        order = (-low).sort(stable=True).indices
        order = order[rows[order].sort(stable=True).indices]
    flat = flat[order]
    rows = rows[order]
    sums = torch.nn.functional.pad(weights.view(-1)[flat].cumsum(dim=0, dtype=torch.float64), (1, 0))
    first = torch.searchsorted(rows, torch.arange(count, device=rows.device))
    taken = sums[1:] - sums[first[rows]] <= room.squeeze(-1)[rows]
    # The largest entry, whatever its mass, if it is not above the edge anyway.
    taken |= (torch.arange(len(rows), device=rows.device) == first[rows]) & (edge.squeeze(-1)[rows] == one >> shift)
    inside.view(-1)[flat] = taken.to(inside.dtype)
    return inside


def _positions(hits: Int[Tensor, "rows vocab"]) -> Int[Tensor, " hits"]:
    """Where few entries are not 0, in the flattened tensor: looked for eight at a time."""
    small = hits.to(torch.int8).view(-1)
    small = torch.nn.functional.pad(small, (0, -small.numel() % 8))
    some = small.view(torch.int64).nonzero().squeeze(-1)
    group, place = small.view(-1, 8)[some].nonzero(as_tuple=True)
    return some[group] * 8 + place


def _times(weight: Float[Tensor, " rows"], value: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """``weight * value`` with ``0 * inf = 0``: a side without weight takes no part."""
    return torch.where(weight == 0.0, 0.0, weight * value)  # NaN passes
