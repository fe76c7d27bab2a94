"""Estimators of a divergence, and of its gradient, from the log-probability of sampled tokens.

Throughout, p is the model, q the target, u = p/q, l = log u, and s the law the token was drawn from. Each estimator
is described by what its *value* averages to and which functional its *gradient* descends; the two differ more often
than its name suggests, and the facts are data in ``leibler.estimate.table``, proven by enumeration in the tests.

References: Approximating KL Divergence (Schulman, 2020) for K1, K2, K3; Aligning Language Models with Preferences
through f-divergence Minimization (2023) for the score-function form; The Choice of Divergence: A Neglected Key to
Mitigating Diversity Collapse in Reinforcement Learning with Verifiable Reward (2025) for the pathwise one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from leibler.errors import RecipeError
from leibler.estimate.sample import Law, Sample, Weight, attach, settle


@runtime_checkable
class Generator(Protocol):
    """What a sampled estimator needs of an f-divergence ``D = E_q[f(u)]``: f and f' as functions of ``log u``."""

    def f(self, log_u: Tensor) -> Tensor: ...

    def f_prime(self, log_u: Tensor) -> Tensor: ...


@lru_cache(maxsize=256)
def direction(divergence: Any) -> Literal["ReverseKL", "ForwardKL"] | None:
    """Which of the two KL divergences this is, if either, under whatever name.

    A divergence is its generator up to the tangent at 1: ``f'(u) - f'(1)`` is log u for ReverseKL and 1 - 1/u for
    ForwardKL, so ``Alpha(1.0)`` and ``Swapped(ForwardKL())`` are recognised too.
    """
    log_u = torch.tensor([-1.7, -0.3, 0.0, 0.4, 1.1], dtype=torch.float64)
    try:
        slope = divergence.f_prime(log_u)
    except (RecipeError, AttributeError):
        return None
    slope = slope - slope[2]
    if torch.allclose(slope, log_u, rtol=0, atol=1e-12):
        return "ReverseKL"
    return "ForwardKL" if torch.allclose(slope, -torch.expm1(-log_u), rtol=0, atol=1e-12) else None


@dataclass(frozen=True)
class Estimator:
    """Base of the sampled estimators; ``_loss`` and ``_value`` are the mathematics, the rest is shared."""

    level: ClassVar[Literal["sampled", "full"]] = "sampled"
    published: ClassVar[bool] = False
    """A form that is kept because systems in use have it; asking for it by name accepts its stated bias."""

    def loss(
        self,
        divergence: Generator,
        model_logp: Float[Tensor, "*n"],
        target_logp: Float[Tensor, "*n"],
        sampled_from: Law,
        behaviour_logp: Float[Tensor, "*n"] | None = None,
    ) -> Float[Tensor, "*n"]:
        """One loss per sampled token, differentiable in ``model_logp`` only.

        Whether its gradient is that of ``divergence`` is decided once, by ``leibler.estimate.check``; this is the
        inner loop and does not ask again.
        """
        sample = Sample.of(model_logp, target_logp, sampled_from, behaviour_logp)
        with torch.no_grad():
            value, coefficient = settle(*self._loss(divergence, sample), sample)
        return attach(value, coefficient, model_logp)

    def value(
        self,
        divergence: Generator,
        model_logp: Float[Tensor, "*n"],
        target_logp: Float[Tensor, "*n"],
        sampled_from: Law,
        behaviour_logp: Float[Tensor, "*n"] | None = None,
    ) -> Float[Tensor, "*n"]:
        """One detached number per sampled token, which averages to ``divergence`` (K2 excepted)."""
        sample = Sample.of(model_logp, target_logp, sampled_from, behaviour_logp)
        with torch.no_grad():
            value = self._value(divergence, sample)
            value, _ = settle(value, torch.zeros_like(value), sample)
        return value.to(model_logp.dtype)

    def _loss(self, divergence: Generator, sample: Sample) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _value(self, divergence: Generator, sample: Sample) -> Tensor:
        return self._loss(divergence, sample)[0]


