"""Published training methods as recipes: `names` lists them, `get` builds one.

The recipes are ordinary functions with keyword parameters, grouped by family in the modules of this package. Only
the module of the recipe that is asked for is imported.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from leibler.errors import RecipeError
from leibler.recipes.registry import METHODS, Method

if TYPE_CHECKING:
    from leibler.train import Pipeline, Recipe

__all__ = ["METHODS", "Method", "find", "function", "get", "names"]


def names() -> list[str]:
    """Every slug that `get` accepts: the methods that are trained. (`METHODS` has the others too.)

    Examples:
        >>> "minillm" in names()
        True
    """
    return [slug for slug, method in METHODS.items() if method.kind == "recipe"]


def find(slug: str) -> Method:
    """The row of the table for a slug.

    Raises:
        RecipeError: no such slug; the message lists the nearest.

    Examples:
        >>> find("minillm").year
        2023
        >>> find("minilm")
        Traceback (most recent call last):
        ...
        leibler.errors.RecipeError: 'minilm' is not a known method (did you mean miniplm, minillm or distillm?)...
    """
    if slug in METHODS:
        return METHODS[slug]
    plain = slug.lower().replace("_", "-")
    near = difflib.get_close_matches(plain, METHODS, n=3, cutoff=0.5)
    hint = f" (did you mean {' or '.join([', '.join(near[:-1]), near[-1]] if near[1:] else near)}?)" if near else ""
    raise RecipeError(f"'{slug}' is not a known method{hint}; see `leibler methods`.")


def function(slug: str) -> Callable[..., Recipe | Pipeline]:
    """The function that builds a recipe; its keyword parameters are the method's.

    Raises:
        RecipeError: no such slug, or a method that is not trained.
    """
    method = find(slug)
    if method.kind != "recipe":
        raise RecipeError(f"{slug} is a {method.kind} and not trained by a recipe; use `{method.command}`.")
    module, name = method.where.split(":")
    return getattr(importlib.import_module(f"leibler.recipes.{module}"), name)


def get(slug: str, **params: Any) -> Recipe | Pipeline:
    """The recipe of a published method; a pipeline of recipes, where it has several stages.

    Args:
        slug: one of `names`.
        **params: the keyword parameters of the method's function.

    Raises:
        RecipeError: no such slug, or a parameter that the method does not have.
    """
    build = function(slug)
    known = inspect.signature(build).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in known.values()):
        for name in params:
            if name not in known:
                raise RecipeError(_no_such_parameter(slug, name, list(known)))
    missing = [n for n, p in known.items() if p.default is p.empty and p.kind is p.KEYWORD_ONLY and n not in params]
    if missing:
        raise RecipeError(f"{slug} needs {' and '.join(missing)}.")
    return build(**params)


def _no_such_parameter(slug: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" (did you mean {near[0]}?)" if near else ""
    return f"{slug} has no parameter {name}{hint}; it has {', '.join(known) or 'none'}."
