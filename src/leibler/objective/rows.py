"""Rows of tokens, and what a term or a signal may see of them.

Shapes: *batch* counts rows (sequences), *time* predicted positions (one less than the tokens), *events* the masked
positions of all rows laid end to end. Everything per token is kept flat over events, so nothing is ever computed
for padding and a term cannot tell (or care) how the rows were cut.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leibler.errors import RecipeError
from leibler.objective.soft import SoftTokens, joined

if TYPE_CHECKING:
    from leibler.objective.needs import Need
    from leibler.objective.signals import Signal

SAMPLE, CHOSEN, REJECTED = 0, 1, 2
"""The roles of a row."""

ROLES = {"sample": SAMPLE, "chosen": CHOSEN, "rejected": REJECTED}

TENSORS = ("tokens", "attention", "mask", "group", "role", "muted", "labels")
"""The tensors of `Rows` beside its columns, as they are written down."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch of token sequences with whole groups.

    Attributes:
        tokens: ``[batch length]`` prompt and response, padded on the right.
        attention: ``[batch length]`` true at real tokens.
        mask: ``[batch time]`` true where position ``t`` predicts an event (the token at ``t + 1``).
        group: ``[batch]`` rows that answer the same prompt, or form one comparison, share a number.
        role: ``[batch]`` ``SAMPLE``, ``CHOSEN`` or ``REJECTED``.
        columns: named numbers without gradient, ``[batch]`` or ``[batch time]``.
        muted: ``[batch]`` rows that stay in the denominators but contribute no loss, or None.
        records: one record for each row (opaque here).
        texts: the decoded response of each row.
        labels: ``[batch time]`` what each position predicts, where that is not the next token of ``tokens``; or None.
        views: the same events in other layouts of tokens (after another prompt), by name; see `with_view`.
        soft: laws over the vocabulary that models read in place of some of the tokens, or None.
    """

    tokens: Int[Tensor, "batch length"]
    attention: Bool[Tensor, "batch length"]
    mask: Bool[Tensor, "batch time"]
    group: Int[Tensor, " batch"]
    role: Int[Tensor, " batch"]
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    muted: Bool[Tensor, " batch"] | None = None
    records: Sequence[Any] = ()
    texts: Sequence[str] = ()
    labels: Int[Tensor, "batch time"] | None = None
    views: Mapping[str, Rows] = field(default_factory=dict)
    soft: SoftTokens | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    @cached_property
    def row(self) -> Int[Tensor, " events"]:
        """The row of each event."""
        return self.mask.nonzero()[:, 0]

    @cached_property
    def label(self) -> Int[Tensor, " events"]:
        """The token that each event predicts."""
        return (self.tokens[:, 1:] if self.labels is None else self.labels)[self.mask]

    @property
    def hard(self) -> Int[Tensor, "batch length"]:
        """The tokens, for a reader of text; raises `RecipeError` where some of them are soft."""
        if self.soft is not None:
            raise RecipeError("the rows hold soft tokens, which only a model of the student's tokenizer can read.")
        return self.tokens

    @cached_property
    def length(self) -> Int[Tensor, " batch"]:
        """Events in each row."""
        return self.mask.sum(dim=1)

    @cached_property
    def group_index(self) -> Int[Tensor, " batch"]:
        """Groups renumbered from 0 without gaps."""
        return torch.unique(self.group, return_inverse=True)[1]

    @property
    def groups(self) -> int:
        return int(self.group_index.max()) + 1 if len(self) else 0

    @cached_property
    def heard(self) -> Float[Tensor, " batch"]:
        """1 for each row, 0 for a muted one."""
        if self.muted is None:
            return torch.ones(len(self), device=self.tokens.device)
        return (~self.muted).to(torch.float32)

    def with_columns(self, **columns: Tensor) -> Rows:
        return replace(self, columns={**self.columns, **columns})

    def with_view(self, name: str, rows: Rows) -> Rows:
        """These rows with another layout of the same events, which `Given` targets read.

        Raises:
            RecipeError: some row has another number of events there.
        """
        if not torch.equal(rows.length, self.length):
            raise RecipeError(f"the view {name!r} must have the events of the rows themselves, each row as many.")
        return replace(self, views={**self.views, name: rows})

    def view(self, name: str) -> Rows:
        """A view; raises `RecipeError` for one that the source has not made."""
        if name not in self.views:
            known = ", ".join(sorted(self.views)) or "none"
            raise RecipeError(f"the rows have no view {name!r} (they have: {known}); draw them from a source with it.")
        return self.views[name]

    def inside(self, where: str) -> Bool[Tensor, "batch time"]:
        """The events of a role (``chosen``), or those where a column of 0 and 1 is not 0."""
        chosen = self.role == ROLES[where] if where in ROLES else self.column(where) != 0
        return self.mask & (chosen if chosen.ndim == 2 else chosen[:, None])

    def column(self, name: str) -> Tensor:
        """A column; raises `RecipeError` for one that no stage has written."""
        if name not in self.columns:
            known = ", ".join(sorted(self.columns)) or "none"
            raise RecipeError(f"the batch has no column {name!r} (it has: {known}); add the stage that writes it.")
        return self.columns[name]

    def select(self, index: Int[Tensor, " chosen"]) -> Rows:
        """The rows of ``index`` (in increasing order), trimmed to their longest."""
        index = index.sort().values
        attention = self.attention[index]
        used = attention.any(dim=0).nonzero()
        length = int(used.max()) + 1 if len(used) else 1
        time = max(length - 1, 0)
        picks: list[int] = index.tolist()
        return Rows(
            self.tokens[index, :length],
            attention[:, :length],
            self.mask[index, :time],
            self.group[index],
            self.role[index],
            {k: v[index, :time] if v.ndim == 2 else v[index] for k, v in self.columns.items()},
            None if self.muted is None else self.muted[index],
            [self.records[i] for i in picks] if self.records else (),
            [self.texts[i] for i in picks] if self.texts else (),
            None if self.labels is None else self.labels[index, :time],
            {name: view.select(index) for name, view in self.views.items()},
            None if self.soft is None else self.soft.select(index, length),
        )

    def to(self, device: torch.device | str) -> Rows:
        return Rows(
            self.tokens.to(device),
            self.attention.to(device),
            self.mask.to(device),
            self.group.to(device),
            self.role.to(device),
            {k: v.to(device) for k, v in self.columns.items()},
            None if self.muted is None else self.muted.to(device),
            self.records,
            self.texts,
            None if self.labels is None else self.labels.to(device),
            {name: view.to(device) for name, view in self.views.items()},
            None if self.soft is None else self.soft.to(device),
        )


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Lay batches end to end, padding to the longest; group numbers are kept apart."""
    length = max(p.tokens.shape[1] for p in parts)

    def pad(x: Tensor, width: int) -> Tensor:
        return torch.nn.functional.pad(x, (0, width - x.shape[1])) if x.shape[1] < width else x

    group, offset = [], 0
    for part in parts:
        group.append(part.group_index + offset)
        offset += part.groups
    names = set.intersection(*(set(p.columns) for p in parts))
    views = set.intersection(*(set(p.views) for p in parts))
    labels = [p.tokens[:, 1:] if p.labels is None else p.labels for p in parts]
    muted = [p.muted if p.muted is not None else torch.zeros_like(p.role, dtype=torch.bool) for p in parts]
    return Rows(
        torch.cat([pad(p.tokens, length) for p in parts]),
        torch.cat([pad(p.attention, length) for p in parts]),
        torch.cat([pad(p.mask, length - 1) for p in parts]),
        torch.cat(group),
        torch.cat([p.role for p in parts]),
        {
            n: torch.cat([pad(p.columns[n], length - 1) if p.columns[n].ndim == 2 else p.columns[n] for p in parts])
            for n in sorted(names)
        },
        torch.cat(muted) if any(p.muted is not None for p in parts) else None,
        [r for p in parts for r in p.records],
        [t for p in parts for t in p.texts],
        torch.cat([pad(x, length - 1) for x in labels]) if any(p.labels is not None for p in parts) else None,
        {name: concatenate([p.views[name] for p in parts]) for name in sorted(views)},
        joined([(p.soft, p.tokens) for p in parts], length),
    )


