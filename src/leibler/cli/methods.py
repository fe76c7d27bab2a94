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


def show_method(slug: str, arguments: list[str], keys: bool = False) -> None:
    """Print a recipe with its plan, and on request everything in it that can be set."""
    from leibler import recipes

    method = recipes.find(slug)  # before anything heavy is imported: a misspelt name is told at once
    if method.kind != "recipe":
        module, name = method.where.split(":")
        print(f"{method.slug}: {method.summary}\n{method.title} ({method.year}), {method.family}\n")
        print(f"On the command line: {method.command} --help\nIn Python: from {module} import {name}")
        return
    from leibler.cli.building import PREFIX, recipe_from
    from leibler.cli.overrides import leaves, split
    from leibler.train import describe

    recipe = recipe_from(slug, split(arguments))
    print(f"{method.slug}: {method.summary}")
    print(f"{method.title} ({method.year}), {method.family}")
    if method.command:
        print(f"Its choice of data alone: {method.command} --help")
    parameters = inspect.signature(recipes.function(slug)).parameters
    if parameters:
        print(f"\nParameters (set with {PREFIX}NAME=VALUE)")
        for name, parameter in parameters.items():
            print(f"  {name} = {parameter.default!r}")
    if keys:
        print(f"\nKeys (set with {PREFIX}KEY=VALUE)")
        for path, value in leaves(recipe).items():
            print(f"  {path} = {value!r}")
    print()
    print(describe(recipe))
