from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from fused.helpers import (
    FOUR,
    ByAutograd,
    Forward,
    Products,
    Reverse,
    Sampled,
    assert_close,
    dense_logp,
    entropy,
    forward,
    four,
    grads,
    heads,
    parameters,
    reverse,
    sampled,
)
from leibler.errors import RecipeError, RunError
from leibler.fused import Linear, TargetRows, Want, functionals, one_pass
from leibler.fused import sweep as sweep_module

EPS = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


def ppo(old: Tensor, advantage: Tensor, weight: Tensor):
    """A PPO-clip surrogate with an entropy bonus and two divergences: separable, not linear in the values."""

    def loss(values: Tensor, index: Tensor) -> Tensor:
        lp, h, rkl, fkl = values
        ratio = (lp - old[index].to(lp)).exp()
        a = advantage[index].to(lp)
        surrogate = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a)
        return weight[index].to(lp) * (surrogate - 0.1 * h + 0.5 * rkl + 0.2 * fkl.square())

    return loss


def setting(n: int, token_seed: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(token_seed)
    weight = torch.rand(n, generator=g) * (torch.rand(n, generator=g) > 0.3)
    return torch.randn(n, generator=g) - 3, torch.randn(n, generator=g), weight / max(n, 1)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    def use(chunk: int, rows: int) -> None:
        monkeypatch.setattr(sweep_module, "chunk_tokens", lambda *a, **k: chunk)
        monkeypatch.setattr(sweep_module, "block_rows", lambda *a, **k: rows)

    return use


@pytest.mark.parametrize("dtype", list(EPS))
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_equal_dense_autograd(dtype: torch.dtype, temperature: float, bias: bool) -> None:
    model, target, token = heads(dtype=dtype, temperature=temperature, bias=bias)
    expected = four(model, target, token)
    # Rounded logits are wrong by eps * max|logit|, so everything after them is, too.
    size = max(1.0, dense_logp(model).abs().max().item(), dense_logp(target.leaves[0]).abs().max().item())
    tolerance = EPS[dtype] * size
    cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    values = functionals(model, FOUR, [target], token=token)
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_close(values, expected, tolerance)
    got = grads((values * cotangent.to(values.dtype)).sum(), model)
    assert [g.dtype for g in got] == [p.dtype for p in parameters(model)]
    assert_close(got, grads((expected * cotangent).sum(), model), tolerance)


@pytest.mark.parametrize("dtype", list(EPS))
def test_one_pass_equals_functionals_and_dense_autograd_for_a_ppo_loss(dtype: torch.dtype) -> None:
    model, target, token = heads(n=41, dtype=dtype)
    loss = ppo(*setting(41))
    everything = torch.arange(41)
    total, values = one_pass(model, FOUR, [target], loss, token=token)
    again = functionals(model, FOUR, [target], token=token)
    assert torch.equal(values, again.detach())
    assert not values.requires_grad
    expected = loss(four(model, target, token), everything).sum()
    one, two, judge = (grads(x, model) for x in (total, loss(again, everything).sum(), expected))
    same = 1e-12 if dtype == torch.float64 else max(1e-5, EPS[dtype] / 4)
    assert_close(total.detach(), expected.detach(), EPS[dtype] * 20)
    assert_close(one, two, same)
    assert_close(one, judge, EPS[dtype] * 20)


@given(n=st.integers(0, 19), chunk=st.integers(1, 9), rows=st.integers(1, 5))
@settings(deadline=None, max_examples=25)
def test_no_cut_into_chunks_and_blocks_changes_anything(n: int, chunk: int, rows: int) -> None:
    model, target, token = heads(n=n)
    loss = ppo(*setting(n))
    expected = grads(loss(four(model, target, token), torch.arange(n)).sum(), model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep_module, "chunk_tokens", lambda *a, **k: chunk)
        patch.setattr(sweep_module, "block_rows", lambda *a, **k: rows)
        total, _ = one_pass(model, FOUR, [target], loss, token=token)
        values = functionals(model, FOUR, [target], token=token)
        two = loss(values, torch.arange(n)).sum()
        assert_close(grads(total, model), expected, 1e-12)
        assert_close(grads(two, model), expected, 1e-12)


def test_coupled_losses_are_exact(small_blocks) -> None:
    """A sequence ratio and a variance: the cotangent of each token depends on all others."""
    small_blocks(7, 3)
    model, target, token = heads()

    def coupled(v: Tensor) -> Tensor:
        return v[0].mean().exp() * v[2].var() + (v[3] * v[1].flip(0)).sum().sin()

    got = grads(coupled(functionals(model, FOUR, [target], token=token)), model)
    assert_close(got, grads(coupled(four(model, target, token)), model), 1e-11)


def test_backward_twice_is_exact_for_functionals_and_an_error_for_one_pass() -> None:
    model, target, token = heads()
    values = functionals(model, FOUR, [target], token=token)
    first = torch.autograd.grad(values.sum(), parameters(model), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, grads(values.sum(), model), strict=True))
    total, _ = one_pass(model, FOUR, [target], lambda v, i: v.sum(0), token=token)
    total.backward(retain_graph=True)
    with pytest.raises(RunError, match="functionals"):
        total.backward()


