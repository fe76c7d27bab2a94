"""Randomness derived from (seed, purpose, numbers), never drawn from a stream that would have to be saved.

The uniforms of rollout row i of step k, or the order of epoch e, are functions of their names. So a killed run
draws the same numbers again, and another batch size, an early-finished row or another process changes nobody else's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor


def derived_seed(seed: int, purpose: str, *numbers: int, bits: int = 63) -> int:
    """A hash of the arguments as an integer of at most ``bits`` bits: the same on every machine and in every process.

    Examples:
        >>> derived_seed(0, "order", 3) == derived_seed(0, "order", 3)
        True
        >>> derived_seed(0, "order", 3) == derived_seed(0, "order", 4)
        False
    """
    # The length of the purpose keeps ("a", 1) and ("a/1",) apart; repr would too, but is not fixed for NumPy integers.
    text = f"{int(seed)}/{len(purpose)}:{purpose}/" + "/".join(str(int(number)) for number in numbers)
    digest = hashlib.blake2b(text.encode(), digest_size=32).digest()
    return int.from_bytes(digest, "little") & ((1 << bits) - 1)


def generator(seed: int, purpose: str, *numbers: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh generator whose stream depends on the arguments alone.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for, such as ``"order"``; other purposes get unrelated numbers.
        numbers: further names, such as the epoch.
        device: where the generator lives.

    Examples:
        >>> order = torch.randperm(4, generator=generator(0, "order", 1))
        >>> torch.equal(order, torch.randperm(4, generator=generator(0, "order", 1)))
        True
    """
    return torch.Generator(device=device).manual_seed(derived_seed(seed, purpose, *numbers))


@contextmanager
def forked(device: torch.device, seed: int, purpose: str, *numbers: int) -> Iterator[None]:
    """Inside, torch's own generators (which dropout draws from) depend on the arguments alone; afterwards they go on.

    Args:
        device: where is drawn; the generator of the CPU is always derived.
        seed, purpose, numbers: see `derived_seed`.

    Examples:
        >>> with forked(torch.device("cpu"), 0, "dropout", 1):
        ...     first = torch.rand(2)
        >>> with forked(torch.device("cpu"), 0, "dropout", 1):
        ...     torch.equal(torch.rand(2), first)
        True
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derived_seed(seed, purpose, *numbers))
        yield


def uniforms(seed: int, purpose: str, step: int, rows: int, n: int, first_row: int = 0) -> Float64[Tensor, "rows n"]:
    """Uniform numbers in [0, 1), one row for each rollout row.

    Row ``r`` depends only on (seed, purpose, step, first_row + r), and its first numbers do not depend on ``n``: so a
    process may draw its own rows only, and a longer limit on new tokens leaves the beginning as it was.

    Args:
        seed: the run's seed.
        purpose: what the numbers are for, such as ``"rollout"``.
        step: the step they belong to.
        rows: how many rows.
        n: how many numbers in a row.
        first_row: the number of the first row.

    Examples:
        >>> whole = uniforms(0, "rollout", 7, rows=4, n=5)
        >>> part = uniforms(0, "rollout", 7, rows=2, n=3, first_row=2)
        >>> torch.equal(whole[2:, :3], part)
        True
    """
    # Philox (Parallel random numbers: as easy as 1, 2, 3; 2011) is a function of a key and a counter: the row is the
    # counter's second word, the numbers of a row count up in its first.
    key = derived_seed(seed, purpose, step, bits=128)
    table = np.empty((rows, n), dtype=np.float64)
    for row in range(rows):
        counter = np.array([0, first_row + row, 0, 0], dtype=np.uint64)
        table[row] = np.random.Generator(np.random.Philox(key=key, counter=counter)).random(n)
    return torch.from_numpy(table)
