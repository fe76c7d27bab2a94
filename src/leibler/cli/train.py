"""``leibler train``: a new run, a run gone on with, a run repeated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from leibler.cli import INTERRUPTED, overrides
from leibler.cli.building import PREFIX, recipe_from
from leibler.errors import RunError
from leibler.safety import printable

NAMED = ("data", "models")
"""Keys that take a name after a dot: ``models.base=DIR``."""
SINGLE = ("student", "teacher", "data", "validation", "out")
TRUST = "trust_remote_code"


@dataclass(frozen=True)
class Request:
    """What a command line, or a run file, asks for: everything `fit` wants, as plain data."""

    recipe: str
    stage: str | None = None
    """One stage of the recipe, by itself."""
    overrides: Mapping[str, str] = field(default_factory=dict)
    student: str | None = None
    teacher: str | None = None
    models: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, str] = field(default_factory=dict)
    validation: str | None = None
    out: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    quiet: bool = False
    repeats: str | None = None

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
        from leibler.train import Options, fit, recipes_of
        from leibler.train.run_file import absolute

        recipe, options = recipe_from(self.recipe, self.overrides), Options(**self.options)
        if self.stage is not None:
            stages = recipes_of(recipe)
            if self.stage not in stages:
                raise RunError(f"{self.recipe} has no stage {self.stage!r}, but {', '.join(stages)}; restore the file.")
            recipe = stages[self.stage]
        if self.student is None:
            raise RunError("no student was given; add student=DIR (a Transformers checkpoint or a hub id).")
        if not self.data:
            raise RunError("no data was given; add data=FILE or data=task:NAME.")
        if self.out is None:
            raise RunError("no run directory was given; add out=DIR.")
        more = {} if self.repeats is None else {"repeats": absolute(self.repeats)}
        more |= {} if self.stage is None else {"stage": self.stage}
        return fit(
            recipe,
            student=absolute(self.student),
            teacher=None if self.teacher is None else absolute(self.teacher),
            models={name: absolute(path) for name, path in self.models.items()},
            data={name: absolute(spec) for name, spec in self.data.items()},
            validation=None if self.validation is None else absolute(self.validation),
            out=self.out,
            options=options,
            resume=resume,
            quiet=self.quiet,
            origin={"recipe": self.recipe, "overrides": dict(self.overrides), **more},
        )


def from_file(path: Path, trusted: bool = False) -> Request:
    """The request that a ``run.yaml`` (or the run directory that holds it) records.

    Paths that are not absolute are looked for in the working directory and then beside the file.

    Args:
        path: the file or directory.
        trusted: the user said again that code which comes with checkpoints may run. A file cannot say so by itself.

    Raises:
        RunError: no such file, not a run file, or a run of what only Python can build.
    """
    from leibler.train.run_file import read_run_file

    content = read_run_file(path)
    plain = ("recipe", "stage", *(key for key in SINGLE if key != "data"))
    texts: dict[str, str | None] = {k: _text(path, k, content.get(k)) for k in plain}
    data = content.get("data")
    data = _texts(path, "data", data if isinstance(data, dict) or data is None else {"train": data})
    models = _texts(path, "models", content.get("models"))
    if texts["recipe"] == "custom":
        raise RunError(f"{path} records a recipe that was built in Python; repeat or resume it there, with fit().")
    options = _options(path, content.get("options"))
    if options.get("trust_remote_code") and not trusted:
        raise RunError(
            f"{path} asks to run code that comes with a checkpoint, which a file cannot allow; if you trust the "
            "models, add trust_remote_code=true."
        )
    folder = path if path.is_dir() else path.parent
    single: dict[str, Any] = {}
    for key in ("student", "teacher", "validation"):
        text = texts[key]
        single[key] = None if text is None else _place(text, folder)
    return Request(
        recipe=str(texts["recipe"]),
        stage=texts["stage"],
        overrides=_texts(path, "overrides", content.get("overrides")),
        models={name: _place(text, folder) for name, text in models.items()},
        data={name: _place(text, folder) for name, text in data.items()},
        out=texts["out"],
        options=options,
        **single,
    )


def _options(path: Path, value: Any) -> dict[str, Any]:
    """The options of a file, each of the type that it must have."""
    from leibler.train import Options

    known = overrides.parameters(Options)
    read: dict[str, Any] = {}
    for name, text in _texts(path, "options", value, none="none").items():
        if name not in known:
            raise RunError(f"{path} sets the option {name}, which this version of leibler does not have; remove it.")
        read[name] = overrides.convert(text, known[name], f"{path}: {name}")
    return read


def _texts(path: Path, key: str, value: Any, none: str | None = None) -> dict[str, str]:
    """The entries of a mapping in a file, as text; ``none`` stands for an empty one."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RunError(f"{path} has a {key} that is no mapping; restore it from the run.")
    read = {}
    for name, entry in value.items():
        text = _text(path, f"{key}.{name}", entry) if isinstance(name, str) else None
        text = none if text is None else text
        if text is None:
            raise RunError(f"{path} has an entry {name!r} of {key} that says nothing; remove it.")
        read[name] = text
    return read


