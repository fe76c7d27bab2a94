"""What the fused pass is given: linear heads, target rows made of them, and the functionals that are wanted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.divergence.rows import Functional
from leibler.errors import DataError, ModelError, RecipeError

if TYPE_CHECKING:
    from leibler.fused.coarse import OtherVocabulary


@dataclass(frozen=True, eq=False)
class LowRank:
    """What a low-rank adapter adds to a head's logits: ``hidden @ weight.T``, over ``rank`` columns.

    For an adapter ``W + s B A`` of the head, ``hidden`` is ``s x A.T`` of its input x (formed outside, where autograd
    sees it) and ``weight`` is B. So the merged weight is never made, and nor is a gradient of its size. Source:
    E. Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2022).

    Args:
        hidden: ``[n, rank]``, one row per token.
        weight: ``[vocab, rank]``.
    """

    hidden: Float[Tensor, "n rank"]
    weight: Float[Tensor, "vocab rank"]


@dataclass(frozen=True, eq=False)
class Linear:
    """Logits that are never stored: ``(hidden @ weight.T + bias) / temperature``, plus those of adapters on the head.

    Args:
        hidden: ``[n, hidden]``, one row per token, after the final norm.
        weight: ``[vocab, hidden]``, the output embedding.
        bias: ``[vocab]``; an entry of -inf takes its token out of the support.
        temperature: positive; the same temperature at which the tokens were sampled.
        low_rank: adapters on the head; their products are added before the temperature divides.

    Raises:
        ModelError: when the shapes do not fit each other.

    Examples:
        >>> import torch
        >>> Linear(torch.zeros(5, 8), torch.zeros(11, 8), temperature=0.7).vocab
        11
    """

    hidden: Float[Tensor, "n hidden"]
    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    temperature: float = 1.0
    low_rank: tuple[LowRank, ...] = ()

    def __post_init__(self) -> None:
        hidden, weight, bias = self.hidden, self.weight, self.bias
        if hidden.ndim != 2 or weight.ndim != 2:
            raise ModelError(
                f"a linear head takes hidden states [n, hidden] and a weight [vocab, hidden], not {_shape(hidden)} and "
                f"{_shape(weight)}: flatten batch and time first, as in hidden.flatten(0, 1)."
            )
        if hidden.shape[1] != weight.shape[1]:
            raise ModelError(
                f"hidden states {_shape(hidden)} do not fit the head's weight {_shape(weight)}: the last dimensions "
                "must be equal, so pair each model's hidden states with its own head."
            )
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ModelError(
                f"the bias {_shape(bias)} does not fit the head's weight {_shape(weight)}: it needs one entry per row "
                "of the weight."
            )
        for pair in self.low_rank:
            rank = pair.weight.shape[-1]
            if pair.hidden.shape != (hidden.shape[0], rank) or pair.weight.shape != (weight.shape[0], rank):
                raise ModelError(
                    f"a low-rank pair {_shape(pair.hidden)}, {_shape(pair.weight)} does not fit a head of "
                    f"{hidden.shape[0]} hidden states and {weight.shape[0]} entries: give [n, rank] and [vocab, rank]."
                )
        tensors = [t for t in self.tensors if t is not None]
        if not all(t.is_floating_point() for t in tensors):
            raise ModelError("hidden states, weight and bias of a linear head must be floating point: cast them first.")
        if len({t.device for t in tensors}) > 1:
            raise ModelError("hidden states, weight and bias of a linear head lie on different devices: move them.")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise RecipeError(f"a temperature must be positive and finite, not {self.temperature}: use 1.0 for none.")

    @classmethod
    def of(cls, tensors: Sequence[Tensor | None], temperature: float) -> Linear:
        """The head with these ``tensors``."""
        bias, hidden, weight, *rest = tensors
        assert hidden is not None
        assert weight is not None
        pairs = tuple(LowRank(*pair) for pair in zip(rest[::2], rest[1::2]))  # type: ignore[arg-type]
        return cls(hidden, weight, bias, temperature, pairs)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The bias, then the factors of each product, hidden states before weight."""
        return (self.bias, *(t for product in self.products for t in product))

    @property
    def products(self) -> tuple[tuple[Float[Tensor, "n inner"], Float[Tensor, "vocab inner"]], ...]:
        """The factors whose products the logits are a sum of."""
        return ((self.hidden, self.weight), *((pair.hidden, pair.weight) for pair in self.low_rank))

    def detached(self) -> Linear:
        """The same head without its graph; a pass knows that the logits are the same."""
        return Linear.of([None if t is None else t.detach() for t in self.tensors], self.temperature)

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for two heads that have the same logits, which are then computed once."""
        # data_ptr and strides, not id(): detach() makes a new object over the same numbers.
        views = tuple(
            None if t is None else (t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in self.tensors
        )
        return (*views, self.temperature)


@dataclass(frozen=True, eq=False)
class TargetRows:
    """The rows that a divergence compares with: one head, or an expression over several.

    Args:
        leaves: the heads that the target reads; never differentiated.
        combine: maps the leaves' base-2 log-probability rows, each ``[rows, vocab]``, to base-2 log-scores of the
            same shape, which need not be normalised and may hold -inf. It must not change its inputs. None means
            that the target is its only leaf.

    Examples:
        >>> import torch
        >>> leaf = Linear(torch.zeros(5, 8), torch.zeros(11, 8))
        >>> mixture = TargetRows((leaf, leaf), lambda rows: torch.log2((rows[0].exp2() + rows[1].exp2()) / 2))
        >>> len(mixture.leaves)
        2
    """

    leaves: tuple[Linear, ...]
    combine: Callable[[tuple[Tensor, ...]], Tensor] | None = None

    def __post_init__(self) -> None:
        if not self.leaves:
            raise RecipeError("a target needs at least one leaf: give TargetRows a tuple of Linear.")
        if self.combine is None and len(self.leaves) > 1:
            raise RecipeError(f"a target of {len(self.leaves)} leaves needs `combine` to make one law of them.")

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What it holds beside its leaves."""
        return ()

    def own_vocab(self, vocab: int) -> int:
        """The entries of its leaves that are real, where the model has ``vocab``."""
        return vocab

    def rebuild(self) -> Callable[[Iterator[Linear], Iterator[Tensor | None]], TargetRows]:
        """What makes it again of its leaves and tensors, holding neither."""
        count, combine = len(self.leaves), self.combine
        return lambda leaves, _tensors: TargetRows(tuple(islice(leaves, count)), combine)


