"""Distillation by optimal transport."""

from __future__ import annotations

from leibler.divergence import ForwardKL, Heated, TotalVariation
from leibler.objective import Imitate, Match, Objective, Sinkhorn, Teacher, Transport
from leibler.objective.terms import Term
from leibler.train import Data, Recipe


def sinkd(
    transport: float = 0.5,
    kl: float = 1.0,
    eps: float = 0.1,
    iterations: int = 20,
    temperature: float = 2.0,
    sites: int = 256,
    debiased: bool = False,
    batch_wise: bool = True,
) -> Recipe:
    """Sinkhorn Distance Minimization for Knowledge Distillation (2024): the cost of carrying the student's laws at many
    tokens to the teacher's, beside the forward KL at each token and the labels' likelihood.

    Transport alone does not see which student row belongs to which teacher row, so the forward KL stays. Needs
    ``leibler[transport]``. Only the transport's weight and settings are known from the released code; it weighs a plan
    of mass n (the rows) with 0.002, which at 256 rows of mass 1 is the 0.5 here.

    Args:
        transport: coefficient of the transport's cost per row.
        kl: coefficient of the forward KL, times the temperature squared.
        eps, iterations: of Sinkhorn's iterations.
        temperature: of both laws in transport and KL.
        sites: tokens of a batch, drawn anew each step, that are transported together.
        debiased: subtract the cost within each side, so that equal batches cost nothing.
        batch_wise: False: each row to its own, which is twice the total variation.
    """
    terms: list[Term] = [Imitate()]
    terms.append(Match(Heated(ForwardKL(), temperature), to=Teacher(), coefficient=kl * temperature**2))
    if batch_wise:
        plan = Sinkhorn(eps, iterations)
        terms.append(Transport(plan, Teacher(), debiased, sites=sites, temperature=temperature, coefficient=transport))
    else:
        terms.append(Match(Heated(TotalVariation(), temperature), to=Teacher(), coefficient=2 * transport))
    return Recipe(Data(), Objective(*terms))
