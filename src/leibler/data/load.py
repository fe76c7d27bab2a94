"""Reads records from a file, a Datasets object or rows, and keeps aside what it cannot use."""

from __future__ import annotations

import difflib
import filecmp
import json
import stat
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from leibler.data.checkers import matches_answer
from leibler.data.records import Dataset, Record, SetAside
from leibler.data.rows import LONG, MAX_LINE, BadRow, parse_line, to_record
from leibler.data.spec import is_made, make
from leibler.data.tasks import tasks
from leibler.errors import DataError

RAW_LIMIT = 2000
"""Characters of a bad row that are kept; its file and line say where the rest is."""
KEPT_ROWS = 100
"""Bad rows kept in memory for a message; all of them go to the file."""

_LINES = (".jsonl", ".ndjson", ".json")
_PARQUET = (".parquet", ".pq")


def load(
    spec: Any,
    *,
    needs: Sequence[str] = ("prompt",),
    set_aside: str | Path | None = None,
    limit: int | None = None,
    refuse: Callable[[Record], str | None] | None = None,
) -> Dataset:
    """The records that a specification names; a row that is no record is set aside and counted, never dropped.

    Columns are ``prompt``, ``completion``, ``chosen``, ``rejected``, ``answer`` and ``id``; any other goes to
    ``Record.extra``. If every record has an ``answer``, the data set checks responses against it.

    Args:
        spec: a file (``.jsonl``, ``.parquet``), ``task:NAME[:key=value,...]``, ``corpus:stdlib[:key=value,...]``,
            a ``datasets.Dataset``, rows (a list of dicts or of ``Record``) or a ``Dataset``.
        needs: the columns a row must have; extra columns may be named too.
        set_aside: the file for the rows set aside, one JSON object a line with file, line, reason, detail and raw
            text. It is made only if there are such rows, and never over another one: a number is put into the name.
            Without it the rows are counted and a warning says so.
        limit: stop after that many usable rows.
        refuse: says why a record cannot be used (longer than the model's context, say), or None for one that can.

    Raises:
        DataError: nothing can be read (no such file, unknown task, not Parquet) or no usable row is left.

    Examples:
        >>> data = load([{"prompt": "2+2=", "answer": "4"}, {"prompt": "1+1=", "answer": "2"}], needs=("prompt",))
        >>> len(data), data.check(data[0], " 4 ")
        (2, 1.0)
        >>> load("task:countdown:numbers=4,n=10,seed=3").kind
        'completions'
    """
    if limit is not None and limit < 1:
        raise DataError(f"{_name(spec)} was asked for limit={limit} rows; ask for at least 1.")
    if isinstance(needs, str):
        needs = (needs,)
    if isinstance(spec, str) and is_made(spec):
        spec = make(spec, None if refuse else limit)
    name = _name(spec)
    path = Path(set_aside) if set_aside is not None else None
    data = _collect(name, _rows(spec, name), _Wanted(tuple(needs), limit, refuse), path)
    if not isinstance(spec, Dataset):
        return data
    if len(data) == len(spec):
        return spec
    before = Counter(spec.set_aside_summary)
    return replace(
        data,
        check=spec.check,
        rejected_rows=(spec.rejected_rows + data.rejected_rows)[:KEPT_ROWS],
        set_aside_summary=dict((before + Counter(data.set_aside_summary)).most_common()),
        set_aside_path=data.set_aside_path or spec.set_aside_path,
    )


@dataclass(frozen=True)
class _Wanted:
    needs: tuple[str, ...]
    limit: int | None
    refuse: Callable[[Record], str | None] | None


# A row on its way: its line, what was read or what is wrong with it, and the raw text.
_Found = tuple[int, Any, "bytes | None"]


