"""Errata, third part: what a batch is normalised by, when statistics are computed, bounds taken for equalities."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leibler.claims.simplex import minimise

DOCUMENT = Path(__file__).parents[2] / "docs" / "errata.md"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_the_mean_of_micro_batch_means_is_not_the_token_mean():
    lengths = torch.tensor([3, 5, 40, 64, 2, 7, 50, 33])
    loss = [normal(int(n), seed=i) - 0.3 * math.log(n) for i, n in enumerate(lengths)]
    tokens = torch.cat(loss).mean()
    micro = torch.stack([torch.cat(loss[i : i + 2]).mean() for i in range(0, 8, 2)]).mean()
    assert abs(micro - tokens) > 0.05
    total = lengths.sum()
    accumulated = sum(torch.cat(loss[i : i + 2]).sum() / total for i in range(0, 8, 2))
    assert float(accumulated) == pytest.approx(tokens.item())
    weights = torch.tensor([1 / (4 * int(lengths[i : i + 2].sum())) for i in range(0, 8, 2)])
    assert weights.max() / weights.min() > 10  # one token counts that much more than another


def test_a_group_without_spread_has_no_advantage_and_a_tiny_spread_a_full_one():
    same = torch.ones(8, dtype=torch.float64)
    assert standardised(same).isnan().all()
    length_bonus = same - 1e-6 * torch.arange(8)  # all correct; lengths differ by a token
    assert standardised(length_bonus).abs().max() > 1.5
    with_eps = (length_bonus - length_bonus.mean()) / (length_bonus.std(correction=0) + 1e-4)
    assert with_eps.abs().max() < 0.05


def test_dividing_by_the_group_deviation_weighs_prompts_by_their_difficulty():
    """E[A s] = sqrt(p (1-p)) (E[s | right] - E[s | wrong]): a hard prompt counts less than an even one."""
    for p in (0.05, 0.5):
        n = 10000
        right = torch.arange(n) < p * n
        score = normal(n) + right * 0.7
        advantage = standardised(right.double())
        gap = score[right].mean() - score[~right].mean()
        assert (advantage * score).mean().item() == pytest.approx(math.sqrt(p * (1 - p)) * gap.item(), rel=1e-9)
    assert math.sqrt(0.05 * 0.95) / 0.5 == pytest.approx(0.436, abs=1e-3)


def test_a_kl_in_the_reward_before_the_group_is_normalised_takes_over():
    """An all-correct group: the KL is all the spread there is, and is blown up to unit advantages."""
    reward, kl, beta = torch.ones(8, dtype=torch.float64), normal(8).abs(), 0.01
    before = standardised(reward - beta * kl)
    after = -beta * kl  # the normalised reward is 0 here
    assert before.abs().max() > 1.0
    assert after.abs().max() < 0.05
    assert torch.allclose(before, standardised(reward - 100 * beta * kl), atol=1e-9)  # whatever the coefficient


def test_the_top_tokens_of_each_micro_batch_are_not_the_top_tokens_of_the_batch():
    """Covariance-selected tokens (0.2 %): per micro-batch of 256 the rule "at least one" picks twice as many."""
    log_p, advantage = -normal(256 * 256).abs(), normal(256 * 256, seed=1)
    covariance = (log_p - log_p.mean()) * (advantage - advantage.mean())
    k = int(2e-3 * len(covariance))
    right = set(covariance.topk(k).indices.tolist())
    found: dict[int, set[int]] = {256: set(), 512: set()}
    for size, chosen in found.items():
        for start in range(0, len(covariance), size):
            a, p = advantage[start : start + size], log_p[start : start + size]
            local = (p - p.mean()) * (a - a.mean())
            chosen |= {start + int(i) for i in local.topk(max(1, int(2e-3 * size))).indices}
    assert len(found[256]) == 256 > 1.9 * k
    assert len(found[512] & right) < 0.75 * k  # the right number of tokens, a quarter of them the wrong ones


def test_a_hinge_on_a_kl_measured_per_micro_batch_is_never_switched_off():
    """DisCO's squared hinge: half the allowed KL on the batch needs no force, on small micro-batches it gets some."""
    log_ratio = 0.02 * normal(4096)
    k3 = torch.expm1(log_ratio) - log_ratio
    delta = 2 * k3.mean()
    assert torch.relu(k3.mean() - delta) == 0.0
    forces = {n: torch.relu(k3.view(-1, n).mean(-1) - delta).mean().item() / delta.item() for n in (512, 8, 1)}
    assert 0.0 <= forces[512] < forces[8] < forces[1]
    assert forces[8] > 0.005


def test_a_penalty_read_off_as_a_number_has_no_gradient():
    """SAFE's released script passes the KL through .item(): the entropy-aware penalty never reaches the actor."""
    log_ratio = normal(64).requires_grad_()
    k2 = (log_ratio**2 / 2).mean()
    detached = 0.1 * max(k2.item() - 0.1, 0.0) ** 2
    policy_loss = log_ratio.mean()
    (with_it,) = torch.autograd.grad(policy_loss + detached, log_ratio, retain_graph=True)
    (without,) = torch.autograd.grad(policy_loss, log_ratio, retain_graph=True)
    assert torch.equal(with_it, without)
    (real,) = torch.autograd.grad(0.1 * torch.relu(k2 - 0.1) ** 2, log_ratio)
    assert real.norm() > 1e-4


# --- bounds and statements --------------------------------------------------------------------------------------------


