"""The base of every divergence: blocks of rows, one custom autograd Function, infinite rows, masked rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leibler.divergence.pair import Pair
from leibler.divergence.rows import Row, block_rows
from leibler.errors import RecipeError

HUGE = 1e20
"""Finite values beyond this come from ``FLOOR`` and mean infinity."""


@dataclass(frozen=True, eq=False)
class Divergence:
    """How far the model's row ``p`` is from the target's row ``q``, in nats; final classes supply the formula.

    A divergence is callable on logits, and a ``Functional`` for the fused head (``value`` / ``add_gradient``).
    Beyond these *vocabulary sums* it may offer the *scalar generator* of an f-divergence, ``f(log_u)`` and
    ``f_prime(log_u)`` with ``u = p / q`` and ``D = E_q[f(u)]``, and the *inverse conjugate*. Asking for a
    capability that is missing raises ``RecipeError``.

    Subclasses implement ``_value`` and ``_add_gradient``; this class sees to infinite rows: their value is inf
    and their gradient 0. Two divergences are equal if they are of one class and all that they hold is equal.
    """

    # Not those of a dataclass, which a plain subclass would inherit without its own attributes.
    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), *sorted(vars(self).items())))

    @property
    def needs_target(self) -> bool:
        return True

    @property
    def ceiling(self) -> float:
        """Values from here on are infinite."""
        return HUGE

    # --- the functional -------------------------------------------------------------------------------------------
    def value(
        self, model: Row, target: Row | None, token: Int[Tensor, " rows"] | None = None
    ) -> tuple[Float[Tensor, " rows"], Any]:
        """Values of a block of rows, and what ``add_gradient`` wants to see again."""
        if target is None:
            raise RecipeError(f"{type(self).__name__} compares two rows: give it a target.")
        values, saved = self._at(model, target, token)
        infinite = values >= self.ceiling
        if bool(infinite.any()):
            return values.masked_fill(infinite, torch.inf), (infinite, saved)
        return values, (None, saved)

    def add_gradient(
        self,
        grad: Float[Tensor, "rows vocab"],
        coefficient: Float[Tensor, " rows"],
        model: Row,
        target: Row | None,
        token: Int[Tensor, " rows"] | None,
        saved: Any,
    ) -> None:
        """Add ``coefficient[:, None] * d value / d logits`` (natural logits) to ``grad``; infinite rows add 0."""
        assert target is not None
        infinite, inner = saved
        if infinite is not None:
            coefficient = coefficient.masked_fill(infinite, 0.0)
        self._add_gradient(grad, coefficient.unsqueeze(-1), model, target, inner)

    def _at(self, model: Row, target: Row, token: Int[Tensor, " rows"] | None) -> tuple[Float[Tensor, " rows"], Any]:
        """``_value``, for those to which the label matters."""
        return self._value(model, target)

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        raise NotImplementedError(f"{type(self).__name__} must implement _value")

    def _add_gradient(
        self,
        grad: Float[Tensor, "rows vocab"],
        coefficient: Float[Tensor, "rows 1"],
        model: Row,
        target: Row,
        saved: Any,
    ) -> None:
        raise NotImplementedError(f"{type(self).__name__} must implement _add_gradient")

    # --- optional capabilities ------------------------------------------------------------------------------------
    def f(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Generator at ``u = exp(log_u)``, with ``D = E_q[f(p / q)]``."""
        raise RecipeError(f"{type(self).__name__} is not an f-divergence and has no generator f: choose one that is.")

    def f_prime(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Derivative of the generator by ``u``, at ``u = exp(log_u)``."""
        raise RecipeError(f"{type(self).__name__} is not an f-divergence and has no generator f: choose one that is.")

    @property
    def inadmissible(self) -> str | None:
        """Why ``f_prime`` cannot serve as an implicit reward, or ``None`` where it can."""
        return f"{type(self).__name__} is not an f-divergence"

    def inverse_conjugate(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Inverse of the convex conjugate ``f*`` of the generator."""
        raise RecipeError(f"{type(self).__name__} has no inverse conjugate in closed form: choose one that has.")

    def swapped(self) -> Divergence:
        """The divergence with its arguments exchanged, as a function of the model: ``D(q, p)``."""
        raise RecipeError(
            f"{type(self).__name__} does not say what it is with its arguments exchanged: define swapped()."
        )

    # --- on logits ------------------------------------------------------------------------------------------------
    def __call__(
        self,
        model_logits: Float[Tensor, "*batch vocab"],
        target_logits: Float[Tensor, "*batch vocab"],
        temperature: float = 1.0,
        mask: Bool[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch"]:
        """The divergence of ``softmax(model_logits / temperature)`` and ``softmax(target_logits / temperature)``.

        Args:
            model_logits: ``[..., vocab]``, any float dtype; -inf excludes an entry.
            target_logits: ``[..., vocab]``, broadcast against the model's; never differentiated.
            temperature: divides both logits.
            mask: ``[...]`` bool; rows where it is False give exactly 0 and receive exactly 0 gradient.

        Returns:
            ``[...]`` nats, float32 (float64 for float64 input), differentiable once in the model's logits. A row
            that is infinite has gradient 0; one that holds NaN or +inf logits gives NaN.

        Raises:
            RecipeError: the vocabularies, the temperature or the mask do not fit.
        """
        for side, logits in (("model", model_logits), ("target", target_logits)):
            if not logits.is_floating_point() or logits.dim() == 0:
                raise RecipeError(
                    f"The {side}'s logits are {logits.dtype} of shape {list(logits.shape)}: "
                    "give floating-point numbers over a vocabulary in the last dimension."
                )
        if model_logits.shape[-1] != target_logits.shape[-1]:
            raise RecipeError(
                f"Model and target have {model_logits.shape[-1]} and {target_logits.shape[-1]} vocabulary entries: "
                "slice both logits to the entries that they share."
            )
        if not temperature > 0:
            raise RecipeError(f"The temperature is {temperature}: it must be positive.")
        try:
            model_logits, target_logits = torch.broadcast_tensors(model_logits, target_logits)
        except RuntimeError as error:
            raise RecipeError(
                f"Rows of shape {list(model_logits.shape[:-1])} and {list(target_logits.shape[:-1])} do not pair up: "
                "give model and target the same leading shape."
            ) from error
        shape = model_logits.shape[:-1]
        if mask is not None and (mask.dtype != torch.bool or mask.shape != shape):
            raise RecipeError(
                f"The mask is {mask.dtype} of shape {list(mask.shape)}: give bool of shape {list(shape)}, one per row."
            )
        count, vocab = shape.numel(), model_logits.shape[-1]
        model, target = model_logits.reshape(count, vocab), target_logits.detach().reshape(count, vocab)
        if mask is None:
            return _Rows.apply(self, model, target, 1.0 / temperature).reshape(shape)
        # Masked rows are removed, not multiplied by 0, so that garbage in them (NaN too) cannot leak.
        index = mask.reshape(-1).nonzero().squeeze(-1)
        values = _Rows.apply(self, model[index], target[index], 1.0 / temperature)
        return values.new_zeros(count).index_copy(0, index, values).reshape(shape)


class _Rows(torch.autograd.Function):
    """Values of all rows; each row depends on its own logits only, so the gradient is formed in forward."""

    @staticmethod
    def forward(ctx: Any, divergence: Divergence, model: Tensor, target: Tensor, scale: float) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(model.dtype, target.dtype), torch.float32)
        count, vocab = model.shape
        values = model.new_empty(count, dtype=dtype)
        gradient = model.new_empty((count, vocab)) if ctx.needs_input_grad[1] else None
        step = block_rows(vocab, model.device.type)
        for start in range(0, count, step):
            block = slice(start, start + step)
            both = Pair.of_logits(model[block].to(dtype), target[block].to(dtype), scale)
            values[block], saved = divergence.value(both.model, both.target, None)
            if gradient is not None:
                piece = torch.zeros_like(both.difference)
                coefficient = torch.full_like(values[block], scale)
                divergence.add_gradient(piece, coefficient, both.model, both.target, None, saved)
                gradient[block] = piece
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * upstream.unsqueeze(-1)).to(gradient.dtype), None, None
