"""Numbers along a response: what is still to come at each event, and advantages that lean on a critic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from leibler.divergence import Divergence
from leibler.estimate.credit import coefficients
from leibler.objective.needs import LogProb, Need, Output, sampled, sampled_needs
from leibler.objective.rows import View
from leibler.objective.signals import Reach, Shaper, Signal, rows_only
from leibler.objective.targets import Handle, Target


@dataclass(frozen=True)
class ToGo(Shaper):
    """Sum from ``start`` events later to the end of the row: ``R_t = sum_{t' >= t + start} r_t'``.

    ``per="remaining"`` divides by the number of summands (MiniLLM's length normalisation). A number per row is taken
    as paid at the last event.
    """

    start: int = 0
    per: Literal["remaining"] | None = None

    def reach_after(self, reach: Reach) -> Reach:
        return "token"

    def __call__(self, view: View, value: Tensor, reach: Reach) -> Tensor:
        dense = view.dense(paid_at_end(view, value, reach))
        mask = view.rows.mask
        total = _reverse_cumulative(dense)
        count = _reverse_cumulative(mask.to(dense.dtype))
        if self.start:
            # Events of a row are contiguous per turn; shift within the flat order of each row.
            total, count = _shift(total, mask, self.start), _shift(count, mask, self.start)
        if self.per == "remaining":
            total = total / count.clamp_min(1)
        return total[mask]


@dataclass(frozen=True)
class SequenceCredit(Shaper):
    """What multiplies ``grad log p`` of each event in the gradient of a divergence of responses, from its log-ratios.

    See `leibler.estimate.credit`: ``to_go`` adds the divergence of the contexts that an event leads to, ``sequence`` is
    ``f'`` of the whole response's ratio.
    """

    divergence: Divergence
    credit: Literal["to_go", "sequence"]

    def __call__(self, view: View, value: Tensor, reach: Reach) -> Tensor:
        return coefficients(self.divergence, value, self.credit, sequence=view.rows.row).to(value.dtype)


def _reverse_cumulative(x: Tensor) -> Tensor:
    return x.flip(1).cumsum(1).flip(1)


def _shift(x: Tensor, mask: Tensor, by: int) -> Tensor:
    """Each event takes the number of the event ``by`` places later in its row, 0 past the end."""
    flat, row = x[mask], mask.nonzero()[:, 0]
    moved = torch.zeros_like(flat)
    if len(flat) > by:
        same = row[by:] == row[:-by]
        moved[:-by] = torch.where(same, flat[by:], torch.zeros_like(flat[by:]))
    return torch.zeros_like(x).masked_scatter(mask, moved)


def paid_at_end(view: View, value: Tensor, reach: Reach) -> Tensor:
    """Numbers per row as numbers per event, paid at each row's last event; numbers per event pass."""
    if reach == "token":
        return value
    rows = view.rows
    rows_only("a reward", reach)
    last = torch.ones_like(rows.row, dtype=torch.bool)
    last[:-1] = rows.row[1:] != rows.row[:-1]
    out = torch.zeros(rows.row.shape, dtype=value.dtype, device=value.device)
    out[last] = value[rows.row[last]]
    return out


@dataclass(frozen=True)
class InReward(Shaper):
    """Adds ``-coefficient * log(old / target)`` to the reward at each event: the KL penalty inside the reward.

    The k1 estimator inside the reward, with returns to go after it, has the exact gradient of the sequence's reverse
    KL. Its place in the chain, before or after a normalisation, changes what is optimised. Source: Fine-Tuning
    Language Models from Human Preferences (2019).
    """

    to: Target
    coefficient: Signal | float
    of: Handle = field(default_factory=lambda: Handle("old"))

    def needs(self) -> tuple[Need, ...]:
        return (LogProb(self.of), *sampled_needs(self.to))

    def parts(self) -> tuple[Signal, ...]:
        return (self.coefficient,) if isinstance(self.coefficient, Signal) else ()

    def reach_after(self, reach: Reach) -> Reach:
        return "token"

    def _ratio(self, view: View) -> Tensor:
        return view.get(LogProb(self.of)) - sampled(self.to, view.get)

    def measures(self, view: View) -> dict[str, float]:
        per_row = view.sum_rows(self._ratio(view))
        return {"divergence_per_sequence": float(per_row.mean()), "sequences": float(len(per_row))}

    def __call__(self, view: View, value: Tensor, reach: Reach) -> Tensor:
        ratio = self._ratio(view)
        return paid_at_end(view, value, reach) - view._signal(self.coefficient) * ratio


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
