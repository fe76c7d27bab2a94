"""Reading a teacher cache."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from leibler.cache.identity import sequence_key, sequences, tokenizer_hash
from leibler.cache.layout import INDEX, INDEX_DTYPE, FileEntry, Manifest, map_array, record_dtype, shard_name
from leibler.errors import DataError, ModelError, RecipeError
from leibler.fused import Coarse, TopK
from leibler.fused.coarse import Tail

if TYPE_CHECKING:
    from leibler.data import Dataset
    from leibler.objective.rows import Rows
    from leibler.policy import CausalLM

PREFIX = "cache:"
"""``cache:DIR`` or ``cache:DIR:tail=renormalise`` stands where a model's directory may."""
_SPOT = 8
"""Records that are looked up even when the data's hash says that all are there."""


class TeacherCache:
    """A teacher's laws for the completions of a data set, read from disk as they are asked for.

    Opening looks at the size of every file and at the hash of manifest and index; every sequence that is read is
    verified by its checksum. Sequences are found by their content, so order, epochs, duplicates and subsets of the data
    do not matter.

    Args:
        folder: what `write` made.
        tail: what becomes of the entries beyond the top k: see `Coarse`.
        thorough: also verify the hash of every shard.

    Raises:
        DataError: it is unfinished, torn or altered, or no cache at all.

    Examples:
        >>> import tempfile
        >>> from leibler.cache import write
        >>> from leibler.data import load
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> teacher = tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2)
        >>> data = load([{"prompt": "2+2=", "completion": "4"}])
        >>> cache = write(teacher, data, tempfile.mkdtemp() + "/cache", top_k=4)
        >>> cache.tokens, cache.manifest.k
        (2, 4)
    """

    def __init__(self, folder: str | Path, *, tail: Tail = "bucket", thorough: bool = False) -> None:
        self.folder = Path(folder)
        self.tail: Tail = tail
        if tail not in get_args(Tail):
            raise RecipeError(f'{PREFIX}{folder}: tail must be "bucket" or "renormalise", not {tail!r}.')
        self.manifest = manifest = Manifest.load(self.folder)
        if not manifest.complete:
            raise DataError(
                f"the teacher cache {folder} is unfinished ({len(manifest.shards)} of {len(manifest.tokens)} shards); "
                "run the command that began it again, and it goes on."
            )
        files = [(INDEX, manifest.index, True)]
        files += [(shard_name(number), entry, thorough) for number, entry in enumerate(manifest.shards)]
        for name, entry, hashed in files:
            _sound(self.folder / name, entry, hashed)
        self.index = map_array(self.folder / INDEX, INDEX_DTYPE)
        # A column of its own: searching in a field of records would copy it at every look.
        self._keys = np.ascontiguousarray(self.index["key"])
        self.dtype = record_dtype(manifest.k, manifest.dtype)
        self._shards: dict[int, np.ndarray] = {}

    @classmethod
    def of(cls, spec: str) -> TeacherCache:
        """The cache that ``cache:DIR[:tail=...]`` names."""
        text, tail = spec.removeprefix(PREFIX), "bucket"
        if ":tail=" in text:
            text, _, tail = text.rpartition(":tail=")
        return cls(Path(text).expanduser(), tail=cast(Tail, tail))

    @property
    def name(self) -> str:
        """What names it on a command line."""
        tail = "" if self.tail == "bucket" else f":tail={self.tail}"
        return f"{PREFIX}{self.folder.resolve()}{tail}"

    @property
    def hash(self) -> str:
        """Of everything in it, and of how its tail is treated."""
        return f"{self.manifest.hash}/{self.tail}"

    @property
    def tokens(self) -> int:
        """Completion tokens."""
        return sum(self.manifest.tokens)

    # ---- does it fit -------------------------------------------------------------------------------------------------

    def check_model(self, model: CausalLM) -> None:
        """Raise `ModelError` unless the model means the same by every token id."""
        if tokenizer_hash(model.tokenizer) != self.manifest.tokenizer_hash:
            raise ModelError(
                f"The tokenizers differ: the teacher cache {self.folder} was made with that of {self.manifest.teacher} "
                f"({self.manifest.vocab} entries), the student has another one ({model.vocab_size} entries); take a "
                "student of the teacher's family, or make the cache with a teacher of the student's."
            )

    def check_temperature(self, temperature: float) -> None:
        """Raise `RecipeError` unless log-probs are taken at the temperature of the cache."""
        if abs(temperature - self.manifest.temperature) > 1e-6 * self.manifest.temperature:
            raise RecipeError(
                f"the teacher cache {self.folder} was made at temperature {self.manifest.temperature:g} and the run is "
                f"at {temperature:g}; set temperature={self.manifest.temperature:g}, or make the cache again with "
                f"--temperature {temperature:g} (top-k log-probs do not determine another temperature's law)."
            )

    def check_data(self, data: Dataset, encoder: CausalLM) -> None:
        """Raise `DataError` unless it has every completion of the data.

        Data of the hash that the cache was made of is looked up in part; any other completely.
        """
        same = data.content_hash == self.manifest.data_hash
        lacking = []
        for record in data.records[:_SPOT] if same else data.records:
            if any(self._find(tokens) is None for tokens, _ in sequences(record, encoder)):
                lacking.append(record)
        if lacking:
            raise DataError(self._lacks(lacking[0].source or data.name, lacking[0].prompt, len(lacking)))

    # ---- reading -----------------------------------------------------------------------------------------------------

    def target(self, rows: Rows) -> Coarse:
        """The teacher's law at every event of a batch, on the batch's device.

        Raises:
            DataError: a row that the cache does not have, or one that was altered on disk.
        """
        records = self._read(rows)
        device = rows.tokens.device
        token, logp, rest = (torch.from_numpy(records[name].copy()) for name in ("token", "logp", "rest"))
        law = TopK(logp.to(device), rest.to(device), self.manifest.temperature)
        return Coarse(token.to(device), law, tail=self.tail)

    def logp(self, rows: Rows) -> Float[Tensor, " events"]:
        """The teacher's log-probability of every event's token, exact whether it is among the top k or not."""
        return torch.from_numpy(self._read(rows)["label"].copy()).to(rows.tokens.device)

    def _read(self, rows: Rows) -> np.ndarray:
        tokens, attention, mask = (x.cpu().numpy() for x in (rows.tokens, rows.attention, rows.mask))
        out = np.empty(int(mask.sum()), dtype=self.dtype)
        at = 0
        for number in range(len(tokens)):
            columns = mask[number].nonzero()[0]
            if not len(columns):
                continue
            entry = self._find(tokens[number][attention[number]])
            # Column t predicts the token after it; the row may be padded on the left.
            places = columns + 1 - int(attention[number].argmax())
            if entry is None or places[0] < entry["start"]:
                record = rows.records[number] if rows.records else None
                where = getattr(record, "source", "") or f"row {number} of the batch"
                raise DataError(self._lacks(where, getattr(record, "prompt", "")))
            out[at : at + len(columns)] = self._sequence(entry)[places - int(entry["start"])]
            at += len(columns)
        return out

    def _sequence(self, entry: Any) -> np.ndarray:
        """A sequence's records, verified."""
        number, first = int(entry["shard"]), int(entry["first"])
        if number not in self._shards:
            path = self.folder / shard_name(number)
            self._shards[number] = map_array(path, self.dtype, self.manifest.tokens[number])
        records = np.array(self._shards[number][first : first + int(entry["length"])])
        if not len(records) or checksum(records) != records["crc"][0]:
            raise DataError(
                f"{self.folder / shard_name(number)} was altered (a sequence's checksum differs); `leibler cache "
                f"--check {self.folder}` looks at all of it; then make the cache again."
            )
        return records

    def _find(self, tokens: Any) -> Any:
        key, check = sequence_key(tokens)
        at = int(np.searchsorted(self._keys, np.uint64(key)))
        while at < len(self._keys) and int(self._keys[at]) == key:
            if int(self.index["check"][at]) == check:
                return self.index[at]
            at += 1
        return None

    def _lacks(self, where: str, prompt: str, count: int = 1) -> str:
        more = f" and {count - 1} more" if count > 1 else ""
        start = f" (prompt {prompt[:40]!r})" if prompt else ""
        return (
            f"the teacher cache {self.folder} has no row for {where}{start}{more}: it was made of "
            f"{self.manifest.data}; make one of this data with `leibler cache`, or train on the data it was made of."
        )


def checksum(records: np.ndarray) -> int:
    """CRC-32 of a sequence's records, whatever their field ``crc`` holds."""
    content = records.copy()
    content["crc"] = 0
    return zlib.crc32(content.tobytes())


def _sound(path: Path, entry: FileEntry, thorough: bool) -> None:
    fault = entry.fault(path, thorough=thorough)
    if fault is not None:
        raise DataError(f"the teacher cache is damaged: {path} {fault}; make the cache again.")
