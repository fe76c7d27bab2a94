"""How a command is registered: an example under its help, Ctrl-C with its exit status."""

from __future__ import annotations

from functools import wraps
from typing import Any

import typer

from leibler.cli import INTERRUPTED


def command(to: typer.Typer, name: str, example: str, runs_models: bool = False) -> Any:
    """Register a command with an example under its help; Ctrl-C in it exits with 130."""

    def register(function: Any) -> Any:
        @wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if runs_models:
                from leibler import memory

                memory.keep()
            try:
                return function(*args, **kwargs)
            except KeyboardInterrupt:
                typer.echo("interrupted", err=True)
                raise typer.Exit(INTERRUPTED) from None

        lines = "\n".join(f"  {line}" for line in example.strip().splitlines())
        # \b keeps the lines of an example as they are
        to.command(name, epilog=f"\b\nExample:\n{lines}")(guarded)
        return function

    return register
