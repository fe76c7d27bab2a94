"""One sweep over all tokens: values of every functional and, where coefficients are given, the head's gradients."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leibler.divergence.rows import Functional, Row, block_rows
from leibler.fused.blocks import Mixed, Side, chunk_tokens, keep_heap, product_dtype
from leibler.fused.coarse import CoarseRow, OnCoarse, OtherVocabulary, PushedSide
from leibler.fused.gpu.kernels import Kernels, kernel_chunk, program_for
from leibler.fused.operands import Linear, TargetRows, Want

Coefficients = Callable[[Float[Tensor, "wants rows"], int, int], Float[Tensor, "wants rows"]]
"""Given the values of tokens ``start`` to ``stop``: what each of them is to be multiplied by in the gradient."""


@dataclass(frozen=True, eq=False)
class Plan:
    """The operands of a pass, checked, and nothing of autograd."""

    model: Linear
    wants: tuple[Want, ...]
    targets: tuple[TargetRows | OtherVocabulary, ...]
    token: Int[Tensor, " n"] | None
    vocab: int

    def pack(self) -> tuple[Callable[[Sequence[Tensor | None]], Plan], list[Tensor | None]]:
        """The plan's tensors, detached, for autograd to keep, and what makes a plan of them again.

        Autograd frees what it keeps after the backward pass and notices when it was changed in between.
        """
        heads = [self.model, *(leaf for target in self.targets for leaf in target.leaves)]
        tensors = [t for head in heads for t in head.tensors]
        shapes = [(len(head.tensors), head.temperature) for head in heads]
        own = [t for target in self.targets for t in target.tensors]
        rebuild = [target.rebuild() for target in self.targets]
        wants, vocab = self.wants, self.vocab

        def unpack(kept: Sequence[Tensor | None]) -> Plan:
            token, *rest = kept
            flat = iter(rest)
            parts = iter([Linear.of(list(islice(flat, count)), temperature) for count, temperature in shapes])
            model, more = next(parts), flat
            targets = tuple(make(parts, more) for make in rebuild)
            return Plan(model, wants, targets, token, vocab)

        return unpack, [None if t is None else t.detach() for t in (self.token, *tensors, *own)]


class Sweep:
    """The buffers of one pass and the loops over them.

    Args:
        plan: what to compute.
        needs: which of the model's ``tensors`` a gradient is wanted for; a product that none of them needs is not
            computed.
        sides: those of an earlier sweep over the same plan (see :meth:`leave`), instead of new buffers.
    """

    def __init__(self, plan: Plan, needs: Sequence[bool] = (), sides: list[Side] | None = None) -> None:
        self.plan = plan
        self.needs = any(needs)
        model = plan.model
        # One side for each head and number of real entries, however many targets read it; the model's comes first.
        read = [(leaf, t.own_vocab(plan.vocab)) for t in plan.targets for leaf in t.leaves]
        sizes: dict[Hashable, tuple[Linear, int]] = {(model.key, plan.vocab): (model, plan.vocab)}
        for leaf, entries in read:
            sizes.setdefault((leaf.key, entries), (leaf, entries))
        everyone = [head for head, _ in sizes.values()]
        place = {key: i for i, key in enumerate(sizes)}
        largest = max(entries for _, entries in sizes.values())

        keep_heap()
        double = any(t.dtype == torch.float64 for head in everyone for t in (head.hidden, head.weight))
        self.block = torch.float64 if double else torch.float32
        self.chunk = max(1, min(chunk_tokens(largest, model.weight.shape[1], len(everyone)), model.tokens))
        self.rows = min(block_rows(largest, model.weight.device.type), self.chunk)
        program = program_for(model, plan.wants, plan.targets, plan.token is not None)
        if program is not None:  # whole chunks at once, and no buffer for blocks of rows
            self.chunk, self.rows = min(kernel_chunk(model, len(everyone)), max(1, model.tokens)), 1
        if sides is not None and len(sides) != len(sizes):
            sides = None  # a hook on saved tensors has made copies: heads that were one are several now
        self.sides = sides or [
            Side(head, entries, self.chunk, self.rows, product_dtype(head.weight), self.block)
            for head, entries in sizes.values()
        ]
        self.targets = [self._target(target, place) for target in plan.targets]
        self.kernels = None
        if program is not None:
            leaves = [self.sides[mixed.leaves[0]] for mixed in self.targets if isinstance(mixed, Mixed)]
            self.kernels = Kernels(program, [self.sides[0], *leaves], plan.vocab, self.chunk, plan.token)
        coarse = [isinstance(target, OtherVocabulary) for target in plan.targets]
        self.functionals: Sequence[OnCoarse | Functional] = [
            OnCoarse(w.functional)
            if w.target is not None and coarse[w.target] and w.functional.needs_target
            else w.functional
            for w in plan.wants
        ]
        self.values = model.hidden.new_empty(len(plan.wants), model.tokens, dtype=self.block)

        size = (self.rows, plan.vocab)
        blocks = self.needs and self.kernels is None
        self.scratch = model.weight.new_empty(size, dtype=self.block) if blocks else None
        bias, *factors = needs or [False] * len(model.tensors)
        self.gb = model.weight.new_zeros(model.vocab, dtype=self.block) if bias else None
        # For each product: gradients by its hidden states and by its weight.
        self.factors = [
            (
                torch.empty_like(hidden) if for_hidden else None,
                weight.new_zeros(model.vocab, weight.shape[1], dtype=self.block) if for_weight else None,
            )
            for (hidden, weight), for_hidden, for_weight in zip(model.products, factors[::2], factors[1::2])
        ]

    def _target(self, target: TargetRows | OtherVocabulary, place: dict[Hashable, int]) -> Mixed | PushedSide:
        """What hands out the rows of a target."""
        if isinstance(target, OtherVocabulary):
            law = target.law if isinstance(target.law, TargetRows) else None
            entries = target.own_vocab(self.plan.vocab)
            heads = None if law is None else Mixed(law, [place[leaf.key, entries] for leaf in law.leaves], self.sides)
            return target.side(None if heads is None else heads.rows, self.block)
        return Mixed(target, [place[leaf.key, self.plan.vocab] for leaf in target.leaves], self.sides)

    def run(self, coefficients: Coefficients | None = None, *, from_end: bool = False) -> Float[Tensor, "wants n"]:
        """All values; with ``coefficients``, the gradients are formed on the way.

        From the end, the first chunk is the one whose logits an earlier sweep left.
        """
        n = self.plan.model.tokens
        # Grad mode off: buffers are written in place. Autocast off: dtypes are chosen here.
        with torch.no_grad(), torch.autocast(self.values.device.type, enabled=False):
            starts = range(0, n, self.chunk)
            for start in reversed(starts) if from_end else starts:
                stop = min(start + self.chunk, n)
                for side in self.sides:
                    side.multiply(start, stop)
                if self.kernels is not None:
                    scales = [self._by_kernels(self.kernels, start, stop, coefficients)]
                else:
                    cuts = [(a, min(a + self.rows, stop)) for a in range(start, stop, self.rows)]
                    scales = [self._block(start, a, b, coefficients) for a, b in cuts]
                if coefficients is not None and self.needs:
                    self._products(start, stop, torch.cat(scales))
                    self.sides[0].formed = None  # its logits have made place for their gradient
        return self.values

    def leave(self) -> list[Side] | None:
        """The buffers with the logits of the last chunk in them, which the next sweep need not form again."""
        if self.kernels is not None:
            return None
        for side in self.sides:
            side.biased = True
        return self.sides

    def gradients(self) -> tuple[Tensor | None, ...]:
        """What has been accumulated for each of the model's ``tensors`` (None: not asked for), in its dtype."""
        found = [self.gb, *(grad for pair in self.factors for grad in pair)]
        tensors = self.plan.model.tensors
        return tuple(None if g is None or t is None else g.to(t.dtype) for g, t in zip(found, tensors))

    def _by_kernels(
        self, kernels: Kernels, start: int, stop: int, coefficients: Coefficients | None
    ) -> Float[Tensor, " chunk"]:
        """``_block`` for a whole chunk: one kernel for the values, one for the gradient."""
        values = self.values[:, start:stop]
        values.copy_(kernels.values(start, stop))
        if coefficients is None or not self.needs:
            return values.new_zeros(stop - start)
        scale, unit = _scaled(coefficients(values, start, stop).to(self.block), torch.isfinite(values))
        kernels.gradient(start, unit)
        if self.gb is not None:
            kernels.add_column_sums(self.gb, scale / self.plan.model.temperature)
        return scale

    def _block(self, chunk: int, start: int, stop: int, coefficients: Coefficients | None) -> Float[Tensor, " rows"]:
        """Tokens ``start`` to ``stop``: values and, in place of the model's logits, their gradient over its row scale.

        The row scale (the largest coefficient) never touches the vocabulary: it multiplies the products instead, which
        also keeps the gradient rows near 1, where half precision has its digits.
        """
        local = slice(start - chunk, stop - chunk)
        sides = [side.rows(local.start, local.stop) for side in self.sides]
        targets = [t.rows(sides, start, stop) if isinstance(t, PushedSide) else t.rows(sides) for t in self.targets]
        try:
            return self._functionals(start, stop, local, sides[0], targets, coefficients)
        finally:
            # A row and its pairs refer to each other: without this, blocks would pile up until the next collection.
            for row in (*sides, *targets):
                row.pairs.clear()

    def _functionals(
        self,
        start: int,
        stop: int,
        local: slice,
        model: Row,
        targets: list[Row | CoarseRow],
        coefficients: Coefficients | None,
    ) -> Float[Tensor, " rows"]:
        plan = self.plan
        token = None if plan.token is None else plan.token[start:stop]
        rows: list[Any] = [None if want.target is None else targets[want.target] for want in plan.wants]
        saved: list[Any] = []
        values = self.values[:, start:stop]
        for k, functional in enumerate(self.functionals):
            value, kept = functional.value(model, rows[k], token)
            values[k] = value
            saved.append(kept)
        if coefficients is None or self.scratch is None:
            return values.new_zeros(stop - start)

        finite = torch.isfinite(values)
        scale, unit = _scaled(coefficients(values, start, stop).to(self.block), finite)
        live, whole = (unit != 0).any(dim=1).tolist(), finite.all(dim=1).tolist()
        grad = self.scratch[: stop - start].zero_()
        for k, functional in enumerate(self.functionals):
            if not live[k]:
                continue
            if whole[k]:
                functional.add_gradient(grad, unit[k], model, rows[k], token, saved[k])
            else:
                # Rare: 0 * inf inside the functional must not reach the rows that other functionals share.
                apart = torch.zeros_like(grad)
                functional.add_gradient(apart, unit[k], model, rows[k], token, saved[k])
                grad += apart.masked_fill_(~finite[k][:, None], 0)
        if self.gb is not None:
            self.gb[: plan.vocab].addmv_(grad.T, scale / plan.model.temperature)
        self.sides[0].logits[local].copy_(grad)
        return scale

    def _products(self, start: int, stop: int, scale: Float[Tensor, " chunk"]) -> None:
        side = self.sides[0]
        grad = side.logits[: stop - start]
        factor = (scale / side.temperature)[:, None]
        for (hidden, weight), (by_hidden, by_weight) in zip(side.products, self.factors):
            if by_hidden is not None:
                by_hidden[start:stop] = torch.mm(grad, weight).to(self.block) * factor
            if by_weight is not None:
                self._add_weight_gradient(by_weight, grad, factor, hidden[start:stop])

    def _add_weight_gradient(
        self,
        total: Float[Tensor, "vocab inner"],
        grad: Float[Tensor, "chunk vocab"],
        factor: Float[Tensor, "chunk 1"],
        hidden: Float[Tensor, "chunk inner"],
    ) -> None:
        """Add ``grad.T @ (factor * hidden)``."""
        vocab = self.plan.vocab
        # Rows of scale 0 are selected away rather than multiplied: garbage times 0 may be NaN.
        hidden = torch.where(factor != 0, hidden.to(self.block), 0)
        if grad.dtype == self.block:
            total[:vocab].addmm_(grad.T, hidden * factor)
            return
        # Half precision: the sum over chunks needs float32, and the largest scale is kept out of the product.
        top = factor.abs().amax()
        hidden = (hidden * (factor / torch.where(top == 0, 1, top))).to(grad.dtype)
        step = max(1, 2**22 // hidden.shape[1])
        for a in range(0, vocab, step):
            part = torch.mm(grad[:, a : a + step].T, hidden)
            total[a : min(a + step, vocab)].addcmul_(part.to(self.block), top)


def _scaled(
    coefficient: Float[Tensor, "wants rows"], finite: Bool[Tensor, "wants rows"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "wants rows"]]:
    """The largest coefficient of each row, and the coefficients in units of it; 0 where a value is not finite."""
    coefficient = coefficient.masked_fill(~finite, 0)
    scale = coefficient.abs().amax(dim=0)
    return scale, coefficient / torch.where(scale == 0, 1, scale)
