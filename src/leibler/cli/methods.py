"""``leibler methods`` and ``leibler show``."""

from __future__ import annotations

import inspect
import json

from leibler.cli.output import table
from leibler.errors import RecipeError
from leibler.recipes.registry import METHODS


def list_methods(family: str | None, as_json: bool) -> None:
    """Print the table of methods."""
    families = list(dict.fromkeys(m.family for m in METHODS.values()))
    if family is not None and family not in families:
        raise RecipeError(f"'{family}' is not a family of methods; families: {', '.join(families)}.")
    chosen = [m for m in METHODS.values() if family in (None, m.family)]
    if as_json:
        print(json.dumps([m.to_dict() for m in chosen], indent=2))
        return
    print(table(["slug", "year", "family", "what it is for"], [[m.slug, m.year, m.family, m.summary] for m in chosen]))


def show_method(slug: str, arguments: list[str]) -> None:
    """Print a recipe with its plan."""
    from leibler import recipes

    method = recipes.find(slug)
    print(f"{method.slug}: {method.summary}")
    print(f"{method.title} ({method.year}), {method.family}")
    from leibler.cli.building import recipe_from
    from leibler.cli.overrides import split
    from leibler.train import describe

    recipe = recipe_from(slug, split(arguments))
    signature = inspect.signature(recipes.function(slug))
    if signature.parameters:
        print("\nparameters (set with recipe.NAME=VALUE)")
        for name, parameter in signature.parameters.items():
            print(f"  {name} = {parameter.default!r}")
    print()
    print(describe(recipe))
