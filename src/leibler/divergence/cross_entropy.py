"""The cross-entropy of the model's row relative to the target's: reverse KL without the pull to uncertainty."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from leibler.divergence.base import Divergence
from leibler.divergence.pair import infinite, pair, vecdot
from leibler.divergence.rows import LN2, Row


@dataclass(frozen=True, eq=False)
class ReverseCrossEntropy(Divergence):
    """``-sum p log q = KL(p || q) + H(p)``: linear in the model's law, so its least value is at the target's argmax.

    For scores A that are no log-law, ``q = exp(A) / Z`` makes it ``log Z - sum p A``: to descend it is to climb the
    model's mean score over the whole vocabulary, with the gradient ``-p (A - sum p A)`` by the logits, which does not
    know Z. Only the value is shifted by it. So with ``q`` proportional to ``a / b`` (`LogLinear`), it is
    ``KL(p || a) - KL(p || b) + log Z``, and where p must not collapse something else has to hold it. Never 0 unless p
    and q are one token; inf where the model has mass outside the target's support. Source of the name: Symmetric Cross
    Entropy for Robust Learning with Noisy Labels (2019).

    >>> import torch
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(ReverseCrossEntropy()(half, quarter).item(), 4)  # (log 4 + log 4/3) / 2
    0.837
    """

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        scores = target.logits - target.normaliser
        mean = vecdot(model.weights, scores) / model.total
        return infinite(mean.squeeze(-1) * -LN2, pair(model, target).target_lacks), (scores, mean)

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        scores, mean = saved
        grad.addcmul_((scores - mean).mul_(model.weights), coefficient * (-LN2 / model.total))
