"""Measurements: accuracy and pass@k, calibration, diversity, entropy, frontiers, and drift between models."""

from __future__ import annotations

from leibler.measure.calibration import Bin, Calibration, calibration, token_calibration
from leibler.measure.episodes import success
from leibler.measure.models import TokenView, compare, evaluate, token_view
from leibler.measure.samples import distinct_answers, distinct_n, mean_pass_at_k, pass_at_k
from leibler.measure.summaries import EntropySummary, Point, entropy_summary, frontier

__all__ = [
    "Bin",
    "Calibration",
    "EntropySummary",
    "Point",
    "TokenView",
    "calibration",
    "compare",
    "distinct_answers",
    "distinct_n",
    "entropy_summary",
    "evaluate",
    "frontier",
    "mean_pass_at_k",
    "pass_at_k",
    "success",
    "token_calibration",
    "token_view",
]
