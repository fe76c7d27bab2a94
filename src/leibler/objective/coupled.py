"""Terms that couple several rows over the vocabulary: no sum over tokens, and no numbers per token, says them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.errors import RecipeError
from leibler.objective.needs import Need, WholeRows
from leibler.objective.reduce import TokenMean
from leibler.objective.rows import Rows, View
from leibler.objective.targets import Target
from leibler.objective.terms import Couples, Term, Units


@dataclass(frozen=True, kw_only=True)
class Coupled(Term):
    """A term over the rows of the policy and of a target at some events of the optimiser batch.

    It has *units* of one or more events, such as a pair of neighbours. Where a process has more events of its own than
    ``sites``, it chooses units at random, derived from the run's seed and the step; their mean is descended. The rows
    themselves are stored for the chosen events alone, ``2 sites x vocab`` numbers and as many for the gradient. Where
    the optimiser batch is cut into micro-batches, the rows are collected in a pass without gradient first: the gradient
    is that of the uncut batch. Muted rows take no part, but count.

    Attributes:
        sites: events at most, in each process.
        temperature: divides the logits of both sides, on top of the run's own.

    Raises:
        RecipeError: too few sites, a temperature that is not positive, weights or a reduction of events.
    """

    sites: int = 256
    temperature: float = 1.0
    couples: ClassVar[Couples] = "batch"
    size: ClassVar[int] = 1
    """Events in a unit."""

    def __post_init__(self) -> None:
        kind = type(self).__name__
        if self.sites < self.size:
            raise RecipeError(f"{kind}(sites={self.sites}) must see at least {self.size} events.")
        if not self.temperature > 0:
            raise RecipeError(f"{kind}(temperature={self.temperature}) must be positive.")
        if self.weight != 1.0 or self.reduce != TokenMean():
            raise RecipeError(
                f"{kind} couples events: it takes no weight or reduce; scale it by its coefficient, choose by where."
            )

    @property
    def law(self) -> Target:
        """The target."""
        raise NotImplementedError

    def needs(self) -> tuple[Need, ...]:
        return (WholeRows(self.law),)

    def units(self, rows: Rows) -> Int[Tensor, "units size"]:
        """Every unit of a batch: the numbers of its events among those of all rows."""
        raise NotImplementedError

    def value(
        self, logp: Float[Tensor, "units size vocab"], logq: Float[Tensor, "units size vocab"]
    ) -> Float[Tensor, " units"]:
        """The loss of each unit, from the log-probabilities of the policy and of the target."""
        raise NotImplementedError

    def check(self) -> None:
        """Raise `RecipeError` where something that the term needs is not installed."""

    def count(self, rows: Rows) -> float:
        return float(min(self.sites // self.size, len(self.units(rows))))

    def chosen(self, rows: Rows, generator: torch.Generator) -> Int[Tensor, "units size"]:
        """The units that take part."""
        units = self.units(rows)
        most = self.sites // self.size
        if len(units) > most:
            pick = torch.randperm(len(units), generator=generator)[:most].sort().values
            units = units[pick.to(units.device)]
        return units if rows.muted is None else units[~rows.muted[rows.row[units[:, 0]]]]

    def loss(self, view: View) -> Units:
        raise RecipeError(f"{type(self).__name__} couples rows over the vocabulary, which no view holds.")

    def _events(self, rows: Rows) -> Int[Tensor, " events"]:
        """The numbers of the events that the term is about, among those of all rows."""
        if self.where is None:
            return torch.arange(len(rows.row), device=rows.tokens.device)
        return rows.inside(self.where)[rows.mask].nonzero()[:, 0]
