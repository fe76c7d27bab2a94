"""A recipe from its slug and the ``recipe.*`` overrides of a command line or run file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from leibler import recipes
from leibler.cli import overrides
from leibler.cli.expressions import MOST_CHARACTERS, NONSENSE, fault
from leibler.errors import RecipeError

if TYPE_CHECKING:
    from leibler.train import Pipeline, Recipe

PREFIX = "recipe."


def recipe_from(slug: str, changes: Mapping[str, str]) -> Recipe | Pipeline:
    """Build a method's recipe with some of its parts changed.

    Args:
        slug: the method.
        changes: text by ``recipe.NAME``, where ``NAME`` is a keyword parameter of the method, or a dotted path into
            the recipe such as ``objective.terms.0.coefficient``.

    Raises:
        RecipeError: an unknown method or key, text of another type, or parts that do not fit together.
    """
    build = recipes.function(slug)
    known = overrides.parameters(build)
    keywords, places = {}, {}
    for key, text in changes.items():
        if not key.startswith(PREFIX):
            raise RecipeError(f"{key} is not a key of a recipe; these start with {PREFIX}.")
        if len(text) > MOST_CHARACTERS:
            raise RecipeError(
                f"{key} is given {len(text):,} characters; a part of a recipe has at most {MOST_CHARACTERS:,}."
            )
        name = key.removeprefix(PREFIX)
        if name in known:
            keywords[name] = overrides.convert(text, known[name], key)
        else:
            places[name] = text
    try:
        recipe = recipes.get(slug, **keywords)
    except NONSENSE as error:
        given = ", ".join(f"{PREFIX}{name}={changes[PREFIX + name][:60]}" for name in keywords)
        raise RecipeError(f"{slug} cannot be built with {given or 'its defaults'}: {fault(error)}.") from None
    for name in places:
        if "." not in name and name not in overrides.children(recipe):
            raise overrides.unknown(
                name, [*known, *overrides.paths(recipe)], PREFIX, [*known, *overrides.children(recipe)]
            )
    return overrides.replace(recipe, places, PREFIX)
