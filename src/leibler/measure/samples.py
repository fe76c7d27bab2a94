"""What several samples of one question show: whether any is right, and how many of them differ."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from math import comb

from leibler.data.checkers import normalised
from leibler.errors import DataError


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of ``k`` samples is right.

    ``1 - C(n - c, k) / C(n, k)``: the share of the k-subsets of the ``n`` samples that hold one of the ``c`` right
    ones. (``1 - (1 - c/n)^k`` is biased downwards.) Whole-number arithmetic, so exact at any size.

    Source: "Evaluating Large Language Models Trained on Code" (2021).

    Args:
        n: samples drawn.
        c: how many of them are right.
        k: size of the subset, at most ``n``.

    Raises:
        DataError: the numbers do not fit each other.

    Examples:
        >>> pass_at_k(n=10, c=3, k=1), round(pass_at_k(n=10, c=3, k=5), 4)
        (0.3, 0.9167)
    """
    if not 0 <= c <= n:
        raise DataError(f"{c} of {n} samples cannot be right; give 0 <= c <= n.")
    if not 1 <= k <= n:
        raise DataError(f"pass@{k} cannot be estimated from {n} samples; draw at least k samples, k at least 1.")
    subsets = comb(n, k)
    return (subsets - comb(n - c, k)) / subsets


def mean_pass_at_k(n: int, right: Sequence[int], k: int) -> float:
    """``pass_at_k`` averaged over questions with ``n`` samples each, of which ``right[i]`` are right.

    Examples:
        >>> mean_pass_at_k(2, [0, 1, 2], k=2)
        0.6666666666666666
    """
    if not right:
        raise DataError("there is no question to average pass@k over; give at least one.")
    return sum(pass_at_k(n, c, k) for c in right) / len(right)


def distinct_n(sequences: Iterable[Sequence[Hashable]], n: int) -> float:
    """The share of n-grams that are different, over all sequences together; 0 where none is long enough.

    Source: "A Diversity-Promoting Objective Function for Neural Conversation Models" (2016).

    Args:
        sequences: token ids, words, or strings (whose items are characters).
        n: length of an n-gram.

    Examples:
        >>> distinct_n(["abab"], 2)
        0.6666666666666666
    """
    if n < 1:
        raise DataError(f"an n-gram cannot have {n} items; give n of at least 1.")
    total, found = 0, set()
    for sequence in sequences:
        grams = [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]
        total += len(grams)
        found.update(grams)
    return len(found) / total if total else 0.0


def distinct_answers(texts: Iterable[str]) -> int:
    """How many different answers there are, up to blanks, case and the way a number is written.

    Examples:
        >>> distinct_answers(["4", " 4.0", "four", "Four."])
        2
    """
    return len({normalised(text) for text in texts})
