"""The divergence between two linear heads, without ever storing their logits."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from leibler.divergence.rows import Functional
from leibler.errors import DataError, RecipeError
from leibler.fused.functions import functionals, one_pass, one_pass_per_token
from leibler.fused.operands import Linear, TargetRows, Want


def linear_divergence(
    model_hidden: Float[Tensor, "n hidden"],
    model_weight: Float[Tensor, "vocab hidden"],
    target_hidden: Float[Tensor, "n target_hidden"],
    target_weight: Float[Tensor, "target_vocab target_hidden"],
    divergence: Functional,
    *,
    model_bias: Float[Tensor, " vocab"] | None = None,
    target_bias: Float[Tensor, " target_vocab"] | None = None,
    temperature: float = 1.0,
    weight: Float[Tensor, " n"] | Bool[Tensor, " n"] | None = None,
    reduction: Literal["mean", "sum", "none"] = "mean",
    vocab: int | None = None,
) -> Float[Tensor, ""] | Float[Tensor, " n"]:
    """A divergence between the next-token laws of two heads, token by token.

    With ``d_i = D(softmax((W h_i + b) / T), softmax((W' h'_i + b') / T))`` in nats and token weights ``w_i``:
    mean is ``sum_i w_i d_i / sum_i w_i``, sum is ``sum_i w_i d_i``, none is the vector ``w_i d_i``. The extra memory is
    the head's gradient and a fixed number of chunks, whatever the number of tokens.

    Args:
        model_hidden, model_weight, model_bias: the side that is differentiated (each where it requires a gradient).
        target_hidden, target_weight, target_bias: the side that is not; its hidden size may differ.
        divergence: a divergence of :mod:`leibler.divergence`, or anything with the same two methods.
        temperature: divides the logits of both sides.
        weight: ``[n]`` numbers or booleans. A token of weight 0 is taken out before any work: it contributes exactly 0
            and gets a gradient of exactly 0, whatever its hidden states hold. With no weight left, the mean is 0.
        reduction: ``"mean"``, ``"sum"`` (both form the gradient in the forward pass, so that one backward pass is
            possible) or ``"none"``.
        vocab: the number of real vocabulary entries. Heads padded to different sizes are compared on the entries that
            both have; the padding gets a gradient of exactly 0.

    Returns:
        A scalar, or ``[n]`` for ``"none"``: float32, or float64 for float64 operands. Infinite where the mathematics
        says so; the gradient of such a token is 0.

    Raises:
        LeiblerError: operands that do not fit each other.

    Examples:
        >>> import torch
        >>> from leibler.divergence import ForwardKL
        >>> hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True)
        >>> loss = linear_divergence(hidden, weight, torch.randn(6, 8), torch.randn(10, 8), ForwardKL())
        >>> loss.backward()
        >>> weight.grad.shape
        torch.Size([10, 4])
    """
    if reduction not in ("mean", "sum", "none"):
        raise RecipeError(f'reduction must be "mean", "sum" or "none", not {reduction!r}.')
    if not divergence.needs_target:
        raise RecipeError(f"{type(divergence).__name__} has no target: use leibler.fused.functionals for it.")
    if vocab is None:
        vocab = min(model_weight.shape[0], target_weight.shape[0])
    model = Linear(model_hidden, model_weight, model_bias, temperature)
    leaf = Linear(target_hidden.detach(), target_weight.detach(), _detach(target_bias), temperature)
    n = model.tokens
    kept: Tensor | None = None
    if weight is not None:
        if weight.shape != (n,):
            raise DataError(f"weight must hold one number per hidden state, [{n}], not {list(weight.shape)}.")
        if weight.requires_grad:
            raise RecipeError("weight is a constant of the loss: detach it, or multiply the result of reduction none.")
        if leaf.tokens == n and not bool((weight != 0).all()):
            kept = weight.nonzero().squeeze(1)
            weight = weight[kept]
            model = Linear(model_hidden[kept], model_weight, model_bias, temperature)
            leaf = Linear(leaf.hidden[kept], leaf.weight, leaf.bias, temperature)
    targets, want = (TargetRows((leaf,)),), Want(divergence, 0)

    if reduction == "none":
        head_trains = model_weight.requires_grad or (model_bias is not None and model_bias.requires_grad)
        if head_trains:
            (out,) = functionals(model, [want], targets, vocab=vocab)
        else:
            out = one_pass_per_token(model, want, targets, vocab=vocab)
        if weight is not None:
            out = out * weight.to(out.dtype)
        return out if kept is None else out.new_zeros(n).index_copy(0, kept, out)

    scale = weight if weight is not None else torch.ones((), device=model_hidden.device).expand(model.tokens)
    scale = scale.to(torch.float64)
    if reduction == "mean":
        scale = scale / scale.sum()
    total, _ = one_pass(model, [want], targets, lambda values, index: values[0] * scale[index].to(values), vocab=vocab)
    return total


def _detach(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()
