"""Measurements: accuracy and pass@k, calibration, diversity, entropy, frontiers, and drift between models."""

from __future__ import annotations

from leibler.measure.calibration import Bin, Calibration, calibration, token_calibration
from leibler.measure.episodes import success
from leibler.measure.latent import (
    Parallelism,
    effective_compression,
    effective_paths,
    evaluate_latent,
    greedy_matching,
    parallelism,
)
from leibler.measure.models import TokenView, compare, evaluate, token_view
from leibler.measure.samples import distinct_answers, distinct_n, mean_pass_at_k, pass_at_k
from leibler.measure.summaries import EntropySummary, Point, entropy_summary, frontier

__all__ = [
    "Bin",
    "Calibration",
    "EntropySummary",
    "Parallelism",
    "Point",
    "TokenView",
    "calibration",
    "compare",
    "distinct_answers",
    "distinct_n",
    "effective_compression",
    "effective_paths",
    "entropy_summary",
    "evaluate",
    "evaluate_latent",
    "frontier",
    "greedy_matching",
    "mean_pass_at_k",
    "parallelism",
    "pass_at_k",
    "success",
    "token_calibration",
    "token_view",
]
