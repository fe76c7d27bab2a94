"""Episodes: the policy plays environments of several turns, many side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from leibler.environment.base import Environment
from leibler.environment.dialogue import demonstration
from leibler.environment.playing import Act, Episode, Start, environment_of, play, sampled_turn
from leibler.errors import RecipeError
from leibler.objective.rows import SAMPLE, Rows
from leibler.objective.schedules import OfStep
from leibler.objective.targets import Handle, Old
from leibler.train.sources import Context, Origin, Source, State, _next_records, _rows, silenced

if TYPE_CHECKING:
    from leibler.data import Record

Turn = list[tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Demonstrated:
    """The beginning of a demonstration: all but its last ``drop_last`` actions (a number, or a schedule of the step).

    Of a demonstration of ``L`` actions ``max(0, L - drop_last)`` are replayed. The demonstration is the record's own
    (``completion`` and ``turns``), or else the environment's script.
    """

    drop_last: OfStep | int = 1

    def __post_init__(self) -> None:
        if isinstance(self.drop_last, int) and self.drop_last < 1:
            raise RecipeError(f"drop_last={self.drop_last} leaves the player no turn; give at least 1.")

    def length(self, actions: int, step: int) -> int:
        """How many of so many actions are replayed at a step."""
        return max(0, actions - max(_value(self.drop_last, step), 1))


def _value(number: OfStep | int, step: int) -> int:
    return int(number.value(step)) if isinstance(number, OfStep) else number


@dataclass(frozen=True)
class Episodes(Source):
    """Dialogues of the policy with an environment, sampled now; one call of the sampler for each turn of all of them.

    A row is a whole dialogue. Its events are the tokens of the policy's own turns, the end of each turn included; what
    the environment writes and what is replayed carries no loss. Texts are joined as they are, without a chat template:
    ``Environment.cue`` ends an observation, the tokenizer's end token an action.

    Columns: ``reward`` (of the episode), ``turns`` (the policy's own), ``turn`` (of each token, from 0; replayed turns
    count), ``finished`` (the environment ended it), ``overflow`` (the context was full before that) and
    ``behaviour_logp``.

    Attributes:
        environment: what is played; None: what each record's column ``environment`` says, as ``env:NAME`` makes them.
        max_turns: the most turns of an episode, replayed ones included: a number or a schedule of the step; never more
            than the environment's own limit. None: that limit.
        prefix: replayed first: the beginning of a demonstration.
        group_size: episodes of each task.
        tasks: which of the run's data sets holds the tasks.
        rows: episodes per optimiser batch; None: the run's batch size.
        max_new_tokens: the longest action; None: the run's.
    """

    environment: Environment | None = None
    max_turns: OfStep | int | None = None
    prefix: Demonstrated | None = None
    group_size: int = 1
    tasks: str = "train"
    rows: int | None = None
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        if isinstance(self.max_turns, int) and self.max_turns < 1:
            raise RecipeError(f"max_turns={self.max_turns} leaves an episode no turn; give at least 1.")
        if self.group_size < 1:
            raise RecipeError(f"group_size={self.group_size} must be at least 1.")

    def streams(self) -> Mapping[str, Origin]:
        return {"main": Origin(Old())}

    def handles(self) -> tuple[Handle, ...]:
        return (Old(),)

    def datasets(self) -> Mapping[str, str]:
        return {self.tasks: "prompts"}

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        data = context.dataset(self.tasks)
        count = max((self.rows or context.rows) // self.group_size, 1)
        records, state = _next_records(data, state, count, context.seed)
        mine = list(context.share(count))
        numbers = [i * self.group_size + g for i in mine for g in range(self.group_size)]
        owners = [records[n // self.group_size][1] for n in numbers]
        starts, known = [], {}
        for n, record in zip(numbers, owners, strict=True):
            task = n // self.group_size
            known[task] = known[task] if task in known else self._start(record, context.step)
            starts.append(known[task])
        longest = self.max_new_tokens or context.max_new_tokens
        episodes = play(
            context.policy,
            starts,
            self._actor(context, numbers, count * self.group_size, longest),
            max_new_tokens=longest,
            max_length=context.max_length,
        )
        group = [n // self.group_size for n in numbers]
        items = [(e.tokens[: e.opening], e.tokens[e.opening :]) for e in episodes]
        rows = _rows(items, group, [SAMPLE] * len(group), owners, context)
        return {"main": _annotated(rows, episodes)}, state

    def turns_at(self, step: int) -> int | None:
        """The most turns of an episode that is drawn at a step; None: the environment's limit."""
        return None if self.max_turns is None else max(_value(self.max_turns, step), 1)

    def _start(self, record: Record, step: int) -> Start:
        environment, task = environment_of(record, self.environment)
        turns = self.turns_at(step)
        if self.prefix is None:
            return Start(environment, task, turns=turns)
        actions = demonstration(record, environment, task)
        return Start(environment, task, tuple(actions[: self.prefix.length(len(actions), step)]), turns)

    @staticmethod
    def _actor(context: Context, numbers: Sequence[int], total: int, longest: int) -> Act:
        """Samples a turn. Row ``n`` of the draw has its own randomness at each turn, on whichever process it is."""
        from leibler.policy.randomness import derived_seed, uniforms

        def here(dialogues: Sequence[list[int]], turn: int, which: Sequence[int]) -> Turn:
            table = uniforms(context.seed, f"episodes/{turn}", context.draw, total, longest)
            picks = torch.tensor([numbers[w] for w in which], dtype=torch.long)
            return sampled_turn(context.policy, dialogues, table[picks], context.temperature)

        def elsewhere(dialogues: Sequence[list[int]], turn: int, which: Sequence[int]) -> Turn:
            assert context.rollouts is not None
            seeds = [derived_seed(context.seed, f"episodes/{turn}", context.draw, numbers[w], bits=48) for w in which]
            out = context.rollouts.sample(
                context.policy,
                dialogues,
                seeds=seeds,
                max_new_tokens=longest,
                temperature=context.temperature,
                group_size=1,
            )
            return [(t[m].tolist(), p[m].tolist()) for t, m, p in zip(out.tokens, out.mask, out.logp, strict=True)]

        if context.rollouts is None:
            return here
        context.rollouts.follow(context.policy, context.step)
        return elsewhere


def _annotated(rows: Rows, episodes: Sequence[Episode]) -> Rows:
    """Events at the policy's own turns only, and the columns."""
    between = []
    for episode in episodes:
        ends = [end for _, end in episode.spans]
        between.append([(end, begin) for end, (begin, _) in zip(ends, [*episode.spans[1:], (len(episode.tokens), 0)])])
    rows = silenced(rows, between)
    turn = torch.zeros(rows.mask.shape)
    for row, episode in enumerate(episodes):
        for number, (begin, end) in enumerate(episode.spans, len(episode.start.prefix)):
            turn[row, begin - 1 : end - 1] = number
    logp = torch.tensor([value for episode in episodes for value in episode.logp])
    columns = {
        "reward": torch.tensor([e.reward for e in episodes]),
        "turns": torch.tensor([float(len(e.spans)) for e in episodes]),
        "finished": torch.tensor([float(e.done) for e in episodes]),
        "overflow": torch.tensor([float(e.overflow) for e in episodes]),
        "turn": turn,
        "behaviour_logp": torch.zeros(rows.mask.shape).masked_scatter(rows.mask, logp),
    }
    return replace(rows.with_columns(**columns), texts=[e.text for e in episodes])
