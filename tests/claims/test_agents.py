"""The claims about agents are refuted by recipes, and by worlds, that are broken."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from claims.breaking import Broken, case, flipped, refute, sourced, with_, without
from leibler.claims import agents as a
from leibler.environment import TextWorld
from leibler.environment.textworld import House
from leibler.errors import DataError
from leibler.objective import LogRatio, Old, PolicyGradient, SequenceMean, Staircase, Teacher, ToGo
from leibler.objective.terms import Term
from leibler.train import Demonstrated, Episodes, Recipe


def late(recipe: Recipe) -> Recipe:
    """Every stair one step too late."""
    source = recipe.source
    assert isinstance(source, Episodes)
    stairs = Staircase(1, 6)
    if source.prefix is not None:
        return replace(recipe, source=replace(source, prefix=Demonstrated(stairs)))
    return replace(recipe, source=replace(source, max_turns=stairs if source.max_turns else None))


BROKEN = [
    case(a.tcod_climbs_its_stairs, "tcod", "late", late),
    case(a.tcod_climbs_its_stairs, "tcod", "whole-episodes", sourced(Episodes())),
    case(a.tcod_climbs_its_stairs, "tcod", "begins-at-two", start=2),
    case(a.tcod_climbs_its_stairs, "tcod", "wrong-end", curriculum="b2f"),
    case(a.tcod_descends_the_reverse_kl, "tcod", "sign", flipped()),
    case(a.tcod_descends_the_reverse_kl, "tcod", "zero", without(Term)),
    case(a.tcod_descends_the_reverse_kl, "tcod", "unscaled", scale=1.0),
    case(
        a.tcod_descends_the_reverse_kl, "tcod", "upside-down",
        with_(PolicyGradient, advantage=LogRatio(Old(), Teacher())),
    ),
    case(
        a.tcod_descends_the_reverse_kl, "tcod", "to-go",
        with_(PolicyGradient, advantage=LogRatio(Teacher(), Old()) >> ToGo()),
    ),
    case(a.tcod_descends_the_reverse_kl, "tcod", "summed", with_(PolicyGradient, reduce=SequenceMean("sum"))),
]  # fmt: skip

BROKEN_FULL = [
    case(a.tcod_spares_what_was_known, "tcod", "no-curriculum", curriculum="none"),
    case(a.tcod_spares_what_was_known, "tcod", "sign", flipped()),
    case(a.tcod_spares_what_was_known, "tcod", "all-at-once", every=1000),
    case(a.tcod_waits_where_nothing_is_shared, "tcod", "no-curriculum", curriculum="none"),
    case(a.tcod_waits_where_nothing_is_shared, "tcod", "sign", flipped()),
]

OTHERWISE = [a.tcod_has_a_teacher_that_solves]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_method_refutes_its_claim(broken: Broken):
    refute(broken)


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN_FULL)
def test_a_broken_method_refutes_its_behaviour(broken: Broken):
    refute(broken)


@dataclass(frozen=True)
class Lazy(TextWorld):
    def script(self, task: str) -> list[str]:
        return super().script(task)[:-1]


@dataclass(frozen=True)
class Slow(TextWorld):
    @property
    def turns(self) -> int:
        return 5


class Restless(House):
    resets = 0

    def reset(self, task: str) -> str:
        Restless.resets += 1
        return super().reset(str(int(task) + Restless.resets))


@dataclass(frozen=True)
class Shifting(TextWorld):
    def session(self) -> House:
        return Restless(self)


@pytest.mark.parametrize("kind", [Lazy, Slow, Shifting])
def test_a_world_without_a_teacher_or_a_memory_refutes_its_claim(kind):
    try:
        observed, holds = a.tcod_has_a_teacher_that_solves(kind)
    except (DataError, AssertionError):
        return
    assert not holds, observed
