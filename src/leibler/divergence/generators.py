"""Scalar generators in log space: exponentials that cannot overflow, and their consequences."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def exponent_limit(dtype: torch.dtype) -> float:
    """Where ``bounded_exp`` leaves the exponential: beyond any useful ratio, yet tangents stay finite."""
    return {torch.float64: 300.0, torch.float16: 4.0}.get(dtype, 60.0)


def bounded_exp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``exp(x)``, continued by its tangent beyond ``exponent_limit``: finite, increasing, gradient finite and > 0.

    A ratio of sequence probabilities overflows easily (log-ratios of hundreds of nats are common), and inf in a
    loss is NaN in its gradient. The tangent keeps order and direction.
    """
    limit = exponent_limit(x.dtype)
    excess = torch.relu(x - limit)
    return torch.exp(x.clamp(max=limit)) + _exp_of(limit, x) * excess


def bounded_expm1(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """``expm1(x)``, continued by its tangent as ``bounded_exp`` is."""
    limit = exponent_limit(x.dtype)
    excess = torch.relu(x - limit)
    return torch.expm1(x.clamp(max=limit)) + _exp_of(limit, x) * excess


def _exp_of(limit: float, x: Tensor) -> Tensor:
    return torch.exp(x.new_tensor(limit))


def log_mix(log_u: Float[Tensor, "*shape"], constant: float, slope: float) -> Float[Tensor, "*shape"]:
    """``log(constant + slope * u)`` for constant + slope = 1, both in (0, 1): exact at u = 1, safe at both ends."""
    # log1p(slope * expm1(x)) is exact near x = 0; beyond that expm1 may overflow and the sum is one-sided.
    x = log_u.clamp(min=-1.0, max=1.0)
    near = torch.log1p(slope * torch.expm1(x))
    offset = torch.log(log_u.new_tensor(constant))
    far = torch.logaddexp(offset.expand_as(log_u), log_u + torch.log(log_u.new_tensor(slope)))
    return torch.where(log_u.abs() <= 1.0, near, far)
