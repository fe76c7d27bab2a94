"""Coefficients that move: schedules of the step, and controllers that read what was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leibler.objective.rows import View
from leibler.objective.signals import Clock, Reach, Signal, State, StepEnd, Validation


@dataclass(frozen=True)
class Linear(Signal):
    """From ``start`` to ``end`` over ``steps`` optimiser steps, then constant."""

    start: float
    end: float
    steps: int
    reach: ClassVar[Reach] = "batch"  # type: ignore[misc]
    clock: ClassVar[Clock] = "previous"  # type: ignore[misc]

    def __call__(self, view: View) -> Tensor:
        done = min(max(view.step / max(self.steps, 1), 0.0), 1.0)
        return torch.tensor(self.start + (self.end - self.start) * done, device=view.rows.tokens.device)


@dataclass(frozen=True)
class Switch(Signal):
    """``before`` until optimiser step ``at``, ``after`` from then on."""

    before: float
    after: float
    at: int
    reach: ClassVar[Reach] = "batch"  # type: ignore[misc]
    clock: ClassVar[Clock] = "previous"  # type: ignore[misc]

    def __call__(self, view: View) -> Tensor:
        value = self.before if view.step < self.at else self.after
        return torch.tensor(float(value), device=view.rows.tokens.device)


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
