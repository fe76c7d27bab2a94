"""Writing that a kill or a power cut cannot tear: aside, flushed to disk, renamed into place, the folder flushed too.

At each moment the old content stands under its name, or nothing does, or the new content whole. What was not renamed
any more begins with ``.writing-`` or ``.removing-`` and is swept away by the next write.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

WRITING, REMOVING = ".writing-", ".removing-"


def write(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file atomically: ``fill`` is given it, open."""
    aside = path.with_name(WRITING + path.name)
    with aside.open("wb") as file:
        fill(file)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    flush(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write(path, lambda file: file.write(text.encode()))


@contextmanager
def folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``path`` when the block ends (and not if it raises)."""
    aside = path.with_name(WRITING + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    yield aside
    for part in sorted(aside.rglob("*"), reverse=True):
        flush(part)
    flush(aside)
    remove(path)
    aside.rename(path)
    flush(path.parent)


def remove(path: Path) -> None:
    """Remove a folder so that it is never seen half removed."""
    if path.exists():
        gone = path.with_name(REMOVING + path.name)
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone)


def sweep(parent: Path) -> None:
    """Remove what killed writes left in a folder."""
    for left in (*parent.glob(WRITING + "*"), *parent.glob(REMOVING + "*")):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def flush(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
