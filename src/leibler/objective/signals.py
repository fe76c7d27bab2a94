"""Signals: numbers without gradient. Advantages, token weights, gates, coefficients and schedules are one protocol.

A signal says how far its numbers *reach* (``token``: one per event; ``sequence`` and ``group``: one per row;
``batch``: one) and on which *clock* it is computed: ``rollout`` (once, over the whole batch with its groups, before
any cut into micro-batches), ``step`` (from the policy of this very step) or ``previous`` (from what the last steps
measured). Signals compose with ``+ - * ~`` and chain with ``>>``, which hands the numbers so far to a `Shaper`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from leibler.errors import RecipeError
from leibler.objective.needs import Comparison, LogProb, Need, sampled, sampled_needs
from leibler.objective.rows import View, group_mean, group_spread, group_sum
from leibler.objective.targets import Behaviour, Policy, Target

Reach = Literal["token", "sequence", "group", "batch"]
Clock = Literal["rollout", "step", "previous"]
_ORDER: tuple[Reach, ...] = ("batch", "group", "sequence", "token")
_CLOCKS: tuple[Clock, ...] = ("rollout", "previous", "step")


@dataclass(frozen=True)
class StepEnd:
    """After an optimiser step: what it measured. ``own`` holds the metrics of the part that the signal belongs to."""

    step: int
    metrics: Mapping[str, float]
    own: Mapping[str, float]


@dataclass(frozen=True)
class Validation:
    """After a validation pass."""

    step: int
    metrics: Mapping[str, float]


State = dict[str, Any]


class Signal:
    """Base of all signals: ``signal(view)`` returns ``[events]``, ``[batch]`` or one number, by its reach."""

    reach: Reach = "token"
    clock: Clock = "rollout"

    def needs(self) -> tuple[Need, ...]:
        return ()

    def __call__(self, view: View) -> Tensor:
        raise NotImplementedError

    def parts(self) -> tuple[Signal, ...]:
        """The signals inside this one (their state is kept too)."""
        return ()

    def init(self) -> State | None:
        """State that lives in the checkpoint, or None."""
        return None

    def observe(self, state: State, event: StepEnd | Validation) -> State:
        return state

    def __add__(self, other: Signal | float) -> Signal:
        return Combined(self, other, "+")

    def __radd__(self, other: float) -> Signal:
        return Combined(self, other, "+")

    def __mul__(self, other: Signal | float) -> Signal:
        return Combined(self, other, "*")

    def __rmul__(self, other: float) -> Signal:
        return Combined(self, other, "*")

    def __sub__(self, other: Signal | float) -> Signal:
        return Combined(self, other, "-")

    def __rsub__(self, other: float) -> Signal:
        return Combined(-self, other, "+")

    def __neg__(self) -> Signal:
        return Combined(self, -1.0, "*")

    def __invert__(self) -> Signal:
        """The complement of a gate: ``1 - gate``."""
        return Combined(Combined(self, -1.0, "*"), 1.0, "+")

    def __rshift__(self, shaper: Shaper) -> Signal:
        return Chain(self, shaper)


def rollout_parts(signal: Signal) -> Iterator[Signal]:
    """The largest parts of a signal that are computed once per draw, over whole groups (itself, if it is one)."""
    if signal.clock == "rollout":
        yield signal
        return
    for part in signal.parts():
        yield from rollout_parts(part)


class Shaper:
    """Changes numbers: ``shaper(view, value, reach) -> value``; ``reach_after`` says what comes out.

    It is called once per draw with all rows, unless it is ``elementwise``: then it may be called on any part of them,
    and may follow a signal that reads the policy of each step.
    """

    elementwise: ClassVar[bool] = False

    def needs(self) -> tuple[Need, ...]:
        return ()

    def parts(self) -> tuple[Signal, ...]:
        return ()

    def reach_after(self, reach: Reach) -> Reach:
        return reach

    def measures(self, view: View) -> dict[str, float]:
        """What controllers inside this shaper read (per rollout)."""
        return {}

    def __call__(self, view: View, value: Tensor, reach: Reach) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Chain(Signal):
    """``first >> then``."""

    first: Signal
    then: Shaper

    def __post_init__(self) -> None:
        self.then.reach_after(self.first.reach)
        if not self.then.elementwise and (self.first.clock == "step" or LogProb(Policy()) in self.then.needs()):
            raise RecipeError(
                f"{type(self.then).__name__} looks at a whole draw, once, but is given numbers of the policy at each "
                "step; use Old() in place of Policy()."
            )

    @property
    def reach(self) -> Reach:  # type: ignore[override]
        return self.then.reach_after(self.first.reach)

    @property
    def clock(self) -> Clock:  # type: ignore[override]
        return self.first.clock if self.then.elementwise else "rollout"

    def needs(self) -> tuple[Need, ...]:
        return self.first.needs() + self.then.needs()

    def parts(self) -> tuple[Signal, ...]:
        return (self.first, *self.then.parts())

    def __call__(self, view: View) -> Tensor:
        return self.then(view, view._signal(self.first), self.first.reach)


@dataclass(frozen=True)
class Combined(Signal):
    """What ``+``, ``-`` and ``*`` make of two signals, or of a signal and a number."""

    left: Signal
    right: Signal | float
    operation: Literal["+", "-", "*"]

    @property
    def reach(self) -> Reach:  # type: ignore[override]
        return _ORDER[max(_ORDER.index(s.reach) for s in self.parts())]

    @property
    def clock(self) -> Clock:  # type: ignore[override]
        return _CLOCKS[max(_CLOCKS.index(s.clock) for s in self.parts())]

    def needs(self) -> tuple[Need, ...]:
        return tuple(n for s in self.parts() for n in s.needs())

    def parts(self) -> tuple[Signal, ...]:
        return (self.left, self.right) if isinstance(self.right, Signal) else (self.left,)

    def __call__(self, view: View) -> Tensor:
        a = view.signal(self.left, reach=self.reach)
        b = view.signal(self.right, reach=self.reach)
        return a + b if self.operation == "+" else a - b if self.operation == "-" else a * b


# ---- sources of numbers ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column(Signal):
    """A column of the batch."""

    name: str
    reach: Reach = "sequence"  # type: ignore[assignment]

    def __call__(self, view: View) -> Tensor:
        level = "token" if view.rows.column(self.name).ndim == 2 else "sequence"
        # Without rows, as in a process that got none of a small batch, a column has no kind.
        if len(view.rows) and (level == "token") != (self.reach == "token"):
            raise RecipeError(
                f"the column {self.name!r} holds one number per {level}; say Column(..., reach={level!r})."
            )
        return view.column(self.name)


def Reward() -> Column:
    """The reward of each response, as the ``Score`` stage wrote it."""
    return Column("reward")


@dataclass(frozen=True)
class LogRatio(Signal):
    """``log above(token) - log below(token)`` at each event (nats); either side may be an expression."""

    above: Target
    below: Target
    reach: ClassVar[Reach] = "token"  # type: ignore[misc]

    @property
    def clock(self) -> Clock:  # type: ignore[override]
        return "step" if Policy() in (*self.above.handles, *self.below.handles) else "rollout"

    def needs(self) -> tuple[Need, ...]:
        return (*sampled_needs(self.above), *sampled_needs(self.below))

    def __call__(self, view: View) -> Tensor:
        return sampled(self.above, view.get) - sampled(self.below, view.get)


@dataclass(frozen=True)
class PerViolation(Signal):
    """``1 / share`` for the mean of a share over the draw: turns a mean over all entries into one over those counted.

    0 where nothing is counted: there is nothing to weigh. ``where`` is the term's.
    """

    share: Comparison
    where: str | None = None
    reach: ClassVar[Reach] = "batch"  # type: ignore[misc]

    def needs(self) -> tuple[Need, ...]:
        return (self.share,)

    def __call__(self, view: View) -> Tensor:
        share = view.get(self.share)
        share = share if self.where is None else share[view.inside(self.where)]
        counted, of = view.total(share), view.total(torch.ones_like(share))
        return torch.where(counted > 0, of / counted.clamp_min(1e-12), torch.zeros_like(counted))


@dataclass(frozen=True)
class Importance(Signal):
    """The importance weight ``model(token) / sampled law(token)``, without gradient, at most ``most``."""

    model: Target = field(default_factory=Policy)
    sampled_from: Target = field(default_factory=Behaviour)
    most: float = float("inf")
    reach: ClassVar[Reach] = "token"  # type: ignore[misc]

    @property
    def clock(self) -> Clock:  # type: ignore[override]
        return "step" if Policy() in self.model.handles else "rollout"

    def needs(self) -> tuple[Need, ...]:
        return (*sampled_needs(self.model), *sampled_needs(self.sampled_from))

    def __call__(self, view: View) -> Tensor:
        log_weight = sampled(self.model, view.get) - sampled(self.sampled_from, view.get)
        return log_weight.clamp(max=80.0).exp().clamp(max=self.most)


@dataclass(frozen=True)
class GroupAny(Signal):
    """1 for every row of a group in which some row's value is positive, else 0."""

    of: Signal = field(default_factory=Reward)
    reach: ClassVar[Reach] = "group"  # type: ignore[misc]

    def __post_init__(self) -> None:
        rows_only("GroupAny", self.of.reach)

    def needs(self) -> tuple[Need, ...]:
        return self.of.needs()

    def parts(self) -> tuple[Signal, ...]:
        return (self.of,)

    def __call__(self, view: View) -> Tensor:
        hit = (view.signal(self.of, reach="sequence") > 0).float()
        return (group_sum(hit, view.rows) > 0).float()


