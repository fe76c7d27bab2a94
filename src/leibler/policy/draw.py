"""One token for each row by inverting the distribution function at a given uniform number."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

_ONE_LEVEL = 8192
"""Up to this many entries one cumulative sum in float64 is cheapest; beyond it, sums of blocks and then one block."""


def unnormalised(
    logits: Float[Tensor, "rows vocab"], temperature: float
) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "rows vocab"]]:
    """Logits at ``temperature`` less their maximum, and their exponentials (at most 1), in float32 at least."""
    scores = logits if logits.dtype == torch.float64 else logits.float()
    scores = (scores - scores.amax(-1, keepdim=True)) / temperature
    # exp2, not softmax: torch's float32 softmax is off by up to 8e-6 on the CPU.
    return scores, torch.exp2(scores * math.log2(math.e))


def mixed(
    logits: Sequence[Float[Tensor, "rows vocab"]], weights: Sequence[float], temperature: float, top_p: float | None
) -> Float[Tensor, "rows vocab"]:
    """Weights (unnormalised, non-negative) of the law that is sampled from, up to one factor per row.

    The law is ``sum_i w_i softmax(logits_i / temperature)``, cut to its ``top_p`` nucleus. The nucleus is the smallest
    set of most likely entries that holds at least ``top_p`` of the probability
    (The Curious Case of Neural Text Degeneration, 2020).
    """
    if len(logits) == 1:
        law = unnormalised(logits[0], temperature)[1]
    else:
        parts = (unnormalised(rows, temperature)[1] for rows in logits)
        law = sum(weight * part / part.sum(-1, keepdim=True) for weight, part in zip(weights, parts, strict=True))
        assert isinstance(law, Tensor)
    if top_p is not None and top_p < 1.0:
        ordered, order = law.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1, dtype=torch.float64) - ordered
        outside = before >= top_p * ordered.sum(-1, keepdim=True, dtype=torch.float64)
        law = law.masked_fill(torch.zeros_like(outside).scatter_(1, order, outside), 0.0)
    return law


def invert(
    law: Float[Tensor, "rows vocab"], uniform: Float64[Tensor, " rows"]
) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The first entry whose cumulative share exceeds ``uniform``, and its log-probability (nats).

    An entry of weight 0 is never drawn: the cumulative sum does not move there.

    Args:
        law: non-negative weights, not necessarily normalised.
        uniform: numbers in [0, 1).

    Example:
        >>> law = torch.tensor([[1.0, 0.0, 3.0]]).expand(4, 3)
        >>> invert(law, torch.tensor([0.0, 0.24, 0.25, 0.99], dtype=torch.float64))[0].tolist()
        [0, 0, 2, 2]
    """
    rows, vocab = law.shape
    if vocab <= _ONE_LEVEL:
        cumulative = law.cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        token = torch.searchsorted(cumulative, uniform[:, None] * total, right=True).clamp_(max=vocab - 1)[:, 0]
    else:
        # Two levels: sums of blocks decide the block, a cumulative sum within it the entry.
        block = math.isqrt(vocab)
        padded = torch.nn.functional.pad(law, (0, -vocab % block)).view(rows, -1, block)
        cumulative = padded.sum(-1).cumsum(-1, dtype=torch.float64)
        total = cumulative[:, -1:]
        target = uniform[:, None] * total
        which = torch.searchsorted(cumulative, target, right=True).clamp_(max=padded.shape[1] - 1)
        start = torch.where(which > 0, cumulative.gather(1, (which - 1).clamp_min(0)), 0.0)
        inside = padded.gather(1, which[:, :, None].expand(-1, -1, block))[:, 0].cumsum(-1, dtype=torch.float64)
        # The block's own sum was rounded otherwise than this cumulative sum: stay below the latter's end.
        last = inside[:, -1:]
        rest = torch.minimum(target - start, last.nextafter(torch.zeros_like(last))).clamp_min_(0.0)
        token = (which * block + torch.searchsorted(inside, rest, right=True))[:, 0].clamp_(max=vocab - 1)
    chosen = law.gather(1, token[:, None])
    return token, (chosen.log() - total.log().to(law.dtype))[:, 0]


def greedy(law: Float[Tensor, "rows vocab"]) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
    """The most likely entry (the first among equals); its log-probability under the greedy law is 0."""
    token = law.argmax(-1)
    return token, torch.zeros_like(law[:, 0])
