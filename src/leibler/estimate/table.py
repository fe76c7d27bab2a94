"""Which estimator, on samples of which law, is exact for which divergence: facts as data, and the check built on them.

``FACTS`` lists, for each estimator and law, what the number carried by the loss averages to and what its gradient
descends (ordinary automatic differentiation: none through the sampling). The tests prove every row by enumeration.
In the names of functionals u = p/q, ``E_model``, ``E_target`` and ``E_behaviour`` are means over a law (the first
two may depend on the model; E_behaviour never does), f is the generator less its tangent at 1, and ``E_s[c score]``
is a gradient that need not be any functional's: the mean of c times grad log p.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch

from leibler.errors import RecipeError
from leibler.estimate.estimators import K1, K2, K3, Estimator, Exact, Pathwise, ScoreFunction, direction
from leibler.estimate.published import AbsLogRatio, AsReward, LogSquared, LowVarKL
from leibler.estimate.sample import LAWS

ITSELF = "itself"
"""Stands for the divergence that was asked for."""

NOTHING = "nothing"


@dataclass(frozen=True)
class Fact:
    """One row of the table.

    Attributes:
        averages_to: the functional that the loss's numbers average to.
        descends: the functional whose gradient the loss's gradient averages to; ``"nothing"`` is pure noise.
        unnormalised: the gradient is unharmed when log q is off by a constant (a missing normaliser).
        note: what to know before using it.
    """

    estimator: Estimator
    sampled_from: str
    averages_to: str
    descends: str
    unnormalised: bool = False
    note: str = ""


_HALF = "E_{}[(log u)^2]/2"
_SCORE = "the gradient is a mean score, which is 0: no regularisation, only noise"
_FORWARD = "its value averages to ReverseKL, its gradient is ForwardKL's"
_STALE = "the importance weight is left out on a stale sample"

FACTS: tuple[Fact, ...] = (
    # Fresh samples of the model.
    Fact(K1(), "model", "ReverseKL", NOTHING, note=_SCORE),
    Fact(K1(weight="differentiable"), "model", "ReverseKL", "ReverseKL", True),
    Fact(K2(), "model", _HALF.format("model"), "ReverseKL", True, "its value is ReverseKL only to second order"),
    Fact(K2(weight="differentiable"), "model", _HALF.format("model"), _HALF.format("model"),
         note="differentiating the weight spoils a gradient that was right without it"),
    Fact(K3(), "model", "ReverseKL", "ForwardKL", note=_FORWARD),
    Fact(K3(weight="differentiable"), "model", "ReverseKL", "ReverseKL", True),
    Fact(LowVarKL(), "model", "ReverseKL", "ForwardKL", note=_FORWARD),
    Fact(AbsLogRatio(), "model", "E_model[|log u|]", "2 TotalVariation", note="a pull of constant strength"),
    Fact(AsReward("k1"), "model", "ReverseKL", "ReverseKL", True),
    Fact(AsReward("k2"), "model", _HALF.format("model"), "E_target[u (log u)^2/2 - u log u + u - 1]",
         note="the coefficient ignores the sign of log u"),
    Fact(AsReward("k3"), "model", "ReverseKL", "ReverseKL - ForwardKL",
         note="the second derivatives cancel at the target: almost no restoring force there"),
    Fact(AsReward("abs"), "model", "E_model[|log u|]", "E_target[sign(log u) (u log u - u + 1)]",
         note="the coefficient ignores the sign of log u"),
    # Samples of the target (a stored set, a teacher, the old policy for a trust region).
    Fact(K1(), "target", "ForwardKL", "ForwardKL", True),
    Fact(K2(), "target", _HALF.format("target"), _HALF.format("target"), note="no named divergence"),
    Fact(K3(), "target", "ForwardKL", "ForwardKL", True),
    Fact(AbsLogRatio(), "target", "E_target[|log u|]", "E_target[|log u|]",
         note="0 gradient at u = 1: it does nothing on the first step after the target was copied from the model"),
    Fact(LogSquared(), "target", _HALF.format("target"), _HALF.format("target"), note="a regression"),
    # Samples of a behaviour: a stale model, a mixture, another sampler.
    Fact(K1(), "behaviour", "ReverseKL", NOTHING, note=_SCORE),
    Fact(K1(weight="differentiable"), "behaviour", "ReverseKL", "ReverseKL", True),
    Fact(K1(weight=None), "behaviour", "E_behaviour[log u]", "E_behaviour[log u]", True,
         "it pushes the model away from the sampler, and the target does not enter"),
    Fact(K2(), "behaviour", _HALF.format("model"), "ReverseKL", True, "its value is ReverseKL only to second order"),
    Fact(K2(weight="differentiable"), "behaviour", _HALF.format("model"), _HALF.format("model"),
         note="differentiating the weight spoils a gradient that was right without it"),
    Fact(K2(weight=None), "behaviour", _HALF.format("behaviour"), _HALF.format("behaviour"), note=_STALE),
    Fact(K3(), "behaviour", "ReverseKL", "ForwardKL", note=_FORWARD),
    Fact(K3(weight="differentiable"), "behaviour", "ReverseKL", "ReverseKL", True),
    Fact(K3(weight=None), "behaviour", "E_behaviour[1/u - 1 + log u]", "E_behaviour[1/u - 1 + log u]", note=_STALE),
    Fact(LowVarKL(), "behaviour", "E_behaviour[1/u - 1 + log u]", "E_behaviour[1/u - 1 + log u]", note=_STALE),
    Fact(AbsLogRatio(), "behaviour", "E_behaviour[|log u|]", "E_behaviour[|log u|]", note=_STALE),
    Fact(AsReward("k1"), "behaviour", "ReverseKL", "ReverseKL", True),
    Fact(AsReward("k1", weight=None), "behaviour", "E_behaviour[log u]", _HALF.format("behaviour"), note=_STALE),
    Fact(AsReward("k2"), "behaviour", _HALF.format("model"), "E_target[u (log u)^2/2 - u log u + u - 1]",
         note="the coefficient ignores the sign of log u"),
    Fact(AsReward("k2", weight=None), "behaviour", _HALF.format("behaviour"), "E_behaviour[(log u)^3]/6", note=_STALE),
    Fact(AsReward("k3"), "behaviour", "ReverseKL", "ReverseKL - ForwardKL",
         note="the second derivatives cancel at the target: almost no restoring force there"),
    Fact(AsReward("k3", weight=None), "behaviour", "E_behaviour[1/u - 1 + log u]",
         "E_behaviour[(log u)^2/2 - log u - 1/u]", note=_STALE),
    Fact(AsReward("abs"), "behaviour", "E_model[|log u|]", "E_target[sign(log u) (u log u - u + 1)]",
         note="the coefficient ignores the sign of log u"),
    Fact(AsReward("abs", weight=None), "behaviour", "E_behaviour[|log u|]", "E_behaviour[log u |log u|]/2",
         note=_STALE),
    # Any f-divergence, by its generator.
    Fact(Pathwise(), "target", ITSELF, ITSELF, True),
    Fact(Pathwise(), "model", ITSELF, ITSELF, True, "each coefficient equals ScoreFunction's"),
    Fact(Pathwise(weight=None), "model", "E_model[f(u)]", "E_model[f(u)], sampler held",
         note="the weight q/p is left out"),
    Fact(Pathwise(), "behaviour", ITSELF, ITSELF, True),
    Fact(Pathwise(weight=None), "behaviour", "E_behaviour[f(u)]", "E_behaviour[f(u)]",
         note="the weight q/s is left out"),
    Fact(ScoreFunction(), "model", ITSELF, ITSELF, True),
    Fact(ScoreFunction(), "target", ITSELF, ITSELF, True,
         note="weighted by u; Pathwise() is the same without a weight"),
    Fact(ScoreFunction(weight=None), "target", "E_target[f(u)/u]", "E_target[f'(u) score]",
         note="the weight u is left out"),
    Fact(ScoreFunction(), "behaviour", ITSELF, ITSELF, True),
    Fact(ScoreFunction(weight=None), "behaviour", "E_behaviour[f(u)/u]", "E_behaviour[f'(u) score]", note=_STALE),
)  # fmt: skip


@dataclass(frozen=True)
class Exactness:
    """What an estimator does for a divergence.

    Attributes:
        value: the numbers that its loss carries average to the divergence, exactly.
        gradient: its gradient averages to the divergence's, exactly.
        averages_to, descends: the functionals they do average to (where no clamp acts).
        note: what to know before using it; empty when nothing.
    """

    value: bool
    gradient: bool
    averages_to: str
    descends: str
    note: str = ""


def _key(estimator: Estimator) -> Estimator:
    """The estimator as the table spells it: clamps and baselines change variance or are noted, not the row."""
    defaults = {f.name: f.default for f in fields(estimator) if f.name in ("clamp", "baseline", "centred")}
    return replace(estimator, **defaults) if defaults else estimator


_INDEX = {(fact.estimator, fact.sampled_from): fact for fact in FACTS}


def _find(estimator: Estimator, law: str) -> Fact | None:
    key = _key(estimator)
    if (key, law) in _INDEX:
        return _INDEX[key, law]
    if getattr(key, "weight", "auto") is None:
        # On a sample of the estimator's own law there is no weight to leave out.
        return _INDEX.get((replace(key, weight="auto"), law))  # pyright: ignore[reportCallIssue]
    return None


def _law(sampled_from: str, stale: bool) -> str:
    if sampled_from not in LAWS:
        raise RecipeError(f"sampled_from must be one of {', '.join(LAWS)}, not {sampled_from!r}.")
    return "behaviour" if stale and sampled_from == "model" else sampled_from


def has_generator(divergence: object) -> bool:
    """Whether ``divergence`` is an f-divergence that offers f and f' on a scalar ratio."""
    try:
        divergence.f_prime(torch.zeros(()))  # pyright: ignore[reportAttributeAccessIssue]
    except (RecipeError, AttributeError):
        return False
    return True


