"""The grammar of made data: ``task:addition:digits=3,n=2000,seed=1``, ``env:textworld:rooms=8`` and
``corpus:stdlib:length=400``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from leibler.data.corpus import stdlib
from leibler.data.records import Dataset
from leibler.data.tasks import TASKS
from leibler.errors import DataError

DEFAULT_N = 1000
MOST_CHARACTERS = 1000
CORPORA: dict[str, Callable[..., Dataset]] = {"stdlib": stdlib}
FAMILIES = ("task:", "env:", "corpus:")


def is_made(spec: str) -> bool:
    """Whether a specification names a task, an environment or a corpus and not a file."""
    return spec.startswith(FAMILIES)


def make(spec: str, limit: int | None = None) -> Dataset:
    """The data set that a ``task:``, ``env:`` or ``corpus:`` specification describes.

    ``task:NAME[:key=value,...]`` takes the knobs of the task, ``n`` (1000), ``seed`` (0) and ``part``
    (``all``, ``train`` or ``heldout``), and so does ``env:NAME`` with those of an environment;
    ``corpus:stdlib[:key=value,...]`` takes the arguments of ``stdlib``.

    Raises:
        DataError: an unknown name or knob, or a value that does not fit.

    Examples:
        >>> make("task:addition:digits=1,n=2").name
        'task:addition:digits=1,n=2,seed=0'
        >>> make("task:adition")
        Traceback (most recent call last):
        leibler.errors.DataError: there is no task 'adition' in 'task:adition' (did you mean 'addition'?); the tasks \
are addition, countdown, brackets.
    """
    if len(spec) > MOST_CHARACTERS:
        raise DataError(f"{spec[:60]!r}... has {len(spec):,} characters; write it shorter.")
    if not spec.startswith("corpus:"):
        made, values = configured(spec, n=int, seed=int, part=str)
        drawn = {key: values.pop(key) for key in ("seed", "part") if key in values}
        n = values.pop("n", DEFAULT_N if limit is None else limit)
        return made(**values).dataset(n if limit is None else min(n, limit), **drawn)
    made, text = _named(spec)
    parameters = inspect.signature(made).parameters.values()
    kinds = {p.name: int if p.default is None else type(p.default) for p in parameters if p.name != "root"}
    values = _values(spec, text, kinds)
    if limit is not None:
        values["limit"] = min(limit, values.get("limit", limit))
    return made(**values)


def configured(spec: str, **more: type) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What makes the task or environment of a specification, and the values given for its knobs and for ``more``.

    Raises:
        DataError: an unknown name or knob, or a value that does not fit.
    """
    made, text = _named(spec)
    values = _values(spec, text, knobs(made) | more)
    for field in _fields(made):
        if field.init and field.default is MISSING and field.default_factory is MISSING:
            raise DataError(f"{spec!r} cannot be made from text: {field.name!r} has no default; give it one.")
    return made, values


def _named(spec: str) -> tuple[Callable[..., Any], str]:
    """What a specification names, and the text of its knobs."""
    family, _, rest = spec.partition(":")
    name, _, text = rest.partition(":")
    known, noun, nouns = _known(family)
    if name not in known:
        raise DataError(
            f"there is no {noun} {name!r} in {spec!r}{_hint(name, known)}; the {nouns} are {', '.join(known)}."
        )
    return known[name], text


def _known(family: str) -> tuple[Mapping[str, Callable[..., Any]], str, str]:
    """What a family holds by name, and its words for one and for several."""
    if family == "env":
        from leibler.environment.registry import environments  # they stand on this package

        return environments(), "environment", "environments"
    return (TASKS, "task", "tasks") if family == "task" else (CORPORA, "corpus", "corpora")


def knobs(made: Any) -> dict[str, type]:
    """The knobs of a task or an environment, with their types: fields whose default can be written as text."""
    found = {f.name: f.default for f in _fields(made) if f.init}
    return {name: type(value) for name, value in found.items() if isinstance(value, (bool, int, float, str))}


def _fields(made: Any) -> tuple[Field[Any], ...]:
    return fields(made) if is_dataclass(made) else ()


def _values(spec: str, text: str, kinds: dict[str, type]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals:
            raise DataError(f"{pair!r} in {spec!r} is not of the form key=value; write for instance seed=1.")
        if key not in kinds:
            raise DataError(f"{spec!r} has no knob {key!r}{_hint(key, kinds)}; the knobs are {', '.join(kinds)}.")
        if key in values:
            raise DataError(f"{spec!r} gives {key!r} twice; keep one of them.")
        values[key] = _value(spec, key, value, kinds[key])
    return values


def _value(spec: str, key: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise DataError(f"{key}={text} in {spec!r} is neither true nor false; write one of the two.")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError as error:
        noun = {int: "a whole number", float: "a number"}.get(kind, kind.__name__)
        raise DataError(f"{key}={text} in {spec!r} is not {noun}; give one.") from error


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
