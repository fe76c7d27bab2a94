"""Ctrl-C and TERM as a request: the run ends at a place where it can be saved."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interruptible(request: Callable[[], bool]) -> Iterator[None]:
    """Inside the block, SIGINT and SIGTERM call ``request``; where it returns False, KeyboardInterrupt is raised.

    Outside the main thread nothing changes, since Python delivers signals there only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: Any) -> None:
        if not request():
            raise KeyboardInterrupt

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
