"""Environments by name: those of the library, and those of installed packages."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from leibler.environment.base import Environment
from leibler.environment.textworld import TextWorld
from leibler.errors import DataError

GROUP = "leibler.environments"
"""The entry points by which an installed package names its environments."""


def environments() -> dict[str, Callable[..., Environment]]:
    """What makes each environment, by name; an installed package's is imported when it is looked at.

    Examples:
        >>> "textworld" in environments()
        True
    """
    points = _Loaded({point.name: point for point in entry_points(group=GROUP)})
    points["textworld"] = TextWorld
    return points


class _Loaded(dict[str, Any]):
    """Entry points are imported one by one: a broken package hides no other."""

    def __getitem__(self, name: str) -> Callable[..., Environment]:
        found = super().__getitem__(name)
        if not isinstance(found, EntryPoint):
            return found
        try:
            return found.load()
        except Exception as error:
            raise DataError(
                f"the environment {name!r} of {found.value} cannot be imported ({type(error).__name__}: {error}); mend "
                "or remove that package."
            ) from error


def get(spec: str) -> Environment:
    """The environment of a specification such as ``env:textworld:rooms=8``.

    Raises:
        DataError: an unknown name or knob, or a value that does not fit.

    Examples:
        >>> get("env:textworld:rooms=8").rooms
        8
    """
    from leibler.data.spec import configured

    if not spec.startswith("env:"):
        raise DataError(f"{spec[:60]!r} names no environment; write env:NAME, as in env:textworld:rooms=8.")
    made, values = configured(spec)
    return made(**values)
