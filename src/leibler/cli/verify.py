"""``leibler verify``."""

from __future__ import annotations

import json
import sys
import textwrap
from typing import Any

from leibler import claims


def verify_command(slugs: list[str], family: str | None, full: bool, as_json: bool) -> bool:
    """Run claims and print them; True if all hold.

    Progress goes to standard error, one line per claim, so that standard output is only the result.
    """

    def before(claim: claims.Claim) -> None:
        print(f"{claim.slug}: {claim.text} ...", file=sys.stderr, flush=True)

    def after(result: dict[str, Any]) -> None:
        if not as_json:
            print(_line(result), flush=True)

    # A fast claim is over before its progress could be read.
    results = claims.run(slugs, family, full, before=before if full or sys.stderr.isatty() else None, after=after)
    held = sum(r["holds"] for r in results)
    if as_json:
        print(json.dumps(results, indent=2))
    else:
        seconds = sum(r["seconds"] for r in results)
        methods = len({r["slug"] for r in results})
        print(f"{held} of {len(results)} claims about {methods} methods hold ({seconds:.1f} s)")
    return held == len(results)


def _line(result: dict[str, Any]) -> str:
    verdict = "holds" if result["holds"] else "FAILS"
    head = f"{verdict}  {result['slug']}: {result['claim']} ({result['seconds']:.1f} s)"
    found = f"observed {result['observed']}; expected {result['expected']}"
    return f"{head}\n{textwrap.indent(found, '       ')}"
