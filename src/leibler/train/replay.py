"""A source that learns from earlier draws too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch

from leibler.errors import RecipeError
from leibler.objective.rows import TENSORS, Rows, concatenate
from leibler.objective.signals import Validation
from leibler.objective.targets import Behaviour, Handle
from leibler.policy.randomness import generator
from leibler.train.sources import Context, Origin, Source, State


@dataclass(frozen=True)
class Replay(Source):
    """Fresh draws go into a buffer; what is learnt from is drawn from the buffer, as many groups as are fresh.

    The buffer holds whole groups, the newest that make at most ``capacity`` rows, with their columns: rewards, and the
    behaviour log-probs under which each response was sampled. The law of a row is that of the policy some draws ago, so
    the terms on it weigh by what the sampler reported: ``Clip(anchor=Behaviour())``, ``Importance``.

    Attributes:
        source: what is drawn; one stream. Stages that score belong in here, so that nothing is scored twice.
        capacity: rows in the buffer.

    Examples:
        >>> from leibler.train import Answer, OnPolicy, Replay, Score
        >>> source = Replay(OnPolicy(group_size=4) >> Score(Answer()), capacity=256)
        >>> source.streams()["main"].law
        Handle(name='behaviour')
    """

    source: Source
    capacity: int = 1024

    def __post_init__(self) -> None:
        if self.capacity < 1:
            raise RecipeError(f"capacity={self.capacity} must be at least 1.")
        if len(self.source.streams()) != 1:
            raise RecipeError("Replay holds the rows of one stream; put it inside the Mixture, around each stream.")

    def streams(self) -> Mapping[str, Origin]:
        ((name, origin),) = self.source.streams().items()
        return {name: Origin(None if origin.law is None else Behaviour())}

    def handles(self) -> tuple[Handle, ...]:
        return self.source.handles()

    def datasets(self) -> Mapping[str, str]:
        return self.source.datasets()

    @property
    def needs_validation(self) -> bool:
        return self.source.needs_validation

    def init(self) -> State:
        return {"source": self.source.init(), "buffer": None}

    def observe(self, state: State, event: Validation) -> State:
        return {**state, "source": self.source.observe(state["source"], event)}

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        drawn, inner = self.source.draw(context, state["source"])
        ((name, fresh),) = drawn.items()
        buffer = [] if state["buffer"] is None else [_unpack(state["buffer"])]
        # Every process keeps the rows of all: a checkpoint then does not show how many processes there were.
        every = [part for part in context.gather(fresh) if len(part)]
        if every:
            buffer.append(_interleaved(every))
        if not buffer:
            return drawn, {**state, "source": inner}
        held = _newest(concatenate(buffer), self.capacity)
        wanted = min(sum(part.groups for part in every), held.groups)
        picks = torch.randperm(held.groups, generator=generator(context.seed, "replay", context.draw))[:wanted]
        mine = picks[context.rank :: context.world]
        return {name: _groups(held, mine)}, {"source": inner, "buffer": _pack(held)}


def _interleaved(parts: list[Rows]) -> Rows:
    """The shares of all processes, in the order in which one process would have drawn the groups."""
    if len(parts) == 1:
        return parts[0]
    together = concatenate(parts)
    # By their numbers when they were drawn: a stage may have dropped groups in one process and not in another.
    drawn = [(n, rank, i) for rank, part in enumerate(parts) for i, n in enumerate(part.group.unique().tolist())]
    first = [sum(p.groups for p in parts[:rank]) for rank in range(len(parts))]
    return concatenate([_groups(together, torch.tensor([first[rank] + i])) for _, rank, i in sorted(drawn)])


def _newest(rows: Rows, capacity: int) -> Rows:
    """The last whole groups that make at most ``capacity`` rows, and at least one."""
    sizes = torch.bincount(rows.group_index)
    fits = int((sizes.flip(0).cumsum(0) <= capacity).sum())
    return _groups(rows, torch.arange(rows.groups - max(fits, 1), rows.groups))


def _groups(rows: Rows, chosen: torch.Tensor) -> Rows:
    """Some whole groups, numbered anew in the order of ``chosen``."""
    number = torch.full((rows.groups,), -1).index_put((chosen,), torch.arange(len(chosen)))[rows.group_index]
    picked = rows.select((number >= 0).nonzero()[:, 0])
    return replace(picked, group=number[number >= 0])


def _pack(rows: Rows) -> State:
    """Rows as tensors and JSON values, as they stand in a checkpoint; what a record carries beside is left out."""
    records = [{f.name: getattr(r, f.name) for f in fields(r) if f.name != "extra"} for r in rows.records]
    tensors = {name: getattr(rows, name) for name in TENSORS}
    views = {name: _pack(view) for name, view in rows.views.items()}
    return {**tensors, "columns": dict(rows.columns), "records": records, "texts": list(rows.texts), "views": views}


def _unpack(packed: State) -> Rows:
    from leibler.data import Record

    views = {name: _unpack(view) for name, view in packed["views"].items()}
    return Rows(**{**packed, "records": [Record(**r) for r in packed["records"]], "views": views})
