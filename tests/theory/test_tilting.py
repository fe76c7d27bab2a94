"""The geometric path: its identities against sums, supports, and what the order of gain and cost is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.theory import divergence_along, moments, tilted


def laws(seed: int, vocab: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(2, 3, vocab, generator=generator, dtype=torch.float64) * 1.5
    return rows[0].log_softmax(-1), rows[1].log_softmax(-1)


@given(st.integers(0, 1000), st.floats(0.05, 1.5))
def test_the_mean_climbs_at_the_variance_and_the_divergence_is_its_integral(seed, share):
    base, extreme = laws(seed)
    slope = (moments(base, extreme, share + 1e-5)[0] - moments(base, extreme, share - 1e-5)[0]) / 2e-5
    torch.testing.assert_close(slope, moments(base, extreme, share)[1], rtol=1e-5, atol=1e-7)
    at = tilted(base, extreme, share)
    torch.testing.assert_close(
        divergence_along(base, extreme, [share])[0], (at.exp() * (at - base)).sum(-1), rtol=1e-9, atol=1e-11
    )


def test_the_ends_of_the_path():
    base, extreme = laws(1)
    torch.testing.assert_close(tilted(base, extreme, 0.0), base)
    torch.testing.assert_close(tilted(base, extreme, 1.0), extreme)
    assert (divergence_along(base, extreme, [0.0]) == 0).all()


def test_what_neither_side_has_is_no_number_too_many():
    base = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64).log()
    extreme = torch.tensor([0.9, 0.1, 0.0], dtype=torch.float64).log()
    whole = divergence_along(base[:2], extreme[:2], [0.7])
    assert float(divergence_along(base, extreme, [0.7])) == pytest.approx(float(whole))
