"""Divergences from the log-probabilities of sampled tokens: what is estimated, what is descended, what is biased."""

from leibler.estimate import credit
from leibler.estimate.api import automatic, get, loss, names, value
from leibler.estimate.estimators import K1, K2, K3, Estimator, Exact, Pathwise, ScoreFunction
from leibler.estimate.published import AbsLogRatio, AsReward, LogSquared, LowVarKL
from leibler.estimate.table import FACTS, Exactness, Fact, alternatives, check, exactness, spelt

__all__ = [
    "FACTS",
    "K1",
    "K2",
    "K3",
    "AbsLogRatio",
    "AsReward",
    "Estimator",
    "Exact",
    "Exactness",
    "Fact",
    "LogSquared",
    "LowVarKL",
    "Pathwise",
    "ScoreFunction",
    "alternatives",
    "automatic",
    "check",
    "credit",
    "exactness",
    "get",
    "loss",
    "names",
    "spelt",
    "value",
]
