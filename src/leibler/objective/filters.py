"""Shapers that let some numbers through and set the others to 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from leibler.errors import RecipeError
from leibler.objective.needs import Need
from leibler.objective.rows import View
from leibler.objective.signals import Reach, Shaper, Signal


@dataclass(frozen=True)
class DeadZone(Shaper):
    """0 in place of numbers smaller than ``width`` in size: differences that small are taken for drift, not for a view.

    Raises:
        RecipeError: the width is negative or not finite.

    Examples:
        >>> DeadZone(0.1)(None, torch.tensor([-0.5, 0.05, 0.1]), "token")
        tensor([-0.5000,  0.0000,  0.1000])
    """

    width: float
    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.width < math.inf:
            raise RecipeError(f"DeadZone({self.width}) must have a finite width of at least 0.")

    def __call__(self, view: View, value: Tensor, reach: Reach) -> Tensor:
        return torch.where(value.abs() < self.width, torch.zeros_like(value), value)  # NaN stays, for a guard to see


@dataclass(frozen=True)
class SameSign(Shaper):
    """0 where the sign is not that of another signal: ``v_t`` where ``v_t a_t > 0``.

    So a teacher's opinion of a token counts only where the outcome of the response agrees with it; where the outcome
    says nothing (0), no token of the response counts.

    Attributes:
        of: the other signal, per token or per response.

    Raises:
        RecipeError: the numbers so far are per response and the other's per token.

    Examples:
        >>> from leibler.objective import GroupNormalised, LogRatio, Reference, Reward, Teacher
        >>> advantage = LogRatio(Teacher(), Reference()) >> SameSign(Reward() >> GroupNormalised())
        >>> advantage.reach
        'token'
    """

    of: Signal

    def needs(self) -> tuple[Need, ...]:
        return self.of.needs()

    def parts(self) -> tuple[Signal, ...]:
        return (self.of,)

    def reach_after(self, reach: Reach) -> Reach:
        if self.of.reach == "token" and reach != "token":
            raise RecipeError(f"SameSign compares one number per {reach} with one per token; spread the former first.")
        return reach

    def __call__(self, view: View, value: Tensor, reach: Reach) -> Tensor:
        other = view.signal(self.of, reach="token" if reach == "token" else "sequence")
        # Of signs: a product may underflow, or be NaN at inf times 0.
        kept = torch.where(value.sign() * other.sign() > 0, value, torch.zeros_like(value))
        nan = value.isnan() | other.isnan()
        return torch.where(nan, torch.nan, kept)  # for a guard to see
