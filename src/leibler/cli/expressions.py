"""Parts of a recipe written as text: ``Linear(5e-3, 1e-3, steps=200)``, ``Reward() >> GroupNormalised()``.

The grammar is Python's, cut down to literals, calls of the library's own parts, and the operators that parts
compose with. Names are looked up in a fixed list of modules; attributes, comprehensions and everything else are
refused, so a run file from elsewhere cannot run code.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import operator
from functools import cache
from typing import Any

MODULES = ("leibler.divergence", "leibler.estimate", "leibler.objective", "leibler.train")
"""Where names are looked up, first match wins."""

_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.RShift: operator.rshift}
_UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert}


class ExpressionError(ValueError):
    """Text that is not an expression over known parts. ``looks_like_one`` tells a mistake from mere text."""

    def __init__(self, message: str, looks_like_one: bool = False) -> None:
        super().__init__(message)
        self.looks_like_one = looks_like_one


@cache
def vocabulary() -> dict[str, Any]:
    """The public callables of the library by name."""
    out: dict[str, Any] = {}
    for name in reversed(MODULES):
        module = importlib.import_module(name)
        for public in getattr(module, "__all__", [n for n in vars(module) if n[0].isupper()]):
            part = getattr(module, public)
            # Parts are capitalised; functions that do things (fit, load, get) are not.
            if public[0].isupper() and callable(part) and (inspect.isclass(part) or inspect.isfunction(part)):
                out[public] = part
    return out


def evaluate(text: str) -> Any:
    """The value of an expression.

    Raises:
        ExpressionError: not in the grammar, an unknown name, or a part that refuses its arguments.

    Examples:
        >>> evaluate("[1, 2.5, 'a']")
        [1, 2.5, 'a']
    """
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise ExpressionError(f"'{text}' is not a value", looks_like_one="(" in text) from None
    return _value(tree)


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple):
        return tuple(_value(e) for e in node.elts)
    if isinstance(node, ast.List):
        return [_value(e) for e in node.elts]
    if isinstance(node, ast.Dict) and None not in node.keys:
        return {_value(k): _value(v) for k, v in zip(node.keys, node.values) if k is not None}
    if isinstance(node, ast.Name):
        return _call(node.id, (), {}) if node.id not in ("inf",) else float("inf")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(k.arg for k in node.keywords):
        arguments = tuple(_value(a) for a in node.args)
        return _call(node.func.id, arguments, {str(k.arg): _value(k.value) for k in node.keywords}, written=True)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _operate(_BINARY[type(node.op)], _value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _operate(_UNARY[type(node.op)], _value(node.operand))
    raise ExpressionError(f"'{ast.unparse(node)}' is neither a literal nor a part of the library", True)


def _operate(operation: Any, *operands: Any) -> Any:
    try:
        return operation(*operands)
    except TypeError as error:
        raise ExpressionError(str(error), True) from None


def _call(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any], written: bool = False) -> Any:
    from leibler import divergence

    part = vocabulary().get(name)
    if part is None and name in divergence.names():
        if arguments:
            raise ExpressionError(f"{name} takes its parameters by name", True)
        return divergence.get(name, **keywords)
    if part is None:
        known = [*vocabulary(), *divergence.names()]
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ExpressionError(f"{name} is not a part of the library{hint}", written or bool(near))
    try:
        return part(*arguments, **keywords)
    except TypeError as error:
        raise ExpressionError(f"{name}: {str(error).removeprefix(name).removeprefix('.__init__() ')}", True) from None
