"""What the benchmarks share: a clock for busy machines, and a line that says where the numbers come from."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch

from leibler import memory


def options(description: str | None, repeats: int) -> argparse.ArgumentParser:
    """A parser with ``--threads``, ``--repeats`` and ``--wall``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    cores = os.cpu_count() or 1
    parser.add_argument("--threads", type=int, default=cores, help=f"of torch (default: as many as cores, {cores})")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"the fastest counts (default {repeats})")
    parser.add_argument("--wall", action="store_true", help="elapsed time also of one thread (else its processor time)")
    parser.add_argument(
        "--return-memory", action="store_true", help="freed memory goes back to the system, as by default"
    )
    return parser


def started(arguments: argparse.Namespace, *packages: str, keep: bool = True) -> Callable[[], float]:
    """Set the threads, say what runs where, and return the clock.

    Freed memory is kept in the process, for all sides alike: page faults of new memory would strike whoever comes
    first.
    """
    torch.set_num_threads(arguments.threads)
    kept = keep and not getattr(arguments, "return_memory", False) and memory.keep()
    # Processor time of several threads counts each of them: only elapsed time compares sides then.
    wall = arguments.wall or arguments.threads > 1
    found = []
    for package in ("leibler", "torch", "transformers", *packages):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            found.append(f"{package} not installed")
    print(", ".join(found))
    print(
        f"{datetime.date.today()}, {platform.machine()}, Python {platform.python_version()}, {arguments.threads} "
        f"thread{'s' * (arguments.threads > 1)}, {'elapsed' if wall else 'processor'} time"
        + ", freed memory kept"
        * kept,
        flush=True,
    )
    return time.perf_counter if wall else time.process_time


def fastest(sides: list[Callable[[], object]], repeats: int, clock: Callable[[], float]) -> list[float]:
    """Seconds of each side, the best of ``repeats``, interleaved so that a slow moment strikes all."""
    best = [float("inf")] * len(sides)
    for side in sides:
        side()
    for _ in range(repeats):
        for number, side in enumerate(sides):
            start = clock()
            side()
            best[number] = min(best[number], clock() - start)
    return best
