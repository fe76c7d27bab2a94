"""Distillation: match a teacher, on data, on the student's own responses, or on both."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from leibler.divergence import AdaptiveKL, ArgmaxMargin, Divergence, ForwardKL, JensenShannon, ReverseKL, SkewForwardKL
from leibler.estimate import K2
from leibler.objective import (
    Arithmetic,
    Behaviour,
    BetaKernel,
    Clip,
    Column,
    Fit,
    GroupAny,
    GroupNormalised,
    Imitate,
    ImplicitReward,
    Importance,
    Lift,
    Linear,
    LogLinear,
    LogProb,
    LogRatio,
    Match,
    Model,
    Objective,
    Old,
    Policy,
    PolicyGradient,
    Preference,
    Ratio,
    Reference,
    Reward,
    Routed,
    Signal,
    SquaredError,
    Switch,
    Target,
    Teacher,
    Term,
    ToGo,
    Whitened,
)
from leibler.train import (
    Adaptive,
    Answer,
    Data,
    Mixture,
    OnPolicy,
    Paired,
    PassRate,
    Recipe,
    Sampled,
    Schedule,
    Score,
    Snapshot,
    Source,
)


def sft() -> Recipe:
    """Maximum likelihood of given completions."""
    return Recipe(Data(), Objective(Imitate()))


def kd(divergence: Divergence = ForwardKL(), imitate: float = 0.0) -> Recipe:
    """Distilling the Knowledge in a Neural Network (2015): the teacher's law at every token of given completions.

    Args:
        divergence: forward KL as published.
        imitate: coefficient of the completions' own likelihood.
    """
    return Recipe(Data(), Objective(Match(divergence, to=Teacher()), Imitate(coefficient=imitate)))


def gkd(divergence: Divergence = JensenShannon(0.5)) -> Recipe:
    """On-Policy Distillation of Language Models (2023): a generalised Jensen-Shannon divergence on own responses."""
    return Recipe(OnPolicy(), Objective(Match(divergence, to=Teacher())))


def minillm(
    teacher_share: float = 0.2,
    epochs: int = 4,
    minibatches: int = 1,
    clip: float = 0.2,
    start: int = 1,
    text: str | None = None,
) -> Recipe:
    """Knowledge Distillation of Large Language Models (2023): reverse KL of whole responses.

    The gradient is split into the exact single-step part and a sampled part with the log-ratios still to come,
    normalised by length. Responses are sampled from a mixture of student and teacher at each token, so the ratio that
    is clipped is that of the student to the mixture.

    Args:
        teacher_share: the teacher's weight in the sampling mixture.
        epochs, minibatches, clip: of the clipped updates on each draw.
        start: 1 as derived in the paper; 0 as in the released code, which counts the immediate log-ratio twice.
        text: the name of a data set of plain text whose likelihood is added, if any.
    """
    future = LogRatio(Teacher(), Old()) >> ToGo(start=start, per="remaining") >> Whitened()
    terms = (
        PolicyGradient(future, Clip(clip, anchor=Behaviour())),
        Match(ReverseKL(), to=Teacher(), weight=Importance(Policy(), Behaviour(), most=5.0)),
    )
    source = OnPolicy(sampler=Arithmetic({Old(): 1 - teacher_share, Teacher(): teacher_share}))
    return _beside_text(text, source, terms, Schedule(minibatches, epochs))


def distillm(lam: float = 0.1, capacity: int = 1000, text: str | None = None) -> Recipe:
    """DistiLLM (2024): skewed forward KL on an adaptive mixture of data, own responses and replayed ones.

    Args:
        lam: the student's share in the skewed mixture.
        capacity: responses that the replay buffer holds.
        text: the name of a data set of plain text whose likelihood is added, if any.
    """
    source = Adaptive(Data(), OnPolicy(), capacity=capacity)
    return _beside_text(text, source, (Match(SkewForwardKL(lam), to=Teacher()),), Schedule())


def _beside_text(text: str | None, source: Source, terms: tuple[Term, ...], schedule: Schedule) -> Recipe:
    """The recipe itself or, with a data set of plain text, with the likelihood of that text added."""
    if text is None:
        return Recipe(source, Objective(*terms), schedule)
    both = Mixture(main=source, text=Data(text))
    return Recipe(both, Objective(*(replace(t, on="main") for t in terms), Imitate(on="text")), schedule)


def akl(head_mass: float = 0.5) -> Recipe:
    """Rethinking Kullback-Leibler Divergence in Knowledge Distillation (2024): forward and reverse KL, weighted by the
    gaps in the head and the tail of the teacher's law.

    Args:
        head_mass: the teacher's probability that makes up its head.
    """
    return Recipe(Data(), Objective(Match(AdaptiveKL(head_mass), to=Teacher())))


def kdrl(
    group_size: int = 8,
    clip: float = 0.2,
    coefficient: Signal | float = Linear(5e-3, 1e-3, steps=200),
    guided: bool = False,
) -> Recipe:
    """KDRL (2025): GRPO joined with on-policy distillation by the reverse KL.

    Args:
        group_size: responses to each prompt.
        clip: half-width of the ratio's region.
        coefficient: of the reverse KL to the teacher.
        guided: distil only where no response of the group was right.
    """
    return Recipe(
        OnPolicy(group_size) >> Score(Answer()),
        Objective(
            PolicyGradient(Reward() >> GroupNormalised(), Clip(clip)),
            Match(
                ReverseKL(),
                to=Teacher(),
                estimator=K2(),
                coefficient=coefficient,
                weight=~GroupAny() if guided else 1.0,
            ),
        ),
    )


def g_opd(
    scale: float = 1.25,
    clip: float | None = 10.0,
    reference: str = "base",
    anchor: str | None = None,
    domains: tuple[str, ...] = (),
    column: str = "domain",
) -> Recipe:
    """Learning beyond Teacher (2026): on-policy distillation to ``teacher^scale * base^(1 - scale)``.

    ``scale=1`` is plain on-policy distillation for any base; above 1 it extrapolates away from the base.

    A teacher of another size was trained from another base than the student. Then the reward is its log-ratio to its
    own base, and the student is held to the student's: ``anchor (teacher / reference)^scale``. Several teachers are
    merged by asking, for each row, the one of its domain.

    Args:
        scale: the reward's scaling.
        clip: bound of each log-ratio to the teacher (to the anchor, where there is one); rare tokens of the base blow
            up otherwise.
        reference: the model under the teacher in the reward.
        anchor: the model that the student is held to, such as ``reference``, its own initial law; None: the same.
        domains: values of the column, each with a model ``teacher_VALUE`` of its own; none: one teacher.
        column: of the data, that says which domain a record is of.
    """
    teacher = Routed(column, {d: f"teacher_{d}" for d in domains}) if domains else Teacher()
    if anchor in (None, reference):
        target = LogLinear({teacher: scale, Model(reference): 1 - scale}, clip=clip)
    else:
        target = LogLinear({Model(anchor): 1.0, teacher: scale, Model(reference): -scale}, clip=clip)
    return Recipe(OnPolicy(), Objective(PolicyGradient(LogRatio(target, Policy()), Ratio())))


def rlad(
    group_size: int = 8, alpha: float = 0.5, clip: float = 0.2, coefficient: float = 0.0, epochs: int = 4
) -> Recipe:
    """Reinforcement-aware Knowledge Distillation for LLM Reasoning (2026): the clip's ratio is taken to a geometric
    mixture of the old policy and the teacher, so a good token that the teacher dislikes is not reinforced, and a bad
    one that it likes is not punished.

    The mixture is not normalised and the ratio no importance weight: its mean under the old policy is not 1. The
    published values of ``alpha`` and ``clip`` could not be checked.

    Args:
        group_size: responses to each prompt.
        alpha: the old policy's exponent in the mixture; 1 is GRPO's ratio.
        clip: half-width of the ratio's region.
        coefficient: of the reverse KL to the reference.
        epochs: passes over each draw; with one or two, the clip hardly carries the teacher's signal.
    """
    anchor = LogLinear({Old(): alpha, Teacher(): 1 - alpha})
    return Recipe(
        OnPolicy(group_size) >> Score(Answer()),
        Objective(
            PolicyGradient(Reward() >> GroupNormalised(), Clip(clip, anchor=anchor)),
            Match(ReverseKL(), to=Reference(), estimator=K2(), coefficient=coefficient),
        ),
        Schedule(epochs=epochs),
    )


def delta_kd(alpha: float = 1.0, imitate: float = 0.5) -> Recipe:
    """Delta Knowledge Distillation for Large Language Models (2025): the student's own initial law, shifted as
    fine-tuning shifted the teacher's: ``reference (teacher / teacher_base)^alpha``, normalised at each token.

    Reconstructed from the abstract: the published shift may be another one.

    Args:
        alpha: how much of the teacher's shift is asked for.
        imitate: share of the completions' own likelihood; the rest is the forward KL to the shifted law.
    """
    shifted = LogLinear({Reference(): 1.0, Teacher(): alpha, Model("teacher_base"): -alpha})
    return Recipe(
        Data(),
        Objective(Match(ForwardKL(), to=shifted, coefficient=1 - imitate), Imitate(coefficient=imitate)),
    )


def dpkd(beta: float = 1.0, share: float = 0.5, level: Literal["token", "sequence"] = "token") -> Recipe:
    """Direct Preference Knowledge Distillation for Large Language Models (2024), token by token as released: at each
    context the teacher's most likely token is preferred to the student's, with the teacher in the reference's place.

    Its fixed points are students with the teacher's first choices, not with its law. The published values of ``beta``
    and ``share`` could not be checked. The paper's own form compares whole responses, sampled now: the teacher's is
    preferred to the student's, by mean log-ratios to the teacher.

    Args:
        beta: sharpness of the preference.
        share: of the preference; the rest is the completions' likelihood.
        level: ``token``, or ``sequence`` for the paper's form.
    """
    if level == "sequence":
        preference = Preference(ImplicitReward(beta=beta, to=Teacher(), mean=True), on="pairs", coefficient=share)
        source = Mixture(pairs=Paired(Sampled("teacher"), OnPolicy()), data=Data())
        return Recipe(source, Objective(preference, Imitate(on="data", coefficient=1 - share)))
    return Recipe(
        Data(),
        Objective(Match(ArgmaxMargin(beta), to=Teacher(), coefficient=share), Imitate(coefficient=1 - share)),
    )


def paced(a: float = 1.0, b: float = 1.0, turn: int | None = None, samples: int | None = None) -> Recipe:
    """PACED: Distillation at the Frontier of Student Competence (2026): each completion counts by how often the student
    solves its problem, most where that is sometimes.

    Without ``samples`` the data needs a column ``pass_rate``: the share of the student's own answers that were right. A
    rate of 0 or 1 gives no weight for good, so estimate the rates anew now and then, or in the run.

    Args:
        a, b: exponents of the kernel ``p^a (1 - p)^b``; both 0: plain distillation.
        turn: the optimiser step at which the forward KL gives way to the reverse one; None: forward KL throughout.
        samples: answers that the student gives to each drawn problem, to estimate its pass rate as it is now; for
            ``a = b = 1`` the weight is then unbiased.
    """
    source: Source = Data(columns=("pass_rate",))
    weight: Signal = Column("pass_rate") >> BetaKernel(a, b)
    if samples is not None:
        source = Data() >> PassRate(samples)
        if a == b == 1:  # the kernel of an estimated rate has the mean (1 - 1 / samples) p (1 - p)
            weight = weight * (samples / (samples - 1))
    forward = Match(ForwardKL(), to=Teacher(), weight=weight)
    if turn is None:
        return Recipe(source, Objective(forward))
    reverse = Match(ReverseKL(), to=Teacher(), weight=weight, coefficient=Switch(0.0, 1.0, turn))
    first = replace(forward, coefficient=Switch(1.0, 0.0, turn))
    return Recipe(source, Objective(first, reverse))


def recursive_meta_distillation(anchor: float = 0.5, geometric: bool = False, steps_per_round: int = 100) -> Recipe:
    """Recursive Meta-Distillation (2026): each generation distils the last one, drawn towards the first teacher.

    With an anchor the forward KL to the teacher shrinks by at least ``1 - anchor`` a generation, up to what the student
    cannot fit; without one, errors add up. Reconstructed from the abstract.

    Args:
        anchor: the teacher's weight in each generation's target.
        geometric: mix log-probabilities, not probabilities; what the student has lost then stays lost.
        steps_per_round: optimiser steps of a generation.
    """
    parts: dict[Target | str, float] = {Model("previous"): 1 - anchor, Teacher(): anchor}
    return Recipe(
        Data(),
        Objective(Match(ForwardKL(), to=LogLinear(parts) if geometric else Arithmetic(parts))),
        Schedule(steps_per_round=steps_per_round),
        models={"previous": Snapshot(every=1)},
    )


def transfer_limits() -> Recipe:
    """Towards the Fundamental Limits of Knowledge Transfer over Finite Domains (2023): the squared error of the
    log-probabilities that a teacher gave the completions' own tokens, where nothing else of the teacher can be had.

    The data needs a column ``label_logp`` with one number for each token of the completion, its end included. Weighting
    the likelihood by those probabilities instead would learn the squared teacher.
    """
    return Recipe(
        Data(columns=("label_logp",)),
        Objective(Fit(SquaredError(), LogProb(Policy()), Column("label_logp", reach="token"))),
    )


def vocabulary_expansion(threshold: float = 1e-3) -> Recipe:
    """KL-based self-distillation for large language models (2025): a model with new tokens learns from itself without
    them. The old model's law is lifted onto the new vocabulary: a new token gets the product over its pieces.

    Run it with ``align=text``: the teacher is the model before `leibler.policy.extend`, and reads the text in its own
    tokens. Reconstructed from the abstract; the lift is exact, but may not be the paper's.

    Args:
        threshold: new tokens whose first piece is less probable than that are left with their pieces.
    """
    return Recipe(Data(), Objective(Match(ForwardKL(), to=Lift(Teacher(), threshold=threshold))))
