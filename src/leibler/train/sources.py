"""Sources: where rows come from. Each yields named streams of whole groups whose origin is known beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch

from leibler.environment.dialogue import encode_turns, later_turns
from leibler.errors import DataError, RecipeError
from leibler.objective.rows import CHOSEN, REJECTED, SAMPLE, Rows
from leibler.objective.signals import Validation
from leibler.objective.targets import Handle, Model, Old, Policy, Target, Tempered

if TYPE_CHECKING:
    from leibler.data import Dataset, Record
    from leibler.policy import CausalLM, Samples
    from leibler.policy.vllm import VllmRollouts

State = dict[str, Any]
"""A source's state: JSON values and tensors, as they stand in a checkpoint."""


@dataclass(frozen=True)
class Origin:
    """The law that a stream's events were sampled from: None for data, an expression over models otherwise."""

    law: Target | None = None


@dataclass(frozen=True)
class Context:
    """What a source may use. ``draw`` counts the draws so far; together with the seed it determines all randomness."""

    models: Mapping[str, CausalLM]
    data: Mapping[str, Dataset]
    seed: int
    draw: int
    step: int
    steps: int
    rows: int
    max_new_tokens: int
    max_length: int
    temperature: float
    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = lambda item: [item]
    """What each process gave, in order."""
    rollouts: VllmRollouts | None = None
    """Samples the policy's responses; None: `leibler.policy.sample` does."""
    failed: Callable[[Record, str, str], None] | None = None
    """Hears of each response that a stage sets aside: its record, its text and the reason."""
    working: Callable[[str, int, int], None] | None = None
    """Hears how far long work is: what it is, what is done, how much there is."""
    say: Callable[[str], None] = lambda message: None
    """Shows a sentence to whoever watches the run."""

    @property
    def policy(self) -> CausalLM:
        return self.models["policy"]

    def dataset(self, name: str) -> Dataset:
        if name not in self.data:
            raise DataError(f"the recipe draws from the data {name!r}, which was not given; add data.{name}=FILE.")
        return self.data[name]

    def share(self, n: int) -> range:
        """The part of ``n`` whole groups that this process works on; empty where there are fewer than processes."""
        return range(self.rank, n, self.world)


class Stage(Protocol):
    """Changes which rows exist or what their columns say, over whole groups and without gradient.

    One that uses models names them in ``readers()``, as a source does.
    """

    def __call__(self, rows: Rows, context: Context) -> Rows: ...


