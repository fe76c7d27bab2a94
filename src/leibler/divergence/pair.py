"""What two rows have in common, computed once and shared by every divergence between them."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from leibler.divergence.rows import FLOOR, LN2, LOG2E, Row

SMALL_KL = 0.1
"""Below this many nats the KL is computed again in its centred form, which keeps relative accuracy down to 0."""
EXTREME = 60.0
"""Log-ratios beyond this would overflow ``expm1`` in float32; such entries take the direct form."""


def vecdot(a: Float[Tensor, "rows vocab"], b: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows 1"]:
    """Dot products of rows. Not ``torch.linalg.vecdot``: autocast lowers that to bfloat16."""
    return (a * b).sum(dim=-1, keepdim=True)


def pair(model: Row, target: Row) -> Pair:
    """The pair of ``model`` and ``target``, made once however many functionals ask for it."""
    found = model.pairs.get(id(target))
    if found is None:
        found = model.pairs[id(target)] = Pair(model, target)
    return found


class Pair:
    """Model row ``p`` and target row ``q``: differences, means and both KL divergences, each on demand and once."""

    def __init__(self, model: Row, target: Row) -> None:
        self.model, self.target = model, target

    @classmethod
    def of_logits(
        cls, model: Float[Tensor, "rows vocab"], target: Float[Tensor, "rows vocab"], scale: float = 1.0
    ) -> Pair:
        """The pair of two blocks of natural logits times ``scale``, with -inf replaced by ``FLOOR``.

        The difference is taken before the change to base 2: it is exact for close logits, where rounding in the
        products would otherwise show in the sixth digit.
        """
        model, target = model.clamp(min=FLOOR), target.clamp(min=FLOOR)
        self = cls(Row(model * (LOG2E * scale)), Row(target * (LOG2E * scale)))
        self.difference = (target - model).mul_(LOG2E * scale)
        self.model.pairs[id(self.target)] = self
        return self

    @cached_property
    def difference(self) -> Float[Tensor, "rows vocab"]:
        """Target logits minus model logits, base 2."""
        return self.target.logits - self.model.logits

    @cached_property
    def forward_mean(self) -> Float[Tensor, "rows 1"]:
        """``E_q`` of the difference."""
        return vecdot(self.target.weights, self.difference) / self.target.total

    @cached_property
    def reverse_mean(self) -> Float[Tensor, "rows 1"]:
        """``E_p`` of the difference."""
        return vecdot(self.model.weights, self.difference) / self.model.total

    @cached_property
    def shift(self) -> Float[Tensor, "rows 1"]:
        """Base-2 normaliser of the target minus the model's."""
        return self.target.normaliser - self.model.normaliser

    @cached_property
    def model_lacks(self) -> Bool[Tensor, " rows"] | None:
        """Rows where some entry has q > 0 = p; ``None`` where that cannot be."""
        return _lacks(self.model, self.target)

    @cached_property
    def target_lacks(self) -> Bool[Tensor, " rows"] | None:
        """Rows where some entry has p > 0 = q; ``None`` where that cannot be."""
        return _lacks(self.target, self.model)

    @cached_property
    def forward_kl(self) -> Float[Tensor, " rows"]:
        """``KL(q || p)`` in nats; inf where the model lacks support."""
        plain = (self.forward_mean - self.shift) * LN2
        values = _centred_kl(plain, self.target, self.model.logits, self.difference, self.forward_mean, 1.0)
        return infinite(values, self.model_lacks)

    @cached_property
    def reverse_kl(self) -> Float[Tensor, " rows"]:
        """``KL(p || q)`` in nats; inf where the target lacks support."""
        plain = (self.shift - self.reverse_mean) * LN2
        values = _centred_kl(plain, self.model, self.target.logits, self.difference, self.reverse_mean, -1.0)
        return infinite(values, self.target_lacks)

    @cached_property
    def log_ratio(self) -> Float[Tensor, "rows vocab"]:
        """``log(p / q)`` in nats, with a small *relative* error when the rows are close.

        The normalisers, whose rounding would swamp small ratios, enter through the centred KL:
        ``log(q/p) = (difference - E_q difference) + KL(q||p)``. Entries outside both supports read about 0.
        """
        forward = self.forward_kl.unsqueeze(-1)
        offset = torch.where(forward < SMALL_KL, forward * LOG2E - self.forward_mean, -self.shift)
        return (self.difference + offset) * -LN2


def infinite(values: Float[Tensor, " rows"], where: Bool[Tensor, " rows"] | None) -> Float[Tensor, " rows"]:
    return values if where is None else values.masked_fill(where, torch.inf)


def _lacks(row: Row, other: Row) -> Bool[Tensor, " rows"] | None:
    if row.support is None:
        return None
    lacking = ~row.support
    if other.support is not None:
        lacking &= other.support
    return lacking.any(dim=-1)


def _centred_kl(
    plain: Float[Tensor, "rows 1"],
    first: Row,
    other: Float[Tensor, "rows vocab"],
    difference: Float[Tensor, "rows vocab"],
    mean: Float[Tensor, "rows 1"],
    sign: float,
) -> Float[Tensor, " rows"]:
    """KL(a || b) given ``sign * difference = log2 a - log2 b`` up to a constant, and the difference's mean under ``a``.

    With d the centred difference in nats, KL = log E_a exp(-d) = log1p(E_a[expm1(-d) + d]): no term of first order
    in d, so rounding in the normalisers cancels. Rows with a large KL keep the plain value, where exp(-d) may
    overflow and nothing is gained.
    """
    plain = plain.squeeze(-1)
    small = plain < SMALL_KL
    if not bool(small.any()):
        return plain
    weights, total, logits, maximum = first.weights, first.total, first.logits, first.maximum
    whole = bool(small.all())
    if not whole:
        index = small.nonzero().squeeze(-1)
        weights, total, maximum, mean = weights[index], total[index], maximum[index], mean[index]
        logits, other, difference = logits[index], other[index], difference[index]
    deviation = (difference - mean).mul_(sign * LN2)
    extreme = bool(deviation.amin() < -EXTREME)
    integrand = torch.expm1(-deviation).add_(deviation)
    if extreme:
        # exp(-d) under a's weight is b's weight: weights * exp(-d) = 2^(other - maximum + mean), which is bounded.
        direct = torch.exp2(other - maximum + sign * mean) - weights + weights * deviation
        sums = torch.where(deviation < -EXTREME, direct, weights * integrand).sum(dim=-1)
    else:
        sums = integrand.mul_(weights).sum(dim=-1)
    refined = torch.log1p((sums / total.squeeze(-1)).clamp_(min=0.0))
    return refined if whole else plain.index_copy(0, index, refined)