@dataclass(frozen=True)
class Exact(Estimator):
    """The whole row instead of a sampled token: nothing is estimated, whatever law chose the row.

    ``loss`` and ``value`` take rows ``[*n, vocab]`` of log-probabilities (or logits) in place of sampled ones.
    """

    level: ClassVar[Literal["sampled", "full"]] = "full"

    def loss(self, divergence: Any, model_logp, target_logp, sampled_from="model", behaviour_logp=None):
        """The divergence of each row; ``sampled_from`` and ``behaviour_logp`` do not matter."""
        return divergence(model_logp, target_logp)

    def value(self, divergence: Any, model_logp, target_logp, sampled_from="model", behaviour_logp=None):
        """The divergence of each row, detached."""
        return divergence(model_logp.detach(), target_logp.detach())


@dataclass(frozen=True)
class _KL(Estimator):
    """K1, K2 and K3: a function k(l) of the log-ratio, with an importance weight where the sample is stale.

    Args:
        weight: ``"auto"``: the detached ratio p/s on a stale sample, none on a fresh one. ``"differentiable"``: the
            ratio p/s with its gradient, on fresh samples too (where it is 1 and only its gradient counts). ``None``:
            no weight, the biased form that most released code uses on stale batches. A weight per token corrects the
            law of the token at hand, not that of the contexts before it (see ``leibler.estimate.credit``).
        clamp: bound on |k|; beyond it the gradient is exactly 0 (a bias that grows with the clipped mass).
    """

    weight: Weight = "auto"
    clamp: float | None = None

    def _k(self, log_u: Tensor, law: Law) -> tuple[Tensor, Tensor]:
        """k(l) and its derivative, in the form proper to samples of the target or of the model."""
        raise NotImplementedError

    def _loss(self, divergence: Generator, sample: Sample) -> tuple[Tensor, Tensor]:
        k, slope = self._k(sample.log_u, sample.law)
        if self.clamp is not None:
            slope = torch.where(k.abs() > self.clamp, torch.zeros_like(slope), slope)
            k = k.clamp(-self.clamp, self.clamp)
        if sample.law == "target":
            if self.weight == "differentiable":
                raise RecipeError(
                    f"{self!r} weights model samples, and these come from the target, whose law does not move; "
                    "leave the weight out."
                )
            return k, slope
        if self.weight is None:
            return k, slope
        w = sample.log_model_weight.exp()
        return (w * k, w * (slope + k)) if self.weight == "differentiable" else (w * k, w * slope)

    def _value(self, divergence: Generator, sample: Sample) -> Tensor:
        # The plain and the tangent-corrected form of E_p[log u] or E_q[-log u], moved to the law of the sample.
        side = direction(divergence)
        if side is None:
            raise RecipeError(
                f"{type(self).__name__} estimates ReverseKL or ForwardKL, not {divergence!r}; "
                "use Pathwise(), ScoreFunction() or Exact()."
            )
        natural: Law = "model" if side == "ReverseKL" else "target"
        # The law only selects the formula here: K1 and K3 written for the divergence's own law.
        k, _ = self._k(sample.log_u, natural)
        if self.clamp is not None:
            k = k.clamp(-self.clamp, self.clamp)
        if self.weight is None:
            return k
        return k * (sample.log_model_weight if natural == "model" else sample.log_target_weight).exp()


@dataclass(frozen=True)
class K1(_KL):
    """The log-ratio itself: ``l`` on samples of the model, ``-l`` on samples of the target.

    On model samples its value averages to ReverseKL and its gradient to **nothing at all** (a mean score); use
    ``weight="differentiable"``, whose gradient is exact. On target samples both are ForwardKL's: it is the
    negative log-likelihood up to a constant.
    """

    def _k(self, log_u: Tensor, law: Law) -> tuple[Tensor, Tensor]:
        sign = -1.0 if law == "target" else 1.0
        return sign * log_u, torch.full_like(log_u, sign)


