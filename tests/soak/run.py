"""The soak: faults injected into runs, one table at the end.

    python tests/soak/run.py                                  everything, at full size
    python tests/soak/run.py --only kills --scale 0.2         a part of it, smaller
    python tests/soak/run.py --write docs/reliability.md      put the table into the page, between its markers

The exit status is 0 only if every fault was survived, no row was lost and no bit differs.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SECTIONS = ("kills", "guards", "processes", "fuzz", "long_runs")
BEGIN, END = "<!-- soak: begin -->", "<!-- soak: end -->"


def sections(only: Sequence[str]) -> list[str]:
    wanted = [s for s in SECTIONS if not only or s in only]
    return [s for s in wanted if (HERE / f"{s}.py").exists()]


def write(page: Path, table: str) -> None:
    """Put the table between the markers of a page."""
    text = page.read_text(encoding="utf-8")
    before, found, rest = text.partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not (found and closed):
        raise SystemExit(f"{page} has no {BEGIN} ... {END}; add the two markers where the table belongs.")
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=(), choices=SECTIONS, help="sections to run")
    parser.add_argument("--seed", type=int, default=0, help="all randomness is derived from it")
    parser.add_argument("--scale", type=float, default=1.0, help="how many faults, relative to a full soak")
    parser.add_argument("--out", type=Path, help="keep the runs here; otherwise they are removed")
    parser.add_argument("--write", type=Path, help="a page to put the table into")
    given = parser.parse_args(arguments)

    from soak.table import Row, markdown

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        for name in sections(given.only):
            started = time.monotonic()
            print(f"soak: {name} ...", file=sys.stderr, flush=True)
            out = (given.out or Path(scratch)) / name
            out.mkdir(parents=True, exist_ok=True)
            try:
                found = importlib.import_module(f"soak.{name}").run(out, given.seed, given.scale)
            except Exception:
                # The other sections still run; this one stands in the table as not survived.
                traceback.print_exc()
                found = [Row(name, "the section itself failed", 1, 0)]
            rows += found
            seconds = time.monotonic() - started
            bad = [r.fault for r in found if not r.passed]
            print(f"soak: {name} {seconds:.0f} s{': FAILED: ' + '; '.join(bad) if bad else ''}", file=sys.stderr)
    table = markdown(rows)
    print(table)
    if given.write:
        write(given.write, table)
    return 0 if rows and all(r.passed for r in rows) else 1


if __name__ == "__main__":
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(variable, "1")
    # In place of this folder, whose `fuzz` would hide the tests' own.
    sys.path[0] = str(HERE.parent)
    raise SystemExit(main())
