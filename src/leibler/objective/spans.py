"""How neighbouring tokens go together: products of their laws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.errors import RecipeError
from leibler.objective.coupled import Coupled
from leibler.objective.rows import Rows
from leibler.objective.targets import Target


@dataclass(frozen=True)
class SpanProduct(Coupled):
    """``|| p_i * p_(i+1) - q_i * q_(i+1) ||``, entry by entry, for neighbouring events i, i + 1 of one span.

    The mean over the pairs of neighbours. Products of nearly one-hot laws with different peaks are nearly 0 everywhere,
    on both sides, so this vanishes where it should speak; ``normalised`` compares the laws proportional to the products
    instead (formed in log space). Zero exactly where the products (or those laws) are equal, which does not make the
    rows equal: exchanging ``p_i`` and ``p_(i+1)`` changes nothing. Source: "Multi-Granularity Semantic Revision for
    Large Language Model Distillation" (2024), reconstructed from its abstract.

    Args:
        to: the target.
        spans: the name of a column ``[batch, time]`` with a number for each event (neighbours with the same number are
            in one span; a negative number is in none), or the length of the pieces that each row's events are cut into.
        norm: 1 or 2.
        normalised: compare the products after dividing them by their sums.

    Raises:
        RecipeError: another norm, pieces of fewer than two events.

    Examples:
        >>> import torch
        >>> from leibler.objective import SpanProduct, Teacher
        >>> p = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
        >>> q = torch.tensor([[[0.9, 0.1], [0.1, 0.9]]]).log()
        >>> SpanProduct(Teacher()).value(p, q)  # |0.25 - 0.09| twice
        tensor([0.3200])
        >>> SpanProduct(Teacher(), normalised=True).value(p, q).round(decimals=6)
        tensor([0.])
    """

    to: Target
    spans: str | int = 4
    norm: int = 1
    normalised: bool = False
    size = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in (1, 2):
            raise RecipeError(f"SpanProduct(norm={self.norm}) knows the norms 1 and 2.")
        if isinstance(self.spans, int) and self.spans < 2:
            raise RecipeError(f"SpanProduct(spans={self.spans}) has no neighbours in a span; take at least 2.")

    @property
    def name(self) -> str:
        return "span_product"

    @property
    def law(self) -> Target:
        return self.to

    def units(self, rows: Rows) -> Int[Tensor, "units size"]:
        row, place = rows.mask.nonzero().unbind(dim=1)
        if isinstance(self.spans, str):
            span = rows.column(self.spans)[rows.mask]
        else:
            first = torch.zeros_like(rows.length)
            first[1:] = rows.length.cumsum(0)[:-1]
            span = (torch.arange(len(row), device=row.device) - first[row]) // self.spans
        inside = torch.zeros_like(row, dtype=torch.bool)
        inside[self._events(rows)] = True
        inside &= span >= 0
        joined = (row[1:] == row[:-1]) & (place[1:] == place[:-1] + 1) & (span[1:] == span[:-1])
        left = (joined & inside[1:] & inside[:-1]).nonzero()[:, 0]
        return torch.stack([left, left + 1], dim=1)

    def value(
        self, logp: Float[Tensor, "units size vocab"], logq: Float[Tensor, "units size vocab"]
    ) -> Float[Tensor, " units"]:
        products = [x.sum(dim=1) for x in (logp, logq)]
        p, q = (x.softmax(dim=-1) if self.normalised else x.exp() for x in products)
        return torch.linalg.vector_norm(p - q, ord=self.norm, dim=-1)
