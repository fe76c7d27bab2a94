"""Hostile values, texts and bytes, made from a generator: each is a small thing that somebody's file once held."""

from __future__ import annotations

import datetime
import decimal
import json
import random
from typing import Any

TEXTS = (
    "2+2=", "", " ", "\n", "\t \r\n", "\x00", "a\x00b", "\ufeff", "\u2028\u2029",
    "\x1b[31mred\x1b[0m", "\x9d0;title\x07",
    "\u202egnp.exe", "<script>alert(1)</script>", "é", "e\u0301", "𝕏", "👩‍👩‍👧", "\ud800",
    "a\udc80", "../../etc/passwd", "/dev/zero",
    "NaN", "Infinity", "null", "true", "-0", "1e999", "9" * 400, "0x10", "１２", "{{7*7}}", "%s%n", "$(id)", "`id`",
    "__import__('os').system('id')", "!!python/object/apply:os.system [id]", "&a [*a]", "*a", "- [", "{", "}", '"', "'",
    "a" * 3000, "(" * 300, "[" * 300, "-" * 300, "\\", "\\u0000", "\\ud800", "task:addition", "=", "a=b", ".", "..",
)  # fmt: skip

NUMBERS = (0, 1, -1, 7, 2**31, 2**63, 2**64, -(2**70), 10**400, 10**5000, 0.0, -0.0, 0.5, 1e-320, 1e308)
NOT_NUMBERS = (float("nan"), float("inf"), float("-inf"))

COLUMNS = ("prompt", "completion", "chosen", "rejected", "answer", "id", "reward", "weight", "messages", "tests", "x")


def text(draw: random.Random) -> str:
    kind = draw.randrange(4)
    if kind == 0:
        return draw.choice(TEXTS)
    if kind == 1:
        return "".join(
            chr(draw.choice((draw.randrange(32, 127), draw.randrange(0x250)))) for _ in range(draw.randrange(12))
        )
    if kind == 2:
        return draw.choice(TEXTS) + draw.choice(TEXTS)
    return f"{draw.randrange(100)}+{draw.randrange(100)}="


def scalar(draw: random.Random) -> Any:
    kind = draw.randrange(10)
    if kind < 5:
        return text(draw)
    if kind < 7:
        return draw.choice(NUMBERS)
    return draw.choice((None, True, False, *NOT_NUMBERS))


def value(draw: random.Random, depth: int = 0, json_only: bool = True) -> Any:
    """Something that stands in a column."""
    kind = draw.randrange(16)
    if kind < 9 or depth > 4:
        return scalar(draw)
    if kind < 11:
        return [value(draw, depth + 1, json_only) for _ in range(draw.randrange(4))]
    if kind < 13:
        return {text(draw): value(draw, depth + 1, json_only) for _ in range(draw.randrange(4))}
    if kind == 13:
        return nested(draw.choice((3, 63, 64, 65, 66, 200)), draw.choice(("list", "dict")))
    if json_only:
        return [{"role": "user", "content": text(draw)}]
    return python_value(draw)


def nested(levels: int, kind: str) -> Any:
    made: Any = 1
    for _ in range(levels):
        made = [made] if kind == "list" else {"a": made}
    return made


class Address:
    """An object of which nothing is known."""


def python_value(draw: random.Random) -> Any:
    """What a list of dicts may hold and a file cannot."""
    kind = draw.randrange(9)
    if kind == 0:
        ring: list[Any] = []
        ring.append(ring)
        return ring
    if kind == 1:
        doubling: list[Any] = ["lol"]
        for _ in range(40 if draw.random() < 0.05 else 4):
            doubling = [doubling, doubling]
        return doubling
    return draw.choice(
        (
            b"\xff\x00", {1: 2, "a": 3}, {(1, 2): 3}, {1, 2}, datetime.date(2024, 2, 29),
            decimal.Decimal("NaN"), Address(),
            range(3), complex(1, 2), bytearray(2), {None: 1}, float("nan"), (1, (2, (3,))), frozenset("ab"),
        )
    )  # fmt: skip


def row(draw: random.Random, json_only: bool = True) -> Any:
    """A row: often right or nearly right, sometimes anything."""
    kind = draw.randrange(10)
    if kind < 4:
        a, b = draw.randrange(10), draw.randrange(10)
        return {"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": a + b}
    if kind < 9:
        made = {"prompt": "1+1=", "completion": "2"} if draw.random() < 0.7 else {}
        for _ in range(draw.randrange(1, 4)):
            made[draw.choice(COLUMNS)] = value(draw, json_only=json_only)
        if draw.random() < 0.2:
            made["id"] = draw.choice((1, "1", "a"))
        return made
    return value(draw, json_only=json_only)


def line(draw: random.Random) -> bytes:
    """A line of a file of records."""
    kind = draw.randrange(12)
    if kind == 0:
        return draw.choice(
            (b"", b" ", b"\r", b"\t\x0b", b"\x00", b"\xff\xfe", b"\xe2\x82", b"[", b"]", b"[{", b"null,", b"//")
        )
    try:
        made = json.dumps(row(draw), ensure_ascii=draw.random() < 0.5).encode("utf-8", "surrogatepass")
    except ValueError:  # a number of more digits than Python writes
        made = b'{"prompt": ' + b"9" * 5000 + b"}"
    if kind == 1:
        made = made[:-1] + b', "prompt": "again"}' if made.endswith(b"}") else made
    if kind == 2:
        made = made[: draw.randrange(len(made) + 1)]
    if kind == 3:
        made = made + b" " + made
    return made


def mutated(draw: random.Random, data: bytes, most: int = 4) -> bytes:
    """Bytes flipped, cut, repeated, swapped, or exchanged for what parsers stumble over."""
    held = bytearray(data)
    for _ in range(draw.randrange(1, most + 1)):
        at = draw.randrange(len(held) + 1)
        end = min(len(held), at + draw.choice((1, 2, 4, 16, 64)))
        kind = draw.randrange(6)
        if kind == 0 and at < len(held):
            held[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            del held[at:end]
        elif kind == 2:
            held[at:at] = held[at:end] * draw.choice((1, 2, 50))
        elif kind == 3:
            held[at:at] = draw.choice(
                (b"\x00", b"\n", b"\r\n", b"\r", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80",
                b"\xf0\x9f", b"\\", b'"', b"{", b"[" * 200)
            )  # fmt: skip
        elif kind == 4:
            held[at:end] = bytes(draw.randrange(256) for _ in range(end - at))
        else:
            del held[at:]
    return bytes(held)
