"""One sweep over all tokens: values of every functional and, where coefficients are given, the head's gradients."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leibler.divergence.rows import Functional, Row
from leibler.fused.blocks import Mixed, Side, block_rows, chunk_tokens, keep_heap, product_dtype, zeros
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
        tensors = [t for head in heads for t in (head.hidden, head.weight, head.bias)]
        temperatures = [head.temperature for head in heads]
        own = [t for target in self.targets for t in target.tensors]
        rebuild = [target.rebuild() for target in self.targets]
        wants, vocab = self.wants, self.vocab

        def unpack(kept: Sequence[Tensor | None]) -> Plan:
            token, *flat = kept
            parts = iter([Linear(*flat[3 * i : 3 * i + 3], temperature=t) for i, t in enumerate(temperatures)])  # type: ignore[arg-type]
            model, more = next(parts), iter(flat[3 * len(temperatures) :])
            targets = tuple(make(parts, more) for make in rebuild)
            return Plan(model, wants, targets, token, vocab)

        return unpack, [None if t is None else t.detach() for t in (self.token, *tensors, *own)]


@dataclass(frozen=True)
class Gradients:
    """Gradients by the model's hidden states, weight and bias (None: not asked for)."""

    hidden: Float[Tensor, "n hidden"] | None
    weight: Float[Tensor, "vocab hidden"] | None
    bias: Float[Tensor, " vocab"] | None


class Sweep:
    """The buffers of one pass and the loops over them.

    Args:
        plan: what to compute.
        needs: whether the gradients by hidden states, weight and bias are wanted; a product that none of them needs
            is not computed.
    """

    def __init__(self, plan: Plan, needs: tuple[bool, bool, bool] = (False, False, False)) -> None:
        self.plan = plan
        self.needs = needs
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
        self.sides = [
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

        hidden, weight, bias = needs
        size = (self.rows, plan.vocab)
        blocks = any(needs) and self.kernels is None
        self.scratch = model.weight.new_empty(size, dtype=self.block) if blocks else None
        self.gh = torch.empty_like(model.hidden) if hidden else None
        self.gw = None
        if weight:
            self.gw = zeros((model.vocab, model.weight.shape[1]), self.block, model.weight.device)
        self.gb = model.weight.new_zeros(model.vocab, dtype=self.block) if bias else None

    def _target(self, target: TargetRows | OtherVocabulary, place: dict[Hashable, int]) -> Mixed | PushedSide:
        """What hands out the rows of a target."""
        if isinstance(target, OtherVocabulary):
            law = target.law if isinstance(target.law, TargetRows) else None
            entries = target.own_vocab(self.plan.vocab)
            heads = None if law is None else Mixed(law, [place[leaf.key, entries] for leaf in law.leaves], self.sides)
            return target.side(None if heads is None else heads.rows, self.block)
        return Mixed(target, [place[leaf.key, self.plan.vocab] for leaf in target.leaves], self.sides)

    def run(self, coefficients: Coefficients | None = None) -> Float[Tensor, "wants n"]:
        """All values; with ``coefficients``, the gradients are formed on the way."""
        n = self.plan.model.tokens
        # Grad mode off: buffers are written in place. Autocast off: dtypes are chosen here.
        with torch.no_grad(), torch.autocast(self.values.device.type, enabled=False):
            for start in range(0, n, self.chunk):
                stop = min(start + self.chunk, n)
                for side in self.sides:
                    side.multiply(start, stop)
                if self.kernels is not None:
                    scales = [self._by_kernels(self.kernels, start, stop, coefficients)]
                else:
                    cuts = [(a, min(a + self.rows, stop)) for a in range(start, stop, self.rows)]
                    scales = [self._block(start, a, b, coefficients) for a, b in cuts]
                if coefficients is not None and any(self.needs):
                    self._products(start, stop, torch.cat(scales))
        return self.values

    def gradients(self) -> Gradients:
        """What has been accumulated, in the dtypes of the model's own tensors."""
        model = self.plan.model
        weight = None if self.gw is None else self.gw.to(model.weight.dtype)
        bias = None if self.gb is None or model.bias is None else self.gb.to(model.bias.dtype)
        return Gradients(self.gh, weight, bias)

    def _by_kernels(
        self, kernels: Kernels, start: int, stop: int, coefficients: Coefficients | None
    ) -> Float[Tensor, " chunk"]:
        """``_block`` for a whole chunk: one kernel for the values, one for the gradient."""
        values = self.values[:, start:stop]
        values.copy_(kernels.values(start, stop))
        if coefficients is None or not any(self.needs):
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
        side, vocab = self.sides[0], self.plan.vocab
        grad = side.logits[: stop - start]
        factor = (scale / side.temperature)[:, None]
        if self.gh is not None:
            self.gh[start:stop] = torch.mm(grad, side.weight).to(self.block) * factor
        if self.gw is None:
            return
        # Rows of scale 0 are selected away rather than multiplied: garbage times 0 may be NaN.
        hidden = torch.where(factor != 0, side.hidden[start:stop].to(self.block), 0)
        if grad.dtype == self.block:
            self.gw[:vocab].addmm_(grad.T, hidden * factor)
            return
        # Half precision: the sum over chunks needs float32, and the largest scale is kept out of the product.
        top = factor.abs().amax()
        hidden = (hidden * (factor / torch.where(top == 0, 1, top))).to(grad.dtype)
        step = max(1, 2**22 // hidden.shape[1])
        for a in range(0, vocab, step):
            part = torch.mm(grad[:, a : a + step].T, hidden)
            self.gw[a : min(a + step, vocab)].addcmul_(part.to(self.block), top)


def _scaled(
    coefficient: Float[Tensor, "wants rows"], finite: Bool[Tensor, "wants rows"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, "wants rows"]]:
    """The largest coefficient of each row, and the coefficients in units of it; 0 where a value is not finite."""
    coefficient = coefficient.masked_fill(~finite, 0)
    scale = coefficient.abs().amax(dim=0)
    return scale, coefficient / torch.where(scale == 0, 1, scale)
