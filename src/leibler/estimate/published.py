"""Forms that systems in use have, under their own names, each with the bias it has.

None of them is wrong to run; they are wrong to take for the divergence they are named after. What each averages to
and descends is a row of ``leibler.estimate.table``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from leibler.errors import RecipeError
from leibler.estimate.estimators import K1, K2, K3, Estimator, Generator
from leibler.estimate.sample import Sample


@dataclass(frozen=True)
class LowVarKL(Estimator):
    """K3 with its log-ratio cut at +-20 and its value at +-``clamp``, and no weight on stale samples.

    verl's ``low_var_kl`` and, without the cuts, the penalty of DeepSeekMath (2024, GRPO). On fresh samples it
    descends ForwardKL (where not cut); on stale ones the functional ``E_behaviour[1/u - 1 + log u]``.
    """

    published: ClassVar[bool] = True
    clamp: float = 10.0

    def _loss(self, divergence: Generator, sample: Sample) -> tuple[Tensor, Tensor]:
        log_u = sample.log_u.clamp(-20.0, 20.0)
        k, slope = K3()._k(log_u, "model")
        cut = (k.abs() > self.clamp) | (sample.log_u.abs() > 20.0)
        return k.clamp(-self.clamp, self.clamp), torch.where(cut, torch.zeros_like(slope), slope)


@dataclass(frozen=True)
class AbsLogRatio(Estimator):
    """``|log u|`` in the loss, as in The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models
    (2025, KL-Cov) and verl's ``abs``.

    On fresh model samples the coefficient is sign(log u), so it descends **twice the total variation**: a pull of
    constant strength however near the target is. At u = 1 the subgradient is 0.
    """

    published: ClassVar[bool] = True

    def _loss(self, divergence: Generator, sample: Sample) -> tuple[Tensor, Tensor]:
        return sample.log_u.abs(), sample.log_u.sign()


@dataclass(frozen=True)
class LogSquared(Estimator):
    """``(log u)**2 / 2`` on samples of the target: a regression of log-probabilities (not a named divergence)."""

    published: ClassVar[bool] = True

    def _loss(self, divergence: Generator, sample: Sample) -> tuple[Tensor, Tensor]:
        if sample.law != "target":
            raise RecipeError("LogSquared regresses on samples of the target; on samples of the model use K2().")
        return K2()._k(sample.log_u, "target")


@dataclass(frozen=True)
class AsReward(Estimator):
    """A KL estimator subtracted from the reward: detached, it multiplies ``grad log p``.

    Only ``"k1"`` is right there: its gradient is ReverseKL's. ``"k3"`` descends ReverseKL - ForwardKL, whose second
    derivatives cancel at the target, so that nothing holds the model there; ``"k2"`` and ``"abs"`` ignore the sign
    of the log-ratio and descend no divergence.

    Args:
        kind: which function of the log-ratio.
        weight: ``"auto"``: the policy-gradient term carries p/s on stale samples; ``None``: it does not (biased).
    """

    kind: Literal["k1", "k2", "k3", "abs"] = "k1"
    weight: Literal["auto"] | None = "auto"

    @property
    def published(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.kind != "k1"

    def penalty(self, log_u: Tensor) -> Tensor:
        """The number taken off the reward, one per token."""
        if self.kind == "abs":
            return log_u.abs()
        return {"k1": K1, "k2": K2, "k3": K3}[self.kind]()._k(log_u, "model")[0]

    def _loss(self, divergence: Generator, sample: Sample) -> tuple[Tensor, Tensor]:
        if sample.law == "target":
            raise RecipeError(
                "AsReward needs samples of the model or of a behaviour; on target samples use K1() or K3()."
            )
        k = self.penalty(sample.log_u)
        if self.weight is not None:
            k = k * sample.log_model_weight.exp()
        return k, k
