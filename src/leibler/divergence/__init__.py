"""Divergences and other functionals of vocabulary rows: pure functions of tensors.

In formulas ``p`` is the model's row and ``q`` the target's; values are in nats.
"""

from __future__ import annotations

from leibler.divergence.adaptive import AdaptiveKL
from leibler.divergence.argmax import ArgmaxMargin
from leibler.divergence.band import BandKL
from leibler.divergence.base import Divergence
from leibler.divergence.cross_entropy import ReverseCrossEntropy
from leibler.divergence.functionals import Entropy, SampledLogProb
from leibler.divergence.geometric import CauchySchwarz, TotalVariation
from leibler.divergence.heated import Heated
from leibler.divergence.kl import ForwardKL, Jeffreys, ReverseKL
from leibler.divergence.mixtures import JensenShannon, SkewForwardKL, SkewReverseKL
from leibler.divergence.pair import Pair, pair
from leibler.divergence.power import Alpha, ChiSquared, Hellinger, Power, Renyi, ReverseChiSquared, Tsallis
from leibler.divergence.registry import get, names
from leibler.divergence.rows import FLOOR, LN2, LOG2E, Functional, Row, block_rows, to_row
from leibler.divergence.tiers import RowFunction, SumForm, Swapped

__all__ = [
    "FLOOR",
    "LN2",
    "LOG2E",
    "AdaptiveKL",
    "Alpha",
    "ArgmaxMargin",
    "BandKL",
    "CauchySchwarz",
    "ChiSquared",
    "Divergence",
    "Entropy",
    "ForwardKL",
    "Functional",
    "Heated",
    "Hellinger",
    "Jeffreys",
    "JensenShannon",
    "Pair",
    "Power",
    "Renyi",
    "ReverseChiSquared",
    "ReverseCrossEntropy",
    "ReverseKL",
    "Row",
    "RowFunction",
    "SampledLogProb",
    "SkewForwardKL",
    "SkewReverseKL",
    "SumForm",
    "Swapped",
    "TotalVariation",
    "Tsallis",
    "block_rows",
    "get",
    "names",
    "pair",
    "to_row",
]