class Source:
    """Base of all sources."""

    masked: ClassVar[bool] = False
    """True if the events are masked positions, for a masked language model."""

    def streams(self) -> Mapping[str, Origin]:
        return {"main": Origin()}

    def handles(self) -> tuple[Handle, ...]:
        """The models it samples from."""
        return ()

    def readers(self) -> tuple[Handle, ...]:
        """The models that only read its texts, each in its own tokens."""
        return ()

    def datasets(self) -> Mapping[str, str]:
        """The data it reads, by name, and what it needs of them: ``prompts``, ``labels`` or ``both``."""
        return {}

    def stream_data(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the data behind each stream."""
        return {stream: tuple(self.datasets()) for stream in self.streams()}

    def fresh(self) -> frozenset[str]:
        """The streams whose texts are sampled during the run."""
        return frozenset(self.streams()) if self.handles() else frozenset()

    @property
    def needs_validation(self) -> bool:
        """True if what is drawn depends on validation metrics."""
        return False

    def init(self) -> State:
        return {}

    def observe(self, state: State, event: Validation) -> State:
        return state

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        raise NotImplementedError

    def __rshift__(self, stage: Stage) -> Source:
        return Staged(self, stage)


def together(*sources: Source) -> dict[str, str]:
    """The data that several sources read, and what they need of them."""
    found: dict[str, str] = {}
    for source in sources:
        for name, kind in source.datasets().items():
            found[name] = kind if found.get(name, kind) == kind else "both"
    return found


def _next_records(data: Dataset, state: State, count: int, seed: int) -> tuple[list[tuple[int, Record]], State]:
    """The next ``count`` records in an order derived from (seed, epoch); the state is one position."""
    position, out = int(state.get("position", 0)), []
    order: Sequence[int] = []
    epoch = -1
    for at in range(position, position + count):
        if at // len(data) != epoch:
            epoch = at // len(data)
            order = data.order(epoch, seed)
        index = order[at % len(data)]
        out.append((index, data[index]))
    return out, {**state, "position": position + count}


@dataclass(frozen=True)
class Data(Source):
    """Records with their responses: a completion each, or a chosen and a rejected one (one group of two rows).

    A record with the column ``turns`` is a dialogue: its completion is followed by pairs of a text that the player did
    not write, which carries no loss, and the player's next action.

    Attributes:
        name: which of the run's data sets.
        rows: sequences per optimiser batch; None: the run's batch size.
        columns: columns of the data that become columns of the batch: a number for each response, or a list with one
            number for each of its tokens, the end token included.
    """

    name: str = "train"
    rows: int | None = None
    columns: tuple[str, ...] = ()

    def datasets(self) -> Mapping[str, str]:
        return {self.name: "labels"}

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        records, state = self.next(context, state)
        return {"main": self.batch([records[i][1] for i in context.share(len(records))], context)}, state

    def next(self, context: Context, state: State) -> tuple[list[tuple[int, Record]], State]:
        """The next records of all processes, with their places in the data."""
        data, wanted = context.dataset(self.name), self.rows or context.rows
        return _next_records(data, state, max(wanted // 2, 1) if data.kind == "preferences" else wanted, context.seed)

    def batch(self, records: Sequence[Record], context: Context) -> Rows:
        """Records as rows."""
        data = context.dataset(self.name)
        pairs = data.kind == "preferences"
        items: list[tuple[list[int], list[int]]] = []
        group, role, owners, silent = [], [], [], []
        encode = context.policy
        for number, record in enumerate(records):
            prompt = encode.encode_prompt(record.prompt)
            answers = [(record.chosen, CHOSEN), (record.rejected, REJECTED)] if pairs else [(record.completion, SAMPLE)]
            for text, kind in answers:
                if text is None:
                    raise DataError(f"{record.source or data.name} has no completion to learn from; add the column.")
                tokens, between = encode_turns(encode, text, [] if pairs else later_turns(record), len(prompt))
                items.append((prompt, tokens))
                silent.append(between)
                group.append(number)
                role.append(kind)
                owners.append(record)
        rows = silenced(_rows(items, group, role, owners, context), silent)
        return rows.with_columns(**{name: _column(name, rows) for name in self.columns})


def silenced(rows: Rows, spans: Sequence[Sequence[tuple[int, int]]]) -> Rows:
    """Without events at tokens that others wrote: for each row, where they begin and end."""
    mask = rows.mask.clone()
    for row, parts in enumerate(spans):
        for begin, end in parts:
            mask[row, begin - 1 : end - 1] = False
    return replace(rows, mask=mask)


def _column(name: str, rows: Rows) -> torch.Tensor:
    """A column of the records: ``[batch]``, or ``[batch, time]`` where they hold a list for each response."""
    values = []
    for record, length in zip(rows.records, rows.length.tolist(), strict=True):
        value = record.get(name)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in numbers):
            raise DataError(
                f"the column {name!r} of {record.source or 'a record'} is {value!r:.40}; give a number, or one a token."
            )
        if numbers is value and len(numbers) != length:
            raise DataError(
                f"the column {name!r} of {record.source or 'a record'} has {len(numbers)} numbers for {length} tokens "
                "(the end token included); make it with the student's tokenizer."
            )
        values.append(torch.tensor(value, dtype=torch.float32))
    if len({v.ndim for v in values}) > 1:
        raise DataError(f"the column {name!r} holds numbers in some rows and lists in others; make it one kind.")
    if not values or values[0].ndim == 0:
        return torch.stack(values) if values else torch.zeros(0)
    return torch.zeros(rows.mask.shape).masked_scatter(rows.mask, torch.cat(values))


def _rows(
    items: Sequence[tuple[list[int], list[int]]],
    group: Sequence[int],
    role: Sequence[int],
    records: Sequence[Record],
    context: Context,
) -> Rows:
    from leibler.policy import right_pad

    if not items:
        none = torch.zeros(0, dtype=torch.long)
        empty = torch.zeros(0, 1, dtype=torch.bool)
        return Rows(none[:, None], empty, empty[:, :0], none, none)
    longest = max(len(p) + len(c) for p, c in items)
    if longest > context.max_length:
        where = next(r.source for (p, c), r in zip(items, records, strict=True) if len(p) + len(c) == longest)
        raise DataError(
            f"a row of {longest} tokens ({where or 'no source given'}) exceeds the model's context of "
            f"{context.max_length}; shorten it, or lower max_new_tokens."
        )
    tokens, attention, mask = right_pad(items)
    return Rows(
        tokens,
        attention,
        mask,
        torch.tensor(group),
        torch.tensor(role),
        records=list(records),
        texts=[context.policy.decode(c) for _, c in items],
    )


@dataclass(frozen=True)
class OnPolicy(Source):
    """Responses sampled now: by the policy, or by any law over the recipe's models.

    Attributes:
        group_size: responses to each prompt.
        sampler: the law to sample from; `Arithmetic` mixes models at each token. Behaviour log-probs are kept.
        prompts: which of the run's data sets holds the prompts.
        rows: sequences per optimiser batch; None: the run's batch size.
        temperature, max_new_tokens: None: the run's. At a temperature of its own the stream is of another law than the
            policy's, and its terms are importance-weighted by what the sampler reported.
    """

    group_size: int = 1
    sampler: Target = field(default_factory=Old)
    prompts: str = "train"
    rows: int | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None

    def streams(self) -> Mapping[str, Origin]:
        # The policy while it samples is what the next steps call the old one; at a temperature of its own, it is not.
        law = Old() if self.sampler == Policy() else self.sampler
        return {"main": Origin(law if self.temperature is None else Tempered(law, self.temperature))}

    def handles(self) -> tuple[Handle, ...]:
        return self.sampler.handles

    def datasets(self) -> Mapping[str, str]:
        return {self.prompts: "prompts"}

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        data = context.dataset(self.prompts)
        count = max((self.rows or context.rows) // self.group_size, 1)
        records, state = _next_records(data, state, count, context.seed)
        mine = list(context.share(count))
        records = [records[i] for i in mine]
        prompts = [context.policy.encode_prompt(r.prompt) for _, r in records]
        out = self.respond(context, prompts, mine, "rollout", self.group_size)
        completions = [t[m].tolist() for t, m in zip(out.tokens, out.mask, strict=True)]
        group = [i for i in range(len(records)) for _ in range(self.group_size)]
        owners = [r for _, r in records for _ in range(self.group_size)]
        items = [(prompts[g], c) for g, c in zip(group, completions, strict=True)]
        rows = _rows(items, group, [SAMPLE] * len(group), owners, context)
        logp = torch.zeros(rows.mask.shape).masked_scatter(rows.mask, out.logp[out.mask].float())
        return {"main": rows.with_columns(behaviour_logp=logp, finished=out.finished.float())}, state

    def longest(self, context: Context) -> int:
        """The largest number of new tokens."""
        return self.max_new_tokens or context.max_new_tokens

    def respond(
        self,
        context: Context,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int],
        purpose: str,
        group_size: int = 1,
        limits: Sequence[int] | None = None,
    ) -> Samples:
        """``group_size`` responses to each prompt, by the law and settings of this source.

        Args:
            context: of the draw.
            prompts: token ids.
            numbers: of the prompts among those of all processes; with ``purpose``, draw and seed they determine what
                is drawn, so that the number of processes changes nobody's draw.
            purpose: what the responses are for.
            group_size: responses to each prompt.
            limits: the largest number of new tokens for each prompt, where it is less than `longest`.
        """
        from leibler.policy import sample
        from leibler.policy.randomness import derived_seed, uniforms

        longest = self.longest(context)
        temperature = context.temperature if self.temperature is None else self.temperature
        if context.rollouts is not None and self.sampler in (Old(), Policy()):
            context.rollouts.follow(context.policy, context.step)
            return context.rollouts.sample(
                context.policy,
                prompts,
                seeds=[derived_seed(context.seed, purpose, context.draw, i, bits=48) for i in numbers],
                max_new_tokens=longest,
                temperature=temperature,
                group_size=group_size,
                limits=limits,
            )
        tables = [
            uniforms(context.seed, purpose, context.draw, group_size, longest, first_row=i * group_size)
            for i in numbers
        ]
        return sample(
            _sampling_law(self.sampler, context),
            prompts,
            uniforms=torch.cat(tables) if tables else torch.zeros(0, longest, dtype=torch.float64),
            temperature=temperature,
            group_size=group_size,
            limits=limits,
        )


def Sampled(model: str, group_size: int = 1, **options: Any) -> OnPolicy:
    """Responses sampled from a named model of the recipe."""
    return OnPolicy(group_size, sampler=Model(model), **options)


def _sampling_law(target: Target, context: Context) -> Any:
    from leibler.objective.targets import Arithmetic

    def model(handle: Target) -> CausalLM:
        if not isinstance(handle, Handle):
            raise RecipeError("sequences can be sampled from a model or an Arithmetic mixture of models only.")
        return context.models["policy" if handle.name in ("policy", "old") else handle.name]

    if isinstance(target, Arithmetic):
        return [(model(part), weight) for part, weight in target.parts]
    return model(target)


@dataclass(frozen=True)
class Staged(Source):
    """``source >> stage``."""

    source: Source
    stage: Stage

    def streams(self) -> Mapping[str, Origin]:
        return self.source.streams()

    def handles(self) -> tuple[Handle, ...]:
        return self.source.handles()

    def readers(self) -> tuple[Handle, ...]:
        own = getattr(self.stage, "readers", tuple)
        return (*self.source.readers(), *own())

    def datasets(self) -> Mapping[str, str]:
        return self.source.datasets()

    def stream_data(self) -> Mapping[str, tuple[str, ...]]:
        return self.source.stream_data()

    def fresh(self) -> frozenset[str]:
        return self.source.fresh()

    @property
    def needs_validation(self) -> bool:
        return self.source.needs_validation

    def init(self) -> State:
        return self.source.init()

    def observe(self, state: State, event: Validation) -> State:
        return self.source.observe(state, event)

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        drawn, state = self.source.draw(context, state)
        return {name: self.stage(rows, context) for name, rows in drawn.items()}, state


@dataclass(frozen=True)
class Mixture(Source):
    """Several named streams side by side; each term says which it is ``on``."""

    sources: tuple[tuple[str, Source], ...]

    def __init__(self, sources: tuple[tuple[str, Source], ...] = (), **named: Source) -> None:
        object.__setattr__(self, "sources", (*sources, *named.items()))

    def streams(self) -> Mapping[str, Origin]:
        return {name: next(iter(source.streams().values())) for name, source in self.sources}

    def handles(self) -> tuple[Handle, ...]:
        return tuple(h for _, source in self.sources for h in source.handles())

    def readers(self) -> tuple[Handle, ...]:
        return tuple(h for _, source in self.sources for h in source.readers())

    def datasets(self) -> Mapping[str, str]:
        return together(*(source for _, source in self.sources))

    def stream_data(self) -> Mapping[str, tuple[str, ...]]:
        return {name: tuple(source.datasets()) for name, source in self.sources}

    def fresh(self) -> frozenset[str]:
        return frozenset(name for name, source in self.sources if source.fresh())

    @property
    def needs_validation(self) -> bool:
        return any(source.needs_validation for _, source in self.sources)

    def init(self) -> State:
        return {name: source.init() for name, source in self.sources}

    def observe(self, state: State, event: Validation) -> State:
        return {name: source.observe(state[name], event) for name, source in self.sources}

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        out: dict[str, Rows] = {}
        new: State = {}
        for name, source in self.sources:
            drawn, new[name] = source.draw(context, state[name])
            out[name] = next(iter(drawn.values()))
        return out, new
