"""Linear heads and functionals of their rows, without ever storing the logits of all tokens."""

from __future__ import annotations

from leibler.fused.coarse import Coarse, TopK
from leibler.fused.functions import functionals, one_pass, support_violations
from leibler.fused.linear import linear_divergence
from leibler.fused.merged import Lifted, Merged, VocabularyMap
from leibler.fused.operands import Linear, LowRank, TargetRows, Want
from leibler.fused.topk import top_k

__all__ = [
    "Coarse",
    "Lifted",
    "Linear",
    "LowRank",
    "Merged",
    "TargetRows",
    "TopK",
    "VocabularyMap",
    "Want",
    "functionals",
    "linear_divergence",
    "one_pass",
    "support_violations",
    "top_k",
]
