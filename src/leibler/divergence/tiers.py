"""Two ways to state a divergence without writing its kernel, and the exchange of arguments.

From least to most work, and from most to least time in the vocabulary chunk: ``RowFunction`` (any differentiable
function of the two rows), ``SumForm`` (sums over the vocabulary with their derivatives), a subclass of
``Divergence`` with ``_value`` and ``_add_gradient`` by hand. The result is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from leibler.divergence.base import Divergence
from leibler.divergence.rows import Row
from leibler.errors import RecipeError

Sums = tuple[Tensor, ...]


def add_logit_gradient(
    grad: Float[Tensor, "rows vocab"], coefficient: Float[Tensor, "rows 1"], model: Row, h: Float[Tensor, "rows vocab"]
) -> None:
    """Add ``coefficient * (h - p sum(h))``, the logit gradient that belongs to derivatives h by log p."""
    # Entries outside the model's support cannot move. Rows of coefficient 0 (infinite ones) may hold inf or NaN.
    if model.support is not None:
        h = h.masked_fill(~model.support, 0.0)
    silent = coefficient == 0.0
    if bool(silent.any()):
        h = h.masked_fill(silent, 0.0)
    grad.addcmul_(h, coefficient)
    grad.addcmul_(model.weights, -coefficient * h.sum(dim=-1, keepdim=True) / model.total)


@dataclass(frozen=True, eq=False)
class RowFunction(Divergence):
    """Any function of a block of model rows and target rows, differentiated by autograd within the block.

    Args:
        fn: maps natural log-probabilities ``logp, logq`` ``[rows, vocab]`` to ``[rows]`` nats with differentiable
            torch operations. An entry of probability 0 has a log-probability of about -7e29, not -inf, so ``p * log
            p`` is 0 there; a value beyond 1e20 becomes inf.

    >>> import torch
    >>> squared = RowFunction(lambda logp, logq: (logp.exp() - logq.exp()).square().sum(-1))
    >>> half, quarter = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    >>> round(squared(half, quarter).item(), 4)
    0.125
    """

    fn: Callable[[Float[Tensor, "rows vocab"], Float[Tensor, "rows vocab"]], Float[Tensor, " rows"]]

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        with torch.enable_grad():
            logp = model.logp.detach().requires_grad_()
            values = self.fn(logp, target.logp.detach())
        if values.shape != logp.shape[:1]:
            raise RecipeError(
                f"The function of this RowFunction returned shape {list(values.shape)} for {logp.shape[0]} rows: "
                "it must reduce the vocabulary and give one number per row."
            )
        return values.detach(), (logp, values)

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        logp, values = saved
        if not values.requires_grad:
            return
        (h,) = torch.autograd.grad(values, logp, torch.ones_like(values), retain_graph=True)
        add_logit_gradient(grad, coefficient, model, h)

    def swapped(self) -> Divergence:
        return RowFunction(lambda logp, logq: self.fn(logq, logp))


@dataclass(frozen=True, eq=False)
class SumForm(Divergence):
    """A divergence stated as sums over the vocabulary, ``S_j = sum_v s_j(log p_v, log q_v)``, and their combination.

    Subclasses supply ``summands`` and ``combine``; ``derivatives`` if autograd of the summands is too slow;
    ``prelude`` for detached numbers that the summands need first (a threshold, an argmax). ``combine`` returns the
    value **and** the coefficients to descend: they are its derivatives by the sums, except where a method holds a
    weight constant.
    """

    def prelude(self, logp: Float[Tensor, "rows vocab"], logq: Float[Tensor, "rows vocab"]) -> Any:
        """Whatever the summands need to know about the whole row first; never differentiated."""
        return None

    def summands(self, logp: Float[Tensor, "rows vocab"], logq: Float[Tensor, "rows vocab"], prelude: Any) -> Sums:
        """``s_j`` at every entry, each ``[rows, vocab]`` and elementwise in ``logp``."""
        raise NotImplementedError(f"{type(self).__name__} must implement summands")

    def derivatives(self, logp: Float[Tensor, "rows vocab"], logq: Float[Tensor, "rows vocab"], prelude: Any) -> Sums:
        """``d s_j / d log p`` at every entry; by autograd unless overridden."""
        with torch.enable_grad():
            leaf = logp.detach().requires_grad_()
            parts = self.summands(leaf, logq, prelude)
        return tuple(
            torch.autograd.grad(s, leaf, torch.ones_like(s), retain_graph=True)[0]
            if s.requires_grad
            else torch.zeros_like(logp)
            for s in parts
        )

    def combine(self, sums: Sums) -> tuple[Float[Tensor, " rows"], Sums]:
        """The value, and one coefficient ``[rows]`` per sum."""
        raise NotImplementedError(f"{type(self).__name__} must implement combine")

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        prelude = self.prelude(model.logp, target.logp)
        sums = tuple(s.sum(dim=-1) for s in self.summands(model.logp, target.logp, prelude))
        values, coefficients = self.combine(sums)
        return values, (prelude, coefficients)

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        prelude, coefficients = saved
        h = torch.zeros_like(grad)
        for c, derivative in zip(coefficients, self.derivatives(model.logp, target.logp, prelude), strict=True):
            h.addcmul_(derivative, c.unsqueeze(-1))
        add_logit_gradient(grad, coefficient, model, h)

    def swapped(self) -> Divergence:
        return RowFunction(self._exchanged)

    def _exchanged(
        self, logp: Float[Tensor, "rows vocab"], logq: Float[Tensor, "rows vocab"]
    ) -> Float[Tensor, " rows"]:
        prelude = self.prelude(logq.detach(), logp.detach())
        sums = tuple(s.sum(dim=-1) for s in self.summands(logq, logp, prelude))
        values, coefficients = self.combine(tuple(s.detach() for s in sums))
        # The value of combine, the derivative of its coefficients: what is detached there stays so.
        surrogate = sum((c * s for c, s in zip(coefficients, sums, strict=True)), torch.zeros_like(values))
        return values + surrogate - surrogate.detach()


@dataclass(frozen=True, eq=False)
class Swapped(Divergence):
    """``D`` with its arguments exchanged, still descended in the model: ``Swapped(D)(p, q) = D(q, p)``.

    >>> import torch
    >>> left, right = torch.tensor([0.0, 1.0]), torch.tensor([2.0, 0.0])
    >>> from leibler.divergence import ForwardKL
    >>> Swapped(ForwardKL())(left, right) == ForwardKL()(right, left)
    tensor(True)
    """

    divergence: Divergence

    def __post_init__(self) -> None:
        # Asked for now, so that a divergence which cannot be exchanged is refused when the recipe is built.
        self.divergence.swapped()

    @property
    def ceiling(self) -> float:
        return self.divergence.swapped().ceiling

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        exchanged = self.divergence.swapped()
        values, saved = exchanged._value(model, target)
        return values, (exchanged, saved)

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        exchanged, inner = saved
        exchanged._add_gradient(grad, coefficient, model, target, inner)

    def f(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.divergence.swapped().f(log_u)

    def f_prime(self, log_u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.divergence.swapped().f_prime(log_u)

    @property
    def inadmissible(self) -> str | None:
        return self.divergence.swapped().inadmissible

    def inverse_conjugate(self, z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        return self.divergence.swapped().inverse_conjugate(z)

    def swapped(self) -> Divergence:
        return self.divergence
