"""Masked-diffusion language models: learning from masked texts, and decoding several tokens in a forward pass."""

from __future__ import annotations

from leibler.divergence import ForwardKL, Heated
from leibler.objective import Column, Given, Imitate, Match, Model, Objective
from leibler.objective.reduce import SequenceMean
from leibler.train import Data, Masked, Recipe, Trajectories


def llada(length: int | None = None) -> Recipe:
    """Large Language Diffusion Models (2025): fill in a random part of given completions.

    The masked positions' negative log-likelihoods, weighted by the inverse of the share that is masked, have a mean of
    at least the negative log-likelihood of the completion; see `Masked`. The paper divides by the length of the
    completion too, which is the same for all here and only scales the loss.

    Args:
        length: positions of a completion, which end tokens fill up; None: the run's ``max_new_tokens``.
    """
    weighted = Imitate(weight=Column("inverse_share"), reduce=SequenceMean("sum"))
    return Recipe(Masked(Data(), length), Objective(weighted))


def tad(
    delta: int = 8,
    commit: int = 1,
    imitate: float = 1.0,
    distant: float = 1.0,
    temperature: float = 1.0,
    hint: str = "Reference Answer: {answer}\n{prompt}",
    hinted: bool = True,
) -> Recipe:
    """TAD: Temporal-Aware Trajectory Self-Distillation for Fast and Accurate Diffusion LLM (2026).

    In a masked state on the way of a decoding trajectory, tokens that the trajectory reveals within ``delta`` passes
    are learned as labels (a mean over all such tokens of the batch); at the other masked positions the law of the model
    as it was at the start, which reads the gold answer too, is matched by the forward KL. The released code trains a
    low-rank adapter (``adapter_rank=128``), ``learning_rate=2e-5`` and batches of 32 for one epoch.

    Args:
        delta: passes that labels are ahead: larger decodes faster, smaller is more careful.
        commit: tokens that each pass of the trajectory reveals.
        imitate: coefficient of the near tokens.
        distant: coefficient of the forward KL at the distant ones.
        temperature: of both laws in that KL, which is multiplied by its square.
        hint: the teacher's prompt; ``{answer}`` and ``{prompt}`` stand for the record's.
        hinted: decode the trajectories with the hint too, as the paper says; False: from the plain prompt.
    """
    teacher = Given(Model("initial"), "privileged")
    divergence = ForwardKL() if temperature == 1.0 else Heated(ForwardKL(), temperature)
    return Recipe(
        Trajectories(delta, commit, hint=hint, hinted=hinted),
        Objective(
            Imitate(where="near", coefficient=imitate),
            Match(divergence, to=teacher, where="distant", coefficient=distant * temperature**2),
        ),
    )
