"""``leibler report`` and ``leibler demo``."""

from __future__ import annotations

import sys
from pathlib import Path

from leibler.errors import RunError


def report_command(run_dir: Path, open_it: bool) -> None:
    """Write the report of a run, print where it is, and show it on request."""
    from leibler.measure.report import write_report

    page = write_report(run_dir)
    print(page)
    if open_it:
        import webbrowser

        if not webbrowser.open(page.resolve().as_uri()):
            print(f"no browser was found; open {page.resolve()} in one", file=sys.stderr)


def demo_command(out: Path, scale: float) -> None:
    """Run the demonstration.

    Raises:
        RunError: the scale is not positive, or the directory holds something else.
    """
    if not scale > 0:
        raise RunError(f"--steps-scale={scale} must be greater than 0.")
    from leibler.demo import Size, run_demo

    run_demo(out, Size().scaled(scale))
