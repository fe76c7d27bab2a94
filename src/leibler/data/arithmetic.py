"""A small parser of sums and products, so that a model's output is never evaluated as code."""

from __future__ import annotations

import re
from fractions import Fraction

_TOKEN = re.compile(r"\s*([0-9]+|[-+*/()])", re.ASCII)
MAX_LENGTH = 256
"""Longer texts are refused, which also bounds the recursion and the size of the numbers."""


class NotAnExpression(ValueError):
    """The text is not an expression of whole numbers, ``+ - * /`` and brackets, or divides by zero."""


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The exact value of an expression, and the numbers in it in their order.

    Grammar: ``sum = product (("+" | "-") product)*``, ``product = atom (("*" | "/") atom)*``,
    ``atom = digits | "(" sum ")"``; blanks may stand between tokens, a sign in front of a number may not.

    Raises:
        NotAnExpression: the text is anything else, longer than ``MAX_LENGTH``, or divides by zero.

    Examples:
        >>> evaluate("(3 + 5) * 2 / 4")
        (Fraction(4, 1), [3, 5, 2, 4])
    """
    tokens = _tokens(text)
    numbers: list[int] = []
    position = 0

    def peek() -> str:
        return tokens[position] if position < len(tokens) else ""

    def advance() -> str:
        nonlocal position
        token = peek()
        position += 1
        return token

    def atom() -> Fraction:
        token = advance()
        if token == "(":
            value = summed()
            if advance() != ")":
                raise NotAnExpression("a bracket is not closed")
            return value
        if not token.isdigit():
            raise NotAnExpression(f"a number is missing before {token or 'the end'!r}")
        numbers.append(int(token))
        return Fraction(numbers[-1])

    def product() -> Fraction:
        value = atom()
        while peek() in ("*", "/"):
            if advance() == "*":
                value *= atom()
                continue
            divisor = atom()
            if divisor == 0:
                raise NotAnExpression("a division by zero")
            value /= divisor
        return value

    def summed() -> Fraction:
        value = product()
        while peek() in ("+", "-"):
            value = value + product() if advance() == "+" else value - product()
        return value

    value = summed()
    if position < len(tokens):
        raise NotAnExpression(f"{peek()!r} cannot stand there")
    return value, numbers


def _tokens(text: str) -> list[str]:
    if len(text) > MAX_LENGTH:
        raise NotAnExpression(f"longer than {MAX_LENGTH} characters")
    text = text.rstrip()
    tokens, position = [], 0
    while position < len(text):
        found = _TOKEN.match(text, position)
        if found is None:
            raise NotAnExpression(f"{text[position]!r} is not part of an expression")
        tokens.append(found[1])
        position = found.end()
    return tokens