def exactness(divergence: object, estimator: Estimator, sampled_from: str = "model", stale: bool = False) -> Exactness:
    """What ``estimator`` does for ``divergence`` on samples of a law.

    Args:
        divergence: the divergence whose gradient is wanted.
        estimator: an estimator of this package.
        sampled_from: ``"model"``, ``"target"`` or ``"behaviour"``.
        stale: the samples are of the model as it was some updates ago; the same as ``"behaviour"``.

    Raises:
        RecipeError: the estimator does not exist for that law, or the divergence lacks what it needs.

    >>> from leibler.divergence import ReverseKL
    >>> exactness(ReverseKL(), K3()).descends
    'ForwardKL'
    >>> exactness(ReverseKL(), K2()).gradient
    True
    """
    law = _law(sampled_from, stale)
    name = direction(divergence) or repr(divergence)
    if isinstance(estimator, Exact):
        return Exactness(True, True, name, name)
    fact = _find(estimator, law)
    if fact is None:
        raise RecipeError(f"{spelt(estimator)} is not defined on samples of the {law}; use {_listed(divergence, law)}.")
    if ITSELF in (fact.averages_to, fact.descends) and not has_generator(divergence):
        raise RecipeError(
            f"{divergence!r} has no scalar generator f(u), so sampled tokens cannot estimate it; use Exact()."
        )
    averages_to = name if fact.averages_to == ITSELF else fact.averages_to
    descends = name if fact.descends == ITSELF else fact.descends
    note = fact.note
    clamp = getattr(estimator, "clamp", None)
    if clamp is not None:
        note = (note + "; " if note else "") + f"biased where the clamp of {clamp:g} acts"
    exact = clamp is None
    return Exactness(exact and averages_to == name, exact and descends == name, averages_to, descends, note)