@dataclass(frozen=True)
class Want:
    """One number per token that a term asks for: a functional, and the target it reads (an index), if any.

    Examples:
        >>> from leibler.divergence import ReverseKL
        >>> Want(ReverseKL(), target=0).target
        0
    """

    functional: Functional
    target: int | None = None


def check(
    model: Linear,
    wants: Sequence[Want],
    targets: Sequence[TargetRows | OtherVocabulary],
    token: Int[Tensor, " n"] | None,
    vocab: int | None,
) -> int:
    """The number of vocabulary entries to use; raises a LeiblerError where the operands do not fit each other."""
    if not wants:
        raise RecipeError("the fused pass needs at least one Want.")
    heads = [model, *(leaf for target in targets for leaf in target.leaves)]
    for head in heads:
        if head.tokens != model.tokens:
            raise ModelError(
                f"model and target must see the same tokens: the model has {model.tokens} hidden states, the target "
                f"{head.tokens}."
            )
        if head.hidden.device != model.hidden.device:
            raise ModelError("model and target lie on different devices: move the hidden states and the head first.")
    # A coarse target's heads have a vocabulary of their own.
    sizes = [model.vocab, *(leaf.vocab for t in targets if isinstance(t, TargetRows) for leaf in t.leaves)]
    smallest = min(sizes)
    if vocab is None:
        largest = max(sizes)
        if smallest != largest:
            raise ModelError(
                f"the heads have {smallest} and {largest} vocabulary entries: pass vocab= the number of real tokens, "
                "so that the padding of both is left out."
            )
    elif not 1 <= vocab <= smallest:
        raise ModelError(f"vocab={vocab} lies outside 1 to {smallest}, the rows of the smallest head.")
    for want in wants:
        name = type(want.functional).__name__
        if want.functional.needs_target and want.target is None:
            raise RecipeError(f"{name} needs a target: give its Want the index of one.")
        if want.target is not None and not 0 <= want.target < len(targets):
            raise RecipeError(f"{name} asks for target {want.target}, but {len(targets)} targets were given.")
    entries = smallest if vocab is None else vocab
    for target in targets:
        if not isinstance(target, TargetRows):
            target.check(model, entries)
    if token is not None:
        if token.shape != (model.tokens,) or token.is_floating_point() or token.dtype == torch.bool:
            raise DataError(f"token must hold one integer per hidden state, [{model.tokens}], not {_shape(token)}.")
        if token.numel() and not (int(token.min()) >= 0 and int(token.max()) < entries):
            raise DataError(
                f"a token lies outside the vocabulary of {entries}: leave padding and ignored labels (such as -100) "
                "out before the call."
            )
    return entries


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
