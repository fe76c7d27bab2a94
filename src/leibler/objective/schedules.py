"""Coefficients that move: schedules of the step, and controllers that read what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leibler.errors import RecipeError
from leibler.objective.rows import View
from leibler.objective.signals import Clock, Reach, Signal, State, StepEnd, Validation


class OfStep(Signal):
    """A number that depends on the optimiser step alone, counted from 0; sources read it by `value`."""

    reach: ClassVar[Reach] = "batch"  # type: ignore[misc]
    clock: ClassVar[Clock] = "previous"  # type: ignore[misc]

    def value(self, step: int) -> float:
        raise NotImplementedError

    def __call__(self, view: View) -> Tensor:
        return torch.tensor(float(self.value(view.step)), device=view.rows.tokens.device)


@dataclass(frozen=True)
class Linear(OfStep):
    """From ``start`` to ``end`` over ``steps`` optimiser steps, then constant."""

    start: float
    end: float
    steps: int

    def value(self, step: int) -> float:
        done = min(max(step / max(self.steps, 1), 0.0), 1.0)
        return self.start + (self.end - self.start) * done


@dataclass(frozen=True)
class Switch(OfStep):
    """``before`` until optimiser step ``at``, ``after`` from then on."""

    before: float
    after: float
    at: int

    def value(self, step: int) -> float:
        return self.before if step < self.at else self.after


@dataclass(frozen=True)
class Staircase(OfStep):
    """One more every ``every`` optimiser steps: ``min(start + floor(step / every), stop)``; without ``stop`` for ever.

    Raises:
        RecipeError: ``every`` is below 1, or ``stop`` below ``start``.

    Examples:
        >>> stairs = Staircase(1, every=5, stop=3)
        >>> [stairs.value(step) for step in (0, 4, 5, 10, 999)]
        [1, 1, 2, 3, 3]
    """

    start: int
    every: int
    stop: int | None = None

    def __post_init__(self) -> None:
        if self.every < 1 or (self.stop is not None and self.stop < self.start):
            raise RecipeError(f"{self} must have every of at least 1 and a stop of at least its start.")

    def value(self, step: int) -> int:
        reached = self.start + max(step, 0) // self.every
        return reached if self.stop is None else min(reached, self.stop)


@dataclass(frozen=True)
class AdaptiveKL(Signal):
    """A proportional controller of a KL coefficient.

    ``c <- c * (1 + clip(kl / target - 1, -bound, bound) * sequences / horizon)`` after each step, with ``kl`` the
    measured divergence per sequence of the part that it belongs to. Source: Fine-Tuning Language Models from Human
    Preferences (2019).
    """

    target: float
    initial: float = 0.1
    horizon: float = 10_000.0
    bound: float = 0.2
    reach: ClassVar[Reach] = "batch"  # type: ignore[misc]
    clock: ClassVar[Clock] = "previous"  # type: ignore[misc]

    def init(self) -> State:
        return {"coefficient": self.initial}

    def observe(self, state: State, event: StepEnd | Validation) -> State:
        if not isinstance(event, StepEnd) or "divergence_per_sequence" not in event.own:
            return state
        kl, sequences = event.own["divergence_per_sequence"], event.own["sequences"]
        if not math.isfinite(kl):
            return state
        error = min(max(kl / self.target - 1.0, -self.bound), self.bound)
        return {"coefficient": state["coefficient"] * (1.0 + error * sequences / self.horizon)}

    def __call__(self, view: View) -> Tensor:
        return torch.tensor(view.states[self]["coefficient"], device=view.rows.tokens.device)


@dataclass(frozen=True)
class Balance(Signal):
    """Makes a term as large as others: the sum of their losses over its own, as the last step measured both.

    Where its own loss was 0 the coefficient stays what it was.

    Attributes:
        of: metrics of the last step, such as ``loss/nll@task``.
        by: the metric of the term itself.
        initial: until a step has measured both.
        most: the coefficient's bound: the quotient explodes as the term is fulfilled.
    """

    of: tuple[str, ...]
    by: str
    initial: float = 1.0
    most: float = 1e3
    reach: ClassVar[Reach] = "batch"  # type: ignore[misc]
    clock: ClassVar[Clock] = "previous"  # type: ignore[misc]

    def init(self) -> State:
        return {"coefficient": self.initial}

    def observe(self, state: State, event: StepEnd | Validation) -> State:
        if not isinstance(event, StepEnd):
            return state
        missing = [name for name in (*self.of, self.by) if name not in event.metrics]
        if missing:
            known = ", ".join(n for n in event.metrics if n.startswith("loss/"))
            raise RecipeError(f"Balance reads the metric {missing[0]!r}, which no step has; it has {known}.")
        own = event.metrics[self.by]
        quotient = sum(event.metrics[name] for name in self.of) / own if own > 0 else state["coefficient"]
        return {"coefficient": min(max(quotient, 0.0), self.most)} if math.isfinite(quotient) else state

    def __call__(self, view: View) -> Tensor:
        return torch.tensor(view.states[self]["coefficient"], device=view.rows.tokens.device)


@dataclass(frozen=True)
class Hinge(Signal):
    """The coefficient of a constraint ``divergence <= bound``: ``slope * max(0, divergence - bound)``.

    The divergence is that of the owning term over the whole optimiser batch at this very step, so the term descends
    the squared hinge ``slope / 2 * max(0, divergence - bound) ** 2`` exactly, however the batch is cut. (Averaged over
    micro-batches it would be positive even inside the constraint.) Source: DisCO (2025).
    """

    bound: float
    slope: float
    reach: ClassVar[Reach] = "batch"  # type: ignore[misc]
    clock: ClassVar[Clock] = "step"  # type: ignore[misc]

    def of(self, divergence: Tensor) -> Tensor:
        """The coefficient at a measured divergence."""
        return self.slope * (divergence - self.bound).clamp_min(0.0)

    def __call__(self, view: View) -> Tensor:
        raise RuntimeError("the engine computes a hinge from its term's divergence over the optimiser batch")
