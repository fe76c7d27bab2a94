"""What a section of the soak reports, and the one table at its end.

A section is a module of this folder with ``run(out: Path, seed: int, scale: float) -> list[Row]``: it injects faults
under ``out``, with randomness derived from ``seed``, ``scale`` times as many as a full soak, and says what became of
each kind. A section that finds a fault it did not survive still returns its rows; the soak then fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Row:
    """One kind of fault.

    Attributes:
        section: the part of the soak.
        fault: what was done to the run.
        injected, survived: how often, and how often the run (or the reader) went on as promised.
        rows_lost: records or log lines that were neither used nor set aside; None where the fault touches none.
        bits_different: bits in which what was written differs from the undisturbed run; None where not compared.
        seconds: wall time.
    """

    section: str
    fault: str
    injected: int
    survived: int
    rows_lost: int | None = None
    bits_different: int | None = None
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return self.survived == self.injected > 0 and not self.rows_lost and not self.bits_different


class Total(NamedTuple):
    injected: int
    survived: int
    rows_lost: int
    bits_different: int


def total(rows: Sequence[Row]) -> Total:
    return Total(
        sum(r.injected for r in rows),
        sum(r.survived for r in rows),
        sum(r.rows_lost or 0 for r in rows),
        sum(r.bits_different or 0 for r in rows),
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table; it reads in a terminal and on a page."""
    lines = [
        "| Section | Fault | Injected | Survived | Rows lost | Bits different |",
        "|---|---|---:|---:|---:|---:|",
    ]

    def shown(number: int | None) -> str:
        return "" if number is None else f"{number:,}"

    for r in rows:
        cells = (shown(n) for n in (r.injected, r.survived, r.rows_lost, r.bits_different))
        lines.append(f"| {r.section} | {r.fault} | {' | '.join(cells)} |")
    lines.append(f"| **All** | | {' | '.join(f'**{n:,}**' for n in total(rows))} |")
    return "\n".join(lines)


def different_bits(one: bytes, two: bytes) -> int:
    """Bits in which two byte strings differ; those that one has more of count in full."""
    both = min(len(one), len(two))
    changed = int.from_bytes(one[:both]) ^ int.from_bytes(two[:both])
    return changed.bit_count() + 8 * abs(len(one) - len(two))
