"""Supports: padding, entries of -inf on one side or both, infinite values, garbage in tokens that do not count."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fused.helpers import (
    FOUR,
    ByAutograd,
    Entropy,
    Reverse,
    assert_close,
    dense_logp,
    entropy,
    forward,
    grads,
    heads,
    reverse,
    sampled,
)
from leibler.divergence import ForwardKL, ReverseKL
from leibler.fused import Linear, TargetRows, Want, functionals, one_pass, support_violations
from leibler.fused import sweep as sweep_module


def test_padding_beyond_vocab_is_left_out_on_both_sides() -> None:
    model, target, token = heads(vocab=16, target_vocab=19)
    leaf = target.leaves[0]
    token = token % 13
    values = functionals(model, FOUR, [target], token=token, vocab=13)
    lp, lq = dense_logp(model, 13), dense_logp(leaf, 13)
    expected = torch.stack([f(lp, lq, token) for f in (sampled, entropy, reverse, forward)])
    assert_close(values, expected, 1e-12)
    got = grads(values.sum(), model)
    assert_close(got, grads(expected.sum(), model), 1e-12)
    assert got[1][13:].abs().max() == 0
    assert got[2][13:].abs().max() == 0


def test_tokens_out_of_both_supports_change_nothing() -> None:
    model, target, token = heads()
    leaf = target.leaves[0]
    assert model.bias is not None
    assert leaf.bias is not None
    with torch.no_grad():
        model.bias[[2, 7]] = -math.inf
        leaf.bias[[2, 7]] = -math.inf
    token = torch.where((token == 2) | (token == 7), 0, token)
    keep = [v for v in range(13) if v not in (2, 7)]
    loglinear = TargetRows((leaf,), lambda rows: 0.4 * rows[0])
    # A difference of floors is 0, an ordinary score: the column must stay outside all the same.
    ratio = TargetRows((leaf, model), lambda rows: rows[0] - rows[1])
    wants = [*FOUR, Want(Reverse, 1), Want(Reverse, 2)]
    values = functionals(model, wants, [target, loglinear, ratio], token=token)

    def small(head: Linear) -> Linear:
        assert head.bias is not None
        return Linear(head.hidden, head.weight[keep], head.bias[keep], head.temperature)

    lp, lq = dense_logp(small(model)), dense_logp(small(leaf))
    renumbered = torch.tensor([keep.index(int(t)) for t in token])
    expected = torch.stack(
        [
            *(f(lp, lq, renumbered) for f in (sampled, entropy, reverse, forward)),
            reverse(lp, (0.4 * lq).log_softmax(-1), None),
            reverse(lp, (lq - lp.detach()).log_softmax(-1), None),
        ]
    )
    assert_close(values, expected, 1e-12)
    got = grads(values.sum(), model)
    assert_close(got, grads(expected.sum(), model), 1e-12)
    assert got[1][[2, 7]].abs().max() == 0


def test_a_token_outside_the_targets_support_is_infinite_and_gets_no_gradient_from_that_functional() -> None:
    model, target, token = heads()
    leaf = target.leaves[0]
    assert leaf.bias is not None
    leaf.bias[4] = -math.inf
    values = functionals(model, FOUR, [target], token=token)
    assert torch.isinf(values[2]).all()
    assert torch.isfinite(values[[0, 1, 3]]).all()
    assert support_violations(values).tolist() == [0, 0, 23, 0]
    assert int(support_violations(values[2])) == 23
    lp, lq = dense_logp(model), dense_logp(leaf)
    others = torch.stack([sampled(lp, None, token), entropy(lp, None, token), forward(lp, lq, token)])
    assert_close(grads(values.sum(), model), grads(others.sum(), model), 1e-12)


def test_an_expression_may_cut_tokens_off_with_minus_infinity() -> None:
    """As top-k and min-p do: ForwardKL stays finite, ReverseKL is infinite without harm to the rest."""
    model, target, _ = heads()

    def top(rows: tuple[Tensor, ...]) -> Tensor:
        return rows[0].masked_fill(rows[0] < rows[0].topk(5, dim=-1).values[:, -1:], -torch.inf)

    cut = TargetRows(target.leaves, top)
    values = functionals(model, [Want(ForwardKL(), 0), Want(ReverseKL(), 0)], [cut])
    lp = dense_logp(model)
    expected = forward(lp, top((dense_logp(target.leaves[0]),)).log_softmax(-1), None)
    assert_close(values[0], expected, 1e-12)
    assert torch.isinf(values[1]).all()
    assert_close(grads(values.sum(), model), grads(expected.sum(), model), 1e-12)


@pytest.mark.parametrize("engine", ["functionals", "one_pass"])
def test_a_coefficient_that_is_infinite_with_its_value_is_dropped(engine: str) -> None:
    model, target, token = heads()
    leaf = target.leaves[0]
    assert leaf.bias is not None
    leaf.bias[4] = -math.inf

    def loss(values: Tensor, index: Tensor) -> Tensor:
        return values[0] + values[2].square()

    if engine == "one_pass":
        total, _ = one_pass(model, FOUR, [target], loss, token=token)
    else:
        total = loss(functionals(model, FOUR, [target], token=token), torch.arange(23)).sum()
    assert_close(grads(total, model), grads(sampled(dense_logp(model), None, token).sum(), model), 1e-12)


def _poisoned(functional: ByAutograd, bad: Tensor) -> ByAutograd:
    """Infinite with a NaN gradient where the sampled token is in ``bad``."""

    def fn(lp: Tensor, lq: Tensor | None, token: Tensor | None) -> Tensor:
        out = functional.fn(lp, lq, token)
        assert token is not None
        return out * torch.where(torch.isin(token, bad), torch.inf, 1.0)

    return ByAutograd(fn, functional.needs_target)


def test_a_broken_gradient_of_one_functional_does_not_reach_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "chunk_tokens", lambda *a, **k: 7)
    monkeypatch.setattr(sweep_module, "block_rows", lambda *a, **k: 3)
    model, target, token = heads()
    bad = torch.tensor([0, 1, 2])
    hit = torch.isin(token, bad)
    assert 0 < int(hit.sum()) < 23
    values = functionals(model, [Want(_poisoned(Reverse, bad), 0), Want(Entropy)], [target], token=token)
    assert torch.equal(~torch.isfinite(values[0]), hit)
    lp, lq = dense_logp(model), dense_logp(target.leaves[0])
    expected = reverse(lp, lq, None)[~hit].sum() + entropy(lp, None, None).sum()
    assert_close(grads(values.sum(), model), grads(expected, model), 1e-12)


@pytest.mark.parametrize("engine", ["functionals", "one_pass"])
def test_garbage_in_tokens_of_coefficient_zero_changes_nothing(engine: str) -> None:
    model, target, token = heads()
    off = torch.zeros(23, dtype=torch.bool)
    off[[0, 5, 22]] = True

    def gradient(model: Linear) -> list[Tensor]:
        def loss(values: Tensor, index: Tensor) -> Tensor:
            return torch.where(off[index], 0, values.sum(0))

        if engine == "one_pass":
            total, _ = one_pass(model, FOUR, [target], loss, token=token)
        else:
            total = loss(functionals(model, FOUR, [target], token=token), torch.arange(23)).sum()
        assert torch.isfinite(total)
        return grads(total, model)

    clean = gradient(model)
    with torch.no_grad():
        model.hidden[off] = torch.tensor([[math.nan], [math.inf], [1e300]], dtype=torch.float64)
    dirty = gradient(model)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert dirty[0][off].abs().max() == 0
