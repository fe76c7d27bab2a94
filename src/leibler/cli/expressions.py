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
from functools import cache, partial
from typing import Any

MODULES = ("leibler.divergence", "leibler.estimate", "leibler.objective", "leibler.train")
"""Where names are looked up, first match wins."""

MOST_CHARACTERS = 2000
"""In an expression; a whole recipe takes some hundreds."""
DEEPEST = 50
"""Parts within parts; a recipe has less than ten levels."""
LARGEST = 2.0**63
"""Numbers beyond are refused: a whole number of a million digits would be exact, and slow."""

_BINARY = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.RShift: operator.rshift}
_UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Invert: operator.invert}


NONSENSE = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, AssertionError, RuntimeError)
"""What a part may raise that is given something it was not written for, and has not looked."""


def fault(error: Exception) -> str:
    """The first line of an error, or its kind if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


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
        if len(text) > MOST_CHARACTERS:
            raise ExpressionError(f"a value of {len(text):,} characters is too long", True)
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError):
        raise ExpressionError(f"'{text[:200]}' is not a value", looks_like_one="(" in text) from None
    except (RecursionError, MemoryError):  # the parser's own stack
        raise ExpressionError(f"'{text[:40]}...' is nested too deeply", True) from None
    return _value(tree, DEEPEST)


def _value(node: ast.expr, depth: int) -> Any:
    if depth == 0:
        raise ExpressionError("an expression is nested too deeply", True)
    value = partial(_value, depth=depth - 1)
    if isinstance(node, ast.Constant) and isinstance(node.value, (str, int, float, bool, type(None))):
        return _bounded(node.value)
    if isinstance(node, ast.Tuple):
        return tuple(value(e) for e in node.elts)
    if isinstance(node, ast.List):
        return [value(e) for e in node.elts]
    if isinstance(node, ast.Dict) and all(isinstance(k, ast.Constant) for k in node.keys):
        return {value(k): value(v) for k, v in zip(node.keys, node.values) if k is not None}
    if isinstance(node, ast.Name):
        return _call(node.id, (), {}) if node.id not in ("inf",) else float("inf")
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(k.arg for k in node.keywords):
        arguments = tuple(value(a) for a in node.args)
        return _call(node.func.id, arguments, {str(k.arg): value(k.value) for k in node.keywords}, written=True)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _operate(_BINARY[type(node.op)], value(node.left), value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _operate(_UNARY[type(node.op)], value(node.operand))
    raise ExpressionError(f"'{_unparsed(node)}' is neither a literal nor a part of the library", True)


def _unparsed(node: ast.expr) -> str:
    try:
        return ast.unparse(node)[:200]
    except (RecursionError, ValueError):  # too deep, or a number of too many digits
        return type(node).__name__


def _bounded(value: Any) -> Any:
    if isinstance(value, (int, float)) and abs(value) > LARGEST and value not in (float("inf"), float("-inf")):
        raise ExpressionError("a number is larger than 2**63", True)
    return value


def _operate(operation: Any, *operands: Any) -> Any:
    # Of text and lists, Python's operators would make copies: 10**9 * "a".
    if any(isinstance(o, (str, list, tuple, dict)) for o in operands):
        raise ExpressionError("operators join numbers and parts, not text or lists", True)
    try:
        return _bounded(operation(*operands))
    except NONSENSE as error:
        raise ExpressionError(fault(error), True) from None


def _call(name: str, arguments: tuple[Any, ...], keywords: dict[str, Any], written: bool = False) -> Any:
    from leibler import divergence

    part = vocabulary().get(name)
    if part is None and name in divergence.names():
        if arguments:
            raise ExpressionError(f"{name} takes its parameters by name", True)
        part = partial(divergence.get, name)
    if part is None:
        name = name[:60]
        known = [*vocabulary(), *divergence.names()]
        near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise ExpressionError(f"{name} is not a part of the library{hint}", written or bool(near))
    try:
        return part(*arguments, **keywords)
    except NONSENSE as error:
        raise ExpressionError(f"{name}: {fault(error).removeprefix(name).removeprefix('.__init__() ')}", True) from None
