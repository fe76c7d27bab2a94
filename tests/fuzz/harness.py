"""The fuzz: hostile files, rows, paths and configurations by the thousand, each judged on its own.

    python tests/fuzz/harness.py 50000            that many cases, and the table of them
    python tests/fuzz/harness.py --only lines --seed 7 --case 1234

A case is a function of (kind, seed, number), so any of them can be repeated alone. It survives if the code under test
returns what it promises or raises a `LeiblerError` of one sentence, in time, and no row is lost: every row of the
input is among the records or among the rows set aside, exactly once.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from leibler.data.hashing import generator
from leibler.errors import LeiblerError

SECONDS = 20.0
"""A case that takes longer counts as a hang; the slowest takes a fraction of a second."""


class Broken(AssertionError):
    """A promise that was not kept."""


@dataclass
class Lost(Broken):
    """Rows that are neither used nor set aside, or are both."""

    rows: int
    what: str


@dataclass(frozen=True)
class Case:
    """One kind of case.

    Attributes:
        fault: what is done, for the table.
        share: how often, relative to the others.
        run: makes a case in a folder from a generator and judges it; returns the number of rows that went in.
    """

    fault: str
    share: int
    run: Callable[[Random, Path], int]


@dataclass
class Tally:
    injected: int = 0
    survived: int = 0
    rows: int = 0
    rows_lost: int = 0
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


class Hang(BaseException):
    """Not an Exception: nothing under test may swallow it."""


@contextmanager
def deadline(seconds: float = SECONDS) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield  # signals only reach the main thread; there the duration is looked at afterwards
        return

    def late(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def sentence(error: LeiblerError) -> None:
    """An error is one line with something in it, and does not print the whole input."""
    text = str(error)
    if not text.strip() or len(text) > 4000:
        raise Broken(f"an error of {len(text)} characters: {text[:200]!r}")


def one(name: str, case: Case, seed: int, number: int, folder: Path) -> tuple[int, int, str]:
    """Run a case: (rows in, rows lost, what is wrong with it or nothing)."""
    draw = generator("fuzz", name, seed, number)
    place = folder / name
    place.mkdir(exist_ok=True)
    started = time.monotonic()
    try:
        with deadline(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about rows set aside: they are counted here
            rows = case.run(draw, place)
        if time.monotonic() - started > SECONDS:
            raise Hang
    except Hang:
        return 0, 0, f"{name} {number}: no end after {SECONDS:g} s"
    except Lost as lost:
        return 0, lost.rows, f"{name} {number}: {lost.rows} rows lost: {lost.what}"
    except (Exception, RecursionError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return 0, 0, f"{name} {number}: {type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"
    finally:
        empty(place)
    return rows, 0, ""


def empty(folder: Path) -> None:
    """Remove what a case made; folders stay, because making them anew takes longer than most cases."""
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_dir():
            path.unlink()


def cases() -> dict[str, Case]:
    from fuzz import configuration, readers

    return {**readers.CASES, **configuration.CASES}


def numbers(total: int) -> dict[str, int]:
    """How many cases of each kind make up a total, by their shares."""
    every = cases()
    whole = sum(case.share for case in every.values())
    out = {name: max(total * case.share // whole, 1) for name, case in every.items()}
    out[next(iter(out))] += max(total - sum(out.values()), 0)
    return out


def fuzz(total: int, seed: int, folder: Path) -> dict[str, Tally]:
    """Run ``total`` cases of all kinds; what became of them."""
    found = {}
    for name, count in numbers(total).items():
        case, tally = cases()[name], Tally()
        started = time.monotonic()
        for number in range(count):
            rows, lost, fault = one(name, case, seed, number, folder)
            tally.injected += 1
            tally.survived += not fault
            tally.rows += rows
            tally.rows_lost += lost
            if fault:
                tally.faults.append(fault)
        tally.seconds = time.monotonic() - started
        found[name] = tally
    return found


def report(found: dict[str, Tally]) -> str:
    lines = [f"{'kind':<14} {'cases':>7} {'survived':>9} {'rows in':>8} {'lost':>5} {'seconds':>8}"]
    for name, t in found.items():
        lines.append(f"{name:<14} {t.injected:>7} {t.survived:>9} {t.rows:>8} {t.rows_lost:>5} {t.seconds:>8.1f}")
    total = sum(t.injected for t in found.values())
    survived = sum(t.survived for t in found.values())
    lines.append(f"{total} generated cases, {survived} survived, {sum(t.rows_lost for t in found.values())} rows lost")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("total", type=int, nargs="?", default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one kind")
    parser.add_argument("--case", type=int, help="one number of that kind, with its traceback")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if given.case is not None:
            warnings.simplefilter("ignore")
            print(cases()[given.only].run(generator("fuzz", given.only, given.seed, given.case), Path(scratch)))
            return 0
        if given.only:
            case = cases()[given.only]
            faults = [one(given.only, case, given.seed, n, Path(scratch))[2] for n in range(given.total)]
            print("\n".join(filter(None, faults)))
            return int(any(faults))
        found = fuzz(given.total, given.seed, Path(scratch))
    for tally in found.values():
        print("\n".join(tally.faults[:20]))
    print(report(found))
    return int(any(t.faults for t in found.values()))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from fuzz.harness import main as same_module_as_the_cases

    sys.exit(same_module_as_the_cases())
