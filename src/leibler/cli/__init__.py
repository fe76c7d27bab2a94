"""The command line: `main` is the ``leibler`` command.

Each command lives in a module of its own and imports what it needs when it runs, so that ``leibler --help`` and a
mistyped option answer at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from leibler.errors import LeiblerError
from leibler.safety import printable

__all__ = ["main"]

MISTAKE, INTERRUPTED = 2, 130
"""Exit statuses: a mistake that the user can mend; Ctrl-C."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    Args:
        arguments: as after ``leibler`` in a shell; by default, the process's own.

    Raises:
        SystemExit: always; status 0 when all went well, 1 when a claim does not hold, 2 for a mistake of the user
            (one sentence on standard error, no traceback), 130 after Ctrl-C.
    """
    from leibler.cli.app import app

    try:
        app(args=None if arguments is None else list(arguments), prog_name="leibler")
    except LeiblerError as error:
        # Processes started together meet most mistakes together; where they have not met, one of each machine says it.
        elsewhere = os.environ.get("LOCAL_RANK", "0") != "0" if error.elsewhere is None else error.elsewhere
        if not elsewhere:
            print(f"error: {printable(str(error))}", file=sys.stderr)
        sys.exit(MISTAKE)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    sys.exit(0)