def _collect(name: str, found: Iterable[_Found], wanted: _Wanted, set_aside: Path | None) -> Dataset:
    records: list[Record] = []
    lines: dict[str, int] = {}
    counts: Counter[str] = Counter()
    kept: list[SetAside] = []
    first: dict[str, SetAside] = {}
    with _Aside(set_aside, name) as aside:
        for line, row, raw in found:
            try:
                if isinstance(row, BadRow):
                    raise row
                value = parse_line(raw) if raw is not None else row
                record = to_record(value, wanted.needs, f"{name}:{line}")
                if record.id is not None and record.id in lines:
                    raise BadRow("'id' is given twice", f"{record.id[:80]!r} is also on line {lines[record.id]}")
                if wanted.refuse is not None and (reason := wanted.refuse(record)) is not None:
                    raise BadRow(reason)
            except BadRow as bad:
                bad_row = SetAside(name, line, bad.reason, bad.detail, _raw_text(row, raw))
                counts[bad.reason] += 1
                first.setdefault(bad.reason, bad_row)
                aside.write(bad_row)
                if len(kept) < KEPT_ROWS:
                    kept.append(bad_row)
                continue
            if record.id is not None:
                lines[record.id] = line
            records.append(record)
            if wanted.limit is not None and len(records) >= wanted.limit:
                break
    where = f" (all kept in {aside.path})" if aside.path else ""
    if not records and not counts:
        raise DataError(f"{name} is empty; give at least one row with {_listed(wanted.needs)}.")
    if not records:
        reason, count = counts.most_common(1)[0]
        detail = f" ({first[reason].detail})" if first[reason].detail else ""
        raise DataError(
            f"{name} has no usable row{where}; {count} of {counts.total()} were set aside for: {reason}{detail}, "
            f"first on line {first[reason].line}; give rows with {_listed(wanted.needs)}."
        )
    check = matches_answer if all(record.answer is not None for record in records) else None
    data = Dataset(tuple(records), name, check, tuple(kept), dict(counts.most_common()), aside.path)
    if data.set_aside_count and set_aside is None:
        warnings.warn(data.set_aside_report(), stacklevel=3)
    return data


def _same(a: Path, b: Path) -> bool:
    try:
        return a.resolve() == b.resolve()
    except (OSError, ValueError, RuntimeError):  # what is no path is no file either
        return False


class _Aside:
    """The file of rows set aside: begun with the first of them, put in place at the end, never over another file."""

    def __init__(self, path: Path | None, data: str) -> None:
        if path is not None and _same(path, Path(data)):
            raise DataError(f"{path} is the data itself; give another file for the rows set aside.")
        self.wanted = path
        self.path: Path | None = None
        self._file: Any = None

    def __enter__(self) -> _Aside:
        return self

    def write(self, row: SetAside) -> None:
        if self.wanted is None:
            return
        if self._file is None:
            try:
                self.wanted.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._partial.open("w", encoding="utf-8")
            except OSError as error:
                raise DataError(
                    f"cannot write the rows set aside to {self.wanted} ({error.strerror}); give another file."
                ) from error
        self._file.write(row.to_json() + "\n")

    @property
    def _partial(self) -> Path:
        assert self.wanted is not None
        return self.wanted.with_name(self.wanted.name + ".partial")

    def __exit__(self, *_: object) -> None:
        if self._file is None:
            return
        self._file.close()
        assert self.wanted is not None
        path, number = self.wanted, 1
        # The same rows once more (a run that is resumed) need no second file.
        while path.exists() and not filecmp.cmp(path, self._partial, shallow=False):
            number += 1
            path = self.wanted.with_name(f"{self.wanted.stem}.{number}{self.wanted.suffix}")
        self._partial.replace(path)
        self.path = path


def _name(spec: Any) -> str:
    if isinstance(spec, (str, Path)):
        return str(spec)
    if isinstance(spec, Dataset):
        return spec.name
    return "rows" if isinstance(spec, (list, tuple)) else "dataset"


def _rows(spec: Any, name: str) -> Iterator[_Found]:
    if isinstance(spec, (str, Path)):
        path = Path(spec)
        _check_file(path, name)
        return _parquet(path, name) if path.suffix.lower() in _PARQUET else _json_lines(path, name)
    if _is_datasets(spec):
        return _table(spec, name)
    if isinstance(spec, (list, tuple, Dataset)):
        return ((line, row, None) for line, row in enumerate(spec, 1))
    raise DataError(
        f"cannot read data from a {type(spec).__name__}; give a .jsonl or .parquet file, task:NAME, corpus:stdlib, "
        "a datasets.Dataset or a list of dicts."
    )


def _is_datasets(spec: Any) -> bool:
    # An object of the library can only exist once the library is imported; importing it here would cost a second.
    library = sys.modules.get("datasets")
    if library is None:
        return False
    if isinstance(spec, (library.DatasetDict, library.IterableDatasetDict)):
        raise DataError(
            f"this is a DatasetDict with the splits {_listed(list(spec))}; give one of them, as in data['train']."
        )
    return isinstance(spec, (library.Dataset, library.IterableDataset))


