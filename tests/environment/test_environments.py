"""The interface, the text world, the adapter: what is promised of every environment is looked at."""

from __future__ import annotations

import pickle
import subprocess
import sys
import threading
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from environment.made import Counter, Sums
from leibler.data import load
from leibler.environment import (
    Environment,
    GymnasiumText,
    Outcome,
    TextWorld,
    check_environment,
    environments,
    get,
    registry,
    replay,
)
from leibler.errors import DataError, RunError

WORLDS = [
    TextWorld(),
    TextWorld(rooms=2, depth=1, doors=0, objects=0, holes=0),
    TextWorld(rooms=16, depth=8, doors=6, objects=7, holes=5),
]


class Guess:
    """A text environment as Gymnasium has it; it knows nothing of this library."""

    closed = 0

    def reset(self, *, seed: int | None = None) -> tuple[str, dict[str, Any]]:
        assert seed is not None
        self.number, self.left = seed % 10, 3
        return "guess a digit", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        right = action == str(self.number)
        return ("right" if right else "no"), float(right), right, self.left == 0, {}

    def close(self) -> None:
        Guess.closed += 1


# ---- every environment -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("environment", [*WORLDS[:1], WORLDS[2], Sums(), GymnasiumText(Guess, 3)], ids=lambda e: e.name)
def test_promises_are_kept(environment):
    check_environment(environment, n=6)


class Forgetful(Counter):
    plays = 0

    def reset(self, task: str) -> str:
        Forgetful.plays += 1
        return f"{super().reset(task)}{Forgetful.plays}"


@dataclass(frozen=True)
class Fickle(Sums):
    def session(self):
        return Forgetful(self.length)


@dataclass(frozen=True)
class Useless(Sums):
    def script(self, task: str):
        return ["1", *super().script(task)[1:]]


@dataclass(frozen=True)
class Slow(Sums):
    @property
    def turns(self) -> int:
        return self.length - 1


@dataclass(frozen=True)
class Leaky(Sums):
    def tasks(self, n, seed=0, part="all"):
        return super().tasks(n, seed)


@dataclass(frozen=True)
class Mixed(Sums):
    def advance(self, sessions, actions):
        return super().advance(sessions, actions)[::-1]


