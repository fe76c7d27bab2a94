"""Targets that are known on some entries of the vocabulary only: a teacher's stored top-k, a vocabulary shared in part.

Both laws are *pushed forward* to a coarser space, the same map for both: the k kept entries stay, everything else
becomes one bucket. A divergence of the pushed laws is computed by the same functionals on rows of k + 1 entries; the
chain rule carries its gradient back to the model's full row exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.divergence.rows import FLOOR, LOG2E, Functional, Row
from leibler.errors import ModelError, RecipeError
from leibler.fused.operands import Linear, TargetRows

Tail = Literal["bucket", "renormalise"]


@dataclass(frozen=True, eq=False)
class TopK:
    """A stored law, at k entries of each row and all others together.

    Args:
        logp: ``[n, k]`` natural log-probabilities of the kept entries; -inf is outside the support.
        rest: ``[n]`` natural log-probability of all the others together; -inf where nothing is left.
        temperature: of the softmax that gave them. Log-probs of one temperature do not determine the mass of the
            others at another one, so the model has to be compared at the same.

    Raises:
        ModelError: shapes that do not fit each other.

    Examples:
        >>> import torch
        >>> TopK(torch.tensor([[0.5, 0.25]]).log(), torch.tensor([0.25]).log()).logp.shape
        torch.Size([1, 2])
    """

    logp: Float[Tensor, "n k"]
    rest: Float[Tensor, " n"]
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.logp.ndim != 2 or self.rest.shape != self.logp.shape[:1]:
            raise ModelError(
                f"a stored law takes log-probs [n, k] and the rest [n], not {list(self.logp.shape)} and "
                f"{list(self.rest.shape)}: flatten batch and time first."
            )


class OtherVocabulary:
    """Base of targets that are not laws over the model's own entries: stored in part, merged, of another tokenizer."""

    law: Any
    """What is known of the target: heads (:class:`TargetRows`), or something stored."""

    @property
    def leaves(self) -> tuple[Linear, ...]:
        raise NotImplementedError

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What it holds beside its leaves."""
        raise NotImplementedError

    def rebuild(self) -> Callable[[Iterator[Linear], Iterator[Tensor | None]], OtherVocabulary]:
        """What makes it again of its leaves and tensors, holding neither."""
        raise NotImplementedError

    def own_vocab(self, vocab: int) -> int:
        """The entries of its leaves that are real, where the model has ``vocab``."""
        raise NotImplementedError

    def check(self, model: Linear, vocab: int) -> None:
        """Raise a LeiblerError unless it fits ``vocab`` entries of the model."""
        raise NotImplementedError

    def side(self, law: Callable[[list[Row]], Row] | None, block: torch.dtype) -> PushedSide:
        """What hands out its blocks during a pass; ``law`` hands out those of its heads, if it has any."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Coarse(OtherVocabulary):
    """A target on a coarsened vocabulary: k entries of the model's and, with ``tail="bucket"``, one for all others.

    With C the kept entries, the model's law becomes ``p_c = (p_v for v in C, sum of the others)``, the target's
    likewise, and a divergence reads ``D(p_c, q_c)``. For an f-divergence that is at most ``D(p, q)`` (data processing),
    with equality where ``p / q`` is constant outside C; its gradient is exact: at an entry v outside C it is
    ``g_rest * p_v / p_rest``. With ``tail="renormalise"`` both laws are conditioned on C instead: how much mass the
    model puts outside of C is not seen at all, and its logits there get a gradient of 0.

    Functionals without a target (the token's log-prob, the entropy) stay on the model's full row.

    Args:
        token: the kept entries in the model's vocabulary, distinct: ``[n, k]``, or ``[k]`` for all rows.
        law: what is known of the target: log-probs at these entries (:class:`TopK`), or heads (:class:`TargetRows`).
        law_token: the same entries as heads number them, in the same shape; None: as the model does.
        law_vocab: the real entries of those heads, where they are padded; the rest is left out of the bucket too.
        tail: ``"bucket"`` or ``"renormalise"``.

    Raises:
        LeiblerError: operands that do not fit each other; an entry kept twice.

    Examples:
        >>> import torch
        >>> from leibler.divergence import ReverseKL
        >>> from leibler.fused import Linear, Want, functionals
        >>> model = Linear(torch.randn(6, 4, requires_grad=True), torch.randn(10, 4))
        >>> teacher = torch.randn(6, 10).log_softmax(-1)
        >>> logp, token = teacher.topk(10)
        >>> whole = Coarse(token, TopK(logp, torch.full((6,), -torch.inf)))
        >>> kl, = functionals(model, [Want(ReverseKL(), 0)], [whole])
        >>> torch.allclose(kl, ReverseKL()(model.hidden @ model.weight.T, teacher), atol=1e-6)
        True
    """

    token: Int[Tensor, "n k"] | Int[Tensor, " k"]
    law: TopK | TargetRows
    law_token: Int[Tensor, "n k"] | Int[Tensor, " k"] | None = None
    law_vocab: int | None = None
    tail: Tail = "bucket"

    def __post_init__(self) -> None:
        if self.tail not in get_args(Tail):
            raise RecipeError(f'tail must be "bucket" or "renormalise", not {self.tail!r}.')
        for token in (self.token, self.law_token):
            if token is None:
                continue
            if token.ndim not in (1, 2) or token.shape[-1] == 0 or token.is_floating_point():
                raise ModelError(
                    f"the kept entries are integers [n, k] or [k] with k of 1 or more, not {token.dtype} "
                    f"{list(token.shape)}."
                )
            ordered = token.sort(dim=-1).values
            if bool((ordered.diff(dim=-1) == 0).any()):
                raise ModelError("an entry of the vocabulary is kept twice: its mass would count twice; keep it once.")
        if self.law_token is not None and self.law_token.shape != self.token.shape:
            raise ModelError(
                f"token {list(self.token.shape)} and law_token {list(self.law_token.shape)} name the same entries in "
                "two vocabularies: give them the same shape."
            )
        if isinstance(self.law, TopK) and (self.law_token is not None or self.law_vocab is not None):
            raise RecipeError("a stored law has no vocabulary of its own: leave law_token and law_vocab out.")
        if isinstance(self.law, TopK) and self.law.logp.shape[1] != self.token.shape[-1]:
            raise ModelError(
                f"{self.token.shape[-1]} entries are kept, but the stored law has {self.law.logp.shape[1]} log-probs "
                "a row."
            )

    @property
    def leaves(self) -> tuple[Linear, ...]:
        return () if isinstance(self.law, TopK) else self.law.leaves

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What it holds beside its leaves."""
        stored = (self.law.logp, self.law.rest) if isinstance(self.law, TopK) else (None, None)
        return (self.token, self.law_token, *stored)

    def rebuild(self) -> Callable[[Iterator[Linear], Iterator[Tensor | None]], Coarse]:
        """What makes it again of its leaves and tensors, holding neither."""
        tail, vocab, stored = self.tail, self.law_vocab, isinstance(self.law, TopK)
        temperature = self.law.temperature if isinstance(self.law, TopK) else 1.0
        inner = None if isinstance(self.law, TopK) else self.law.rebuild()

        def again(leaves: Iterator[Linear], tensors: Iterator[Tensor | None]) -> Coarse:
            token, law_token, logp, rest = (next(tensors) for _ in range(4))
            law = TopK(logp, rest, temperature) if stored else inner(leaves, tensors)  # type: ignore[arg-type, misc]
            return Coarse(token, law, law_token, vocab, tail)  # type: ignore[arg-type]

        return again

    def own_vocab(self, vocab: int) -> int:
        """The entries of its leaves that are real, where the model has ``vocab``."""
        return vocab if self.law_vocab is None else self.law_vocab

    def side(self, law: Callable[[list[Row]], Row] | None, block: torch.dtype) -> PushedSide:
        """What hands out its blocks during a pass."""
        return CoarseSide(self, law, block)

    def check(self, model: Linear, vocab: int) -> None:
        """Raise a LeiblerError unless it fits ``vocab`` entries of the model."""
        tokens = [("model", self.token, vocab)]
        if isinstance(self.law, TargetRows):
            here = self.token if self.law_token is None else self.law_token
            smallest = min(leaf.vocab for leaf in self.law.leaves)
            own = self.own_vocab(vocab)
            if not 1 <= own <= smallest:
                raise ModelError(
                    f"the target's head has {smallest} entries, not {own}: pass law_vocab= its number of real ones."
                )
            tokens.append(("target", here, own))
        else:
            if self.law.logp.shape[0] != model.tokens:
                raise ModelError(
                    f"model and target must see the same tokens: the model has {model.tokens} hidden states, the "
                    f"stored law {self.law.logp.shape[0]} rows."
                )
            if abs(self.law.temperature - model.temperature) > 1e-6 * model.temperature:
                raise RecipeError(
                    f"the stored law was made at temperature {self.law.temperature:g} and cannot be changed to "
                    f"{model.temperature:g}, because top-k log-probs do not say what the others would weigh: use the "
                    "temperature of the store, or make it again."
                )
        for side, token, entries in tokens:
            if token.ndim == 2 and token.shape[0] != model.tokens:
                raise ModelError(
                    f"model and target must see the same tokens: the model has {model.tokens} hidden states, the kept "
                    f"entries {token.shape[0]} rows."
                )
            if token.numel() and not (int(token.min()) >= 0 and int(token.max()) < entries):
                raise ModelError(
                    f"a kept entry lies outside the {side}'s vocabulary of {entries}: leave padding out of both."
                )
        held = [self.token, *(t for t in self.tensors[1:] if t is not None)]
        if any(t.device != model.hidden.device for t in held):
            raise ModelError("model and target lie on different devices: move the kept entries and log-probs first.")


@dataclass(frozen=True)
class OnCoarse:
    """A functional of two rows, computed on the pushed rows."""

    functional: Functional

    @property
    def needs_target(self) -> bool:
        return True

    def value(self, model: Row, target: CoarseRow, token: Tensor | None) -> tuple[Float[Tensor, " rows"], Any]:
        return self.functional.value(target.pushed(model).row, target.row, None)

    def add_gradient(
        self,
        grad: Float[Tensor, "rows vocab"],
        coefficient: Float[Tensor, " rows"],
        model: Row,
        target: CoarseRow,
        token: Tensor | None,
        saved: Any,
    ) -> None:
        pushed = target.pushed(model)
        small = torch.zeros_like(pushed.row.logits)
        self.functional.add_gradient(small, coefficient, pushed.row, target.row, None, saved)
        pushed.pull(grad, small)


class Pushed:
    """The push-forward of a block of full rows, and the way back for gradients."""

    @cached_property
    def row(self) -> Row:
        raise NotImplementedError

    def pull(self, grad: Float[Tensor, "rows vocab"], small: Float[Tensor, "rows pushed"]) -> None:
        """Add to ``grad`` the gradient by the full logits that belongs to ``small``, by the pushed ones."""
        raise NotImplementedError


class Kept(Pushed):
    """Some entries kept, the others in one bucket or left out.

    Args:
        row: the full rows, base 2.
        index: ``[rows, k]`` or ``[k]`` kept entries.
        tail: what becomes of the others.
    """

    def __init__(self, row: Row, index: Int[Tensor, "..."], tail: Tail) -> None:
        self.full, self.index, self.tail = row, index, tail

    @cached_property
    def others(self) -> Row:
        """The full rows without the kept entries.

        Their mass is summed by itself, with a maximum of its own, and never as 1 minus the rest, which would be
        rounding error where the kept entries hold nearly everything.
        """
        if self.index.ndim == 1:
            return Row(self.full.logits.index_fill(-1, self.index, FLOOR))
        return Row(self.full.logits.scatter(-1, self.index, FLOOR))

    @cached_property
    def row(self) -> Row:
        logits = self.full.logits
        kept = logits[:, self.index] if self.index.ndim == 1 else logits.gather(-1, self.index)
        if self.tail == "renormalise":
            return Row(kept)
        return Row(torch.cat([kept, self.others.normaliser], dim=-1))

    def pull(self, grad: Float[Tensor, "rows vocab"], small: Float[Tensor, "rows kept"]) -> None:
        """Add to ``grad`` the gradient by the full logits that belongs to ``small``, by the pushed ones."""
        kept = small
        if self.tail == "bucket":
            kept, rest = small[:, :-1], small[:, -1:]
            # Where nothing is left, every weight reads 2 ** (FLOOR - FLOOR) = 1, and the gradient of the bucket is 0.
            grad.addcmul_(self.others.weights, rest / self.others.total)
        if self.index.ndim == 1:
            grad.index_add_(-1, self.index, kept)
        else:
            grad.scatter_add_(-1, self.index, kept)


class CoarseRow:
    """A block of a coarse target: its pushed rows, and those of the model that is compared with it.

    ``pairs`` is what the functionals keep of both, for the sweep to drop when it is done with the block.
    """

    def __init__(self, row: Row, push: Callable[[Row], Pushed]) -> None:
        self.row, self.push = row, push
        self.pairs: dict[int, Any] = row.pairs
        self._model: tuple[Row, Pushed] | None = None

    def pushed(self, model: Row) -> Pushed:
        """The push-forward of the model's block, made once."""
        if self._model is None or self._model[0] is not model:
            pushed = self.push(model)
            pushed.row.pairs = self.pairs
            self._model = model, pushed
        return self._model[1]


