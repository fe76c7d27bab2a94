"""Functionals of the model's row alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.divergence.base import HUGE
from leibler.divergence.rows import LN2, Row
from leibler.errors import RecipeError


@dataclass(frozen=True)
class SampledLogProb:
    """``log p(token)``: the log-probability of the sampled (or given) token, in nats.

    -inf, with gradient 0, where the token is outside the model's support.

    >>> import torch
    >>> from leibler.divergence import to_row
    >>> row = to_row(torch.tensor([[0.25, 0.75]]).log())
    >>> value, _ = SampledLogProb().value(row, None, torch.tensor([1]))
    >>> round(value.exp().item(), 4)
    0.75
    """

    @property
    def needs_target(self) -> bool:
        return False

    def value(
        self, model: Row, target: Row | None = None, token: Int[Tensor, " rows"] | None = None
    ) -> tuple[Float[Tensor, " rows"], Any]:
        if token is None:
            raise RecipeError("SampledLogProb needs the token of every row: pass `token`.")
        values = (model.logits.gather(-1, token.unsqueeze(-1)) - model.normaliser).squeeze(-1) * LN2
        outside = values < -HUGE
        return values.masked_fill(outside, -torch.inf), outside

    def add_gradient(
        self,
        grad: Float[Tensor, "rows vocab"],
        coefficient: Float[Tensor, " rows"],
        model: Row,
        target: Row | None,
        token: Int[Tensor, " rows"] | None,
        saved: Any,
    ) -> None:
        """Adds ``coefficient * (one_hot(token) - p)``."""
        assert token is not None
        coefficient = coefficient.masked_fill(saved, 0.0).unsqueeze(-1)
        grad.addcmul_(model.weights, -coefficient / model.total)
        grad.scatter_add_(-1, token.unsqueeze(-1), coefficient)


@dataclass(frozen=True)
class Entropy:
    """``H = -sum p log p`` in nats, of the model's row.

    >>> import torch
    >>> from leibler.divergence import to_row
    >>> value, _ = Entropy().value(to_row(torch.zeros(1, 8)))
    >>> round(value.exp().item(), 4)
    8.0
    """

    @property
    def needs_target(self) -> bool:
        return False

    def value(
        self, model: Row, target: Row | None = None, token: Int[Tensor, " rows"] | None = None
    ) -> tuple[Float[Tensor, " rows"], Any]:
        # Shifted by the maximum, so that a large common offset costs no accuracy.
        shifted = model.logits - model.maximum
        mean = shifted.mul_(model.weights).sum(dim=-1, keepdim=True) / model.total
        values = (torch.log2(model.total) - mean).squeeze(-1) * LN2
        return values.clamp(min=0.0), mean

    def add_gradient(
        self,
        grad: Float[Tensor, "rows vocab"],
        coefficient: Float[Tensor, " rows"],
        model: Row,
        target: Row | None,
        token: Int[Tensor, " rows"] | None,
        saved: Any,
    ) -> None:
        """Adds ``-coefficient * p * (log p + H)``."""
        # log p + H is the shifted logit minus its mean: the normaliser cancels.
        weighted = (model.logits - (model.maximum + saved)).mul_(model.weights)
        grad.addcmul_(weighted, coefficient.unsqueeze(-1) * (-LN2 / model.total))
