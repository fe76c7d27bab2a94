"""Estimators over ragged batches: a padded batch is its sequences one by one, and padding may hold anything."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leibler import estimate
from leibler.divergence import ForwardKL, ReverseKL

KINDS = [
    (ReverseKL(), "k1", "model"),
    (ReverseKL(), "k3", "model"),
    (ForwardKL(), "k1", "target"),
]
GARBAGE = [0.0, math.nan, math.inf, -math.inf, 1e38]
LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(sum)


@pytest.mark.parametrize(("divergence", "name", "law"), KINDS)
@settings(max_examples=40)
@given(lengths=LENGTHS, seed=st.integers(0, 2**31 - 1), garbage=st.sampled_from(GARBAGE))
def test_a_padded_batch_is_its_sequences_alone(divergence, name, law, lengths, seed, garbage):
    source = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    model, target = (-6.0 * torch.rand(shape, generator=source, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    padded = [torch.where(mask, x, garbage) for x in (model, target)]
    options = {"divergence": divergence, "estimator": name, "sampled_from": law}
    whole = estimate.value(*padded, mask=mask, **options)
    parts = [(n, estimate.value(model[i, :n], target[i, :n], **options)) for i, n in enumerate(lengths) if n]
    total = sum(n * part for n, part in parts) / sum(lengths)
    torch.testing.assert_close(whole, torch.as_tensor(total), rtol=1e-9, atol=1e-12)

    leaf = padded[0].clone().requires_grad_()
    loss = estimate.loss(leaf, padded[1], mask=mask, divergence=divergence, sampled_from=law)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert (gradient[~mask] == 0).all()
    assert gradient.isfinite().all()
    alone = model.clone().requires_grad_()
    pieces = [
        n * estimate.loss(alone[i, :n], target[i, :n], divergence=divergence, sampled_from=law)
        for i, n in enumerate(lengths)
        if n
    ]
    (expected,) = torch.autograd.grad(torch.stack(pieces).sum() / sum(lengths), alone)
    torch.testing.assert_close(gradient, torch.where(mask, expected, 0.0), rtol=1e-9, atol=1e-12)