def _check_file(path: Path, name: str) -> None:
    try:
        kind = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        raise DataError(
            f"there is no data file {name}{_near(path)}; give a .jsonl or .parquet file, task:NAME or corpus:stdlib."
        ) from None
    except OSError as error:
        raise DataError(f"cannot read {name[:200]} ({error.strerror}); check the path.") from error
    if stat.S_ISDIR(kind):
        raise DataError(f"{name} is a folder; give a .jsonl or .parquet file in it.")
    if path.suffix.lower() not in _LINES + _PARQUET:
        raise DataError(f"{name} is neither .jsonl nor .parquet; convert it to one of them.")
    if not stat.S_ISREG(kind):  # a pipe would be waited for, a device never ends
        raise DataError(f"{name} is no ordinary file; write the rows into one.")


def _near(path: Path) -> str:
    if path.name in tasks():
        return f" (did you mean 'task:{path.name}'?)"
    try:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.suffix in _LINES + _PARQUET]
    except (OSError, ValueError):
        return ""
    close = difflib.get_close_matches(path.name, siblings, n=1)
    return f" (did you mean {str(path.with_name(close[0]))!r}?)" if close else ""


def _json_lines(path: Path, name: str) -> Iterator[_Found]:
    try:
        with path.open("rb") as file:
            start = file.read(4)
            file.seek(0)
            _check_start(start, name)
            line = 0
            while raw := file.readline(MAX_LINE + 1):
                line += 1
                if line == 1:
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                    if raw.strip() in (b"[", b"[{") or (raw.lstrip()[:1] == b"[" and path.suffix.lower() == ".json"):
                        raise DataError(f"{name} is one JSON array; write one object per line, as `jq -c '.[]'` does.")
                if len(raw) > MAX_LINE:
                    size = len(raw)
                    while not raw.endswith(b"\n") and (more := file.readline(2**16)):
                        size += len(more)
                        raw = raw[:RAW_LIMIT] + more[-1:]
                    bad = BadRow(LONG, f"{size} bytes")
                    yield line, bad, raw
                elif raw.strip():  # an empty line holds no row
                    yield line, None, raw
    except OSError as error:
        raise DataError(f"cannot read {name} ({error.strerror}); make the file readable.") from error


def _check_start(start: bytes, name: str) -> None:
    kinds = {
        b"PAR1": "a Parquet file; name it .parquet",
        b"\x1f\x8b": "compressed; unpack it first",
        b"PK\x03\x04": "a zip archive; unpack it first",
        b"\x28\xb5\x2f\xfd": "compressed; unpack it first",
        b"\xff\xfe": "UTF-16; save it as UTF-8",
        b"\xfe\xff": "UTF-16; save it as UTF-8",
    }
    for magic, what in kinds.items():
        if start.startswith(magic):
            raise DataError(f"{name} is {what}.")


def _parquet(path: Path, name: str) -> Iterator[_Found]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    line = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = Counter(file.schema_arrow.names)
            twice = next((column for column, count in columns.items() if count > 1), None)
            if twice is not None:
                raise DataError(f"{name} has two columns {twice[:80]!r}; keep one.")
            for batch in file.iter_batches(batch_size=256):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row, None
    # A broken file can make its reader raise nearly anything: an overflowing date, a list of the wrong length.
    except (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        where = f" after row {line}" if line else ""
        raise DataError(
            f"cannot read {name} as Parquet{where} ({_first_line(error)}); write the file again."
        ) from error


def _table(spec: Iterable[Any], name: str) -> Iterator[_Found]:
    line = 0
    try:
        for row in spec:
            line += 1
            yield line, row, None
    except Exception as error:  # decoding and the user's own transforms happen here
        raise DataError(
            f"cannot read {name} after row {line} ({_first_line(error)}); mend or leave out that row."
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200].rstrip(".")


def _raw_text(row: Any, raw: bytes | None) -> str:
    if raw is not None:
        return raw[: 4 * RAW_LIMIT].decode("utf-8", "backslashreplace").rstrip("\r\n")[:RAW_LIMIT]
    if isinstance(row, Record):
        row = {name: value for name, value in asdict(row).items() if value not in (None, "", {})}
    text = ""
    try:
        for part in json.JSONEncoder(default=str).iterencode(row):  # piece by piece: the row may be endless
            text += part[:RAW_LIMIT]
            if len(text) >= RAW_LIMIT:
                break
    except (ValueError, RecursionError, TypeError):
        return f"{type(row).__name__} that cannot be written as JSON"
    return text[:RAW_LIMIT]


def _listed(names: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in names)
