"""Sources that choose: which records of the data are learnt from, by what models make of them.

The rules and the numbers are those of `leibler select`, which writes the chosen records with the reason for each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from leibler.data.selection import Columns, Rule, Scorer
from leibler.environment.dialogue import text_to_score
from leibler.errors import DataError, RecipeError
from leibler.objective.rows import Rows
from leibler.objective.targets import Handle
from leibler.policy.reading import part, reading, shares_right
from leibler.train.sources import Context, Data, OnPolicy, Source, State
from leibler.train.stages import Answer

if TYPE_CHECKING:
    from leibler.data import Dataset, Record

_NUMBERS = ("nll", "confidence", "uncertainty")


@dataclass(frozen=True)
class _Choosing(Source):
    """What both kinds share: a `Data` source, the numbers to choose by, and the rule."""

    source: Data
    by: Scorer
    rule: Rule

    def __post_init__(self) -> None:
        if not isinstance(self.source, Data):
            raise RecipeError(
                f"{type(self).__name__} chooses among the records of Data(), and {type(self.source).__name__} is "
                "another source; give it Data() and put the rest around it."
            )

    def readers(self) -> tuple[Handle, ...]:
        return tuple(Handle(name) for name in self.by.models)

    def datasets(self) -> Mapping[str, str]:
        return self.source.datasets()


@dataclass(frozen=True)
class Selected(_Choosing):
    """The records that a rule over the whole data set keeps, chosen once at the beginning.

    All records are read by the models that the numbers come from, shared between the processes; what is kept stays in
    the order of the data and is drawn like any data set. The choice stands in the checkpoint. A model that reads may
    have another tokenizer than the student (``align=text``): each reads the text in its own tokens.

    Attributes:
        source: the data.
        by: the numbers, such as `leibler.data.selection.Difference`.
        rule: which records are kept, by those numbers.

    Raises:
        RecipeError: the source is not `Data`.

    Examples:
        >>> from leibler.data.selection import Difference, TopShare
        >>> from leibler.train import Data, Selected
        >>> source = Selected(Data(), Difference("teacher", "reference"), TopShare("difference", 0.5))
        >>> [handle.name for handle in source.readers()]
        ['teacher', 'reference']
    """

    _held: tuple[object, Sequence[int], Dataset] | None = field(default=None, init=False, repr=False, compare=False)

    def init(self) -> State:
        return {"source": self.source.init(), "kept": None}

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        name = self.source.name
        data = context.dataset(name)
        kept: list[int] | None = state["kept"]
        if kept is None:
            columns = self.by(lambda model: _read(context, model, data.records, self.by.models, "score"))
            kept = [i for i, reason in enumerate(self.rule(columns)) if reason is None]
            if not kept:
                raise DataError(f"no record of {data.name} is kept; loosen the rule.")
        if self._held is None or self._held[0] is not data or self._held[1] != kept:
            # A data set remembers its order: it is made once, not at every draw.
            object.__setattr__(self, "_held", (data, kept, data.select(kept)))
        assert self._held is not None
        within = replace(context, data={**context.data, name: self._held[2]})
        drawn, inner = self.source.draw(within, state["source"])
        return drawn, {"source": inner, "kept": kept}


@dataclass(frozen=True)
class Filtered(_Choosing):
    """Of each drawn batch the rows that a rule keeps, with the student as it is then.

    The rule sees the batch of all processes at once, so neither their number nor the size of micro-batches moves a
    threshold. Rows that are left out are not learnt from and not counted, as if the batch had been smaller (the metric
    ``rows`` says how many are left); a batch of which nothing is left is drawn anew. Models other than the policy are
    taken not to change: what they make of a record is read once, and kept in the checkpoint.

    Attributes:
        source: the data.
        by: the numbers, such as `leibler.data.selection.SureAndUnsure`.
        rule: which rows are kept, by those numbers.

    Raises:
        RecipeError: the source is not `Data`.

    Examples:
        >>> from leibler.data.selection import SureAndUnsure, sure_and_unsure
        >>> from leibler.train import Data, Filtered
        >>> source = Filtered(Data(), SureAndUnsure(), sure_and_unsure())
        >>> [handle.name for handle in source.readers()]
        ['teacher', 'policy']
    """

    def init(self) -> State:
        return {"source": self.source.init(), "read": {}}

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        records, inner = self.source.next(context, state["source"])
        read = {model: dict(known) for model, known in state["read"].items()}

        def columns(model: str) -> Columns:
            known: dict[str, list[float]] = {} if model == "policy" else read.setdefault(model, {})
            missing = {str(i): record for i, record in records if str(i) not in known}
            found = _read(context, model, list(missing.values()), (model,), None)
            known.update(zip(missing, ([found[n][k] for n in _NUMBERS] for k in range(len(missing))), strict=True))
            return {n: [known[str(i)][k] for i, _ in records] for k, n in enumerate(_NUMBERS)}

        reasons = self.rule(self.by(columns))
        kept = [i for i in context.share(len(records)) if reasons[i] is None]
        return {"main": self.source.batch([records[i][1] for i in kept], context)}, {"source": inner, "read": read}


def _read(
    context: Context, model: str, records: Sequence[Record], passes: Sequence[str], label: str | None
) -> dict[str, list[float]]:
    """How a model reads the completions of records, each process its share."""
    reader = context.models[model]
    mine = [records[i] for i in context.share(len(records))]
    pairs = [(reader.encode_prompt(r.prompt), reader.encode_completion(text_to_score(r))) for r in mine]
    told: Callable[[int, int], None] | None = None
    if label is not None and context.working is not None:
        told = part(partial(context.working, label), passes, model)
    every = context.gather(reading(reader, pairs, progress=told))
    world = len(every)
    return {n: [every[i % world][n][i // world] for i in range(len(records))] for n in _NUMBERS}


@dataclass(frozen=True)
class PassRate:
    """Writes the column ``pass_rate``: the share of the policy's own answers to a row's prompt that are right, now.

    It is estimated whenever a prompt is drawn, so it follows the student; a rate of 0 or 1 is not for good. An answer
    that was cut off at the limit is wrong. Source: PACED: Distillation at the Frontier of Student Competence (2026).

    Attributes:
        samples: answers to each prompt.
        data: the data whose checker judges.
        answers: how they are sampled.

    Raises:
        RecipeError: fewer than two samples, of which a rate between 0 and 1 cannot be told.

    Examples:
        >>> from leibler.train import Data, PassRate
        >>> [handle.name for handle in (Data() >> PassRate(samples=4)).readers()]
        ['policy']
    """

    samples: int = 8
    data: str = "train"
    answers: OnPolicy = field(default_factory=OnPolicy)

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise RecipeError(f"samples={self.samples} tell no rate between 0 and 1; draw at least 2.")

    def readers(self) -> tuple[Handle, ...]:
        return tuple(Handle("policy" if h.name == "old" else h.name) for h in self.answers.handles())

    def __call__(self, rows: Rows, context: Context) -> Rows:
        judge = Answer(self.data).bind(context)
        first = dict(zip(reversed(rows.group.tolist()), reversed(rows.records), strict=True))
        questions = {group: context.policy.encode_prompt(record.prompt) for group, record in first.items()}
        longest, asked = self.answers.longest(context), list(questions)
        out = self.answers.respond(
            context,
            list(questions.values()),
            # By the group's number among those of all processes.
            [context.rank + group * context.world for group in asked],
            "pass-rate",
            self.samples,
            # A row ends with a token at least, so its prompt leaves room for one.
            limits=[min(longest, context.max_length - len(prompt)) for prompt in questions.values()],
        )

        def right(question: int, text: str) -> bool:
            return judge([first[asked[question]]], [text])[0] >= 1.0

        found = dict(zip(asked, shares_right(context.policy, out, self.samples, right), strict=True))
        return rows.with_columns(pass_rate=torch.tensor([found[group] for group in rows.group.tolist()]))
