"""Targets on a coarsened vocabulary, against brute force on dense float64 log-probs that are pushed by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fused.helpers import Entropy, Reverse, Sampled, assert_close, dense_logp, grads, heads
from fused.test_named import FORMULAS
from leibler.divergence import ForwardKL, JensenShannon, ReverseKL, TotalVariation, get
from leibler.errors import LeiblerError, ModelError, RecipeError
from leibler.fused import Coarse, Linear, TargetRows, TopK, Want, functionals, one_pass, support_violations
from leibler.fused import sweep as sweep_module


def pushed(lp: Tensor, token: Tensor, tail: str) -> Tensor:
    """Log-probs on the kept entries and, last, of all others: literally the sum over the others."""
    token = token.long().expand(lp.shape[0], -1)
    kept = lp.gather(1, token)
    if tail == "renormalise":
        return kept.log_softmax(-1)
    others = torch.ones_like(lp, dtype=torch.bool).scatter(1, token, False)
    rest = torch.stack([row[mask].logsumexp(0) for row, mask in zip(lp, others, strict=True)])
    return torch.cat([kept, rest[:, None]], dim=1)


def stored(lq: Tensor, token: Tensor, tail: Any = "bucket", temperature: float = 0.7) -> Coarse:
    """What a store of dense log-probs would hold."""
    rows = pushed(lq, token, "bucket")
    per_row = token.long().expand(lq.shape[0], -1)
    return Coarse(per_row, TopK(rows[:, :-1], rows[:, -1], temperature), tail=tail)


def top(lq: Tensor, k: int) -> Tensor:
    return lq.topk(k, dim=-1).indices


@pytest.fixture(params=[(1024, 1024), (7, 3)], ids=["whole", "cut"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, rows = request.param
    monkeypatch.setattr(sweep_module, "chunk_tokens", lambda *a, **k: chunk)
    monkeypatch.setattr(sweep_module, "block_rows", lambda *a, **k: rows)


@pytest.mark.parametrize("name", list(FORMULAS))
@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
@pytest.mark.parametrize("kind", ["rows", "common", "live"])
def test_every_divergence_equals_brute_force(name: str, tail: Any, kind: str, blocks: None) -> None:
    model, target, label = heads(temperature=0.7)
    lp, lq = dense_logp(model), dense_logp(target.leaves[0])
    token = top(lq, 5) if kind == "rows" else torch.tensor([11, 0, 4])
    coarse = Coarse(token, target, tail=tail) if kind == "live" else stored(lq, token, tail)
    params, formula = FORMULAS[name]
    wants = [Want(Sampled), Want(get(name, **params), 0), Want(Entropy)]
    got = functionals(model, wants, [coarse], token=label)
    expected = formula(pushed(lp, token, tail), pushed(lq, token, tail).detach())
    assert_close(got[1], expected, 1e-10)
    # The functionals without a target stay on the full row.
    assert_close(got[0], lp.gather(1, label[:, None])[:, 0], 1e-10)
    assert_close(got[2], -(lp.exp() * lp).sum(-1), 1e-10)
    cotangent = torch.linspace(-1, 2, 23, dtype=torch.float64)
    assert_close(grads((got[1] * cotangent).sum(), model), grads((expected * cotangent).sum(), model), 1e-9)


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_the_gradient_is_the_same_in_one_pass_and_beside_other_targets(tail: Any) -> None:
    model, target, label = heads()
    lq = dense_logp(target.leaves[0])
    coarse = stored(lq, top(lq, 4), tail)
    wants = [Want(Sampled), Want(ReverseKL(), 1), Want(JensenShannon(), 0), Want(ReverseKL(), 0)]
    weight = torch.tensor([0.3, 1.0, -0.5, 0.7], dtype=torch.float64)
    total, values = one_pass(model, wants, [coarse, target], lambda v, i: weight @ v, token=label)
    again = functionals(model, wants, [coarse, target], token=label)
    assert torch.equal(values, again.detach())
    assert_close(grads(total, model), grads((weight @ again).sum(), model), 1e-12)
    alone = functionals(model, [Want(ReverseKL(), 0)], [coarse])
    assert_close(alone[0], again[3], 1e-12)


@pytest.mark.parametrize("name", list(FORMULAS))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_entries_kept_is_the_live_target(name: str, dtype: torch.dtype) -> None:
    model, target, _ = heads(dtype=dtype)
    assert model.bias is not None
    assert target.leaves[0].bias is not None
    with torch.no_grad():  # out of both supports: FLOOR on both sides, in a kept entry too
        model.bias[3] = target.leaves[0].bias[3] = -math.inf
    lq = dense_logp(target.leaves[0])
    params, _ = FORMULAS[name]
    want = [Want(get(name, **params), 0)]
    (live,) = functionals(model, want, [target])
    expected = grads(live.sum(), model)
    for coarse in (stored(lq, top(lq, 13)), stored(lq, torch.arange(13)), Coarse(torch.arange(13), target)):
        (cached,) = functionals(model, want, [coarse])
        tolerance = 1e-12 if dtype == torch.float64 else 3e-5
        assert_close(cached, live, tolerance)
        assert_close(grads(cached.sum(), model), expected, tolerance)


@given(k=st.integers(1, 12), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=30)
def test_a_bucket_never_makes_an_f_divergence_larger(k: int, seed: int) -> None:
    model, target, _ = heads(seed=seed, temperature=1.0)
    lq = dense_logp(target.leaves[0])
    few, more = (stored(lq, top(lq, n), temperature=1.0) for n in (k, k + 1))
    for divergence in (ForwardKL(), ReverseKL(), JensenShannon(0.1), TotalVariation(), get("hellinger")):
        wants = [Want(divergence, i) for i in range(3)]
        coarse, finer, full = functionals(model, wants, [few, more, target]).detach()
        assert bool((coarse >= -1e-12).all())
        assert bool((coarse <= finer + 1e-12).all())
        assert bool((finer <= full + 1e-12).all())


def test_renormalised_is_blind_to_mass_outside() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    lq = logits.log_softmax(-1)
    token = top(lq, 3)
    # The model agrees on the ratio of the kept entries and puts almost everything elsewhere.
    strayed = logits.scatter_add(1, token, torch.full((4, 3), -20.0, dtype=torch.float64)).requires_grad_()
    model = Linear(torch.eye(4, dtype=torch.float64), torch.zeros(9, 4, dtype=torch.float64))
    model = replace(model, weight=strayed.T)
    wants = [Want(ForwardKL(), 0), Want(ForwardKL(), 1)]
    targets = [stored(lq, token, tail, 1.0) for tail in ("bucket", "renormalise")]
    bucket, renormalised = functionals(model, wants, targets)
    assert bool((bucket > 5).all())
    assert renormalised.abs().max() < 1e-12
    (grad,) = torch.autograd.grad(renormalised.sum(), strayed)
    assert grad.abs().max() < 1e-12
    other = stored(lq.roll(1, 1), token, "renormalise", 1.0)
    (grad,) = torch.autograd.grad(functionals(model, [Want(ForwardKL(), 0)], [other]).sum(), strayed)
    assert bool((grad.scatter(1, token, 0.0) == 0).all())
    assert grad.abs().max() > 0.01


def test_one_entry_kept() -> None:
    model, target, _ = heads()
    lp, lq = dense_logp(model), dense_logp(target.leaves[0])
    token = top(lq, 1)
    bucket, renormalised = functionals(
        model, [Want(Reverse, 0), Want(Reverse, 1)], [stored(lq, token), stored(lq, token, "renormalise")]
    )
    p, q = (x.gather(1, token)[:, 0].exp() for x in (lp, lq))
    assert_close(bucket, p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log(), 1e-10)
    assert renormalised.abs().max() < 1e-12


def direct(logits: Tensor) -> Linear:
    """A head whose logits are these."""
    return Linear(torch.eye(logits.shape[0], dtype=logits.dtype), logits.T.contiguous().requires_grad_())


HOSTILE = {
    "peaked": lambda x: x.scatter(1, torch.zeros(len(x), 1, dtype=torch.long), 1e4),
    "floor": lambda x: torch.cat([x[:, :3], torch.full_like(x[:, 3:], -1e4)], 1),
    "large": lambda x: x * 3e3,
}


@pytest.mark.parametrize("p_kind", list(HOSTILE))
@pytest.mark.parametrize("q_kind", list(HOSTILE))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_hostile_logits(p_kind: str, q_kind: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(7)
    p, q = (torch.randn(6, 11, generator=g, dtype=torch.float64) for _ in range(2))
    p, q = HOSTILE[p_kind](p), HOSTILE[q_kind](q.roll(1, 1))
    # The judge sees the logits that the pass sees.
    p, q = p.to(dtype).double(), q.to(dtype).double()
    model, lq = direct(p.to(dtype)), q.log_softmax(-1)
    token = top(lq, 4)
    coarse = stored(lq, token, temperature=1.0)
    formulas: list[tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = [
        (ForwardKL(), FORMULAS["forward_kl"][1]),
        (ReverseKL(), FORMULAS["reverse_kl"][1]),
        (TotalVariation(), FORMULAS["total_variation"][1]),
    ]
    values = functionals(model, [Want(d, 0) for d, _ in formulas], [coarse])
    size = max(p.abs().max().item(), q.abs().max().item())
    tolerance = 4 * torch.finfo(dtype).eps * size + 1e-12
    for (_, formula), got in zip(formulas, values, strict=True):
        leaf = p.clone().requires_grad_()
        expected = formula(pushed(leaf.log_softmax(-1), token, "bucket"), pushed(lq, token, "bucket"))
        assert bool(torch.isfinite(got).all())
        error = (got.double() - expected).abs()
        assert bool((error <= tolerance * (1 + expected.abs())).all())
        (grad,) = torch.autograd.grad(got.sum(), model.weight, retain_graph=True)
        (judge,) = torch.autograd.grad(expected.sum(), leaf)
        assert bool(torch.isfinite(grad).all())
        scale = 1 + expected.abs()[:, None]
        assert bool(((grad.T.double() - judge).abs() <= 10 * tolerance * scale).all())


def test_the_others_are_summed_and_not_subtracted() -> None:
    """A rest of e-40 has a logarithm; 1 minus the rest would be 0 or rounding error, in any dtype."""
    logits = torch.zeros(2, 50)
    logits[:, 0] = 90.0
    model = direct(logits)
    law = TopK(torch.tensor([[-1e-9], [-1e-9]]), torch.tensor([-50.0, -20.0]))
    (kl,) = functionals(model, [Want(ForwardKL(), 0)], [Coarse(torch.zeros(2, 1, dtype=torch.long), law)])
    rest = math.log(49) - 90
    q = torch.tensor([-50.0, -20.0], dtype=torch.float64).exp()
    expected = q * (q.log() - rest) - q  # KL of (1 - q, q) to (1 - r, r) with r far below q, to first order
    assert torch.allclose(kl.double(), expected, rtol=1e-4)


def test_where_the_target_has_nothing_left_the_value_is_infinite_and_the_gradient_0() -> None:
    model, target, _ = heads(bias=False)
    lq = dense_logp(target.leaves[0])
    token = top(lq, 4)
    kept = lq.gather(1, token).log_softmax(-1)
    law = TopK(kept, torch.full((23,), -math.inf), 0.7)
    reverse, forward, js = functionals(
        model, [Want(d, 0) for d in (ReverseKL(), ForwardKL(), JensenShannon())], [Coarse(token, law)]
    )
    assert int(support_violations(reverse)) == 23
    assert bool(torch.isfinite(forward).all())
    assert bool(torch.isfinite(js).all())
    silent = torch.autograd.grad(reverse.sum(), [model.hidden, model.weight], retain_graph=True)
    assert all(bool((g == 0).all()) for g in silent)
    lp = dense_logp(model)
    expected = (kept.exp() * (kept - lp.gather(1, token))).sum(-1)
    assert_close(forward, expected, 1e-10)
    assert_close(grads(forward.sum(), model), grads(expected.sum(), model), 1e-10)


def test_half_precision_operands_and_stores() -> None:
    model, target, _ = heads(dtype=torch.bfloat16, temperature=2.0)
    lp, lq = dense_logp(model), dense_logp(target.leaves[0])
    token = top(lq, 5)
    exact = stored(lq, token, temperature=2.0)
    assert isinstance(exact.law, TopK)
    half = Coarse(token.int(), TopK(exact.law.logp.half(), exact.law.rest.half(), 2.0))
    (got,) = functionals(model, [Want(ReverseKL(), 0)], [half])
    expected = FORMULAS["reverse_kl"][1](pushed(lp, token, "bucket"), pushed(lq, token, "bucket"))
    assert got.dtype == torch.float32
    assert_close(got, expected, 4e-2)
    assert_close(grads(got.sum(), model), grads(expected.sum(), model), 4e-2)


def test_padding_is_in_no_bucket() -> None:
    model, target, _ = heads(vocab=16, target_vocab=19)
    lp, lq = dense_logp(model, 13), dense_logp(target.leaves[0], 12)
    token = torch.tensor([2, 7, 5])
    live = Coarse(token, target, law_vocab=12)
    (got,) = functionals(model, [Want(ReverseKL(), 0)], [live], vocab=13)
    expected = FORMULAS["reverse_kl"][1](pushed(lp, token, "bucket"), pushed(lq, token, "bucket"))
    assert_close(got, expected, 1e-10)
    gradient = grads(got.sum(), model)
    assert_close(gradient, grads(expected.sum(), model), 1e-10)
    assert gradient[1][13:].abs().max() == 0
    # The same head as an ordinary target beside it keeps its own number of entries.
    both = functionals(model, [Want(ReverseKL(), 0), Want(ReverseKL(), 1)], [live, target], vocab=13)
    assert_close(both[0], got, 1e-12)
    whole = FORMULAS["reverse_kl"][1](lp, dense_logp(target.leaves[0], 13))
    assert_close(both[1], whole, 1e-10)


def test_entries_that_the_target_numbers_differently() -> None:
    model, target, _ = heads()
    leaf = target.leaves[0]
    order = torch.randperm(13, generator=torch.Generator().manual_seed(2))
    assert leaf.bias is not None
    moved = TargetRows((replace(leaf, weight=leaf.weight[order], bias=leaf.bias[order]),))
    here = torch.tensor([4, 9, 1, 12])
    there = order.argsort()[here]
    wants = [Want(ReverseKL(), 0)]
    expected = functionals(model, wants, [Coarse(here, target)])
    assert_close(functionals(model, wants, [Coarse(here, moved, law_token=there)]), expected, 1e-12)
    rows = here.expand(23, -1)
    assert_close(functionals(model, wants, [Coarse(rows, moved, law_token=there.expand(23, -1))]), expected, 1e-12)
    assert not torch.allclose(functionals(model, wants, [Coarse(here, moved)]), expected)


TOP = TopK(torch.zeros(23, 2), torch.zeros(23), 0.7)
PAIR = torch.tensor([[0, 1]]).expand(23, 2)


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda t: Coarse(torch.tensor([[1, 1]]).expand(23, 2), TOP), ModelError, "kept twice"),
        (lambda t: Coarse(PAIR + 12, TOP), ModelError, "outside the model's vocabulary of 13"),
        (lambda t: Coarse(PAIR - 1, TOP), ModelError, "outside the model's vocabulary"),
        (lambda t: Coarse(PAIR[:22], TOP), ModelError, "22 rows"),
        (lambda t: Coarse(PAIR, TopK(torch.zeros(22, 2), torch.zeros(22), 0.7)), ModelError, "22 rows"),
        (lambda t: Coarse(PAIR, replace(TOP, temperature=1.0)), RecipeError, "temperature 1 and cannot"),
        (lambda t: Coarse(PAIR, TopK(torch.zeros(23, 3), torch.zeros(23))), ModelError, "3 log-probs a row"),
        (lambda t: TopK(torch.zeros(23, 3), torch.zeros(22)), ModelError, "the rest"),
        (lambda t: Coarse(PAIR.float(), TOP), ModelError, "integers"),
        (lambda t: Coarse(PAIR, TOP, tail="none"), RecipeError, '"bucket" or "renormalise"'),  # type: ignore[arg-type]
        (lambda t: Coarse(PAIR, TOP, law_vocab=5), RecipeError, "no vocabulary of its own"),
        (lambda t: Coarse(PAIR, t, law_token=torch.tensor([0, 1])), ModelError, "same shape"),
        (lambda t: Coarse(torch.tensor([0, 12]), t, law_vocab=12), ModelError, "outside the target's vocabulary of 12"),
        (lambda t: Coarse(torch.tensor([0, 12]), t, law_vocab=14), ModelError, "law_vocab="),
    ],
)
def test_operands_that_do_not_fit_are_refused(build: Any, error: type[LeiblerError], says: str) -> None:
    model, target, _ = heads()
    with pytest.raises(error, match=says):
        functionals(model, [Want(ReverseKL(), 0)], [build(target)])
