"""``leibler train --sweep``: the methods of a family, or some, side by side."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from leibler.cli import INTERRUPTED, overrides
from leibler.errors import RecipeError, RunError
from leibler.safety import printable

if TYPE_CHECKING:
    from leibler.sweep import Settings

FAMILY = "distillation"


def sweep_command(
    arguments: Sequence[str],
    family: str | None,
    seeds: int | None,
    scale: float | None,
    threads: int | None,
    rates: str | None = None,
) -> bool:
    """Run the sweep, print its table and write its report and picture; False if a run failed.

    Raises:
        LeiblerError: in one sentence, what does not fit.
        typer.Exit: 130 after Ctrl-C.
    """
    from leibler.cli.train import Request

    slugs = [a for a in arguments if "=" not in a]
    changes = overrides.split(a for a in arguments if "=" in a)
    slugs = _slugs(slugs, family)
    own = {slug: {} for slug in slugs}
    for key in [k for k in changes if k.partition(".")[0] in own]:
        slug, _, name = key.partition(".")
        own[slug][f"recipe.{name}"] = changes.pop(key)
    request = Request("").changed(changes)
    if request.overrides:
        key = next(iter(request.overrides))
        raise RecipeError(f"{key} is of one recipe, and a sweep has many; write SLUG.{key.removeprefix('recipe.')}=.")
    if "seed" in request.options:
        raise RunError("seed= is of one run; a sweep takes --seeds N, the seeds 0 to N-1.")
    if request.out is None:
        raise RunError("no directory was given; add --out DIR.")
    settings = _settings(request, {slug: o for slug, o in own.items() if o}, scale, threads)
    settings = replace(settings, learning_rates=_rates(rates, request.options))
    return _run(slugs, Path(request.out), settings, 1 if seeds is None else seeds, request.quiet)


def _rates(text: str | None, options: Mapping[str, Any]) -> tuple[float, ...]:
    if text is None:
        return ()
    try:
        rates = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise RunError(f"--learning-rates={text} must be positive numbers with commas between them: 1e-3,2e-4.")
    if "learning_rate" in options:
        raise RunError("learning_rate= and --learning-rates were given; keep one of the two.")
    return rates


def _slugs(named: Sequence[str], family: str | None) -> list[str]:
    from leibler import recipes

    if named and family is not None:
        raise RunError(f"--family={family} and methods by name were given; keep one of the two.")
    for slug in named:
        recipes.function(slug)
    if named:
        return list(named)
    families = sorted({recipes.find(slug).family for slug in recipes.names()})
    wanted = family or FAMILY
    if wanted not in families:
        raise RunError(f"--family={wanted} has no method that is trained; choose one of {', '.join(families)}.")
    return [slug for slug in recipes.names() if recipes.find(slug).family == wanted]


def _settings(request: Any, own: dict[str, dict[str, str]], scale: float | None, threads: int | None) -> Settings:
    from leibler.sweep import Settings
    from leibler.train import Options
    from leibler.train.run_file import absolute

    if scale is not None and not scale > 0:
        raise RunError(f"--steps-scale={scale} must be greater than 0.")
    if threads is not None and threads < 1:
        raise RunError(f"--threads={threads} must be at least 1.")
    if request.student is None and (request.teacher or request.models or request.data or request.validation):
        raise RunError(
            "a sweep with models or data of your own needs student=DIR, teacher=DIR and data=FILE; add them."
        )
    if request.student is not None and (request.teacher is None or "train" not in request.data):
        raise RunError("a sweep with a student of your own needs teacher=DIR and data=FILE as well; add them.")
    if request.student is not None and scale is not None:
        raise RunError("--steps-scale is of the embedded task; with a student of your own give steps= or tokens=.")
    Options(**request.options)  # what is wrong with them is said before anything is made

    def place(text: str | None) -> str | None:
        return None if text is None else absolute(text)

    return Settings(
        student=place(request.student),
        teacher=place(request.teacher),
        models={name: absolute(path) for name, path in request.models.items()},
        data={name: absolute(spec) for name, spec in request.data.items()},
        validation=place(request.validation),
        options=dict(request.options),
        overrides=own,
        scale=1.0 if scale is None else scale,
        # The embedded models are too small for several cores to be worth their while.
        threads=threads or (1 if request.student is None else os.cpu_count() or 1),
    )


def _run(slugs: Sequence[str], out: Path, settings: Settings, seeds: int, quiet: bool) -> bool:
    from leibler.measure.report.sweep import write_pages
    from leibler.sweep import run_sweep
    from leibler.sweep.table import as_text

    try:
        content = run_sweep(slugs, out, settings, seeds, quiet=quiet)
    except KeyboardInterrupt:
        typer.echo(printable(f"interrupted; what is finished is in {out}, and the same command goes on"), err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(printable(as_text(content)))
    for page in write_pages(out, content):
        print(printable(f"{page}"), file=sys.stderr)
    return not content["failed"] and bool([row for row in content["rows"] if row["slug"]])
