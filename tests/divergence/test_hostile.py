"""Rows that break straightforward code: huge logits, excluded entries, one-hot rows, low precision."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from divergence.brute import EVERY, brute
from leibler.divergence import (
    Alpha,
    CauchySchwarz,
    ChiSquared,
    Divergence,
    ForwardKL,
    Hellinger,
    Jeffreys,
    JensenShannon,
    Renyi,
    ReverseChiSquared,
    ReverseKL,
    RowFunction,
    SkewForwardKL,
    SkewReverseKL,
    TotalVariation,
    Tsallis,
)

INF = math.inf
VOCAB = 40


def noise(seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def one_hot(entry: int, floor: float = -INF) -> Tensor:
    row = torch.full((VOCAB,), floor)
    row[entry] = 0.0
    return row


def cut(row: Tensor, first: int, last: int) -> Tensor:
    row = row.clone()
    row[first:last] = -INF
    return row


PEAKED = noise(1) + 20.0 * (torch.arange(VOCAB) < 3)
ROWS: dict[str, tuple[Tensor, Tensor]] = {
    "identical": (noise(1), noise(1)),
    "identical up to a constant": (noise(1), noise(1) + 100.0),
    "close": (noise(1), noise(1) + 1e-3 * noise(2)),
    "both huge": (noise(1, 1e4), noise(2, 1e4)),
    "huge model": (noise(1, 1e4), noise(2)),
    "huge target": (noise(1), noise(2, 1e4)),
    "same one-hot": (one_hot(3), one_hot(3)),
    "disjoint one-hot": (one_hot(3), one_hot(4)),
    "one-hot model": (one_hot(3), noise(2)),
    "one-hot target": (noise(1), one_hot(3)),
    "differences of 1e4": (one_hot(3, -1e4), one_hot(4, -1e4)),
    "same peak, other depths": (one_hot(3, -1e4), one_hot(3, -5e3)),
    "ratios that overflow exp": (one_hot(3, -100.0), one_hot(3, -4.6)),
    "ratios that overflow 1/exp": (one_hot(3, -4.6), one_hot(3, -100.0)),
    "excluded in both": (cut(noise(1), 5, 15), cut(noise(2), 5, 15)),
    "excluded in the model": (cut(noise(1), 5, 15), noise(2)),
    "excluded in the target": (noise(1), cut(noise(2), 5, 15)),
    "excluded here and there": (cut(noise(1), 5, 15), cut(noise(2), 10, 20)),
    "disjoint supports": (cut(noise(1), 0, 20), cut(noise(2), 20, 40)),
    "a light entry excluded in the target": (PEAKED, cut(PEAKED, 30, 31)),
    "a light entry excluded in the model": (cut(PEAKED, 30, 31), PEAKED),
    "an underflowing entry excluded in the target": (one_hot(3, -200.0), cut(one_hot(3, -200.0), 30, 31)),
    "bfloat16": (noise(1, 3.0).bfloat16(), noise(2, 3.0).bfloat16()),
    "float16": (noise(1).half(), noise(2).half()),
}
each = pytest.mark.parametrize("divergence", EVERY, ids=str)


def evaluate(divergence: Divergence, model: Tensor, target: Tensor) -> tuple[float, Tensor]:
    leaf = model.clone().requires_grad_()
    value = divergence(leaf, target)
    return value.item(), torch.autograd.grad(value, leaf)[0]


def shaky(divergence: Divergence) -> float:
    """What the judge itself loses near an order of 0 or 1, where it divides a small logarithm by a small number."""
    inner = getattr(divergence, "divergence", divergence)
    order = getattr(inner, "alpha", 0.5)
    return 100 * 2.0**-52 / max(abs(order * (order - 1.0)), 1e-3) if isinstance(inner, Alpha | Renyi) else 0.0


@each
@pytest.mark.parametrize("double", [False, True], ids=["own dtype", "float64"])
def test_right_value_and_finite_gradient(divergence: Divergence, double: bool) -> None:
    for name, (model, target) in ROWS.items():
        if double:
            model, target = model.double(), target.double()
        value, gradient = evaluate(divergence, model, target)
        wanted = brute(divergence, model[None], target[None]).item()
        assert gradient.isfinite().all(), name
        assert value >= 0.0, name
        faint = "light entry" in name or "underflowing" in name
        if "Adaptive" in str(divergence) and faint and not double:
            continue  # the infinite side's weight is 1e-9 or less: it rounds to 0 and the side takes no part
        if math.isinf(wanted):
            assert value == INF, name
            assert not gradient.any(), name
            continue
        computed = torch.float64 if double else torch.float32
        if value == INF:
            assert wanted > torch.finfo(computed).max, name
            continue
        eps = torch.finfo(computed).eps
        largest = max(row[row > -INF].abs().max().item() for row in (model, target))
        # Logits of size L are known to eps L; powers and orders near 0 and 1 multiply that.
        relative = 1e-8 if double else 1e-5 + 10 * eps * largest
        absolute = 8 * eps * largest + 10 * eps + shaky(divergence)
        assert value == pytest.approx(wanted, rel=relative, abs=absolute), name


@each
def test_hostile_rows_do_not_touch_each_other(divergence: Divergence) -> None:
    model, target = (torch.stack([pair[side].float() for pair in ROWS.values()]) for side in (0, 1))
    leaf = model.requires_grad_()
    values = divergence(leaf, target)
    (gradient,) = torch.autograd.grad(values.sum(), leaf)
    for row in range(len(ROWS)):
        alone, alone_gradient = evaluate(divergence, model[row].detach(), target[row])
        assert values[row].item() == pytest.approx(alone, rel=1e-5, abs=1e-7)
        assert (gradient[row] - alone_gradient).norm() <= 1e-5 * alone_gradient.norm() + 1e-7


@each
def test_excluded_in_both_is_the_same_as_absent(divergence: Divergence) -> None:
    model, target = noise(1).double(), noise(2).double()
    keep = torch.ones(VOCAB, dtype=torch.bool)
    keep[5:15] = False
    value, gradient = evaluate(divergence, model.masked_fill(~keep, -INF), target.masked_fill(~keep, -INF))
    wanted, wanted_gradient = evaluate(divergence, model[keep], target[keep])
    assert value == pytest.approx(wanted, rel=1e-12)
    torch.testing.assert_close(gradient[keep], wanted_gradient)
    assert not gradient[~keep].any()


@each
def test_identical_rows_give_exactly_zero(divergence: Divergence) -> None:
    for row in (noise(1), noise(1, 1e4), one_hot(3), cut(noise(1), 5, 15), noise(1).bfloat16()):
        value, gradient = evaluate(divergence, row, row)
        assert value == 0.0
        assert math.copysign(1.0, value) == 1.0, "-0.0"
        assert gradient.abs().max() < 1e-6


# The direction of every divergence: model (first) against a target inside its support, and the other way round.
INSIDE = {
    ForwardKL(): (True, False),
    ReverseKL(): (False, True),
    Jeffreys(): (False, False),
    JensenShannon(): (True, True),
    SkewForwardKL(): (True, True),
    SkewForwardKL(0.0): (True, False),
    SkewReverseKL(): (True, True),
    SkewReverseKL(0.0): (False, True),
    Alpha(0.5): (True, True),
    Alpha(0.0): (True, False),
    Alpha(-0.5): (True, False),
    Alpha(1.0): (False, True),
    Alpha(1.5): (False, True),
    Tsallis(2.0): (False, True),
    Tsallis(0.5): (True, True),
    Renyi(2.0): (False, True),
    Renyi(1.0): (False, True),
    Renyi(0.5): (True, True),
    ChiSquared(): (False, True),
    ReverseChiSquared(): (True, False),
    Hellinger(): (True, True),
    TotalVariation(): (True, True),
    CauchySchwarz(): (True, True),
}


@pytest.mark.parametrize("divergence", INSIDE, ids=str)
def test_direction(divergence: Divergence) -> None:
    wide, narrow = noise(1), cut(noise(2), 5, 15)
    for (model, target), finite in zip([(wide, narrow), (narrow, wide)], INSIDE[divergence]):
        value, gradient = evaluate(divergence, model, target)
        assert math.isfinite(value) is finite
        assert bool(gradient.any()) is finite


def test_finite_where_the_support_holds_though_the_kernel_sees_tiny_weights() -> None:
    # q = e^-60 where p = 0: 1e-26 * FLOOR looks like a small number, but the divergence is infinite.
    model, target = torch.tensor([0.0, -INF]), torch.tensor([0.0, -60.0])
    assert ForwardKL()(model, target).item() == INF
    assert ReverseKL()(target, model).item() == INF
    assert ReverseChiSquared()(model, target).item() == INF
    # Orders just outside [0, 1] take a mean of expm1, in which an entry of weight e^-200 does not appear at all.
    target = torch.tensor([0.0, -200.0])
    assert Alpha(-0.003)(model, target).item() == INF
    assert Alpha(1.003)(target, model).item() == INF
    assert Alpha(0.003)(model, target).item() < 1e-9


def test_masks_by_the_lowest_float_count_as_excluded() -> None:
    model, target = noise(1), cut(noise(2), 5, 15)
    lowest = target.masked_fill(target == -INF, torch.finfo(torch.float32).min)
    for temperature in (1.0, 0.1, 10.0):
        assert ForwardKL()(model, lowest, temperature).item() == ForwardKL()(model, target, temperature).item()
        assert ReverseKL()(model, lowest, temperature).item() == INF


def test_overflow_of_chi_squared_is_infinite_and_renyi_is_not() -> None:
    model, target = one_hot(3, -1e4), one_hot(4, -1e4)
    value, gradient = evaluate(ChiSquared(), model, target)
    assert value == INF
    assert not gradient.any()
    assert Renyi(2.0)(model, target).item() == pytest.approx(1e4, rel=1e-5)


def test_large_finite_values_are_not_taken_for_infinite() -> None:
    model, target = torch.tensor([0.0, -60.0]), torch.tensor([-60.0, 0.0])
    value, gradient = evaluate(ChiSquared(), model, target)
    assert value == pytest.approx(math.exp(60.0), rel=1e-4)
    assert gradient.any()


def test_user_functions_are_safe_too() -> None:
    reverse = RowFunction(lambda logp, logq: (logp.exp() * (logp - logq)).sum(-1))
    for name in ROWS:
        model, target = (row.double() for row in ROWS[name])
        value, gradient = evaluate(reverse, model, target)
        wanted, wanted_gradient = evaluate(ReverseKL(), model, target)
        if name == "an underflowing entry excluded in the target":
            continue  # p = e^-200 times the floor's 1e30 is 1e-57: such a user function cannot know
        assert value == pytest.approx(wanted, rel=1e-9, abs=1e-9)
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-6, atol=1e-9)


def test_user_functions_with_infinite_slopes() -> None:
    # d sqrt(p) / d log p is 0 * inf at p = 0: excluded entries do not move, whatever autograd says of them.
    hellinger = RowFunction(lambda logp, logq: (logp.exp().sqrt() - logq.exp().sqrt()).square().sum(-1))
    model, target = (row.double() for row in ROWS["excluded here and there"])
    value, gradient = evaluate(hellinger, model, target)
    wanted, wanted_gradient = evaluate(Hellinger(), model, target)
    assert value == pytest.approx(wanted)
    torch.testing.assert_close(gradient, wanted_gradient)


def test_user_functions_with_infinite_values() -> None:
    chi = RowFunction(lambda logp, logq: ((logp.exp() - logq.exp()).square() / logq.exp()).sum(-1))
    value, gradient = evaluate(chi, noise(1).double(), cut(noise(2), 5, 15).double())
    assert value == INF
    assert not gradient.any()
