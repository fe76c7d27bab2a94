"""Values and gradients against the definitions in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from divergence.brute import EVERY, brute
from leibler.divergence import (
    AdaptiveKL,
    Divergence,
    Entropy,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    SampledLogProb,
    SkewForwardKL,
    SkewReverseKL,
    Swapped,
    TotalVariation,
    block_rows,
    to_row,
)

each = pytest.mark.parametrize("divergence", EVERY, ids=str)
SMOOTH = [d for d in EVERY if not isinstance(d, AdaptiveKL) and "Adaptive" not in str(d)]


def draw(seed: int, *shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale).to(dtype)


def pair_at(distance: float, rows: int = 20, vocab: int = 200) -> tuple[Tensor, Tensor]:
    """Two float32 blocks whose log-ratios have about this size (as float64, so both judges see the same numbers)."""
    model = draw(0, rows, vocab).float()
    return model.double(), (model + distance * draw(1, rows, vocab).float()).double()


def with_gradient(divergence: Divergence, model: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = model.clone().requires_grad_()
    values = divergence(leaf, target)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def brute_with_gradient(divergence: Divergence, model: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = model.double().clone().requires_grad_()
    values = brute(divergence, leaf, target.double())
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


def relative(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    if found.dim() == 1:
        return ((found - wanted).abs() / wanted.abs()).max().item()
    return ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max().item()


@each
@pytest.mark.parametrize("distance", [3.0, 0.3])
def test_float64_is_the_definition(divergence: Divergence, distance: float) -> None:
    model, target = pair_at(distance)
    value, gradient = with_gradient(divergence, model, target)
    wanted, wanted_gradient = brute_with_gradient(divergence, model, target)
    assert value.dtype == torch.float64
    assert relative(value, wanted) < 3e-11
    assert relative(gradient, wanted_gradient) < 3e-11


@each
def test_gradients_of_close_rows(divergence: Divergence) -> None:
    model, target = pair_at(1e-2)
    _, gradient = with_gradient(divergence, model, target)
    _, wanted = brute_with_gradient(divergence, model, target)
    assert relative(gradient, wanted) < 1e-9
    _, gradient = with_gradient(divergence, model.float(), target.float())
    assert relative(gradient, wanted) < 2e-3


@each
@pytest.mark.parametrize("distance", [3.0, 0.3])
def test_float32_is_close_to_the_definition(divergence: Divergence, distance: float) -> None:
    model, target = pair_at(distance)
    value, gradient = with_gradient(divergence, model.float(), target.float())
    wanted, wanted_gradient = brute_with_gradient(divergence, model, target)
    assert value.dtype == torch.float32
    rounding = 4 * torch.finfo(torch.float32).eps * max(model.abs().max().item(), target.abs().max().item())
    assert ((value - wanted).abs() <= 1e-5 * wanted + rounding).all()
    assert relative(gradient, wanted_gradient) < 6e-5


@pytest.mark.parametrize("divergence", SMOOTH, ids=str)
def test_gradient_is_the_derivative_of_the_value(divergence: Divergence) -> None:
    model, target = draw(2, 3, 7).requires_grad_(), draw(3, 3, 7)
    assert torch.autograd.gradcheck(lambda x: divergence(x, target, 0.7), (model,), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("distance", "tolerance"), [(1e-1, 2e-6), (1e-2, 2e-5), (1e-3, 2e-4), (1e-4, 2e-3)], ids=lambda x: f"{x:g}"
)
@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()], ids=str)
def test_tiny_kl_keeps_relative_accuracy_in_float32(divergence: Divergence, distance: float, tolerance: float) -> None:
    # Below 1e-3 the float64 definition itself cancels: the centred form of the same number is the judge.
    model, target = pair_at(distance)
    logp, logq = model.log_softmax(-1), target.log_softmax(-1)
    first, x = (logq, logq - logp) if isinstance(divergence, ForwardKL) else (logp, logp - logq)
    wanted = (first.exp() * (torch.expm1(-x) + x)).sum(-1)
    value = divergence(model.float(), target.float())
    assert relative(value, wanted) < tolerance
    naive = model.float().log_softmax(-1), target.float().log_softmax(-1)
    plain = (naive[0].exp() * (naive[0] - naive[1])).sum(-1).double()
    if distance <= 1e-3 and isinstance(divergence, ReverseKL):
        assert relative(plain, wanted) > 10 * tolerance, "the plain sum would do: the test is too easy"


@pytest.mark.parametrize("divergence", SMOOTH, ids=str)
def test_tiny_values_keep_relative_accuracy_in_float32(divergence: Divergence) -> None:
    model, target = pair_at(1e-2)
    assert relative(divergence(model.float(), target.float()), brute(divergence, model, target)) < 1e-4


def test_one_tail_entry_does_not_spoil_a_tiny_kl() -> None:
    # log(p/q) = 90 in an entry of weight 1e-40: exp(90) overflows float32, a clamp at 80 would lose q's 1% there.
    model = torch.tensor([[0.0, -92.0]])
    target = torch.tensor([[math.log(0.99), math.log(0.01)]])
    assert ReverseKL()(model, target).item() == pytest.approx(-math.log(0.99), rel=1e-5)
    assert ForwardKL()(target, model).item() == pytest.approx(-math.log(0.99), rel=1e-5)


def test_temperature_divides_both_logits() -> None:
    model, target = draw(4, 5, 9).requires_grad_(), draw(5, 5, 9)
    hot = ReverseKL()(model, target, temperature=2.5)
    cold = ReverseKL()(model / 2.5, target / 2.5)
    torch.testing.assert_close(hot, cold)
    torch.testing.assert_close(torch.autograd.grad(hot.sum(), model)[0], torch.autograd.grad(cold.sum(), model)[0])


def test_shapes_broadcast_and_blocks_do_not_show() -> None:
    vocab = 2**17
    rows = 2 * block_rows(vocab) + 1
    model, target = draw(6, rows, vocab, dtype=torch.float32), draw(7, 1, vocab, dtype=torch.float32)
    whole = JensenShannon()(model, target)
    assert whole.shape == (rows,)
    for row in range(rows):
        assert JensenShannon()(model[row], target[0]).item() == pytest.approx(whole[row].item(), rel=1e-6)
    assert ForwardKL()(draw(8, 2, 3, 4), draw(9, 4)).shape == (2, 3)
    assert ForwardKL()(draw(8, 4), draw(9, 4)).shape == ()
    assert ForwardKL()(draw(8, 0, 4), draw(9, 0, 4)).shape == (0,)


def test_broadcast_model_collects_the_gradient_of_every_row() -> None:
    model, target = draw(10, 5).requires_grad_(), draw(11, 3, 5)
    (found,) = torch.autograd.grad(ReverseKL()(model, target).sum(), model)
    wanted = sum(with_gradient(ReverseKL(), model.detach(), row)[1] for row in target)
    torch.testing.assert_close(found, wanted)


def test_upstream_gradients_scale_rows() -> None:
    model, target = draw(12, 4, 6), draw(13, 4, 6)
    _, unit = with_gradient(ForwardKL(), model, target)
    weights = torch.tensor([2.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    leaf = model.clone().requires_grad_()
    (ForwardKL()(leaf, target) * weights).sum().backward()
    torch.testing.assert_close(leaf.grad, unit * weights[:, None])


@each
def test_masked_rows_are_exactly_zero_whatever_they_hold(divergence: Divergence) -> None:
    model, target = draw(14, 2, 3, 8), draw(15, 2, 3, 8)
    mask = torch.tensor([[True, False, True], [False, True, True]])
    plain, plain_gradient = with_gradient(divergence, model, target)
    dirty_model, dirty_target = model.clone(), target.clone()
    dirty_model[~mask], dirty_target[~mask] = torch.nan, torch.inf
    leaf = dirty_model.requires_grad_()
    values = divergence(leaf, dirty_target, mask=mask)
    values.sum().backward()
    assert leaf.grad is not None
    assert torch.equal(values, torch.where(mask, plain, 0.0))
    assert torch.equal(leaf.grad, torch.where(mask[..., None], plain_gradient, 0.0))


def test_target_receives_no_gradient() -> None:
    model, target = draw(16, 2, 4).requires_grad_(), draw(17, 2, 4).requires_grad_()
    ForwardKL()(model, target).sum().backward()
    assert model.grad is not None
    assert target.grad is None
    assert not ForwardKL()(model.detach(), target).requires_grad


def test_values_need_no_gradient() -> None:
    model, target = draw(18, 2, 4).requires_grad_(), draw(19, 2, 4)
    with torch.no_grad():
        assert not ReverseKL()(model, target).requires_grad


def test_second_derivatives_are_refused() -> None:
    model = draw(20, 2, 4).requires_grad_()
    (first,) = torch.autograd.grad(ReverseKL()(model, draw(21, 2, 4)).sum(), model, create_graph=True)
    with pytest.raises(RuntimeError):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    model, target = draw(22, 4, 50, dtype=dtype), draw(23, 4, 50, dtype=dtype)
    value, gradient = with_gradient(ReverseKL(), model, target)
    wanted, wanted_gradient = brute_with_gradient(ReverseKL(), model.double(), target.double())
    assert value.dtype == torch.float32
    assert gradient.dtype == dtype
    assert relative(value, wanted) < 1e-6
    assert relative(gradient, wanted_gradient) < 3 * torch.finfo(dtype).eps


def test_autocast_does_not_lower_the_precision() -> None:
    model, target = draw(22, 4, 50, dtype=torch.float32), draw(23, 4, 50, dtype=torch.float32)
    for divergence in EVERY:
        value, gradient = with_gradient(divergence, model, target)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found, found_gradient = with_gradient(divergence, model, target)
        assert torch.equal(found, value)
        assert torch.equal(found_gradient, gradient)


def test_a_broken_row_breaks_itself_alone() -> None:
    model, target = draw(22, 3, 50), draw(23, 3, 50)
    model[1, 3] = torch.nan
    for divergence in EVERY:
        values = divergence(model, target)
        assert values.isnan().tolist() == [False, True, False]


def test_float64_on_either_side_stays_float64() -> None:
    assert ReverseKL()(draw(1, 3, dtype=torch.float32), draw(2, 3)).dtype == torch.float64
    assert ReverseKL()(draw(1, 3), draw(2, 3, dtype=torch.bfloat16)).dtype == torch.float64


@pytest.mark.parametrize("divergence", [d for d in EVERY if not isinstance(d, Swapped)], ids=str)
def test_swapped_exchanges_the_arguments_and_still_descends_the_model(divergence: Divergence) -> None:
    model, target = draw(24, 4, 9), draw(25, 4, 9)
    value, gradient = with_gradient(Swapped(divergence), model, target)
    torch.testing.assert_close(value, divergence(target, model))
    wanted, wanted_gradient = brute_with_gradient(Swapped(divergence), model, target)
    torch.testing.assert_close(value, wanted)
    torch.testing.assert_close(gradient, wanted_gradient)
    torch.testing.assert_close(Swapped(Swapped(divergence))(model, target), divergence(model, target))


def test_adaptive_gradient_holds_its_weights_constant() -> None:
    # The crossing entry belongs to the tail; the largest always to the head, however small head_mass is.
    target = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    model = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    for mass, share in [(0.0, 0.3 / 0.8), (0.5, 0.3 / 0.8), (0.75, 0.4 / 0.8), (1.0, 1.0)]:
        value, gradient = with_gradient(AdaptiveKL(mass), model, target)
        forward, forward_gradient = with_gradient(ForwardKL(), model, target)
        reverse, reverse_gradient = with_gradient(ReverseKL(), model, target)
        torch.testing.assert_close(value, share * forward + (1 - share) * reverse)
        torch.testing.assert_close(gradient, share * forward_gradient + (1 - share) * reverse_gradient)
    same, _ = with_gradient(AdaptiveKL(), target, target)
    assert same.item() == 0.0


def test_adaptive_head_may_be_larger_than_the_first_looks() -> None:
    target, model = draw(26, 3, 5000, scale=0.1), draw(27, 3, 5000)
    target[1] *= 60  # a peaked row beside flat ones
    torch.testing.assert_close(AdaptiveKL()(model, target), brute(AdaptiveKL(), model, target))


@pytest.mark.parametrize("head_mass", [0.0, 0.2, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("vocab", [1, 2, 7, 1003, 20_000])
def test_adaptive_head_wherever_it_ends(vocab: int, head_mass: float) -> None:
    """Between equal entries, among nearly equal ones, in a peak, beyond the float32 range, with entries left out."""
    target, model = draw(28, 7, vocab), draw(29, 7, vocab)
    target[0] = 0.0
    target[1] = (target[1] > 0.5).double() * 2.0
    target[2] = 1.0 + 1e-7 * target[2]
    target[3] *= 30.0
    target[4] *= 1e4
    target[5, target[5] < 0.0] = -torch.inf if vocab > 2 else 0.0
    divergence = AdaptiveKL(head_mass)
    for dtype in (torch.float64, torch.float32):
        # The judge sees the rounded logits too: a float32 row may end its head elsewhere.
        ours, theirs = model.to(dtype), target.to(dtype)
        got, wanted = divergence(ours, theirs).double(), brute(divergence, ours.double(), theirs.double())
        size = torch.maximum(ours.abs(), theirs.abs().masked_fill(theirs == -torch.inf, 0.0)).amax(dim=-1).clamp(min=10)
        assert torch.equal(got.isinf(), wanted.isinf())
        error = (got - wanted).abs().nan_to_num() / (1.0 + wanted.abs().nan_to_num(posinf=0.0))
        # Where thousands of entries are equal, rounding in float32 may move the end by one of them.
        slack = 1.0 / vocab if dtype == torch.float32 and vocab > 10_000 else 0.0
        assert (error <= 10 * torch.finfo(dtype).eps * size + slack).all(), error


def test_sampled_log_probability_and_entropy() -> None:
    logits, token = draw(28, 4, 9), torch.tensor([0, 3, 8, 3])
    leaf = logits.clone().requires_grad_()
    logp = leaf.log_softmax(-1)
    for functional, wanted in [
        (SampledLogProb(), logp.gather(-1, token[:, None]).squeeze(-1)),
        (Entropy(), -(logp.exp() * logp).sum(-1)),
    ]:
        row = to_row(logits)
        value, saved = functional.value(row, None, token)
        torch.testing.assert_close(value, wanted.detach())
        coefficient = draw(29, 4)
        gradient = torch.ones_like(logits)
        functional.add_gradient(gradient, coefficient, row, None, token, saved)
        (expected,) = torch.autograd.grad((wanted * coefficient).sum(), leaf, retain_graph=True)
        torch.testing.assert_close(gradient, 1.0 + expected)


def test_sampled_log_probability_outside_the_support() -> None:
    row = to_row(torch.tensor([[0.0, -torch.inf, 1.0]]))
    token = torch.tensor([1])
    value, saved = SampledLogProb().value(row, None, token)
    gradient = torch.zeros(1, 3)
    SampledLogProb().add_gradient(gradient, torch.ones(1), row, None, token, saved)
    assert value.item() == -torch.inf
    assert not gradient.any()
    assert Entropy().value(row)[0].item() == pytest.approx(0.58220, abs=1e-4)


def test_total_variation_ignores_rounding() -> None:
    model = draw(30, 5, 400, dtype=torch.float32)
    value, gradient = with_gradient(TotalVariation(), model, model + 3.0)
    assert value.max() < 1e-6
    assert not gradient.any()


def test_limits_of_skewed_mixtures() -> None:
    model, target = draw(31, 5, 9), draw(32, 5, 9)
    forward, reverse = ForwardKL()(model, target), ReverseKL()(model, target)
    close = {"rtol": 1e-3, "atol": 0.0}
    torch.testing.assert_close(SkewForwardKL(1e-6)(model, target), forward, **close)
    torch.testing.assert_close(SkewReverseKL(1e-6)(model, target), reverse, **close)
    torch.testing.assert_close(JensenShannon(1e-6)(model, target) / 1e-6, forward, **close)
    torch.testing.assert_close(JensenShannon(1 - 1e-6)(model, target) / 1e-6, reverse, **close)


def test_the_head_of_a_row_does_not_depend_on_the_rows_beside_it():
    """More rows than a row's number and a weight's low bits fit one integer with, in either precision."""
    g = torch.Generator().manual_seed(0)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        z, y = (torch.randn(600, 20, generator=g, dtype=torch.float64).mul(2).to(dtype) for _ in range(2))
        together = AdaptiveKL()(z, y)
        alone = torch.cat([AdaptiveKL()(z[i : i + 50], y[i : i + 50]) for i in range(0, 600, 50)])
        assert (together - alone).abs().max() < tolerance
