"""Recipes that are broken on purpose, and claims that must fail on them.

A test file lists its cases in ``BROKEN`` and, for claims that take long, in ``BROKEN_FULL``; claims that it refutes by
other means than a recipe, in ``OTHERWISE``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from leibler import recipes
from leibler.errors import RecipeError
from leibler.objective import Hinge, Objective
from leibler.objective.terms import Term
from leibler.train import Recipe, recipes_of

Change = Callable[[Recipe], Recipe]


# ---- ways to break a recipe ------------------------------------------------------------------------------------------


def changed(kind: type[Term], change: Callable[[Any], Term | None]) -> Change:
    """Every term of a kind changed, or taken out."""

    def apply(recipe: Recipe) -> Recipe:
        assert any(isinstance(t, kind) for t in recipe.objective.terms)
        terms = [change(t) if isinstance(t, kind) else t for t in recipe.objective.terms]
        return replace(recipe, objective=Objective(*(t for t in terms if t is not None)))

    return apply


def _negative(term: Any) -> Term:
    c = term.coefficient
    return replace(term, coefficient=Hinge(c.bound, -c.slope) if isinstance(c, Hinge) else -c)


def flipped(kind: type[Term] = Term) -> Change:
    return changed(kind, _negative)


def without(kind: type[Term]) -> Change:
    """As a coefficient of 0."""
    return changed(kind, lambda term: replace(term, coefficient=0.0))


def with_(kind: type[Term], **fields: Any) -> Change:
    return changed(kind, lambda term: replace(term, **fields))


def sourced(source: Any) -> Change:
    return lambda recipe: replace(recipe, source=source)


@dataclass(frozen=True)
class Broken:
    """A claim, its method, and what is wrong with the recipe: a change, parameters forced on it, or both."""

    experiment: Callable[..., tuple[str, bool]]
    slug: str
    name: str
    change: Change = lambda recipe: recipe
    forced: tuple[tuple[str, Any], ...] = ()

    def build(self, **params: Any) -> Recipe:
        slug, _, stage = self.slug.partition("/")
        return self.change(recipes_of(recipes.get(slug, **{**params, **dict(self.forced)}))[stage])


def case(experiment: Callable[..., Any], slug: str, name: str, change: Change = lambda r: r, **forced: Any) -> Any:
    broken = Broken(experiment, slug, name, change, tuple(forced.items()))
    return pytest.param(broken, id=f"{experiment.__name__}-{name}")


def refute(broken: Broken) -> None:
    try:
        observed, holds = broken.experiment(broken.build)
    except RecipeError:
        return  # the recipe refuses to be built like that: as good as a refutation
    assert not holds, observed


def refuted() -> set[str]:
    """The names of the claims' functions for which some test file of this folder has something broken."""
    modules = [importlib.import_module(f"claims.{path.stem}") for path in Path(__file__).parent.glob("test_*.py")]
    cases = [c for m in modules for name in ("BROKEN", "BROKEN_FULL") for c in getattr(m, name, ())]
    otherwise = [experiment.__name__ for m in modules for experiment in getattr(m, "OTHERWISE", ())]
    return {*otherwise, *(c.values[0].experiment.__name__ for c in cases)}
