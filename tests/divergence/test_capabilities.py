"""Generators, implicit rewards, conjugates, names, and the refusal of what is not there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from divergence.brute import EVERY, F_DIVERGENCES, OTHERS
from leibler.divergence import (
    AdaptiveKL,
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
    SkewForwardKL,
    SkewReverseKL,
    Swapped,
    TotalVariation,
    Tsallis,
    get,
    names,
)
from leibler.errors import RecipeError

each = pytest.mark.parametrize("divergence", F_DIVERGENCES, ids=str)
INADMISSIBLE = {str(d) for d in (SkewForwardKL(0.1), Alpha(2.5), Tsallis(2.0), ChiSquared(), TotalVariation())}
CONJUGATE = [
    ForwardKL(),
    ReverseKL(),
    JensenShannon(),
    JensenShannon(0.1),
    Alpha(0.5),
    Alpha(-0.5),
    Alpha(2.5),
    Alpha(0.0),
    Alpha(1.0),
    Tsallis(2.0),
    ChiSquared(),
    ReverseChiSquared(),
    Hellinger(),
]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@each
def test_the_divergence_is_the_mean_of_its_generator(divergence: Divergence) -> None:
    model, target = draw(0, 6, 20), draw(1, 6, 20)
    logp, logq = model.log_softmax(-1), target.log_softmax(-1)
    mean = (logq.exp() * divergence.f(logp - logq)).sum(-1)
    torch.testing.assert_close(mean, divergence(model, target), rtol=1e-10, atol=1e-12)
    assert divergence.f(torch.zeros(1, dtype=torch.float64)).abs().item() < 1e-15


@each
def test_f_prime_is_the_derivative_of_f(divergence: Divergence) -> None:
    log_u = torch.tensor([-6.0, -2.0, -0.7, -0.01, 0.02, 0.9, 2.0, 6.0], dtype=torch.float64, requires_grad=True)
    (by_log_u,) = torch.autograd.grad(divergence.f(log_u).sum(), log_u)
    torch.testing.assert_close(
        divergence.f_prime(log_u.detach()), by_log_u / log_u.detach().exp(), rtol=1e-7, atol=1e-9
    )


def test_generators_are_the_printed_ones() -> None:
    log_u = torch.linspace(-5.0, 5.0, 41, dtype=torch.float64)
    u = log_u.exp()
    w = 0.1 + 0.9 * u
    for divergence, f in [
        (ReverseKL(), u * log_u),
        (ForwardKL(), -log_u),
        (Jeffreys(), (u - 1) * log_u),
        (JensenShannon(0.1), 0.9 * u * log_u - w * w.log()),
        (SkewForwardKL(0.1), -w.log()),
        (SkewReverseKL(0.1), u * (u / (0.1 * u + 0.9)).log()),
        (Alpha(0.3), (u**0.3 - 0.3 * u - 0.7) / -0.21),
        (ChiSquared(), (u - 1) ** 2),
        (ReverseChiSquared(), (u - 1) ** 2 / u),
        (Hellinger(), (u.sqrt() - 1) ** 2),
        (TotalVariation(), (u - 1).abs() / 2),
    ]:
        torch.testing.assert_close(divergence.f(log_u), f, rtol=1e-10, atol=1e-12)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sequence_ratios_cannot_overflow(divergence: Divergence, dtype: torch.dtype) -> None:
    log_u = torch.tensor([-1e4, -500.0, -90.0, -1.0, 1.0, 90.0, 500.0, 1e4], dtype=dtype, requires_grad=True)
    for function in (divergence.f, divergence.f_prime):
        value = function(log_u)
        if function == divergence.f and dtype == torch.float32 and str(divergence) not in ("Alpha(alpha=2.5)",):
            assert value.isfinite().all()
        assert not value.isnan().any()
        (slope,) = torch.autograd.grad(value.sum(), log_u)
        assert slope.isfinite().all()
    steps = divergence.f_prime(log_u.detach()).diff()
    assert (steps >= 0).all(), "f' of a convex f does not decrease"
    if divergence.inadmissible is None:
        assert steps[0] > 0, "nothing pulls a ratio back that has fallen to e^-10000"


@each
def test_generators_keep_relative_accuracy_in_float32(divergence: Divergence) -> None:
    for size, tolerance in [(0.5, 1e-5), (1e-2, 5e-4)]:
        log_u = torch.tensor([-size, size])
        exact = log_u.double()
        centred = divergence.f_prime(exact) - divergence.f_prime(torch.zeros_like(exact))
        if centred.equal(divergence.f_prime(exact)):  # f'(1) = 0: close to 0 here, so worth knowing relatively
            torch.testing.assert_close(divergence.f_prime(log_u).double(), centred, rtol=tolerance / 10, atol=0.0)
        torch.testing.assert_close(divergence.f(log_u).double(), divergence.f(exact), rtol=tolerance, atol=0.0)


@each
def test_inadmissible_is_said_where_f_prime_is_finite_at_zero(divergence: Divergence) -> None:
    reason = divergence.inadmissible
    assert (reason is not None) == (str(divergence) in INADMISSIBLE)
    far = divergence.f_prime(torch.tensor([-280.0, -290.0], dtype=torch.float64))
    # Towards u = 0 an admissible f' falls without bound; an inadmissible one has arrived at the number in the reason.
    if reason is None:
        assert (far[0] - far[1]).abs() > 0.1
    else:
        assert far[0] == far[1]
        assert f"{far[0].item():g}" in reason


@pytest.mark.parametrize("divergence", CONJUGATE, ids=str)
def test_inverse_conjugate_inverts_the_conjugate(divergence: Divergence) -> None:
    log_u = torch.linspace(-1.5, 1.5, 13, dtype=torch.float64)
    # At t = f'(u) the supremum of u t - f(u) is reached: f*(t) = u f'(u) - f(u).
    t = divergence.f_prime(log_u)
    conjugate = log_u.exp() * t - divergence.f(log_u)
    torch.testing.assert_close(divergence.inverse_conjugate(conjugate), t, rtol=1e-9, atol=1e-11)


def test_conjugates_of_the_paper() -> None:
    z = torch.linspace(-0.5, 4.0, 10, dtype=torch.float64)
    torch.testing.assert_close(Hellinger().inverse_conjugate(z), z / (1 + z))
    torch.testing.assert_close(ChiSquared().inverse_conjugate(z), 2 * (1 + z).sqrt() - 2)
    torch.testing.assert_close(TotalVariation().inverse_conjugate(z), z)
    torch.testing.assert_close(ReverseKL().inverse_conjugate(z + 1), 1 + (z + 1).log())


@pytest.mark.parametrize("divergence", [*CONJUGATE, TotalVariation()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_conjugate_goes_on_outside_its_domain(divergence: Divergence, dtype: torch.dtype) -> None:
    z = torch.linspace(-40.0, 40.0, 161, dtype=dtype, requires_grad=True)
    value = divergence.inverse_conjugate(z)
    (slope,) = torch.autograd.grad(value.sum(), z)
    assert value.isfinite().all()
    assert slope.isfinite().all()
    assert (slope >= 0).all()
    assert (value.detach().diff() >= 0).all()


@pytest.mark.parametrize("divergence", OTHERS, ids=str)
def test_a_missing_capability_is_refused(divergence: Divergence) -> None:
    zero = torch.zeros(3)
    for ask in (divergence.f, divergence.f_prime, divergence.inverse_conjugate):
        with pytest.raises(RecipeError, match="choose one"):
            ask(zero)
    assert divergence.inadmissible is not None


def test_no_conjugate_in_closed_form() -> None:
    for divergence in (Jeffreys(), SkewForwardKL(), SkewReverseKL()):
        with pytest.raises(RecipeError, match="no inverse conjugate"):
            divergence.inverse_conjugate(torch.zeros(1))


@dataclass(frozen=True)
class OneSided(Divergence):
    """A kernel that does not say what it is when exchanged."""


def test_what_cannot_be_exchanged_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match="define swapped"):
        Swapped(OneSided())


def test_divergences_are_values() -> None:
    assert ReverseKL() == ReverseKL()
    assert hash(Alpha(0.5)) == hash(Alpha(0.5))
    assert Alpha(0.5) != Alpha(0.4)
    assert Swapped(Renyi(0.5)) == Swapped(Renyi(0.5))
    assert len(set(EVERY)) == len(EVERY)


def test_names() -> None:
    assert len(set(names())) == len(names()) == 16
    for name in names():
        assert isinstance(get(name), Divergence)
    assert get("jensen_shannon", beta=0.1) == JensenShannon(0.1)
    assert get("JensenShannon", beta=0.1) == JensenShannon(0.1)
    assert get("reverse_kl") == get("ReverseKL") == ReverseKL()
    assert get("tsallis", q=3) == Tsallis(3)
    assert get("cauchy_schwarz") == CauchySchwarz()
    assert get("adaptive_kl", head_mass=0.3) == AdaptiveKL(0.3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: get("jensen"), "jensen_shannon"),
        (lambda: get("nothing like it"), "choose one of"),
        (lambda: get("renyi", beta=0.5), "alpha"),
        (lambda: get("reverse_kl", beta=0.5), "no parameters"),
        (lambda: get("renyi", alpha="half"), "give a number"),
        (lambda: get("renyi", alpha=True), "give a number"),
        (lambda: JensenShannon(0.0), "ForwardKL"),
        (lambda: JensenShannon(1.0), "ReverseKL"),
        (lambda: JensenShannon(math.nan), "0 < beta < 1"),
        (lambda: SkewForwardKL(1.0), "0 <= lam < 1"),
        (lambda: SkewReverseKL(-0.1), "0 <= lam < 1"),
        (lambda: Renyi(0.0), "positive"),
        (lambda: Renyi(math.inf), "finite"),
        (lambda: Tsallis(-1.0), "positive"),
        (lambda: Alpha(math.nan), "finite"),
        (lambda: AdaptiveKL(1.5), "0 <= head_mass <= 1"),
        (lambda: ReverseKL()(torch.zeros(2, 3), torch.zeros(2, 4)), "3 and 4"),
        (lambda: ReverseKL()(torch.zeros(2, 3), torch.zeros(2, 3), 0.0), "positive"),
        (lambda: ReverseKL()(torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(2)), "bool"),
        (lambda: ReverseKL()(torch.zeros(2, 3), torch.zeros(2, 3), mask=torch.ones(2, 3) > 0), r"shape \[2\]"),
        (lambda: ReverseKL()(torch.zeros(2, 3), torch.zeros(5, 3)), "shape"),
        (lambda: ReverseKL()(torch.zeros(()), torch.zeros(())), "vocabulary"),
        (lambda: ReverseKL()(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)), "float"),
    ],
)
def test_mistakes_are_named_with_their_remedy(call, says: str) -> None:
    with pytest.raises(RecipeError, match=says) as caught:
        call()
    assert str(caught.value)[-1] in ".?"
