"""What is known about sampled tokens, and how a number and a coefficient become a differentiable loss.

Every sampled estimator is two detached numbers per token: the *value* it carries and the *coefficient* that
multiplies the gradient of ``log p``. Both are worked out in float64, because a per-token scalar costs nothing beside
the vocabulary row it came from, and because ``exp(x) - 1 - x`` in float32 is noise for the small log-ratios of a
policy near its reference. Nothing is left to automatic differentiation through ``exp`` or ``where``, so an extreme
log-ratio cannot turn into NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from leibler.errors import RecipeError

Law = Literal["model", "target", "behaviour"]
Weight = Literal["auto", "differentiable"] | None

LAWS: tuple[str, ...] = get_args(Law)

LARGEST_LOG_RATIO = 230.0
"""Stands for an infinite log-ratio: ``exp`` of three times it is still a float64."""

LARGEST_COEFFICIENT = 2.0**57
"""Coefficients are cut here (keeping their sign), so that a squared gradient norm stays finite in float32."""

LARGEST_VALUE = 1e30
"""Finite values are cut here, so that only a true infinity is reported as one in float32."""

_ABSENT = -1e20
"""A log-probability below this is that of an impossible token (-inf, or the engine's finite floor)."""


def wide(x: Tensor) -> Tensor:
    """``x`` without its graph, in float64 where the device has it."""
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64)


@dataclass(frozen=True, eq=False)
class Sample:
    """Log-probabilities of sampled tokens under the model p, the target q and the law s they were drawn from.

    Attributes:
        log_u: ``log p/q``, within +-``LARGEST_LOG_RATIO``; 0 where the token is impossible under both.
        log_model_weight: ``log p/s``: turns a mean over the sample into a mean over the model.
        log_target_weight: ``log q/s``: turns it into a mean over the target.
        absent: the token is impossible under both p and q, or under s: it contributes exactly 0.
        infinite: the token is impossible under exactly one of p and q.
    """

    log_u: Float[Tensor, "*n"]
    log_model_weight: Float[Tensor, "*n"]
    log_target_weight: Float[Tensor, "*n"]
    absent: Tensor
    infinite: Tensor
    law: Law

    @staticmethod
    def of(
        model_logp: Float[Tensor, "*n"],
        target_logp: Float[Tensor, "*n"],
        sampled_from: str,
        behaviour_logp: Float[Tensor, "*n"] | None = None,
    ) -> Sample:
        """Read the three log-probabilities; raises RecipeError when the law's own is missing or the name unknown."""
        p, q = wide(model_logp), wide(target_logp)
        if sampled_from == "model":
            s = p
        elif sampled_from == "target":
            s = q
        elif sampled_from == "behaviour":
            if behaviour_logp is None:
                raise RecipeError("sampled_from='behaviour' needs behaviour_logp, the sampler's own log-probabilities.")
            s = wide(behaviour_logp)
        else:
            raise RecipeError(f"sampled_from must be one of {', '.join(LAWS)}, not {sampled_from!r}.")
        no_p, no_q, no_s = p < _ABSENT, q < _ABSENT, s < _ABSENT

        def ratio(a: Tensor, b: Tensor) -> Tensor:
            return torch.nan_to_num(a - b, nan=0.0).clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)

        return Sample(
            log_u=ratio(p, q),
            log_model_weight=ratio(p, s),
            log_target_weight=ratio(q, s),
            absent=(no_p & no_q) | no_s,
            infinite=no_p ^ no_q,
            law=sampled_from,
        )


def settle(value: Tensor, coefficient: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Impossible tokens give 0; a token impossible under one side only gives an infinite value and no gradient
    where the mathematics diverges, and its finite limit otherwise; everything else stays representable."""
    value = torch.nan_to_num(value, nan=float("inf")).clamp(-LARGEST_VALUE, LARGEST_VALUE)
    coefficient = torch.nan_to_num(coefficient, nan=0.0).clamp(-LARGEST_COEFFICIENT, LARGEST_COEFFICIENT)
    # A quantity that is unbounded grows at least like the log-ratio, which stands at LARGEST_LOG_RATIO here;
    # a bounded one (Jensen-Shannon, total variation) stays far below 100 and keeps its gradient.
    diverges = sample.infinite & (value.abs() > 100.0)
    value = torch.where(diverges, torch.copysign(torch.full_like(value, float("inf")), value), value)
    silent = diverges | sample.absent
    zero = torch.zeros_like(value)
    return torch.where(sample.absent, zero, value), torch.where(silent, zero, coefficient)


def attach(value: Tensor, coefficient: Tensor, model_logp: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """A tensor that equals ``value`` and whose derivative by ``model_logp`` is ``coefficient``."""
    safe = torch.where(model_logp.detach() < _ABSENT, torch.zeros_like(model_logp), model_logp)
    return value.to(model_logp.dtype) + coefficient.to(model_logp.dtype) * (safe - safe.detach())