@dataclass(frozen=True)
class K2(_KL):
    """``l**2 / 2``: on model samples its gradient is exactly that of ReverseKL, while its value is another number
    (equal to second order near the target). A ``weight="differentiable"`` spoils the gradient as well."""

    def _k(self, log_u: Tensor, law: Law) -> tuple[Tensor, Tensor]:
        return 0.5 * log_u.square(), log_u


@dataclass(frozen=True)
class K3(_KL):
    """``1/u - 1 + l`` on model samples, ``u - 1 - l`` on target samples: never negative, low variance near q.

    On model samples its value averages to ReverseKL but its gradient is **ForwardKL's**;
    ``weight="differentiable"`` makes both ReverseKL's. On target samples both are ForwardKL's.
    """

    def _k(self, log_u: Tensor, law: Law) -> tuple[Tensor, Tensor]:
        if law == "target":
            slope = torch.expm1(log_u)
            return slope - log_u, slope
        slope = -torch.expm1(-log_u)
        return log_u - slope, slope


@dataclass(frozen=True)
class Pathwise(Estimator):
    """``f(u)`` on samples of the target (or of anything else, times q/s): value and gradient exact for every f.

    The law q/s-weighted does not depend on the model, so differentiating f(u) is all there is. ``centred`` subtracts
    ``f'(1) (u - 1)``, whose mean and mean gradient are 0: a control variate that makes each value at least 0 and
    turns ForwardKL's ``-log u`` into K3's ``u - 1 - log u``. On model samples the gradient equals
    ``ScoreFunction``'s token by token.

    Args:
        weight: ``"auto"``: detached q/s where the sample is not the target's; ``None``: none (biased there).
        clamp: bound on |log u| inside f (biased beyond it).
        centred: subtract the tangent at u = 1.
    """

    weight: Literal["auto"] | None = "auto"
    clamp: float | None = None
    centred: bool = True

    def _loss(self, divergence: Generator, sample: Sample) -> tuple[Tensor, Tensor]:
        log_u = sample.log_u if self.clamp is None else sample.log_u.clamp(-self.clamp, self.clamp)
        log_w = torch.zeros_like(log_u) if self.weight is None else sample.log_target_weight
        f, slope = _tangent(divergence, log_u, self.centred)
        return log_w.exp() * f, (log_w + log_u).exp() * slope


@dataclass(frozen=True)
class ScoreFunction(Estimator):
    """``(f'(u) - baseline) * grad log p`` on samples of the model: exact for every f, with no need to reweight.

    The loss also *carries* an unbiased value, ``(f(u) - f'(1)(u - 1)) / u``, so what is logged is the divergence.

    Args:
        baseline: subtracted from the coefficient; any constant leaves the mean gradient unchanged. ``None`` is
            f'(1), which removes the spurious constant (+1 for ReverseKL) and makes the coefficient 0 at the target.
        clamp: bound on |log u| inside f' (biased beyond it; 20 in published use).
        weight: ``"auto"``: detached p/s where the sample is not fresh; ``None``: none (biased there).
    """

    baseline: float | None = None
    clamp: float | None = None
    weight: Literal["auto"] | None = "auto"

    def _loss(self, divergence: Generator, sample: Sample) -> tuple[Tensor, Tensor]:
        log_u = sample.log_u if self.clamp is None else sample.log_u.clamp(-self.clamp, self.clamp)
        log_w = torch.zeros_like(log_u) if self.weight is None else sample.log_model_weight
        f, slope = _tangent(divergence, log_u, True)
        if self.baseline is not None:
            slope = divergence.f_prime(log_u) - self.baseline
        return (log_w - log_u).exp() * f, log_w.exp() * slope


def _tangent(divergence: Generator, log_u: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """f(u) and f'(u), less the tangent of f at u = 1 if ``centred``."""
    f, slope = divergence.f(log_u), divergence.f_prime(log_u)
    if not centred:
        return f, slope
    at_one = divergence.f_prime(torch.zeros((), dtype=log_u.dtype, device=log_u.device))
    return f - at_one * torch.expm1(log_u), slope - at_one
