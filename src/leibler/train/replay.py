"""Sources that learn from earlier draws too."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from leibler.errors import RecipeError, RunError
from leibler.objective.rows import Rows, concatenate
from leibler.objective.signals import Validation
from leibler.objective.targets import Behaviour, Handle
from leibler.policy.randomness import generator
from leibler.train.buffer import groups, interleaved, newest, pack, unpack
from leibler.train.sources import Context, Origin, Source, State, together


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

    def readers(self) -> tuple[Handle, ...]:
        return self.source.readers()

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
        buffer = [] if state["buffer"] is None else [unpack(state["buffer"])]
        # Every process keeps the rows of all: a checkpoint then does not show how many processes there were.
        every = [part for part in context.gather(fresh) if len(part)]
        if every:
            buffer.append(interleaved(every))
        if not buffer:
            return drawn, {**state, "source": inner}
        held = newest(concatenate(buffer), self.capacity)
        wanted = min(sum(part.groups for part in every), held.groups)
        picks = torch.randperm(held.groups, generator=generator(context.seed, "replay", context.draw))[:wanted]
        mine = picks[context.rank :: context.world]
        kept = pack(held)
        # A fresh record reads as it will when it comes back.
        return {name: groups(unpack(kept), mine)}, {"source": inner, "buffer": kept}


@dataclass(frozen=True)
class Fixed(Source):
    """What a source draws before the first step, and nothing else, for the whole run.

    The set is drawn once, by the models as they stand then, and scored once; it is passed over in an order of its own
    in each epoch, always by whole groups, so that what is relative to a group stays what it was. It lives in the
    checkpoint. The law of its rows is that of the initial policy, so the terms on it weigh by what the sampler
    reported: ``Clip(anchor=Behaviour())``, ``Importance``.

    Attributes:
        source: what is drawn; one stream. Stages that score belong in here, so that nothing is scored twice.
        rows: rows in the set, up to a whole group; None: as many as the run's steps pass ``epochs`` times (of an
            optimiser batch each, or of the ``rows`` that the source says), and each prompt once at most, where stages
            drop nothing.
        epochs: see there.

    Examples:
        >>> from leibler.train import Answer, Fixed, OnPolicy, Score
        >>> source = Fixed(OnPolicy(group_size=16) >> Score(Answer()), rows=16_000)
        >>> source.streams()["main"].law
        Handle(name='behaviour')
    """

    source: Source
    rows: int | None = None
    epochs: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "epochs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name}={value} of Fixed must be at least 1.")
        if isinstance(self.source, Fixed):
            raise RecipeError("Fixed(Fixed(...)) is fixed already; leave out one of them.")
        if len(self.source.streams()) != 1:
            raise RecipeError("Fixed holds the rows of one stream; put it inside the Mixture, around each stream.")

    def streams(self) -> Mapping[str, Origin]:
        ((name, origin),) = self.source.streams().items()
        return {name: Origin(None if origin.law is None else Behaviour())}

    def handles(self) -> tuple[Handle, ...]:
        return self.source.handles()

    def readers(self) -> tuple[Handle, ...]:
        return self.source.readers()

    def datasets(self) -> Mapping[str, str]:
        return self.source.datasets()

    @property
    def needs_validation(self) -> bool:
        return self.source.needs_validation

    def init(self) -> State:
        return {"source": self.source.init(), "set": None, "position": 0}

    def observe(self, state: State, event: Validation) -> State:
        return {**state, "source": self.source.observe(state["source"], event)}

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        (name,) = self.streams()
        if state["set"] is None:
            state = self._filled(context, state)
        held, position = state["set"], state["position"]
        group = held["group"]
        count = int(group.max()) + 1
        wanted = max(min(self._each(context) * count // len(group), count), 1)
        parts = []
        for epoch in range(position // count, (position + wanted - 1) // count + 1):
            order = torch.randperm(count, generator=generator(context.seed, "fixed", epoch))
            first = max(position - epoch * count, 0)
            chosen = order[first : position + wanted - epoch * count]
            # This process's share is counted over the whole draw, on whichever side of the epoch's end a group lies.
            skipped = epoch * count + first - position
            mine = chosen[(context.rank - skipped) % context.world :: context.world]
            part = unpack(held, torch.isin(group, mine).nonzero()[:, 0])
            # Numbered in the order of the draw, so that optimiser batches are those of one process.
            number = torch.zeros(count, dtype=torch.long).index_put((mine,), torch.arange(len(mine)))
            parts.append(replace(part, group=number[part.group]))
        rows = parts[0] if len(parts) == 1 else concatenate(parts)
        return {name: rows}, {**state, "position": position + wanted}

    def _filled(self, context: Context, state: State) -> State:
        """With the set, the same on every process."""
        inner, parts, have, total = state["source"], [], 0, self._wanted(context)
        started = said = time.monotonic()
        while have < total:
            asked = min(context.rows, total - have)
            # Numbered by itself: where in the run the set is drawn changes nothing in it.
            drawn, inner = self.source.draw(replace(context, draw=len(parts), rows=asked), inner)
            ((_, fresh),) = drawn.items()
            every = [part for part in context.gather(fresh) if len(part)]
            parts.append(interleaved(every) if every else None)
            # A draw of which nothing is left counts as it was asked for: stages may leave nothing of all.
            have += len(parts[-1]) if parts[-1] is not None else asked
            if self.rows is None and parts[-1] is not None:
                total = min(total, self._prompts(context) * math.ceil(len(parts[-1]) / parts[-1].groups))
            if time.monotonic() - said > 5:
                said = time.monotonic()
                left = (said - started) * (total - have) / have
                context.say(f"before the first step: {have:,} of {total:,} responses, {left:,.0f} seconds left")
        kept = [part for part in parts if part is not None]
        if not kept:
            raise RunError("nothing is left of what was drawn before the first step; look at what the stages keep.")
        return {"source": inner, "set": pack(concatenate(kept)), "position": 0}

    def _wanted(self, context: Context) -> int:
        return math.ceil(context.steps * self._each(context) / self.epochs) if self.rows is None else self.rows

    def _each(self, context: Context) -> int:
        """Rows in a draw: those of the source, where it says."""
        source: Any = self.source
        while not hasattr(source, "rows") and hasattr(source, "source"):
            source = source.source
        return getattr(source, "rows", None) or context.rows

    def _prompts(self, context: Context) -> int:
        return max(len(context.dataset(name)) for name in self.datasets()) if self.datasets() else 1 << 62


@dataclass(frozen=True)
class RaiseOnWorse:
    """The share ``phi`` of model-written rows, raised by ``by`` when a validation metric got worse by ``tolerance``.

    The metric is compared with its value at the last raise, which therefore never improves; so the paper's code has it.
    Source: DistiLLM (2024).
    """

    metric: str = "nll"
    initial: float = 0.0
    by: float = 0.1
    tolerance: float = 0.1

    def init(self) -> State:
        return {"phi": self.initial, "raised_at": None}

    def observe(self, state: State, event: Validation) -> State:
        value = event.metrics.get(self.metric)
        if value is None:
            raise RecipeError(f"the validation has no metric {self.metric!r}; give validation data with completions.")
        if state["raised_at"] is None:
            return {**state, "raised_at": value}
        if value < state["raised_at"] + self.tolerance:
            return state
        return {"phi": min(state["phi"] + self.by, 1.0), "raised_at": value}


@dataclass(frozen=True)
class Adaptive(Source):
    """Per draw, one of: data, fresh rollouts, rollouts replayed from a buffer.

    With ``s`` the finished share of the run: fresh rollouts with probability ``phi (1 - s)`` (and into the buffer),
    replayed ones with ``phi s`` (fresh while the buffer is short), data otherwise. Which model wrote a row is therefore
    not one law: only exact divergences can be matched on it. Source: DistiLLM (2024).
    """

    data: Source
    rollouts: Source
    phi: RaiseOnWorse = field(default_factory=RaiseOnWorse)
    capacity: int = 1000

    def handles(self) -> tuple[Handle, ...]:
        return (*self.data.handles(), *self.rollouts.handles())

    def readers(self) -> tuple[Handle, ...]:
        return (*self.data.readers(), *self.rollouts.readers())

    def datasets(self) -> Mapping[str, str]:
        return together(self.data, self.rollouts)

    @property
    def needs_validation(self) -> bool:
        return True

    def init(self) -> State:
        return {"data": self.data.init(), "rollouts": self.rollouts.init(), "phi": self.phi.init(), "buffer": None}

    def observe(self, state: State, event: Validation) -> State:
        inner = {name: source.observe(state[name], event) for name, source in self._sources.items()}
        return {**state, **inner, "phi": self.phi.observe(state["phi"], event)}

    @property
    def _sources(self) -> dict[str, Source]:
        return {"data": self.data, "rollouts": self.rollouts}

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        randomness = generator(context.seed, "adaptive", context.draw)
        u = float(torch.rand((), generator=randomness, dtype=torch.float64))
        phi, done = float(state["phi"]["phi"]), context.step / max(context.steps, 1)
        if u >= phi:
            drawn, inner = self.data.draw(context, state["data"])
            return drawn, {**state, "data": inner}
        held = None if state["buffer"] is None else unpack(state["buffer"])
        if held is not None and u < phi * done and len(held) >= context.rows:
            picks = torch.randperm(held.groups, generator=randomness)[: context.rows]
            return {"main": groups(held, picks[context.rank :: context.world])}, state
        drawn, inner = self.rollouts.draw(context, state["rollouts"])
        # Every process keeps the rows of all, in the order in which one process would have drawn them.
        fresh = [part for part in context.gather(drawn["main"]) if len(part)]
        if not fresh:
            return drawn, {**state, "rollouts": inner}
        kept = concatenate([*([] if held is None else [held]), interleaved(fresh)])
        # Each row comes back by itself: what is matched on them compares no two rows.
        kept = newest(replace(kept, group=torch.arange(len(kept))), self.capacity)
        return drawn, {**state, "rollouts": inner, "buffer": pack(kept)}
