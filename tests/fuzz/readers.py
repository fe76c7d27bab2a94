"""Cases for the readers of records: lines, rows, tables, specifications, paths, and responses for the checkers."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

from fuzz.harness import Broken, Case, Lost, sentence
from fuzz.hostile import NUMBERS, TEXTS, line, mutated, python_value, row, text
from leibler.data import TASKS, Dataset, Record, load, matches_answer
from leibler.data.load import KEPT_ROWS
from leibler.errors import DataError
from leibler.safety import printable

NEEDS = (("prompt",), ("prompt", "completion"), ("prompt", "chosen", "rejected"), ("prompt", "weight"))
EMPTY, REFUSED = " is empty; give at least one row", " has no usable row"


def read(spec: Any, draw: Random, place: Path, expected: set[int] | None) -> int:
    """Load; every expected line must be used or set aside, once. None: nothing is known about how many there are."""
    aside, limit = place / "aside" / "rows.jsonl", 40
    refuse = None if draw.random() < 0.7 else lambda r: "longer than the context" if len(r.prompt) > limit else None
    try:
        data = load(spec, needs=draw.choice(NEEDS), set_aside=aside, refuse=refuse)
    except DataError as error:
        sentence(error)
        if expected is None:
            return 0
        if EMPTY in str(error):
            _all(expected, Counter(), str(error))
        elif REFUSED in str(error):
            _all(expected, Counter(_aside(aside)), str(error))
        else:
            return 0  # the whole file is refused, and said to be
        return len(expected)
    data.content_hash  # noqa: B018  what a run writes down
    kept = _aside(aside)
    if data.set_aside_count != len(kept) or len(data.rejected_rows) != min(len(kept), KEPT_ROWS):
        raise Lost(abs(data.set_aside_count - len(kept)), "the file and the count of rows set aside differ")
    if expected is not None:
        _all(expected, Counter([_line(r) for r in data] + kept), data.set_aside_report())
        _honest(spec, data)
    return len(data) + len(kept)


def _all(expected: set[int], found: Counter[int], what: str) -> None:
    wrong = (expected ^ set(found)) | {n for n, count in found.items() if count > 1}
    if wrong:
        raise Lost(len(wrong), f"lines {sorted(wrong)[:5]}: {what[:200]}")


def _line(record: Record) -> int:
    return int(record.source.rpartition(":")[2])


def _aside(path: Path) -> list[int]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not all(r["reason"] and r["line"] > 0 for r in rows):
        raise Broken("a row set aside without a reason or a line")
    return [r["line"] for r in rows]


def _honest(spec: Any, data: Dataset) -> None:
    """A record says what its line says."""
    if not isinstance(spec, Path):
        return
    lines = spec.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for record in data:
        stated = json.loads(lines[_line(record) - 1])
        for name in ("prompt", "completion", "chosen", "rejected"):
            if stated.get(name) != getattr(record, name):
                raise Broken(
                    f"{name} of line {_line(record)} is {stated.get(name)!r}, read as {getattr(record, name)!r}"
                )


def lines(draw: Random, place: Path) -> int:
    """A file of good, bad and torn lines; sometimes its bytes are broken on top."""
    end = draw.choice((b"\n", b"\n", b"\r\n"))
    content = end.join(line(draw) for _ in range(draw.randrange(9))) + draw.choice((b"", end))
    if draw.random() < 0.1:
        content = b"\xef\xbb\xbf" + content
    if draw.random() < 0.5:
        content = mutated(draw, content)
    path = place / draw.choice(("d.jsonl", "d.ndjson", "d.json", "a b;é'\".jsonl"))
    path.write_bytes(content)
    rows = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return read(path, draw, place, {n for n, raw in enumerate(rows, 1) if raw.strip()})


def rows(draw: Random, place: Path) -> int:
    """Rows given in Python, which may hold what no file can."""
    given = [row(draw, json_only=False) for _ in range(draw.randrange(6))]
    return read(given, draw, place, set(range(1, len(given) + 1)))


def _frame(draw: Random) -> Any:
    import pyarrow as pa

    count = draw.randrange(5)
    columns: dict[str, Any] = {}
    for name in dict.fromkeys(
        draw.choice(("prompt", "prompt", "completion", "answer", "id", "x", "")) for _ in range(4)
    ):
        kind = draw.randrange(7)
        made = {
            0: [draw.choice(TEXTS[:20]) for _ in range(count)],
            1: [draw.choice(NUMBERS[:6]) for _ in range(count)],
            2: [draw.choice((1.5, float("nan"), None)) for _ in range(count)],
            3: [[text(draw)[:5], None] for _ in range(count)],
            4: [{"a": 1, "b": [draw.random()]} for _ in range(count)],
            5: [b"\xff\x00"] * count,
        }.get(kind, [text(draw) for _ in range(count)])
        try:
            columns[name] = pa.array(made)
        except (pa.ArrowException, ValueError, OverflowError):
            columns[name] = pa.array([str(i) for i in range(count)])
    if kind == 2 and count:
        columns["when"] = pa.array([draw.choice((-(2**62), 2**62, 0))] * count, pa.timestamp("us"))
    return pa.table(columns)


def parquet(draw: Random, place: Path) -> int:
    """A table; mostly with broken bytes."""
    import pyarrow.parquet as pq

    path, made = place / "d.parquet", _frame(draw)
    pq.write_table(made, path, compression=draw.choice(("none", "snappy", "zstd")))
    if draw.random() < 0.7:
        path.write_bytes(mutated(draw, path.read_bytes()))
        return read(str(path), draw, place, None)
    return read(str(path), draw, place, set(range(1, made.num_rows + 1)))


def tables(draw: Random, place: Path) -> int:
    """A `datasets.Dataset`, sometimes with a transform that fails in the middle."""
    import datasets

    made = datasets.Dataset(_frame(draw))
    if draw.random() < 0.3 and len(made):
        made.set_transform(lambda batch: {"prompt": [python_value(draw)]} if draw.random() < 0.5 else 1 / 0)
        return read(made, draw, place, None)
    return read(made, draw, place, set(range(1, len(made) + 1)))


def _pair(draw: Random, key: str) -> str:
    if draw.random() < 0.1:
        return text(draw)
    hostile = draw.random() < 0.5
    held = draw.choice((str(draw.choice(NUMBERS[:9])), text(draw)) if hostile else ("1", "2", "true", "train"))
    return key + draw.choice(("=", "=", "=", "", "==")) + held


def specifications(draw: Random, place: Path) -> int:
    """``task:NAME:key=value,...`` with wrong names, keys and values."""
    keys = (
        "n",
        "seed",
        "part",
        "digits",
        "reversed",
        "numbers",
        "largest",
        "target",
        "depth",
        "length",
        "kinds",
        "size",
        "",
    )
    pairs = [_pair(draw, draw.choice(keys)) for _ in range(draw.randrange(4))]
    name = draw.choice((*TASKS, *TASKS, "adition", "", text(draw)))
    spec = f"{draw.choice(('task', 'task', 'task', 'corpus', 'Task'))}:{name}:{','.join(pairs)}"
    if draw.random() < 0.3:
        spec = mutated(draw, spec.encode("utf-8", "surrogatepass"), 2).decode("utf-8", "surrogateescape")
    if spec.startswith("corpus:stdlib"):
        spec = "corpus:stdlib:length=nothing"  # the real one is read once, elsewhere: it takes a second
    try:
        return len(load(spec, limit=3))
    except DataError as error:
        sentence(error)
        return 0


def paths(draw: Random, place: Path) -> int:
    """Names that are no ordinary file."""
    os.mkfifo(place / "pipe.jsonl")
    (place / "folder.jsonl").mkdir(exist_ok=True)
    (place / "loop.jsonl").symlink_to("loop.jsonl")
    (place / "zero.jsonl").symlink_to("/dev/zero")
    (place / "null.jsonl").symlink_to("/dev/null")
    (place / "gone.jsonl").symlink_to("nowhere")
    (place / "good.jsonl").write_text('{"prompt": "a"}\n')
    odd = (
        "pipe.jsonl", "folder.jsonl", "loop.jsonl", "zero.jsonl", "null.jsonl", "gone.jsonl", "good.jsonl/x.jsonl",
        "*.jsonl", "[a-z].jsonl", "good.jsonl\x00.jsonl", "a" * 300 + ".jsonl",
        "x/" * 3000 + "d.jsonl", "~nobody/d.jsonl",
        "good.jsonl ", "", ".", "..", "good", "\udcff.jsonl", "-", "good.txt",
    )  # fmt: skip
    name = draw.choice(odd) if draw.random() < 0.8 else text(draw) + draw.choice(("", ".jsonl", ".parquet"))
    made: Any = str(place / name) if draw.random() < 0.9 else name
    return read(made if draw.random() < 0.5 else Path(made), draw, place, None)


def responses(draw: Random, place: Path) -> int:
    """Responses of a model to the exact checkers; and what is shown of them holds no control character."""
    name = draw.choice(tuple(TASKS))
    (record,) = TASKS[name]().sample(1, seed=draw.randrange(50))
    response = draw.choice(
        (text(draw), str(record.completion), mutated(draw, str(record.completion).encode()).decode("latin-1"))
    )
    for verdict in (TASKS[name]().check(record, response), matches_answer(record, response)):
        if verdict not in (0.0, 1.0):
            raise Broken(f"{name} scored {response!r} as {verdict}")
    shown = printable(response)
    if any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 for c in shown):
        raise Broken(f"{response!r} is shown as {shown!r}")
    return 1


CASES = {
    "lines": Case("records as lines: torn, mixed, mutated bytes", 60, lines),
    "rows": Case("rows given in Python: rings, odd types, NaN", 12, rows),
    "parquet": Case("Parquet files with broken bytes and odd columns", 4, parquet),
    "tables": Case("datasets.Dataset with odd columns and failing transforms", 1, tables),
    "specifications": Case("task and corpus specifications", 8, specifications),
    "paths": Case("pipes, devices, link loops, impossible paths", 4, paths),
    "responses": Case("garbage as responses to exact checkers", 6, responses),
}
