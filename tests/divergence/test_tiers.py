"""The same divergence as a row function, as sums and by hand: one value, one gradient."""

from __future__ import annotations

import dataclasses
import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from leibler.divergence import (
    LOG2E,
    Alpha,
    CauchySchwarz,
    Divergence,
    Entropy,
    ForwardKL,
    Functional,
    JensenShannon,
    Pair,
    Renyi,
    ReverseKL,
    Row,
    RowFunction,
    SampledLogProb,
    SkewReverseKL,
    SumForm,
    Swapped,
    TotalVariation,
    pair,
    to_row,
)
from leibler.errors import RecipeError


@dataclass(frozen=True)
class SumsOfReverseKL(SumForm):
    def summands(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        return (logp.exp() * (logp - logq),)

    def derivatives(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        return (logp.exp() * (logp - logq + 1.0),)

    def combine(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return sums[0], (torch.ones_like(sums[0]),)


@dataclass(frozen=True)
class SumsOfRenyi(SumForm):
    alpha: float

    def summands(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        return ((self.alpha * logp + (1.0 - self.alpha) * logq).exp(),)

    def combine(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return sums[0].log() / (self.alpha - 1.0), (1.0 / (sums[0] * (self.alpha - 1.0)),)


@dataclass(frozen=True)
class SumsOfCauchySchwarz(SumForm):
    def summands(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        return (logp + logq).exp(), (2.0 * logp).exp(), (2.0 * logq).exp()

    def combine(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        product, model, target = sums
        value = model.log() + target.log() - 2.0 * product.log()
        return value, (-2.0 / product, 1.0 / model, 1.0 / target)


@dataclass(frozen=True)
class SumsOfJensenShannon(SumForm):
    beta: float

    def summands(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        shares = torch.tensor([self.beta, 1.0 - self.beta], dtype=logp.dtype).log()
        logm = torch.logaddexp(logq + shares[0], logp + shares[1])
        return logq.exp() * (logq - logm), logp.exp() * (logp - logm)

    def combine(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        one = torch.ones_like(sums[0])
        return self.beta * sums[0] + (1.0 - self.beta) * sums[1], (self.beta * one, (1.0 - self.beta) * one)


def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    return (logp.exp() * (logp - logq)).sum(-1)


def renyi(logp: Tensor, logq: Tensor) -> Tensor:
    return (0.3 * logp + 0.7 * logq).logsumexp(-1) / -0.7


def cauchy_schwarz(logp: Tensor, logq: Tensor) -> Tensor:
    return (2 * logp).logsumexp(-1) + (2 * logq).logsumexp(-1) - 2 * (logp + logq).logsumexp(-1)


def jensen_shannon(logp: Tensor, logq: Tensor) -> Tensor:
    return sum(s.sum(-1) * c for s, c in zip(SumsOfJensenShannon(0.2).summands(logp, logq, None), (0.2, 0.8)))


TIERS: list[tuple[Divergence, SumForm, RowFunction]] = [
    (ReverseKL(), SumsOfReverseKL(), RowFunction(reverse_kl)),
    (Renyi(0.3), SumsOfRenyi(0.3), RowFunction(renyi)),
    (CauchySchwarz(), SumsOfCauchySchwarz(), RowFunction(cauchy_schwarz)),
    (JensenShannon(0.2), SumsOfJensenShannon(0.2), RowFunction(jensen_shannon)),
]
tiers = pytest.mark.parametrize("tier", TIERS, ids=lambda tier: str(tier[0]))


def draw(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def with_gradient(divergence: Divergence, model: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    leaf = model.clone().requires_grad_()
    values = divergence(leaf, target)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


@tiers
def test_three_tiers_are_one_divergence(tier: tuple[Divergence, SumForm, RowFunction]) -> None:
    hand, *others = tier
    excluded = draw(2, 6, 30)
    excluded[:, 5:9] = -torch.inf
    for model, target in [
        (draw(0, 6, 30), draw(1, 6, 30)),
        (draw(0, 6, 30, scale=0.01), draw(1, 6, 30, scale=0.01)),
        (excluded, excluded.flip(0)),
        (excluded, draw(1, 6, 30)),
        (draw(0, 6, 30), excluded),
    ]:
        value, gradient = with_gradient(hand, model, target)
        for other in others:
            found, found_gradient = with_gradient(other, model, target)
            torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-12)
            torch.testing.assert_close(found_gradient, gradient, rtol=1e-8, atol=1e-12)


@tiers
def test_tiers_exchange_their_arguments_alike(tier: tuple[Divergence, SumForm, RowFunction]) -> None:
    model, target = draw(3, 4, 11), draw(4, 4, 11)
    value, gradient = with_gradient(Swapped(tier[0]), model, target)
    for other in tier[1:]:
        found, found_gradient = with_gradient(Swapped(other), model, target)
        torch.testing.assert_close(found, value)
        torch.testing.assert_close(found_gradient, gradient)


@dataclass(frozen=True)
class TargetWeighted(SumForm):
    """``w * KL(p||q)`` with a detached weight and a threshold from the prelude: value and descent differ."""

    def prelude(self, logp: Tensor, logq: Tensor) -> Tensor:
        return logq.median(dim=-1, keepdim=True).values

    def summands(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        above = (logq > prelude).to(logp.dtype)
        return logp.exp() * (logp - logq), above * logp.exp()

    def combine(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return sums[0] * sums[1], (sums[1], torch.zeros_like(sums[1]))


def test_combine_decides_what_is_descended() -> None:
    model, target = draw(5, 4, 11), draw(6, 4, 11)
    value, gradient = with_gradient(TargetWeighted(), model, target)
    kl, kl_gradient = with_gradient(ReverseKL(), model, target)
    above = target > target.median(dim=-1, keepdim=True).values
    mass = (model.softmax(-1) * above).sum(-1)
    torch.testing.assert_close(value, kl * mass)
    torch.testing.assert_close(gradient, kl_gradient * mass[:, None])
    # Exchanged, the weight is a function of the target alone and still held constant.
    swapped, swapped_gradient = with_gradient(Swapped(TargetWeighted()), model, target)
    torch.testing.assert_close(swapped, TargetWeighted()(target, model))
    _, forward_gradient = with_gradient(ForwardKL(), model, target)
    above = model > model.median(dim=-1, keepdim=True).values
    mass = (target.softmax(-1) * above).sum(-1)
    torch.testing.assert_close(swapped_gradient, forward_gradient * mass[:, None])


def test_a_row_function_of_the_target_alone_has_no_gradient() -> None:
    entropy = RowFunction(lambda logp, logq: -(logq.exp() * logq).sum(-1))
    value, gradient = with_gradient(entropy, draw(7, 2, 5), torch.zeros(2, 5, dtype=torch.float64))
    torch.testing.assert_close(value, torch.full((2,), math.log(5.0), dtype=torch.float64))
    assert not gradient.any()


def test_a_row_function_must_reduce_the_vocabulary() -> None:
    with pytest.raises(RecipeError, match="one number per row"):
        RowFunction(lambda logp, logq: logp - logq)(draw(0, 2, 5), draw(1, 2, 5))


@pytest.mark.parametrize(
    "functional", [*(t for tier in TIERS for t in tier), TotalVariation(), Alpha(0.997), SampledLogProb(), Entropy()]
)
def test_gradients_add_up_in_a_shared_buffer_and_may_be_asked_twice(functional: Functional) -> None:
    model, target, token = to_row(draw(8, 3, 7)), to_row(draw(9, 3, 7)), torch.tensor([0, 6, 2])
    coefficient = draw(10, 3)
    value, saved = functional.value(model, target, token)
    once = torch.zeros(3, 7, dtype=torch.float64)
    functional.add_gradient(once, coefficient, model, target, token, saved)
    thrice = torch.full((3, 7), 5.0, dtype=torch.float64)
    functional.add_gradient(thrice, coefficient, model, target, token, saved)
    functional.add_gradient(thrice, 2.0 * coefficient, model, target, token, saved)
    assert once.abs().max() > 0
    torch.testing.assert_close(thrice, 5.0 + 3.0 * once)
    again, _ = functional.value(model, target, token)
    assert torch.equal(value, again), "a functional changed the rows that others share"


def test_functionals_share_what_two_rows_have_in_common() -> None:
    model, target = to_row(draw(11, 2, 5)), to_row(draw(12, 2, 5))
    assert pair(model, target) is pair(model, target)
    assert pair(target, model) is not pair(model, target)
    ReverseKL().value(model, target)
    difference = pair(model, target).difference
    SkewReverseKL().value(model, target)
    assert pair(model, target).difference is difference


def test_a_pair_of_natural_logits() -> None:
    model, target = draw(13, 2, 5), draw(14, 2, 5)
    both = Pair.of_logits(model, target, scale=0.5)
    torch.testing.assert_close(both.model.logits, model * (LOG2E / 2))
    torch.testing.assert_close(both.log_ratio, (model / 2).log_softmax(-1) - (target / 2).log_softmax(-1))
    assert pair(both.model, both.target) is both


def test_rows_cache_what_they_compute() -> None:
    logits = draw(15, 3, 6)
    row = to_row(logits)
    torch.testing.assert_close(row.p, logits.softmax(-1))
    torch.testing.assert_close(row.logp, logits.log_softmax(-1))
    assert row.weights is row.weights
    assert row.support is None
    logits[1, 2] = -torch.inf
    support = to_row(logits).support
    assert support is not None
    assert torch.equal(support, logits > -torch.inf)
    assert isinstance(row, Row)


def test_a_divergence_needs_its_target() -> None:
    with pytest.raises(RecipeError, match="target"):
        ReverseKL().value(to_row(draw(0, 1, 3)), None)
    with pytest.raises(RecipeError, match="token"):
        SampledLogProb().value(to_row(draw(0, 1, 3)))
    assert ReverseKL().needs_target
    assert not SampledLogProb().needs_target
    assert not Entropy().needs_target
    for functional in (ReverseKL(), SampledLogProb(), Entropy()):
        assert isinstance(functional, Functional)


class Weighted(SumForm):
    """A plain class with a number of its own."""

    def __init__(self, lam: float) -> None:
        self.lam = lam


class Tilted(ForwardKL):
    def __init__(self, lam: float) -> None:
        self.lam = lam


@pytest.mark.parametrize("kind", [Weighted, Tilted, Alpha])
def test_equal_means_equal_in_all_that_they_hold(kind: Any) -> None:
    assert kind(1.0) == kind(1.0)
    assert kind(1.0) != kind(100.0)
    assert {kind(1.0): "one", kind(100.0): "other"}[kind(1.0)] == "one"
    assert pickle.loads(pickle.dumps(kind(1.0))) == kind(1.0)


def test_named_divergences_stay_frozen_and_equal() -> None:
    assert JensenShannon(0.1) == JensenShannon(beta=0.1)
    assert hash(JensenShannon(0.1)) == hash(JensenShannon(0.1))
    assert ForwardKL() == ForwardKL() != ReverseKL()
    with pytest.raises(dataclasses.FrozenInstanceError):
        JensenShannon(0.1).beta = 0.2  # type: ignore[misc]
