"""Learners of finite domains: each closed form minimises its own loss, and the risks fall as they should."""

from __future__ import annotations

import pytest
import torch

from leibler.claims.simplex import minimise
from leibler.theory import full_soft_labels, hard_labels, partial_soft_labels, risk, weighted_likelihood

TEACHER = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]], dtype=torch.float64)
COUNTS = torch.tensor([[5, 3, 1], [1, 2, 7]])


@pytest.mark.parametrize(
    ("learner", "loss"),
    [
        (lambda: hard_labels(COUNTS), lambda z: -(COUNTS * z).sum()),
        (lambda: weighted_likelihood(COUNTS, TEACHER), lambda z: -(COUNTS * TEACHER * z).sum()),
        (lambda: partial_soft_labels(COUNTS, TEACHER), lambda z: (COUNTS * (z - TEACHER.log()) ** 2).sum()),
        (lambda: full_soft_labels(COUNTS, TEACHER), lambda z: -(TEACHER * z).sum()),
    ],
    ids=["hard", "weighted", "partial", "full"],
)
def test_each_learner_minimises_its_loss(learner, loss):
    found = minimise(lambda z: loss(z.log_softmax(-1)), torch.zeros(2, 3)).softmax(-1)
    assert torch.allclose(found, learner(), atol=1e-6)


def test_unseen_inputs_are_uniform_and_unseen_labels_share_the_rest():
    counts = torch.tensor([[4, 0, 0], [0, 0, 0]])
    assert partial_soft_labels(counts, TEACHER)[0].tolist() == pytest.approx([0.5, 0.25, 0.25])
    for learner in (hard_labels(counts), weighted_likelihood(counts, TEACHER), full_soft_labels(counts, TEACHER)):
        assert learner[1].tolist() == pytest.approx([1 / 3] * 3)
        assert torch.allclose(learner.sum(-1), torch.ones(2, dtype=torch.float64))


def test_risks_are_ordered_and_hard_labels_fall_with_the_square_root():
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(20, 10, generator=g, dtype=torch.float64).mul(1.5).softmax(-1)

    def risks(samples: int) -> list[float]:
        means = torch.zeros(4, dtype=torch.float64)
        for _ in range(20):
            s = torch.randint(20, (samples,), generator=g)
            a = torch.multinomial(teacher[s], 1, generator=g)[:, 0]
            counts = torch.zeros(20, 10, dtype=torch.long).index_put_((s, a), torch.tensor(1), accumulate=True)
            laws = (hard_labels(counts), weighted_likelihood(counts, teacher), partial_soft_labels(counts, teacher),
                    full_soft_labels(counts, teacher))  # fmt: skip
            means += torch.tensor([risk(law, teacher) for law in laws], dtype=torch.float64) / 20
        return means.tolist()

    few, many = risks(400), risks(6400)
    assert few[0] / many[0] == pytest.approx(4.0, rel=0.15)
    assert many[1] > 0.15  # stuck at the squared teacher
    assert many[2] < 0.2 * many[0]
    assert many[3] == 0.0
