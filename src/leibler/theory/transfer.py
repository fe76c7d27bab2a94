"""What a student can learn of a teacher over finite domains, from labels of three kinds, and how fast.

Inputs ``s`` and labels ``a`` are finite; the teacher is a table of laws; the student sees n samples. With hard
labels it sees ``(s, a)``; with partial soft labels, also the teacher's probability of the sampled label; with full
soft labels, the teacher's whole law at each input that was seen. The risk is ``E_s TV(student, teacher)``; lower
bounds are ``sqrt(S A / n)``, ``S A / n`` and ``S / n``.

Source: Towards the Fundamental Limits of Knowledge Transfer over Finite Domains (2023).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def risk(
    student: Float[Tensor, "inputs labels"],
    teacher: Float[Tensor, "inputs labels"],
    inputs: Float[Tensor, " inputs"] | None = None,
) -> float:
    """``E_s TV(student(.|s), teacher(.|s))``, inputs uniform unless their law is given.

    Examples:
        >>> risk(torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
        0.25
    """
    gap = (student - teacher).abs().sum(-1) / 2
    return float(gap.mean() if inputs is None else (gap * inputs).sum())


def _normalised(weights: Tensor) -> Tensor:
    """Rows that sum to 1; the uniform law where a row is empty."""
    total = weights.sum(-1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp_min(1e-300), 1.0 / weights.shape[-1])


def hard_labels(counts: Int[Tensor, "inputs labels"]) -> Float[Tensor, "inputs labels"]:
    """Maximum likelihood: the empirical law of each input; uniform where it was never seen. Attains ``sqrt(S A / n)``.

    Examples:
        >>> hard_labels(torch.tensor([[3, 1], [0, 0]])).tolist()
        [[0.75, 0.25], [0.5, 0.5]]
    """
    return _normalised(counts.double())


def weighted_likelihood(
    counts: Int[Tensor, "inputs labels"], teacher: Float[Tensor, "inputs labels"]
) -> Float[Tensor, "inputs labels"]:
    """The minimiser of ``-sum_i q(a_i|s_i) log p(a_i|s_i)``: proportional to counts times the teacher's law.

    With more samples it tends to the *squared* teacher, normalised: weighting the likelihood by the probability that
    came with the label is biased, unless the teacher's law is uniform on its support.

    Examples:
        >>> weighted_likelihood(torch.tensor([[8, 2]]), torch.tensor([[0.8, 0.2]])).round(decimals=3).tolist()
        [[0.941, 0.059]]
    """
    return _normalised(counts * teacher.double())


def partial_soft_labels(
    counts: Int[Tensor, "inputs labels"], teacher: Float[Tensor, "inputs labels"]
) -> Float[Tensor, "inputs labels"]:
    """The minimiser of the squared error of log-probabilities, ``sum_i (log p(a_i|s_i) - log q(a_i|s_i))^2 / 2``.

    It copies the teacher on every label that was seen, and spreads the mass that is left over the others: this attains
    ``S A / n`` up to logarithms.

    Examples:
        >>> partial_soft_labels(torch.tensor([[5, 0, 0]]), torch.tensor([[0.6, 0.3, 0.1]])).round(decimals=3).tolist()
        [[0.6, 0.2, 0.2]]
    """
    seen = counts > 0
    copied = torch.where(seen, teacher.double(), 0.0)
    unseen = (~seen).sum(-1, keepdim=True)
    left = (1 - copied.sum(-1, keepdim=True)).clamp_min(0.0) / unseen.clamp_min(1)
    return torch.where(seen, copied, left)


def full_soft_labels(
    counts: Int[Tensor, "inputs labels"], teacher: Float[Tensor, "inputs labels"]
) -> Float[Tensor, "inputs labels"]:
    """The minimiser of any KL to the teacher's whole laws: a copy at each input that was seen, uniform elsewhere.

    Its risk is at most the mass of the inputs that were never seen: ``S / n``.

    Examples:
        >>> full_soft_labels(torch.tensor([[0, 1], [0, 0]]), torch.tensor([[0.75, 0.25], [0.75, 0.25]])).tolist()
        [[0.75, 0.25], [0.5, 0.5]]
    """
    seen = counts.sum(-1, keepdim=True) > 0
    return torch.where(seen, teacher.double(), 1.0 / teacher.shape[-1])
