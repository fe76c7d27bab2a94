"""What is named on the command line with its knobs: ``task:addition:digits=3``, ``env:textworld:rooms=6``."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, ClassVar

from leibler.errors import DataError


class Named:
    """A dataclass with a name and defaults, which its specification as text makes again."""

    family: ClassVar[str]
    name: ClassVar[str]

    def spec(self, **more: object) -> str:
        """The specification that makes this again: its name, the knobs that differ from their defaults, ``more``.

        Examples:
            >>> from leibler.data import Addition
            >>> Addition(digits=3).spec()
            'task:addition:digits=3'
        """
        found: Any = fields(self) if is_dataclass(self) else ()
        knobs = [(f.name, getattr(self, f.name)) for f in found if getattr(self, f.name) != f.default]
        pairs = [*knobs, *more.items()]
        text = ",".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in pairs)
        return f"{self.family}:{self.name}" + (f":{text}" if text else "")

    def _require(self, knob: str, low: int, high: int) -> None:
        value = getattr(self, knob)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise DataError(
                f"{self.family}:{self.name} cannot take {knob}={value}; give a whole number from {low} to {high}."
            )
