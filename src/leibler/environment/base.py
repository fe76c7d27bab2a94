"""The interface of a multi-turn environment: text goes in, text comes out, a number at the end."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from leibler.data.knobs import Named
from leibler.data.records import Dataset, Record
from leibler.data.tasks import MOST, PARTS, Part
from leibler.errors import DataError, RunError


@dataclass(frozen=True)
class Outcome:
    """What an action led to.

    Args:
        observation: what the player reads next.
        reward: a finite number; an episode's reward is their sum.
        done: the episode is over.
    """

    observation: str
    reward: float = 0.0
    done: bool = False


class Session(ABC):
    """One episode under way: what a Gymnasium environment is to its library. It may hold a process or a connection."""

    @abstractmethod
    def reset(self, task: str) -> str:
        """Begin a task anew; the first observation."""

    @abstractmethod
    def step(self, action: str) -> Outcome:
        """Play one action, given without surrounding blanks. What makes no sense is answered, never an exception."""

    def close(self) -> None:  # noqa: B027 - most sessions hold nothing
        """Let go of what the session holds."""


class Environment(Named, ABC):
    """A family of tasks that are played in turns: a specification, usually a frozen dataclass of knobs.

    It must be hashable and of values that can be copied, and a session must be a function of its task and the actions
    so far: the same actions lead to the same observations, in any process. `check_environment` looks whether it is.

    A dialogue reads ``opening(observation)``, action, ``reply(observation)``, action, ...; each action is followed by
    the tokenizer's end token, which belongs to the player. The environment's texts carry no loss.
    """

    family: ClassVar[str] = "env"
    cue: ClassVar[str] = "\n>"
    """Ends every observation: the player's turn. (No blank after it: tokenizers join a blank to the next word.)"""

    @property
    @abstractmethod
    def turns(self) -> int:
        """The most turns of an episode; one that is not over then has failed."""

    @abstractmethod
    def session(self) -> Session:
        """A new session."""

    @abstractmethod
    def tasks(self, n: int, seed: int = 0, part: Part = "all") -> list[str]:
        """``n`` tasks derived from the seed; ``train`` and ``heldout`` share none, for any two seeds.

        A task is text that `Session.reset` understands; a longer list begins with the shorter one.
        """

    def script(self, task: str) -> Sequence[str] | None:
        """Actions that solve the task, by a scripted teacher; None where there is none."""
        return None

    def advance(self, sessions: Sequence[Session], actions: Sequence[str]) -> list[Outcome]:
        """One action in each session. Overwrite it where a batch is cheaper (one request to a server, threads)."""
        return [session.step(action) for session, action in zip(sessions, actions, strict=True)]

    def opening(self, observation: str) -> str:
        """The text before the first action."""
        return observation + self.cue

    def reply(self, observation: str) -> str:
        """The text between two actions."""
        return f"\n{observation}{self.cue}"

    def dataset(self, n: int, seed: int = 0, part: Part = "all") -> Dataset:
        """Tasks as records: ``prompt`` is the opening text, ``environment`` and ``task`` say what is played.

        Where there is a script, its first action is the ``completion`` and ``turns`` holds the later ones, each with
        the text before it: a demonstration, which recipes on data learn as one dialogue.

        Raises:
            DataError: ``n`` is not positive or too large, or the part is unknown.
        """
        if not 1 <= n <= MOST:
            raise DataError(f"{self.spec()} was asked for n={n} records; ask for 1 to {MOST:,}.")
        if part not in PARTS:
            raise DataError(f"{self.spec()} has no part {part!r}; choose one of {', '.join(PARTS)}.")
        more = {"n": n, "seed": seed} | ({} if part == "all" else {"part": part})
        source = self.spec(seed=seed)
        records = [self.record(task, f"{source}:{i + 1}") for i, task in enumerate(self.tasks(n, seed, part))]
        return Dataset(tuple(records), name=self.spec(**more))

    def record(self, task: str, source: str = "") -> Record:
        """One task as a record of `dataset`."""
        extra = {"environment": self.spec(), "task": task}
        actions = self.script(task)
        played = replay(self, task, actions or ())
        opening = self.opening(played.observations[0])
        if not actions:
            return Record(opening, source=source, extra=extra)
        later = [[self.reply(text), a] for text, a in zip(played.observations[1:], actions[1:])]
        return Record(opening, completion=actions[0], source=source, extra={**extra, "turns": later})


@dataclass(frozen=True)
class Played:
    """An episode as text.

    Args:
        observations: the first one, then one for each action.
        reward: the sum of the rewards.
        done: the environment ended it.
    """

    observations: tuple[str, ...]
    reward: float
    done: bool


