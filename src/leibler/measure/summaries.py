"""Many numbers in a few: entropies of tokens, and the best points of a trade-off."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isnan
from typing import Any, NamedTuple

import numpy as np

from leibler.errors import DataError
from leibler.measure.arrays import array


@dataclass(frozen=True)
class EntropySummary:
    """Entropies (nats) of many next-token laws.

    Args:
        mean: the mean.
        branching: ``exp(mean)``, the number of equally likely tokens with that entropy.
        median: half of the tokens have less.
        top: mean over the fifth of the tokens with the highest entropy, where the choices are made.
        decided: the share of tokens with less than 0.01 nats.
        count: how many.
    """

    mean: float
    branching: float
    median: float
    top: float
    decided: float
    count: int


def entropy_summary(entropies: Any, mask: Any = None) -> EntropySummary:
    """Sums up entropies of next-token laws.

    The fifth with the highest entropy is singled out after "Beyond the 80/20 Rule: High-Entropy Minority Tokens Drive
    Effective Reinforcement Learning for LLM Reasoning" (2025).

    Args:
        entropies: nats, of any shape.
        mask: of the same shape; which entries count.

    Raises:
        DataError: nothing counts, or an entropy is not a finite number of at least 0.

    Examples:
        >>> import math
        >>> found = entropy_summary([0.0, 0.0, 0.0, 0.0, math.log(8)])
        >>> round(found.top / math.log(2), 6), found.decided
        (3.0, 0.8)
    """
    values = array(entropies, "entropy")
    if mask is not None:
        values = array(values[array(mask, "mask").astype(bool)], "entropy under the mask")
    values = np.sort(values.ravel())
    if not (np.isfinite(values).all() and values[0] >= -1e-6):
        raise DataError("an entropy is negative or not finite; give entropies in nats, of laws that are normalised.")
    mean = float(values.mean())
    return EntropySummary(
        mean=mean,
        branching=float(np.exp(mean)),
        median=float(np.median(values)),
        top=float(values[-max(1, round(len(values) / 5)) :].mean()),
        decided=float((values < 0.01).mean()),
        count=len(values),
    )


class Point(NamedTuple):
    """One policy: how far it went and what it gained.

    Args:
        kl: distance from where it began, in nats; less is better.
        reward: what it earns; more is better.
        label: whatever tells it from the others, such as the step.
    """

    kl: float
    reward: float
    label: str = ""


def frontier(points: Iterable[Point | tuple[Any, ...]]) -> list[Point]:
    """The points that no other point beats (less KL and no less reward, or more reward and no more KL), by rising KL.

    Reward alone ranks methods by how far they went; methods are compared fairly at equal KL, that is by their
    frontiers ("Scaling Laws for Reward Model Overoptimization", 2023).

    Args:
        points: ``Point`` or (kl, reward[, label]); of equal points the first is kept.

    Raises:
        DataError: a number is NaN.

    Examples:
        >>> [point.reward for point in frontier([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (3.0, 0.8)])]
        [0.5, 0.9]
    """
    candidates = [Point(float(point[0]), float(point[1]), *point[2:]) for point in points]
    if any(isnan(point.kl) or isnan(point.reward) for point in candidates):
        raise DataError("a point of the frontier is NaN; leave out the runs that broke.")
    best: list[Point] = []
    for point in sorted(candidates, key=lambda point: (point.kl, -point.reward)):
        if not best or point.reward > best[-1].reward:
            best.append(point)
    return best
