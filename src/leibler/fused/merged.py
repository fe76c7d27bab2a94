"""Vocabularies that differ: maps of their entries into common cells, and targets that are compared cell by cell."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leibler.divergence.rows import FLOOR, LN2, LOG2E, OUTSIDE, Row
from leibler.errors import ModelError, RecipeError
from leibler.fused.coarse import CoarseRow, OtherVocabulary, Pushed, PushedSide
from leibler.fused.operands import Linear, TargetRows


@dataclass(frozen=True, eq=False)
class VocabularyMap:
    """The cell that each vocabulary entry falls into; a law is pushed forward by adding up the entries of a cell.

    Args:
        cell: ``[vocab]`` numbers in ``0 ... cells - 1``, or -1 for an entry that is left out: the pushed law is then
            conditioned on the others, and that entry gets a gradient of exactly 0.
        cells: how many cells there are; one without entries is outside the support.

    Raises:
        RecipeError: a number lies outside the cells, or every entry is left out.

    Examples:
        >>> import torch
        >>> merged = VocabularyMap(torch.tensor([0, 1, 1, -1]), cells=2)
        >>> merged(torch.tensor([[0.2, 0.2, 0.4, 0.2]]).log()).exp()
        tensor([[0.2000, 0.6000]])
    """

    cell: Int[Tensor, " vocab"]
    cells: int

    def __post_init__(self) -> None:
        low, high = (int(self.cell.min()), int(self.cell.max())) if self.cell.numel() else (-1, -1)
        if low < -1 or high >= self.cells:
            raise RecipeError(f"the cells of a vocabulary map must lie in -1 to {self.cells - 1}, not {low} to {high}.")
        if high < 0:
            raise RecipeError("a vocabulary map leaves every entry out: the two vocabularies have nothing in common.")

    @property
    def vocab(self) -> int:
        return self.cell.shape[0]

    def to(self, device: torch.device | str) -> VocabularyMap:
        return VocabularyMap(self.cell.to(device), self.cells)

    @cached_property
    def _alone(self) -> Bool[Tensor, " vocab"]:
        sizes = torch.bincount(self.cell[self.cell >= 0], minlength=self.cells)
        return sizes[self.cell.clamp(min=0)] == 1

    @cached_property
    def single(self) -> Int[Tensor, " single"]:
        """Entries that have a cell of their own: nothing has to be added up for them."""
        return (self._alone & (self.cell >= 0)).nonzero()[:, 0]

    @cached_property
    def several(self) -> Int[Tensor, " several"]:
        """Entries of cells that hold more than one."""
        return (~self._alone & (self.cell >= 0)).nonzero()[:, 0]

    @cached_property
    def crowded(self) -> tuple[Int[Tensor, " crowded"], Int[Tensor, " several"]]:
        """The cells that hold more than one entry, and the place of each entry of ``several`` among them."""
        cells, place = torch.unique(self.cell[self.several], return_inverse=True)
        return cells, place

    def __call__(self, logp: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows cells"]:
        """Log-sums over the cells, in nats."""
        pushed = MergedRow(Row(logp.clamp(min=FLOOR) * LOG2E), self).row.logits
        return torch.where(pushed < OUTSIDE, -torch.inf, pushed * LN2)


class MergedRow(Pushed):
    """The push-forward of a block of full rows by a map, and the way back for gradients.

    Args:
        row: the full rows, base 2.
        map: what merges their entries.
        point: ``[rows]`` rows of which nothing is compared: there all entries are in one cell.
    """

    def __init__(self, row: Row, map: VocabularyMap, point: Bool[Tensor, " rows"] | None = None) -> None:
        self.full, self.map, self.point = row, map, point

    @cached_property
    def _crowded(self) -> tuple[Float[Tensor, "rows crowded"], Float[Tensor, "rows several"]]:
        """Base-2 log-sums of the cells that hold more than one entry, and each entry's share of its cell."""
        logits = self.full.logits[:, self.map.several]
        cells, place = self.map.crowded
        index = place.expand(len(logits), -1)
        # Each cell from a largest of its own: what is rare in the row may be all that there is in its cell.
        top = logits.new_full((len(logits), len(cells)), FLOOR).scatter_reduce_(1, index, logits, "amax")
        weights = torch.exp2(logits - top.gather(1, index))
        total = torch.zeros_like(top).scatter_add_(1, index, weights)
        return top + torch.log2(total), weights.div_(total.gather(1, index))

    @cached_property
    def row(self) -> Row:
        map, logits = self.map, self.full.logits
        out = logits.new_full((len(logits), map.cells), FLOOR)
        out[:, map.cell[map.single]] = logits[:, map.single]
        if len(map.several):
            out[:, map.crowded[0]] = self._crowded[0]
        return Row(out if self.point is None else _at_a_point(out, self.point))

    def pull(self, grad: Float[Tensor, "rows vocab"], small: Float[Tensor, "rows cells"]) -> None:
        """Add to ``grad`` the gradient by the full logits that belongs to ``small``, by the pushed ones."""
        map = self.map
        if self.point is not None:
            small = small.masked_fill(self.point[:, None], 0.0)
        grad.index_add_(1, map.single, small[:, map.cell[map.single]])
        if len(map.several):
            # Where a whole cell is outside the support, the shares of its entries mean nothing.
            logp, share = self._crowded
            given = small[:, map.crowded[0]].masked_fill(logp < OUTSIDE, 0.0)
            grad.index_add_(1, map.several, given[:, map.crowded[1]] * share)


