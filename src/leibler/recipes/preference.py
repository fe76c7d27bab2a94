"""Learning from preferences."""

from __future__ import annotations

from leibler.divergence import Divergence, JensenShannon
from leibler.errors import RecipeError
from leibler.objective import Geometric, ImplicitReward, Logistic, Objective, Preference, Squared
from leibler.train import AnswerJudge, BestAndWorst, Data, Frozen, Recipe, Sampled, Schedule, Snapshot, WinRate


def dpo(beta: float = 0.1, smoothing: float = 0.0) -> Recipe:
    """Direct Preference Optimization (2023).

    Args:
        beta: strength of the pull to the reference.
        smoothing: assumed share of flipped labels.
    """
    return Recipe(Data(), Objective(Preference(ImplicitReward(beta=beta), Logistic(smoothing))))


def f_dpo(divergence: Divergence = JensenShannon(0.5), beta: float = 0.1, clip: float | None = 20.0) -> Recipe:
    """Beyond Reverse KL (2023): DPO with the derivative of another f-divergence as implicit reward.

    Args:
        divergence: the paper's Jensen-Shannon divergence is twice this one, so its ``beta`` is half of ours; its alpha
            is ``Alpha(1 - alpha)`` here.
        clip: bound of the responses' log-ratio (the derivative of forward KL grows like its inverse exponential).
    """
    return Recipe(Data(), Objective(Preference(ImplicitReward(divergence, beta, clip=clip))))


def inpo(eta: float = 0.0075, tau: float = 0.0025, group_size: int = 8, steps_per_round: int = 100) -> Recipe:
    """Iterative Nash Policy Optimization (2024): self-play towards the Nash policy of a judge.

    Each round regresses the policy's log-ratio of a better to a worse own response, relative to a geometric mixture of
    the reference and the last round's policy, to ``1 / (2 eta)``.

    Args:
        eta: step size of mirror descent.
        tau: strength of the pull to the reference; at most ``eta``.
        group_size: responses among which the best and the worst are taken.
        steps_per_round: optimiser steps between renewals of the previous policy.
    """
    if tau > eta:
        raise RecipeError(
            f"tau={tau} must be at most eta={eta}: the previous policy's weight 1 - tau / eta is negative."
        )
    share = tau / eta
    law = Geometric(reference=share, previous=1 - share)
    return Recipe(
        Sampled("previous", group_size) >> WinRate(AnswerJudge()) >> BestAndWorst(),
        Objective(Preference(ImplicitReward(beta=1.0, to=law), Squared(1 / (2 * eta)))),
        Schedule(steps_per_round=steps_per_round),
        models={"reference": Frozen("initial"), "previous": Snapshot(every=1)},
    )