class PushedSide:
    """Hands out the blocks of a target during a pass."""

    def rows(self, rows: list[Row], start: int, stop: int) -> CoarseRow:
        """Tokens ``start`` to ``stop`` of the whole pass; ``rows`` are those of every head."""
        raise NotImplementedError


class CoarseSide(PushedSide):
    """Hands out the blocks of a coarse target during a pass.

    Args:
        target: the target.
        law: what hands out the rows of its heads; None where the law is stored.
        block: the dtype of the blocks.
    """

    def __init__(self, target: Coarse, law: Callable[[list[Row]], Row] | None, block: torch.dtype) -> None:
        self.target, self.law, self.block = target, law, block

    def rows(self, rows: list[Row], start: int, stop: int) -> CoarseRow:
        """Tokens ``start`` to ``stop`` of the whole pass; ``rows`` are those of every head."""
        target = self.target
        index = _cut(target.token, start, stop)

        def keep(model: Row) -> Pushed:
            return Kept(model, index, target.tail)

        if isinstance(target.law, TopK):
            logp = target.law.logp[start:stop].to(self.block)
            if target.tail == "bucket":
                logp = torch.cat([logp, target.law.rest[start:stop, None].to(self.block)], dim=-1)
            return CoarseRow(Row(logp.clamp(min=FLOOR).mul_(LOG2E).clamp_(min=FLOOR)), keep)
        assert self.law is not None
        here = index if target.law_token is None else _cut(target.law_token, start, stop)
        return CoarseRow(Kept(self.law(rows), here, target.tail).row, keep)


def _cut(token: Tensor, start: int, stop: int) -> Tensor:
    return (token if token.ndim == 1 else token[start:stop]).long()
