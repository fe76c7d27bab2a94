"""One token for each row by inverting the distribution function at a given uniform number.

Rows of a whole vocabulary are large: a fresh tensor of that size costs more in page faults than the arithmetic on it.
So everything here works in place on the rows it is given.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

_ONE_LEVEL = 1024
"""Up to this many entries one cumulative sum is cheapest; beyond it, sums of blocks and then one block of each row."""


def law_(
    logits: Sequence[Float[Tensor, "rows vocab"]], weights: Sequence[float], top_p: float | None = None
) -> Float[Tensor, "rows vocab"]:
    """What is sampled from: non-negative weights, one law per row up to a factor; overwrites ``logits``.

    The law is ``sum_i weights_i softmax2(logits_i)``, cut to its nucleus: the smallest set of most likely entries that
    holds at least ``top_p`` of the probability (The Curious Case of Neural Text Degeneration, 2020).

    Args:
        logits: of each model, in base 2 and already divided by the temperature.
        weights: of the models in the mixture.
        top_p: share of the nucleus; everything when not given.

    Examples:
        >>> law_([torch.tensor([[0.0, 1.0, -1.0]])], [1.0], top_p=0.8)
        tensor([[0.5000, 1.0000, 0.0000]])
    """
    for rows in logits:
        # exp2, not softmax: torch's float32 softmax is off by up to 8e-6 on the CPU.
        rows.sub_(rows.amax(-1, keepdim=True)).exp2_()
    law = logits[0]
    if len(logits) > 1:
        for rows, weight in zip(logits, weights, strict=True):
            rows.mul_(weight / rows.sum(-1, keepdim=True))
        for rows in logits[1:]:
            law.add_(rows)
    if top_p is not None and top_p < 1.0:
        ordered, order = law.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        outside = before >= top_p * ordered.sum(-1, keepdim=True, dtype=torch.float64)
        law.masked_fill_(torch.zeros_like(outside).scatter_(1, order, outside), 0.0)
    return law


def invert(
    law: Float[Tensor, "rows vocab"], uniform: Float64[Tensor, " rows"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The first entry whose cumulative share exceeds ``uniform``, and its log-probability (nats).

    An entry of weight 0 is never drawn: the cumulative sum does not move there.

    Args:
        law: non-negative weights, not necessarily normalised.
        uniform: numbers in [0, 1).

    Examples:
        >>> law = torch.tensor([[1.0, 0.0, 3.0]]).expand(4, 3)
        >>> invert(law, torch.tensor([0.0, 0.24, 0.25, 0.99], dtype=torch.float64))[0].tolist()
        [0, 0, 2, 2]
    """
    vocab = law.shape[1]
    if vocab <= _ONE_LEVEL:
        cumulative = law.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        token = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).clamp_(max=vocab - 1)
    else:
        block = 1 << round(math.log2(vocab) / 2)
        whole = vocab - vocab % block
        sums = law[:, :whole].unflatten(1, (-1, block)).sum(-1)
        if whole < vocab:
            sums = torch.cat((sums, law[:, whole:].sum(-1, keepdim=True)), dim=1)
        cumulative = sums.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        target = uniform[:, None] * total
        which = torch.searchsorted(cumulative, target, right=True).clamp_(max=sums.shape[1] - 1)
        entry = which * block + torch.arange(block, device=law.device)
        share = law.gather(1, entry.clamp(max=vocab - 1)).masked_fill_(entry >= vocab, 0.0)
        inside = share.cumsum(-1, dtype=torch.float64)
        # The block's own sum was rounded otherwise than this cumulative sum: stay below the latter's end.
        last = inside[:, -1:]
        before = torch.where(which > 0, cumulative.gather(1, (which - 1).clamp_min(0)), 0.0)
        rest = torch.minimum(target - before, last.nextafter(torch.zeros_like(last))).clamp_min_(0.0)
        token = which * block + torch.searchsorted(inside, rest, right=True)
    logp = law.gather(1, token).log() - total.log().to(law.dtype)
    return token[:, 0], logp[:, 0]
