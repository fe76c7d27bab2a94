from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leibler.policy import draw
from leibler.policy.draw import invert, law_


@pytest.fixture
def two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks at any size, so that a small vocabulary judges them."""
    monkeypatch.setattr(draw, "_ONE_LEVEL", 3)


def random_laws(seed: int, rows: int, vocab: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    law = torch.randn(rows, vocab, generator=generator).mul(3).exp()
    law[torch.rand(rows, vocab, generator=generator) < 0.3] = 0.0
    law[:, vocab // 2] = 1.0  # never nothing at all
    return law


def grid_counts(law: torch.Tensor, points: int) -> torch.Tensor:
    """How many of ``points`` midpoints of [0, 1) each entry of a law gets."""
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    token, _ = invert(law.expand(points, -1).contiguous(), grid)
    return torch.bincount(token, minlength=law.shape[-1]).double()


@pytest.mark.parametrize("vocab", [1, 2, 5, 64, 1000, 1025, 2500])
def test_shares_of_a_grid_are_the_probabilities(vocab: int) -> None:
    points = 4000
    for law in random_laws(vocab, 2, vocab):
        share = law.double() / law.double().sum()
        # Inversion is exact: each entry's interval holds its share of the grid, up to one point at each end.
        assert (grid_counts(law[None], points) - share * points).abs().max() <= 1 + 1e-3


@pytest.mark.usefixtures("two_levels")
@pytest.mark.parametrize("vocab", [4, 7, 16, 17, 100])
def test_shares_of_a_grid_with_blocks(vocab: int) -> None:
    points = 4000
    for law in random_laws(vocab, 4, vocab):
        share = law.double() / law.double().sum()
        assert (grid_counts(law[None], points) - share * points).abs().max() <= 1 + 1e-3


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), vocab=st.integers(1, 40), blocks=st.booleans())
def test_the_interval_of_the_drawn_entry_holds_the_number(seed: int, vocab: int, blocks: bool) -> None:
    law = random_laws(seed, 8, vocab).double()
    uniform = torch.rand(8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    uniform[0], uniform[1] = 0.0, math.nextafter(1.0, 0.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(draw, "_ONE_LEVEL", 3 if blocks else 1024)
        token, logp = invert(law, uniform)
    share = law / law.sum(-1, keepdim=True)
    upper = share.cumsum(-1)
    own = share.gather(1, token[:, None])[:, 0]
    end = upper.gather(1, token[:, None])[:, 0]
    assert (own > 0).all()
    assert (uniform < end + 1e-12).all()
    assert (uniform >= end - own - 1e-12).all()
    torch.testing.assert_close(logp, own.log())


@pytest.mark.parametrize("vocab", [50, 3000])
def test_entries_of_weight_zero_are_never_drawn(vocab: int) -> None:
    law = torch.zeros(3, vocab)
    law[0, 0] = law[1, vocab // 2] = law[2, -1] = 1e-20
    for uniform in (0.0, 0.5, math.nextafter(1.0, 0.0)):
        token, logp = invert(law, torch.full((3,), uniform, dtype=torch.float64))
        assert token.tolist() == [0, vocab // 2, vocab - 1]
        assert logp.abs().max() < 1e-5


def test_law_of_one_model() -> None:
    logits = torch.randn(5, 20, dtype=torch.float64)
    law = law_([logits * math.log2(math.e)], [1.0])
    torch.testing.assert_close(law / law.sum(-1, keepdim=True), logits.softmax(-1))


def test_law_of_a_mixture_mixes_probabilities_not_logits() -> None:
    one, other = torch.randn(2, 5, 20, dtype=torch.float64)
    law = law_([one * math.log2(math.e), other * math.log2(math.e)], [0.3, 0.7])
    torch.testing.assert_close(law / law.sum(-1, keepdim=True), 0.3 * one.softmax(-1) + 0.7 * other.softmax(-1))


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_nucleus_is_the_smallest_set_with_that_probability(top_p: float) -> None:
    logits = 2 * torch.randn(50, 12, dtype=torch.float64)
    kept = law_([logits.clone()], [1.0], top_p) > 0
    p = (logits * math.log(2)).softmax(-1)
    for row in range(50):
        order = p[row].argsort(descending=True)
        size = 1 + int((p[row][order].cumsum(0) < top_p).sum())
        assert set(kept[row].nonzero()[:, 0].tolist()) == set(order[:size].tolist())


def test_rounding_at_the_end_of_a_block_draws_nothing_impossible() -> None:
    """A block's float32 sum and the float64 sum of its entries differ: a number between them must stay in the block."""
    vocab, block = 4096, 64
    law = torch.rand(1, vocab, generator=torch.Generator().manual_seed(0))
    law[:, ::block] = 0.0  # where a step too far would land
    ends = law.view(-1, block).sum(-1).cumsum(0, dtype=torch.float64)
    uniform = (ends / ends[-1]).nextafter(torch.zeros(1, dtype=torch.float64))
    token, logp = invert(law.expand(len(uniform), vocab), uniform)
    assert torch.isfinite(logp).all()
    assert (token // block).tolist() == list(range(vocab // block))


def test_rounding_at_the_end_of_the_vocabulary_draws_no_entry_beyond_it() -> None:
    law = torch.rand(200, 1501, generator=torch.Generator().manual_seed(0))  # the last block is not a whole one
    token, logp = invert(law, torch.full((200,), math.nextafter(1.0, 0.0), dtype=torch.float64))
    assert (token == 1500).all()
    assert torch.isfinite(logp).all()
