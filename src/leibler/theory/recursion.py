"""Distillation over generations: what an anchor to the first teacher guarantees, and what is lost without one.

Source: Recursive Meta-Distillation: An Axiomatic Framework for Iterative Knowledge Refinement (2026), reconstructed
from its abstract: the operators below satisfy its axioms, but need not be the paper's own.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from leibler.errors import RecipeError


def anchored(
    log_student: Float[Tensor, "*batch vocab"],
    log_teacher: Float[Tensor, "*batch vocab"],
    weight: float,
    mean: Literal["arithmetic", "geometric"] = "arithmetic",
) -> Float[Tensor, "*batch vocab"]:
    """Log-probabilities of the next generation's target: the last student drawn towards the first teacher.

    ``(1 - w) p + w q`` (arithmetic) or ``p^(1-w) q^w``, normalised (geometric), for student p and teacher q. A
    geometric target can never bring back what the student has lost; the arithmetic one does.

    Raises:
        RecipeError: the weight is not in [0, 1].

    Examples:
        >>> p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
        >>> [round(x, 3) for x in anchored(p, q, 0.25).exp().tolist()]
        [0.8, 0.2]
        >>> [round(x, 3) for x in anchored(p, q, 0.5, "geometric").exp().tolist()]
        [0.75, 0.25]
    """
    if not 0.0 <= weight <= 1.0:
        raise RecipeError(f"the anchor's weight is {weight}: take one between 0 and 1.")
    if mean == "geometric":
        # 0 * -inf is no number: a side without weight takes no part.
        parts = [w * x for w, x in ((1 - weight, log_student), (weight, log_teacher)) if w > 0]
        return torch.stack(parts).sum(0).log_softmax(-1)
    logs = torch.stack([log_student + _log(1 - weight), log_teacher + _log(weight)])
    return torch.logsumexp(logs, dim=0)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def contraction_bound(start: float, weight: float, generations: int, error: float = 0.0) -> float:
    """The most that KL(teacher || student) can be after some generations, in nats.

    ``KL_k <= (1 - w)^k KL_0 + e (1 - (1 - w)^k) / w``, when every generation fits its anchored target up to an increase
    of ``error``; without an anchor errors add up. It holds for both means. For KL(student || teacher) the first term
    holds with the arithmetic mean only: with the geometric one the factor 1 - w is false.

    Examples:
        >>> round(contraction_bound(2.0, weight=0.5, generations=3), 3)
        0.25
        >>> contraction_bound(0.0, weight=0.0, generations=3, error=0.1) == 3 * 0.1
        True
    """
    kept = (1 - weight) ** generations
    return start * kept + (error * generations if weight == 0 else error * (1 - kept) / weight)


def surviving_diversity(samples: int, generations: int) -> float:
    """Share of ``1 - sum p^2`` that is left, on average, if each generation is the empirical law of the last.

    ``(1 - 1/n)^k``: without an anchor, every class but one is lost in the end (model collapse).

    Examples:
        >>> round(surviving_diversity(50, 40), 4)
        0.4457
    """
    return (1 - 1 / samples) ** generations
