"""Soft tokens: positions of a row that hold a law over the vocabulary instead of one entry of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leibler.errors import RecipeError
from leibler.objective.targets import Handle, Lookup, Target

if TYPE_CHECKING:
    from leibler.objective.rows import Rows


@dataclass(frozen=True, eq=False)
class SoftTokens:
    """A law over k entries at some positions of a batch of rows.

    What a model reads there is the mean of the entries' embeddings, ``e = sum_j w_j E[index_j]``, a point of the convex
    hull of the embedding's rows. With all weight on one entry it is that ordinary token. Positions without any weight
    hold the ordinary token of ``tokens``.

    Source: Latent Reasoning in LLMs as a Vocabulary-Space Superposition (2025).

    Args:
        index: ``[batch length k]`` entries of the vocabulary, distinct wherever there is weight.
        weight: ``[batch length k]`` their weights: non-negative, summing to 1 at a soft position and to 0 elsewhere.

    Raises:
        RecipeError: the two differ in shape.

    Examples:
        >>> import torch
        >>> soft = SoftTokens(torch.tensor([[[0, 0], [5, 7]]]), torch.tensor([[[0.0, 0.0], [0.75, 0.25]]]))
        >>> soft.there
        tensor([[False,  True]])
    """

    index: Int[Tensor, "batch length k"]
    weight: Float[Tensor, "batch length k"]

    def __post_init__(self) -> None:
        if self.index.ndim != 3 or self.index.shape != self.weight.shape:
            raise RecipeError(
                f"soft tokens take an index and a weight of one shape [batch, length, k], not {list(self.index.shape)} "
                f"and {list(self.weight.shape)}."
            )

    @property
    def there(self) -> Bool[Tensor, "batch length"]:
        """The positions that hold a law."""
        return (self.weight > 0).any(-1)

    def select(self, rows: Int[Tensor, " chosen"], length: int) -> SoftTokens:
        """Some rows, cut to a length."""
        return SoftTokens(self.index[rows, :length], self.weight[rows, :length])

    def to(self, device: torch.device | str) -> SoftTokens:
        return SoftTokens(self.index.to(device), self.weight.to(device))

    def padded(self, length: int, k: int) -> SoftTokens:
        """The same laws with more positions at the end and more entries, without weight."""
        longer = (0, 0, 0, length - self.index.shape[1])
        index, weight = (torch.nn.functional.pad(x, longer) for x in (self.index, self.weight))
        more = k - index.shape[-1]
        index = torch.cat([index, _others(index, more)], dim=-1)
        return SoftTokens(index, torch.nn.functional.pad(weight, (0, more)))

    def next(self, mask: Bool[Tensor, "batch time"], label: Int[Tensor, " events"]) -> SoftLaw:
        """The law of what comes after each event: of the soft token there, or of the label with probability 1."""
        index, weight = self.index[:, 1:][mask], self.weight[:, 1:][mask]
        ordinary = ~(weight > 0).any(-1, keepdim=True)
        alone = torch.cat([label[:, None], _others(label[:, None], index.shape[-1] - 1)], dim=-1)
        certain = torch.nn.functional.one_hot(torch.zeros_like(label), index.shape[-1]).to(weight.dtype)
        index, weight = torch.where(ordinary, alone, index), torch.where(ordinary, certain, weight)
        return SoftLaw(index, (weight / weight.sum(-1, keepdim=True)).log())


@dataclass(frozen=True, eq=False)
class SoftLaw:
    """Laws of events on k entries each: ``index`` and natural log-probabilities, both ``[events k]``."""

    index: Int[Tensor, "events k"]
    logp: Float[Tensor, "events k"]


def _others(index: Int[Tensor, "... k"], count: int) -> Int[Tensor, "... count"]:
    """The ``count`` smallest entries that do not occur in each row of distinct ``index``."""
    wanted = torch.arange(count, device=index.device).expand(*index.shape[:-1], count).contiguous()
    # The i-th smallest entry u_i has u_i - i entries below it that do not occur.
    below = index.sort(dim=-1).values - torch.arange(index.shape[-1], device=index.device)
    return wanted + torch.searchsorted(below.contiguous(), wanted, right=True)


def joined(parts: Sequence[tuple[SoftTokens | None, Int[Tensor, "batch length"]]], length: int) -> SoftTokens | None:
    """The soft tokens of batches laid end to end, each with its tokens; None where no batch has any."""
    k = max((soft.index.shape[-1] for soft, _ in parts if soft is not None), default=0)
    if not k:
        return None
    whole = []
    for soft, tokens in parts:
        empty = (*tokens.shape, k)
        soft = soft or SoftTokens(tokens.new_zeros(empty), torch.zeros(empty, device=tokens.device))
        whole.append(soft.padded(length, k))
    return SoftTokens(torch.cat([s.index for s in whole]), torch.cat([s.weight for s in whole]))


@dataclass(frozen=True)
class Soft(Target):
    """The law that the rows themselves hold at the next position: that of their soft tokens.

    Where the next position holds an ordinary token, it is that token with probability 1, so that the forward KL is its
    negative log-likelihood there. A soft token is stored on k entries, renormalised: those beyond have probability 0,
    not an unknown rest. The model reads the same renormalised law as its input, and its own law is taken over the whole
    vocabulary, so ``KL(w || p) = sum_j w_j (log w_j - log p_j)`` sees the mass that the model puts elsewhere. (With the
    rest as one more entry, the model would be taught a law that its input does not hold; with the model conditioned on
    the stored entries, what it puts elsewhere would cost nothing.)

    Args:
        name: what the metrics call it.

    Examples:
        >>> from leibler.divergence import ForwardKL
        >>> from leibler.objective import Match
        >>> Match(ForwardKL(), to=Soft("latents"), where="latent").name
        'ForwardKL(latents)'
    """

    name: str = "soft"

    @property
    def handles(self) -> tuple[Handle, ...]:
        return ()

    def sampled(self, logp: Lookup) -> Tensor:
        raise RecipeError("the law of soft tokens is known over the vocabulary, not at sampled tokens; use Exact().")

    def law(self, rows: Rows) -> SoftLaw:
        """The laws at the events of a batch.

        Raises:
            RecipeError: the rows have no soft tokens.
        """
        if rows.soft is None:
            raise RecipeError("the rows have no soft tokens for Soft() to read; draw them from Latents().")
        return rows.soft.next(rows.mask, rows.label)
