"""The harness itself, judged by gradients, brute force and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leibler.claims.simplex import (
    all_needs,
    contexts,
    enumerate_sequences,
    expected_loss,
    f_optimum,
    minimise,
    prefixes,
    sequence_logprobs,
    tabular_view,
    target_table,
    tilt,
)
from leibler.divergence import ChiSquared, ForwardKL, JensenShannon, ReverseKL
from leibler.objective import (
    Column,
    EntropyBonus,
    Imitate,
    LogLinear,
    Match,
    Objective,
    PolicyGradient,
    Ratio,
    Reference,
    Teacher,
    TokenEntropy,
)

F64 = torch.float64
seeds = st.integers(0, 2**31 - 1)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


@settings(max_examples=20)
@given(seeds, st.floats(0.05, 5.0))
def test_the_tilted_law_is_where_the_regularised_objective_is_stationary_and_greatest(seed, beta):
    log_ref, reward = random(5, seed=seed).log_softmax(-1), random(5, seed=seed + 1)
    best = tilt(log_ref, reward, beta)

    def value(logits):
        logp = logits.log_softmax(-1)
        return (logp.exp() * (reward - beta * (logp - log_ref))).sum()

    logits = best.clone().requires_grad_(True)
    value(logits).backward()
    assert logits.grad.abs().max() < 1e-12 * max(1.0, reward.abs().max() / beta)
    assert value(best) >= value(best + 0.3 * random(5, seed=seed + 2))
    # the optimal value is beta times the log-normaliser
    assert value(best).item() == pytest.approx(beta * (log_ref + reward / beta).logsumexp(-1).item())


@settings(max_examples=10)
@given(seeds, st.floats(0.1, 3.0))
def test_the_f_optimum_of_reverse_kl_is_the_tilt(seed, beta):
    log_ref, reward = random(2, 6, seed=seed).log_softmax(-1), random(2, 6, seed=seed + 1)
    torch.testing.assert_close(
        f_optimum(log_ref, reward, beta, ReverseKL()), tilt(log_ref, reward, beta), atol=1e-9, rtol=1e-9
    )


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(), ReverseKL()], ids=lambda d: type(d).__name__)
def test_the_f_optimum_is_what_gradient_descent_finds(divergence):
    log_ref, reward, beta = random(4, seed=3).log_softmax(-1), random(4, seed=4), 0.7

    def loss(logits):
        logp = logits.log_softmax(-1)
        return -(logp.exp() * reward).sum() + beta * divergence(logits, log_ref)

    found = minimise(loss, torch.zeros(4)).log_softmax(-1)
    expected = f_optimum(log_ref, reward, beta, divergence)
    assert expected.exp().sum().item() == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(found.exp(), expected.exp(), atol=1e-8, rtol=0)


def test_the_f_optimum_drops_actions_where_the_generator_lets_it():
    # Chi-squared: u = max(0, 1 + (r - multiplier) / (2 beta)); the worst of rewards far apart gets none.
    log_ref = torch.full((3,), 1 / 3, dtype=F64).log()
    log_found = f_optimum(log_ref, torch.tensor([0.0, 4.0, 5.0], dtype=F64), 0.5, ChiSquared())
    assert log_found[0] == -math.inf, "none at all, not merely little"
    found = log_found.exp()
    # with two left: u1 + u2 = 3 and u2 - u1 = 1 / (2 * 0.5)
    torch.testing.assert_close(found, torch.tensor([0.0, 1 / 3, 2 / 3], dtype=F64), atol=1e-9, rtol=0)


def test_minimise_reaches_a_gradient_of_nothing():
    target = random(7).softmax(-1)
    found = minimise(lambda z: -(target * z.log_softmax(-1)).sum(), random(7, seed=9))
    torch.testing.assert_close(found.softmax(-1), target, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("vocab", "length"), [(2, 1), (2, 4), (3, 3)])
def test_all_sequences_are_listed_and_their_probabilities_sum_to_one(vocab, length):
    sequences, mask = enumerate_sequences(vocab, length)
    assert len({tuple(s) for s in sequences.tolist()}) == vocab**length
    assert mask.all()
    logp = sequence_logprobs(random(prefixes(vocab, length), vocab), sequences)
    assert logp.sum(-1).exp().sum().item() == pytest.approx(1.0)


def test_sequences_with_an_end_sum_to_one_too():
    sequences, mask = enumerate_sequences(3, 3, eos=1)
    # 1 of one symbol, 2 of two, and four stems with any third symbol
    assert mask.sum(-1).bincount().tolist() == [0, 1, 2, 12]
    logp = sequence_logprobs(random(prefixes(3, 3), 3), sequences, mask)
    assert logp.sum(-1).exp().sum().item() == pytest.approx(1.0)


def test_each_prefix_has_a_row_of_its_own():
    sequences, _ = enumerate_sequences(3, 3)
    index = contexts(sequences, 3)
    seen = {}
    for sequence, row in zip(sequences.tolist(), index.tolist()):
        for t, number in enumerate(row):
            assert seen.setdefault(number, tuple(sequence[:t])) == tuple(sequence[:t])
    assert sorted(seen) == list(range(prefixes(3, 3)))


def bandit(tables, objective, **columns):
    """Every action of every context as a row."""
    number, actions = tables["policy"].shape
    context = torch.arange(number).repeat_interleave(actions)[:, None]
    token = torch.arange(actions).repeat(number)[:, None]
    return tabular_view(tables, all_needs(objective), context, token, columns=columns)


def test_the_expected_policy_gradient_is_the_gradient_of_the_expected_reward():
    logits, reward = random(2, 4).requires_grad_(True), random(2, 4, seed=1)
    p = logits.softmax(-1)
    old = {"policy": logits, "old": logits.detach()}
    term = PolicyGradient(Column("reward"), Ratio())
    view = bandit(old, term, reward=reward.flatten())
    (mine,) = torch.autograd.grad(expected_loss(term, view, p.flatten(), starts=2), logits, retain_graph=True)
    (true,) = torch.autograd.grad(-(p * reward).sum(-1).mean(), logits)
    torch.testing.assert_close(mine, true)


def test_sampled_imitation_of_a_law_is_its_cross_entropy():
    logits, target = random(1, 5).requires_grad_(True), random(1, 5, seed=1).softmax(-1)
    view = bandit({"policy": logits}, Imitate())
    loss = expected_loss(Imitate(coefficient=2.0), view, target.flatten())
    assert loss.item() == pytest.approx(2 * -(target * logits.log_softmax(-1)).sum().item())


def test_exact_terms_see_whole_rows_of_the_tables():
    tables = {"policy": random(2, 5), "teacher": random(2, 5, seed=1)}
    objective = Objective(Match(ForwardKL(), to=Teacher(), coefficient=0.5), EntropyBonus(coefficient=0.1))
    view = bandit(tables, objective)
    p = tables["policy"].softmax(-1)
    entropy = -(p * p.log()).sum(-1).mean()
    divergence = ForwardKL()(tables["policy"], tables["teacher"]).mean()
    loss = expected_loss(objective, view, p.flatten(), starts=2)
    assert loss.item() == pytest.approx((0.5 * divergence - 0.1 * entropy).item())
    assert view.get(TokenEntropy()).shape == (10,)


def test_a_target_expression_is_combined_in_natural_logs():
    tables = {"teacher": random(2, 5), "reference": random(2, 5, seed=1)}
    found = target_table(LogLinear({Teacher(): 1.5, Reference(): -0.5}), tables).log_softmax(-1)
    expected = (1.5 * tables["teacher"].log_softmax(-1) - 0.5 * tables["reference"].log_softmax(-1)).log_softmax(-1)
    torch.testing.assert_close(found, expected)
    assert math.isfinite(found.sum().item())
