"""Which divergence of sequences a per-token coefficient descends.

For an autoregressive model the divergence between whole responses is a sum over *visited* contexts, and the model
also decides which contexts it visits. Three credits, for tokens drawn from the model:

- ``"token"``: each token answers for its own context only. It descends ``sum_t D_f(p(.|c_t) || q(.|c_t))`` with the
  contexts held: what distillation means, and not the gradient of any divergence of sequences (*myopic*).
- ``"to_go"``: each token also answers for the divergence of the contexts it leads to. It descends
  ``sum_t E_{c_t ~ p}[D_f(p(.|c_t) || q(.|c_t))]``, which for ReverseKL is the divergence of sequences (chain rule).
- ``"sequence"``: one ratio per response, ``U = prod_t u_t``. It descends ``D_f(P || Q)`` of whole responses for any f.

All functions take ``[..., time]`` with a mask, or flat ``[n]`` with the sequence number of each token (tokens of one
sequence in order, sequences in any interleaving).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leibler.errors import RecipeError
from leibler.estimate.estimators import direction
from leibler.estimate.sample import Sample, attach, settle, wide

Credit = Literal["token", "to_go", "sequence"]

CREDITS: tuple[str, ...] = get_args(Credit)


def _pack(
    x: Float[Tensor, "*n"], mask: Tensor | None, sequence: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Values as ``[..., time]`` with 0 where nothing is, and where each flat token went."""
    if sequence is None:
        return (x if mask is None else torch.where(mask, x, torch.zeros_like(x))), None
    if mask is not None:
        x = torch.where(mask, x, torch.zeros_like(x))
    _, row, counts = torch.unique(sequence, return_inverse=True, return_counts=True)
    order = torch.argsort(row, stable=True)
    starts = counts.cumsum(0) - counts
    column = torch.empty_like(row)
    column[order] = torch.arange(len(row), device=row.device) - starts[row[order]]
    padded = x.new_zeros((len(counts), int(counts.max()) if len(row) else 0))
    padded[row, column] = x
    return padded, (row, column)


def _unpack(x: Tensor, at: tuple[Tensor, Tensor] | None) -> Tensor:
    return x if at is None else x[at]


def to_go(
    values: Float[Tensor, "*n"],
    mask: Bool[Tensor, "*n"] | None = None,
    sequence: Int[Tensor, " n"] | None = None,
    *,
    inclusive: bool = True,
) -> Float[Tensor, "*n"]:
    """Sum of the values from each token to the end of its sequence (after it, if not ``inclusive``).

    >>> import torch
    >>> to_go(torch.tensor([[1.0, 2.0, 4.0]]))
    tensor([[7., 6., 4.]])
    >>> to_go(torch.tensor([1.0, 10.0, 2.0, 4.0]), sequence=torch.tensor([0, 1, 0, 0]), inclusive=False)
    tensor([6., 0., 4., 0.])
    """
    x, at = _pack(values, mask, sequence)
    total = x.flip(-1).cumsum(-1).flip(-1)
    if not inclusive:
        total = torch.cat([total[..., 1:], torch.zeros_like(total[..., :1])], dim=-1)
    return _unpack(total, at)


def so_far(
    values: Float[Tensor, "*n"], mask: Bool[Tensor, "*n"] | None = None, sequence: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "*n"]:
    """Sum of the values up to and including each token of its sequence."""
    x, at = _pack(values, mask, sequence)
    return _unpack(x.cumsum(-1), at)


def sequence_sum(
    values: Float[Tensor, "*n"], mask: Bool[Tensor, "*n"] | None = None, sequence: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "*n"]:
    """The sum over the whole sequence, at each of its tokens."""
    x, at = _pack(values, mask, sequence)
    return _unpack(x.sum(-1, keepdim=True).expand_as(x), at)


