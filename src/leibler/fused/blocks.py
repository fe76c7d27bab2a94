"""Two levels of blocking: token chunks for the matrix products, row blocks for everything elementwise.

A product needs many tokens at once to run at full speed, while elementwise work is several times faster on blocks that
stay in the processor's cache. So each head's logits are formed for a *chunk* of tokens into a buffer made once, and
read from it in *row blocks* of about two megabytes. Sizes depend on shapes alone, never on free memory or the clock,
so that a repeated run adds in the same order.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from leibler.divergence.rows import FLOOR, LOG2E, OUTSIDE, Row
from leibler.fused.operands import Linear, TargetRows

CHUNKS = (1024, 512, 256, 128)
_BUDGET = 256 * 2**20


def chunk_tokens(vocab: int, hidden: int, heads: int) -> int:
    """Tokens per matrix product: the largest whose logits fit the budget.

    The budget is 256 MB, or as much as the head's gradient takes anyway; ``heads`` counts the model and the targets.

    Examples:
        >>> chunk_tokens(32768, 512, heads=2), chunk_tokens(151936, 896, heads=2)
        (1024, 256)
    """
    budget = max(_BUDGET, 4 * vocab * hidden)
    for chunk in CHUNKS:
        if heads * chunk * vocab * 4 <= budget:
            return chunk
    return CHUNKS[-1]


def product_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of the matrix products: the weight's, or the one that autocast asks for."""
    device = weight.device.type
    if weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def keep_heap() -> None:
    """Keep row-block temporaries from being returned to the system, and faulted in again, at every operation.

    glibc gives back the top of its heap beyond twice the largest mapped block that was ever freed (32 MB at most).
    Row blocks of 2 MB pass that limit all the time unless some larger block was freed before: so free one, untouched.
    """
    torch.empty(28 * 2**20, dtype=torch.uint8)


class Side:
    """One head during a pass: its logits of the current chunk, handed out as row blocks in base 2.

    Multiplying the hidden states by log2(e) / temperature before the product makes base 2 and temperature free. Half
    precision would round the product of the two once more, so there the float32 row block is scaled instead.
    """

    def __init__(self, head: Linear, vocab: int, chunk: int, rows: int, dtype: torch.dtype, block: torch.dtype) -> None:
        self.products = [(hidden.detach(), weight.detach()[:vocab].to(dtype)) for hidden, weight in head.products]
        self.temperature = head.temperature
        self.block = block
        self.bias: Float[Tensor, " vocab"] | None = None
        self.outside: Tensor | None = None
        self.whole = True
        if head.bias is not None:
            bias = head.bias.detach()[:vocab].to(block)
            self.bias = (bias * (LOG2E / head.temperature)).clamp_(min=FLOOR)
            self.whole = bool((self.bias > OUTSIDE).all())
            outside = bias == -torch.inf
            self.outside = outside if bool(outside.any()) else None
        self.formed: tuple[int, int] | None = None
        self.biased = False
        device = head.weight.device
        self.logits = torch.empty(chunk, vocab, dtype=dtype, device=device)
        # Products in the blocks' own dtype are used in place; others are widened into a block of their own.
        self.wide = None if dtype == block else torch.empty(rows, vocab, dtype=block, device=device)

    def multiply(self, start: int, stop: int) -> None:
        """Logits of the chunk of tokens ``start`` to ``stop``, into the buffer, unless they are there."""
        if self.formed == (start, stop):
            return
        self.formed, self.biased = (start, stop), False
        logits = self.logits[: stop - start]
        for k, (hidden, weight) in enumerate(self.products):
            hidden = hidden[start:stop]
            if self.wide is None:
                hidden = hidden.to(self.block) * (LOG2E / self.temperature)
            torch.addmm(logits, hidden.to(weight.dtype), weight.T, beta=min(k, 1), out=logits)

    def rows(self, start: int, stop: int) -> Row:
        """Rows ``start`` to ``stop`` of the chunk, base 2, bias added (in place, so: once for each chunk)."""
        logits = self.logits[start:stop]
        if self.wide is not None:
            logits = self.wide[: stop - start].copy_(logits).mul_(LOG2E / self.temperature)
        if self.bias is not None and not (self.biased and self.wide is None):
            logits += self.bias
        return Row(logits, whole=self.whole)


class Mixed:
    """The rows of one target, from the rows of its leaves."""

    def __init__(self, target: TargetRows, leaves: list[int], sides: list[Side]) -> None:
        self.combine = target.combine
        self.leaves = leaves
        masks = [sides[leaf].outside for leaf in leaves]
        # What lies outside every leaf lies outside the target, whatever the expression makes of the floors.
        self.outside: Tensor | None = None
        if all(mask is not None for mask in masks):
            both = torch.stack([mask for mask in masks if mask is not None]).all(dim=0)
            self.outside = both if bool(both.any()) else None

    def rows(self, rows: list[Row]) -> Row:
        leaves = [rows[leaf] for leaf in self.leaves]
        if self.combine is None:
            return leaves[0]
        scores = self.combine(tuple(row.logits - row.normaliser for row in leaves))
        # -inf, or a part of a floor (c * FLOOR, 0 < c < 1), is no probability at all.
        scores = torch.nn.functional.threshold(scores, OUTSIDE, FLOOR)
        if self.outside is not None:
            scores = scores.masked_fill(self.outside, FLOOR)
        return Row(scores)