def test_log_n_minus_is_an_upper_bound_on_the_kl_of_best_of_n():
    q = torch.tensor([0.7, 0.2, 0.08, 0.02], dtype=torch.float64)  # sorted from best to worst
    for n in (2, 4, 16, 64):
        below = 1 - q.cumsum(0)
        law = (below + q) ** n - below.clamp(min=0) ** n
        kl = torch.where(law > 0, law * (law / q).log(), 0.0).sum().item()
        formula = math.log(n) - (n - 1) / n
        assert kl <= formula
        assert kl <= -math.log(0.7) + 1e-12
    assert formula > 8 * kl  # at n = 64: vacuous beyond -log of the best answer's probability


def test_the_success_variance_over_two_beta_squared_is_no_lower_bound_on_the_kl():
    """KL(reference || optimum) = log(1 - p + p e^a) - a p with a = 1/beta; p (1-p) a^2 / 2 is its expansion."""

    def exact(p: float, a: float) -> float:
        return math.log(1 - p + p * math.exp(a)) - a * p

    assert exact(0.5, 1.0) < 0.125
    assert exact(0.5, 10.0) < 0.4 * 12.5
    assert exact(0.5, 1e-3) == pytest.approx(0.125e-6, rel=1e-3)
    grid = torch.linspace(0.001, 0.999, 999, dtype=torch.float64).tolist()
    best = max(grid, key=lambda p: exact(p, 10.0))
    assert best == pytest.approx(1 / 10 - 1 / (math.exp(10) - 1), abs=2e-3)  # near beta, not near one half


def test_raising_the_entropy_of_the_head_feeds_the_tail():
    """TRE: a step on the head's entropy keeps the head's logits' sum, lowers its mass, and the tail gains."""
    z = torch.cat([torch.tensor([4.0, 3.0, 2.5, 2.0, 1.5]), torch.full((995,), -6.0)]).double().requires_grad_()
    head = z[:5].log_softmax(0)
    entropy = -(head.exp() * head).sum()
    (gradient,) = torch.autograd.grad(entropy, z)
    assert gradient[5:].abs().max() == 0.0
    assert gradient.sum().abs() < 1e-12
    tail = [(z + step * gradient).softmax(0)[5:].sum().item() for step in (0.0, 0.1)]
    assert tail[1] > 1.005 * tail[0]
    projected = gradient.clone()
    projected[:5] -= (z.softmax(0)[:5] * gradient[:5]).sum() / z.softmax(0)[:5].sum()
    kept = (z + 0.001 * projected).softmax(0)[5:].sum().item()
    assert abs(kept - tail[0]) < 1e-2 * abs((z + 0.001 * gradient).softmax(0)[5:].sum().item() - tail[0])


def test_an_entropy_scaled_kl_is_not_smallest_at_the_reference():
    """H-DPO's a E_p[log p] - E_p[log q] with a < 1 is negative at p = q^(1/a): monitors of it do not go to 0."""
    q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    a = 0.9

    def scaled(p: Tensor) -> float:
        return float((p * (a * p.log() - q.log())).sum())

    sharp = q ** (1 / a) / (q ** (1 / a)).sum()
    assert scaled(sharp) < scaled(q) - 1e-4
    assert scaled(q) == pytest.approx(float(-(1 - a) * (q * q.log()).sum()))


def test_a_probe_divided_by_the_number_of_tokens_cannot_reach_its_threshold():
    """SPAE's script divides exp(sum log p) and exp(-sum H) by the token count; its potential of a perfect probe with
    a two-token answer is then 0.125, and "solved" is declared at 0.9."""

    def potential(accuracy: float, confidence: float) -> float:
        return 1.5 * accuracy * confidence + 0.5 * accuracy - confidence

    log_p, entropy = torch.zeros(2), torch.zeros(2)
    released = potential(float(log_p.sum().exp() / 2), float((-entropy.sum()).exp() / 2))
    assert released == pytest.approx(0.125)
    assert potential(float(log_p.mean().exp()), float((-entropy.mean()).exp())) == pytest.approx(1.0)


# --- the page itself --------------------------------------------------------------------------------------------------


def entries() -> list[tuple[str, str]]:
    text = DOCUMENT.read_text(encoding="utf-8")
    return re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", text)


def test_the_page_names_only_tests_that_exist():
    for path, name in entries():
        source = (DOCUMENT.parents[1] / path).read_text(encoding="utf-8")
        assert f"def {name}(" in source, f"{path} has no {name}"


def test_every_test_of_an_erratum_stands_on_the_page_and_every_entry_has_its_four_parts():
    named = {name for _, name in entries()}
    here = {
        name
        for path in Path(__file__).parent.glob("test_errata*.py")
        for name in re.findall(r"^def (test_\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    page = {"test_the_page_names_only_tests_that_exist"}
    assert here - named - page == {
        "test_every_test_of_an_erratum_stands_on_the_page_and_every_entry_has_its_four_parts"
    }
    sections = DOCUMENT.read_text(encoding="utf-8").split("\n### ")[1:]
    assert len(sections) >= 30
    for section in sections:
        for part in ("**Claim.**", "**In truth.**", "**Consequence.**", "**Shown by.**"):
            assert part in section, f"{section.splitlines()[0]!r} lacks {part}"


def test_likelihood_weighted_by_the_label_probability_learns_the_squared_teacher():
    """At the expected counts n q, descending -sum n q * q log p ends at q^2 / sum q^2; the plain likelihood at q."""
    q = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    squared = q**2 / (q**2).sum()
    for weight, expected in ((q, squared), (torch.ones_like(q), q)):
        found = minimise(lambda z, w=weight: -(q * w * z.log_softmax(-1)).sum(), torch.zeros(4)).softmax(-1)
        assert torch.allclose(found, expected, atol=1e-6)
    assert float((squared - q).abs().sum()) / 2 > 0.1
