"""Differentiable functionals of a linear head whose logits are never stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from leibler.errors import RecipeError, RunError
from leibler.fused.coarse import OtherVocabulary
from leibler.fused.operands import Linear, TargetRows, Want, check
from leibler.fused.sweep import Plan, Sweep

Loss = Callable[[Float[Tensor, "wants n"], Int[Tensor, " n"]], Float[Tensor, " n"]]


def support_violations(values: Float[Tensor, "... n"]) -> Int[Tensor, "..."]:
    """How many tokens of each functional are not finite, and therefore got a gradient of 0.

    A divergence is infinite where the model puts probability outside the target's support (ReverseKL) or the other way
    round (ForwardKL); NaN comes from hidden states that are already broken. Both belong before a guard.

    Examples:
        >>> import torch
        >>> support_violations(torch.tensor([[0.5, float("inf"), 0.1], [1.0, 2.0, 3.0]]))
        tensor([1, 0])
    """
    return (~torch.isfinite(values)).sum(dim=-1)


def functionals(
    model: Linear,
    wants: Sequence[Want],
    targets: Sequence[TargetRows | OtherVocabulary] = (),
    *,
    token: Int[Tensor, " n"] | None = None,
    vocab: int | None = None,
) -> Float[Tensor, "wants n"]:
    """A few numbers for each token, differentiable in the model's hidden states, weight and bias.

    The backward pass forms each chunk's logits once more and multiplies by the cotangents that arrive, so it is exact
    for any function of the result, however it couples the tokens; that costs 1.3 (no target) to 1.8 times the single
    pass of :func:`one_pass`. Until then the numbers are kept and the logits of the last chunk, which is not formed
    again: tokens that fit one chunk cost little more than in one pass. Without gradients only values are computed.

    Args:
        model: the head that is differentiated (each gradient only where that tensor requires it).
        wants: the functionals.
        targets: the laws that divergences compare with; never differentiated.
        token: ``[n]`` sampled tokens, for functionals that read them.
        vocab: the number of real vocabulary entries, where heads are padded; the rest is left out on both sides and
            gets a gradient of exactly 0. Needed when the heads differ in size.

    Returns:
        ``[wants, n]`` in nats, float32 (float64 for float64 operands). A token whose value is not finite gets no
        gradient from that functional: see :func:`support_violations`.

    Raises:
        LeiblerError: operands that do not fit each other.

    Examples:
        >>> import torch
        >>> from leibler.divergence import ReverseKL
        >>> student = Linear(torch.randn(6, 4, requires_grad=True), torch.randn(10, 4))
        >>> teacher = TargetRows((Linear(torch.randn(6, 8), torch.randn(10, 8)),))
        >>> kl, = functionals(student, [Want(ReverseKL(), target=0)], [teacher])
        >>> kl.exp().mean().backward()
        >>> student.hidden.grad.shape
        torch.Size([6, 4])
    """
    plan = _plan(model, wants, targets, token, vocab)
    if not torch.is_grad_enabled() or not any(_needs(model)):
        return Sweep(plan).run()
    return _Functionals.apply(plan, *model.tensors)  # type: ignore[return-value]


def one_pass(
    model: Linear,
    wants: Sequence[Want],
    targets: Sequence[TargetRows | OtherVocabulary],
    loss: Loss,
    *,
    token: Int[Tensor, " n"] | None = None,
    vocab: int | None = None,
) -> tuple[Float[Tensor, ""], Float[Tensor, "wants n"]]:
    """The summed loss of tokens that do not couple, with its gradient formed while the logits are at hand.

    ``loss`` is called on a few tokens at a time, inside the pass; its derivative gives the coefficient of each
    functional, and the gradients by hidden states and head are complete when the call returns. The backward pass only
    scales them, so nothing is computed twice.

    Args:
        model, wants, targets, token, vocab: as in :func:`functionals`.
        loss: ``loss(values [wants, m], index [m]) -> [m]``: the loss of the tokens at ``index``, from their values
            alone (and detached numbers: advantages, old log-probs, weights, one over the number of tokens in the whole
            batch). It must be a sum over tokens and may not use other tensors that require a gradient.

    Returns:
        The sum of the losses, and the values ``[wants, n]``, detached.

    Raises:
        RecipeError: the loss reaches other tensors that require a gradient, or has the wrong shape.
        RunError: on a second backward pass, because the gradient has been given away.

    Examples:
        >>> import torch
        >>> from leibler.divergence import ReverseKL
        >>> student = Linear(torch.randn(6, 4, requires_grad=True), torch.randn(10, 4, requires_grad=True))
        >>> teacher = TargetRows((Linear(torch.randn(6, 8), torch.randn(10, 8)),))
        >>> total, values = one_pass(student, [Want(ReverseKL(), 0)], [teacher], lambda v, i: v[0] / 6)
        >>> total.backward()
        >>> torch.allclose(total.detach(), values.mean())
        True
    """
    plan = _plan(model, wants, targets, token, vocab)
    if not torch.is_grad_enabled() or not any(_needs(model)):
        values = Sweep(plan).run()
        losses = _shaped(loss(values, torch.arange(values.shape[1], device=values.device)), values)
        return losses.sum().detach(), values
    return _OnePass.apply(plan, loss, *model.tensors)  # type: ignore[return-value]


def one_pass_per_token(
    model: Linear,
    want: Want,
    targets: Sequence[TargetRows | OtherVocabulary],
    *,
    vocab: int | None = None,
) -> Float[Tensor, " n"]:
    """One functional of each token with its gradient by the hidden states formed in the forward pass.

    The cotangent of a token multiplies only that token's hidden gradient, so it may come later. The head's gradient
    sums over tokens and may not: the head must be frozen.
    """
    plan = _plan(model, [want], targets, None, vocab)
    if not torch.is_grad_enabled() or not any(_needs(model)):
        return Sweep(plan).run()[0]
    return _PerToken.apply(plan, *model.tensors)  # type: ignore[return-value]


def _plan(
    model: Linear,
    wants: Sequence[Want],
    targets: Sequence[TargetRows | OtherVocabulary],
    token: Tensor | None,
    vocab: int | None,
) -> Plan:
    entries = check(model, wants, targets, token, vocab)
    return Plan(model, tuple(wants), tuple(targets), None if token is None else token.long(), entries)


def _needs(model: Linear) -> list[bool]:
    return [t is not None and t.requires_grad for t in model.tensors]


class _Functionals(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> Tensor:
        ctx.unpack, kept = plan.pack()
        ctx.save_for_backward(*kept)
        sweep = Sweep(plan)
        values = sweep.run()
        ctx.left = sweep.leave()
        device = values.device.type
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        left, ctx.left = ctx.left, None  # for one backward pass: it overwrites them
        with torch.autocast(*ctx.autocast):  # which the backward pass runs outside of
            sweep = Sweep(ctx.unpack(ctx.saved_tensors), ctx.needs_input_grad[1:], left)
        sweep.run(lambda _values, start, stop: cotangent[:, start:stop], from_end=True)
        return None, *sweep.gradients()


class _OnePass(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, loss: Loss, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        sweep, losses = Sweep(plan, ctx.needs_input_grad[2:]), _Losses(loss)
        values = sweep.run(losses)
        # An attribute, not save_for_backward: the buffers are handed over to autograd, which may then keep them.
        ctx.gradients = sweep.gradients()
        ctx.mark_non_differentiable(values)
        ctx.set_materialize_grads(False)
        return losses.total(values), values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor | None, ...] | None = ctx.gradients
        if grads is None:
            raise RunError(
                "one_pass gives its gradient away in the first backward pass: sum the losses and call backward once, "
                "or use leibler.fused.functionals, which can be differentiated again."
            )
        ctx.gradients = None
        if cotangent is None:
            return (None,) * (2 + len(grads))
        if bool(cotangent != 1):
            for grad in grads:
                if grad is not None:
                    grad.mul_(cotangent)
        return None, None, *grads


class _PerToken(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor | None) -> Tensor:
        sweep = Sweep(plan, ctx.needs_input_grad[1:])
        values = sweep.run(lambda values, _start, _stop: torch.ones_like(values))
        ctx.save_for_backward(*sweep.gradients())
        return values[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        rows = cotangent[:, None]
        return None, *(None if grad is None else grad * rows.to(grad.dtype) for grad in ctx.saved_tensors)


class _Losses:
    """Calls the user's loss on a block of tokens and keeps what it returned; its derivative is the coefficients."""

    def __init__(self, loss: Loss) -> None:
        self.loss = loss
        self.parts: list[Tensor] = []

    def __call__(self, values: Tensor, start: int, stop: int) -> Tensor:
        index = torch.arange(start, stop, device=values.device)
        with torch.enable_grad():
            leaf = values.detach().clone().requires_grad_()
            losses = _shaped(self.loss(leaf, index), leaf)
            if not self.parts:
                _check_leaves(losses, leaf)
            self.parts.append(losses.detach())
            if not losses.requires_grad:
                return torch.zeros_like(values)
            (coefficients,) = torch.autograd.grad(losses.sum(), leaf, allow_unused=True)
        return torch.zeros_like(values) if coefficients is None else coefficients

    def total(self, values: Tensor) -> Tensor:
        return torch.cat(self.parts).sum() if self.parts else values.new_zeros(())


def _shaped(losses: Tensor, values: Tensor) -> Tensor:
    if losses.shape != values.shape[1:]:
        raise RecipeError(
            f"the loss must return one number per token, {list(values.shape[1:])}, not {list(losses.shape)}: sum over "
            "the wants, not over the tokens."
        )
    return losses


def _check_leaves(losses: Tensor, leaf: Tensor) -> None:
    """Refuse a loss with parameters of its own: their gradient would be lost without a word."""
    queue, seen = [losses.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if variable is not None and variable is not leaf:
            raise RecipeError(
                f"the loss of one_pass reaches a tensor {list(variable.shape)} that requires a gradient besides its "
                "values: detach it, or use leibler.fused.functionals, which differentiates everything."
            )
        queue.extend(parent for parent, _ in node.next_functions)