@dataclass(frozen=True, eq=False)
class Merged(OtherVocabulary):
    """A target over another vocabulary, compared cell by cell: ``D(push(model) || push(law))``.

    With ``m(v)`` the cell of entry v, a law p becomes ``p(c) = sum_{v: m(v) = c} p(v)``, and by logits
    ``dD/dz_v = dD/dZ_{m(v)} * p(v) / p(m(v))``, exactly. What a map merges is not compared: for an f-divergence of two
    laws over one vocabulary the pushed value is at most the full one (data processing).

    Args:
        model_map: of the model's entries.
        law: the target's heads.
        law_map: of their entries, into the same cells.
        present: ``[n]`` false where the target says nothing: the divergence is 0 there, and so is its gradient, as long
            as the model's row is finite (NaN stays NaN, so that it is noticed).

    Raises:
        RecipeError: the maps have different numbers of cells.

    Examples:
        >>> import torch
        >>> from leibler.divergence import ForwardKL
        >>> from leibler.fused import Want, functionals
        >>> first_piece = VocabularyMap(torch.tensor([0, 1, 2, 0]), cells=3)
        >>> student = Linear(torch.randn(5, 4, requires_grad=True), torch.randn(4, 4))
        >>> teacher = TargetRows((Linear(torch.randn(5, 8), torch.randn(3, 8)),))
        >>> target = Merged(first_piece, teacher, VocabularyMap(torch.arange(3), cells=3))
        >>> kl, = functionals(student, [Want(ForwardKL(), 0)], [target])
        >>> kl.shape
        torch.Size([5])
    """

    model_map: VocabularyMap
    law: TargetRows
    law_map: VocabularyMap
    present: Bool[Tensor, " n"] | None = None

    def __post_init__(self) -> None:
        if self.model_map.cells != self.law_map.cells:
            raise RecipeError(
                f"the model's map has {self.model_map.cells} cells and the target's {self.law_map.cells}: give both "
                "sides maps into the same cells."
            )

    @property
    def leaves(self) -> tuple[Linear, ...]:
        return self.law.leaves

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What it holds beside its leaves (the maps are constants)."""
        return (self.present,)

    def rebuild(self) -> Callable[[Iterator[Linear], Iterator[Tensor | None]], Merged]:
        """What makes it again of its leaves and tensors, holding neither."""
        model_map, law, law_map = self.model_map, self.law.rebuild(), self.law_map
        return lambda leaves, tensors: Merged(model_map, law(leaves, tensors), law_map, next(tensors))

    def own_vocab(self, vocab: int) -> int:
        """The entries of its leaves that are real, where the model has ``vocab``."""
        return self.law_map.vocab

    def check(self, model: Linear, vocab: int) -> None:
        """Raise a ModelError unless it fits ``vocab`` entries of the model."""
        smallest = min(leaf.vocab for leaf in self.law.leaves)
        for side, there, map in (("model", vocab, self.model_map), ("target", smallest, self.law_map)):
            if map.vocab > there or (side == "model" and map.vocab != there):
                raise ModelError(f"the map of the {side}'s vocabulary has {map.vocab} entries, its head {there}.")
            if map.cell.device != model.hidden.device:
                raise ModelError("a vocabulary map lies on another device than the model: move it first.")
        if self.present is not None and self.present.shape != (model.tokens,):
            raise ModelError(
                f"present must hold one boolean per hidden state, [{model.tokens}], not {list(self.present.shape)}."
            )

    def change(self, row: Row, start: int, stop: int) -> Row:
        """The law's merged rows ``start`` to ``stop``, as they are compared."""
        return row

    def side(self, law: Callable[[list[Row]], Row] | None, block: torch.dtype) -> PushedSide:
        """What hands out its blocks during a pass."""
        assert law is not None
        return MergedSide(self, law)


