"""Errata of masked-diffusion language models; see docs/errata.md."""

from __future__ import annotations

import torch
from torch.nn import functional


def test_a_batchmean_of_gathered_positions_is_no_mean_of_sequences_and_has_no_value_for_none():
    """`kl_div(..., reduction="batchmean")` on rows gathered by a mask divides by positions; 0 of them give NaN."""
    torch.manual_seed(0)
    p, q = (torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]]).bool()

    def batchmean(where: torch.Tensor) -> torch.Tensor:
        return functional.kl_div(p[where].log_softmax(-1), q[where].softmax(-1), reduction="batchmean")

    each = functional.kl_div(p.log_softmax(-1), q.softmax(-1), reduction="none").sum(-1)
    torch.testing.assert_close(batchmean(mask), each[mask].mean())
    by_sequence = torch.stack([each[i][mask[i]].mean() for i in range(2)]).mean()
    assert abs(float(batchmean(mask) - by_sequence)) > 0.05
    # The long sequence has six sevenths of the weight, as it has of the positions.
    gradient = torch.autograd.grad(batchmean(mask), p)[0]
    alone = torch.autograd.grad(each[0].mean(), p)[0]
    torch.testing.assert_close(gradient[0], 6 / 7 * alone[0])
    assert torch.isnan(batchmean(torch.zeros_like(mask)))


def test_the_unweighted_loss_of_random_masks_is_below_the_negative_log_likelihood():
    """With each position masked with probability t, t uniform, and the masked likelihoods summed without 1 / t."""
    n, vocab = 4, 7
    nll = n * torch.tensor(float(vocab)).log()  # of the uniform law, whose conditionals are what they should be
    t = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    masked = t * n  # expected number of masked positions, each worth log vocab
    unweighted = (masked * torch.tensor(float(vocab)).log()).mean()
    weighted = (masked / t * torch.tensor(float(vocab)).log()).mean()
    torch.testing.assert_close(weighted.float(), nll)
    torch.testing.assert_close(unweighted.float(), nll / 2)
