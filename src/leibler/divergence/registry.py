"""Divergences by name."""

from __future__ import annotations

import difflib
import re
from dataclasses import fields
from typing import Any

from leibler.divergence.adaptive import AdaptiveKL
from leibler.divergence.band import BandKL
from leibler.divergence.base import Divergence
from leibler.divergence.geometric import CauchySchwarz, TotalVariation
from leibler.divergence.kl import ForwardKL, Jeffreys, ReverseKL
from leibler.divergence.mixtures import JensenShannon, SkewForwardKL, SkewReverseKL
from leibler.divergence.power import Alpha, ChiSquared, Hellinger, Renyi, ReverseChiSquared, Tsallis
from leibler.errors import RecipeError

_CLASSES: dict[str, type[Divergence]] = {
    "forward_kl": ForwardKL,
    "reverse_kl": ReverseKL,
    "jeffreys": Jeffreys,
    "jensen_shannon": JensenShannon,
    "skew_forward_kl": SkewForwardKL,
    "skew_reverse_kl": SkewReverseKL,
    "alpha": Alpha,
    "tsallis": Tsallis,
    "renyi": Renyi,
    "chi_squared": ChiSquared,
    "reverse_chi_squared": ReverseChiSquared,
    "hellinger": Hellinger,
    "total_variation": TotalVariation,
    "cauchy_schwarz": CauchySchwarz,
    "adaptive_kl": AdaptiveKL,
    "band_kl": BandKL,
}


def names() -> tuple[str, ...]:
    """Every name that ``get`` knows.

    >>> "jensen_shannon" in names()
    True
    """
    return tuple(_CLASSES)


def get(name: str, **params: Any) -> Divergence:
    """The divergence called ``name``, with its parameters.

    Args:
        name: one of ``names()``; the class's own name serves as well.
        params: fields of the divergence, such as ``beta=0.1``.

    Raises:
        RecipeError: no such divergence, no such parameter, or a value that it refuses.

    >>> get("jensen_shannon", beta=0.1)
    JensenShannon(beta=0.1)
    """
    key = name if name in _CLASSES else re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    if key not in _CLASSES:
        near = difflib.get_close_matches(key, _CLASSES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(_CLASSES)}."
        raise RecipeError(f"There is no divergence {name!r}: {hint}")
    known = [field.name for field in fields(_CLASSES[key])]
    unknown = sorted(set(params) - set(known))
    if unknown:
        takes = f"it takes {', '.join(known)}" if known else "it takes no parameters"
        raise RecipeError(f"The divergence {key!r} has no parameter {', '.join(map(repr, unknown))}: {takes}.")
    words = {field.name for field in fields(_CLASSES[key]) if isinstance(field.default, str)}
    for field, value in params.items():
        if field in words:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise RecipeError(f"The parameter {field} of {key!r} is {value!r}: give a number.")
    return _CLASSES[key](**params)
