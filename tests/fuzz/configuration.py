"""Cases for configuration: run files, ``key=value`` overrides, expressions over parts."""

from __future__ import annotations

import copy
import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import yaml

from fuzz.harness import Broken, Case, sentence
from fuzz.hostile import NUMBERS, TEXTS, mutated, nested, text, value
from leibler import recipes
from leibler.cli import overrides
from leibler.cli.building import recipe_from
from leibler.cli.expressions import vocabulary
from leibler.cli.train import Request, from_file
from leibler.divergence import Divergence
from leibler.errors import LeiblerError
from leibler.objective import Signal
from leibler.train import Options, Pipeline, Recipe, describe

VALID: dict[str, Any] = {
    "recipe": "kd",
    "overrides": {"recipe.objective.terms.0.coefficient": "0.5"},
    "student": "models/small",
    "teacher": "models/large",
    "models": {},
    "data": {"train": "task:addition:digits=1,n=20"},
    "validation": None,
    "out": "/runs/a",
    "options": {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, "decay": "none", "adapter_rank": None, "seed": 1},
    "data_hashes": {"train": "00"},
    "description": "Data >> Match(ForwardKL)",
    "versions": {"torch": "2.13.0"},
}
BOMBS = (
    "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: [*c,*c,*c,*c]\n",
    "recipe: !!python/object/apply:os.system ['touch canary']\n",
    "recipe: !!python/name:os.system\n", "? [a, b]\n: 1\n", "? {a: 1}\n: 1\n", "!!set {a, b}\n", "when: 2001-99-99\n",
    "n: !!int ''\n", "n: !!bool maybe\n", "n: !!timestamp x\n", "n: !!float z\n", "b: !!binary '***'\n", "a: 1\na: 2\n",
    "n: 0x" + "f" * 5000 + "\n", "n: " + "9" * 5000 + "\n", "n: 1:2:3:4:5:6:7\n", "<<: 5\n",
    "<<: *x\n", "[" * 3000, "{a: " * 500, "- " * 500,
    "--- \n---\n", "%YAML 9.9\n---\na: 1\n", "\t", "'", "a: |\n", "\ud7ff", "a: \u0085b\n", "&a a: *a\n", "n: .nan\n",
)  # fmt: skip
ANNOTATIONS = (
    overrides.UNKNOWN, int, float, bool, str, Path, int | None, float | Signal, Divergence,
    tuple[int, ...], tuple[int, float],
    frozenset[str], list[float], dict, Divergence | None,
)  # fmt: skip


def clear(function: Any, *arguments: Any) -> Any:
    """The value, or None after an error of one sentence."""
    try:
        return function(*arguments)
    except LeiblerError as error:
        sentence(error)
        return None


def run_files(draw: Random, place: Path) -> int:
    """A run file with other values, keys and bytes."""
    content: Any = copy.deepcopy(VALID)
    for _ in range(draw.randrange(3)):
        group = draw.choice((content, content["overrides"], content["options"], content["models"], content["data"]))
        if not isinstance(group, dict):
            break
        key = draw.choice((*group, text(draw), draw.choice((*VALID, "speed", "trust_remote_code"))))
        made = nested(draw.choice((4, 40)), "dict") if draw.random() < 0.1 else value(draw)
        if draw.random() < 0.15:
            group.pop(key, None)
        else:
            group[key] = made
        if not all(isinstance(content.get(k), dict) for k in ("overrides", "options", "models", "data")):
            break
    try:
        raw = yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "surrogatepass")
    except ValueError:  # a number of more digits than Python writes
        raw = b"recipe: sft\noptions: {steps: 0x" + b"f" * 9000 + b"}\n"
    kind = draw.randrange(6)
    if kind == 0:
        raw = draw.choice(BOMBS).encode("utf-8", "surrogatepass") + (raw if draw.random() < 0.5 else b"")
    if kind in (1, 2):
        raw = mutated(draw, raw)
    path = place / "run.yaml"
    path.write_bytes(raw)
    request = clear(from_file, path)
    if (place / "canary").exists() or Path("canary").exists():
        raise Broken("a run file ran a program")
    if request is None:
        return 0
    if request.options.get("trust_remote_code"):
        raise Broken("a run file allowed code that comes with a checkpoint")
    built(request)
    return 0


def built(request: Request) -> None:
    """What is accepted can be described, which is what a run does next."""
    for key, held in {**request.models, **request.data}.items():
        if not (isinstance(key, str) and isinstance(held, str)):
            raise Broken(f"{key!r}: {held!r} is no text")
    clear(lambda: Options(**request.options))
    recipe = clear(recipe_from, request.recipe, request.overrides)
    if recipe is not None:
        if not isinstance(recipe, (Recipe, Pipeline)):
            raise Broken(f"the recipe is {recipe!r}")
        clear(describe, recipe)


