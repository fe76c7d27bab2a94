"""What a run writes and shows: one JSON line a step, and a progress display that falls back to plain lines."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from leibler.safety import printable


class Lines:
    """A JSON-lines file that is flushed to disk at checkpoints and cut back to an earlier length on resume.

    It is made at the first line, or by `open`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: TextIO | None = None

    def open(self) -> TextIO:
        if self.file is None:
            self.path.parent.mkdir(exist_ok=True)
            self.file = self.path.open("a", encoding="utf-8")
        return self.file

    def write(self, **values: Any) -> None:
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in values.items()}
        file = self.open()
        file.write(json.dumps(clean) + "\n")
        file.flush()

    def sync(self) -> int:
        """Flush to disk; the length so far in bytes."""
        if self.file is not None:
            os.fsync(self.file.fileno())
        return self._length()

    def cut(self, length: int) -> bool:
        """Drop what was written after ``length`` bytes: those steps will be done again. False if there is less."""
        there = self._length()
        if there > length:
            os.truncate(self.path, length)
        return there >= length

    def _length(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def last_line(path: Path) -> dict[str, Any]:
    """The last object of a JSON-lines file; empty if there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return json.loads(lines[-1]) if lines else {}


SHOWN = ("loss", "reward", "divergence", "entropy")


def headline(metrics: Mapping[str, float]) -> dict[str, float]:
    """The numbers that a person watches: the loss, the reward, one divergence, the entropy."""
    out = {k: metrics[k] for k in ("loss", "reward", "entropy") if k in metrics}
    divergences = [k for k in metrics if k.startswith(("divergence/", "divergence_per_sequence/"))]
    if divergences:
        out["divergence"] = metrics[divergences[0]]
    return {k: out[k] for k in SHOWN if k in out}


class Progress:
    """Steps done, the headline numbers, tokens per second and the time left.

    A live bar on a terminal; otherwise a plain line now and then; nothing when ``quiet``.
    """

    def __init__(self, total: int, *, label: str = "train", quiet: bool = False, done: int = 0) -> None:
        self.total, self.label, self.quiet = total, label, quiet
        self.started, self.first, self.last_line = time.monotonic(), done, 0.0
        self.bar: Any = None
        self.task: Any = None
        self.work: tuple[str, float, int] | None = None
        if not quiet and sys.stderr.isatty():
            self.bar, self.task = _bar(total, label, done)
            self.bar.start()

    def update(self, step: int, metrics: Mapping[str, float], tokens_per_second: float | None) -> None:
        if self.quiet:
            return
        shown = "  ".join(f"{k} {v:.4g}" for k, v in headline(metrics).items())
        text = shown if tokens_per_second is None else f"{shown}  {_count(tokens_per_second)} tok/s"
        if self.bar is not None:
            self.bar.update(self.task, completed=step, text=text)
            return
        now = time.monotonic()
        if now - self.last_line < 5.0 and step not in (1, self.total):
            return
        self.last_line = now
        rate = (step - self.first) / max(now - self.started, 1e-9)
        left = (self.total - step) / rate if rate > 0 else 0.0
        print(f"{self.label} {step}/{self.total}  {text}  {_clock(left)} left", file=sys.stderr, flush=True)

    def working(self, what: str, done: int, total: int) -> None:
        """Long work of a step: how far it is, and the time left; beside the bar, or a line now and then."""
        now = time.monotonic()
        if self.work is None or self.work[0] != what:
            self.work = (what, now, done)
        _, began, first = self.work
        left = (total - done) * (now - began) / max(done - first, 1)
        if self.bar is not None:
            self.bar.update(self.task, text=f"{what} {done}/{total}  {_clock(left)} left")
        elif not self.quiet and now - max(self.last_line, began) >= 5.0:
            self.last_line = now
            print(f"{what} {done}/{total}  {_clock(left)} left", file=sys.stderr, flush=True)

    def say(self, message: str) -> None:
        """A line above the bar."""
        if self.bar is not None:
            self.bar.console.print(printable(message), highlight=False, markup=False)
        elif not self.quiet:
            print(printable(message), file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def _bar(total: int, label: str, done: int) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns: Sequence[Any] = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    bar = Bar(*columns, console=Console(stderr=True), transient=False)
    return bar, bar.add_task(label, total=total, completed=done, text="")


def _count(x: float) -> str:
    return f"{x / 1000:.1f}k" if x >= 1000 else f"{x:.0f}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    return f"{minutes}:{seconds:02d}"
