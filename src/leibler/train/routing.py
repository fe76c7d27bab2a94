"""Models that are asked about some rows only."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from leibler.errors import DataError
from leibler.fused import Linear
from leibler.fused.operands import LowRank
from leibler.objective.rows import Rows
from leibler.objective.targets import Handle, Only


def asked(handle: Handle, rows: Rows) -> Int[Tensor, " chosen"] | None:
    """The rows that a model is asked about; None: all of them.

    Raises:
        DataError: a record whose column names none of the models.
    """
    if not isinstance(handle, Only):
        return None
    values = [str(record.get(handle.column)) for record in rows.records]
    for value, record in zip(values, rows.records, strict=True):
        if value not in handle.known:
            raise DataError(
                f"the column {handle.column!r} of {record.source or 'a record'} is {value!r:.40}, and the recipe has "
                f"models for {', '.join(handle.known)} only; name one for it, or leave such records out."
            )
    found = [i for i, value in enumerate(values) if value in handle.values]
    return torch.tensor(found, dtype=torch.long, device=rows.tokens.device)


def placed(linear: Linear, at: Bool[Tensor, " events"]) -> Linear:
    """The heads of some events among all: elsewhere every logit is the same number."""

    def spread(hidden: Tensor) -> Tensor:
        return hidden.new_zeros(len(at), hidden.shape[1]).masked_scatter(at[:, None], hidden)

    pairs = [LowRank(spread(pair.hidden), pair.weight) for pair in linear.low_rank]
    bias = linear.bias
    if bias is not None:  # what is out of the support stays so; the rest is of the events at hand alone
        pairs.append(LowRank(at[:, None].to(bias.dtype), bias.masked_fill(bias.isinf(), 0.0)[:, None]))
        bias = torch.where(bias.isinf(), bias, torch.zeros_like(bias))
    return replace(linear, hidden=spread(linear.hidden), bias=bias, low_rank=tuple(pairs))