def _at_a_point(logits: Float[Tensor, "rows cells"], point: Bool[Tensor, " rows"]) -> Float[Tensor, "rows cells"]:
    """In place: in the rows of ``point``, all mass in the first cell."""
    logits[point] = FLOOR
    logits[point, 0] = 0.0
    return logits


class MergedSide(PushedSide):
    """Hands out the blocks of a merged target during a pass."""

    def __init__(self, target: Merged, law: Callable[[list[Row]], Row]) -> None:
        self.target, self.law = target, law

    def rows(self, rows: list[Row], start: int, stop: int) -> CoarseRow:
        """Tokens ``start`` to ``stop`` of the whole pass; ``rows`` are those of every head."""
        target = self.target
        point = None if target.present is None else ~target.present[start:stop]
        if point is not None and not bool(point.any()):
            point = None
        row = target.change(MergedRow(self.law(rows), target.law_map).row, start, stop)
        if point is not None:
            row = Row(_at_a_point(row.logits, point))
        return CoarseRow(row, lambda model: MergedRow(model, target.model_map, point))


@dataclass(frozen=True, eq=False)
class Lifted(Merged):
    """A law over cells of which some entries are told row by row: what lifting onto a larger vocabulary changes.

    Args:
        event, entry, logp: ``[m]`` at row ``event``, the cell ``entry`` has this log-probability (nats) instead.
    """

    event: Int[Tensor, " m"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    entry: Int[Tensor, " m"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    logp: Float[Tensor, " m"] = field(default_factory=lambda: torch.zeros(0))

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What it holds beside its leaves (the maps are constants)."""
        return (self.present, self.event, self.entry, self.logp)

    def rebuild(self) -> Callable[[Iterator[Linear], Iterator[Tensor | None]], Merged]:
        """What makes it again of its leaves and tensors, holding neither."""
        model_map, law, law_map = self.model_map, self.law.rebuild(), self.law_map

        def again(leaves: Iterator[Linear], tensors: Iterator[Tensor | None]) -> Lifted:
            present, event, entry, logp = (next(tensors) for _ in range(4))
            return Lifted(model_map, law(leaves, tensors), law_map, present, event, entry, logp)  # type: ignore[arg-type]

        return again

    def change(self, row: Row, start: int, stop: int) -> Row:
        """The merged rows ``start`` to ``stop`` with their own entries."""
        here = ((self.event >= start) & (self.event < stop)).nonzero()[:, 0]
        if not len(here):
            return row
        # Normalised on the merged entries, before any of them changes.
        logits = row.logits - row.normaliser
        logp = (self.logp[here].to(logits.dtype) * LOG2E).clamp(min=FLOOR)
        return Row(logits.index_put((self.event[here] - start, self.entry[here]), logp))
