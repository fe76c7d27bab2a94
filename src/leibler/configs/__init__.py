"""Configuration files of Accelerate for several processes, to be used as they are or copied.

Examples:
    >>> from leibler import configs
    >>> configs.names()
    ('ddp', 'ddp_cpu', 'fsdp2', 'fsdp2_cpu')
    >>> configs.path("fsdp2").name
    'fsdp2.yaml'
"""

from __future__ import annotations

import difflib
from pathlib import Path

from leibler.errors import RunError

HERE = Path(__file__).parent


def names() -> tuple[str, ...]:
    """The files that are shipped, by name."""
    return tuple(sorted(p.stem for p in HERE.glob("*.yaml")))


def path(name: str) -> Path:
    """Where the file of a name lies.

    Raises:
        RunError: an unknown name.
    """
    if name not in names():
        near = difflib.get_close_matches(name, names(), n=1)
        raise RunError(
            f"there is no configuration {name!r}; {f'did you mean {near[0]}? ' if near else ''}"
            f"There are: {', '.join(names())}."
        )
    return HERE / f"{name}.yaml"
