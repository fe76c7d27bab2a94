"""Random choices derived from what they are for, so that none depends on what was drawn before.

A generator that is passed along has a state that must be saved, and one draw more or less changes every later one.
Here a draw is a function of its name: (seed, purpose, index). Nothing is saved and nothing is global.
"""

from __future__ import annotations

import random
from hashlib import blake2b

import numpy as np


def digest(*parts: object) -> int:
    """A 64-bit number that depends on every part and on nothing else (not on the process, unlike ``hash``).

    Args:
        parts: numbers and strings; their order and their boundaries count.

    Examples:
        >>> digest("order", 0, 1) == digest("order", 0, 1)
        True
        >>> digest("ab", "c") == digest("a", "bc")
        False
    """
    state = blake2b(digest_size=8)
    for part in parts:
        # The length in front keeps ("ab", "c") and ("a", "bc") apart.
        text = str(part).encode("utf-8", "surrogatepass")
        state.update(len(text).to_bytes(8, "big") + text)
    return int.from_bytes(state.digest(), "big")


def generator(*parts: object) -> random.Random:
    """A fresh generator for one row of one purpose.

    Examples:
        >>> generator("row", 3).random() == generator("row", 3).random()
        True
    """
    return random.Random(digest(*parts))


def permutation(n: int, *parts: object) -> list[int]:
    """A permutation of ``0 .. n-1`` derived from the parts.

    Every index is hashed with SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators",
    2014) from a start that the parts give, and the indices are sorted by their hash; ties keep their order.

    Examples:
        >>> sorted(permutation(5, "order", 7))
        [0, 1, 2, 3, 4]
    """
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what is meant
        z = np.uint64(digest(*parts)) + np.arange(1, n + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.argsort(z, kind="stable").tolist()
