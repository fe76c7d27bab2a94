from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fused.helpers import (
    Bytes,
    Entropy,
    Forward,
    Products,
    Reverse,
    assert_close,
    dense_logp,
    forward,
    grads,
    heads,
    parameters,
    reverse,
)
from leibler.errors import LeiblerError, RunError
from leibler.fused import Linear, TargetRows, linear_divergence, sweep


def call(model: Linear, target: TargetRows, functional: Any = Reverse, **kwargs: Any) -> Tensor:
    leaf = target.leaves[0]
    return linear_divergence(
        model.hidden,
        model.weight,
        leaf.hidden,
        leaf.weight,
        functional,
        model_bias=model.bias,
        target_bias=leaf.bias,
        temperature=model.temperature,
        **kwargs,
    )


WEIGHTS = {
    "none": None,
    "bool": torch.arange(23) % 3 != 0,
    "numbers": torch.linspace(-0.5, 2, 23) * (torch.arange(23) % 4 != 1),
    "positive": torch.linspace(0.1, 2, 23),
}


@pytest.mark.parametrize("kind", list(WEIGHTS))
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_reductions_and_weights(kind: str, reduction: Any, frozen: bool) -> None:
    model, target, _ = heads()
    if frozen:
        model.weight.requires_grad_(False)
        assert model.bias is not None
        model.bias.requires_grad_(False)
    weight = WEIGHTS[kind]
    out = call(model, target, weight=weight, reduction=reduction)
    w = torch.ones(23, dtype=torch.float64) if weight is None else weight.double()
    each = w * reverse(dense_logp(model), dense_logp(target.leaves[0]), None)
    expected = {"mean": each.sum() / w.sum(), "sum": each.sum(), "none": each}[reduction]
    assert_close(out.detach(), expected.detach(), 1e-12)
    cotangent = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).reshape(out.shape)
    got = grads((out * cotangent).sum(), model)
    assert_close(got, grads((expected * cotangent).sum(), model), 1e-12)
    if kind == "bool":
        assert got[0][::3].abs().max() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", [False, True])
def test_tokens_of_weight_zero_are_gone_whatever_they_hold(reduction: Any, frozen: bool) -> None:
    model, target, _ = heads()
    model.weight.requires_grad_(not frozen)
    weight = torch.ones(23)
    weight[[0, 4, 22]] = 0
    before = call(model, target, weight=weight, reduction=reduction)
    clean = grads(before.sum(), model)
    with torch.no_grad():
        model.hidden[weight == 0] = math.nan
        target.leaves[0].hidden[weight == 0] = math.inf
    with Products() as products:
        after = call(model, target, weight=weight, reduction=reduction)
    assert products.count <= 20 * 13 * (6 + 12 + 6 + 6), "a masked token took part in a product"
    dirty = grads(after.sum(), model)
    assert torch.equal(before, after)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert dirty[0][weight == 0].abs().max() == 0


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_token_left(reduction: Any) -> None:
    model, target, _ = heads()
    out = call(model, target, weight=torch.zeros(23), reduction=reduction)
    assert out.shape == (torch.Size([23]) if reduction == "none" else torch.Size([]))
    assert out.abs().max() == 0
    assert all(g.abs().max() == 0 for g in grads(out.sum(), model))


@pytest.mark.parametrize(("model_vocab", "target_vocab"), [(16, 13), (13, 16)])
def test_heads_padded_to_different_sizes_are_compared_on_what_both_have(model_vocab: int, target_vocab: int) -> None:
    model, target, _ = heads(vocab=model_vocab, target_vocab=target_vocab)
    out = call(model, target)
    expected = reverse(dense_logp(model, 13), dense_logp(target.leaves[0], 13), None).mean()
    assert_close(out.detach(), expected.detach(), 1e-12)
    assert_close(grads(out, model), grads(expected, model), 1e-12)
    fewer = call(model, target, vocab=9)
    expected = reverse(dense_logp(model, 9), dense_logp(target.leaves[0], 9), None).mean()
    assert_close(fewer.detach(), expected.detach(), 1e-12)


def test_the_target_is_never_differentiated() -> None:
    model, target, _ = heads()
    leaf = target.leaves[0]
    leaf.hidden.requires_grad_()
    leaf.weight.requires_grad_()
    call(model, target).backward()
    assert leaf.hidden.grad is None
    assert leaf.weight.grad is None
    for p in parameters(model):
        p.requires_grad_(False)
    assert not call(model, target).requires_grad


