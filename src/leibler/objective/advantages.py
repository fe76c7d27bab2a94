"""Advantages that lean on a critic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leibler.objective.needs import Need, Output
from leibler.objective.rows import View
from leibler.objective.signals import Reach, Shaper, Signal, paid_at_end


@dataclass(frozen=True)
class GAE(Shaper):
    """Generalised advantage estimation: ``A_t = sum_k (discount decay)^k delta_{t+k}``,
    ``delta_t = r_t + discount V_{t+1} - V_t``, with ``V`` the critic's values when the batch was drawn.

    Source: High-Dimensional Continuous Control Using Generalized Advantage Estimation (2015).
    """

    critic: str = "critic"
    decay: float = 0.95
    discount: float = 1.0

    def needs(self) -> tuple[Need, ...]:
        return (Output(self.critic),)

    def reach_after(self, reach: Reach) -> Reach:
        return "token"

    def __call__(self, view: View, value: Tensor, reach: Reach) -> Tensor:
        mask = view.rows.mask
        flat_value = view.get(Output(self.critic))
        row = view.rows.row
        following = torch.zeros_like(flat_value)
        if len(row) > 1:
            same = row[1:] == row[:-1]
            following[:-1] = torch.where(same, flat_value[1:], torch.zeros_like(flat_value[1:]))
        delta = paid_at_end(view, value, reach) + self.discount * following - flat_value
        # A_t = delta_t + g A_{t+1} is a sum weighted by powers of g of the distance in events: one small product.
        position = (mask.cumsum(1) - 1).clamp_min(0)
        longest = int(view.rows.length.max()) if len(view.rows) else 0
        packed = delta.new_zeros(len(view.rows), max(longest, 1))
        packed[row, position[mask]] = delta
        steps = torch.arange(packed.shape[1], device=delta.device)
        gap = steps[:, None] - steps[None, :]
        rate = self.discount * self.decay
        kernel = torch.where(gap >= 0, delta.new_tensor(rate).pow(gap.clamp_min(0)), delta.new_zeros(()))
        return (packed @ kernel)[row, position[mask]]


@dataclass(frozen=True)
class Returns(Signal):
    """What a critic is fitted to: advantage plus the critic's old value, ``A_t + V_t``."""

    advantage: Signal
    critic: str = "critic"

    def needs(self) -> tuple[Need, ...]:
        return (*self.advantage.needs(), Output(self.critic))

    def parts(self) -> tuple[Signal, ...]:
        return (self.advantage,)

    def __call__(self, view: View) -> Tensor:
        return view._signal(self.advantage) + view.get(Output(self.critic))
