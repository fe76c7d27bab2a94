"""Functionals of a vocabulary row as a kernel can compute them: a few sums, and a gradient that needs only those.

A *form* is written in ordinary PyTorch operations on the entries of a row. It is traced and becomes part of a Triton
kernel, so a functional is stated once and a user's own ``SumForm`` needs no kernel code. Sums are arranged so that
close rows do not cancel: the terms of a divergence are of one sign and of second order in the log-ratio, so that the
rounding of the normalisers, which moves every log-ratio alike, enters a value in second order too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch
from typing import NamedTuple

import torch
from torch import Tensor

from leibler.divergence.base import HUGE
from leibler.divergence.functionals import Entropy, SampledLogProb
from leibler.divergence.geometric import DEAD_ZONE, CauchySchwarz, TotalVariation
from leibler.divergence.kl import ForwardKL, Jeffreys, ReverseKL
from leibler.divergence.mixtures import JensenShannon, SkewForwardKL, SkewReverseKL
from leibler.divergence.pair import EXTREME
from leibler.divergence.power import BAND, PowerKernel
from leibler.divergence.tiers import SumForm, Swapped

Tensors = tuple[Tensor, ...]
TINY = 2.0**-100
"""Floor of a mixture's probability: an entry below it contributes nothing."""


class Entry(NamedTuple):
    """One entry of the vocabulary in both rows. Outside a row's support its probability is exactly 0."""

    p: Tensor
    q: Tensor
    logp: Tensor
    """Natural logarithm; about -7e29 outside the support, never -inf."""
    logq: Tensor
    ratio: Tensor
    """``log(p / q)``; 0 where an entry is outside both supports."""
    hit: Tensor
    """Whether this entry is the row's token (bool)."""
    inside: Tensor
    """Whether the entry belongs to the model's support (bool)."""


class Facts(NamedTuple):
    """What is known of each row after its first reading, ``[rows]``."""

    powers: Tensors
    """``log sum p^a q^b`` for the pairs that the form asks for."""
    model_lacks: Tensor
    """Whether some entry has q > 0 = p (bool)."""
    target_lacks: Tensor


@dataclass(frozen=True, eq=False)
class Form:
    """A functional of one row of the model (and one of a target).

    Args:
        sums: elementwise terms whose sums over the vocabulary are wanted; also given the powers of the row.
        finish: the value and the numbers that the gradient reads, all ``[rows]``, from facts and sums.
        gradient: derivative of the value by the model's natural logit at an entry, from entry and numbers.
        powers: pairs (a, b) whose ``log sum p^a q^b`` is wanted.
        ceiling: values from here on are infinite.
    """

    sums: Callable[[Entry, Tensors], Tensors]
    finish: Callable[[Facts, Tensors], tuple[Tensor, Tensors]]
    gradient: Callable[[Entry, Tensors], Tensor]
    powers: tuple[tuple[float, float], ...] = ()
    ceiling: float = HUGE


def form(functional: object) -> Form | None:
    """The form of a functional, or None where it has none (a head that must be sorted, a function of the whole row).

    A class that changes how its parent computes has no form either: the parent's would not be its own.

    Examples:
        >>> from leibler.divergence import AdaptiveKL
        >>> form(ForwardKL()) is None, form(AdaptiveKL()) is None
        (False, True)
    """
    cls = type(functional)
    stated = next(kind for kind in cls.__mro__ if kind in _form.registry)
    if any(getattr(cls, name, None) is not getattr(stated, name, None) for name in _COMPUTING):
        return None
    return _form(functional)


_COMPUTING = ("value", "add_gradient", "_value", "_add_gradient", "ceiling")


@singledispatch
def _form(functional: object) -> Form | None:
    return None


# --- elementary functions without cancellation ------------------------------------------------------------------------
def excess(x: Tensor) -> Tensor:
    """``exp(x) - 1 - x`` for ``|x| <= 1``, relatively accurate; clamped beyond."""
    x = x.clamp(-1.0, 1.0)
    series = x * (1.0 / 12.0) + 1.0
    for k in range(11, 2, -1):
        series = series * x * (1.0 / k) + 1.0
    return series * x * x * 0.5


def defect(y: Tensor) -> Tensor:
    """``y - log(1 + y)`` for ``y > -1``, relatively accurate for small y."""
    small = y.clamp(-0.5, 0.5)
    z = small / (small + 2.0)
    square = z * z
    series = square * (1.0 / 15.0) + 1.0 / 13.0
    for k in (11, 9, 7, 5, 3):
        series = series * square + 1.0 / k
    return torch.where(y.abs() <= 0.5, small * z - 2.0 * z * square * series, y - torch.log1p(y))


