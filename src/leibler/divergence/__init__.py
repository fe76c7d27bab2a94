"""Divergences and other functionals of vocabulary rows: pure functions of tensors.

In formulas ``p`` is the model's row and ``q`` the target's; values are in nats.
"""

from __future__ import annotations

from leibler.divergence.base import Divergence, block_rows, to_row
from leibler.divergence.functionals import Entropy, SampledLogProb
from leibler.divergence.kl import ForwardKL, Jeffreys, ReverseKL
from leibler.divergence.mixtures import JensenShannon, SkewForwardKL, SkewReverseKL
from leibler.divergence.rows import FLOOR, LN2, LOG2E, Functional, Row

__all__ = [
    "FLOOR",
    "LN2",
    "LOG2E",
    "Divergence",
    "Entropy",
    "ForwardKL",
    "Functional",
    "Jeffreys",
    "JensenShannon",
    "ReverseKL",
    "Row",
    "SampledLogProb",
    "SkewForwardKL",
    "SkewReverseKL",
    "block_rows",
    "to_row",
]
