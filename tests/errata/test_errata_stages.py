"""Errata about advantages of a teacher; see docs/errata.md."""

from __future__ import annotations

import torch

from leibler.divergence import ForwardKL, ReverseCrossEntropy


def test_the_mean_advantage_alone_ends_on_one_token_and_not_on_the_teachers():
    aligned = torch.tensor([0.60, 0.30, 0.08, 0.02], dtype=torch.float64).log()
    base = torch.tensor([0.50, 0.40, 0.0999, 0.0001], dtype=torch.float64).log()
    logits = base.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.05)
    for _ in range(1500):
        optimiser.zero_grad()
        ReverseCrossEntropy()(logits, aligned - base).backward()
        optimiser.step()
    law = logits.detach().softmax(-1)
    assert float(law[3]) > 0.99  # the aligned teacher says it once in fifty times
    assert int(law.argmax()) != int(aligned.argmax())
    assert float(-(law * law.log()).sum()) < 0.05 < float(-(aligned.exp() * aligned).sum())


def test_a_floor_on_probabilities_silences_what_was_lost():
    student = torch.tensor([0.0, -1.0, -25.0], dtype=torch.float64)
    teacher = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64)

    def pull(floored: bool) -> torch.Tensor:
        z = student.clone().requires_grad_()
        p = z.softmax(-1)
        if floored:
            p = torch.where(p < 1e-7, torch.full_like(p, 1e-7), p)
        (teacher * (teacher.log() - p.log())).sum().backward()
        assert z.grad is not None
        return z.grad

    z = student.clone().requires_grad_()
    ForwardKL()(z, teacher.log()).backward()
    assert z.grad is not None
    torch.testing.assert_close(z.grad, pull(False))
    assert float(z.grad[2]) < -0.49  # up, with all of the teacher's probability
    assert float(pull(True)[2]) >= 0
