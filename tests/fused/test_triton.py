"""The Triton kernels against float64 brute force, in Triton's interpreter (on a GPU with ``TRITON_INTERPRET=0``)."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fused.helpers import FOUR, assert_close, dense_logp, four, grads, heads
from fused.test_named import FORMULAS
from leibler.divergence import (
    AdaptiveKL,
    Alpha,
    BandKL,
    CauchySchwarz,
    Divergence,
    Entropy,
    ForwardKL,
    JensenShannon,
    Power,
    Renyi,
    ReverseKL,
    RowFunction,
    SampledLogProb,
    SkewForwardKL,
    SkewReverseKL,
    SumForm,
    Swapped,
    get,
)
from leibler.fused import Linear, TargetRows, Want, functionals, linear_divergence, one_pass, support_violations
from leibler.fused import sweep as sweep_module
from leibler.fused.gpu import generate, kernels, trace

triton = pytest.importorskip("triton", reason="Triton has no build for this platform")
INTERPRETED = triton.knobs.runtime.interpret
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip("without a GPU the kernels need TRITON_INTERPRET=1", allow_module_level=True)
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # NumPy, where a GPU says inf or NaN
BY_PYTORCH = ("adaptive_kl", "band_kl")
"""Divergences whose head or band a kernel would have to find first: they have none."""
KERNELS = [name for name in FORMULAS if name not in BY_PYTORCH]


@pytest.fixture
def kernel_path(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Kernels wherever they can, two tiles for a small vocabulary, chunks of three tokens; counts the chunks."""
    chunks: list[int] = []
    monkeypatch.setattr(kernels, "usable", lambda device: True)
    monkeypatch.setattr(generate, "BLOCK", 16)
    monkeypatch.setattr(sweep_module, "kernel_chunk", lambda *a, **k: 3)
    values = kernels.Kernels.values

    def counted(self: kernels.Kernels, start: int, stop: int) -> Tensor:
        chunks.append(stop - start)
        return values(self, start, stop)

    monkeypatch.setattr(kernels.Kernels, "values", counted)
    return chunks


def made(n: int = 5, vocab: int = 19, **options: Any) -> tuple[Linear, TargetRows, Tensor]:
    """Small heads on the device where the kernels run."""
    options = {"dtype": torch.float32, "hidden": 4, "temperature": 3.0} | options
    model, target, token = heads(n, vocab=vocab, **options)

    def moved(t: Tensor | None) -> Tensor | None:
        return None if t is None else t.detach().to(DEVICE).requires_grad_(t.requires_grad)

    def there(head: Linear) -> Linear:
        return Linear(*map(moved, (head.hidden, head.weight, head.bias)), head.temperature)  # type: ignore[arg-type]

    return there(model), TargetRows(tuple(map(there, target.leaves))), token.to(DEVICE)


def by_logits(model: Tensor, target: Tensor, **options: Any) -> tuple[Linear, TargetRows]:
    """Heads whose logits are the given rows: the weight is the identity."""
    eye = torch.eye(model.shape[1], device=DEVICE)
    masks = [options.get(name) for name in ("model_bias", "target_bias")]
    masks = [None if m is None else m.to(DEVICE) for m in masks]
    leaf = Linear(target.to(DEVICE), eye, masks[1])
    return Linear(model.to(DEVICE).requires_grad_(), eye, masks[0]), TargetRows((leaf,))


# --- every divergence -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", KERNELS)
def test_value_and_gradients(name: str, kernel_path: list[int]) -> None:
    model, target, _ = made()
    leaf = target.leaves[0]
    params, formula = FORMULAS[name]
    weight = torch.tensor([0.5, 1.0, 0.0, 2.0, 1.5], device=DEVICE)
    out = linear_divergence(
        model.hidden,
        model.weight,
        leaf.hidden,
        leaf.weight,
        get(name, **params),
        model_bias=model.bias,
        target_bias=leaf.bias,
        temperature=3.0,
        weight=weight,
    )
    assert kernel_path == [3, 1]
    expected = (formula(dense_logp(model), dense_logp(leaf)) * weight.double()).sum() / weight.double().sum()
    assert_close(out.detach(), expected.detach(), 3e-6)
    assert_close(grads(out, model), grads(expected, model), 5e-6)


