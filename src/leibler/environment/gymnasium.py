"""Environments that follow Gymnasium's interface and speak text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from leibler.data.hashing import digest
from leibler.data.tasks import HELDOUT_ONE_IN, Part
from leibler.environment.base import Environment, Outcome, Session


@dataclass(frozen=True)
class GymnasiumText(Environment):
    """Any text environment with Gymnasium's ``reset(seed=...)`` and ``step(action)``; a task is a seed.

    Args:
        make: makes one: a function or a class.
        length: the most turns of an episode.
        title: its name; where an installed package offers it as an environment, the name there.

    Examples:
        >>> class Echo:
        ...     def reset(self, *, seed=None):
        ...         self.word = "ab"[seed % 2]
        ...         return f"say {self.word}", {}
        ...     def step(self, action):
        ...         right = action == self.word
        ...         return "well done" if right else "no", float(right), right, False, {}
        >>> game = GymnasiumText(Echo, length=3)
        >>> session = game.session()
        >>> session.reset("4"), session.step("a")
        ('say a', Outcome(observation='well done', reward=1.0, done=True))
    """

    name: ClassVar[str] = "gymnasium"
    make: Callable[[], Any]
    length: int
    title: str = "text"

    @property
    def turns(self) -> int:
        return self.length

    def spec(self, **more: object) -> str:
        return f"env:{self.title}" + (":" + ",".join(f"{k}={v}" for k, v in more.items()) if more else "")

    def session(self) -> Session:
        return _Wrapped(self.make())

    def tasks(self, n: int, seed: int = 0, part: Part = "all") -> list[str]:
        """Seeds below 2^31; those of the held-out part are the multiples of five."""
        numbers = (digest("gymnasium", seed, row) % (2**31 - HELDOUT_ONE_IN) for row in range(n))
        if part == "all":
            return [str(number) for number in numbers]
        held = [number - number % HELDOUT_ONE_IN for number in numbers]
        return [str(number if part == "heldout" else number + 1 + number // 5 % 4) for number in held]


class _Wrapped(Session):
    def __init__(self, game: Any) -> None:
        self.game = game

    def reset(self, task: str) -> str:
        observation, _ = self.game.reset(seed=int(task))
        return observation

    def step(self, action: str) -> Outcome:
        observation, reward, terminated, truncated, _ = self.game.step(action)
        return Outcome(observation, float(reward), bool(terminated or truncated))

    def close(self) -> None:
        getattr(self.game, "close", lambda: None)()
