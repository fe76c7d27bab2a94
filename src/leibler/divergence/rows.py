"""A block of vocabulary rows, and what every functional of such rows offers.

A *functional* is one number per row: the log-probability of the sampled token, the entropy, a divergence to a
target. Functionals see a block of rows (small enough to stay in the processor's cache), first for their values,
then, once the coefficients are known, for a gradient that is *added* to a shared buffer; so several terms cost
one gradient each in elementwise work and nothing in matrix products.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LN2 = math.log(2.0)
LOG2E = 1.0 / LN2
FLOOR = -1e30
"""Stands for a logit of -inf: finite, so that differences of two are 0 and no NaN can arise."""
OUTSIDE = -1e20
"""Any logit below this counts as -inf (so ``FLOOR`` divided by a temperature still does)."""


class Row:
    """One side (model or target) of a block of rows: base-2 logits and what follows from them, computed once.

    Args:
        logits: ``[rows, vocab]`` base-2 logits (natural logits times ``LOG2E``), with ``FLOOR`` in place of -inf.
        whole: nothing is excluded, as the caller knows: spares looking for it.
    """

    def __init__(self, logits: Float[Tensor, "rows vocab"], *, whole: bool = False) -> None:
        self.logits = logits
        if whole:
            self.support = None
        self.pairs: dict[int, Any] = {}

    @cached_property
    def support(self) -> Bool[Tensor, "rows vocab"] | None:
        """Entries of positive probability; ``None`` where no entry of the block is excluded (the usual case)."""
        # One cheap minimum spares the comparison over the vocabulary. (NaN compares false: it stays inside.)
        if not bool((self.logits.amin(dim=-1) < OUTSIDE).any()):
            return None
        return self.logits >= OUTSIDE

    @cached_property
    def maximum(self) -> Float[Tensor, "rows 1"]:
        return self.logits.amax(dim=-1, keepdim=True)

    @cached_property
    def weights(self) -> Float[Tensor, "rows vocab"]:
        """``2 ** (logits - maximum)``: the unnormalised probabilities, at most 1."""
        return (self.logits - self.maximum).exp2_()

    @cached_property
    def total(self) -> Float[Tensor, "rows 1"]:
        return self.weights.sum(dim=-1, keepdim=True)

    @cached_property
    def normaliser(self) -> Float[Tensor, "rows 1"]:
        """Base-2 log-normaliser."""
        return self.maximum + torch.log2(self.total)

    @cached_property
    def p(self) -> Float[Tensor, "rows vocab"]:
        """Probabilities."""
        return self.weights / self.total

    @cached_property
    def logp(self) -> Float[Tensor, "rows vocab"]:
        """Natural log-probabilities (about ``-7e29`` where the probability is 0)."""
        return (self.logits - self.normaliser) * LN2


def block_rows(vocab: int, device: str = "cpu") -> int:
    """Rows per elementwise block: about 2 MB of float32 on a processor, whose cache they stay in, 128 MB elsewhere.

    Elsewhere it is launches that cost. A small vocabulary gets many rows: with blocks of 64, the calls themselves took
    five times the work at 19 entries and half as long again at 512.

    Examples:
        >>> block_rows(151936), block_rows(32768), block_rows(100), block_rows(32768, "cuda")
        (3, 16, 1024, 1024)
    """
    elements = 2**19 if device == "cpu" else 2**25
    return min(max(elements // max(vocab, 1), 2), 1024)


def to_row(logits: Float[Tensor, "rows vocab"], scale: float = 1.0) -> Row:
    """A ``Row`` of natural logits times ``scale``: float32 at least, base 2, ``FLOOR`` in place of -inf."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Clamping first also catches logits (such as finfo.min) that would overflow when they are scaled.
    return Row(logits.to(dtype).clamp(min=FLOOR) * (LOG2E * scale))


@runtime_checkable
class Functional(Protocol):
    """One number per row, with its gradient by the model's (natural) logits.

    ``value`` returns the numbers and whatever ``add_gradient`` wants to see again; ``add_gradient`` adds
    ``coefficient[:, None] * d value / d logits`` to ``grad`` in place.
    """

    @property
    def needs_target(self) -> bool: ...

    def value(
        self, model: Row, target: Row | None, token: Int[Tensor, " rows"] | None
    ) -> tuple[Float[Tensor, " rows"], Any]: ...

    def add_gradient(
        self,
        grad: Float[Tensor, "rows vocab"],
        coefficient: Float[Tensor, " rows"],
        model: Row,
        target: Row | None,
        token: Int[Tensor, " rows"] | None,
        saved: Any,
    ) -> None: ...
