"""A small world of text: rooms, keys, doors, things, and holes that nobody comes out of.

A world is a tree of rooms on a grid. The player looks for one thing; other things end the episode when taken. Doors
on the way are locked, and each key lies before its door. What has been seen is marked in the observation (``new``,
``old``, ``back``), so that a player needs to read, not to draw maps. A hole leads to a pit without exit: a state that
no demonstration visits, as are the answers to actions that make no sense.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from leibler.data.hashing import digest, generator
from leibler.data.tasks import Part, held_out
from leibler.environment.base import Environment, Outcome, Session
from leibler.errors import DataError

ROOMS = (
    "hall", "attic", "cellar", "kitchen", "study", "tower", "garden", "stable", "chapel", "pantry", "bath", "porch",
    "forge", "vault", "well", "crypt",
)  # fmt: skip
THINGS = ("lamp", "coin", "ring", "book", "cup", "map", "bell", "drum")
COLOURS = ("red", "blue", "green", "gold", "black", "white")
MOVES = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}
_ATTEMPTS = 200
"""Draws of one world before the knobs count as impossible."""
_NUMBERS = 10**9

Cell = tuple[int, int]


@dataclass(frozen=True)
class World:
    """A world as it is before anybody moves; cells are places on a grid, the player begins at (0, 0)."""

    goal: str
    names: dict[Cell, str]
    things: dict[Cell, tuple[str, ...]]
    """What lies in a room: things by their name, keys as ``red key``."""
    exits: dict[Cell, dict[str, Cell]]
    """Neighbouring rooms by direction."""
    doors: dict[Cell, str]
    """The colour of the door that leads into a room, where one does."""
    parents: dict[Cell, Cell]
    holes: dict[Cell, tuple[str, ...]]
    """Directions in which there is a hole."""


@dataclass(frozen=True)
class TextWorld(Environment):
    """Find one thing in a house of text.

    Args:
        rooms: how many rooms; the size.
        depth: moves from the start to the thing on the shortest way.
        doors: locked doors on that way, each with a key before it.
        objects: other things; whoever takes one has lost.
        holes: ways into a pit without exit.
        limit: turns of an episode; 0: a little more than a script may need.

    Examples:
        >>> world = TextWorld(rooms=3, depth=2, doors=1, objects=1, holes=1)
        >>> task = world.tasks(1, seed=1)[0]
        >>> session = world.session()
        >>> print(session.reset(task))
        find the ring. cellar: white key; new west.
        >>> world.script(task)
        ['take white key', 'go west', 'open west', 'go west', 'take ring']
        >>> print(session.step("open west").observation)
        no. cellar: white key; new west.
    """

    name: ClassVar[str] = "textworld"
    rooms: int = 6
    depth: int = 3
    doors: int = 1
    objects: int = 2
    holes: int = 1
    limit: int = 0

    def __post_init__(self) -> None:
        self._require("rooms", 2, len(ROOMS))
        self._require("depth", 1, self.rooms - 1)
        self._require("doors", 0, min(self.depth, len(COLOURS)))
        self._require("objects", 0, len(THINGS) - 1)
        self._require("holes", 0, self.rooms)
        self._require("limit", 0, 10_000)

    @property
    def alphabet(self) -> str:
        """Every character of its texts and of actions that make sense."""
        words = (*ROOMS, *THINGS, *COLOURS, *MOVES, "find the. no take open go pit have key door hole new old back way")
        return "".join(sorted({*"".join(words), *" .:;,\n>"}))

    @property
    def turns(self) -> int:
        # Every room but the first is entered and left at most once, every key taken, every door opened.
        return self.limit or 2 * (self.rooms + self.doors) + 2

    def session(self) -> House:
        return House(self)

    def tasks(self, n: int, seed: int = 0, part: Part = "all") -> list[str]:
        """Numbers of worlds, as text. Held-out tasks are all different worlds.

        Raises:
            DataError: there are too few different worlds.
        """
        found: list[str] = []
        seen: set[World | str] = set()
        for row in range(n):
            for attempt in range(_ATTEMPTS):
                number = digest("textworld", seed, row, attempt) % _NUMBERS
                whole = repr(self.world(number))
                if part == "all" or (
                    held_out(whole) == (part == "heldout") and not (part == "heldout" and whole in seen)
                ):
                    break
            else:
                raise DataError(
                    f"{self.spec()} has too few different worlds for {n} tasks (part {part}); ask for fewer."
                )
            seen.add(whole)
            found.append(str(number))
        return found

    def script(self, task: str) -> list[str]:
        """Takes the thing, else a key, else opens a door, else goes where nobody was, else back: never into a hole."""
        house, actions = self.session(), []
        house.reset(task)
        done = False
        while not done:
            actions.append(house.advice())
            done = house.step(actions[-1]).done
        return actions

    def world(self, number: int) -> World:
        """The world of a number."""
        for attempt in range(_ATTEMPTS):
            made = self._drawn(generator("textworld/world", number, attempt))
            if made is not None:
                return made
        raise DataError(f"{self.spec()} fits no world onto its grid; ask for fewer holes or rooms.")

    def _drawn(self, draw: random.Random) -> World | None:
        """A random world, or None where the grid left no room."""
        way = [(0, 0)]
        parents: dict[Cell, Cell] = {}
        while len(parents) < self.rooms - 1:
            on_way = len(way) <= self.depth
            start = way[-1] if on_way else draw.choice([*way, *parents])
            free = [cell for cell in _around(start) if cell != (0, 0) and cell not in parents]
            if not free:
                if on_way:
                    return None
                continue
            cell = draw.choice(free)
            parents[cell] = start
            if on_way:
                way.append(cell)
        cells = [(0, 0), *parents]
        spots = [
            (cell, move)
            for cell in cells
            for move, other in zip(MOVES, _around(cell), strict=True)
            if other != (0, 0) and other not in parents
        ]
        if len(spots) < self.holes:
            return None
        holes = draw.sample(spots, self.holes)
        goal, *others = draw.sample(THINGS, 1 + self.objects)
        locked = sorted(draw.sample(range(1, self.depth + 1), self.doors))
        colours = draw.sample(COLOURS, self.doors)
        lying = [(draw.choice(way[:at]), f"{colour} key") for at, colour in zip(locked, colours, strict=True)]
        lying += [(draw.choice(cells), thing) for thing in others] + [(way[-1], goal)]
        draw.shuffle(lying)
        joined = [*parents.items(), *((b, a) for a, b in parents.items())]
        return World(
            goal,
            dict(zip(cells, draw.sample(ROOMS, self.rooms), strict=True)),
            {cell: tuple(thing for place, thing in lying if place == cell) for cell in cells},
            {cell: {m: o for m, o in zip(MOVES, _around(cell), strict=True) if (cell, o) in joined} for cell in cells},
            {way[at]: colour for at, colour in zip(locked, colours, strict=True)},
            parents,
            {cell: tuple(move for place, move in holes if place == cell) for cell in cells},
        )


def _around(cell: Cell) -> list[Cell]:
    """The neighbours, in the order of `MOVES`."""
    return [(cell[0] + x, cell[1] + y) for x, y in MOVES.values()]


class House(Session):
    """A `TextWorld` being played."""

    def __init__(self, environment: TextWorld) -> None:
        self.environment = environment

    def reset(self, task: str) -> str:
        if not (task.isascii() and task.isdigit() and int(task) < _NUMBERS):
            raise DataError(f"{task!r:.60} is no task of env:textworld; take one of its tasks().")
        self.world = self.environment.world(int(task))
        self.at: Cell | None = (0, 0)
        self.seen = {(0, 0)}
        self.opened: set[Cell] = set()
        self.lying = {cell: list(things) for cell, things in self.world.things.items()}
        self.keys: list[str] = []
        return f"find the {self.world.goal}. {self._look()}"

    def step(self, action: str) -> Outcome:
        verb, _, what = " ".join(action.casefold().split()).partition(" ")
        if self.at is not None and verb == "take" and what in self.lying[self.at]:
            return self._take(what)
        if self.at is not None and verb == "go" and what in self.world.holes[self.at]:
            self.at = None
            return Outcome(self._look())
        other = None if self.at is None else self.world.exits[self.at].get(what)
        if verb == "go" and other is not None and not self._locked(other):
            self.at = other
            self.seen.add(other)
            return Outcome(self._look())
        if verb == "open" and other is not None and self._locked(other) and self.world.doors[other] in self.keys:
            self.opened.add(other)
            return Outcome(self._look())
        return Outcome(f"no. {self._look()}")

    def advice(self) -> str:
        """What the scripted teacher does here, from what can be read."""
        assert self.at is not None
        here = self.lying[self.at]
        for thing in (t for t in here if t == self.world.goal or t.endswith(" key")):
            return f"take {self.world.goal if self.world.goal in here else thing}"
        marks = dict(self._exits())
        for move, mark in marks.items():
            if mark.removesuffix(" door") in self.keys:
                return f"open {move}"
        move = next((m for wanted in ("new", "back") for m, mark in marks.items() if mark == wanted), None)
        assert move is not None, "the script came to an end without the thing"
        return f"go {move}"

    def _take(self, thing: str) -> Outcome:
        assert self.at is not None
        if thing == self.world.goal:
            return Outcome(f"have {thing}.", 1.0, True)
        if not thing.endswith(" key"):
            return Outcome(f"no {self.world.goal}.", 0.0, True)
        self.lying[self.at].remove(thing)
        self.keys.append(thing.removesuffix(" key"))
        return Outcome(self._look())

    def _locked(self, cell: Cell) -> bool:
        # A door is met on the way out only: who stands behind it has opened it.
        return cell in self.world.doors and cell not in self.opened

    def _exits(self) -> Iterator[tuple[str, str]]:
        """Every direction that leads somewhere, with its mark."""
        assert self.at is not None
        for move in MOVES:
            other = self.world.exits[self.at].get(move)
            if move in self.world.holes[self.at]:
                yield move, "hole"
            elif other is None:
                continue
            elif self._locked(other):
                yield move, f"{self.world.doors[other]} door"
            elif self.world.parents.get(self.at) == other:
                yield move, "back"
            else:
                yield move, "old" if other in self.seen else "new"

    def _look(self) -> str:
        if self.at is None:
            return "pit."
        here = f"{self.world.names[self.at]}:"
        parts = [" " + ", ".join(self.lying[self.at])] if self.lying[self.at] else []
        parts += [" have " + ", ".join(f"{key} key" for key in self.keys)] if self.keys else []
        exits = [f"{mark} {move}" for move, mark in self._exits()]
        parts += [" " + ", ".join(exits)] if exits else []
        return here + ";".join(parts) + "."
