"""What makes a row a record, and what is wrong with it when it is none."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from leibler.data.records import FIELDS, TEXT_FIELDS, Record

MAX_DEPTH = 64
"""Deeper nesting in an extra column is refused: writing it back would end in a RecursionError."""
MAX_LINE = 8 * 2**20
"""Bytes in a line, characters in a text. A longer one is no training example, and must not fill the memory."""
MAX_VALUES = 2**20
"""Values in a row. A structure of Python that holds itself many times over has any number of them."""
MAX_DIGITS = 4000
"""Of a whole number; Python writes no longer ones."""


LONG = f"longer than {MAX_LINE // 2**20} MB; cut it into examples"


class BadRow(ValueError):
    """A row that cannot be used: ``reason`` is the same for every row with that fault, ``detail`` is about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


def parse_line(raw: bytes) -> Any:
    """The JSON value on a line.

    Raises:
        BadRow: it is not UTF-8 or not JSON (NaN, Infinity and a key given twice are not).
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8; save the file as UTF-8", f"{error.reason} at byte {error.start + 1}") from error
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    except RecursionError as error:
        raise BadRow(f"nested deeper than {MAX_DEPTH} levels") from error
    except json.JSONDecodeError as error:
        raise BadRow("not JSON; write one JSON object per line", f"{error.msg} at column {error.colno}") from error
    except BadRow:
        raise
    except ValueError as error:  # a whole number with more digits than Python converts
        raise BadRow("not JSON; write one JSON object per line", str(error)) from error


def to_record(row: Any, needs: Sequence[str], source: str) -> Record:
    """The record that a row states.

    Args:
        row: a parsed row: a mapping, or already a record.
        needs: columns that must be there.
        source: where it stands; a record that knows better keeps its own.

    Raises:
        BadRow: something is missing, empty or of the wrong type.

    Examples:
        >>> to_record({"prompt": "2+2=", "answer": 4}, ["prompt"], "a.jsonl:1").answer
        '4'
    """
    if isinstance(row, Record):
        source = row.source or source
        row = {name: getattr(row, name) for name in FIELDS} | dict(row.extra)
    if not isinstance(row, Mapping):
        raise BadRow('not a JSON object; write an object such as {"prompt": ...}', f"it is {_kind(row)}")
    odd = [key for key in row if not isinstance(key, str)]
    if odd:
        raise BadRow("a column name is not text", f"it is {_kind(odd[0])}")
    _Check(row)
    if "prompt" not in row and ("messages" in row or "conversations" in row):
        raise BadRow(_CHAT, "the row has 'messages' and no 'prompt'")
    texts = {name: _text(row, name, needs) for name in TEXT_FIELDS}
    if texts["prompt"] is None:
        raise BadRow("'prompt' is missing")
    # With a response an empty prompt is plain text to learn, which begins at the begin token.
    if not any(texts.values()):
        raise BadRow("'prompt' is empty")
    answer, identity = (_scalar(row, name, needs) for name in ("answer", "id"))
    extra = {key: value for key, value in row.items() if key not in FIELDS}
    for name in needs:
        if name not in FIELDS and extra.get(name) is None:
            raise BadRow(f"'{name}' is missing")
    if "chosen" in needs and "rejected" in needs and texts["chosen"] == texts["rejected"]:
        raise BadRow("'chosen' and 'rejected' are the same, which is no preference")
    return Record(
        texts["prompt"], texts["completion"], texts["chosen"], texts["rejected"], answer, identity, source, extra
    )


_CHAT = (
    "chat format; render the messages to text with tokenizer.apply_chat_template(..., tokenize=False) and write "
    "'prompt' and 'completion'"
)


def _text(row: Mapping[str, Any], name: str, needs: Sequence[str]) -> str | None:
    value = row.get(name)
    if value is None:
        if name in needs:
            raise BadRow(f"'{name}' is missing")
        return None
    if isinstance(value, (list, tuple)) and value and all(isinstance(turn, Mapping) for turn in value):
        raise BadRow(_CHAT, f"'{name}' is a list of messages")
    if not isinstance(value, str):
        raise BadRow(f"'{name}' is not text", f"it is {_kind(value)}")
    if len(value) > MAX_LINE:
        raise BadRow(LONG, f"{len(value)} characters in '{name}'")
    # A prompt may consist of blanks (an indentation to continue from); a response of blanks says nothing.
    if name != "prompt" and not value.strip():
        raise BadRow(f"'{name}' is empty")
    return value


def _scalar(row: Mapping[str, Any], name: str, needs: Sequence[str]) -> str | None:
    """An answer or a name: text, or a number that is kept as its text."""
    value = row.get(name)
    if value is None:
        if name in needs:
            raise BadRow(f"'{name}' is missing")
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise BadRow(f"'{name}' is neither text nor a number", f"it is {_kind(value)}")
    text = str(value)
    if not text.strip():
        raise BadRow(f"'{name}' is empty")
    return text


class _Check:
    """Refuses what could not be written back or tokenized: NaN, half characters, bottomless nesting."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        self.left = MAX_VALUES
        self.value(row, "", 0)

    def value(self, value: Any, path: str, depth: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise BadRow("more than a million values in one row")
        if depth > MAX_DEPTH:
            raise BadRow(f"nested deeper than {MAX_DEPTH} levels", f"in {path[:80]!r}")
        if isinstance(value, float) and not math.isfinite(value):
            raise BadRow("NaN or infinity, which are not JSON; write null", f"in {path[:80]!r}")
        if isinstance(value, str):
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                where = f"in {path[:80]!r} at {error.start + 1}"
                raise BadRow("half of a surrogate pair, which is not text", where) from error
        elif isinstance(value, int) and value.bit_length() > 3.3 * MAX_DIGITS:
            raise BadRow(f"a number of more than {MAX_DIGITS} digits; write it as text", f"in {path[:80]!r}")
        elif isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise BadRow("a column name is not text", f"{_kind(key)} in {path[:80]!r}")
                self.value(key, path or key, depth + 1)
                self.value(item, path or key, depth + 1)
        elif isinstance(value, (list, tuple)):
            for item in value:
                self.value(item, path, depth + 1)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise BadRow("a key is given twice; keep one", repr(twice[:80]))
    return result


def _refuse_constant(name: str) -> Any:
    raise BadRow("NaN or infinity, which are not JSON; write null", f"it holds {name}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
