"""Plain tables: readable on a terminal, in a file and in a log."""

from __future__ import annotations

import shutil
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from typing import Any


def table(header: Sequence[str], rows: Sequence[Sequence[object]], width: int | None = None) -> str:
    """Columns aligned on the left; the last one wraps at the width of the terminal.

    Args:
        header: names of the columns.
        rows: one cell per column each.
        width: characters per line; by default the terminal's, and no wrapping elsewhere.

    Examples:
        >>> print(table(["slug", "year"], [["kd", 2015], ["minillm", 2023]]))
        slug     year
        kd       2015
        minillm  2023
    """
    cells = [[str(c) for c in row] for row in [header, *rows]]
    if width is None:
        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    widths = [max(len(row[i]) for row in cells) for i in range(len(header) - 1)]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for row in cells:
        start = "".join(cell.ljust(w + 2) for cell, w in zip(row, widths))
        last = textwrap.wrap(row[-1], width - indent) if width - indent >= 24 else [row[-1]]
        lines.append((start + (last[0] if last else "")).rstrip())
        lines += [" " * indent + more for more in last[1:]]
    return "\n".join(lines)


class Working:
    """A context that gives a function ``(done, total, tokens=None)``: progress with the time left.

    A bar on a terminal, else a line now and then; with ``tokens`` done so far, also their number per second.
    """

    def __init__(self, label: str, quiet: bool = False) -> None:
        self.label, self.quiet = label, quiet
        self.progress: Any = None

    def __enter__(self) -> Callable[..., None]:
        return self._update

    def _update(self, done: int, total: int, tokens: int | None = None) -> None:
        from leibler.train.log import Progress

        now = time.monotonic()
        if self.progress is None:
            self.progress = Progress(total, label=self.label, quiet=self.quiet, done=done)
            self.first, self.began = tokens, now
            return
        rate = None if tokens is None else (tokens - (self.first or 0)) / max(now - self.began, 1e-9)
        self.progress.update(done, {}, rate)

    def __exit__(self, *_: object) -> None:
        if self.progress is not None:
            self.progress.close()
