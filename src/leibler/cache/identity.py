"""What tells two models, two tokenizers and two sequences apart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from leibler.environment.dialogue import encode_record

if TYPE_CHECKING:
    from leibler.data import Record
    from leibler.policy import CausalLM


def fingerprint(model: torch.nn.Module) -> str:
    """A hash of some numbers of every weight: enough to tell two models apart, cheap for large ones.

    Examples:
        >>> linear = torch.nn.Linear(3, 2)
        >>> before = fingerprint(linear)
        >>> _ = linear.weight.data.mul_(2)
        >>> before == fingerprint(linear)
        False
    """
    state = hashlib.sha256()
    for parameter in model.parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(flat.numel() // 64, 1)].to("cpu", torch.float32)
        state.update(some.numpy().tobytes())
    return state.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what every token id means, and of which one ends a text."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(content).encode("utf-8", "surrogatepass")).hexdigest()


def sequence_key(tokens: np.ndarray | Sequence[int]) -> tuple[int, int]:
    """128 bits of a sequence's content: rows are found by what they say, not by where they stand.

    Examples:
        >>> sequence_key([1, 2, 3]) == sequence_key(np.array([1, 2, 3]))
        True
        >>> sequence_key([1, 2, 3]) == sequence_key([1, 2])
        False
    """
    content = hashlib.blake2b(np.asarray(tokens, dtype="<i4").tobytes(), digest_size=16).digest()
    return int.from_bytes(content[:8], "little"), int.from_bytes(content[8:], "little")


def sequences(record: Record, encoder: CausalLM) -> Iterator[tuple[list[int], int]]:
    """The token sequences that a record says, each with the place where its completion begins.

    A dialogue is one sequence: what stands between the player's turns is read too.
    """
    texts = [None] * (record.completion is not None) + [t for t in (record.chosen, record.rejected) if t is not None]
    for text in texts:
        prompt, tokens, _ = encode_record(encoder, record, text)
        yield [*prompt, *tokens], len(prompt)
