"""The k most likely entries of each row of a linear head, without ever storing the logits of all tokens."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.divergence import SampledLogProb
from leibler.divergence.rows import LN2, OUTSIDE, Row
from leibler.errors import ModelError
from leibler.fused.coarse import Coarse, Kept, TopK
from leibler.fused.functions import functionals
from leibler.fused.operands import Linear, Want


@torch.no_grad()
def top_k(
    head: Linear, k: int, *, token: Int[Tensor, " n"] | None = None, vocab: int | None = None
) -> tuple[Coarse, Float[Tensor, " n"] | None]:
    """The head's law, stored: its k most likely entries, most likely first, and the exact mass of the others.

    Args:
        head: the head, at its temperature.
        k: how many entries; all of them at most.
        token: ``[n]`` tokens whose log-probabilities are wanted as well.
        vocab: the number of real entries, where the head is padded.

    Returns:
        The target (see :class:`Coarse`), and the tokens' log-probabilities in nats, if they were asked for.

    Raises:
        ModelError: k is not between 1 and the number of entries.

    Examples:
        >>> head = Linear(torch.eye(2), torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))
        >>> kept, _ = top_k(head, 1)
        >>> kept.token.tolist()[1], kept.law.logp.exp()[1].item(), kept.law.rest.exp()[1].item()  # doctest: +ELLIPSIS
        ([0], 0.576..., 0.423...)
    """
    entries = head.vocab if vocab is None else vocab
    if not 1 <= k <= entries:
        raise ModelError(f"the top {k} of {entries} vocabulary entries cannot be kept: take k between 1 and {entries}.")
    found = _Largest(k)
    wants = [Want(found), *([] if token is None else [Want(SampledLogProb())])]
    values = functionals(head, wants, token=token, vocab=vocab)
    kept = torch.cat(found.token) if found.token else torch.zeros(0, k, dtype=torch.int32)
    logp = torch.cat(found.logp) if found.logp else torch.zeros(0, k)
    law = TopK(logp, values[0], head.temperature)
    return Coarse(kept, law), None if token is None else values[1]


class _Largest:
    """As a functional, the log-mass outside the top k; on the way it keeps what is inside.

    A pass shows each row once and in order, a block at a time: so this needs no loop of its own over the head.
    """

    needs_target = False
    __hash__ = None  # type: ignore[assignment]  # what is cached by its functionals would keep the rows alive

    def __init__(self, k: int) -> None:
        self.k = k
        self.token: list[Tensor] = []
        self.logp: list[Tensor] = []

    def value(self, model: Row, target: Row | None, token: Tensor | None) -> tuple[Float[Tensor, " rows"], Any]:
        logits, index = model.logits.topk(self.k, dim=-1)
        self.token.append(index.int())
        self.logp.append(_nats(logits, model))
        return _nats(Kept(model, index, "bucket").others.normaliser, model)[:, 0], None

    def add_gradient(
        self, grad: Tensor, coefficient: Tensor, model: Row, target: Row | None, token: Tensor | None, saved: Any
    ) -> None:
        raise ModelError("a stored law is not differentiated: call top_k on detached hidden states.")


def _nats(logits: Tensor, row: Row) -> Tensor:
    """Natural log-probabilities, with -inf outside the support."""
    return ((logits - row.normaliser) * LN2).masked_fill(logits < OUTSIDE, -torch.inf)
