"""A teacher that is run once: its top-k log-probs for every completion of a data set, on disk.

Training then reads the rows that it needs, memory-mapped, and holds no teacher. `write` makes such a cache,
`TeacherCache` reads it, `roll_out` samples a student's completions to make one of.
"""

from __future__ import annotations

from leibler.cache.identity import fingerprint, tokenizer_hash
from leibler.cache.rollouts import roll_out
from leibler.cache.store import PREFIX, TeacherCache
from leibler.cache.writer import write

__all__ = ["PREFIX", "TeacherCache", "fingerprint", "roll_out", "tokenizer_hash", "write"]
