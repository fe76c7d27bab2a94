"""Reductions: a local weight per event, and a denominator over the whole optimiser batch.

The weight of an event depends only on its row; the denominator is summed over all micro-batches and ranks before
any of them is cut, so accumulation is a plain sum and changes no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.objective.rows import Rows, View


class Reduction(Protocol):
    """``weight(view) -> [n]`` and ``count(rows) -> denominator``.

    For a term with a ``where``, ``lengths`` and ``rows`` count the events there only.
    """

    def weight(self, view: View, lengths: Int[Tensor, " batch"]) -> Float[Tensor, " n"]: ...

    def count(self, rows: Rows) -> float: ...


@dataclass(frozen=True)
class TokenMean:
    """The mean over all events of the optimiser batch."""

    def weight(self, view: View, lengths: Tensor) -> Tensor:
        return torch.ones_like(view.row, dtype=torch.float32)

    def count(self, rows: Rows) -> float:
        return float(rows.mask.sum())


@dataclass(frozen=True)
class SequenceMean:
    """The mean over sequences of each sequence's mean (or, with ``per="sum"``, of its sum)."""

    per: str = "mean"

    def weight(self, view: View, lengths: Tensor) -> Tensor:
        spread = view.to_events(lengths.clamp_min(1).to(torch.float32))
        return 1.0 / spread if self.per == "mean" else torch.ones_like(spread)

    def count(self, rows: Rows) -> float:
        return float((rows.length > 0).sum())
