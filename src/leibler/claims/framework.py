"""Claims: how one is written, found, selected and run."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from leibler.errors import RecipeError
from leibler.recipes.registry import METHODS

Experiment = Callable[[], tuple[Any, Any]]
"""Returns what was observed (shown as text) and whether the claim holds."""
NOT_CLAIMS = ("framework", "simplex")
"""Modules of this package that hold tools and no claims."""


@dataclass(frozen=True)
class Claim:
    """One claim of one method.

    Attributes:
        slug: the method.
        text: what is claimed, in one sentence.
        expected: what must be observed for the claim to hold, with its tolerance.
        full: behavioural and slow; run only when asked for.
        experiment: returns what was observed, and whether the claim holds.
    """

    slug: str
    text: str
    expected: str
    full: bool
    experiment: Experiment

    @property
    def family(self) -> str | None:
        """The method's family; None for a slug outside the table of methods (say, a part such as ``divergence``)."""
        return METHODS[self.slug].family if self.slug in METHODS else None

    def run(self) -> dict[str, Any]:
        """Run the experiment.

        Returns:
            ``slug``, ``claim``, ``observed``, ``expected``, ``holds``, ``seconds``. An experiment that raises does not
            hold, and the exception is what was observed.
        """
        start = time.perf_counter()
        try:
            observed, holds = self.experiment()
        except Exception as error:
            observed, holds = f"{type(error).__name__}: {error}", False
        return {
            "slug": self.slug,
            "claim": self.text,
            "observed": str(observed),
            "expected": self.expected,
            "holds": bool(holds),
            "seconds": round(time.perf_counter() - start, 3),
        }


def claim(slug: str, text: str, expected: str, full: bool = False) -> Callable[[Experiment], Experiment]:
    """Declare a claim; decorates a function that returns ``(observed, holds)``.

    Args:
        slug: the method that the claim is about.
        text: what is claimed, in one sentence.
        expected: what must be observed, with its tolerance.
        full: it takes more than a few seconds; it runs only with ``--full``.

    Examples:
        >>> @claim("kd", "one and one is two", "2")
        ... def arithmetic():
        ...     return str(1 + 1), 1 + 1 == 2
        >>> declared(arithmetic)[0].run()["holds"]
        True
    """

    def declare(experiment: Experiment) -> Experiment:
        mine = Claim(slug, text, expected, full, experiment)
        # Kept on the function: what a module claims is what stands in it, and importing it twice claims nothing twice.
        experiment.__dict__.setdefault("claims", []).append(mine)
        return experiment

    return declare


def declared(experiment: Callable[..., Any]) -> list[Claim]:
    """The claims that a function was decorated with, in the order of reading."""
    return list(reversed(experiment.__dict__.get("claims", [])))


def claims() -> list[Claim]:
    """Every claim of the library, ordered as the methods are (others after them).

    The modules of ``leibler.claims`` are imported here and not before.
    """
    package = importlib.import_module("leibler.claims")
    found: list[Claim] = []
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        if info.name in NOT_CLAIMS or info.name.startswith("_"):
            continue
        module = importlib.import_module(f"leibler.claims.{info.name}")
        for part in vars(module).values():
            if callable(part) and getattr(part, "__module__", None) == module.__name__:
                found += declared(part)
    order = {slug: i for i, slug in enumerate(METHODS)}
    return sorted(found, key=lambda c: order.get(c.slug, len(order)))  # stable: as written within a method


def select(
    available: Iterable[Claim], slugs: Sequence[str] = (), family: str | None = None, full: bool = False
) -> list[Claim]:
    """The claims of some methods.

    Args:
        available: the claims to choose from.
        slugs: methods; all, when empty.
        family: one family; all, when None.
        full: with the slow ones.

    Raises:
        RecipeError: a slug or family that has no claim; the message lists the nearest.
    """
    available = list(available)
    known = list(dict.fromkeys(c.slug for c in available))
    for slug in slugs:
        if slug not in known:
            raise RecipeError(f"'{slug}' has no claim{_near(slug, known)}; `leibler verify` runs all.")
    families = list(dict.fromkeys(c.family for c in available if c.family))
    if family is not None and family not in families:
        raise RecipeError(f"the family '{family}' has no claim; families with claims: {', '.join(families) or 'none'}.")
    return [
        c
        for c in available
        if (not slugs or c.slug in slugs) and (family is None or c.family == family) and (full or not c.full)
    ]


def _near(slug: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(slug.lower().replace("_", "-"), known, n=2, cutoff=0.5)
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def chosen(slugs: Sequence[str] = (), family: str | None = None, full: bool = False) -> list[Claim]:
    """The claims of the library that `run` runs: of some methods (all, when none is named), with the slow ones or not.

    Raises:
        RecipeError: a slug or family that has no claim, or nothing to run.
    """
    available = claims()
    found = select(available, slugs, family, full)
    if not found:  # reporting that all of nothing holds would be no evidence
        slow = select(available, slugs, family, full=True)
        raise RecipeError("only slow claims match; add --full (full=True)." if slow else "no claim matches.")
    return found


def run(slugs: Sequence[str] = (), family: str | None = None, full: bool = False) -> list[dict[str, Any]]:
    """Run claims.

    Args:
        slugs: methods; all, when empty.
        family: one family; all, when None.
        full: with the slow ones.

    Returns:
        One dictionary per claim: ``slug``, ``claim``, ``observed``, ``expected``, ``holds``, ``seconds``.

    Raises:
        RecipeError: a slug or family that has no claim, or nothing to run.
    """
    return [claim.run() for claim in chosen(slugs, family, full)]
