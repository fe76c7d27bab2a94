"""Methods whose students are trained in stages, or on what they wrote before the first step."""

from __future__ import annotations

from typing import Literal

from leibler.divergence import ForwardKL, ReverseCrossEntropy, ReverseKL
from leibler.errors import RecipeError
from leibler.objective import (
    Behaviour,
    Clip,
    Clipped,
    DeadZone,
    GroupNormalised,
    Imitate,
    LogLinear,
    LogRatio,
    Match,
    Model,
    Objective,
    PolicyGradient,
    Reference,
    Reward,
    SameSign,
    SequenceMean,
    Signal,
    Teacher,
)
from leibler.train import Answer, Data, Fixed, Keep, Mixture, OnPolicy, Pipeline, Recipe, Score, TrainingStage


def adpa(
    variant: Literal["adpa", "dckd", "adpa+"] = "adpa",
    weight: float = 1.0,
    distil: float = 1.0,
    clip: float | None = 10.0,
    epochs: int = 1,
) -> Recipe | Pipeline:
    """Advantage-Guided Distillation for Preference Alignment in Small Language Models (2025): a teacher that was
    aligned with preferences tells at every token, and for every token of the vocabulary, what its alignment changed.

    The run needs pairs of responses, the aligned ``teacher`` and ``teacher_base``, the same teacher before it was
    aligned. The published values of ``weight`` and ``distil`` could not be checked.

    Args:
        variant: ``adpa``; ``dckd``, which matches the teacher's law on both responses of each pair; ``adpa+``, the one
            and then, from the student that it leaves, the other.
        weight: of the advantage, in `advantage_guided`.
        distil: of the two divergences, in `dckd`.
        clip, epochs: of `advantage_guided`.
    """
    makers = {
        "adpa": lambda: advantage_guided(weight, clip, epochs),
        "dckd": lambda: dckd(distil),
        "adpa+": lambda: adpa_plus(weight, distil, clip, epochs),
    }
    if variant not in makers:
        raise RecipeError(f"variant={variant!r} of adpa must be one of {', '.join(makers)}.")
    return makers[variant]()


def dckd(distil: float = 1.0) -> Recipe:
    """Dual-Constrained Knowledge Distillation: the likelihood of chosen responses, and the forward KL to the aligned
    teacher on chosen and on rejected ones, each a mean over responses. Source: see `adpa`.

    Args:
        distil: coefficient of the two divergences.
    """
    kl = [
        Match(ForwardKL(), to=Teacher(), where=role, coefficient=distil, reduce=SequenceMean())
        for role in ("chosen", "rejected")
    ]
    return Recipe(Data(), Objective(Imitate(where="chosen"), *kl))


def advantage_guided(weight: float = 1.0, clip: float | None = 10.0, epochs: int = 1) -> Recipe:
    """ADPA: the likelihood of chosen responses, and the student's mean advantage at the tokens of its own responses.

    The advantage of a token is ``log teacher - log teacher_base``; its expectation runs over the whole vocabulary, so
    nothing but the contexts is sampled, and these once, before the first step. It is the reverse KL to
    ``teacher_base`` less that to ``teacher``: linear in the student's law, so without the likelihood the student would
    collapse onto one token. Source: see `adpa`.

    Args:
        weight: coefficient of the advantage.
        clip: bound of the advantage in nats (rare tokens of ``teacher_base`` blow up otherwise); None: unbounded.
        epochs: passes over the student's responses.
    """
    advantage = LogLinear({Teacher(): 1.0, Model("teacher_base"): -1.0}, clip=clip)
    return Recipe(
        Mixture(pairs=Data() >> Keep("chosen"), own=Fixed(OnPolicy(), epochs=epochs)),
        Objective(
            Imitate(on="pairs", where="chosen"),
            Match(ReverseCrossEntropy(), to=advantage, on="own", coefficient=weight, reduce=SequenceMean()),
        ),
    )


