"""A preference between two tokens of a row: the target's most likely one and the model's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from leibler.divergence.base import HUGE, Divergence
from leibler.divergence.rows import LN2, Row
from leibler.errors import RecipeError


@dataclass(frozen=True, eq=False)
class ArgmaxMargin(Divergence):
    """``-log sigmoid(beta h)`` with ``h = log p(a)/p(b) - log q(a)/q(b)``, ``a`` q's most likely token, ``b`` p's.

    The Bradley-Terry loss of preferring the target's first choice to the model's, the target in the reference's place.
    Where the two choices are one, it is the constant log 2 and pulls nowhere; elsewhere its gradient by the logits is
    ``-beta sigmoid(-beta h)`` at a and the opposite at b. So it is least not where p equals q but where the same token
    comes first (for good, once h is large): no divergence in the usual sense, and never 0. Both choices are held
    constant in the gradient. Infinite, with gradient 0, where one side gives the other's choice no probability.
    Source: Direct Preference Knowledge Distillation for Large Language Models (2024), in its released, token-wise form.

    Raises:
        RecipeError: beta is not positive.

    >>> import torch
    >>> model, target = torch.tensor([0.2, 0.8]).log(), torch.tensor([0.5, 0.5]).log()
    >>> round(ArgmaxMargin(beta=1.0)(model, target).item(), 4)  # log(1 + 4): a is token 0, b token 1
    1.6094
    """

    beta: float = 1.0

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise RecipeError(f"ArgmaxMargin(beta={self.beta}) must have a positive beta.")

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        pair = torch.cat([target.logits.argmax(-1, keepdim=True), model.logits.argmax(-1, keepdim=True)], dim=-1)
        z, y = model.logits.gather(-1, pair), target.logits.gather(-1, pair)
        margin = self.beta * LN2 * ((z[:, 0] - z[:, 1]) - (y[:, 0] - y[:, 1]))
        lacking = (z[:, 0] < -HUGE) | (y[:, 1] < -HUGE)
        values = torch.nn.functional.softplus(-margin).masked_fill(lacking, torch.inf)
        # Rows that agree are constant: h is 0 there, but its derivative by either logit alone is not.
        slope = (-self.beta * torch.sigmoid(-margin)).masked_fill(pair[:, 0] == pair[:, 1], 0.0)
        return values, (pair, slope)

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        pair, slope = saved
        pull = coefficient * slope.unsqueeze(-1)
        grad.scatter_add_(-1, pair, torch.cat([pull, -pull], dim=-1))