@pytest.mark.parametrize(
    ("environment", "complaint"),
    [
        (Fickle(), "does not replay"),
        (Useless(), "does not solve"),
        (Slow(), "does not solve .* within 2 turns"),
        (Leaky(), "other tasks|both parts"),
        (Mixed(), "mixes up sessions"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_broken_promises_are_found(environment, complaint):
    with pytest.raises(DataError, match=complaint):
        check_environment(environment, n=200 if isinstance(environment, Leaky) else 6)


def test_what_cannot_be_copied_or_hashed_is_found():
    """Copies of it are played, and the episodes of equal ones together."""

    @dataclass(frozen=True)
    class Loose(Sums):
        words: list[str] = field(default_factory=list)

    @dataclass(frozen=True)
    class Holding(Sums):
        lock: Any = field(default_factory=threading.Lock)

    for environment in (Loose(), Holding()):
        with pytest.raises(DataError, match=r"cannot be copied and hashed .*make it a frozen dataclass"):
            check_environment(environment)


@dataclass(frozen=True)
class Crash(Sums):
    how: str = "raise"

    def advance(self, sessions, actions):
        if self.how == "raise":
            raise KeyError("no such room")
        if self.how == "few":
            return []
        return [Outcome("", float("nan")) if self.how == "nan" else Outcome(None) for _ in actions]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("how", "complaint"),
    [
        ("raise", "KeyError: 'no such room'"),
        ("few", "0 outcomes for 1"),
        ("nan", "finite reward"),
        ("none", "give text"),
    ],
)
def test_what_an_environment_does_wrong_is_told_with_its_name(how, complaint):
    with pytest.raises(RunError, match=rf"env:sums.*{complaint}"):
        replay(Crash(how=how), "1", ["1"])


def test_a_demonstration_of_another_environment_is_refused():
    with pytest.raises(DataError, match="has 5 actions, but env:sums ends it after 3"):
        replay(Sums(), "1", ["1"] * 5)


# ---- the text world ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", WORLDS, ids=lambda w: w.spec())
def test_the_script_solves_every_world_within_its_turns(world):
    for task in world.tasks(150, seed=3):
        script = world.script(task)
        played = replay(world, task, script)
        assert (played.reward, played.done) == (1.0, True)
        assert len(script) <= world.turns
        assert len(script) >= world.depth + 2 * world.doors + 1
        assert all(set(text) <= set(world.alphabet) for text in (*played.observations, *script))


def test_demonstrations_visit_no_pit_and_say_nothing_wrong_but_players_may():
    world = TextWorld(holes=3)
    for task in world.tasks(50):
        seen = replay(world, task, world.script(task)).observations
        assert not any(text.startswith(("no", "pit")) for text in seen)
        house = world.session()
        first = house.reset(task)
        nonsense = house.step("dance")
        assert nonsense == Outcome("no. " + first.split(". ", 1)[1])


def test_a_hole_has_no_way_out_and_another_thing_ends_it():
    world = TextWorld(rooms=3, depth=1, doors=0, objects=4, holes=3)
    fell = took = 0
    for task in world.tasks(40):
        house = world.session()
        text = house.reset(task)
        holes = [part.split()[-1] for part in text.rstrip(".").replace(";", ",").split(",") if " hole " in f" {part} "]
        goal = text.split(".")[0].removeprefix("find the ")
        other = next((t for t in ("coin", "ring", "cup") if t != goal and t in text.split(". ", 1)[1]), None)
        if other is not None:
            took += 1
            assert replay(world, task, [f"take {other}"]).reward == 0
            assert replay(world, task, [f"take {other}"]).done
        if holes:
            fell += 1
            seen = replay(world, task, [f"go {holes[0]}", "go north", "go back", *world.script(task)])
            assert (seen.observations[1], seen.reward, seen.done) == ("pit.", 0, False)
            assert set(seen.observations[2:]) == {"no. pit."}
    assert min(fell, took) > 3


def test_a_door_opens_with_its_key_only():
    world = TextWorld(rooms=3, depth=2, doors=1, objects=1, holes=1)
    task = world.tasks(1, seed=1)[0]
    house = world.session()
    house.reset(task)
    assert house.step("go west").observation == "kitchen: lamp; back east, white door west."
    for action in ("open west", "go west", "open east", "take white key"):
        assert house.step(action).observation.startswith("no. ")
    for action in ("go east", "Take  WHITE key", "go west", "open west", "go west"):
        assert not house.step(action).observation.startswith("no. ")
    assert house.step("take ring") == Outcome("have ring.", 1.0, True)


@given(
    st.integers(2, 16), st.integers(0, 15), st.integers(0, 6), st.integers(0, 7), st.integers(0, 4), st.integers(0, 99)
)
@settings(max_examples=30, deadline=None)
def test_any_size_is_solvable_and_replays(rooms, depth, doors, objects, holes, seed):
    depth = 1 + depth % (rooms - 1)
    world = TextWorld(rooms, depth, min(doors, depth), objects, min(holes, rooms))
    task = world.tasks(1, seed)[0]
    script = world.script(task)
    assert replay(world, task, script) == replay(pickle.loads(pickle.dumps(world)), task, script)
    assert replay(world, task, script).reward == 1


def test_tasks_are_derived_and_parts_share_no_world():
    world = TextWorld(rooms=3, depth=1, doors=0, objects=0, holes=0)
    assert world.tasks(5, seed=4) == world.tasks(9, seed=4)[:5] != world.tasks(5, seed=5)
    train, heldout = (
        {repr(world.world(int(t))) for t in world.tasks(150, s, p)} for s, p in ((0, "train"), (1, "heldout"))
    )
    assert not train & heldout
    assert len(heldout) == 150
    code = "from leibler.environment import TextWorld as T; w = T(); print(w.tasks(3, 7), w.script(w.tasks(3, 7)[0]))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = TextWorld()
    assert there == f"{here.tasks(3, 7)} {here.script(here.tasks(3, 7)[0])}\n"


@pytest.mark.parametrize(
    ("knobs", "complaint"),
    [
        ({"rooms": 1}, "rooms=1"),
        ({"depth": 6}, "depth=6; give a whole number from 1 to 5"),
        ({"doors": 4}, "doors=4"),
        ({"objects": 8}, "objects=8"),
        ({"holes": 7}, "holes=7"),
        ({"limit": -1}, "limit=-1"),
    ],
)
def test_impossible_worlds_are_refused(knobs, complaint):
    with pytest.raises(DataError, match=complaint):
        TextWorld(**knobs)


@pytest.mark.parametrize("task", ["", "x", "-1", "9" * 12, "³"])
def test_what_is_no_task_is_told(task):
    with pytest.raises(DataError, match="is no task of env:textworld"):
        TextWorld().session().reset(task)


# ---- by name, and as data ----------------------------------------------------------------------------------------


def test_an_environment_is_data_with_demonstrations():
    data = load("env:textworld:rooms=4,n=12,seed=2,part=train")
    assert (len(data), data.kind, data.check) == (12, "completions", None)
    assert data.name == "env:textworld:rooms=4,n=12,seed=2,part=train"
    world = TextWorld(rooms=4)
    for record in data:
        assert record.extra["environment"] == "env:textworld:rooms=4" == get(record.extra["environment"]).spec()
        script = world.script(record.extra["task"])
        assert [record.completion, *(action for _, action in record.extra["turns"])] == script
        seen = replay(world, record.extra["task"], script).observations
        assert record.prompt == seen[0] + "\n>"
        assert [text for text, _ in record.extra["turns"]] == [f"\n{text}\n>" for text in seen[1:-1]]
    assert data.content_hash == load(data.name).content_hash
    assert load("env:textworld", limit=3).name == "env:textworld:n=3,seed=0"


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("env:textwrld", r"no environment 'textwrld' .*did you mean 'textworld'.*the environments are textworld"),
        ("env:textworld:room=3", r"no knob 'room' \(did you mean 'rooms'\?\)"),
        ("env:textworld:rooms=many", "is not a whole number"),
        ("env:textworld:part=test", "has no part 'test'"),
        ("env:textworld:n=0", "n=0"),
        ("env:textworld:rooms=2,depth=1,doors=0,objects=0,holes=0,part=heldout,n=20000", "too few different worlds"),
    ],
)
def test_a_wrong_specification_is_told(spec, complaint):
    with pytest.raises(DataError, match=complaint):
        load(spec)


