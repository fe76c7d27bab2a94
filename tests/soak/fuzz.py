"""Hostile files and configurations, 50,000 of them: the cases of ``tests/fuzz``, counted as faults."""

from __future__ import annotations

from pathlib import Path

from fuzz.harness import cases, fuzz
from soak.table import Row

CASES = 50_000


def run(out: Path, seed: int, scale: float) -> list[Row]:
    out.mkdir(parents=True, exist_ok=True)
    found = fuzz(max(round(CASES * scale), 200), seed, out)
    for tally in found.values():
        for fault in tally.faults[:20]:
            print(fault)
    kinds = cases()
    return [
        # Rows exist only where records are read.
        Row("fuzz", kinds[name].fault, t.injected, t.survived, t.rows_lost if t.rows else None, None, t.seconds)
        for name, t in found.items()
    ]
