"""Reads what a run left behind, believing none of it: a killed run leaves torn lines, and numbers may not be finite."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leibler.errors import RunError
from leibler.train.run_file import RUN_FILE, read_run_file

DEMO_FILE = "demo.json"


@dataclass(frozen=True)
class Table:
    """Columns over steps.

    Args:
        steps: rising, each once.
        columns: one value a step, NaN where a step has none.
    """

    steps: tuple[float, ...] = ()
    columns: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.steps)

    def named(self, prefix: str) -> dict[str, tuple[float, ...]]:
        """The columns whose name begins so, by the rest of their name."""
        return {name[len(prefix) :]: values for name, values in self.columns.items() if name.startswith(prefix)}


@dataclass(frozen=True)
class SetAside:
    """Rows of one data set that could not be used: counts by reason, and the first row for each."""

    name: str
    path: Path
    reasons: tuple[tuple[str, int, Mapping[str, Any]], ...]

    @property
    def count(self) -> int:
        return sum(count for _, count, _ in self.reasons)


@dataclass(frozen=True)
class Recorded:
    """What a run directory holds, apart from the models."""

    path: Path
    run: Mapping[str, Any]
    metrics: Table
    validation: Table
    timings: Table
    samples: tuple[Mapping[str, Any], ...]
    set_aside: tuple[SetAside, ...]
    unreadable: int
    """Lines of the four logs that are no JSON object, such as the last one of a killed run."""

    @property
    def options(self) -> Mapping[str, Any]:
        return mapping(self.run.get("options"))

    @property
    def steps(self) -> int:
        """The last step that was taken."""
        return int(self.metrics.steps[-1])

    @property
    def final(self) -> Path | None:
        """The trained model, if the run came to its end."""
        path = self.path / "final"
        return path if (path / "config.json").is_file() else None


def is_demo(path: Path) -> bool:
    """Whether a directory holds several runs, described together."""
    return (path / DEMO_FILE).is_file()


def stages(path: Path) -> list[Path]:
    """The directories of the stages that a run in several has begun; none for any other run, or what is no run."""
    if not (path / RUN_FILE).is_file():
        return []
    named = read_run_file(path).get("stages")
    folders = [path / str(name) for name in named] if isinstance(named, list) else []
    # A name from elsewhere must not lead out of the run.
    return [folder for folder in folders if folder.parent == path and (folder / "metrics.jsonl").is_file()]


def read_run(path: Path) -> Recorded:
    """Read a run directory.

    Raises:
        RunError: it is no run directory, its ``run.yaml`` is broken, or it has no step to report on.
    """
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise RunError(f"{path} {what}; give the directory that `leibler train` wrote (its out=).")
    if not (path / RUN_FILE).is_file():
        raise RunError(
            f"{path} is not a run directory (it has no {RUN_FILE}); give the directory that `leibler train` wrote."
        )
    try:
        run = read_run_file(path)
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path / RUN_FILE} cannot be read ({error}); restore it from the run.") from error
    read = {name: read_lines(path / f"{name}.jsonl") for name in ("metrics", "validation", "timings", "samples")}
    metrics = table(read["metrics"][0])
    if not len(metrics):
        raise RunError(f"{path} has no metrics yet (metrics.jsonl holds no step); report on it after its first step.")
    return Recorded(
        path=path,
        run=run,
        metrics=metrics,
        validation=table(read["validation"][0]),
        timings=table(read["timings"][0]),
        samples=tuple(row for row in read["samples"][0] if isinstance(row.get("step"), int)),
        set_aside=tuple(_set_aside(file) for file in sorted((path / "set_aside").glob("*.jsonl"))),
        unreadable=sum(bad for _, bad in read.values()),
    )


def read_demo(path: Path) -> dict[str, Any]:
    """Read the description of several runs.

    Raises:
        RunError: it is broken.
    """
    file = path / DEMO_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read ({error}); make it again with `leibler demo`.") from error
    models = content.get("models") if isinstance(content, dict) else None
    if not (isinstance(models, list) and models and all(isinstance(model, dict) for model in models)):
        raise RunError(f"{file} describes no models; make it again with `leibler demo`.")
    return content


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The JSON objects of a file of lines, and the number of lines that are none; nothing if there is no file."""
    rows: list[dict[str, Any]] = []
    bad = 0
    if not path.is_file():
        return rows, bad
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in filter(str.strip, lines):
            try:
                row = json.loads(line)
            except ValueError:
                bad += 1
                continue
            if isinstance(row, dict):
                rows.append(row)
            else:
                bad += 1
    return rows, bad


def table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Columns of the rows that have a step; of rows with the same step the last one counts.

    Examples:
        >>> table([{"step": 1, "loss": 2.0}, {"step": 2, "loss": "nan", "reward": 1}]).columns["reward"]
        (nan, 1.0)
    """
    by_step: dict[float, Mapping[str, Any]] = {}
    for row in rows:
        step = as_number(row.get("step"))
        if step is not None and math.isfinite(step):
            by_step[step] = row
    steps = tuple(sorted(by_step))
    names = dict.fromkeys(key for step in steps for key in by_step[step] if key != "step")
    columns = {}
    for name in names:
        values = [as_number(by_step[step].get(name)) for step in steps]
        if any(value is not None for value in values):
            columns[name] = tuple(math.nan if value is None else value for value in values)
    return Table(steps, columns)


def as_number(value: Any) -> float | None:
    """A number, also one that was written as text because JSON has no infinity; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and value.lower() not in ("nan", "inf", "-inf"):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return None


def mapping(value: Any) -> Mapping[str, Any]:
    """The mapping, or an empty one where a file holds something else."""
    return value if isinstance(value, Mapping) else {}


def _set_aside(file: Path) -> SetAside:
    rows, bad = read_lines(file)
    counts: Counter[str] = Counter()
    first: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        reason = str(row.get("reason", "no reason given"))
        counts[reason] += 1
        first.setdefault(reason, row)
    if bad:
        counts["a line of this file is unreadable"] = bad
    return SetAside(file.stem, file, tuple((r, n, first.get(r, {})) for r, n in counts.most_common()))