def hostile() -> tuple[Tensor, Tensor]:
    """Rows that break formulas: equal, opposite, disjoint, one entry only, far from 0, a target without a tail."""
    g = torch.Generator().manual_seed(1)
    base = (torch.randn(12, generator=g) * 64).round() / 64  # so that adding 8 rounds nothing
    one = torch.full((12,), -50.0).index_fill(0, torch.tensor([3]), 50.0)
    spike = torch.zeros(12).index_fill(0, torch.tensor([0]), 1e4)
    rows = [
        (base, base),
        (base, base + 8.0),
        (10 * base, -10 * base),
        (spike, spike.roll(1)),
        (-spike, spike),
        (one, base),
        (base, one),
        (1e4 + base, 1e4 - base),
        (torch.zeros(12), torch.zeros(12)),
    ]
    return torch.stack([a for a, _ in rows]), torch.stack([b for _, b in rows])


def judged(d: Divergence, model: Linear, target: TargetRows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Values and gradients by the logits (weight: the identity) of the finite rows, from kernels and in float64."""
    (leaf,) = target.leaves
    logits = model.hidden.detach().double().requires_grad_()
    rows = [logits, leaf.hidden.double()]
    for k, bias in enumerate((model.bias, leaf.bias)):
        rows[k] = rows[k] if bias is None else rows[k] + bias.double()
    judge = d(*rows)
    # What float64 can still write down may overflow in float32: a power of a ratio.
    finite = judge < 1e15

    def loss(values: Tensor, index: Tensor) -> Tensor:
        return torch.where(finite[index], values[0], 0)

    total, values = one_pass(model, [Want(d, 0)], [target], loss)
    (got,) = torch.autograd.grad(total, model.hidden)
    (expected,) = torch.autograd.grad(torch.where(finite, judge, 0).sum(), logits)
    return values[0].double(), judge.detach(), got.double(), expected


@pytest.mark.parametrize("name", KERNELS)
def test_hostile_rows_as_in_float64(name: str, kernel_path: list[int]) -> None:
    model, target = by_logits(*hostile())
    value, judge, got, expected = judged(get(name, **FORMULAS[name][0]), model, target)
    assert kernel_path == [3, 3, 3]
    finite = judge < 1e15
    assert bool((finite | (value > 1e15)).all())
    assert not value.isnan().any()
    largest = 1.0 + torch.maximum(model.hidden.detach(), target.leaves[0].hidden).abs().amax(-1).double()
    assert bool(((value - judge).abs() <= 1e-5 * judge.abs() + 1e-6 * largest)[finite].all()), (value, judge)
    size = expected.abs().amax(-1).clamp(min=1.0)
    assert bool(((got - expected).abs().amax(-1) <= 2e-6 * largest * size).all()), (got - expected).abs().amax(-1)


@pytest.mark.parametrize("name", KERNELS)
def test_close_rows_keep_relative_accuracy(name: str, kernel_path: list[int]) -> None:
    g = torch.Generator().manual_seed(2)
    base = torch.randn(3, 19, generator=g)
    target_rows = base + 3e-3 * torch.randn(3, 19, generator=g) + torch.tensor([[0.0], [3.0], [20.0]])
    value, judge, got, expected = judged(get(name, **FORMULAS[name][0]), *by_logits(base, target_rows))
    assert kernel_path
    assert bool((judge < 3e-3).all())
    # The difference of two logits of size 20 is known to 2e-6, a thousandth of the noise.
    tolerance = torch.tensor([1e-3, 1e-3, 5e-3], dtype=torch.float64, device=DEVICE)
    assert bool(((value - judge).abs() <= tolerance * judge).all()), value / judge
    assert_close(got, expected, 5e-3)


@pytest.mark.parametrize("order", [1e-4, 1 - 5e-3, 3.0, -2.0, 1.0])
def test_orders_near_the_limits_and_beyond(order: float, kernel_path: list[int]) -> None:
    model, target, _ = made(2, bias=False)
    wants = [Want(Alpha(order), 0), Want(Swapped(Power(order, 2.0, log=True)), 0)]
    values = functionals(model, wants, [target])
    assert kernel_path
    leaf = (model.hidden.detach().double() @ model.weight.detach().double().T / 3.0).requires_grad_()
    other = target.leaves[0].hidden.double() @ target.leaves[0].weight.double().T / 3.0
    judge = torch.stack([w.functional(leaf, other) for w in wants])  # type: ignore[operator]
    assert_close(values.detach(), judge.detach(), 1e-5)
    (h,) = torch.autograd.grad(judge.sum(), leaf)
    (got,) = torch.autograd.grad(values.sum(), model.hidden)
    assert_close(got, h @ model.weight.detach().double() / 3.0, 1e-5)


@pytest.mark.parametrize("d", [SkewForwardKL(0.999), SkewReverseKL(0.999), JensenShannon(0.001), JensenShannon(0.999)])
def test_small_shares_of_a_mixture_keep_their_digits(d: Divergence, kernel_path: list[int]) -> None:
    g = torch.Generator().manual_seed(4)
    value, judge, got, expected = judged(d, *by_logits(*(3 * torch.randn(2, 3, 40, generator=g))))
    assert kernel_path
    assert_close(value / judge, torch.ones_like(judge), 5e-6)
    assert_close(got, expected, 5e-6)


@pytest.mark.parametrize("d", [Renyi(1.0005), Renyi(0.9995), Alpha(5e-4), Alpha(0.9995), Alpha(1.0005)])
def test_orders_near_the_limits_of_rows_far_apart(d: Divergence, kernel_path: list[int]) -> None:
    g = torch.Generator().manual_seed(5)
    value, judge, got, expected = judged(d, *by_logits(*(1000 * torch.randn(2, 3, 40, generator=g))))
    assert kernel_path
    assert_close(value / judge, torch.ones_like(judge), 1e-6)
    # The model's rows have nearly all their mass in one entry: what is rounded is of the size of the value.
    assert bool(((got - expected).abs().amax(-1) <= 1e-6 * judge).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_products(dtype: torch.dtype, kernel_path: list[int]) -> None:
    model, target, _ = made(dtype=dtype)
    wants = [Want(JensenShannon(0.1), 0), Want(ReverseKL(), 0)]
    total, values = one_pass(model, wants, [target], lambda v, i: v.sum(0) / 1000)
    assert kernel_path == [3, 2]
    # The judge sees the logits as the products round them; what is left is the rounding of the gradient.
    logits = []
    for head in (model, target.leaves[0]):
        rounded = (head.hidden @ head.weight.T).double().detach()
        assert head.bias is not None
        logits.append(((rounded + head.bias.detach().double()) / 3.0).requires_grad_())
    judge = torch.stack([w.functional(*logits) for w in wants])  # type: ignore[operator]
    assert_close(values, judge.detach(), 2e-5)
    (g,) = torch.autograd.grad(judge.sum() / 1000, logits[0])
    got = grads(total, model)
    eps = torch.finfo(dtype).eps
    assert [t.dtype for t in got] == [dtype] * 3
    expected = [g @ model.weight.detach().double(), g.T @ model.hidden.detach().double(), g.sum(0) * 1.0]
    assert_close([t.double() for t in got], [expected[0] / 3, expected[1] / 3, expected[2] / 3], 4 * eps)


# --- several functionals ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("engine", ["functionals", "one_pass"])
def test_several_functionals_and_silent_tokens(engine: str, kernel_path: list[int]) -> None:
    model, target, token = made(temperature=0.7)
    off = torch.tensor([False, True, False, False, True], device=DEVICE)
    wants = [Want(SampledLogProb()), Want(Entropy()), Want(ReverseKL(), 0), Want(ForwardKL(), 0)]
    assert len(wants) == len(FOUR)

    def loss(values: Tensor, index: Tensor) -> Tensor:
        lp, h, reverse, forward = values
        return torch.where(off[index], 0, lp.exp() - 0.1 * h + reverse * forward)

    expected = four(model, target, token)
    judge = grads(loss(expected, torch.arange(5, device=DEVICE)).sum(), model)
    with torch.no_grad():
        model.hidden[1] = math.nan  # a silent token may hold anything
    if engine == "one_pass":
        total, values = one_pass(model, wants, [target], loss, token=token)
    else:
        values = functionals(model, wants, [target], token=token)
        total = loss(values, torch.arange(5, device=DEVICE)).sum()
    assert kernel_path
    assert_close(values.detach()[:, [0, 2, 3, 4]], expected.detach()[:, [0, 2, 3, 4]], 5e-6)
    assert bool(values[:, 1].isnan().all())
    got = grads(total, model)
    assert_close(got, judge, 5e-6)
    assert got[0][off].abs().max() == 0


def test_two_targets_one_of_them_the_model_itself(kernel_path: list[int]) -> None:
    model, target, _ = made()
    frozen = Linear(model.hidden.detach(), model.weight.detach(), model.bias, model.temperature)
    wants = [Want(ReverseKL(), 1), Want(JensenShannon(), 0), Want(CauchySchwarz(), 1)]
    values = functionals(model, wants, [target, TargetRows((frozen,))])
    assert kernel_path
    assert values[[0, 2]].detach().abs().max() < 1e-12
    lp, lq = dense_logp(model), dense_logp(target.leaves[0])
    m = ((lp.exp() + lq.exp()) / 2).log()
    js = ((lp.exp() * (lp - m)).sum(-1) + (lq.exp() * (lq - m)).sum(-1)) / 2
    assert_close(values[1].detach(), js.detach(), 5e-6)
    assert_close(grads(values.sum(), model), grads(js.sum(), model), 5e-6)


def test_a_frozen_head_gives_hidden_gradients_alone(kernel_path: list[int]) -> None:
    model, target, _ = made(bias=False)
    weight, leaf = model.weight.detach(), target.leaves[0]
    out = linear_divergence(
        model.hidden, weight, leaf.hidden, leaf.weight, JensenShannon(), temperature=3.0, reduction="none"
    )
    assert kernel_path == [3, 2]
    judge = JensenShannon()(dense_logp(model), dense_logp(leaf))
    cotangent = torch.linspace(-1, 1, 5, device=DEVICE)
    (got,) = torch.autograd.grad((out * cotangent).sum(), model.hidden)
    (expected,) = torch.autograd.grad((judge * cotangent).sum(), model.hidden)
    assert_close(got, expected, 5e-6)


# --- supports ---------------------------------------------------------------------------------------------------------
def test_padding_is_left_out_on_both_sides(kernel_path: list[int]) -> None:
    model, target, token = made(vocab=22, target_vocab=25)
    token = token % 17
    wants = [Want(SampledLogProb()), Want(Entropy()), Want(ReverseKL(), 0), Want(ForwardKL(), 0)]
    values = functionals(model, wants, [target], token=token, vocab=17)
    lp, lq = dense_logp(model, 17), dense_logp(target.leaves[0], 17)
    expected = torch.stack(
        [
            lp.gather(1, token[:, None])[:, 0],
            -(lp.exp() * lp).sum(-1),
            (lp.exp() * (lp - lq)).sum(-1),
            (lq.exp() * (lq - lp)).sum(-1),
        ]
    )
    assert kernel_path
    assert_close(values.detach(), expected.detach(), 5e-6)
    got = grads(values.sum(), model)
    assert_close(got, grads(expected.sum(), model), 5e-6)
    assert got[1][17:].abs().max() == got[2][17:].abs().max() == 0


@pytest.mark.parametrize("lacking", ["both", "model", "target"])
@pytest.mark.parametrize("name", KERNELS)
def test_entries_outside_a_support(name: str, lacking: str, kernel_path: list[int]) -> None:
    g = torch.Generator().manual_seed(3)
    gone = torch.zeros(19).index_fill(0, torch.tensor([1, 17]), -math.inf)
    biases = {f"{side}_bias": gone for side in ("model", "target") if lacking in (side, "both")}
    model, target = by_logits(torch.randn(2, 19, generator=g), torch.randn(2, 19, generator=g), **biases)
    value, judge, got, expected = judged(get(name, **FORMULAS[name][0]), model, target)
    assert kernel_path == [2]
    assert torch.equal(value.isinf(), judge.isinf())
    if lacking == "both":
        assert bool(judge.isfinite().all())
    finite = judge.isfinite()
    assert_close(value[finite], judge[finite], 1e-5)
    assert_close(got, expected, 1e-5)
    if lacking != "target":
        assert got[:, [1, 17]].abs().max() == 0


def test_an_infinite_value_leaves_the_others_alone(kernel_path: list[int]) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [1.0, 0.0, 0.5]])
    gone = torch.tensor([0.0, -math.inf, 0.0])
    model, target = by_logits(logits, logits.flip(0), target_bias=gone)
    values = functionals(model, [Want(ReverseKL(), 0), Want(ForwardKL(), 0)], [target])
    assert kernel_path
    assert support_violations(values).tolist() == [2, 0]
    (alone,) = torch.autograd.grad(values[1].sum(), model.hidden, retain_graph=True)
    (together,) = torch.autograd.grad(values.sum(), model.hidden, retain_graph=True)
    assert alone.abs().max() > 0
    assert torch.equal(alone, together)
    assert torch.autograd.grad(values[0].sum(), model.hidden)[0].abs().max() == 0


@pytest.mark.parametrize(("lacking", "names"), [("model", ["forward_kl"]), ("target", ["reverse_kl", "jeffreys"])])
def test_a_lack_counts_where_the_probability_underflows(lacking: str, names: list[str], kernel_path: list[int]) -> None:
    """An entry of probability exp(-300) is 0 in float32, yet inside the support: the value is infinite."""
    faint, plain = torch.tensor([[-300.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 0.5]])
    gone = torch.tensor([-math.inf, 0.0, 0.0])
    rows = (plain, faint) if lacking == "model" else (faint, plain)
    model, target = by_logits(*rows, **{f"{lacking}_bias": gone})
    values = functionals(model, [Want(get(name), 0) for name in names], [target])
    assert kernel_path
    assert values.isinf().all()


def test_disjoint_supports_are_infinitely_far_in_angle(kernel_path: list[int]) -> None:
    gone = torch.tensor([-math.inf, 0.0, 0.0])
    rows = torch.tensor([[0.0, 50.0, 0.0]]), torch.tensor([[0.0, 1.0, 2.0]])
    model, target = by_logits(*rows, model_bias=gone, target_bias=torch.tensor([0.0, -math.inf, -math.inf]))
    assert functionals(model, [Want(CauchySchwarz(), 0)], [target]).item() == math.inf
    assert kernel_path


def test_an_overflow_leaves_the_others_alone(kernel_path: list[int]) -> None:
    """0 times an infinite gradient is NaN: a functional without weight must not be added at all."""
    model, target = by_logits(torch.tensor([[0.0, 300.0, 0.0]]), torch.tensor([[300.0, 0.0, 1.0]]))
    chi, js = functionals(model, [Want(get("chi_squared"), 0), Want(get("total_variation"), 0)], [target])
    assert kernel_path
    assert chi.item() == math.inf
    (got,) = torch.autograd.grad((chi + js).sum(), model.hidden)
    assert torch.isfinite(got).all()


def test_a_token_outside_the_support(kernel_path: list[int]) -> None:
    logits = torch.zeros(2, 5)
    gone = torch.tensor([0.0, -math.inf, 0.0, 0.0, 0.0])
    model, _ = by_logits(logits, logits, model_bias=gone)
    token = torch.tensor([1, 2], device=DEVICE)
    values = functionals(model, [Want(SampledLogProb()), Want(Entropy())], token=token)
    assert kernel_path
    assert values[0].tolist() == [-math.inf, pytest.approx(-math.log(4))]
    (got,) = torch.autograd.grad(values[0].sum(), model.hidden)
    assert got[0].abs().max() == 0
    assert_close(got[1].cpu(), torch.tensor([-0.25, 0.0, 0.75, -0.25, -0.25]), 1e-6)


# --- a user's own -----------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Everything(SumForm):
    """Many operations, differentiated by autograd; two sums that do not enter linearly."""

    shift: float = 0.3

    def summands(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        p, q = logp.exp(), logq.exp()
        gap = torch.where(logp > logq, torch.log1p(p) - torch.expm1(-q), (p + q).sqrt() * self.shift)
        smooth = torch.sigmoid(p - q) * torch.tanh(q) + torch.logaddexp(logp.clamp(-30, 0), logq.clamp(min=-30)) * q
        rough = (p - q).abs().clamp(max=0.1) ** 3 + torch.maximum(p, q).pow(1.5) + p.masked_fill(p < 0.02, 0.0)
        own = torch.nn.functional.softplus(p * 4) * torch.sign(q - p) / (1 + p.square())
        own.add_(torch.relu(p - 0.05), alpha=2.0)
        return gap * p + smooth, rough + own

    def combine(self, sums: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        a, b = sums
        return a * b.exp(), (b.exp(), a * b.exp())


@dataclass(frozen=True)
class Squares(SumForm):
    """``sum (p - q)^2`` with its derivative by hand."""

    def summands(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        return ((logp.exp() - logq.exp()).square(),)

    def derivatives(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        return (2 * logp.exp() * (logp.exp() - logq.exp()),)

    def combine(self, sums: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return sums[0], (torch.ones_like(sums[0]),)


@dataclass(frozen=True)
class SizeReader(Squares):
    """Reads the size of the vocabulary, which a kernel made for another size would get wrong."""

    def summands(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        return ((logp.exp() - logq.exp()).square() * logp.shape[-1],)

    def derivatives(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        return (2 * logp.exp() * (logp.exp() - logq.exp()) * logp.shape[-1],)


@dataclass(frozen=True)
class AboveMean(Squares):
    """Needs a number of the whole row first."""

    def prelude(self, logp: Tensor, logq: Tensor) -> Tensor:
        return logq.mean(-1, keepdim=True)

    def summands(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        return ((logp.exp() - logq.exp()).square() * (logq > prelude),)

    def derivatives(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        return (2 * logp.exp() * (logp.exp() - logq.exp()) * (logq > prelude),)


@pytest.mark.parametrize("own", [Everything(), Squares()], ids=lambda d: type(d).__name__)
def test_sums_of_ones_own(own: SumForm, kernel_path: list[int]) -> None:
    model, target, _ = made()
    values = functionals(model, [Want(own, 0)], [target])[0]
    assert kernel_path == [3, 2]
    judge = own(dense_logp(model), dense_logp(target.leaves[0]))
    assert_close(values.detach(), judge.detach(), 1e-5)
    assert_close(grads(values.sum(), model), grads(judge.sum(), model), 1e-5)


class Doubled(ForwardKL):
    """A divergence that computes otherwise than its parent, which has a kernel."""

    def _value(self, model: Any, target: Any) -> tuple[Tensor, Any]:
        values, saved = super()._value(model, target)
        return 2 * values, saved

    def _add_gradient(self, grad: Tensor, coefficient: Tensor, model: Any, target: Any, saved: Any) -> None:
        super()._add_gradient(grad, 2 * coefficient, model, target, saved)


UNFIT = [
    Doubled(),
    SizeReader(),
    AboveMean(),
    AdaptiveKL(),
    BandKL(),
    RowFunction(lambda p, q: (p.exp() - q.exp()).square().sum(-1)),
]


@pytest.mark.parametrize("own", UNFIT, ids=lambda d: type(d).__name__)
def test_what_no_kernel_can_do_is_left_to_pytorch(own: Divergence, kernel_path: list[int]) -> None:
    model, target, _ = made()
    values = functionals(model, [Want(ForwardKL(), 0), Want(own, 0)], [target])
    assert kernel_path == []
    judge = own(dense_logp(model), dense_logp(target.leaves[0]))
    assert_close(values[1].detach(), judge.detach(), 1e-5)
    assert_close(grads(values[1].sum(), model), grads(judge.sum(), model), 1e-5)


def test_other_operands_are_left_to_pytorch(kernel_path: list[int]) -> None:
    exact, target, _ = made(dtype=torch.float64)
    functionals(exact, [Want(ForwardKL(), 0)], [target])
    model, target, _ = made()
    blend = TargetRows(target.leaves, lambda rows: rows[0] / 2)
    functionals(model, [Want(ForwardKL(), 0)], [blend])
    assert kernel_path == []


def test_the_processor_is_left_to_pytorch() -> None:
    assert not kernels.usable(torch.device("cpu"))


# --- the tracer -------------------------------------------------------------------------------------------------------
PAIR = [("p", "entry"), ("q", "entry")]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda p, q: (p.cumsum(-1),), "cumsum"),
        (lambda p, q: (p - q.mean(-1, keepdim=True),), "mean|sum|div"),
        (lambda p, q: (p / p.shape[-1],), "size"),
        (lambda p, q: (p.double() * q,), "float64"),
        (lambda p, q: (p * torch.tensor([1.0, 2.0, 3.0])[:1],), "tensor"),
        (lambda p, q: (p if bool((p > q).any()) else q,), "data"),
        (lambda p, q: (p.flip(-1),), "flip"),
    ],
)
def test_what_is_not_elementwise_is_refused(function: Any, reason: str) -> None:
    with pytest.raises(trace.NotElementwise, match=reason):
        trace.statements(function, PAIR, "t")


def test_a_captured_number_that_may_change_is_refused() -> None:
    level = torch.tensor(0.5)
    with pytest.raises(trace.NotElementwise, match="tensor"):
        trace.statements(lambda p, q: (p * level,), PAIR, "t")


def test_equal_expressions_are_written_once() -> None:
    lines, names = trace.statements(lambda p, q: ((p - q).exp() + (p - q).exp(),), PAIR, "t")
    assert len(lines) == 3
    assert names == ["t2"]


# --- the compiler -----------------------------------------------------------------------------------------------------
COMPILE = """
import re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from leibler.divergence import *
from leibler.fused.gpu.generate import BLOCK, WARPS, Layout, program

def kinds(name, half):
    if name == "BLOCK": return "constexpr"
    if name in ("model", "gradient") or name.startswith("target"): return half
    if name.startswith("scale"): return "fp32"
    if name == "token": return "*i64"
    if name in ("stats", "sums", "numbers", "units", "out", "factor") or name.startswith("bias"): return "*fp32"
    return "i32"

wants = [((d, 0),) for d in (ForwardKL(), CauchySchwarz(), JensenShannon(), Alpha(3.0))]
wants.append(((SampledLogProb(), None), (Entropy(), None), (ReverseKL(), 0), (TotalVariation(), 0)))
for want in wants:
    made = program(Layout(want, (True, True), len(want) > 1))
    for name in ("values", "gradient", "add_column_sums"):
        kernel = getattr(made.kernels, name)
        signature = {n: kinds(n, "*bf16") for n in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, k in enumerate(signature.values()) if k[0] in "*i"}
        source = ASTSource(kernel, signature, {"BLOCK": BLOCK}, aligned)
        built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
        wide = len(re.findall(r"ld\\.global\\S*\\.v4", built.asm["ptx"]))
        assert len(built.asm["cubin"]) > 1000
        assert name == "add_column_sums" or wide >= 2, (name, wide)
print("compiled")
"""


@pytest.mark.slow
def test_kernels_compile_for_hopper_with_wide_loads(tmp_path: Any) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "compiled", done.stderr[-2000:]