_CANDIDATES: tuple[Estimator, ...] = (
    K1(), K2(), K3(), K1(weight="differentiable"), K3(weight="differentiable"), Pathwise(), ScoreFunction(),
)  # fmt: skip


def alternatives(
    divergence: object, sampled_from: str = "model", stale: bool = False, target_normalised: bool = True
) -> tuple[Estimator, ...]:
    """The estimators whose gradient is exactly that of ``divergence`` on samples of that law; ``Exact()`` last.

    >>> from leibler.divergence import ReverseKL
    >>> alternatives(ReverseKL(), "model")[0]
    K2(weight='auto', clamp=None)
    """
    law = _law(sampled_from, stale)
    name = direction(divergence) or repr(divergence)
    found: list[Estimator] = []
    for estimator in _CANDIDATES:
        fact = _find(estimator, law)
        if fact is None or not (target_normalised or _survives(divergence, fact)):
            continue
        if fact.descends == name or (fact.descends == ITSELF and has_generator(divergence)):
            found.append(estimator)
    if target_normalised or name == "ReverseKL":
        found.append(Exact())
    return tuple(found)


def _survives(divergence: object, fact: Fact) -> bool:
    """Whether the gradient is unharmed by a missing normaliser: the shift must only add a constant to the coefficient
    (ReverseKL on samples of the model), or scale the part whose mean is 0 (ForwardKL on samples of the target)."""
    if fact.descends != ITSELF:
        return fact.unnormalised
    return fact.unnormalised and direction(divergence) == (
        "ForwardKL" if fact.sampled_from == "target" else "ReverseKL"
    )