def test_infinite_where_the_mathematics_says_so() -> None:
    model, target, _ = heads()
    leaf = target.leaves[0]
    assert leaf.bias is not None
    leaf.bias[4] = -math.inf
    out = call(model, target, Reverse, reduction="none")
    assert torch.isinf(out).all()
    assert all(g.abs().max() == 0 for g in grads(out.sum(), model))
    out = call(model, target, Forward)
    expected = forward(dense_logp(model), dense_logp(leaf), None).mean()
    assert_close(out.detach(), expected.detach(), 1e-12)
    assert_close(grads(out, model), grads(expected, model), 1e-12)


def test_backward_twice() -> None:
    model, target, _ = heads()
    out = call(model, target)
    out.backward(retain_graph=True)
    with pytest.raises(RunError):
        out.backward()
    model.weight.requires_grad_(False)
    assert model.bias is not None
    model.bias.requires_grad_(False)
    each = call(model, target, reduction="none")
    first = torch.autograd.grad(each.sum(), model.hidden, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(each.sum(), model.hidden)[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_hidden": torch.zeros(23, 5)}, "last dimensions"),
        ({"model_hidden": torch.zeros(2, 23, 6)}, "flatten"),
        ({"model_hidden": torch.zeros(23, 6, dtype=torch.int64)}, "floating point"),
        ({"target_hidden": torch.zeros(22, 12)}, "same tokens"),
        ({"model_bias": torch.zeros(12)}, "one entry per row"),
        ({"weight": torch.zeros(22)}, "one number per hidden state"),
        ({"weight": torch.ones(23, requires_grad=True)}, "detach"),
        ({"reduction": "average"}, "average"),
        ({"temperature": 0.0}, "positive"),
        ({"temperature": math.nan}, "positive"),
        ({"vocab": 14}, "vocab=14"),
        ({"vocab": 0}, "vocab=0"),
        ({"divergence": Entropy}, "has no target"),
    ],
)
def test_mistakes_are_named_in_one_sentence(change: dict[str, Any], says: str) -> None:
    model, target, _ = heads(dtype=torch.float32)
    leaf = target.leaves[0]
    arguments: dict[str, Any] = {
        "model_hidden": model.hidden,
        "model_weight": model.weight,
        "target_hidden": leaf.hidden,
        "target_weight": leaf.weight,
        "divergence": Reverse,
    }
    with pytest.raises(LeiblerError, match=says) as raised:
        linear_divergence(**(arguments | change))
    assert str(raised.value).count(". ") == 0


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_memory_does_not_grow_with_tokens(
    reduction: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exact bytes of live tensors, at 8 times the tokens: one head gradient, two chunks and a few row blocks."""
    hidden, vocab, chunk = 4, 20_000, 64
    monkeypatch.setattr(sweep, "chunk_tokens", lambda *a, **k: chunk)
    monkeypatch.setattr(sweep, "keep_heap", lambda: None)  # counted by the judge, but never touched
    block = sweep.block_rows(vocab) * vocab * 4

    def peak(n: int) -> int:
        model, target, _ = heads(n, hidden, vocab, dtype=dtype, bias=False)
        leaf = target.leaves[0]
        with Bytes(model.hidden, model.weight, leaf.hidden, leaf.weight) as used:
            call(model, target, reduction=reduction).sum().backward()
        return used.peak

    one, many = peak(chunk), peak(8 * chunk)
    # What may grow: hidden states of both sides a few times over, and a few numbers per token.
    assert many - one <= 7 * chunk * (8 * 3 * hidden + 64) * 4, (one, many)
    gradient = vocab * hidden * (4 if dtype == torch.float32 else 4 + 2 * 2)
    assert many <= gradient + 2 * chunk * vocab * dtype.itemsize + 12 * block, (many - gradient) / block


def test_the_memory_judge_sees_dense_logits_grow() -> None:
    def peak(n: int) -> int:
        model, target, _ = heads(n, 4, 5_000, dtype=torch.float32, bias=False)
        with Bytes(model.hidden, model.weight) as used:
            reverse(
                (model.hidden @ model.weight.T).log_softmax(-1),
                (target.leaves[0].hidden @ target.leaves[0].weight.T).log_softmax(-1),
                None,
            ).mean().backward()
        return used.peak

    assert peak(1024) > 4 * peak(128)
