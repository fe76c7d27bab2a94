"""The objective: a sum of terms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from leibler.objective.signals import Chain, Shaper, Signal
from leibler.objective.terms import Term


@dataclass(frozen=True)
class Objective:
    """A sum of terms.

    Examples:
        >>> from leibler.objective import Imitate, Objective
        >>> Objective(Imitate(coefficient=0.5)).terms[0].coefficient
        0.5
    """

    terms: tuple[Term, ...]

    def __init__(self, *parts: Term, terms: tuple[Term, ...] = ()) -> None:
        # A coefficient of 0 is the term removed: its needs are never computed.
        object.__setattr__(self, "terms", tuple(t for t in (*parts, *terms) if t.coefficient != 0))

    def walk(self) -> Iterator[tuple[Signal, Term | Shaper]]:
        """Every signal of every term with the part that owns it (the term, or the shaper it is a field of)."""
        for term in self.terms:
            yield from walk(term)


def walk(term: Term) -> Iterator[tuple[Signal, Term | Shaper]]:
    """Every signal of a term with the part that owns it."""
    for signal in term.signals():
        yield from _walk(signal, term)


def _walk(signal: Signal, owner: Term | Shaper) -> Iterator[tuple[Signal, Term | Shaper]]:
    yield signal, owner
    if isinstance(signal, Chain):
        yield from _walk(signal.first, owner)
        for part in signal.then.parts():
            yield from _walk(part, signal.then)
    else:
        for part in signal.parts():
            yield from _walk(part, owner)
