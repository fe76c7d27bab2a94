"""``value`` and ``loss``: a divergence from the log-probabilities of sampled tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from leibler.errors import RecipeError
from leibler.estimate.estimators import K1, K2, K3, Estimator, Exact, Pathwise, ScoreFunction
from leibler.estimate.published import AbsLogRatio, AsReward, LogSquared, LowVarKL
from leibler.estimate.sample import Law
from leibler.estimate.table import check

_NAMED: dict[str, Callable[..., Estimator]] = {
    "exact": Exact,
    "k1": K1,
    "k2": K2,
    "k3": K3,
    "pathwise": Pathwise,
    "score_function": ScoreFunction,
    "low_var_kl": LowVarKL,
    "abs": AbsLogRatio,
    "log_squared": LogSquared,
    "as_reward": AsReward,
}


def names() -> list[str]:
    """The names ``get`` knows."""
    return list(_NAMED)


def get(name: str, **params: Any) -> Estimator:
    """An estimator by name.

    >>> get("k3", weight="differentiable")
    K3(weight='differentiable', clamp=None)
    """
    if name not in _NAMED:
        raise RecipeError(f"there is no estimator {name!r}; the names are {', '.join(_NAMED)}.")
    return _NAMED[name](**params)


def automatic(divergence: object, sampled_from: str = "model") -> Estimator:
    """The estimator chosen when none is given: exact in value and gradient, and of low variance near the target.

    It is ``Pathwise()`` on samples of the target (no weight needed) and ``ScoreFunction()`` elsewhere; both carry the
    tangent-corrected value, which is never negative.
    """
    return Pathwise() if sampled_from == "target" else ScoreFunction()


def value(
    model_logp: Float[Tensor, "*n"],
    target_logp: Float[Tensor, "*n"],
    divergence: Any = None,
    estimator: Estimator | str | None = None,
    sampled_from: Law = "model",
    behaviour_logp: Float[Tensor, "*n"] | None = None,
    *,
    mask: Bool[Tensor, "*n"] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """An unbiased estimate of a divergence, in nats, from the log-probabilities of sampled tokens; detached.

    With u = p/q (model over target): K1 is ``log u``, K3 ``1/u - 1 + log u`` (both average to ReverseKL on samples of
    the model); for ForwardKL, or on samples of another law, the same two forms of it carry their importance weight.
    K2, ``(log u)**2 / 2``, is biased: it equals ReverseKL to second order only.

    Args:
        model_logp, target_logp: log-probability of each sampled token, any shape.
        divergence: ReverseKL by default; any f-divergence.
        estimator: a name (``"k1"``, ``"k2"``, ``"k3"``, ...), an estimator, or None for the low-variance exact one.
        sampled_from: the law the tokens were drawn from: ``"model"``, ``"target"`` or ``"behaviour"``.
        behaviour_logp: the sampler's own log-probabilities, for ``"behaviour"``.
        mask: True where a token counts; the others may hold anything.
        reduction: ``"mean"`` over the tokens that count, or ``"none"``.

    Returns:
        A scalar, or one number per token (0 where masked).

    Raises:
        RecipeError: an unknown name or law, or a divergence the estimator cannot estimate.

    Reference: Approximating KL Divergence (Schulman, 2020).

    >>> import torch
    >>> from leibler.divergence import ReverseKL
    >>> p, q = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()
    >>> round(float((p.exp() * value(p, q, ReverseKL(), "k1", reduction="none")).sum()), 4)
    0.3681
    """
    divergence, chosen = _resolve(divergence, estimator, sampled_from)
    p, q, s = _clean(model_logp.detach(), target_logp, behaviour_logp, mask, chosen)
    return _reduce(chosen.value(divergence, p, q, sampled_from, s), mask, reduction)


def loss(
    model_logp: Float[Tensor, "*n"],
    target_logp: Float[Tensor, "*n"],
    divergence: Any = None,
    estimator: Estimator | str | None = None,
    sampled_from: Law = "model",
    behaviour_logp: Float[Tensor, "*n"] | None = None,
    *,
    mask: Bool[Tensor, "*n"] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Tensor:
    """A tensor whose gradient is an unbiased estimate of the divergence's gradient.

    The gradient flows through ``model_logp`` only, not through the sampling. Without an ``estimator`` the exact one
    for the law is chosen, and the numbers of the loss average to the divergence too. An estimator whose gradient is
    another divergence's is refused, with the exact alternatives; a published biased form is asked for by its name.

    Args:
        as for ``value``.

    Returns:
        A scalar, or one loss per token (0, with gradient 0, where masked).

    Raises:
        RecipeError: see ``leibler.estimate.check``.

    >>> import torch
    >>> from leibler.divergence import ReverseKL
    >>> logits, q = torch.tensor([2.0, 0.0], requires_grad=True), torch.tensor([0.5, 0.5]).log()
    >>> p = logits.log_softmax(0)
    >>> per_token = loss(p, q, ReverseKL(), reduction="none")
    >>> (p.exp().detach() * per_token).sum().backward()      # the mean over the model's own samples
    >>> [round(g, 4) for g in logits.grad.tolist()]          # = p (log p/q - KL)
    [0.21, -0.21]
    """
    divergence, chosen = _resolve(divergence, estimator, sampled_from)
    check(divergence, chosen, sampled_from)
    p, q, s = _clean(model_logp, target_logp, behaviour_logp, mask, chosen)
    return _reduce(chosen.loss(divergence, p, q, sampled_from, s), mask, reduction)


def _resolve(divergence: Any, estimator: Estimator | str | None, sampled_from: str) -> tuple[Any, Estimator]:
    if divergence is None:
        from leibler.divergence import ReverseKL

        divergence = ReverseKL()
    if isinstance(estimator, str):
        estimator = get(estimator)
    return divergence, estimator if estimator is not None else automatic(divergence, sampled_from)


def _clean(
    p: Tensor, q: Tensor, s: Tensor | None, mask: Tensor | None, chosen: Estimator
) -> tuple[Tensor, Tensor, Tensor | None]:
    if p.shape != q.shape:
        raise RecipeError(f"model_logp {list(p.shape)} and target_logp {list(q.shape)} must have the same shape.")
    if mask is None:
        return p, q, s
    over = mask.unsqueeze(-1) if chosen.level == "full" else mask

    def keep(x: Tensor) -> Tensor:
        return torch.where(over, x, torch.zeros_like(x))

    return keep(p), keep(q), None if s is None else keep(s)


def _reduce(per_token: Tensor, mask: Tensor | None, reduction: str) -> Tensor:
    if mask is not None:
        per_token = torch.where(mask, per_token, torch.zeros_like(per_token))
    if reduction == "none":
        return per_token
    if reduction != "mean":
        raise RecipeError(f"reduction must be 'mean' or 'none', not {reduction!r}.")
    count = per_token.numel() if mask is None else int(mask.sum())
    return per_token.sum() / max(count, 1)
