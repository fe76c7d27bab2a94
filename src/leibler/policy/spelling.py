"""What the entries of a tokenizer spell, in bytes: the common ground of two tokenizers."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from leibler.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTE = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")


@dataclass(frozen=True, eq=False)
class Spelling:
    """The bytes of each entry of a tokenizer.

    Attributes:
        pieces: by id; None where no entry has that id. A special token spells its name.
        special: ids of special tokens.
        lead: what the tokenizer puts in front of every text (a space, with SentencePiece).
    """

    pieces: tuple[bytes | None, ...]
    special: frozenset[int]
    lead: bytes

    def read(self, tokens: Sequence[int]) -> tuple[bytes, list[int]]:
        """What tokens spell, without the lead, and how many bytes are read after each; stops at an id without entry.

        Examples:
            >>> from leibler.policy import train_bpe
            >>> tokenizer = train_bpe(["the theme"] * 9, size=262)
            >>> spelling(tokenizer).read(tokenizer.encode("the é"))
            (b'the \\xc3\\xa9', [3, 4, 5, 6])
        """
        parts: list[bytes] = []
        for token in tokens:
            piece = self.pieces[token] if token < len(self.pieces) else None
            if piece is None:
                break
            parts.append(piece)
        whole = b"".join(parts)
        skip = len(self.lead) if whole.startswith(self.lead) else 0
        ends, at = [], -skip
        for part in parts:
            at += len(part)
            ends.append(max(at, 0))
        return whole[skip:], ends


def spelling(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """What a tokenizer's entries spell: byte-level BPE, SentencePiece (with byte fallback) and plain entries.

    Raises:
        ModelError: the tokenizer has no fast version, or joins its entries in another way.
    """
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} has no fast version, so what its tokens spell cannot be told; "
            "convert it to a tokenizer.json first."
        )
    kinds = set(_kinds(backend.decoder))
    if not kinds or kinds & {"WordPiece", "CTC", "BPEDecoder"}:
        how = ", ".join(sorted(kinds)) or "spaces"
        raise ModelError(
            f"The tokenizer joins its entries by {how}, so they do not spell a text piece by piece; alignment through "
            "the text takes byte-level, SentencePiece or character tokenizers."
        )
    added = tokenizer.added_tokens_decoder
    vocabulary = cast("dict[str, int]", tokenizer.get_vocab())
    pieces: list[bytes | None] = [None] * (1 + max(vocabulary.values(), default=-1))
    for entry, number in vocabulary.items():
        if number in added:
            pieces[number] = added[number].content.encode()
        elif "ByteLevel" in kinds:
            pieces[number] = _from_byte_level(entry)
        else:
            found = _BYTE.match(entry) if "ByteFallback" in kinds else None
            plain = entry.replace("▁", " ") if "Metaspace" in kinds or "▁" in kinds else entry
            pieces[number] = bytes([int(found[1], 16)]) if found else plain.encode()
    special = frozenset(number for number, token in added.items() if token.special)
    return Spelling(tuple(pieces), special, _lead(tokenizer, pieces, special))


def _kinds(decoder: Any) -> Iterator[str]:
    """The types of a decoder and its parts, and the pattern that it replaces by a space."""
    if decoder is None:
        return
    queue = [json.loads(decoder.__getstate__())]
    while queue:
        part = queue.pop()
        queue.extend(part.get("decoders", ()))
        yield part["type"]
        if part["type"] == "Replace" and part.get("content") == " ":
            yield part.get("pattern", {}).get("String", "")


def _lead(tokenizer: PreTrainedTokenizerBase, pieces: Sequence[bytes | None], special: frozenset[int]) -> bytes:
    """What stands in front of a text that is encoded, seen on a short one."""
    for number, piece in enumerate(pieces):
        if piece is None or number in special or not piece.isalnum():
            continue
        tokens = tokenizer.encode(piece.decode("ascii", "ignore") or "a", add_special_tokens=False)
        spelt = b"".join(pieces[token] or b"" for token in tokens)
        if spelt.endswith(piece):
            return spelt[: len(spelt) - len(piece)]
    return b""


@functools.cache
def _bytes_of_characters() -> dict[str, int]:
    """The printable stand-ins of byte-level vocabularies: those bytes that print keep their place, others move up.

    Source: Language Models are Unsupervised Multitask Learners (2019).
    """
    keep = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [byte for byte in range(256) if byte not in keep]
    return {chr(byte): byte for byte in keep} | {chr(256 + place): byte for place, byte in enumerate(rest)}


def _from_byte_level(entry: str) -> bytes:
    table = _bytes_of_characters()
    if all(character in table for character in entry):
        return bytes(table[character] for character in entry)
    return entry.encode()  # an entry that no merge can reach is taken as it stands


def valid_text(data: bytes) -> tuple[str, bool]:
    """The longest beginning of ``data`` that is text, and whether that is all of it."""
    try:
        return data.decode(), True
    except UnicodeDecodeError as error:
        return data[: error.start].decode(), False
