"""Surrogates of the policy gradient: a loss per event from the log-ratio to an anchor and an advantage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from leibler.objective.targets import Old, Target


class Surrogate(Protocol):
    """``surrogate(log_ratio, advantage)`` with ``log_ratio = log policy - log anchor``, ``[n] -> [n]``.

    ``region`` marks the events whose gradient passes; ``anchor`` is the denominator of the ratio.
    """

    @property
    def anchor(self) -> Target: ...

    def __call__(self, log_ratio: Float[Tensor, " n"], advantage: Float[Tensor, " n"]) -> Float[Tensor, " n"]: ...

    def region(self, log_ratio: Float[Tensor, " n"], advantage: Float[Tensor, " n"]) -> Bool[Tensor, " n"]: ...


@dataclass(frozen=True)
class Ratio:
    """``-ratio * advantage``: importance-weighted, unclipped. On fresh samples, plain REINFORCE with ratio 1."""

    anchor: Target = field(default_factory=Old)
    most: float = 20.0
    """Bound of ``|log ratio|``, only against overflow."""

    def __call__(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        return -log_ratio.clamp(-self.most, self.most).exp() * advantage

    def region(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        return torch.ones_like(log_ratio, dtype=torch.bool)


@dataclass(frozen=True)
class Clip:
    """``-min(ratio * A, clip(ratio, 1 - low, 1 + high) * A)`` per event.

    ``high`` is ``low`` unless given (clip-higher). ``cap`` bounds the loss of negative advantages at ``cap * |A|``
    (dual clip). Sources: Proximal Policy Optimization Algorithms (2017); dual clip: Mastering Complex Control in MOBA
    Games (2020).

    Examples:
        >>> Clip(0.2)(torch.tensor([0.5]), torch.tensor([1.0]))
        tensor([-1.2000])
    """

    low: float = 0.2
    high: float | None = None
    cap: float | None = None
    anchor: Target = field(default_factory=Old)
    most: ClassVar[float] = 20.0

    def __call__(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        ratio = log_ratio.clamp(-self.most, self.most).exp()
        bounded = ratio.clamp(1 - self.low, 1 + (self.low if self.high is None else self.high))
        loss = -torch.minimum(ratio * advantage, bounded * advantage)
        if self.cap is not None:
            loss = torch.where(advantage < 0, torch.minimum(loss, -self.cap * advantage), loss)
        return loss

    def region(self, log_ratio: Tensor, advantage: Tensor) -> Tensor:
        ratio = log_ratio.clamp(-self.most, self.most).exp()
        high = self.low if self.high is None else self.high
        inside = torch.where(advantage >= 0, ratio <= 1 + high, ratio >= 1 - self.low)
        return inside if self.cap is None else inside & ~((advantage < 0) & (ratio > self.cap))
