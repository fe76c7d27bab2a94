"""Rows and views made by hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from leibler.objective import LogProb, Model, Rows, View


def rows(
    lengths: Sequence[int],
    group: Sequence[int] | None = None,
    *,
    role: Sequence[int] | None = None,
    muted: Sequence[bool] | None = None,
    **columns: Sequence[float] | Tensor,
) -> Rows:
    """Rows with ``lengths`` events each, after prompts of two and three tokens in turn."""
    starts = [2 + i % 2 for i in range(len(lengths))]
    width = max(s + n for s, n in zip(starts, lengths, strict=True))
    place = torch.arange(width)
    end = torch.tensor([s + n for s, n in zip(starts, lengths, strict=True)])
    attention = place[None, :] < end[:, None]
    start = torch.tensor(starts)
    mask = (place[None, :-1] >= start[:, None] - 1) & (place[None, :-1] < end[:, None] - 1)
    count = len(lengths)
    return Rows(
        torch.where(attention, 4 + (place[None, :] + torch.arange(count)[:, None]) % 5, 0),
        attention,
        mask,
        torch.tensor(list(range(count)) if group is None else list(group)),
        torch.zeros(count, dtype=torch.long) if role is None else torch.tensor(list(role)),
        {n: v if isinstance(v, Tensor) else torch.tensor(list(v), dtype=torch.float64) for n, v in columns.items()},
        None if muted is None else torch.tensor(list(muted)),
    )


def view(
    of: Rows, seed: int = 0, names: Sequence[str] = ("policy", "old", "behaviour", "reference", "teacher")
) -> View:
    """A view with arbitrary log-probs under each named model."""
    source = torch.Generator().manual_seed(seed)
    values = {LogProb(Model(n)): -torch.rand(of.row.shape[0], generator=source, dtype=torch.float64) * 3 for n in names}
    return View(of, values)


def nested(of: Rows, flat: Tensor) -> list[list[float]]:
    """Numbers per event as one list for each row."""
    out: list[list[float]] = [[] for _ in range(len(of))]
    for row, value in zip(of.row.tolist(), flat.tolist(), strict=True):
        out[row].append(value)
    return out