def _near(x: Tensor) -> Tensor:
    return x.abs() < 1.0


def _gap(e: Entry) -> Tensor:
    """``p - q``."""
    return torch.where(_near(e.ratio), e.q * torch.expm1(e.ratio.clamp(-1.0, 1.0)), e.p - e.q)


# --- Kullback-Leibler -------------------------------------------------------------------------------------------------
def _kl_term(first: Tensor, second: Tensor, x: Tensor) -> Tensor:
    """Terms of KL(a || b), x = log(b / a): ``a (exp(x) - 1 - x)``. None is negative; the sum of b - a is 0."""
    return torch.where(_near(x), first * excess(x), second - first - first * x)


@_form.register
def _(functional: ForwardKL) -> Form:
    return Form(
        sums=lambda e, _: (_kl_term(e.q, e.p, e.ratio),),
        finish=lambda facts, sums: (sums[0].masked_fill(facts.model_lacks, torch.inf), ()),
        gradient=lambda e, _: _gap(e),
    )


@_form.register
def _(functional: ReverseKL) -> Form:
    return Form(
        sums=lambda e, _: (_kl_term(e.p, e.q, -e.ratio), e.p * e.ratio),
        finish=lambda facts, sums: (sums[0].masked_fill(facts.target_lacks, torch.inf), (sums[1],)),
        gradient=lambda e, numbers: e.p * (e.ratio - numbers[0]),
    )


@_form.register
def _(functional: Jeffreys) -> Form:
    forward, reverse = _formed(ForwardKL()), _formed(ReverseKL())

    def finish(facts: Facts, sums: Tensors) -> tuple[Tensor, Tensors]:
        one, _ = forward.finish(facts, sums[:1])
        other, numbers = reverse.finish(facts, sums[1:])
        return one + other, numbers

    return Form(
        sums=lambda e, powers: forward.sums(e, powers) + reverse.sums(e, powers),
        finish=finish,
        gradient=lambda e, numbers: forward.gradient(e, ()) + reverse.gradient(e, numbers),
    )


# --- mixtures ---------------------------------------------------------------------------------------------------------
class _Mixed(NamedTuple):
    """Row a against ``m = (1 - share) a + share b``."""

    term: Tensor
    """Terms of KL(a || m)."""
    surprise: Tensor
    """``log(a / m)``."""
    above: Tensor
    """``a / m - 1``."""


def _mixed(first: Tensor, second: Tensor, log_first: Tensor, x: Tensor, share: float) -> _Mixed:
    """``x = log(b / a)``; for entries close to the mixture everything follows from ``y = m / a - 1``."""
    y = torch.expm1(x.clamp(-EXTREME, EXTREME)) * share
    near = y.abs() < 0.5
    mixture = (first * (1.0 - share) + second * share).clamp(min=TINY)
    surprise = log_first - torch.log(mixture)
    return _Mixed(
        torch.where(near, first * defect(y), (second - first) * share + first * surprise),
        torch.where(near, -torch.log1p(y), surprise),
        torch.where(near, -y / (y + 1.0), first / mixture - 1.0),
    )


@_form.register
def _(functional: JensenShannon) -> Form:
    beta = functional.beta

    def of_model(e: Entry) -> _Mixed:
        return _mixed(e.p, e.q, e.logp, -e.ratio, beta)

    def sums(e: Entry, _: Tensors) -> Tensors:
        target, model = _mixed(e.q, e.p, e.logq, e.ratio, 1.0 - beta), of_model(e)
        return target.term * beta + model.term * (1.0 - beta), e.p * model.surprise

    return Form(
        sums=sums,
        finish=lambda facts, sums: (sums[0], (sums[1],)),
        gradient=lambda e, numbers: e.p * (of_model(e).surprise - numbers[0]) * (1.0 - beta),
    )


@_form.register
def _(functional: SkewForwardKL) -> Form:
    if functional.lam == 0.0:
        return _formed(ForwardKL())
    share = 1.0 - functional.lam

    def of_target(e: Entry) -> _Mixed:
        return _mixed(e.q, e.p, e.logq, e.ratio, share)

    return Form(
        sums=lambda e, _: (of_target(e).term, e.p * of_target(e).above),
        finish=lambda facts, sums: (sums[0], (sums[1],)),
        gradient=lambda e, numbers: e.p * (of_target(e).above - numbers[0]) * -share,
    )


