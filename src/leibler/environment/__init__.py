"""Multi-turn environments of text: the interface, a small world, an adapter.

`leibler.environment.play` plays them with models; nothing else here imports a tensor library.
"""

from __future__ import annotations

from leibler.environment.base import (
    Environment,
    Outcome,
    Played,
    Session,
    check_environment,
    replay,
)
from leibler.environment.gymnasium import GymnasiumText
from leibler.environment.registry import environments, get
from leibler.environment.textworld import TextWorld

__all__ = [
    "Environment",
    "GymnasiumText",
    "Outcome",
    "Played",
    "Session",
    "TextWorld",
    "check_environment",
    "environments",
    "get",
    "replay",
]
