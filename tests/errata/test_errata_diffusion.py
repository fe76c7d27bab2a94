"""Errata of masked-diffusion language models; see docs/errata.md."""

from __future__ import annotations

import itertools
import math

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
    assert abs(float((batchmean(mask) - by_sequence).detach())) > 0.05
    # The long sequence has six sevenths of the weight, as it has of the positions.
    gradient = torch.autograd.grad(batchmean(mask), p)[0]
    alone = torch.autograd.grad(each[0].mean(), p)[0]
    torch.testing.assert_close(gradient[0], 6 / 7 * alone[0])
    assert torch.isnan(batchmean(torch.zeros_like(mask)))


def test_the_unweighted_loss_of_random_masks_is_below_the_negative_log_likelihood():
    """On a joint law of three tokens whose conditionals are all known: every mask, with its probability."""
    n, vocab = 3, 3
    joint = torch.rand((vocab,) * n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    joint = joint / joint.sum()

    def marginal(text: tuple[int, ...], seen: set[int]) -> float:
        index = tuple(token if i in seen else slice(None) for i, token in enumerate(text))
        return float(joint[index].sum())

    for text in itertools.product(range(vocab), repeat=n):
        weighted = unweighted = 0.0
        for count in range(1, n + 1):
            choices = list(itertools.combinations(range(n), count))
            for masked in choices:
                seen = set(range(n)) - set(masked)
                loss = -sum(math.log(marginal(text, seen | {i}) / marginal(text, seen)) for i in masked)
                unweighted += loss / n / len(choices)
                weighted += loss / n / len(choices) * n / count
        nll = -math.log(float(joint[text]))
        # No less than -log p for any conditionals; for those of one joint law it is that itself.
        assert abs(weighted - nll) < 1e-12
        assert unweighted < 0.8 * nll