def replay(environment: Environment, task: str, actions: Sequence[str]) -> Played:
    """What the actions lead to, up to the end of the episode.

    Raises:
        DataError: actions are left over when the episode is over.
        RunError: the environment fails.

    Examples:
        >>> from leibler.environment import TextWorld
        >>> world = TextWorld()
        >>> task = world.tasks(1)[0]
        >>> replay(world, task, world.script(task)).reward
        1.0
    """
    session = environment.session()
    try:
        observations, reward, done = [begin(environment, session, task)], 0.0, False
        for number, action in enumerate(actions):
            if done:
                raise DataError(
                    f"the demonstration of {task!r} has {len(actions)} actions, but {environment.spec()} ends it after "
                    f"{number}; record it again."
                )
            (outcome,) = advance(environment, [session], [action])
            observations.append(outcome.observation)
            reward, done = reward + outcome.reward, outcome.done
        return Played(tuple(observations), reward, done)
    finally:
        session.close()


def begin(environment: Environment, session: Session, task: str) -> str:
    """The first observation of a task; a failure of the environment is told with the task."""
    try:
        observation = session.reset(task)
    except (DataError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise RunError(_failed(environment, f"reset({task!r:.80})", error)) from error
    if not isinstance(observation, str):
        raise RunError(f"{environment.spec()} gave {observation!r:.60} as the first observation; return text.")
    return observation


def advance(environment: Environment, sessions: Sequence[Session], actions: Sequence[str]) -> list[Outcome]:
    """One action in each session, with what comes back looked at: text, a finite reward, true or false."""
    try:
        outcomes = environment.advance(sessions, actions)
    except (DataError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise RunError(
            _failed(environment, f"one of the actions {', '.join(map(repr, actions))}"[:200], error)
        ) from error
    if len(outcomes) != len(actions):
        raise RunError(
            f"{environment.spec()} gave {len(outcomes)} outcomes for {len(actions)} actions; mend advance()."
        )
    for action, outcome in zip(actions, outcomes, strict=True):
        if not isinstance(outcome.observation, str) or not math.isfinite(outcome.reward):
            raise RunError(
                f"{environment.spec()} answered {action!r:.40} with {outcome!r:.120}; give text and a finite reward."
            )
    return outcomes


def _failed(environment: Environment, what: str, error: Exception) -> str:
    return f"{environment.spec()} failed at {what}: {type(error).__name__}: {error}; an environment answers every text."


def check_environment(environment: Environment, n: int = 8, seed: int = 0) -> None:
    """Play scripts and nonsense to see whether an environment keeps what `Environment` promises.

    Tasks and sessions are the same a second time, in a copy, and when sessions are played together; parts share no
    task; scripts solve their tasks within ``turns``.

    Raises:
        DataError: in one sentence, the first promise that is broken.

    Examples:
        >>> from leibler.environment import TextWorld
        >>> check_environment(TextWorld(rooms=4), n=3)
    """

    def broken(what: str) -> DataError:
        return DataError(f"{environment.spec()} {what}.")

    try:
        twin = copy.deepcopy(environment)
        hash(environment)
    except TypeError as error:
        raise broken(f"cannot be copied and hashed ({error}); make it a frozen dataclass of plain values") from error
    tasks = environment.tasks(n, seed, "train")
    if len(tasks) != n or not all(isinstance(task, str) for task in tasks):
        raise broken(f"does not give {n} tasks as text")
    if tasks != twin.tasks(n, seed, "train") or tasks[: n // 2] != environment.tasks(n // 2, seed, "train"):
        raise broken("gives other tasks the second time, or another beginning for a longer list")
    if set(tasks) & set(environment.tasks(n, seed + 1, "heldout")):
        raise broken("has a task in both parts")
    for task in tasks:
        script = environment.script(task)
        actions = list(script or ()) or ["?", "", "?"]
        once, again = replay(environment, task, actions), replay(twin, task, actions)
        if once != again:
            raise broken(f"does not replay {task!r}: the same actions led elsewhere")
        if script is not None and not (once.done and once.reward > 0 and len(script) <= environment.turns):
            raise broken(f"has a script that does not solve {task!r} within {environment.turns} turns")
    sessions = [environment.session() for _ in tasks]
    for session, task in zip(sessions, tasks, strict=True):
        begin(environment, session, task)
    together = advance(environment, sessions, ["?"] * n)
    if [o.observation for o in together] != [replay(environment, t, ["?"]).observations[1] for t in tasks]:
        raise broken("mixes up sessions that are played together")
    for session in sessions:
        session.close()
