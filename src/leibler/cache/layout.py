"""How a teacher cache lies on disk.

    DIR/manifest.json     what it is, with the size and hash of every file; its own hash is the cache's
    DIR/index.npy         where each sequence stands, sorted by the hash of its content
    DIR/shard-00000.npy   one record per completion token: k entries, their log-probs, the rest, the token's own

Every file is whole or not there: written aside, flushed to disk, renamed. File names follow from their numbers and
stand in no file, so that none can lead outside of the directory; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from leibler import durable
from leibler.errors import DataError

VERSION = 1
MANIFEST, INDEX = "manifest.json", "index.npy"
DTYPES = {"float32": "<f4", "float16": "<f2"}
INDEX_DTYPE = np.dtype(
    [("key", "<u8"), ("check", "<u8"), ("shard", "<u4"), ("first", "<u4"), ("start", "<u4"), ("length", "<u4")]
)
"""A sequence: 128 bits of its content, its shard, its first record there, where its completion begins, its events."""


def record_dtype(k: int, dtype: str) -> np.dtype[Any]:
    """A completion token: ``crc`` is that of its whole sequence, so that every read can be verified."""
    return np.dtype([
        ("token", "<i4", (k,)), ("logp", DTYPES[dtype], (k,)), ("rest", "<f4"), ("label", "<f4"), ("crc", "<u4"),
    ])  # fmt: skip


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.npy"


@dataclass(frozen=True)
class FileEntry:
    """A file's size and hash."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())

    def fault(self, path: Path, *, thorough: bool) -> str | None:
        """What is wrong with a file, if anything: its size always, its hash where asked."""
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != self.bytes:
            return f"has {path.stat().st_size} bytes instead of {self.bytes}"
        if thorough and FileEntry.of(path) != self:
            return "was altered (its hash differs)"
        return None


@dataclass(frozen=True)
class Manifest:
    """What a cache is.

    Attributes:
        k, dtype: entries kept per token, and the type of their log-probs.
        vocab: real entries of the teacher's vocabulary.
        temperature: of its softmax.
        teacher, teacher_hash: where it came from, and its weights.
        tokenizer_hash: what the token ids mean.
        data, data_hash: where the texts came from, and what they say.
        batch_tokens, shard_tokens: tokens in a forward pass, and records in a shard, at most.
        tokens: completion tokens in each shard.
        index: the index file.
        shards: the shard files that are finished, the first ones.
    """

    k: int
    dtype: str
    vocab: int
    temperature: float
    teacher: str
    teacher_hash: str
    tokenizer_hash: str
    data: str
    data_hash: str
    batch_tokens: int
    shard_tokens: int
    tokens: tuple[int, ...]
    index: FileEntry
    shards: tuple[FileEntry, ...] = field(default=())
    version: int = VERSION

    @property
    def complete(self) -> bool:
        return len(self.shards) == len(self.tokens)

    @property
    def hash(self) -> str:
        """SHA-256 of all of this."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    def save(self, folder: Path) -> None:
        text = json.dumps({**asdict(self), "hash": self.hash}, indent=1)
        durable.write_text(folder / MANIFEST, text)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of a cache.

        Raises:
            DataError: there is none, it was altered, or another version wrote it.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise DataError(f"{folder} is no teacher cache (it has no {MANIFEST}); make one with `leibler cache`.")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, written = content["version"], content.pop("hash")
            if version != VERSION:
                raise DataError(f"{path} has version {version}, this leibler reads {VERSION}; make the cache again.")
            content["index"] = FileEntry(**content["index"])
            content["shards"] = tuple(FileEntry(**entry) for entry in content["shards"])
            content["tokens"] = tuple(int(n) for n in content["tokens"])
            found = cls(**{f.name: content[f.name] for f in fields(cls)})
            sound = found.hash == written and found.dtype in DTYPES and len(found.shards) <= len(found.tokens)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} is damaged ({type(error).__name__}); make the cache again.") from error
        if not sound:
            raise DataError(f"{path} was altered (its hash differs); make the cache again.")
        return found


def save_array(path: Path, array: np.ndarray) -> FileEntry:
    """Write an array; its size and hash."""
    durable.write(path, lambda file: np.save(file, array, allow_pickle=False))
    return FileEntry.of(path)


def map_array(path: Path, dtype: np.dtype[Any], length: int | None = None) -> np.ndarray:
    """An array on disk, memory-mapped; `DataError` unless it is of this type and length."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}); make the cache again.") from error
    if array.dtype != dtype or array.ndim != 1 or (length is not None and len(array) != length):
        raise DataError(f"{path} holds something else than the manifest says; make the cache again.")
    return array