@cache
def _places(slug: str) -> tuple[str, ...]:
    return (*overrides.parameters(recipes.function(slug)), *overrides.paths(recipes.get(slug)))


def expression(draw: Random, depth: int = 0) -> str:
    """Text that is nearly an expression over parts."""
    kind = draw.randrange(9)
    if kind == 0 or depth > 3:
        return draw.choice(
            ("1", "0.5", "-1", "'a'", "None", "True", "inf", "[]", "()", "{}", "1e999", "10**9", "...", "b'x'", "1j")
        )
    if kind < 4:
        name = draw.choice((*vocabulary(), "renyi", "Linear", "print", "__import__", "open"))
        given = [expression(draw, depth + 1) for _ in range(draw.randrange(3))]
        named = [
            f"{draw.choice(('steps', 'alpha', 'beta', 'x', 'to', 'by', 'rate'))}={expression(draw, depth + 1)}"
        ] * draw.randrange(2)
        return f"{name}({', '.join([*given, *named])})"
    if kind < 6:
        sign = draw.choice(("+", "-", "*", ">>", "/", "**", "<<", "@", "%", "|", " if 1 else ", " and ", ".", "=="))
        return f"{expression(draw, depth + 1)}{sign}{expression(draw, depth + 1)}"
    if kind == 6:
        return f"[{expression(draw, depth + 1)}, {expression(draw, depth + 1)}]"
    if kind == 7:
        return draw.choice(
            (
                "().__class__.__base__.__subclasses__()", "[x for x in [1]]", "lambda: 1",
                "f'{1}'", "(y := 1)", "*a", "{**{}}", "a.b", "a[0]",
                "10**10**10", "'a'*10**9", "[0]*10**9", "9**9**9", "(" * 200, "-" * 5000 + "1",
                "1+" * 3000 + "1", "{[]: 1}", "{1: 2}",
                "Linear" * 200, "not 1", "~1", "~'a'", "1 >> -1", "1 >> 10**9", "__builtins__",
                "eval('1')", "\x00", "9" * 5000,
            )
        )  # fmt: skip
    return text(draw)


def typed(draw: Random) -> str:
    made = (
        expression(draw)
        if draw.random() < 0.7
        else draw.choice((text(draw), str(draw.choice(NUMBERS[:9])), "none", "true", "1,2"))
    )
    if draw.random() < 0.2:
        made = mutated(draw, made.encode("utf-8", "surrogatepass"), 2).decode("utf-8", "surrogateescape")
    return made


def changes(draw: Random, place: Path) -> int:
    """``key=value`` at places of a recipe, real and not, with values of any type."""
    slug = draw.choice(recipes.names()) if draw.random() < 0.95 else text(draw)
    known = _places(slug) if slug in recipes.names() else ("x",)
    given = {}
    for _ in range(draw.randrange(1, 3)):
        key = (
            draw.choice(known)
            if draw.random() < 0.85
            else draw.choice((text(draw), ".", "a." * 500, f"{draw.choice(known)}.x"))
        )
        given[f"recipe.{key}"] = typed(draw)
    recipe = clear(recipe_from, slug, given)
    if recipe is not None and not isinstance(recipe, (Recipe, Pipeline)):
        raise Broken(f"the recipe is {recipe!r}")
    return 0


def arguments(draw: Random, place: Path) -> int:
    """What stands after ``leibler train RECIPE``."""
    keys = (
        *overrides.parameters(Options),
        "student",
        "data",
        "data.train",
        "models.base",
        "out",
        "quiet",
        "recipe.x",
        "",
        "models.",
        "=",
    )
    given = [
        f"{draw.choice(keys) if draw.random() < 0.9 else text(draw)}={typed(draw)}" for _ in range(draw.randrange(4))
    ]
    if draw.random() < 0.1:
        given.append(draw.choice(TEXTS))
    request = clear(lambda: Request("sft").changed(overrides.split(given)))
    if request is not None:
        clear(lambda: Options(**request.options))
    return 0


def expressions(draw: Random, place: Path) -> int:
    """Any text, read as any type."""
    made = typed(draw)
    clear(overrides.convert, made, draw.choice(ANNOTATIONS), "key")
    clear(overrides.split, [made, json.dumps(made)])
    return 0


CASES = {
    "run files": Case("run files: other types, tags, anchors, mutated bytes", 4, run_files),
    "changes": Case("recipe overrides at any place, of any type", 6, changes),
    "arguments": Case("options on the command line", 4, arguments),
    "expressions": Case("expressions over parts", 20, expressions),
}