def _text(path: Path, key: str, value: Any) -> str | None:
    """A plain value of a file as it would be typed on the command line."""
    from leibler.train.run_file import in_memory

    if isinstance(value, str) and in_memory(value):
        raise RunError(f"{path} records a {key} that was built in Python; repeat or resume it there, with fit().")
    if isinstance(value, bool):
        return str(value).lower()
    # A number of thousands of digits, which YAML reads where it is written in base 16, cannot be written in base 10.
    if value is None or isinstance(value, (str, float)) or (isinstance(value, int) and abs(value) < 2**64):
        return None if value is None else str(value)
    raise RunError(f"{path} has a {key} that is neither text nor a number; restore it from the run.")


def _place(text: str, folder: Path) -> str:
    """A path as it is, or beside the run file if it is only there; else the text, perhaps a hub id or a task."""
    from leibler.train.run_file import absolute, exists

    beside = str(folder / text)
    return absolute(beside) if exists(beside) and not exists(text) else text


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
        trusted = _trusted(overrides.split([recipe, *arguments] if recipe and "=" in recipe else arguments))
        if (recipe is not None and "=" not in recipe) or trusted is None:
            raise RunError(f"--resume goes on with {resume} as it was begun; leave out {recipe!r} and what follows it.")
        resume = _whole(resume)
        request = dataclasses.replace(from_file(resume, trusted), out=str(resume))
    elif recipe is None:
        raise RunError("no recipe was given; `leibler methods` lists them, and --resume DIR goes on with a run.")
    elif "=" in recipe:
        raise RunError(f"the recipe comes first, before {recipe}; `leibler methods` lists the recipes.")
    elif recipe.endswith((".yaml", ".yml")) or (Path(recipe) / "run.yaml").exists():
        changes = overrides.split(arguments)
        path = Path(recipe)
        request = dataclasses.replace(from_file(path, bool(_trusted(changes, others=True))), repeats=str(path))
        if "out" not in changes:
            changes["out"] = _beside((path if path.is_dir() else path.parent).resolve())
        request = request.changed(changes)
    else:
        request = Request(recipe).changed(overrides.split(arguments))
    from leibler.train.processes import is_main, leave

    try:
        run = request.run(resume=resume is not None)
    except KeyboardInterrupt:
        if is_main():
            typer.echo(printable(_saved(Path(request.out or "."))), err=True)
        raise typer.Exit(INTERRUPTED) from None
    if is_main():
        typer.echo(printable(_summary(run)))
    leave()


def _trusted(changes: Mapping[str, str], others: bool = False) -> bool | None:
    """Whether the command line allows code of checkpoints; None if it says something else and must not."""
    if not others and set(changes) - {TRUST}:
        return None
    return TRUST in changes and overrides.convert(changes[TRUST], bool, TRUST)


def _whole(folder: Path) -> Path:
    """The run that a stage's directory belongs to; any other directory itself."""
    from leibler.train.run_file import RUN_FILE, read_run_file

    parent = folder.absolute().parent
    if not (folder / RUN_FILE).exists() or not (parent / RUN_FILE).exists():
        return folder
    stages = read_run_file(parent).get("stages")
    return parent if isinstance(stages, list) and folder.absolute().name in stages else folder


def _saved(out: Path) -> str:
    found = sorted((out / "checkpoints").glob("step-*")) or sorted(out.glob("*/checkpoints/step-*"))
    if not found and list(out.glob("*/final")):
        return f"interrupted between stages; go on with: leibler train --resume {out}"
    if not found:
        return f"interrupted before the first checkpoint; nothing was saved in {out}"
    return f"interrupted; saved in {found[-1]}\ngo on with: leibler train --resume {out}"


def _summary(run: Any) -> str:
    numbers = {**{k: v for k, v in run.metrics.items() if k in ("loss", "reward", "entropy")}, **run.validation}
    shown = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items() if isinstance(value, (int, float)))
    return f"{run.out / 'final'}: the trained model ({shown})"
