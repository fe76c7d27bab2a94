"""``leibler train``: a new run, a run gone on with, a run repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from leibler.cli import overrides
from leibler.cli.building import PREFIX, recipe_from
from leibler.errors import RunError

NAMED = ("data", "models")
"""Keys that take a name after a dot: ``models.base=DIR``."""
SINGLE = ("student", "teacher", "data", "validation", "out")
INTERRUPTED = 130


@dataclass(frozen=True)
class Request:
    """What a command line, or a run file, asks for: everything `fit` wants, as plain data."""

    recipe: str
    overrides: Mapping[str, str] = field(default_factory=dict)
    student: str | None = None
    teacher: str | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    validation: str | None = None
    out: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    quiet: bool = False

    def changed(self, changes: Mapping[str, str]) -> Request:
        """This request with ``key=value`` pairs applied.

        Raises:
            RecipeError: an unknown key, or text of another type.
        """
        from leibler.train import Options

        known = overrides.parameters(Options)
        parts: dict[str, Any] = {
            "overrides": dict(self.overrides),
            "models": dict(self.models),
            "data": dict(self.data),
            "options": dict(self.options),
        }
        for key, text in changes.items():
            first, dot, name = key.partition(".")
            if key.startswith(PREFIX):
                parts["overrides"][key] = text
            elif dot and first in NAMED and name:
                parts[first][name] = text
            elif key == "data":
                parts["data"]["train"] = text
            elif key in SINGLE:
                parts[key] = None if text.lower() in ("none", "null", "") else text
            elif key == "quiet":
                parts[key] = overrides.convert(text, bool, key)
            elif key in known:
                parts["options"][key] = overrides.convert(text, known[key], key)
            else:
                raise overrides.unknown(key, [*SINGLE, "models.NAME", "data.NAME", "recipe.KEY", *known, "quiet"])
        return dataclasses.replace(self, **parts)

    def run(self, *, resume: bool = False) -> Any:
        """Build the recipe and train."""
        from leibler.train import Options, fit

        recipe, options = recipe_from(self.recipe, self.overrides), Options(**self.options)
        if self.student is None:
            raise RunError("no student was given; add student=DIR (a Transformers checkpoint or a hub id).")
        if not self.data:
            raise RunError("no data was given; add data=FILE or data=task:NAME.")
        if self.out is None:
            raise RunError("no run directory was given; add out=DIR.")
        return fit(
            recipe,
            student=_whole(self.student),
            teacher=None if self.teacher is None else _whole(self.teacher),
            models={name: _whole(path) for name, path in self.models.items()},
            data={name: _whole(spec) for name, spec in self.data.items()},
            validation=None if self.validation is None else _whole(self.validation),
            out=self.out,
            options=options,
            resume=resume,
            quiet=self.quiet,
            origin={"recipe": self.recipe, "overrides": dict(self.overrides)},
        )


def from_file(path: Path) -> Request:
    """The request that a ``run.yaml`` (or the run directory that holds it) records.

    Raises:
        RunError: no such file, not a run file, or a run of what only Python can build.
    """
    from leibler.train import Options
    from leibler.train.setup import read_run_file

    content = read_run_file(path)
    for key in ("recipe", "student", "teacher", "validation"):
        _not_in_memory(path, key, content.get(key))
    for group in ("models", "data"):
        value = content.get(group) or {}
        for name, text in value.items() if isinstance(value, dict) else [("train", value)]:
            _not_in_memory(path, f"{group}.{name}", text)
    known = {f.name for f in dataclasses.fields(Options)}
    options = content.get("options") or {}
    for name in options:
        if name not in known:
            raise RunError(f"{path} sets the option {name}, which this version of leibler does not have; remove it.")
    data = content.get("data") or {}
    return Request(
        recipe=content["recipe"],
        overrides=content.get("overrides") or {},
        student=content.get("student"),
        teacher=content.get("teacher"),
        models=content.get("models") or {},
        data=data if isinstance(data, dict) else {"train": data},
        validation=content.get("validation"),
        out=content.get("out"),
        options=options,
    )


def _not_in_memory(path: Path, key: str, value: Any) -> None:
    if (key == "recipe" and value == "custom") or (isinstance(value, str) and value.endswith("given in memory>")):
        raise RunError(f"{path} records a {key} that was built in Python; repeat or resume it there, with fit().")


def _whole(text: str) -> str:
    """A path that exists, made absolute, so that a run file means the same from every directory; else the text."""
    return str(Path(text).resolve()) if Path(text).exists() else text


def _beside(folder: Path) -> str:
    """The first free name beside a run directory."""
    names = (folder.with_name(f"{folder.name}-repeat{'' if n == 1 else f'-{n}'}") for n in range(1, 10_000))
    return str(next(name for name in names if not name.exists()))


def train_command(recipe: str | None, arguments: list[str], resume: Path | None) -> None:
    """Run ``leibler train``.

    Raises:
        LeiblerError: in one sentence, what does not fit.
        typer.Exit: 130 after Ctrl-C.
    """
    if resume is not None:
        if recipe is not None:
            raise RunError(f"--resume goes on with {resume} as it was begun; leave out {recipe!r} and what follows it.")
        request = dataclasses.replace(from_file(resume), out=str(resume))
    elif recipe is None:
        raise RunError("no recipe was given; `leibler methods` lists them, and --resume DIR goes on with a run.")
    elif "=" in recipe:
        raise RunError(f"the recipe comes first, before {recipe}; `leibler methods` lists the recipes.")
    elif recipe.endswith((".yaml", ".yml")) or (Path(recipe) / "run.yaml").exists():
        changes = overrides.split(arguments)
        path = Path(recipe)
        request = from_file(path)
        if "out" not in changes:
            changes["out"] = _beside((path if path.is_dir() else path.parent).resolve())
        request = request.changed(changes)
    else:
        request = Request(recipe).changed(overrides.split(arguments))
    try:
        run = request.run(resume=resume is not None)
    except KeyboardInterrupt:
        typer.echo(_saved(Path(request.out or ".")), err=True)
        raise typer.Exit(INTERRUPTED) from None
    typer.echo(_summary(run))


def _saved(out: Path) -> str:
    found = sorted((out / "checkpoints").glob("step-*"))
    if not found:
        return f"interrupted before the first checkpoint; nothing was saved in {out}"
    return f"interrupted; saved in {found[-1]}\ngo on with: leibler train --resume {out}"


def _summary(run: Any) -> str:
    numbers = {**{k: v for k, v in run.metrics.items() if k in ("loss", "reward", "entropy")}, **run.validation}
    shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, (int, float)))
    return f"{run.out / 'final'}: the trained model ({shown})"