@_form.register
def _(functional: SkewReverseKL) -> Form:
    if functional.lam == 0.0:
        return _formed(ReverseKL())
    lam = functional.lam

    def slope(e: Entry) -> tuple[_Mixed, Tensor]:
        model = _mixed(e.p, e.q, e.logp, -e.ratio, 1.0 - lam)
        return model, model.surprise - model.above * lam

    def sums(e: Entry, _: Tensors) -> Tensors:
        model, k = slope(e)
        return model.term, e.p * k

    return Form(
        sums=sums,
        finish=lambda facts, sums: (sums[0], (sums[1],)),
        gradient=lambda e, numbers: e.p * (slope(e)[1] - numbers[0]),
    )


# --- powers -----------------------------------------------------------------------------------------------------------
def _scaled(kl: Form, weight: float) -> Form:
    def finish(facts: Facts, sums: Tensors) -> tuple[Tensor, Tensors]:
        value, numbers = kl.finish(facts, sums)
        return value * weight, numbers

    return Form(kl.sums, finish, lambda e, numbers: kl.gradient(e, numbers) * weight, kl.powers, kl.ceiling)


def _exp_less_one(first: Tensor, x: Tensor, other: Tensor, limit: float) -> Tensor:
    """``a (exp(x) - 1)`` where ``b = a exp(x)``: by expm1 below the limit, by the difference of b and a beyond."""
    return torch.where(x.abs() < limit, first * torch.expm1(x.clamp(-limit, limit)), other - first)


@_form.register
def _(functional: PowerKernel) -> Form:
    if functional._limit is not None:
        return _scaled(_formed(functional._limit), functional.weight)
    order, scale, logarithmic = functional.order, functional._scale, functional.logarithmic
    # Near the limits the scale multiplies every rounding: there expm1 serves as far as it does not overflow.
    near_one = abs(order - 1.0) < BAND
    limit, least, most = (EXTREME, -0.99, 1e6) if near_one or abs(order) < BAND else (1.0, -0.5, 0.5)

    def sums(e: Entry, _: Tensors) -> Tensors:
        # S - 1 = E_b[exp(c x) - 1 - c (exp(x) - 1)], x = log(a / b), for b = q, c = order or b = p, c = 1 - order:
        # the smaller |c|, so that an order near 0 or 1 is a factor of every term.
        if abs(order) <= abs(1.0 - order):
            first, other, x, c = e.q, e.p, e.ratio, order
        else:
            first, other, x, c = e.p, e.q, -e.ratio, 1.0 - order
        blend = torch.exp(e.logp * order + e.logq * (1.0 - order))
        far = _exp_less_one(first, c * x, blend, limit) - (other - first) * c
        both_small = _near(x) & _near(c * x)
        return (torch.where(both_small, first * (excess(c * x) - excess(x) * c), far),)

    def finish(facts: Facts, sums: Tensors) -> tuple[Tensor, Tensors]:
        less_one = sums[0]
        plain = facts.powers[0]
        known = (less_one > least) & (less_one < most)
        log_s = torch.where(known, torch.log1p(less_one.clamp(least, most)), plain)
        values = (scale * (log_s if logarithmic else torch.expm1(log_s))).clamp(min=0.0)
        if order < 0.0:
            values = values.masked_fill(facts.model_lacks, torch.inf)
        if order > 1.0:
            values = values.masked_fill(facts.target_lacks, torch.inf)
        slope = torch.full_like(log_s, scale * order) if logarithmic else scale * order * torch.exp(log_s)
        return values, (log_s, slope)

    def gradient(e: Entry, numbers: Tensors) -> Tensor:
        # d log S = order (w - p), w = p^a q^(1 - a) / S = p exp((a - 1) x - log S).
        log_s, slope = numbers
        exponent = e.ratio * (order - 1.0) - log_s
        blend = torch.exp(e.logp * order + e.logq * (1.0 - order) - log_s)
        return _exp_less_one(e.p, exponent, blend, EXTREME if near_one else 1.0) * slope

    return Form(sums, finish, gradient, ((order, 1.0 - order),), functional.ceiling)


