"""Reductions: a local weight per event, and a denominator over the whole optimiser batch.

The weight of an event depends only on its row; the denominator is summed over all micro-batches and ranks before
any of them is cut, so accumulation is a plain sum and changes no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from leibler.objective.rows import Rows, View


class Reduction(Protocol):
    """``weight(view) -> [n]`` and ``count(rows) -> denominator``."""

    def weight(self, view: View) -> Float[Tensor, " n"]: ...

    def count(self, rows: Rows) -> float: ...


def _lengths(view: View) -> Tensor:
    return view.to_events(view.rows.length.to(torch.float32))


@dataclass(frozen=True)
class TokenMean:
    """The mean over all events of the optimiser batch."""

    def weight(self, view: View) -> Tensor:
        return torch.ones_like(view.row, dtype=torch.float32)

    def count(self, rows: Rows) -> float:
        return float(rows.mask.sum())


@dataclass(frozen=True)
class SequenceMean:
    """The mean over sequences of each sequence's mean (or, with ``per="sum"``, of its sum)."""

    per: str = "mean"

    def weight(self, view: View) -> Tensor:
        lengths = _lengths(view)
        return 1.0 / lengths if self.per == "mean" else torch.ones_like(lengths)

    def count(self, rows: Rows) -> float:
        return float((rows.length > 0).sum())
