"""Exact checkers of responses."""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal

from leibler.data.records import Record
from leibler.errors import DataError

_NUMBER = re.compile(r"[+-]?(\d{1,3}(,\d{3})+|\d+)(\.\d+)?", re.ASCII)


def normalised(text: str) -> str:
    """The text without what does not make an answer another answer.

    Canonical Unicode form, no case, single blanks, no final full stop; a plain number in its shortest form.
    (Not the compatibility form, which would turn x² into x2.)

    Examples:
        >>> normalised("  The  Answer. "), normalised("1,200.0"), normalised("x²")
        ('the answer', '1200', 'x²')
    """
    text = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    text = text.removesuffix(".").rstrip()
    if len(text) <= 100 and _NUMBER.fullmatch(text):
        # Decimal, not float: two long numbers that differ in their last digit are different.
        number = Decimal(text.replace(",", ""))
        if not number:
            return "0"
        plain = f"{number:f}"
        return plain.rstrip("0").rstrip(".") if "." in plain else plain
    return text


def matches_answer(record: Record, text: str) -> float:
    """1.0 if the whole response is the record's answer up to ``normalised``, else 0.0.

    Raises:
        DataError: the record has no answer.

    Examples:
        >>> matches_answer(Record("Capital of France?", answer="Paris"), " paris.")
        1.0
        >>> matches_answer(Record("Capital of France?", answer="Paris"), "Paris or Rome")
        0.0
    """
    if record.answer is None:
        raise DataError(f"{record.source or repr(record.prompt)} has no 'answer' to check a response against; add one.")
    return float(normalised(text) == normalised(record.answer))
