"""A divergence of one's own: in two ways, on logits, in the fused head, and in a recipe.

    python examples/custom_divergence.py

The divergence is the symmetric chi-squared, ``sum (p - q)^2 / (p + q)`` (Vincze, 1981; Le Cam, 1986): between 0 and 2,
finite for every pair of rows. p is the model, q the target.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leibler.data import Addition
from leibler.divergence import Divergence, RowFunction, SumForm
from leibler.fused import linear_divergence
from leibler.objective import Match, Objective, Teacher
from leibler.policy import character_tokenizer, tiny_llama
from leibler.train import OnPolicy, Recipe, fit


def symmetric_chi_squared(logp: Tensor, logq: Tensor) -> Tensor:
    """Any differentiable function of a block of rows; autograd does the rest, within the block."""
    p, q = logp.exp(), logq.exp()
    return ((p - q) ** 2 / (p + q).clamp_min(1e-30)).sum(-1)


BY_AUTOGRAD = RowFunction(symmetric_chi_squared)


@dataclass(frozen=True)
class SymmetricChiSquared(SumForm):
    """The same as a sum over the vocabulary, with its derivative by log p: no autograd graph is built."""

    def summands(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        p, q = logp.exp(), logq.exp()
        return ((p - q) ** 2 / (p + q).clamp_min(1e-30),)

    def derivatives(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        p, q = logp.exp(), logq.exp()
        return (p * (p - q) * (p + 3 * q) / (p + q).clamp_min(1e-30) ** 2,)

    def combine(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return sums[0], (torch.ones_like(sums[0]),)


def gradients(divergence: Divergence) -> tuple[Tensor, Tensor]:
    """Loss and gradient on the head of 64 tokens over 500 vocabulary entries, without ever holding the logits."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator)
    weight = torch.randn(500, 16, generator=generator).requires_grad_()
    target_hidden, target_weight = torch.randn(64, 32, generator=generator), torch.randn(500, 32, generator=generator)
    loss = linear_divergence(hidden, weight, target_hidden, target_weight, divergence)
    loss.backward()
    assert weight.grad is not None
    return loss.detach(), weight.grad


def main(out: Path, steps: int = 20) -> list[float]:
    """Returns the divergence to the teacher at the first and at the last step of a run that descends it."""
    for divergence in (BY_AUTOGRAD, SymmetricChiSquared()):
        loss, gradient = gradients(divergence)
        print(f"{type(divergence).__name__:>20}: loss {loss:.6f}, length of the head's gradient {gradient.norm():.6f}")

    task = Addition(digits=1)
    tokenizer = character_tokenizer(task.alphabet)
    teacher = tiny_llama(tokenizer, hidden=32, layers=1, heads=4, seed=1)
    student = tiny_llama(tokenizer, hidden=16, layers=1, heads=2)
    recipe = Recipe(OnPolicy(), Objective(Match(SymmetricChiSquared(), to=Teacher())))
    first = fit(recipe, student=student, teacher=teacher, data=task.dataset(100), out=out / "one", steps=1,
                max_new_tokens=4, learning_rate=1e-2, quiet=True).metrics["loss"]  # fmt: skip
    last = fit(recipe, student=student, teacher=teacher, data=task.dataset(100), out=out / "all", steps=steps,
               max_new_tokens=4, learning_rate=1e-2, quiet=True).metrics["loss"]  # fmt: skip
    print(f"   matched in training: {first:.4f} at first, {last:.4f} after {steps} more steps")
    return [first, last]


if __name__ == "__main__":
    main(Path(tempfile.mkdtemp(prefix="leibler-")))