# ---- shapers -----------------------------------------------------------------------------------------------------


def rows_only(name: str, reach: Reach) -> None:
    """Raise `RecipeError` unless there is one number per response."""
    if reach not in ("sequence", "group"):
        raise RecipeError(f"{name} works on one number per response, but the chain before it gives one per {reach}.")


@dataclass(frozen=True)
class GroupNormalised(Shaper):
    """``(reward - group mean) / (group std + eps)``; a group without spread gives exactly 0.

    ``std="batch"`` divides by the batch's standard deviation, ``std=None`` not at all. Source: DeepSeekMath (2024);
    the variant without division, Dr. GRPO (2025).
    """

    std: Literal["group", "batch"] | None = "group"
    eps: float = 1e-6

    def reach_after(self, reach: Reach) -> Reach:
        rows_only("GroupNormalised", reach)
        return reach

    def __call__(self, view: View, value: Tensor, reach: Reach) -> Tensor:
        centred = value - group_mean(value, view.rows)
        # Equal rewards must give 0, not rounding noise divided by eps; NaN must stay, for a guard to see.
        centred = torch.where(group_spread(value, view.rows) == 0, torch.zeros_like(centred), centred)
        if self.std is None:
            return centred
        if self.std == "batch":
            spread = view.total(centred.pow(2)) / view.total(torch.ones_like(centred)).clamp_min(1)
            return centred / (spread.sqrt() + self.eps)
        size = group_sum(torch.ones_like(value), view.rows)
        unbiased = group_sum(centred * centred, view.rows) / (size - 1).clamp_min(1)
        return centred / (unbiased.sqrt() + self.eps)