@dataclass(frozen=True, eq=False)
class View:
    """What terms and signals see: rows, the values of needs (flat over events), and signals already computed.

    A view over a slice of events (``events`` given) is what a token-coupled term gets inside the vocabulary chunk: it
    offers no sum over a sequence, so a term that declares itself token-coupled cannot couple more.
    """

    rows: Rows
    values: Mapping[Need, Tensor] = field(default_factory=dict)
    signals: Mapping[Signal, Tensor] = field(default_factory=dict)
    step: int = 0
    states: Mapping[Hashable, Any] = field(default_factory=dict)
    events: Int[Tensor, " n"] | None = None
    together: Callable[[Tensor], Tensor] | None = None
    """Adds numbers up over all processes, where there are several."""

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the batch of all processes (statistics of a draw are of all its rows)."""
        total = value.sum()
        return total if self.together is None else self.together(total)

    def get(self, need: Need) -> Tensor:
        """The numbers of a need: ``[events]`` (or ``[n]`` in a slice)."""
        if need not in self.values:
            raise RecipeError(f"{need} was not computed: a part that uses it must list it in needs().")
        return self.values[need]

    @property
    def row(self) -> Int[Tensor, " n"]:
        return self.rows.row if self.events is None else self.rows.row[self.events]

    def column(self, name: str) -> Tensor:
        """A column, ``[batch]`` as it is and ``[batch time]`` flat over events."""
        value = self.rows.column(name)
        if value.ndim == 2:
            value = value[self.rows.mask]
            return value if self.events is None else value[self.events]
        return value

    def inside(self, where: str) -> Bool[Tensor, " n"]:
        """Which events a term with this ``where`` is about."""
        chosen = self.rows.inside(where)[self.rows.mask]
        return chosen if self.events is None else chosen[self.events]

    def to_events(self, value: Tensor) -> Tensor:
        """Spread ``[batch]`` numbers (or one number) over the events of their rows; event numbers pass."""
        if value.ndim == 0:
            return value.expand(self.row.shape[0])
        return value[self.row]

    def sum_rows(self, value: Float[Tensor, " events"]) -> Float[Tensor, " batch"]:
        """Sum over the events of each row."""
        if self.events is not None:
            raise RecipeError("a token-coupled term asked for a sum over a sequence; declare couples='sequence'.")
        return value.new_zeros(len(self.rows)).index_add(0, self.row, value)

    def dense(self, value: Float[Tensor, " events"]) -> Float[Tensor, "batch time"]:
        return value.new_zeros(self.rows.mask.shape).masked_scatter(self.rows.mask, value)

    def signal(self, signal: Signal | float, *, reach: str = "token") -> Tensor:
        """A signal's numbers, computed on the rollout clock or now; spread over events unless ``reach`` says rows."""
        value = self._signal(signal)
        if reach == "token" and self._reach(signal) != "token":
            return self.to_events(value)
        if reach == "sequence" and value.ndim == 0:
            return value.expand(len(self.rows))
        return value

    def _signal(self, signal: Signal | float) -> Tensor:
        if isinstance(signal, (int, float)):
            return torch.tensor(float(signal), device=self.rows.tokens.device)
        if signal in self.signals:
            value = self.signals[signal]
            return value if self.events is None or signal.reach != "token" else value[self.events]
        with torch.no_grad():
            return signal(self.detached())

    def _reach(self, signal: Signal | float) -> str:
        return "batch" if isinstance(signal, (int, float)) else signal.reach

    def detached(self) -> View:
        return replace(self, values={n: v.detach() for n, v in self.values.items()})

    def with_values(self, values: Mapping[Need, Tensor]) -> View:
        return replace(self, values={**self.values, **values})

    def with_signals(self, signals: Mapping[Signal, Tensor]) -> View:
        return replace(self, signals={**self.signals, **signals})

    def at(self, step: int, states: Mapping[Hashable, Any]) -> View:
        return replace(self, step=step, states=states)

    def slice(self, events: Int[Tensor, " n"]) -> View:
        """The view of some events only (whole-view values are cut, nothing else is)."""
        return replace(self, values={n: v[events] for n, v in self.values.items()}, events=events)

    def select(self, index: Int[Tensor, " chosen"]) -> View:
        """The view of some whole rows."""
        index = index.sort().values
        keep = torch.zeros(len(self.rows), dtype=torch.bool, device=self.rows.tokens.device)
        keep[index] = True
        events = keep[self.rows.row]

        def cut(signal: Signal, value: Tensor) -> Tensor:
            return value if value.ndim == 0 else value[events] if signal.reach == "token" else value[index]

        return replace(
            self,
            rows=self.rows.select(index),
            values={n: v[events] for n, v in self.values.items()},
            signals={s: cut(s, v) for s, v in self.signals.items()},
            events=None,
        )


def group_mean(value: Float[Tensor, " batch"], rows: Rows) -> Float[Tensor, " batch"]:
    """Each row's group mean."""
    return _per_group(value, rows, lambda total, count: total / count)


def group_sum(value: Float[Tensor, " batch"], rows: Rows) -> Float[Tensor, " batch"]:
    """Each row's group sum."""
    return _per_group(value, rows, lambda total, count: total)


def group_spread(value: Float[Tensor, " batch"], rows: Rows) -> Float[Tensor, " batch"]:
    """Each row's group maximum less its minimum: exactly 0 for equal numbers, which a mean is not."""
    index = rows.group_index
    ends = [
        value.new_zeros(rows.groups).scatter_reduce(0, index, value, r, include_self=False) for r in ("amax", "amin")
    ]
    return (ends[0] - ends[1])[index]


def _per_group(value: Tensor, rows: Rows, finish: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    index = rows.group_index
    total = value.new_zeros(rows.groups).index_add(0, index, value)
    count = value.new_zeros(rows.groups).index_add(0, index, torch.ones_like(value))
    return finish(total, count)[index]
