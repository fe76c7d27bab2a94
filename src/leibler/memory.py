"""What a process does with memory that it no longer needs."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of glibc's mallopt


def keep() -> bool:
    """Keep freed memory for the next tensor instead of returning it to the system.

    A large tensor is otherwise new memory each time, with a page fault for every 4 kB of it: at a vocabulary of 150,000
    that is a tenth of a training step on a processor. The process then holds the most that it ever needed until it
    ends, as it does on a GPU. It is a setting of the whole process, and so for a program to choose, not for a library:
    the commands of ``leibler`` that run models choose it. Call it before the first large tensor.

    Returns:
        Whether it is set; False where the C library has no such setting (it is glibc's).

    Examples:
        >>> keep() in (True, False)
        True
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    # No block of its own for a large tensor, and never give the end of the heap back.
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, -1))
