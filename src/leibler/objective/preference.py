"""The parts of `Preference`: a score for each row, a contrast of rows, a link.

``loss = sum over comparisons of weight * link(z)``, with ``z`` the contrast of the rows' scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from leibler.divergence import Divergence, ReverseKL
from leibler.errors import RecipeError
from leibler.objective.needs import LogProb, Need
from leibler.objective.rows import CHOSEN, REJECTED, Rows, View
from leibler.objective.signals import Column, Reward
from leibler.objective.targets import Geometric, Handle, Policy, Reference


class Score(Protocol):
    """A differentiable number per row: ``score(view) -> [batch]``."""

    def needs(self) -> tuple[Need, ...]: ...

    def __call__(self, view: View) -> Float[Tensor, " batch"]: ...


@dataclass(frozen=True)
class ImplicitReward:
    """``beta * f'(u)`` with ``u = policy(y|x) / reference(y|x)`` of the whole response, ``f`` the
    divergence's generator.

    Solving ``max E[r] - beta D_f(policy || reference)`` for the reward gives exactly this, up to a function of the
    prompt. Reverse KL gives DPO's ``beta log u``. Divergences whose ``f'(0+)`` is finite are refused: mass may be
    clipped to zero there and the multiplier does not cancel. ``to`` is a handle or a law of sequences (`Geometric`);
    log-probs are summed over the response, or averaged with ``mean`` (lengths then do not count, and it is no longer
    the reward of that problem). ``clip`` bounds ``|log u|`` (``f'`` of forward KL grows like ``1/u``).
    Source: Beyond Reverse KL (2023).
    """

    divergence: Divergence = field(default_factory=ReverseKL)
    beta: float = 0.1
    to: Handle | Geometric = field(default_factory=Reference)
    clip: float | None = None
    mean: bool = False

    def __post_init__(self) -> None:
        reason = self.divergence.inadmissible
        if reason is not None:
            raise RecipeError(f"{type(self.divergence).__name__} gives no implicit reward: {reason}")

    def needs(self) -> tuple[Need, ...]:
        return (LogProb(Policy()), *(LogProb(h) for h in self.to.handles))

    def log_ratio(self, view: View) -> Float[Tensor, " batch"]:
        """``log u`` of each response, summed over its events (or their mean)."""
        target = self.to.sampled(lambda handle: view.get(LogProb(handle)))
        total = view.sum_rows(view.get(LogProb(Policy())) - target)
        return total / view.rows.length.clamp_min(1) if self.mean else total

    def __call__(self, view: View) -> Float[Tensor, " batch"]:
        ratio = self.log_ratio(view)
        if self.clip is not None:
            ratio = ratio.clamp(-self.clip, self.clip)
        return self.beta * self.divergence.f_prime(ratio)


@dataclass(frozen=True)
class MeanLogProb:
    """Mean log-prob per event of each response."""

    def needs(self) -> tuple[Need, ...]:
        return (LogProb(Policy()),)

    def __call__(self, view: View) -> Float[Tensor, " batch"]:
        return view.sum_rows(view.get(LogProb(Policy()))) / view.rows.length.clamp_min(1)


class Contrast(Protocol):
    """``contrast(score, rows) -> (z [comparisons], weight [comparisons])``; ``count`` is the denominator.

    A comparison of muted rows has weight 0 and stays in the count.
    """

    def __call__(self, score: Tensor, rows: Rows) -> tuple[Tensor, Tensor]: ...

    def count(self, rows: Rows) -> float: ...


@dataclass(frozen=True)
class Pairs:
    """``z = score(chosen) - score(rejected)`` for every (chosen, rejected) pair of a group."""

    def __call__(self, score: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        chosen, rejected = self._pairs(rows)
        z = score[chosen] - score[rejected]
        return z, (rows.heard[chosen] * rows.heard[rejected]).to(z.dtype)

    def count(self, rows: Rows) -> float:
        return float(self._pairs(rows)[0].shape[0])

    def _pairs(self, rows: Rows) -> tuple[Tensor, Tensor]:
        chosen, rejected = (rows.role == CHOSEN).nonzero()[:, 0], (rows.role == REJECTED).nonzero()[:, 0]
        group = rows.group_index
        at = (group[chosen][:, None] == group[rejected][None, :]).nonzero()
        return chosen[at[:, 0]], rejected[at[:, 1]]


@dataclass(frozen=True)
class AgainstHardest:
    """``z_i = s_i - tau log mean_j exp(s_j / tau)``: each right row against the wrong rows of its group.

    ``tau -> inf`` contrasts with their mean, ``tau -> 0`` with the highest. Right rows are averaged within their group;
    groups without both kinds give nothing but stay in the denominator. Source: DisCO (2025).
    """

    tau: float = 10.0
    label: Column = field(default_factory=Reward)
    above: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.tau < float("inf"):
            raise RecipeError(f"AgainstHardest(tau={self.tau:g}) needs a temperature that is positive and finite.")

    def __call__(self, score: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        right = rows.column(self.label.name) > self.above
        index, groups = rows.group_index, rows.groups
        # Log-mean-exp over the wrong rows of each group, as one masked [groups, rows] reduction. With the highest score
        # taken off and expm1, large temperatures lose no digits: the result is the highest plus a small correction.
        wrong = (index[None, :] == torch.arange(groups, device=score.device)[:, None]) & ~right[None, :]
        count = wrong.sum(dim=1).clamp_min(1)
        fixed = score.detach()
        top = torch.where(wrong, fixed[None, :], fixed.new_full((), float("-inf"))).amax(dim=1).nan_to_num(neginf=0.0)
        below = torch.where(wrong, score[None, :] - top[:, None], score.new_zeros(()))
        mean = torch.where(wrong, torch.expm1(below / self.tau), score.new_zeros(())).sum(dim=1) / count
        hardest = top + self.tau * torch.log1p(mean)
        picked = (wrong.any(dim=1)[index] & right).nonzero()[:, 0]
        positives = score.new_zeros(groups).index_add(0, index, right.to(score.dtype))
        return score[picked] - hardest[index[picked]], rows.heard[picked].to(score.dtype) / positives[index[picked]]

    def count(self, rows: Rows) -> float:
        return float(rows.groups)


Link = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Logistic:
    """``-log sigmoid(z)``, with ``smoothing`` the assumed share of flipped labels."""

    smoothing: float = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        loss = -torch.nn.functional.logsigmoid(z)
        if self.smoothing:
            loss = (1 - self.smoothing) * loss - self.smoothing * torch.nn.functional.logsigmoid(-z)
        return loss


@dataclass(frozen=True)
class Squared:
    """``(z - margin) ** 2``. Source: A General Theoretical Paradigm to Understand Learning from Human Preferences
    (2023)."""

    margin: float = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        return (z - self.margin) ** 2


@dataclass(frozen=True)
class Identity:
    """``-z``: the difference itself."""

    def __call__(self, z: Tensor) -> Tensor:
        return -z
