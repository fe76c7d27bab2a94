"""Whether a model is as often right as it is sure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leibler.errors import DataError
from leibler.measure.arrays import array


@dataclass(frozen=True)
class Bin:
    """Predictions of similar confidence.

    Args:
        low: the confidence above which the bin begins (0 is in the first bin).
        high: the confidence at which it ends, included.
        count: how many predictions.
        confidence: their mean confidence; None in an empty bin.
        accuracy: the share that is right; None in an empty bin.
    """

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Calibration:
    """The reliability diagram and what sums it up.

    Args:
        bins: from low to high confidence.
        error: expected calibration error, ``sum_b (n_b / n) |accuracy_b - confidence_b|``.
        worst: maximum calibration error, the largest of these differences over the bins that hold something.
        brier: mean of ``(confidence - correct)^2``.
        confidence: mean confidence.
        accuracy: the share that is right.
        count: how many predictions.
    """

    bins: tuple[Bin, ...]
    error: float
    worst: float
    brier: float
    confidence: float
    accuracy: float
    count: int


def calibration(
    confidence: Any, correct: Any, bins: int = 10, binning: Literal["width", "mass"] = "width"
) -> Calibration:
    """Reliability bins and expected calibration error of confidences against outcomes.

    The error is biased: with few predictions in a bin it is positive even for a perfect model, and it can hide errors
    that cancel within a bin; ``brier`` has neither fault.

    Source: "On Calibration of Modern Neural Networks" (2017).

    Args:
        confidence: ``[n]`` probabilities that were given to the prediction.
        correct: ``[n]`` outcomes, 1 or True where the prediction was right.
        bins: how many bins.
        binning: ``width`` for bins of equal width on [0, 1], ``mass`` for bins that hold about the same number of
            predictions (equal confidences stay together).

    Raises:
        DataError: the lengths differ, there is nothing, or a confidence is outside [0, 1].

    Examples:
        >>> found = calibration([0.9, 0.9, 0.6, 0.6], [1, 1, 1, 0], bins=2)
        >>> round(found.error, 3), found.bins[1].count, found.bins[1].accuracy
        (0.0, 4, 0.75)
    """
    p, hit = array(confidence, "confidence").ravel(), array(correct, "outcome").ravel()
    if p.shape != hit.shape:
        raise DataError(f"{p.size} confidences do not fit {hit.size} outcomes; give one outcome per confidence.")
    if not ((p >= 0) & (p <= 1)).all():
        raise DataError("a confidence lies outside [0, 1]; give probabilities.")
    if bins < 1:
        raise DataError(f"calibration cannot use {bins} bins; give at least 1.")
    if binning == "width":
        edges = np.linspace(0.0, 1.0, bins + 1)
    elif binning == "mass":
        edges = np.unique(np.concatenate(([0.0], np.quantile(p, np.linspace(0, 1, bins + 1)[1:-1]), [1.0])))
    else:
        raise DataError(f"there is no binning {binning!r}; choose width or mass.")
    # Bin b holds edges[b] < p <= edges[b + 1]; the first holds 0 too.
    place = np.clip(np.searchsorted(edges, p, side="left") - 1, 0, len(edges) - 2)
    count = np.bincount(place, minlength=len(edges) - 1)
    with np.errstate(invalid="ignore"):
        sure = np.bincount(place, weights=p, minlength=len(edges) - 1) / count
        right = np.bincount(place, weights=hit, minlength=len(edges) - 1) / count
    gap = np.abs(right - sure)
    found = tuple(
        Bin(
            low=float(edges[b]),
            high=float(edges[b + 1]),
            count=int(count[b]),
            confidence=float(sure[b]) if count[b] else None,
            accuracy=float(right[b]) if count[b] else None,
        )
        for b in range(len(edges) - 1)
    )
    filled = count > 0
    return Calibration(
        bins=found,
        error=float((gap[filled] * count[filled]).sum() / p.size),
        worst=float(gap[filled].max()),
        brier=float(((p - hit) ** 2).mean()),
        confidence=float(p.mean()),
        accuracy=float(hit.mean()),
        count=int(p.size),
    )


def token_calibration(
    logits: Float[Tensor, "*batch vocab"],
    tokens: Int[Tensor, "*batch"],
    mask: Bool[Tensor, "*batch"] | None = None,
    bins: int = 10,
) -> Calibration:
    """Calibration of the most likely next token: its probability against whether it is the token that came.

    Args:
        logits: the law of each next token.
        tokens: the token that came.
        mask: which positions count; all of them when not given.
        bins: how many bins of equal width.

    Raises:
        DataError: no position counts.

    Examples:
        >>> logits = torch.tensor([[0.8, 0.2], [0.4, 0.6]]).log()
        >>> round(token_calibration(logits, torch.tensor([0, 0])).accuracy, 2)
        0.5
    """
    confidence, best = torch.softmax(logits.detach().double(), -1).max(-1)
    hit = best == tokens
    if mask is not None:
        confidence, hit = confidence[mask], hit[mask]
    return calibration(confidence, hit, bins)