def adpa_plus(weight: float = 1.0, distil: float = 1.0, clip: float | None = 10.0, epochs: int = 1) -> Pipeline:
    """ADPA+: `dckd`, and `advantage_guided` from the student that it leaves. Source: see `adpa`.

    Args:
        weight, clip, epochs: of `advantage_guided`.
        distil: of `dckd`.
    """
    guided = TrainingStage(advantage_guided(weight, clip, epochs), start="dckd")
    return Pipeline({"dckd": TrainingStage(dckd(distil)), "adpa": guided})


def erpd(
    teacher: Literal["extreme", "negative", "contrast"] = "extreme",
    group_size: int = 16,
    epochs: int = 16,
    low: float = 0.2,
    high: float = 5.0,
    bound: float = 5.0,
    dead_zone: float = 0.01,
    agree: bool = True,
    coefficient: Signal | float = 2.0,
    share: float = 0.5,
) -> Pipeline:
    """Extreme Region Policy Distillation (2026): learn recklessly from a fixed set of responses, then keep of it what
    little divergence buys.

    First an *extreme* policy is trained for many epochs on responses that were sampled and scored once. Then the
    student, as it was before, learns on its own responses: the advantage of a token is how much more probable the
    extreme policy finds it than the student was, ``d = log extreme - log reference``, clipped, against a reverse KL to
    the reference. Token by token the optimum is ``reference^(1-l) extreme^l`` with ``l = 1 / coefficient``: what is
    gained grows like ``l`` and the divergence like ``l^2``. Reconstructed from the abstract: the loss of the second
    stage and the signals of weak teachers are assumptions.

    Args:
        teacher: where the advantage comes from: ``extreme``; ``negative``, ``log reference - log negative`` for a
            policy trained to fail, where no better one is to be had; ``contrast``, ``log extreme - log negative``.
        group_size: responses to each prompt.
        epochs: passes over the fixed set.
        low, high: of the clip of the ratio in the first stage; wide.
        bound, dead_zone: of the log-ratio's size: above it is cut, below it counts as 0. Tokens that the first stage
            never trained drift too, through the weights that all share.
        agree: count a token only where the outcome of its response, relative to the group, has the sign of its
            advantage.
        coefficient: of the KL to the reference; a number, or a controller such as `AdaptiveKL` for a budget.
        share: of the run's steps for the second stage.
    """
    signals = {
        "extreme": LogRatio(Model("extreme"), Reference()),
        "negative": LogRatio(Reference(), Model("negative")),
        "contrast": LogRatio(Model("extreme"), Model("negative")),
    }
    if teacher not in signals or not 0 < share < 1:
        raise RecipeError(f"teacher={teacher!r} must be one of {', '.join(signals)}, and share={share} in (0, 1).")
    signal = signals[teacher] >> Clipped(bound) >> DeadZone(dead_zone)
    signal = signal >> SameSign(Reward() >> GroupNormalised()) if agree else signal
    distil = Recipe(
        OnPolicy(group_size) >> Score(Answer()),
        Objective(PolicyGradient(signal, Clip(0.2)), Match(ReverseKL(), to=Reference(), coefficient=coefficient)),
    )
    made = {
        "extreme": extreme(group_size, epochs, low, high),
        "negative": extreme(group_size, epochs, low, high, worst=True),
    }
    teachers = {n: TrainingStage(r, share=(1 - share)) for n, r in made.items() if Model(n) in distil.handles()}
    last = TrainingStage(distil, models={n: n for n in teachers}, share=share * len(teachers))
    return Pipeline({**teachers, "distil": last})


def extreme(group_size: int = 16, epochs: int = 16, low: float = 0.2, high: float = 5.0, worst: bool = False) -> Recipe:
    """The first stage of `erpd`: many epochs on a fixed set of scored responses, with a clip that hardly holds.

    Args:
        group_size: responses to each prompt.
        epochs: passes over the set.
        low, high: of the clip; the ratio is to the policy that sampled.
        worst: learn to fail.
    """
    advantage = Reward() >> GroupNormalised()
    surrogate = Clip(low, high, anchor=Behaviour())
    source = Fixed(OnPolicy(group_size) >> Score(Answer()), epochs=epochs)
    return Recipe(source, Objective(PolicyGradient(-advantage if worst else advantage, surrogate)))