def test_installed_packages_bring_environments(monkeypatch):
    points = [
        EntryPoint("sums", "environment.made:Sums", registry.GROUP),
        EntryPoint("broken", "nowhere:X", registry.GROUP),
        EntryPoint("bare", "leibler.environment:GymnasiumText", registry.GROUP),
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: points if group == registry.GROUP else [])
    assert set(environments()) == {"textworld", "sums", "broken", "bare"}
    assert get("env:sums:length=2") == Sums(2)
    data = load("env:sums:length=2,n=3")
    assert data[0].prompt == data[0].extra["task"] + "="
    with pytest.raises(DataError, match="'broken' of nowhere:X cannot be imported"):
        load("env:broken")
    with pytest.raises(DataError, match="'env:bare' cannot be made from text: 'make' has no default; give it one"):
        load("env:bare")


@dataclass(frozen=True)
class Unscripted(Sums):
    def script(self, task: str):
        return None


def test_without_a_script_records_are_tasks_only():
    (record,) = Unscripted().dataset(1)
    assert record.completion is None
    assert set(record.extra) == {"environment", "task"}


def test_an_environment_of_gymnasium_is_closed():
    game = GymnasiumText(Guess, 3)
    before = Guess.closed
    played = replay(game, "27", ["1", "7"])
    assert (played.observations, played.reward, played.done) == (("guess a digit", "no", "right"), 1.0, True)
    assert replay(game, "27", ["1", "2", "3"]).done, "Gymnasium's truncation ends an episode"
    assert Guess.closed == before + 2


def test_the_interface_needs_no_tensor_library():
    code = "import sys, leibler.environment; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_an_environment_says_what_it_is():
    assert replace(TextWorld(), rooms=8, limit=9).spec(seed=1) == "env:textworld:rooms=8,limit=9,seed=1"
    assert isinstance(get("env:textworld"), Environment)
