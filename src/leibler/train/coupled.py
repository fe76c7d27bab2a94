"""Terms of several rows over the vocabulary: their gradient, however the optimiser batch is cut."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leibler.divergence.rows import FLOOR, LN2, OUTSIDE, to_row
from leibler.errors import RecipeError
from leibler.fused import Linear, TargetRows
from leibler.fused.coarse import OtherVocabulary
from leibler.objective.coupled import Coupled
from leibler.objective.rows import View
from leibler.objective.soft import Soft
from leibler.policy.randomness import generator

if TYPE_CHECKING:
    from leibler.train.plan import StreamPlan
    from leibler.train.recipe import Recipe
    from leibler.train.tally import Tally

Targets = Sequence[TargetRows | OtherVocabulary]


def check(recipe: Recipe, lockstep: bool) -> None:
    """Raise `RecipeError` for a coupled term that this run cannot serve."""
    for term in recipe.objective.terms:
        if not isinstance(term, Coupled):
            continue
        term.check()
        if lockstep:
            raise RecipeError(f"{term.name} couples whole rows of the policy; train it without sharded weights.")
        if isinstance(term.law, Soft):
            raise RecipeError(f"{term.name} couples whole rows, which soft tokens are not; match them by a divergence.")


class Coupling:
    """The coupled terms of one stream in one optimiser batch.

    The chosen rows are read micro-batch by micro-batch, the derivative of the loss by all of them is formed at once,
    and each micro-batch replays its part. A batch that is not cut is read and replayed in the same pass.

    Args:
        plan, view, cuts: the stream, its optimiser batch, and the rows of each micro-batch.
        forward: the operands of a micro-batch by its number and rows; the same each time.
        scales: coefficient over count of each term.
        log: takes the terms' values.
        seed: the run's; events are chosen by it, the stream, the term and the step.
        vocab: entries that are real.
    """

    def __init__(
        self,
        plan: StreamPlan,
        view: View,
        cuts: Sequence[Tensor],
        forward: Callable[[int, Tensor], tuple[View, Tensor, Linear, Targets]],
        scales: Mapping[int, Tensor],
        log: Tally,
        seed: int,
        vocab: int,
    ) -> None:
        self.log = log
        self.parts = [
            _Part(
                term,
                plan.targets.index(term.law),
                term.chosen(view.rows, generator(seed, f"sites/{plan.stream}/{number}", view.step)),
                scales[id(term)],
                vocab,
            )
            for number, term in enumerate(plan.coupled)
        ]
        row = view.rows.row
        self.at = [torch.isin(row, index) for index in cuts]
        if len(cuts) > 1:
            with torch.no_grad():
                for number, index in enumerate(cuts):
                    _, _, model, targets = forward(number, index)
                    for part in self.parts:
                        part.read(self.at[number], part.rows(self.at[number], model), targets)

    def replay(self, number: int, model: Linear, targets: Targets) -> Float[Tensor, ""]:
        """A number whose gradient is the share of a micro-batch in the terms'."""
        at = self.at[number]
        total = model.hidden.new_zeros(())
        for part in self.parts:
            rows = part.rows(at, model)
            if part.missing:
                part.read(at, rows.detach(), targets)
            total = total + (rows * part.derivative(self.log)[part.here(at)]).sum()
        return total


class _Part:
    """One term: its units, the rows of their events once they are known, and the derivative by them."""

    def __init__(self, term: Coupled, target: int, units: Int[Tensor, "units size"], scale: Tensor, vocab: int) -> None:
        self.term, self.target, self.scale, self.vocab = term, target, scale, vocab
        self.events, self.unit = units.unique(return_inverse=True)
        self.model: Tensor | None = None
        self.law: Tensor | None = None
        self.missing = len(self.events)
        self.found: Tensor | None = None

    def here(self, at: Bool[Tensor, " events"]) -> Bool[Tensor, " sites"]:
        """Which of the chosen events are among these."""
        return at[self.events]

    def local(self, at: Bool[Tensor, " events"]) -> Int[Tensor, " here"]:
        """Their numbers among these."""
        return (at.cumsum(0) - 1)[self.events[self.here(at)]]

    def rows(self, at: Bool[Tensor, " events"], model: Linear) -> Float[Tensor, "here vocab"]:
        return _logits(model, self.local(at), self.vocab)

    def read(
        self,
        at: Bool[Tensor, " events"],
        rows: Float[Tensor, "here vocab"],
        targets: Targets,
    ) -> None:
        target, here = targets[self.target], self.here(at)
        assert isinstance(target, TargetRows)
        with torch.no_grad():
            law = _law(target, self.local(at), self.vocab)
        if self.model is None or self.law is None:
            self.model, self.law = (x.new_zeros(len(self.events), self.vocab) for x in (rows, law))
        self.model[here], self.law[here] = rows, law
        self.missing -= len(rows)

    def derivative(self, log: Tally) -> Float[Tensor, "sites vocab"]:
        """Of the term by the policy's logits at all chosen events."""
        if self.found is None:
            if self.model is None or self.law is None:
                return self.scale.new_zeros(0, self.vocab)  # nothing was chosen
            with torch.enable_grad():
                leaf = self.model.requires_grad_()
                logp, logq = ((x / self.term.temperature).log_softmax(-1)[self.unit] for x in (leaf, self.law))
                value = self.term.value(logp, logq)
                (self.found,) = torch.autograd.grad((value * self.scale.to(value)).sum(), leaf)
            weight = torch.ones_like(value)
            log.add(self.term, value.detach(), weight, value.detach())
            self.model = self.law = None
        return self.found


def _logits(head: Linear, index: Int[Tensor, " n"], vocab: int) -> Float[Tensor, "n vocab"]:
    """Natural logits of some rows of a head, in float32 at least."""
    logits = sum(hidden[index] @ weight[:vocab].T for hidden, weight in head.products)
    assert isinstance(logits, Tensor)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if head.bias is not None:
        logits = logits + head.bias[:vocab]
    return logits / head.temperature


def _law(target: TargetRows, index: Int[Tensor, " n"], vocab: int) -> Float[Tensor, "n vocab"]:
    """Natural log-scores of some rows of a target; -inf outside its support."""
    leaves = [to_row(_logits(leaf, index, vocab)) for leaf in target.leaves]
    if target.combine is None:
        scores = leaves[0].logits
    else:
        scores = target.combine(tuple(row.logits - row.normaliser for row in leaves))
        # What lies outside every leaf lies outside the target, whatever the expression makes of the floors.
        outside = torch.stack([row.logits < OUTSIDE for row in leaves]).all(dim=0)
        scores = scores.masked_fill(outside, FLOOR)
    return (scores * LN2).masked_fill(scores < OUTSIDE, -torch.inf)
