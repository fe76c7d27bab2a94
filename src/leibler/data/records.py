"""Records, and the data sets made of them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, overload

from leibler.data.hashing import digest, permutation
from leibler.errors import DataError

TEXT_FIELDS = ("prompt", "completion", "chosen", "rejected")
FIELDS = (*TEXT_FIELDS, "answer", "id")
"""What a row may call its columns; every other column is kept in ``Record.extra``."""

Kind = Literal["prompts", "completions", "preferences"]


@dataclass(frozen=True)
class Record:
    """One example.

    Args:
        prompt: the text before the response.
        completion: a response to imitate, without an end-of-sequence token (the policy adds it).
        chosen: the preferred response of a pair.
        rejected: the other response of the pair.
        answer: what an exact checker compares a response with.
        id: a name that is unique in its data set.
        source: where the record comes from, as ``file:line``.
        extra: every other column of the row.

    Examples:
        >>> Record("2+2=", completion="4", extra={"level": 1}).get("level")
        1
    """

    prompt: str
    completion: str | None = None
    chosen: str | None = None
    rejected: str | None = None
    answer: str | None = None
    id: str | None = None
    source: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def get(self, name: str) -> Any:
        """The field or extra column of that name, or None."""
        return getattr(self, name) if name in FIELDS else self.extra.get(name)


@dataclass(frozen=True)
class SetAside:
    """A row that could not be used.

    Args:
        file: the file (or the name of the object) it stood in.
        line: its line, or its row number in a table; from 1.
        reason: what is wrong, in words that are the same for every row with that fault.
        detail: what is particular to this row.
        raw: the row as it was read, cut to ``RAW_LIMIT`` characters.
    """

    file: str
    line: int
    reason: str
    detail: str = ""
    raw: str = ""

    def to_json(self) -> str:
        row = {"file": self.file, "line": self.line, "reason": self.reason, "detail": self.detail, "raw": self.raw}
        return json.dumps(row)


def told(value: Any) -> str:
    """What JSON does not know, as text that is the same in every process: dates, bytes, arrays, sets."""
    if isinstance(value, (set, frozenset)):
        return str(sorted(map(str, value)))
    text = str(value)
    # The default representation is an address, another one in every process.
    return type(value).__name__ if f" at {hex(id(value))}" in text else text


Checker = Callable[[Record, str], float]
"""Scores a response to a record: 1.0 when it is right, 0.0 when it is not."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Records in a fixed order, with what was set aside while they were read.

    Args:
        records: the usable rows.
        name: the specification or file that they came from.
        check: an exact checker of responses, or None where there is nothing to check against.
        rejected_rows: the first ``KEPT_ROWS`` rows that were set aside; the file at ``set_aside_path`` has all.
        set_aside_summary: how many rows were set aside for each reason.
        set_aside_path: the file that the rows set aside were written to, if any was.

    Examples:
        >>> data = Dataset((Record("a"), Record("b"), Record("c")), name="letters")
        >>> len(data), data[0].prompt, data.kind
        (3, 'a', 'prompts')
        >>> data.order(epoch=1, seed=0) == data.order(epoch=1, seed=0)
        True
    """

    records: tuple[Record, ...]
    name: str
    check: Checker | None = None
    rejected_rows: tuple[SetAside, ...] = ()
    set_aside_summary: Mapping[str, int] = field(default_factory=dict)
    set_aside_path: Path | None = None
    _last_order: tuple[int, int, tuple[int, ...]] = field(default=(-1, -1, ()), init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "records", tuple(self.records))
        if self.rejected_rows and not self.set_aside_summary:
            counts = Counter(row.reason for row in self.rejected_rows)
            object.__setattr__(self, "set_aside_summary", dict(counts.most_common()))

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Record | Dataset:
        return self.select(range(len(self))[index]) if isinstance(index, slice) else self.records[index]

    @property
    def kind(self) -> Kind:
        """What every record has: a pair of responses, a completion, or at least a prompt."""
        if all(r.chosen is not None and r.rejected is not None for r in self.records):
            return "preferences"
        return "completions" if all(r.completion is not None for r in self.records) else "prompts"

    def checker(self) -> Checker:
        """What says how right a response is; raises `DataError` where there is nothing to check against."""
        if self.check is not None:
            return self.check
        if self.records and all("environment" in r.extra for r in self.records):
            raise DataError(
                f"{self.name} is played in turns and has no answers to check; measure it with `leibler measure "
                "success`, and let a recipe with episodes play it, such as tcod."
            )
        raise DataError(f"{self.name} has no checker; give every record an 'answer', or use task:NAME.")

    @property
    def set_aside_count(self) -> int:
        return sum(self.set_aside_summary.values())

    def set_aside_report(self) -> str:
        """One sentence on the rows that were set aside; empty when there were none."""
        if not self.set_aside_count:
            return ""
        reasons = "; ".join(f"{n} x {reason}" for reason, n in self.set_aside_summary.items())
        where = f", kept in {self.set_aside_path}" if self.set_aside_path else ""
        rows = self.set_aside_count + len(self)
        return f"{self.set_aside_count} of {rows} rows of {self.name} set aside{where}: {reasons}"

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of what the records say, in order; where they were read from does not count."""
        state = hashlib.sha256()
        for record in self.records:
            row = [getattr(record, name) for name in FIELDS] + [dict(record.extra)]
            state.update(json.dumps(row, sort_keys=True, default=told).encode() + b"\n")
        return state.hexdigest()

    def order(self, epoch: int, seed: int = 0) -> tuple[int, ...]:
        """The order of an epoch: a permutation that depends on (seed, epoch) alone.

        So a run that is resumed in mid-epoch goes on in the same order with nothing saved.
        """
        if self._last_order[:2] != (epoch, seed):  # a loop asks for the same order at every step of an epoch
            object.__setattr__(self, "_last_order", (epoch, seed, tuple(permutation(len(self), "order", seed, epoch))))
        return self._last_order[2]

    def select(self, indices: Sequence[int]) -> Dataset:
        """The records at these indices, as a data set with the same checker."""
        return replace(self, records=tuple(self.records[i] for i in indices))

    def split(self, fraction: float, seed: int = 0) -> tuple[Dataset, Dataset]:
        """(the rest, a held-out part) of which no two records share a prompt; both keep the order of the records.

        Args:
            fraction: the share of the records to hold out. Records with one prompt go together, so the held-out part
                may be larger than asked by the size of the last group taken.
            seed: which records.

        Raises:
            DataError: the fraction is not between 0 and 1, or there are fewer than two different prompts.

        Examples:
            >>> data = Dataset(tuple(Record(str(i)) for i in range(10)), name="digits")
            >>> [len(part) for part in data.split(0.2)]
            [8, 2]
        """
        if not 0 < fraction < 1:
            raise DataError(f"cannot hold out a fraction of {fraction} of {self.name}; give one between 0 and 1.")
        groups = Counter(record.prompt for record in self.records)
        if len(groups) < 2:
            raise DataError(f"cannot split {self.name}, whose records share one prompt; give held-out data of its own.")
        wanted = fraction * len(self)
        held: set[str] = set()
        count = 0
        ranked = sorted(groups, key=lambda prompt: (digest("split", seed, prompt), prompt))
        for prompt in ranked[:-1]:  # something must remain
            if held and count + 0.5 > wanted:
                break
            held.add(prompt)
            count += groups[prompt]
        out = [i for i, record in enumerate(self.records) if record.prompt in held]
        rest = [i for i, record in enumerate(self.records) if record.prompt not in held]
        return self.select(rest), self.select(out)
