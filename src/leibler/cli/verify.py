"""``leibler verify``."""

from __future__ import annotations

import json
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import Any

from leibler import claims
from leibler.cli.output import table

Result = dict[str, Any]
INDENT = " " * 7


def verify_command(slugs: list[str], family: str | None, full: bool, as_json: bool) -> bool:
    """Run claims and print them; True if all hold.

    Progress goes to standard error, one line per claim, so that standard output is only the result. Interrupted, it
    prints what is done so far.
    """
    todo = claims.chosen(slugs, family, full)
    # A fast claim is over before its progress could be read.
    aloud = full or sys.stderr.isatty()
    results: list[Result] = []
    try:
        for claim in todo:
            if aloud:
                progress = f"[{len(results) + 1}/{len(todo)}{_left(todo, results)}]"
                print(f"{progress} {claim.slug}: {claim.text} ...", file=sys.stderr, flush=True)
            results.append(claim.run())
            if not as_json:
                print(_line(results[-1]), flush=True)
    finally:  # after Ctrl-C too
        if as_json:
            print(json.dumps(results, indent=2), flush=True)
        else:
            print(_summary(todo, results), flush=True)
    return all(r["holds"] for r in results)


def _left(todo: Sequence[claims.Claim], results: Sequence[Result]) -> str:
    """The time left, if the claims to come take as long as those of their kind so far; empty where none of it ran."""
    total = 0.0
    for slow in (False, True):
        seconds = [r["seconds"] for claim, r in zip(todo, results) if claim.full == slow]
        coming = sum(claim.full == slow for claim in todo[len(results) :])
        if coming and not seconds:
            return ""
        total += coming * sum(seconds) / max(len(seconds), 1)
    minutes, seconds = divmod(round(total), 60)
    return f", about {minutes}:{seconds:02d} left"


def _line(result: Result) -> str:
    verdict = "holds" if result["holds"] else "FAILS"
    head = _wrapped(f"{result['slug']}: {result['claim']} ({result['seconds']:.1f} s)")
    rest = [INDENT + _wrapped(f"{name} {result[name]}") for name in ("observed", "expected")]
    return "\n".join([f"{verdict}  {head}", *rest])


def _wrapped(text: str) -> str:
    """Lines as wide as the terminal, the first without indent; one line where there is no terminal."""
    if not sys.stdout.isatty():
        return text
    width = max(shutil.get_terminal_size().columns, 40)
    return textwrap.fill(text, width, initial_indent=INDENT, subsequent_indent=INDENT).lstrip()


def _summary(todo: Sequence[claims.Claim], results: Sequence[Result]) -> str:
    """How many hold, and of several methods, each one's; after an interruption, how far it came."""
    methods = list(dict.fromkeys(r["slug"] for r in results))
    held = sum(r["holds"] for r in results)
    line = f"{held} of {len(results)} claims about {len(methods)} methods hold"
    line += f" ({sum(r['seconds'] for r in results):.1f} s)"
    if len(results) < len(todo):
        line += f"; interrupted with {len(todo) - len(results)} still to run"
    if len(methods) < 2:
        return line
    rows = []
    for slug in methods:
        mine = [(claim, r) for claim, r in zip(todo, results) if r["slug"] == slug]
        slow = sum(claim.full for claim, _ in mine)
        fails = sum(not r["holds"] for _, r in mine)
        seconds = sum(r["seconds"] for _, r in mine)
        rows.append([slug, len(mine) - slow, slow, f"{seconds:.1f}", f"{fails} fail" if fails else "all hold"])
    return f"\n{table(['method', 'fast', 'full', 'seconds', 'verdict'], rows)}\n\n{line}"