# --- distance and angle -----------------------------------------------------------------------------------------------
@_form.register
def _(functional: TotalVariation) -> Form:
    def sign(e: Entry) -> tuple[Tensor, Tensor]:
        gap = _gap(e)
        floor = torch.maximum(e.p, e.q) * (DEAD_ZONE * torch.finfo(torch.float32).eps)
        return gap, torch.where(gap.abs() > floor, torch.sign(gap), 0.0)

    def sums(e: Entry, _: Tensors) -> Tensors:
        gap, side = sign(e)
        return gap.abs(), e.p * side

    return Form(
        sums=sums,
        finish=lambda facts, sums: (sums[0] * 0.5, (sums[1],)),
        gradient=lambda e, numbers: e.p * (sign(e)[1] - numbers[0]) * 0.5,
    )


@_form.register
def _(functional: CauchySchwarz) -> Form:
    def sums(e: Entry, powers: Tensors) -> Tensors:
        # With r = q^2 / sum q^2 and u = p / q: the variance of u under r, about nearly its mean, over that mean's
        # square; entries far apart have no say where this is used.
        product, _, target_square = powers
        mean = torch.expm1((product - target_square).clamp(-1.0, 1.0))
        share = torch.exp(e.logq * 2.0 - target_square)
        deviation = torch.expm1(e.ratio.clamp(-20.0, 20.0)) - mean
        return share * deviation, share * deviation * deviation

    def finish(facts: Facts, sums: Tensors) -> tuple[Tensor, Tensors]:
        product, model_square, target_square = facts.powers
        plain = model_square + target_square - 2.0 * product
        shift, square = sums
        mean = torch.expm1((product - target_square).clamp(-1.0, 1.0)) + shift + 1.0
        close = torch.log1p((square - shift * shift) / (mean * mean))
        usable = (plain < 0.5) & (close < 0.5) & ((product - target_square).abs() < 1.0)
        return torch.where(usable, close, plain).clamp(min=0.0), (product, model_square)

    def gradient(e: Entry, numbers: Tensors) -> Tensor:
        product, model_square = numbers
        return (torch.exp(e.logp * 2.0 - model_square) - torch.exp(e.logp + e.logq - product)) * 2.0

    return Form(sums, finish, gradient, ((1.0, 1.0), (2.0, 0.0), (0.0, 2.0)))


# --- of the model alone -----------------------------------------------------------------------------------------------
@_form.register
def _(functional: Entropy) -> Form:
    return Form(
        sums=lambda e, _: (e.p * -e.logp,),
        finish=lambda facts, sums: (sums[0].clamp(min=0.0), (sums[0],)),
        gradient=lambda e, numbers: e.p * (e.logp + numbers[0]) * -1.0,
    )


@_form.register
def _(functional: SampledLogProb) -> Form:
    def finish(facts: Facts, sums: Tensors) -> tuple[Tensor, Tensors]:
        return sums[0].masked_fill(sums[0] < -HUGE, -torch.inf), ()

    return Form(
        sums=lambda e, _: (torch.where(e.hit, e.logp, 0.0),),
        finish=finish,
        gradient=lambda e, _: torch.where(e.hit, 1.0 - e.p, -e.p),
    )


# --- a user's own -----------------------------------------------------------------------------------------------------
@_form.register
def _(functional: Swapped) -> Form | None:
    return form(functional.divergence.swapped())


@_form.register
def _(functional: SumForm) -> Form | None:
    if type(functional).prelude is not SumForm.prelude:
        return None  # needs the whole row first

    def slopes(e: Entry) -> Tensors:
        parts = functional.derivatives(e.logp, e.logq, None)
        return tuple(torch.where(e.inside, part, 0.0) for part in parts)

    def finish(facts: Facts, sums: Tensors) -> tuple[Tensor, Tensors]:
        half = len(sums) // 2
        value, coefficients = functional.combine(sums[:half])
        total = sum((c * s for c, s in zip(coefficients, sums[half:], strict=True)), torch.zeros_like(value))
        return value, (*coefficients, total)

    def gradient(e: Entry, numbers: Tensors) -> Tensor:
        *coefficients, total = numbers
        h = sum((c * s for c, s in zip(coefficients, slopes(e), strict=True)), torch.zeros_like(e.p))
        return h - e.p * total

    return Form(
        sums=lambda e, _: (*functional.summands(e.logp, e.logq, None), *slopes(e)),
        finish=finish,
        gradient=gradient,
        ceiling=functional.ceiling,
    )


def _formed(functional: object) -> Form:
    found = form(functional)
    assert found is not None
    return found
