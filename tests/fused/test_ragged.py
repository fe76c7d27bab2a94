"""The fused pass over batches of any raggedness: any cut, any order, any tokens muted, garbage in what is muted."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leibler.divergence import Divergence, ForwardKL, JensenShannon, Renyi, ReverseKL, TotalVariation
from leibler.fused import linear_divergence

few = settings(max_examples=15)
some = pytest.mark.parametrize(
    "divergence", [ForwardKL(), ReverseKL(), JensenShannon(0.3), Renyi(0.5), TotalVariation()], ids=str
)


@st.composite
def operands(draw: st.DrawFn) -> tuple[list[int], list[Tensor], Tensor]:
    """Lengths of sequences, model and target hidden states of their tokens with their heads, weights of the tokens."""
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=5).filter(sum))
    source = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    n, vocab = sum(lengths), draw(st.integers(2, 40))
    shapes = [(n, 3), (vocab, 3), (n, 5), (vocab, 5)]
    made = [draw(st.sampled_from([0.1, 1.0, 30.0])) * torch.randn(s, generator=source) for s in shapes]
    weight = draw(st.lists(st.sampled_from([0.0, 0.0, 0.5, 2.0]), min_size=n, max_size=n))
    return lengths, made, torch.tensor(weight)


def graded(divergence: Divergence, tensors: list[Tensor], weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values per token, and the gradients of their sum on the model's hidden states and weight."""
    hidden, head = (x.clone().requires_grad_() for x in tensors[:2])
    value = linear_divergence(hidden, head, *tensors[2:], divergence, weight=weight, reduction="none")
    return value.detach(), *torch.autograd.grad(value.sum(), (hidden, head))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5 * (1.0 + float(b.abs().max()) if b.numel() else 1.0))


@some
@few
@given(case=operands())
def test_sequences_together_are_sequences_alone(divergence: Divergence, case) -> None:
    lengths, (hidden, head, target, target_head), weight = case
    value, slope, head_slope = graded(divergence, [hidden, head, target, target_head], weight)
    at, total = 0, torch.zeros_like(head)
    for length in filter(None, lengths):
        part = slice(at, at + length)
        alone = graded(divergence, [hidden[part], head, target[part], target_head], weight[part])
        close(value[part], alone[0])
        close(slope[part], alone[1])
        total, at = total + alone[2], at + length
    close(head_slope, total)


@some
@few
@given(case=operands(), garbage=st.sampled_from([math.nan, math.inf, -math.inf, 1e38]))
def test_tokens_of_weight_zero_are_exactly_nothing(divergence: Divergence, case, garbage: float) -> None:
    _, tensors, weight = case
    value, slope, head_slope = graded(divergence, tensors, weight)
    muted = weight == 0
    for hidden in (tensors[0], tensors[2]):
        hidden[muted] = garbage
    again, moved, head_moved = graded(divergence, tensors, weight)
    assert (again[muted] == 0).all()
    assert (moved[muted] == 0).all()
    close(again, value)
    close(moved, slope)
    close(head_moved, head_slope)


@some
@few
@given(case=operands(), seed=st.integers(0, 2**31 - 1))
def test_the_order_of_tokens_does_not_matter(divergence: Divergence, case, seed: int) -> None:
    _, (hidden, head, target, target_head), weight = case
    order = torch.randperm(len(weight), generator=torch.Generator().manual_seed(seed))
    value, slope, head_slope = graded(divergence, [hidden, head, target, target_head], weight)
    moved = graded(divergence, [hidden[order], head, target[order], target_head], weight[order])
    close(moved[0], value[order])
    close(moved[1], slope[order])
    close(moved[2], head_slope)
