"""Making a teacher cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from leibler.cache.identity import fingerprint, sequence_key, sequences, tokenizer_hash
from leibler.cache.layout import (
    DTYPES,
    INDEX,
    INDEX_DTYPE,
    MANIFEST,
    Manifest,
    record_dtype,
    save_array,
    shard_name,
)
from leibler.cache.store import TeacherCache, checksum
from leibler.errors import DataError, RunError
from leibler.fused import TopK, top_k
from leibler.safety import refuse_links

if TYPE_CHECKING:
    from leibler.data import Dataset
    from leibler.policy import CausalLM

BESIDE = ("rollouts", "set_aside")
"""Names (or their beginnings) of what may stand in the directory before the cache does."""
SHARD_TOKENS = 65_536
BATCH_TOKENS = 16_384
KEPT = 64
_OFTEN = 500
"""Records tokenized between two looks at how far that is."""


@dataclass(frozen=True, eq=False)
class _Sequence:
    tokens: np.ndarray
    start: int

    @property
    def events(self) -> int:
        return len(self.tokens) - self.start


def write(
    teacher: CausalLM,
    data: Dataset,
    out: str | Path,
    *,
    top_k: int = KEPT,
    temperature: float = 1.0,
    dtype: str = "float32",
    name: str = "",
    shard_tokens: int = SHARD_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    progress: Callable[[int, int], None] | None = None,
    reading: Callable[[int, int], None] | None = None,
) -> TeacherCache:
    """Run a teacher once over the completions of a data set and keep its top-k log-probs.

    For each completion token (the end token among them): the k most likely entries, their log-probabilities, the exact
    log-mass of all the others, and the log-probability of the token itself. Equal sequences are read once. What is
    finished stays: called again with the same arguments after a kill, it goes on with the next shard, and the files are
    byte for byte those of an uninterrupted call. Logits are formed a chunk at a time.

    Args:
        teacher: the model.
        data: records with a completion, or a chosen and a rejected one.
        out: the directory; it must not hold anything else.
        top_k: entries kept per token; all of them, where the vocabulary has no more.
        temperature: of the softmax; training has to take the same.
        dtype: of the log-probs, ``"float32"`` or ``"float16"`` (the rest is float32 always).
        name: where the teacher came from, for messages.
        shard_tokens: completion tokens in a file, at most (but a whole sequence at least).
        batch_tokens: tokens in a forward pass, at most (but a whole sequence at least).
        progress: called with the completion tokens done, and all of them, after each forward pass.
        reading: called with the records tokenized, and all of them, now and then before that.

    Returns:
        The finished cache.

    Raises:
        DataError: no record has a completion, or one is too long for the teacher.
        RunError: ``out`` holds something else, or a cache that is finished or was begun with other arguments.
    """
    folder = Path(out)
    if dtype not in DTYPES:
        raise RunError(f"log-probs can be stored as {' or '.join(DTYPES)}, not {dtype!r}.")
    if top_k < 1 or not temperature > 0:
        raise RunError(f"top_k={top_k} must be at least 1 and temperature={temperature} greater than 0.")
    before = begun(folder)
    shards = list(_shards(_distinct(data, teacher, reading), shard_tokens))
    index = _index(shards)
    folder.mkdir(parents=True, exist_ok=True)
    refuse_links(folder)
    manifest = Manifest(
        k=min(top_k, teacher.vocab_size),
        dtype=dtype,
        vocab=teacher.vocab_size,
        temperature=float(temperature),
        teacher=name or type(teacher.pretrained).__name__,
        teacher_hash=fingerprint(teacher),
        tokenizer_hash=tokenizer_hash(teacher.tokenizer),
        data=data.name,
        data_hash=data.content_hash,
        batch_tokens=batch_tokens,
        shard_tokens=shard_tokens,
        tokens=tuple(sum(s.events for s in shard) for shard in shards),
        index=save_array(folder / INDEX, index) if before is None else before.index,
    )
    if before is None:
        manifest.save(folder)
    else:
        manifest = _gone_on(folder, before, manifest)
    total, done = sum(manifest.tokens), sum(manifest.tokens[: len(manifest.shards)])
    for number in range(len(manifest.shards), len(shards)):
        records = np.zeros(manifest.tokens[number], dtype=record_dtype(manifest.k, dtype))
        for finished in _fill(records, shards[number], teacher, manifest):
            if progress is not None:
                progress(done + finished, total)
        done += manifest.tokens[number]
        entry = save_array(folder / shard_name(number), records)
        manifest = replace(manifest, shards=(*manifest.shards, entry))
        manifest.save(folder)
    return TeacherCache(folder)


def begun(folder: Path) -> Manifest | None:
    """The manifest of a write that was interrupted in this directory; None where nothing was begun.

    Raises:
        RunError: it holds a finished cache, or something else.
    """
    if folder.is_file():
        raise RunError(f"{folder} is a file; give a directory for the cache.")
    found = sorted(p.name for p in folder.iterdir()) if folder.exists() else []
    if MANIFEST in found:
        manifest = Manifest.load(folder)
        if manifest.complete:
            raise RunError(
                f"{folder} holds a finished teacher cache; train with teacher=cache:{folder}, or give another "
                "directory."
            )
        return manifest
    # A kill between the index and the manifest leaves the index, which is written again.
    others = [n for n in found if not n.startswith((*BESIDE, ".")) and n != INDEX]
    if others:
        raise RunError(f"{folder} is not empty (it holds {others[0]}); give another directory for the cache.")
    return None


def _gone_on(folder: Path, before: Manifest, now: Manifest) -> Manifest:
    """The manifest of the interrupted write, if it was begun with the same arguments and its files are whole."""
    was, now_ = asdict(before), asdict(now)
    for key in ("version", "shards", "index", "teacher", "data"):
        del was[key], now_[key]
    different = [key for key in was if was[key] != now_[key]]
    if different:
        key = different[0]
        shown = "" if key.endswith("hash") or key == "tokens" else f" ({was[key]} then, {now_[key]} now)"
        what = {"teacher_hash": "teacher", "tokenizer_hash": "tokenizer", "data_hash": "data", "tokens": "data"}
        raise RunError(
            f"{folder} was begun with another {what.get(key, key)}{shown}; give the same again to go on, or another "
            "directory."
        )
    names = [INDEX, *(shard_name(i) for i in range(len(before.shards)))]
    for name, entry in zip(names, (before.index, *before.shards), strict=True):
        fault = entry.fault(folder / name, thorough=name == INDEX)
        if fault is not None:
            raise RunError(f"{folder / name} {fault}; remove {folder} and make the cache again.")
    return before


def _distinct(data: Dataset, teacher: CausalLM, reading: Callable[[int, int], None] | None = None) -> list[_Sequence]:
    """Each sequence once, in the order of the data; of equal ones, the longest completion."""
    found: dict[tuple[int, int], _Sequence] = {}
    for number, record in enumerate(data, 1):
        if reading is not None and number % _OFTEN == 0:
            reading(number, len(data))
        for tokens, start in sequences(record, teacher):
            if teacher.context is not None and len(tokens) > teacher.context:
                raise DataError(
                    f"a row of {len(tokens)} tokens ({record.source or data.name}) exceeds the teacher's context of "
                    f"{teacher.context}; shorten it or leave it out."
                )
            key = sequence_key(tokens)
            known = found.get(key)
            if known is None or start < known.start:
                found[key] = _Sequence(np.asarray(tokens, dtype=np.int32), start)
    if not found:
        raise DataError(
            f"{data.name} has no completions that a teacher could read; give data with the column 'completion', or "
            "--student to sample them."
        )
    return list(found.values())


def _shards(rows: Sequence[_Sequence], limit: int) -> Iterator[list[_Sequence]]:
    current: list[_Sequence] = []
    total = 0
    for row in rows:
        if current and total + row.events > limit:
            yield current
            current, total = [], 0
        current.append(row)
        total += row.events
    yield current


def _index(shards: Sequence[Sequence[_Sequence]]) -> np.ndarray:
    rows = []
    for number, shard in enumerate(shards):
        first = 0
        for row in shard:
            rows.append((*sequence_key(row.tokens), number, first, row.start, row.events))
            first += row.events
    index = np.array(rows, dtype=INDEX_DTYPE)
    return index[np.lexsort((index["check"], index["key"]))]


@torch.no_grad()
def _fill(records: np.ndarray, shard: Sequence[_Sequence], teacher: CausalLM, manifest: Manifest) -> Iterator[int]:
    """Compute a shard's records, yielding how many are done after each forward pass."""
    from leibler.policy import right_pad
    from leibler.policy.model import evaluating

    firsts = np.cumsum([0, *(row.events for row in shard)])
    done = 0
    for batch in _batches(shard, manifest.batch_tokens):
        pairs = [
            (shard[i].tokens[: shard[i].start].tolist(), shard[i].tokens[shard[i].start :].tolist()) for i in batch
        ]
        tokens, attention, mask = (x.to(teacher.device) for x in right_pad(pairs))
        with evaluating(teacher):
            head = teacher.linear(teacher(tokens, attention)[:, :-1][mask], manifest.temperature)
        kept, label = top_k(head, manifest.k, token=tokens[:, 1:][mask], vocab=teacher.vocab_size)
        assert isinstance(kept.law, TopK)
        assert label is not None
        columns = {"token": kept.token, "logp": kept.law.logp, "rest": kept.law.rest, "label": label}
        arrays = {name: column.cpu().numpy() for name, column in columns.items()}
        at = 0
        for i in batch:
            here, count = records[firsts[i] : firsts[i + 1]], shard[i].events
            for name, array in arrays.items():
                here[name] = array[at : at + count]
            if not np.isfinite(here["logp"][:, 0]).all():
                raise DataError(
                    f"the teacher's log-probs are not finite on {pairs[batch.index(i)]}: check its weights."
                )
            here["crc"] = checksum(here)
            at += count
        done += at
        yield done


def _batches(shard: Sequence[_Sequence], limit: int) -> Iterator[list[int]]:
    """Sequences of like length together, as many as fit."""
    current: list[int] = []
    for i in sorted(range(len(shard)), key=lambda i: (len(shard[i].tokens), i)):
        if current and len(shard[i].tokens) * (len(current) + 1) > limit:
            yield current
            current = []
        current.append(i)
    yield current


__all__ = ["BATCH_TOKENS", "KEPT", "SHARD_TOKENS", "begun", "write"]
