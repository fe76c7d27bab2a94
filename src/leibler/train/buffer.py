"""Rows that are kept: laid down in a checkpoint, taken up again, cut by whole groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from leibler.objective.rows import TENSORS, Rows, concatenate
from leibler.objective.soft import SoftTokens

Packed = dict[str, Any]
"""Rows as tensors and JSON values, as they stand in a checkpoint."""


def pack(rows: Rows) -> Packed:
    """Rows as they are written down.

    Each record is held once, with all its columns, since rewards, `Routed` and stages that come later may read any of
    them; what JSON does not know becomes text, as in the data's hash.
    """
    from leibler.data.records import told

    each = [{**vars(record), "extra": dict(record.extra)} for record in rows.records]
    written = [json.dumps(record, sort_keys=True, default=told) for record in each]
    number = {text: i for i, text in enumerate(dict.fromkeys(written))}
    tensors = {name: getattr(rows, name) for name in TENSORS}
    return {
        **tensors,
        "columns": dict(rows.columns),
        "records": [json.loads(text) for text in number],
        "record": torch.tensor([number[text] for text in written], dtype=torch.long),
        "texts": list(rows.texts),
        "views": {name: pack(view) for name, view in rows.views.items()},
        "soft": None if rows.soft is None else {"index": rows.soft.index, "weight": rows.soft.weight},
    }


def unpack(packed: Packed, index: Int[Tensor, " chosen"] | None = None) -> Rows:
    """The rows that were packed; with ``index`` (increasing) these only, trimmed to their longest."""
    from leibler.data import Record

    def some(value: Any) -> Any:
        if index is None or value is None or not len(value):
            return value
        return value[index] if isinstance(value, Tensor) else [value[i] for i in index.tolist()]

    records = [Record(**record) for record in packed["records"]]
    rows = Rows(
        **{name: some(packed[name]) for name in TENSORS},
        columns={name: some(value) for name, value in packed["columns"].items()},
        records=[records[i] for i in some(packed["record"]).tolist()],
        texts=some(packed["texts"]),
        views={name: unpack(view, index) for name, view in packed["views"].items()},
        soft=None if packed["soft"] is None else SoftTokens(**{n: some(x) for n, x in packed["soft"].items()}),
    )
    return rows if index is None else rows.select(torch.arange(len(rows)))


def interleaved(parts: Sequence[Rows]) -> Rows:
    """The shares of all processes, in the order in which one process would have drawn the groups."""
    if len(parts) == 1:
        return parts[0]
    together = concatenate(parts)
    # By their numbers when they were drawn: a stage may have dropped groups in one process and not in another.
    drawn = [(n, rank, i) for rank, part in enumerate(parts) for i, n in enumerate(part.group.unique().tolist())]
    first = [sum(p.groups for p in parts[:rank]) for rank in range(len(parts))]
    return concatenate([groups(together, torch.tensor([first[rank] + i])) for _, rank, i in sorted(drawn)])


def newest(rows: Rows, capacity: int) -> Rows:
    """The last whole groups that make at most ``capacity`` rows, and at least one."""
    sizes = torch.bincount(rows.group_index)
    fits = int((sizes.flip(0).cumsum(0) <= capacity).sum())
    return groups(rows, torch.arange(rows.groups - max(fits, 1), rows.groups))


def groups(rows: Rows, chosen: Int[Tensor, " chosen"]) -> Rows:
    """Some whole groups, numbered anew in the order of ``chosen``."""
    number = torch.full((rows.groups,), -1).index_put((chosen,), torch.arange(len(chosen)))[rows.group_index]
    picked = rows.select((number >= 0).nonzero()[:, 0])
    return replace(picked, group=number[number >= 0])
