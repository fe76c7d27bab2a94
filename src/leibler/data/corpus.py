"""A text corpus that every machine has: the sources and docstrings of Python's standard library.

Files are read and parsed, never imported. Which files there are depends on the Python version; the data set's content
hash tells two versions apart.
"""

from __future__ import annotations

import ast
import io
import os
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from leibler.data.hashing import digest
from leibler.data.records import Dataset, Record
from leibler.errors import DataError

What = Literal["source", "docstring", "all"]
WHAT: tuple[What, ...] = ("source", "docstring", "all")
Part = Literal["all", "train", "heldout"]
PARTS: tuple[Part, ...] = ("all", "train", "heldout")
HELDOUT_ONE_IN = 10
MIN_PIECE = 8
"""Shorter rests of a text teach nothing and are left out."""

_SKIPPED_FOLDERS = frozenset({"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "__phello__"})
_SKIPPED_FOLDERS |= {"site-packages", "dist-packages", "_bundled"}  # other people's
_SKIPPED_FOLDERS |= {"__pycache__", "lib-dynload", "encodings", "pydoc_data"}  # tables and binaries
_SKIPPED_PREFIXES = ("config-", "_sysconfigdata")  # depend on how this Python was built


@dataclass(frozen=True)
class Document:
    """One source file, or one docstring of it.

    Args:
        file: the file, relative to the standard library, with ``/``.
        line: where the text begins, from 1.
        kind: ``source`` or ``docstring``.
        text: the text, with tabs expanded and no form feeds.
    """

    file: str
    line: int
    kind: str
    text: str


def stdlib_documents(what: What = "all", *, ascii_only: bool = True, root: str | Path | None = None) -> list[Document]:
    """The documents of the standard library, sorted by file and line.

    Args:
        what: ``source``, ``docstring`` or ``all``.
        ascii_only: leave out documents with characters other than printable ASCII and line ends.
        root: another folder to read instead.

    Raises:
        DataError: ``what`` is unknown, or there is no Python source in the folder.

    Examples:
        >>> documents = stdlib_documents("source")
        >>> "json/decoder.py" in [document.file for document in documents]
        True
    """
    if what not in WHAT:
        raise DataError(f"corpus:stdlib has no text of kind {what!r}; choose one of {', '.join(WHAT)}.")
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    documents = [
        document
        for name in _files(folder)
        for document in _read(folder, name, what)
        if not ascii_only or _printable(document.text)
    ]
    if not documents:
        raise DataError(f"there is no Python source in {folder}; install the sources of the standard library.")
    return documents


def pieces(text: str, length: int) -> Iterator[tuple[int, str]]:
    """Cuts a text into pieces of at most ``length`` characters, at line ends where it can; (line offset, piece).

    The pieces joined are the text. A line longer than ``length`` is cut within.

    Examples:
        >>> list(pieces("one\\ntwo\\nthree\\n", 8))
        [(0, 'one\\ntwo\\n'), (2, 'three\\n')]
    """
    piece, start = "", 0
    for line, row in enumerate(io.StringIO(text)):  # splitlines would also cut at form feeds and the like
        if piece and len(piece) + len(row) > length:
            yield start, piece
            piece = ""
        while len(row) > length:
            yield line, row[:length]
            row = row[length:]
        start = start if piece else line
        piece += row
    if piece:
        yield start, piece


def stdlib(
    *,
    length: int = 400,
    limit: int | None = None,
    seed: int = 0,
    what: What = "source",
    part: Part = "all",
    prompt: float = 0.25,
    ascii_only: bool = True,
    root: str | Path | None = None,
) -> Dataset:
    """Pieces of the standard library as records: the first part is the prompt, the rest the completion.

    One file in ten is held out, by a hash of its name and so for every seed, and a piece that occurs in several files
    (a licence, a common ending) is kept once; so no held-out text is seen in training.

    Args:
        length: the most characters in a piece; at least ``2 * MIN_PIECE``.
        limit: how many pieces, chosen by the seed from all files alike; None takes all, in the order of the seed.
        seed: which pieces and in which order.
        what: ``source``, ``docstring`` or ``all``.
        part: ``train`` and ``heldout`` share no file; ``all`` is both.
        prompt: the share of a piece that is the prompt, cut at the end of a line where there is one.
        ascii_only: leave out documents with characters other than printable ASCII and line ends.
        root: another folder to read instead.

    Raises:
        DataError: an argument is out of range or nothing is left.

    Examples:
        >>> data = stdlib(length=200, limit=4, part="heldout")
        >>> len(data), data.kind, max(len(r.prompt) + len(r.completion) for r in data) <= 200
        (4, 'completions', True)
    """
    if length < 2 * MIN_PIECE:
        raise DataError(
            f"corpus:stdlib cannot cut pieces of length={length}; give at least {2 * MIN_PIECE} characters."
        )
    if limit is not None and limit < 1:
        raise DataError(f"corpus:stdlib was asked for limit={limit} pieces; ask for at least 1.")
    if not 0 < prompt < 1:
        raise DataError(f"corpus:stdlib cannot take prompt={prompt}; give the prompt's share, between 0 and 1.")
    if part not in PARTS:
        raise DataError(f"corpus:stdlib has no part {part!r}; choose one of {', '.join(PARTS)}.")
    seen: set[str] = set()
    chosen: list[tuple[int, Record]] = []
    for document in stdlib_documents(what, ascii_only=ascii_only, root=root):
        held = digest("heldout", document.file) % HELDOUT_ONE_IN == 0
        for offset, piece in pieces(document.text, length):
            text = piece.strip("\n")
            # A piece is counted as seen before its part is looked at: the same text must not stand in both.
            if len(text.strip()) < MIN_PIECE or text in seen:
                continue
            seen.add(text)
            if part != "all" and held != (part == "heldout"):
                continue
            cut = _cut(text, prompt)
            line = document.line + offset + len(piece) - len(piece.lstrip("\n"))
            record = Record(text[:cut], completion=text[cut:], source=f"{document.file}:{line}")
            chosen.append((digest("corpus", seed, text), record))
    chosen.sort(key=lambda pair: pair[0])
    records = [record for _, record in chosen][:limit]
    if not records:
        raise DataError(f"corpus:stdlib has no text for what={what}, part={part}; ask for part=all.")
    settings = f"length={length},seed={seed},what={what},part={part}" + ("" if limit is None else f",limit={limit}")
    return Dataset(tuple(records), name=f"corpus:stdlib:{settings}")


def _cut(text: str, share: float) -> int:
    """Where the prompt ends: after the line that holds the share if it ends in the first half, else within it."""
    wanted = max(1, round(share * len(text)))
    end = text.find("\n", wanted - 1) + 1
    cut = end if 0 < end <= max(wanted, len(text) // 2) else wanted
    # Both parts must say something: blanks alone are an empty prompt or completion.
    while cut < len(text) and not text[:cut].strip():
        cut += 1
    while cut > 1 and not text[cut:].strip():
        cut -= 1
    return cut


def _files(folder: Path) -> list[str]:
    names = []
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith(_SKIPPED_PREFIXES))
        for name in files:
            if name.endswith(".py") and not name.startswith(_SKIPPED_PREFIXES):
                names.append((Path(here) / name).relative_to(folder).as_posix())
    return sorted(names)


def _read(folder: Path, name: str, what: What) -> Iterator[Document]:
    # Sources are UTF-8 unless they say otherwise; the few that do are not ASCII either and drop out as replaced text.
    text = (folder / name).read_text(encoding="utf-8", errors="replace")
    if what != "docstring":
        yield Document(name, 1, "source", _clean(text))
    if what == "source":
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a file's own invalid escapes are not this reader's business
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return  # templates and deliberately broken files hold no docstrings
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node)
            if docstring:
                found.append(Document(name, node.body[0].lineno, "docstring", _clean(docstring)))
    yield from sorted(found, key=lambda document: document.line)


def _clean(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\f", "").expandtabs(4)


def _printable(text: str) -> bool:
    return text.isascii() and text.replace("\n", "").isprintable()