@pytest.mark.parametrize("scale", [1.0, 3.7, 0.0])
def test_upstream_scale_and_accumulation(scale: float) -> None:
    model, target, token = heads()
    for p in parameters(model):
        p.grad = torch.ones_like(p)
    total, _ = one_pass(model, FOUR, [target], lambda v, i: v.sum(0), token=token)
    (scale * total).backward()
    expected = grads(scale * four(model, target, token).sum(), model)
    assert_close([p.grad - 1 for p in parameters(model)], expected, 1e-12)  # type: ignore[operator]


def test_a_tied_embedding_gets_both_gradients() -> None:
    g = torch.Generator().manual_seed(1)
    embedding = torch.randn(13, 6, generator=g, dtype=torch.float64, requires_grad=True)
    _, target, token = heads(bias=False)
    ids = torch.randint(0, 13, (23,), generator=g)

    def through(fused: bool) -> Tensor:
        model = Linear(torch.tanh(embedding[ids]), embedding, None, 0.7)
        if fused:
            total, _ = one_pass(model, FOUR, [target], lambda v, i: v.sum(0), token=token)
            return total * 2 + embedding.square().sum()
        return four(model, target, token).sum() * 2 + embedding.square().sum()

    got, expected = (torch.autograd.grad(through(fused), embedding)[0] for fused in (True, False))
    assert_close(got, expected, 1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_tied_head_costs_its_product_unless_the_embedding_is_frozen(frozen: bool) -> None:
    g = torch.Generator().manual_seed(1)
    embedding = torch.randn(13, 6, generator=g, dtype=torch.float64).requires_grad_(not frozen)
    layer = torch.randn(6, 6, generator=g, dtype=torch.float64, requires_grad=True)
    _, target, token = heads(bias=False)
    hidden = torch.tanh(embedding[torch.randint(0, 13, (23,), generator=g)]).mm(layer)
    model = Linear(hidden, embedding, None, 0.7)
    with Products() as products:
        total, _ = one_pass(model, FOUR, [target], lambda v, i: v.sum(0), token=token)
    assert products.count == 23 * 13 * (6 + 12 + 6 + 6 * (not frozen))
    got = torch.autograd.grad(total, [layer] + [embedding] * (not frozen), retain_graph=True)
    expected = torch.autograd.grad(four(model, target, token).sum(), [layer] + [embedding] * (not frozen))
    assert_close(list(got), list(expected), 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [23, 9])
def test_logits_left_for_the_backward_pass_are_those_that_would_be_formed(
    dtype: torch.dtype, bias: bool, chunk: int, small_blocks
) -> None:
    """Bit for bit: the second backward pass finds none and forms them."""
    small_blocks(chunk, 4)
    model, target, token = heads(dtype=dtype, bias=bias)
    values = functionals(model, FOUR, [target], token=token)
    cotangent = torch.linspace(-1, 1, values.numel()).view_as(values).to(values.dtype)
    with Products() as products:
        first = torch.autograd.grad(values, parameters(model), cotangent, retain_graph=True)
    spared = products.count
    with Products() as products:
        second = torch.autograd.grad(values, parameters(model), cotangent)
    last = (23 - 1) % chunk + 1
    assert products.count - spared == last * 13 * (6 + 12)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_several_targets_and_expressions_over_them() -> None:
    model, first, token = heads(seed=0)
    _, second, _ = heads(seed=9, temperature=1.3)
    a, b = first.leaves[0], second.leaves[0]
    mixture = TargetRows((a, b), lambda rows: torch.log2(0.3 * rows[0].exp2() + 0.7 * rows[1].exp2()))
    delta = TargetRows((a, b), lambda rows: 1.5 * rows[0] - 0.5 * rows[1])
    cold = TargetRows((b,), lambda rows: rows[0] / 0.5)
    selfish = TargetRows((model, a), lambda rows: (rows[0] + rows[1]) / 2)
    wants = [Want(Reverse, k) for k in range(5)] + [Want(Forward, 3), Want(Sampled)]
    values = functionals(model, wants, [first, mixture, delta, cold, selfish], token=token)

    lp, la, lb = dense_logp(model), dense_logp(a), dense_logp(b)
    laws = [
        la,
        (0.3 * la.exp() + 0.7 * lb.exp()).log(),
        (1.5 * la - 0.5 * lb).log_softmax(-1),
        (lb / 0.5).log_softmax(-1),
        ((lp.detach() + la) / 2).log_softmax(-1),
    ]
    expected = torch.stack(
        [*(reverse(lp, law, None) for law in laws), forward(lp, laws[3], None), sampled(lp, None, token)]
    )
    assert_close(values, expected, 1e-12)
    cotangent = torch.randn(7, 23, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert_close(grads((values * cotangent).sum(), model), grads((expected * cotangent).sum(), model), 1e-12)


def test_a_shared_leaf_is_multiplied_once() -> None:
    model, target, _ = heads(bias=False)
    leaf = target.leaves[0]
    twice = [target, TargetRows((leaf, leaf), lambda rows: rows[0] + rows[1]), TargetRows((model,))]
    with Products() as products, torch.no_grad():
        functionals(model, [Want(Reverse, k) for k in range(3)], twice)
    assert products.count == 23 * 13 * (6 + 12)


def test_hooks_that_copy_a_shared_leaf_change_nothing() -> None:
    model, target, _ = heads()
    leaf = target.leaves[0]
    two = [target, TargetRows((leaf,))]
    wants = [Want(Reverse, 0), Want(Forward, 1)]
    expected = grads(functionals(model, wants, two).sum(), model)
    with torch.autograd.graph.saved_tensors_hooks(Tensor.clone, lambda kept: kept):
        loss = functionals(model, wants, two).sum()
    assert_close(grads(loss, model), expected, 1e-12)


def test_heads_that_differ_in_one_part_alone_are_not_shared() -> None:
    model, target, _ = heads()
    leaf = target.leaves[0]
    assert leaf.bias is not None
    others = [
        leaf,
        replace(leaf, hidden=leaf.hidden.flip(0)),
        replace(leaf, weight=leaf.weight.flip(0)),
        replace(leaf, bias=leaf.bias.flip(0)),
        replace(leaf, temperature=1.1),
        replace(model, temperature=1.1),
    ]
    values = functionals(model, [Want(Reverse, k) for k in range(6)], [TargetRows((head,)) for head in others])
    lp = dense_logp(model)
    assert_close(values, torch.stack([reverse(lp, dense_logp(head), None) for head in others]), 1e-12)


@pytest.mark.parametrize("frozen", ["", "head", "hidden", "all"])
@pytest.mark.parametrize("engine", ["functionals", "one_pass"])
@pytest.mark.parametrize("chunk", [23, 10])
def test_no_product_is_computed_for_what_is_frozen(frozen: str, engine: str, chunk: int, small_blocks) -> None:
    small_blocks(chunk, 4)
    model, target, token = heads()
    hidden, head = frozen not in ("hidden", "all"), frozen not in ("head", "all")
    model.hidden.requires_grad_(hidden)
    model.weight.requires_grad_(head)
    assert model.bias is not None
    model.bias.requires_grad_(head)
    one, both = 23 * 13 * 6, 23 * 13 * (6 + 12)
    with Products() as products:
        if engine == "functionals":
            out = functionals(model, FOUR, [target], token=token).sum()
            # The last chunk's logits are still there.
            again = {23: 0, 10: 20 * 13 * (6 + 12)}[chunk] if hidden or head else 0
        else:
            out, _ = one_pass(model, FOUR, [target], lambda v, i: v.sum(0), token=token)
            again = 0
        if hidden or head:
            out.backward()
    assert products.count == both + again + one * (hidden + head)
    assert out.requires_grad == (hidden or head)
    assert (model.hidden.grad is not None, model.weight.grad is not None) == (hidden, head)


def test_values_alone_under_no_grad() -> None:
    model, target, token = heads()
    expected = four(model, target, token)
    with Products() as products, torch.no_grad():
        values = functionals(model, FOUR, [target], token=token)
        total, same = one_pass(model, FOUR, [target], lambda v, i: v.sum(0), token=token)
    assert products.count == 2 * 23 * 13 * (6 + 12)
    assert not values.requires_grad
    assert not total.requires_grad
    assert torch.equal(values, same)
    assert_close(values, expected, 1e-12)
    assert_close(total, expected.sum(), 1e-12)


def test_coefficients_too_small_for_half_precision_are_kept_out_of_the_products() -> None:
    """One over many tokens lies below the smallest float16, and so would the scaled hidden states."""
    model, target, _ = heads(n=4000, dtype=torch.float16, bias=False)
    with torch.no_grad():
        model.hidden.abs_()
    wants = [Want(Reverse, 0)]
    plain, tiny = (
        torch.autograd.grad(one_pass(model, wants, [target], lambda v, i, s=s: s * v[0])[0], model.weight)[0]
        for s in (1e-2, 1e-8)
    )
    assert torch.tensor(1e-8, dtype=torch.float16) == 0
    assert_close(tiny.float() * 1e6, plain.float(), 2e-2)


def test_autocast_multiplies_in_half_precision_and_stays_close() -> None:
    model, target, token = heads(dtype=torch.float32)
    expected = functionals(model, FOUR, [target], token=token)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = functionals(model, FOUR, [target], token=token)
    assert values.dtype == torch.float32
    assert not torch.equal(values, expected)
    assert_close(values.detach(), expected.detach(), 0.1)
    got = grads(values.sum(), model)
    assert all(g.dtype == torch.float32 for g in got)
    assert_close(got, grads(expected.sum(), model), 0.1)


def test_the_backward_pass_forms_the_logits_that_the_forward_pass_saw() -> None:
    model, target, token = heads(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functionals(model, FOUR, [target], token=token).sum()
    kept = torch.autograd.grad(loss, parameters(model), retain_graph=True)
    with torch.autocast("cpu", dtype=torch.float16):
        again = torch.autograd.grad(loss, parameters(model), retain_graph=True)  # nothing was left to use again
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, grads(loss, model), strict=True))


def test_row_blocks_do_not_run_under_autocast() -> None:
    """A functional that multiplies matrices of its own must not be rounded to half precision."""
    model, target, _ = heads(dtype=torch.float32, vocab=40)
    gram = ByAutograd(lambda lp, lq, token: (lp[:, None] @ lp[:, :, None])[:, 0, 0].sqrt())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (values,) = functionals(model, [Want(gram, 0)], [target])
        lp = functionals(model, [Want(ByAutograd(lambda lp, lq, t, k=k: lp[:, k]), 0) for k in range(40)], [target])
    assert_close(values.detach(), lp.detach().square().sum(0).sqrt(), 1e-5)


def test_one_pass_refuses_a_loss_with_parameters_of_its_own() -> None:
    model, target, token = heads()
    beta = torch.ones((), dtype=torch.float64, requires_grad=True)
    with pytest.raises(RecipeError, match="detach"):
        one_pass(model, FOUR, [target], lambda v, i: beta * v[0], token=token)
    with pytest.raises(RecipeError, match="one number per token"):
        one_pass(model, FOUR, [target], lambda v, i: v.sum(), token=token)


def test_a_loss_that_reads_some_or_none_of_the_values() -> None:
    model, target, token = heads()
    total, _ = one_pass(model, FOUR, [target], lambda v, i: v[1], token=token)
    assert_close(grads(total, model), grads(entropy(dense_logp(model), None, None).sum(), model), 1e-12)
    total, _ = one_pass(model, FOUR, [target], lambda v, i: torch.ones(len(i)), token=token)
    assert float(total.detach()) == 23
    assert all(g.abs().max() == 0 for g in grads(total, model))


def test_gradcheck() -> None:
    model, target, token = heads(n=4, hidden=3, vocab=5)

    def fn(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functionals(Linear(hidden, weight, bias, 0.7), FOUR, [target], token=token)

    assert torch.autograd.gradcheck(fn, tuple(parameters(model)))


def test_changing_the_weight_between_the_passes_is_noticed() -> None:
    model, target, token = heads()
    values = functionals(model, FOUR, [target], token=token)
    with torch.no_grad():
        model.weight.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        values.sum().backward()


@pytest.mark.parametrize("engine", ["functionals", "one_pass"])
def test_a_functional_that_only_informs_costs_no_gradient(engine: str) -> None:
    calls: list[str] = []

    class Counted(ByAutograd):
        def add_gradient(self, *args: Any) -> None:
            calls.append(self.fn.__name__)
            super().add_gradient(*args)

    model, target, _ = heads()
    wants = [Want(Counted(entropy, needs_target=False)), Want(Counted(reverse), 0)]
    if engine == "one_pass":
        total, _ = one_pass(model, wants, [target], lambda v, i: v[1] + v[0].detach())
    else:
        total = functionals(model, wants, [target])[1].sum()
    total.backward()
    assert set(calls) == {"reverse"}


@pytest.mark.parametrize("engine", ["functionals", "one_pass"])
def test_nothing_is_held_after_the_backward_pass(engine: str) -> None:
    """A loss kept for the log must not keep the hidden states of the batch."""
    model, target, token = heads()
    if engine == "one_pass":
        total, _ = one_pass(model, FOUR, [target], lambda v, i: v.sum(0), token=token)
    else:
        total = functionals(model, FOUR, [target], token=token).sum()
    total.backward()
    before = StorageWeakRef(target.leaves[0].hidden.untyped_storage())
    assert not before.expired()
    del target
    gc.collect()
    assert before.expired()
    assert total.requires_grad