@dataclass(frozen=True)
class LeaveOneOut(Shaper):
    """Reward minus the mean reward of the other rows of the group (RLOO, 2024)."""

    def reach_after(self, reach: Reach) -> Reach:
        rows_only("LeaveOneOut", reach)
        return reach

    def __call__(self, view: View, value: Tensor, reach: Reach) -> Tensor:
        size = group_sum(torch.ones_like(value), view.rows)
        mean = group_mean(value, view.rows)
        return torch.where(size > 1, (value - mean) * size / (size - 1).clamp_min(1), value)


@dataclass(frozen=True)
class Whitened(Shaper):
    """Mean 0 and standard deviation 1 over the whole batch (over events, or over rows)."""

    eps: float = 1e-8
    centre: bool = True

    def __call__(self, view: View, value: Tensor, reach: Reach) -> Tensor:
        count = view.total(torch.ones_like(value)).clamp_min(1)
        mean = view.total(value) / count
        spread = (view.total((value - mean).pow(2)) / count).sqrt()
        return (value - mean if self.centre else value) / (spread + self.eps)


@dataclass(frozen=True)
class Clipped(Shaper):
    """Numbers held to ``[-bound, bound]``."""

    bound: float
    elementwise: ClassVar[bool] = True

    def __call__(self, view: View, value: Tensor, reach: Reach) -> Tensor:
        return value.clamp(-self.bound, self.bound)


@dataclass(frozen=True)
class BetaKernel(Shaper):
    """``p^a (1 - p)^b`` of a pass rate p, over its mean for pass rates spread evenly over [0, 1].

    Greatest at ``a / (a + b)``: problems that are sometimes solved. ``a = b = 0`` is the constant 1. Source: PACED:
    Distillation at the Frontier of Student Competence (2026).

    Raises:
        RecipeError: an exponent is negative.
    """

    a: float = 1.0
    b: float = 1.0
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.a < 0 or self.b < 0:
            raise RecipeError(f"BetaKernel(a={self.a}, b={self.b}) must have exponents of at least 0.")

    def __call__(self, view: View, value: Tensor, reach: Reach) -> Tensor:
        mean = math.exp(math.lgamma(self.a + 1) + math.lgamma(self.b + 1) - math.lgamma(self.a + self.b + 2))
        return value.clamp(0, 1) ** self.a * (1 - value.clamp(0, 1)) ** self.b / mean