def spelt(estimator: Estimator) -> str:
    """The estimator as one would type it: arguments at their defaults left out.

    >>> spelt(K3(weight="differentiable"))
    "K3(weight='differentiable')"
    """
    given = [(f.name, getattr(estimator, f.name)) for f in fields(estimator) if getattr(estimator, f.name) != f.default]
    return f"{type(estimator).__name__}({', '.join(f'{k}={v!r}' for k, v in given)})"


def _listed(divergence: object, law: str, target_normalised: bool = True) -> str:
    names = [spelt(e) for e in alternatives(divergence, law, target_normalised=target_normalised)]
    if not names:
        return "a normalised target"
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def check(
    divergence: object,
    estimator: Estimator,
    sampled_from: str = "model",
    stale: bool = False,
    *,
    target_normalised: bool = True,
) -> Exactness:
    """Accept an estimator for a loss, or say in one sentence what descends ``divergence`` exactly.

    Accepted are: an estimator whose gradient is that of ``divergence`` (a clamp is a stated bias); a published biased
    form asked for by its name (``AbsLogRatio``, ``LogSquared``, ``AsReward("k3")``, ...); and an explicit
    ``weight=None`` on a stale sample where the weighted form would be exact. What is biased about them is in the
    result.

    Args:
        target_normalised: False for a target known up to a constant (a log-linear combination of models).

    Raises:
        RecipeError: the gradient is another divergence's, or nothing's.

    >>> from leibler.divergence import ForwardKL, ReverseKL
    >>> check(ForwardKL(), K3()).averages_to
    'ReverseKL'
    >>> check(ReverseKL(), K3())
    Traceback (most recent call last):
    ...
    leibler.errors.RecipeError: On samples of the model K3() descends ForwardKL, not ReverseKL; use K2(), \
K1(weight='differentiable'), K3(weight='differentiable'), Pathwise(), ScoreFunction() or Exact().
    """
    law = _law(sampled_from, stale)
    if isinstance(estimator, Exact):
        return exactness(divergence, estimator, law)
    result = exactness(divergence, estimator, law)
    name = direction(divergence) or repr(divergence)
    if result.descends != name and not _by_name(divergence, estimator, law):
        raise RecipeError(
            f"On samples of the {law} {spelt(estimator)} descends {result.descends}, not {name}; "
            f"use {_listed(divergence, law, target_normalised)}."
        )
    fact = _find(estimator, law)
    if not target_normalised and fact is not None and not estimator.published and not _survives(divergence, fact):
        raise RecipeError(
            f"{spelt(estimator)} needs a normalised target, and this one is known only up to a constant; "
            f"use {_listed(divergence, law, target_normalised)}."
        )
    return result


def _by_name(divergence: object, estimator: Estimator, law: str) -> bool:
    """Whether a bias was asked for explicitly, so that it is reported and not refused."""
    if isinstance(estimator, LowVarKL):
        return law == "behaviour" and direction(divergence) == "ForwardKL"
    if estimator.published:
        return True
    if getattr(estimator, "weight", "auto") is None:
        weighted = _find(replace(estimator, weight="auto"), law)  # pyright: ignore[reportCallIssue]
        return weighted is not None and weighted.descends in (ITSELF, direction(divergence))
    return False
