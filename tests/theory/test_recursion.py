"""Anchored generations and their bounds, by brute force and by simulation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.claims.tables import kl
from leibler.errors import RecipeError
from leibler.theory import anchored, contraction_bound, surviving_diversity


def pair(seed: int, vocab: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(vocab, generator=g, dtype=torch.float64).mul(3).log_softmax(-1) for _ in range(2))


@given(st.integers(0, 10_000), st.floats(0, 1), st.sampled_from(["arithmetic", "geometric"]))
def test_a_target_is_a_law_and_the_forward_kl_contracts(seed, weight, mean):
    p, q = pair(seed)
    m = anchored(p, q, weight, mean)
    assert float(m.exp().sum()) == pytest.approx(1.0)
    assert float(kl(q, m)) <= contraction_bound(float(kl(q, p)), weight, 1) + 1e-12


def test_the_ends_are_student_and_teacher_even_where_one_has_no_support():
    p = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    q = torch.tensor([0.0, 0.5, 0.5], dtype=torch.float64).log()
    for mean in ("arithmetic", "geometric"):
        assert torch.allclose(anchored(p, q, 0.0, mean).exp(), p.exp())
        assert torch.allclose(anchored(p, q, 1.0, mean).exp(), q.exp())
    assert anchored(p, q, 0.5, "geometric").exp().tolist() == pytest.approx([0.0, 1.0, 0.0])  # lost stays lost
    assert anchored(p, q, 0.5).exp().tolist() == pytest.approx([0.25, 0.5, 0.25])
    with pytest.raises(RecipeError, match="between 0 and 1"):
        anchored(p, q, 1.5)


def test_errors_settle_with_an_anchor_and_add_up_without():
    assert contraction_bound(1.0, 0.25, 200, error=0.01) == pytest.approx(0.01 / 0.25)
    assert contraction_bound(1.0, 0.0, 200, error=0.01) == pytest.approx(1.0 + 200 * 0.01)
    kls, bound = 1.0, []
    for k in range(1, 5):
        kls = 0.75 * kls + 0.01
        bound.append(contraction_bound(1.0, 0.25, k, error=0.01) - kls)
    assert bound == pytest.approx([0.0] * 4)


def test_diversity_survives_as_often_as_a_simulation_says():
    g = torch.Generator().manual_seed(0)
    runs, samples, generations = 4000, 20, 15
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).repeat(runs, 1)
    start = 1 - (p[0] ** 2).sum()
    for _ in range(generations):
        drawn = torch.multinomial(p, samples, replacement=True, generator=g)
        p = torch.nn.functional.one_hot(drawn, 4).double().mean(1)
    left = (1 - (p**2).sum(-1)).mean() / start
    assert float(left) == pytest.approx(surviving_diversity(samples, generations), abs=0.02)
