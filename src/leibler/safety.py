"""What stands between names and texts from elsewhere and this machine's files and terminal."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path

from leibler.errors import RunError

_REORDERING = {*range(0x202A, 0x202F), *range(0x2066, 0x206A)}
_NAME = re.compile(r"[\w+-][\w.+-]{0,199}")
_MOST_FILES = 100_000
"""Entries looked at in a run directory; a run has some dozens."""


def printable(text: str) -> str:
    """Text with every control character but line ends and tabs written as its escape, safe to show on a terminal.

    So are halves of surrogate pairs, and the characters that turn the direction of writing and so make a line read as
    another one.

    Examples:
        >>> printable("red: \\x1b[31m, title: \\x9d0;x\\x07")
        'red: \\\\x1b[31m, title: \\\\x9d0;x\\\\x07'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    code = ord(character)
    if character in "\n\t" or (unicodedata.category(character) not in ("Cc", "Cs") and code not in _REORDERING):
        return character
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def plain_name(name: str, what: str) -> str:
    """A name that may become the name of a file: letters, digits, ``_ . + -``, not beginning with a dot.

    Raises:
        RunError: it holds anything else, such as ``/`` or ``..``.

    Examples:
        >>> plain_name("teacher", "the model")
        'teacher'
    """
    if not _NAME.fullmatch(name):
        raise RunError(
            f"{what} {name[:60]!r} cannot be the name of a file; use letters, digits, '_', '.', '+' and '-' only."
        )
    return name


def refuse_links(folder: Path) -> None:
    """Refuse to write into a directory in which a link leads out of it, or that holds pipes or devices.

    A directory from elsewhere could otherwise make a resumed run overwrite any file of yours, or wait for ever.

    Raises:
        RunError: naming the link.
    """
    root, seen = folder.resolve(), 0
    for here, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path, seen = Path(here, name), seen + 1
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise RunError(
                    f"{path} is a link to {os.readlink(path)}, out of the run directory; put a copy of what it leads "
                    "to in its place."
                )
            if not (path.is_symlink() or path.is_file() or path.is_dir()):
                raise RunError(f"{path} is neither a file nor a folder, which no run writes; remove it.")
            if seen > _MOST_FILES:
                raise RunError(f"{folder} holds more than {_MOST_FILES:,} files, which no run does; check the path.")
