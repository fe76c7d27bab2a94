"""Multi-turn environments of text: the interface, a small world, an adapter.

No module here imports a tensor library before a model plays.
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
from leibler.environment.playing import Episode, Start, play
from leibler.environment.registry import environments, get
from leibler.environment.textworld import TextWorld

__all__ = [
    "Environment",
    "Episode",
    "GymnasiumText",
    "Outcome",
    "Played",
    "Session",
    "Start",
    "TextWorld",
    "check_environment",
    "environments",
    "get",
    "play",
    "replay",
]