def coefficients(
    divergence: Any,
    log_ratio: Float[Tensor, "*n"],
    credit: Credit,
    mask: Bool[Tensor, "*n"] | None = None,
    sequence: Int[Tensor, " n"] | None = None,
    *,
    log_weight: Float[Tensor, "*n"] | None = None,
    values: Float[Tensor, "*n"] | None = None,
    clamp: float | None = None,
) -> Float[Tensor, "*n"]:
    """What multiplies ``grad log p`` of each token, for tokens drawn from the model; detached.

    With ``l = log p/q``: ``token`` f'(u_t) - f'(1); ``to_go`` that plus the values of the later tokens; ``sequence``
    f'(exp(sum_t l_t)) - f'(1) at every token. For ReverseKL the last two are sums of log-ratios.

    Args:
        divergence: any f-divergence (its scalar generator is used).
        log_ratio: ``log p/q`` of the sampled tokens.
        log_weight: ``log p/behaviour`` of stale samples: each summand then carries the product of the ratios up to the
            last token it depends on, which is exact; leaving it out is the biased form.
        values: per-context divergences to use for the later tokens in ``to_go`` (exact ones have less variance than
            the sampled ones that are used otherwise).
        clamp: bound on |log ratio| inside f' (biased beyond it).

    Raises:
        RecipeError: an unknown credit.
    """
    if credit not in CREDITS:
        raise RecipeError(f"credit must be one of {', '.join(CREDITS)}, not {credit!r}.")
    log_u = wide(log_ratio)
    w = None if log_weight is None else wide(log_weight)
    if mask is not None:
        log_u = torch.where(mask, log_u, torch.zeros_like(log_u))
    if credit == "sequence":
        log_u = sequence_sum(log_u, mask, sequence)
    if clamp is not None:
        log_u = log_u.clamp(-clamp, clamp)
    slope, value = _slope(divergence, log_u)
    if credit == "token":
        return slope if w is None else slope * w.exp()
    if credit == "sequence":
        return slope if w is None else slope * sequence_sum(w, mask, sequence).exp()
    # The plain log-ratio for ReverseKL: the return-to-go that policy-gradient code sums, and right even for a
    # target known only up to a constant.
    sampled = log_u if direction(divergence) == "ReverseKL" else value
    later = sampled if values is None else wide(values)
    if w is not None:
        # A sampled value depends on its own token as well, an exact one only on the tokens before it.
        up_to = so_far(w, mask, sequence)
        slope = slope * up_to.exp()
        later = later * (up_to if values is None else up_to - torch.where(_on(mask, w), w, torch.zeros_like(w))).exp()
    return slope + to_go(later, mask, sequence, inclusive=False)


def _on(mask: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like, dtype=torch.bool) if mask is None else mask


def _slope(divergence: Any, log_u: Tensor) -> tuple[Tensor, Tensor]:
    """f'(u) - f'(1), and the tangent-corrected value f(u)/u of a token drawn from the model."""
    at_one = divergence.f_prime(torch.zeros((), dtype=log_u.dtype, device=log_u.device))
    value = (divergence.f(log_u) - at_one * torch.expm1(log_u)) * (-log_u).exp()
    return divergence.f_prime(log_u) - at_one, value


def loss(
    divergence: Any,
    model_logp: Float[Tensor, "*n"],
    target_logp: Float[Tensor, "*n"],
    credit: Credit = "to_go",
    mask: Bool[Tensor, "*n"] | None = None,
    sequence: Int[Tensor, " n"] | None = None,
    *,
    behaviour_logp: Float[Tensor, "*n"] | None = None,
    values: Float[Tensor, "*n"] | None = None,
    baseline: Float[Tensor, "*n"] | float = 0.0,
    clamp: float | None = None,
) -> Float[Tensor, "*n"]:
    """One loss per token whose sum over a response has the credit's gradient, for tokens drawn from the model.

    Args:
        model_logp, target_logp: of the sampled tokens; the gradient flows through ``model_logp``.
        behaviour_logp: the sampler's log-probabilities when the sample is stale; weights it exactly.
        baseline: detached, taken off every coefficient; unbiased as long as it does not depend on the response it is
            used for (leave-one-out means over a group).
        values, clamp: see ``coefficients``.

    Returns:
        ``[*n]``, 0 where masked. The numbers are the per-token values of the divergence, for the log.

    >>> import torch
    >>> from leibler.divergence import ReverseKL
    >>> p = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    >>> loss(ReverseKL(), p, torch.tensor([[-2.0, -2.5]]), "to_go").sum().backward()
    >>> [round(x, 4) for x in p.grad[0].tolist()]          # the log-ratios from each token on
    [1.5, 0.5]
    """
    if mask is not None:
        model_logp = torch.where(mask, model_logp, torch.zeros_like(model_logp))
        target_logp = torch.where(mask, target_logp, torch.zeros_like(target_logp))
        if behaviour_logp is not None:
            behaviour_logp = torch.where(mask, behaviour_logp, torch.zeros_like(behaviour_logp))
    law = "model" if behaviour_logp is None else "behaviour"
    sample = Sample.of(model_logp, target_logp, law, behaviour_logp)
    with torch.no_grad():
        log_weight = None if behaviour_logp is None else sample.log_model_weight
        c = coefficients(
            divergence, sample.log_u, credit, mask, sequence, log_weight=log_weight, values=values, clamp=clamp
        )
        b = wide(baseline) if isinstance(baseline, Tensor) else baseline
        # The baseline is weighted by the tokens up to its own, so that its mean stays 0 on stale samples.
        c = c - b * (1.0 if log_weight is None else so_far(log_weight, mask, sequence).exp())
        _, value = _slope(divergence, sample.log_u)
        if log_weight is not None:
            value = value * so_far(log_weight, mask, sequence).exp()
        value, c = settle(value, c, sample)
        if mask is not None:
            value, c = torch.where(mask, value, 0.0), torch.where(mask, c, 0.0)
    return attach(value, c, model_logp)
