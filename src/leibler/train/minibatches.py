"""The optimiser batches of a draw that serves several steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leibler.objective.rows import Rows, View
from leibler.policy.randomness import generator
from leibler.train.recipe import Schedule


@dataclass(frozen=True, eq=False)
class Minibatches:
    """Cuts a draw into optimiser batches of whole groups, in an order derived from (seed, draw, epoch).

    Attributes:
        schedule: epochs and batches in each.
        seed: the run's.
        rank, world: this process among how many; all cut the same order of the groups that are left on any of them.
        most, reduce: the largest of a number and the sum of a tensor over them.
    """

    schedule: Schedule
    seed: int
    rank: int
    world: int
    most: Callable[[int], int]
    reduce: Callable[[Tensor], Tensor]

    def __call__(self, views: Mapping[str, View], draw: int) -> Iterator[dict[str, View]]:
        if self.schedule.single_use:
            yield dict(views)
            return
        for epoch in range(self.schedule.epochs):
            parts = {}
            for stream, view in views.items():
                number = self._numbers(view.rows)
                total = self.most(int(number.max()) + 1 if len(number) else 0)
                left = torch.zeros(total, device=number.device).index_fill(0, number, 1.0)
                left = self.reduce(left).cpu() > 0
                order = torch.randperm(total, generator=generator(self.seed, f"minibatch/{stream}", draw, epoch))
                parts[stream] = order[left[order]]
            for at in range(self.schedule.minibatches):
                batch = {}
                for stream, view in views.items():
                    here = parts[stream][at :: self.schedule.minibatches].to(view.rows.tokens.device)
                    batch[stream] = view.select(torch.isin(self._numbers(view.rows), here).nonzero()[:, 0])
                yield batch

    def _numbers(self, rows: Rows) -> Tensor:
        """The number of each row's group among those of all processes."""
        return rows.group * self.world + self.rank


def micro_batches(rows: Rows, most: int | None, tokens: int, *, whole_groups: bool = False) -> list[Tensor]:
    """Row indices of micro-batches: rows of like length together, groups kept whole where asked.

    Args:
        rows: an optimiser batch.
        most: rows in each; None: as many as make at most ``tokens`` places, padding included.
        tokens: see there.
        whole_groups: rows of one group stay together.
    """
    length = rows.attention.sum(dim=1)
    for view in rows.views.values():
        length = length.maximum(view.attention.sum(dim=1))
    if whole_groups:
        unit = rows.group_index
        order = unit.argsort(stable=True)
        # A group is as long as its longest row, and as many rows.
        longest = torch.zeros(rows.groups, dtype=length.dtype, device=length.device)
        lengths = longest.scatter_reduce(0, unit, length, "amax").tolist()
        sizes = unit.bincount(minlength=rows.groups).tolist()
    else:
        order = length.argsort(stable=True)
        lengths, sizes = length[order].tolist(), [1] * len(rows)
    ends: list[int] = []
    count = widest = at = 0
    for size, long in zip(sizes, lengths, strict=True):
        many, wide = count + size, max(widest, long)
        too_many = many > most if most else many * wide > tokens
        if count and too_many:
            ends.append(at)
            many, wide = size, long
        count, widest, at = many, wide, at + size
    return list(order.tensor_split(ends)) if at else []
