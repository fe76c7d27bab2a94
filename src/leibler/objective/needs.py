"""Typed needs: the numbers per event that parts ask for; equal needs are computed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from leibler.divergence.rows import Functional
from leibler.objective.targets import Handle, Policy, Target


class Need:
    """A hashable description of one number per event."""


@dataclass(frozen=True)
class LogProb(Need):
    """log-probability of the sampled token under a model, at the sampling temperature."""

    of: Handle = field(default_factory=Policy)


@dataclass(frozen=True)
class TokenEntropy(Need):
    """Entropy of the policy's next-token law (nats)."""


class OverVocabulary(Need):
    """A need of the policy's rows over the whole vocabulary, and of a target's."""

    to: Target


@dataclass(frozen=True)
class TokenDivergence(OverVocabulary):
    """A divergence of the policy's next-token law to a target's, over the whole vocabulary."""

    divergence: Functional
    to: Target


@dataclass(frozen=True)
class WholeRows(OverVocabulary):
    """The policy's rows and a target's themselves, at some chosen events: no number per event, see `Coupled`."""

    to: Target


@dataclass(frozen=True)
class Output(Need):
    """The number per event of a trained side module (a critic)."""

    module: str


@dataclass(frozen=True)
class Comparison(Need):
    """A number per event that a side module makes of the policy's hidden states and another model's.

    Attributes:
        module: the side module, ``module(hidden, other) -> [numbers, events]``.
        to: the other model.
        number: which of the module's numbers.
    """

    module: str
    to: Handle
    number: int = 0


def sampled_needs(target: Target) -> tuple[LogProb, ...]:
    """The log-probs that the sampled level of a target reads; raises `RecipeError` for a target that has none."""
    target.sampled(lambda handle: torch.zeros(1))
    return tuple(LogProb(h) for h in target.handles)


def sampled(target: Target, get: Callable[[Need], Tensor]) -> Tensor:
    """A target's log-score of the sampled tokens, ``[n]``."""
    return target.sampled(lambda handle: get(LogProb(handle)))
