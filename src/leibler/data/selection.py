"""Choosing which records to learn from: rules over columns of numbers, and a reason for every record."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from leibler import durable
from leibler.data.records import FIELDS, Dataset, Record, told
from leibler.errors import DataError

Columns = Mapping[str, Sequence[float]]
Read = Callable[[str], Columns]
"""How a model, by its name, reads the completions: ``nll``, ``confidence`` and ``uncertainty`` of each."""


class Scorer(Protocol):
    """Columns of numbers to choose by, from how models read the records."""

    @property
    def models(self) -> tuple[str, ...]: ...

    def __call__(self, read: Read) -> dict[str, Sequence[float]]: ...


@dataclass(frozen=True)
class Difference:
    """``difference = nll(reference) - nll(teacher)``, per token: how much better the teacher reads a text.

    In the code that was released with the paper the columns are losses: the difference has the reference's first.
    Source: MiniPLM: Knowledge Distillation for Pre-Training Language Models (2024).

    Examples:
        >>> Difference("large", "small")({"large": {"nll": [1.0]}, "small": {"nll": [3.0]}}.get)["difference"]
        [2.0]
    """

    teacher: str = "teacher"
    reference: str = "reference"

    @property
    def models(self) -> tuple[str, ...]:
        return (self.teacher, self.reference)

    def __call__(self, read: Read) -> dict[str, Sequence[float]]:
        above, below = (read(name)["nll"] for name in self.models)
        found = [b - a for a, b in zip(above, below, strict=True)]
        return {"difference": found, "teacher_nll": above, "reference_nll": below}


@dataclass(frozen=True)
class SureAndUnsure:
    """The teacher's ``confidence`` in a label (its completion) and the student's ``uncertainty`` there.

    Source: Learning with Less: Knowledge Distillation from Large Language Models via Unlabeled Data (2024).
    """

    teacher: str = "teacher"
    student: str = "policy"

    @property
    def models(self) -> tuple[str, ...]:
        return (self.teacher, self.student)

    def __call__(self, read: Read) -> dict[str, Sequence[float]]:
        return {"confidence": read(self.teacher)["confidence"], "uncertainty": read(self.student)["uncertainty"]}


class Rule(Protocol):
    """Says of each record why it is left out, or None where it is kept."""

    def __call__(self, columns: Columns) -> list[str | None]: ...


def _column(columns: Columns, name: str) -> list[float]:
    if name not in columns:
        raise DataError(f"there is no column {name!r} to choose by; there are: {', '.join(columns) or 'none'}.")
    values = [float(v) for v in columns[name]]
    broken = next((i for i, v in enumerate(values) if math.isnan(v)), None)
    if broken is not None:
        raise DataError(f"the column {name!r} is not a number in row {broken + 1}; score that row again or drop it.")
    return values


@dataclass(frozen=True)
class TopShare:
    """Keeps the share of records with the largest numbers, ``ceil(share * n)`` of them; among equals, earlier ones.

    Raises:
        DataError: the share is not above 0 and at most 1.

    Examples:
        >>> TopShare("score", 0.5)({"score": [0.1, 3.0, 2.0]})
        ['score 0.1 is below 2, the least of the top 50%', None, None]
    """

    by: str
    share: float

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise DataError(f"a share of {self.share} cannot be kept; give one above 0 and at most 1.")

    def __call__(self, columns: Columns) -> list[str | None]:
        values = _column(columns, self.by)
        wanted = math.ceil(self.share * len(values) - 1e-9)
        ranked = sorted(range(len(values)), key=lambda i: (-values[i], i))
        kept = set(ranked[:wanted])
        least = values[ranked[wanted - 1]] if ranked else math.nan

        def reason(value: float) -> str:
            how = "below" if value < least else "no more than"
            return f"{self.by} {value:.4g} is {how} {least:.4g}, the least of the top {self.share:.0%}"

        return [None if i in kept else reason(v) for i, v in enumerate(values)]


@dataclass(frozen=True)
class Between:
    """Keeps the records whose number lies in ``[least, most]``.

    Examples:
        >>> Between("pass_rate", 0.1, 0.9)({"pass_rate": [0.0, 0.5]})
        ['pass_rate 0 is outside 0.1 to 0.9', None]
    """

    by: str
    least: float = -math.inf
    most: float = math.inf

    def __call__(self, columns: Columns) -> list[str | None]:
        return [
            None if self.least <= v <= self.most else f"{self.by} {v:.4g} is outside {self.least:g} to {self.most:g}"
            for v in _column(columns, self.by)
        ]


@dataclass(frozen=True)
class AboveMean:
    """Keeps the records whose number is at least the mean of all.

    Examples:
        >>> AboveMean("confidence")({"confidence": [0.2, 0.8]})
        ['confidence 0.2 is below the mean of 0.5', None]
    """

    by: str

    def __call__(self, columns: Columns) -> list[str | None]:
        values = _column(columns, self.by)
        mean = math.fsum(values) / max(len(values), 1)
        # Rounding of the mean must not drop records that are all equal.
        edge = mean - 1e-12 * max(abs(mean), 1.0)
        return [None if v >= edge else f"{self.by} {v:.4g} is below the mean of {mean:.4g}" for v in values]


@dataclass(frozen=True)
class Every:
    """Keeps what all rules keep; the first that leaves a record out gives the reason.

    Examples:
        >>> Every((Between("a", 0.0), AboveMean("b")))({"a": [-1.0, 1.0], "b": [0.0, 4.0]})
        ['a -1 is outside 0 to inf', None]
    """

    rules: tuple[Rule, ...]

    def __call__(self, columns: Columns) -> list[str | None]:
        found = [rule(columns) for rule in self.rules]
        return [next((r for r in reasons if r is not None), None) for reasons in zip(*found, strict=True)]


def sure_and_unsure(confidence: float | None = None, uncertainty: float | None = None) -> Every:
    """Both numbers of `SureAndUnsure` reach their threshold; None: their mean over the records at hand.

    Examples:
        >>> sure_and_unsure(0.5, 0.5)({"confidence": [0.9, 0.4], "uncertainty": [0.6, 0.8]})
        [None, 'confidence 0.4 is outside 0.5 to inf']
    """
    wanted = {"confidence": confidence, "uncertainty": uncertainty}
    return Every(tuple(AboveMean(by) if least is None else Between(by, least) for by, least in wanted.items()))


@dataclass(frozen=True, eq=False)
class Selection:
    """What a rule made of a data set.

    Args:
        kept: the records that stay, in their order, with the columns among their extra fields.
        records: all records, with the columns likewise.
        reasons: why each was left out; None where it was kept.
    """

    kept: Dataset
    records: tuple[Record, ...]
    reasons: tuple[str | None, ...]

    def write(self, path: Path) -> Path:
        """Write the kept records to ``path`` and every record's fate to ``NAME.reasons.jsonl`` beside it.

        Returns the second path. Nothing is overwritten, and nothing half written. What JSON does not know, such as a
        date, becomes text.

        Raises:
            DataError: the path does not end in ``.jsonl``, or one of the files exists.
        """
        reasons = free(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        fates = []
        for record, reason in zip(self.records, self.reasons, strict=True):
            row = {"source": record.source, "id": record.id, "kept": reason is None, "reason": reason or "kept"}
            fates.append({**row, "prompt": record.prompt[:200], **_numbers(record)})
        kept = []
        for record in self.kept:
            fields = {name: getattr(record, name) for name in FIELDS if getattr(record, name) is not None}
            kept.append({**record.extra, **fields})
        # Both as text first: what cannot be written leaves nothing behind.
        for file, text in [(reasons, _lines(fates)), (path, _lines(kept))]:
            durable.write_text(file, text)
        return reasons

    def summary(self) -> str:
        """One sentence: how many stay, and what the others lack."""
        total, kept = len(self.reasons), len(self.kept)
        lacking = Counter(reason.split(" ", 1)[0] for reason in self.reasons if reason is not None)
        why = "; left out by " + ", ".join(f"{name}: {n}" for name, n in lacking.most_common()) if lacking else ""
        return f"{kept} of {total} records kept{why}"


def free(path: Path) -> Path:
    """Where the reasons of a selection go whose records go to ``path``, if nothing stands in the way.

    Raises:
        DataError: the path does not end in ``.jsonl``, or one of the files exists.
    """
    if path.suffix != ".jsonl":
        raise DataError(f"{path} does not end in .jsonl; give the selected data a name that does.")
    reasons = path.with_suffix(".reasons.jsonl")
    for file in (path, reasons):
        if file.exists():
            raise DataError(f"{file} exists; give another name for the selected data.")
    return reasons


def _lines(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, default=told) + "\n" for row in rows)


def _numbers(record: Record) -> dict[str, float]:
    return {k: v for k, v in record.extra.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def select(dataset: Dataset, columns: Columns, rule: Rule | None = None) -> Selection:
    """Add columns to the records and keep those that a rule keeps (all, without one).

    Raises:
        DataError: a column has another length than the data, or nothing is left.

    Examples:
        >>> data = Dataset((Record("a"), Record("b")), name="letters")
        >>> found = select(data, {"score": [0.0, 1.0]}, TopShare("score", 0.5))
        >>> [r.prompt for r in found.kept], found.kept[0].extra["score"]
        (['b'], 1.0)
    """
    for name, values in columns.items():
        if len(values) != len(dataset):
            raise DataError(f"the column {name!r} has {len(values)} numbers for {len(dataset)} records; score all.")
    reasons = [None] * len(dataset) if rule is None else rule(columns)
    rows = [
        replace(record, extra={**record.extra, **{name: values[i] for name, values in columns.items()}})
        for i, record in enumerate(dataset)
    ]
    kept = tuple(row for row, reason in zip(rows, reasons, strict=True) if reason is None)
    if not kept:
        raise DataError(f"no record of {dataset.name} is kept; loosen the rule.")
    return Selection(replace(dataset, records=kept), tuple(rows), tuple(reasons))
