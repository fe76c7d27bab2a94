"""The Kullback-Leibler divergences, by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from leibler.divergence.base import Divergence
from leibler.divergence.generators import bounded_exp, bounded_expm1
from leibler.divergence.pair import pair
from leibler.divergence.rows import LN2, Row


@dataclass(frozen=True, eq=False)
class ForwardKL(Divergence):
    """``KL(q || p) = sum q log(q / p)``: the model must cover the target.

    Generator ``f(u) = -log u``. inf where the target has mass outside the model's support. Source: S. Kullback,
    R. A. Leibler, "On Information and Sufficiency" (1951).

    >>> import torch
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(ForwardKL()(half, quarter).item(), 4)
    0.1308
    """

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        return pair(model, target).forward_kl, None

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        grad.addcmul_(model.weights, coefficient / model.total)
        grad.addcmul_(target.weights, -coefficient / target.total)

    def f(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return -log_u

    def f_prime(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return -bounded_exp(-log_u)

    @property
    def inadmissible(self) -> str | None:
        return None

    def inverse_conjugate(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``-exp(-1 - z)``: the inverse of ``f*(t) = -1 - log(-t)``."""
        return -bounded_exp(-1.0 - z)

    def swapped(self) -> Divergence:
        return ReverseKL()


@dataclass(frozen=True, eq=False)
class ReverseKL(Divergence):
    """``KL(p || q) = sum p log(p / q)``: the model must stay inside the target.

    Generator ``f(u) = u log u``. inf where the model has mass outside the target's support. Source: S. Kullback,
    R. A. Leibler, "On Information and Sufficiency" (1951).

    >>> import torch
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(ReverseKL()(half, quarter).item(), 4)
    0.1438
    """

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        return pair(model, target).reverse_kl, None

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        both = pair(model, target)
        # p * (log(p/q) - KL): the difference minus its mean is that, without any normaliser.
        weighted = (both.difference - both.reverse_mean).mul_(model.weights)
        grad.addcmul_(weighted, coefficient * (-LN2 / model.total))

    def f(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return bounded_exp(log_u) * log_u

    def f_prime(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return log_u + 1.0

    @property
    def inadmissible(self) -> str | None:
        return None

    def inverse_conjugate(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """``1 + log z``, the inverse of ``f*(t) = exp(t - 1)``, on ``z > 0``; continued by its tangent below 0.01."""
        return 1.0 + torch.log(z.clamp(min=0.01)) - torch.relu(0.01 - z) / 0.01

    def swapped(self) -> Divergence:
        return ForwardKL()


@dataclass(frozen=True, eq=False)
class Jeffreys(Divergence):
    """``KL(p || q) + KL(q || p) = sum (p - q) log(p / q)``: symmetric.

    Generator ``f(u) = (u - 1) log u``. inf where the supports differ. Source: H. Jeffreys, "An Invariant Form for
    the Prior Probability in Estimation Problems" (1946).

    >>> import torch
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(Jeffreys()(half, quarter).item(), 4)
    0.2747
    """

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        both = pair(model, target)
        return both.forward_kl + both.reverse_kl, None

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        add_both_gradients(grad, coefficient, coefficient, model, target)

    def f(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return bounded_expm1(log_u) * log_u

    def f_prime(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return log_u - bounded_expm1(-log_u)

    @property
    def inadmissible(self) -> str | None:
        return None

    def swapped(self) -> Divergence:
        return self


def add_both_gradients(
    grad: Float[Tensor, "rows vocab"],
    forward: Float[Tensor, "rows 1"],
    reverse: Float[Tensor, "rows 1"],
    model: Row,
    target: Row,
) -> None:
    """Add ``forward`` times the gradient of ``ForwardKL`` and ``reverse`` times that of ``ReverseKL``.

    In one expression, ``p (forward - reverse (log(q/p) + KL)) - forward q``: fewer passes over the vocabulary.
    """
    both = pair(model, target)
    slope = reverse * -LN2
    weighted = (both.difference - both.reverse_mean).mul_(slope / model.total).add_(forward / model.total)
    grad.addcmul_(weighted, model.weights)
    grad.addcmul_(target.weights, -forward / target.total)
