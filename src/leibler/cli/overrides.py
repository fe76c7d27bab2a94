"""``key=value`` on the command line, turned into typed values and put where they belong.

A value is read as the type that its place asks for: the annotation of a function's parameter or of a dataclass's
field. Where a part of a recipe is asked for, the text is a constructor expression, ``Linear(5e-3, 1e-3, steps=200)``
or ``jensen_shannon``; names come from the library's own parts, arguments are literals or further parts, and nothing
else is evaluated.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from leibler.cli.expressions import LARGEST, NONSENSE, ExpressionError, evaluate, fault
from leibler.errors import RecipeError

UNKNOWN = object()
"""Stands for an annotation that says nothing."""


def split(arguments: Iterable[str]) -> dict[str, str]:
    """``["a=1", "b.c=x"]`` as ``{"a": "1", "b.c": "x"}``.

    Raises:
        RecipeError: an argument without ``=``, or a key given twice.

    Examples:
        >>> split(["steps=200", "data=task:addition:digits=2"])
        {'steps': '200', 'data': 'task:addition:digits=2'}
    """
    out: dict[str, str] = {}
    for argument in arguments:
        key, equals, value = argument.partition("=")
        key = key.strip()
        if not equals or not key:
            raise RecipeError(f"'{_short(argument)}' is not an override; write it as key=value.")
        if key in out:
            raise RecipeError(f"{key} is given twice, as '{_short(out[key])}' and as '{_short(value)}'; keep one.")
        out[key] = value
    return out


def unknown(key: str, known: Iterable[str], prefix: str = "", listed: Iterable[str] | None = None) -> RecipeError:
    """The error for a key that does not exist.

    Args:
        key: what was asked for.
        known: everything that could have been meant; the nearest are suggested.
        prefix: what stands before all of these keys.
        listed: what the message lists as known (by default, everything known).
    """
    known = list(known)
    near = difflib.get_close_matches(key, known, n=2, cutoff=0.6)
    if not near:  # the right name in the wrong place
        near = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]][:2]
    hint = f" (did you mean {' or '.join(prefix + n for n in near)}?)" if near else ""
    listing = ", ".join(known if listed is None else listed) or "none"
    where = f"under {prefix[:-1]}" if prefix else "keys"
    return RecipeError(f"{prefix}{_short(key)} is not a known key{hint}; known {where}: {listing}.")


def hints(of: Any) -> dict[str, Any]:
    """The annotations of a function or class as types; one that cannot be evaluated is left out."""
    try:
        return typing.get_type_hints(of)
    except (NameError, TypeError, AttributeError, SyntaxError):
        return _hints_one_by_one(of)  # some annotation names what is imported for type checkers only


def _hints_one_by_one(of: Any) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for base in reversed(inspect.getmro(of)) if inspect.isclass(of) else [inspect.unwrap(of)]:
        names = {**vars(typing), **vars(inspect.getmodule(base) or typing)}
        for name, annotation in getattr(base, "__annotations__", {}).items():
            one = types.SimpleNamespace(__annotations__={name: annotation})
            try:
                out |= typing.get_type_hints(one, names)
            except (NameError, TypeError, AttributeError, SyntaxError):
                out.pop(name, None)
    return out


# ---- one value ---------------------------------------------------------------------------------------------------


def describe(annotation: Any) -> str:
    """An annotation in words, for messages.

    Examples:
        >>> describe(int | None)
        'a whole number or none'
    """
    if annotation in (UNKNOWN, Any, inspect.Parameter.empty):
        return "a value"
    plain = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
    if annotation in plain:
        return plain[annotation]
    if annotation in (None, type(None)):
        return "none"
    origin, arguments = typing.get_origin(annotation), list(typing.get_args(annotation))
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}" if len(arguments) > 1 else str(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(a) for a in arguments))
    if origin is typing.Annotated:
        return describe(arguments[0])
    if _is_sequence(origin or annotation):
        return f"a comma-separated list of {describe(arguments[0])}" if arguments else "a comma-separated list"
    if _is_mapping(origin or annotation):
        return "a mapping such as {a: 1}"
    return f"a part such as {annotation.__name__}(...)" if inspect.isclass(annotation) else "a value"


def convert(text: str, annotation: Any = UNKNOWN, key: str = "value") -> Any:
    """Read text as a type.

    Args:
        text: what was typed after ``=``.
        annotation: the type that is wanted; without one, a literal or an expression, or else the text itself.
        key: what the value is for; used in the message.

    Raises:
        RecipeError: the text cannot be read so; the message names key, value and expected type.

    Examples:
        >>> convert("1e-3", float), convert("none", int | None), convert("1,2", tuple[int, ...])
        (0.001, None, (1, 2))
        >>> convert("many", int, "steps")
        Traceback (most recent call last):
        ...
        leibler.errors.RecipeError: steps=many: expected a whole number.
    """
    try:
        return _convert(text.strip(), annotation)
    except ExpressionError as error:
        raise RecipeError(f"{key}={_short(text)}: {error}.") from None
    except (ValueError, TypeError, OverflowError):
        raise RecipeError(f"{key}={_short(text)}: expected {describe(annotation)}.") from None


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text):,} characters)"


def _convert(text: str, annotation: Any) -> Any:
    if annotation in (UNKNOWN, Any, inspect.Parameter.empty):
        return _free(text)
    if annotation in (None, type(None)):
        if text.lower() in ("none", "null"):
            return None
        raise ValueError(text)
    if annotation is bool:
        return _boolean(text)
    if annotation is int:
        return _whole(text)
    if annotation is float:
        number = float(text)
        if number != number:
            raise ValueError(text)
        return number
    if annotation in (str, Path):
        return annotation(text)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        for choice in arguments:
            if text == str(choice) or (choice is None and text.lower() in ("none", "null")):
                return choice
        raise ValueError(text)
    if origin is typing.Annotated:
        return _convert(text, arguments[0])
    if origin in (Union, types.UnionType):
        return _union(text, arguments)
    if _is_sequence(origin or annotation):
        return _sequence(text, origin or annotation, arguments)
    if _is_mapping(origin or annotation):
        value = _yaml(text)
        if not isinstance(value, dict):
            raise ValueError(text)
        return value
    if annotation.__class__.__module__ == "torch" or getattr(annotation, "__module__", "") == "torch":
        return _torch(text, annotation)
    return _part(text, annotation)


def _free(text: str) -> Any:
    for read in (lambda t: _convert(t, None), _boolean_word, _whole, float):
        try:
            return read(text)
        except ValueError:
            continue
    try:
        return evaluate(text)
    except ExpressionError:
        return text


def _boolean_word(text: str) -> bool:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    raise ValueError(text)


def _boolean(text: str) -> bool:
    table = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    if text.lower() not in table:
        raise ValueError(text)
    return table[text.lower()]


def _whole(text: str) -> int:
    try:
        whole = int(text)
    except ValueError:
        number = float(text)  # 1e4 is a whole number to everybody but int()
        if not number.is_integer():
            raise
        whole = int(number)
    if abs(whole) > LARGEST:
        raise ValueError(text)
    return whole


_RANK = {type(None): 0, bool: 1, int: 2, float: 3, Path: 8, str: 9}


def _union(text: str, arguments: tuple[Any, ...]) -> Any:
    # Narrow before wide: none, numbers, choices, then parts, and text last, because everything is text. Where text is
    # an answer, a part is not looked for: a path must not be mistaken for an expression.
    texts = str in arguments or Path in arguments
    failed: ExpressionError | None = None
    for argument in sorted(arguments, key=lambda a: _RANK.get(a, 4)):
        if texts and _is_part(argument):
            continue
        if argument is bool and not {"true", "false", "yes", "no", "on", "off"} & {text.lower()}:
            continue  # 0 and 1 are numbers where a number is also possible
        try:
            return _convert(text, argument)
        except ExpressionError as error:
            failed = error
        except ValueError:
            continue
    if failed is not None and failed.looks_like_one:
        raise failed
    raise ValueError(text)


def _sequence(text: str, origin: Any, arguments: tuple[Any, ...]) -> Any:
    inner = text[1:-1] if text[:1] + text[-1:] in ("[]", "()") else text
    items = [item.strip() for item in _split_outside_brackets(inner)] if inner.strip() else []
    if origin is tuple and arguments and Ellipsis not in arguments:
        if len(items) != len(arguments):
            raise ValueError(text)
        return tuple(_convert(i, a) for i, a in zip(items, arguments))
    kind = arguments[0] if arguments else UNKNOWN
    values = [_convert(i, kind) for i in items]
    return values if origin is list else frozenset(values) if origin is frozenset else tuple(values)


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def _yaml(text: str) -> Any:
    from leibler.train.run_file import read_yaml

    return read_yaml(text)


def _torch(text: str, annotation: Any) -> Any:
    import torch

    if annotation is torch.device:
        try:
            return torch.device(text)
        except RuntimeError:
            raise ValueError(text) from None
    value = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(value, annotation):
        raise ValueError(text)
    return value


def _part(text: str, annotation: Any) -> Any:
    value = evaluate(text)
    if inspect.isclass(annotation):
        try:
            fits = isinstance(value, annotation)
        except TypeError:  # a protocol that cannot be asked
            fits = True
        if not fits:
            raise ValueError(text)
    return value


def _is_part(annotation: Any) -> bool:
    origin = typing.get_origin(annotation) or annotation
    plain = (bool, int, float, str, Path, type(None), Literal)
    return not (origin in plain or _is_sequence(origin) or _is_mapping(origin))


def _is_sequence(origin: Any) -> bool:
    return origin in (tuple, list, frozenset, set) or origin is Sequence or origin is Iterable


def _is_mapping(origin: Any) -> bool:
    return origin is dict or origin is Mapping


# ---- a function's parameters -------------------------------------------------------------------------------------


def parameters(function: Callable[..., Any], leave_out: Iterable[str] = ()) -> dict[str, Any]:
    """The named parameters of a function and their annotations (``UNKNOWN`` where there is none)."""
    known, skip = hints(function), set(leave_out)
    out: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or name in skip:
            continue
        annotation = known.get(name, UNKNOWN)
        if annotation is UNKNOWN and parameter.default not in (parameter.empty, None):
            annotation = type(parameter.default)
        out[name] = annotation
    return out


# ---- a place inside a frozen value -------------------------------------------------------------------------------


def children(value: Any) -> dict[str, Any]:
    """The named parts of a value: fields of a dataclass, entries of a mapping, places of a sequence."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if not f.name.startswith("_")}
    if isinstance(value, Mapping):
        return {str(k): v for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return {str(i): v for i, v in enumerate(value)}
    return {}


def paths(value: Any, prefix: str = "", depth: int = 6) -> list[str]:
    """Every dotted path into a value, parents before children."""
    out: list[str] = []
    for name, child in children(value).items():
        out.append(prefix + name)
        if depth > 1:
            out += paths(child, f"{prefix}{name}.", depth - 1)
    return out


def leaves(value: Any, prefix: str = "", depth: int = 8) -> dict[str, Any]:
    """The places of a value that have no parts of their own, by dotted path.

    Examples:
        >>> leaves({"a": (1, 2.5)})
        {'a.0': 1, 'a.1': 2.5}
    """
    out: dict[str, Any] = {}
    for name, child in children(value).items():
        inside = leaves(child, f"{prefix}{name}.", depth - 1) if depth > 1 else {}
        out |= inside or {prefix + name: child}
    return out


def replace(value: Any, changes: Mapping[str, str], prefix: str = "") -> Any:
    """A copy of a nested frozen value with other numbers, words or parts at dotted paths.

    All changes are made together, so a value whose parts must fit each other is checked once, with all of them. A
    change inside a part that is itself replaced applies to the new part.

    Args:
        value: dataclasses, mappings, tuples and lists within each other; not changed itself.
        changes: text by dotted path, for example ``{"objective.terms.0.coefficient": "0.5"}``; each is read as the
            type that its place is annotated with.
        prefix: what messages put before a path.

    Raises:
        RecipeError: no such place, text of another type, or parts that do not fit together.
    """
    tree: _Tree = {}
    for path, text in changes.items():
        node = tree
        for name in path.split("."):
            node = node.setdefault(name, {})  # type: ignore[assignment]
        node[None] = text
    return _replace(value, tree, prefix.rstrip("."), UNKNOWN)


_Tree = dict[str | None, Any]
"""Changes by the next name of their path; under None, the text for this very place."""


def _replace(value: Any, tree: _Tree, key: str, annotation: Any) -> Any:
    if None in tree:
        if annotation is UNKNOWN and isinstance(value, (bool, int, float, str, Path)):
            annotation = type(value)
        value = convert(tree[None], annotation, key)
    below = {name: subtree for name, subtree in tree.items() if name is not None}
    if not below:
        return value
    inside, prefix = children(value), f"{key}." if key else ""
    for name in below:
        if name not in inside and inside:
            raise unknown(_longest(name, below[name]), paths(value) if len(inside) < 12 else inside, prefix, inside)
        if name not in inside:
            raise RecipeError(f"{prefix}{name} is not a known key: {key} is {value!r}, which has no parts.")
    known = hints(type(value)) if dataclasses.is_dataclass(value) else {}
    new = {n: _replace(inside[n], subtree, prefix + n, known.get(n, UNKNOWN)) for n, subtree in below.items()}
    if isinstance(value, Mapping):
        return {k: new.get(str(k), v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(new.get(str(i), v) for i, v in enumerate(value))
    try:
        return _with_fields(value, new)
    except NONSENSE as error:  # a part that was given what it did not look for
        raise RecipeError(f"{', '.join(prefix + name for name in new)} cannot be set so: {fault(error)}.") from None


def _longest(name: str, tree: _Tree) -> str:
    """The path that was asked for, from an unknown name on: what the nearest known paths are compared with."""
    while tree and None not in tree:
        below, tree = next(iter(tree.items()))
        name = f"{name}.{below}"
    return name


def _with_fields(value: Any, new: dict[str, Any]) -> Any:
    fields = dataclasses.fields(value)
    if set(inspect.signature(type(value)).parameters) == {f.name for f in fields}:
        return dataclasses.replace(value, **new)
    # A class with an __init__ of its own, which may or may not take its fields by name and as they are stored.
    try:
        return type(value)(**{f.name: new.get(f.name, getattr(value, f.name)) for f in fields})
    except TypeError:
        return _copy_with(value, new)


def _copy_with(value: Any, new: dict[str, Any]) -> Any:
    """A copy with other fields, checked as a new one is (by ``__post_init__``)."""
    other = copy.copy(value)
    for name in set(vars(other)) - {f.name for f in dataclasses.fields(value)}:  # computed from the old fields
        object.__delattr__(other, name)
    for name, part in new.items():
        object.__setattr__(other, name, part)
    if hasattr(other, "__post_init__"):
        other.__post_init__()
    return other
