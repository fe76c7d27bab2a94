"""Learning from rewards without drifting away."""

from __future__ import annotations

from leibler.divergence import ForwardKL, ReverseKL
from leibler.estimate import K1, K2
from leibler.objective import (
    GAE,
    AdaptiveKL,
    AgainstHardest,
    Clip,
    Fit,
    GroupNormalised,
    Hinge,
    Identity,
    InReward,
    Match,
    MeanLogProb,
    Objective,
    Old,
    Output,
    PolicyGradient,
    Preference,
    Reference,
    Returns,
    Reward,
    Signal,
    SquaredError,
    Whitened,
)
from leibler.train import Answer, MuteEqual, OnPolicy, Recipe, Schedule, Score, Trained, ValueHead


def grpo(
    group_size: int = 8, clip: float = 0.2, coefficient: Signal | float = 0.04, minibatches: int = 1, epochs: int = 1
) -> Recipe:
    """DeepSeekMath (2024): advantages relative to the group, and a reverse KL to the reference.

    The KL term descends the reverse KL (estimator k2, importance-weighted on stale batches). The published code
    descends the forward KL there, through k3 in the loss.

    Args:
        group_size: responses to each prompt.
        clip: half-width of the ratio's region.
        coefficient: of the KL term; 0 removes it and the reference.
        minibatches, epochs: optimiser batches per draw.
    """
    return Recipe(
        OnPolicy(group_size) >> Score(Answer()),
        Objective(
            PolicyGradient(Reward() >> GroupNormalised(), Clip(clip)),
            Match(ReverseKL(), to=Reference(), estimator=K2(), coefficient=coefficient),
        ),
        Schedule(minibatches, epochs),
    )


def ppo(
    clip: float = 0.2,
    decay: float = 0.95,
    target: float = 6.0,
    initial: float = 0.1,
    horizon: float = 10_000.0,
    minibatches: int = 4,
    epochs: int = 4,
    value_coefficient: float = 0.5,
) -> Recipe:
    """Proximal Policy Optimization (2017), with the KL to the reference inside the reward and a controller that
    holds it near a target: Fine-Tuning Language Models from Human Preferences (2019).

    Args:
        clip: half-width of the ratio's region.
        decay: lambda of generalised advantage estimation.
        target, initial, horizon: of the adaptive KL coefficient (nats per response).
        minibatches, epochs: optimiser batches per draw.
        value_coefficient: of the critic's loss.
    """
    kl = InReward(to=Reference(), coefficient=AdaptiveKL(target, initial, horizon))
    advantage = Reward() >> kl >> GAE("critic", decay)
    return Recipe(
        OnPolicy() >> Score(Answer()),
        Objective(
            PolicyGradient(advantage >> Whitened(), Clip(clip)),
            Fit(SquaredError(), Output("critic"), Returns(advantage), coefficient=value_coefficient),
        ),
        Schedule(minibatches, epochs),
        models={"critic": Trained(ValueHead())},
    )


def disco(
    group_size: int = 8, tau: float = 10.0, bound: float = 1e-4, slope: float = 1e3, minibatches: int = 2
) -> Recipe:
    """DisCO (2025): right answers scored above wrong ones, under a constraint on the KL from the old policy.

    Args:
        group_size: responses to each prompt.
        tau: temperature of the contrast; small values look at the hardest wrong answer only.
        bound, slope: the KL that is free, and the slope of the squared hinge beyond it.
        minibatches: optimiser batches per draw (with one, the policy is the old one and the constraint never acts).
    """
    return Recipe(
        OnPolicy(group_size) >> Score(Answer()) >> MuteEqual(),
        Objective(
            Preference(MeanLogProb(), link=Identity(), contrast=AgainstHardest(tau)),
            Match(ForwardKL(), to=Old(), estimator=K1(), coefficient=Hinge(bound, slope)),
        ),
        Schedule(minibatches),
    )
