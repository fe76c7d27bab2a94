"""Brute-force judges: functionals by autograd, dense float64 logits, and counters of products and bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leibler.divergence.rows import LN2, Row
from leibler.fused import Linear, TargetRows, Want

RowFunction = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


def reverse(lp: Tensor, lq: Tensor | None, token: Tensor | None) -> Tensor:
    assert lq is not None
    return (lp.exp() * (lp - lq)).sum(-1)


def forward(lp: Tensor, lq: Tensor | None, token: Tensor | None) -> Tensor:
    assert lq is not None
    return torch.where(lq > -1e20, lq.exp() * (lq - lp), 0).sum(-1)


def entropy(lp: Tensor, lq: Tensor | None, token: Tensor | None) -> Tensor:
    return -(lp.exp() * lp.clamp(min=-1e20)).sum(-1)


def sampled(lp: Tensor, lq: Tensor | None, token: Tensor | None) -> Tensor:
    assert token is not None
    return lp.gather(-1, token[:, None])[:, 0]


@dataclass(frozen=True)
class ByAutograd:
    """A functional of rows, differentiated by autograd inside the block; infinite beyond 1e15."""

    fn: RowFunction
    needs_target: bool = True

    def value(self, model: Row, target: Row | None, token: Tensor | None) -> tuple[Tensor, Any]:
        with torch.enable_grad():
            logits = (model.logits * LN2).detach().requires_grad_()
            out = self.fn(logits.log_softmax(-1), None if target is None else target.logp, token)
            (grad,) = torch.autograd.grad(out.sum(), logits)
        out = out.detach()
        return torch.where(out.abs() > 1e15, out.sign() * torch.inf, out), grad

    def add_gradient(
        self,
        grad: Tensor,
        coefficient: Tensor,
        model: Row,
        target: Row | None,
        token: Tensor | None,
        saved: Any,
    ) -> None:
        grad += coefficient[:, None] * saved


Reverse, Forward = ByAutograd(reverse), ByAutograd(forward)
Entropy, Sampled = ByAutograd(entropy, needs_target=False), ByAutograd(sampled, needs_target=False)


def dense_logp(head: Linear, vocab: int | None = None) -> Tensor:
    """Log-probabilities of a head, in float64, with its graph."""
    weight = head.weight[:vocab].double()
    logits = head.hidden.double() @ weight.T
    if head.bias is not None:
        logits = logits + head.bias[:vocab].double()
    return (logits / head.temperature).log_softmax(-1)


def heads(
    n: int = 23,
    hidden: int = 6,
    vocab: int = 13,
    *,
    dtype: torch.dtype = torch.float64,
    bias: bool = True,
    temperature: float = 0.7,
    seed: int = 0,
    target_vocab: int | None = None,
) -> tuple[Linear, TargetRows, Tensor]:
    """A trainable model head, a target of another hidden size, and sampled tokens."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

    size = target_vocab or vocab
    model = Linear(
        normal(n, hidden).requires_grad_(),
        normal(vocab, hidden).requires_grad_(),
        normal(vocab).requires_grad_() if bias else None,
        temperature,
    )
    leaf = Linear(normal(n, 2 * hidden), normal(size, 2 * hidden) / 2, normal(size) if bias else None, temperature)
    return model, TargetRows((leaf,)), torch.randint(0, min(size, vocab), (n,), generator=g)


FOUR = [Want(Sampled), Want(Entropy), Want(Reverse, 0), Want(Forward, 0)]


def four(model: Linear, target: TargetRows, token: Tensor) -> Tensor:
    """The four functionals of ``FOUR`` from dense float64 logits."""
    lp, lq = dense_logp(model), dense_logp(target.leaves[0])
    return torch.stack([sampled(lp, lq, token), entropy(lp, lq, token), reverse(lp, lq, token), forward(lp, lq, token)])


def parameters(model: Linear) -> list[Tensor]:
    return [t for t in (model.hidden, model.weight, model.bias) if t is not None and t.requires_grad]


def grads(out: Tensor, model: Linear) -> list[Tensor]:
    return list(torch.autograd.grad(out, parameters(model)))


def assert_close(got: list[Tensor] | Tensor, expected: list[Tensor] | Tensor, tolerance: float) -> None:
    """Relative to the largest expected entry: an entry of a gradient is a sum of terms of that size."""
    pairs = zip(got, expected, strict=True) if isinstance(got, list) else [(got, expected)]
    for a, b in pairs:
        assert a.shape == b.shape
        error = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
        limit = tolerance * max(b.double().abs().max().item() if b.numel() else 0.0, 1e-30)
        assert error <= limit, f"{error:.3g} > {limit:.3g}"


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products as they run."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "bmm", "baddbmm"):
            left, right = args[-2:]
            self.count += left.shape[-2] * left.shape[-1] * right.shape[-1]
        return func(*args, **(kwargs or {}))


class Bytes(TorchDispatchMode):
    """The most bytes of new tensors alive at one time, exactly: every storage an operation touches is followed.

    Storages of ``inputs`` are not counted. (Memory that enters by ``frombuffer`` is first seen as an argument.)
    """

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.inputs = {t.untyped_storage()._cdata for t in inputs}
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.live = {k: v for k, v in self.live.items() if not v[0].expired()}
        for t in tree_leaves((args, kwargs, out)):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.live and storage._cdata not in self.inputs:
                    self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out
