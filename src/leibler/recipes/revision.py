"""Distillation on responses that the teacher has revised."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from leibler.divergence import BandKL
from leibler.objective import Imitate, Match, Objective, SpanProduct, Teacher
from leibler.train import Adaptive, Data, Mixture, Recipe, Repair


def scrg_dac_kl(
    lower: float = 0.9,
    upper: float = 1.0,
    least_mass: float = 0.9,
    tail: Literal["renormalise", "bucket"] = "renormalise",
    span: float = 1.0,
    spans: int | str = 4,
    times: int = 1,
    capacity: int = 1000,
    imitate: float = 0.0,
) -> Recipe:
    """Multi-Granularity Semantic Revision for Large Language Model Distillation (2024): the student's responses, put
    right at their worst token and written on from there; the forward KL on a band of the teacher's probabilities; and
    products of neighbouring laws within spans.

    Reconstructed from the abstract. In the paper a network that is trained along chooses the band; unconstrained, it
    would choose one token, whose loss is always 0. Here the band is fixed and holds ``least_mass``.

    Args:
        lower, upper: the band, as quantiles of the teacher's probabilities; the label is always in it.
        least_mass: the teacher's probability that is kept at least.
        tail: what becomes of the rest; ``"bucket"`` keeps it as one class, so that the student's cannot grow unseen.
        span: coefficient of the span term.
        spans: tokens in a span, or the column of the data that numbers each token's span.
        times: repairs of each response.
        capacity: responses that the replay buffer holds.
        imitate: coefficient of the likelihood of completions, drawn beside.
    """
    source = Adaptive(Data(), Repair(times=times), capacity=capacity)
    terms = (
        Match(BandKL(lower, upper, least_mass, tail), to=Teacher()),
        SpanProduct(Teacher(), spans, coefficient=span),
    )
    if imitate == 0:
        return Recipe(source, Objective(*terms))
    both = Mixture(main=source, data=Data())
    return Recipe(both, Objective(*(replace(t, on="main") for t in terms), Imitate(on="data", coefficient=imitate)))
