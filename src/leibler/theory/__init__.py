"""Closed forms and bounds of published theory, as functions that experiments can be held against."""

from __future__ import annotations

from leibler.theory.recursion import anchored, contraction_bound, surviving_diversity
from leibler.theory.tilting import divergence_along, moments, tilted
from leibler.theory.transfer import full_soft_labels, hard_labels, partial_soft_labels, risk, weighted_likelihood

__all__ = [
    "anchored",
    "contraction_bound",
    "divergence_along",
    "full_soft_labels",
    "hard_labels",
    "moments",
    "partial_soft_labels",
    "risk",
    "surviving_diversity",
    "tilted",
    "weighted_likelihood",
]
