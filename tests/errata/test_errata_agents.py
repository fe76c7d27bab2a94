"""Errata of distillation in several turns: which divergence is descended, and what the depth of episodes does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from environment.made import Sums
from leibler.data import Dataset, Record
from leibler.environment import TextWorld, replay
from leibler.train import Demonstrated, Episodes
from train.conformance import tiny
from train.test_episodes import context, drawn


def laws() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return (2 * torch.randn(2, 6, generator=draw, dtype=torch.float64)).log_softmax(-1).unbind()


def test_the_log_ratio_as_advantage_descends_the_reverse_kl_and_not_the_written_one():
    student, teacher = laws()
    z = student.clone().requires_grad_()
    logp = z.log_softmax(-1)
    # The expectation of the loss whose advantage is log teacher - log old, over the student's own actions.
    loss = -(student.exp() * (logp - student).exp() * (teacher - student)).sum()
    found = torch.autograd.grad(loss, z)[0]
    reverse = torch.autograd.grad((z.log_softmax(-1).exp() * (z.log_softmax(-1) - teacher)).sum(), z)[0]
    forward = torch.autograd.grad((teacher.exp() * (teacher - z.log_softmax(-1))).sum(), z)[0]
    torch.testing.assert_close(found, reverse, rtol=1e-12, atol=1e-12)
    assert float((found - forward).abs().max()) > 0.1 * float(forward.abs().max())


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_a_sum_over_turns_grows_with_the_curriculum_and_a_mean_does_not(turns):
    student, teacher = laws()

    def size(mean: bool) -> float:
        z = student.clone().requires_grad_()
        each = (z.log_softmax(-1).exp() * (z.log_softmax(-1) - teacher)).sum()
        # Every turn is the same state here: what changes is their number alone.
        total = sum((each for _ in range(turns)), torch.zeros(()))
        return float(torch.autograd.grad(total / turns if mean else total, z)[0].norm())

    one = size(mean=True)
    assert size(mean=True) == pytest.approx(one)
    assert size(mean=False) == pytest.approx(turns * one)


def test_a_cut_episode_has_not_earned_its_reward():
    # A player that solves every task, cut one turn early: the reward of all its episodes is 0, however good it is.
    world = TextWorld()
    for task in world.tasks(20):
        script = world.script(task)
        assert replay(world, task, script).reward == 1
        assert replay(world, task, script[:-1]).reward == 0
    data = Dataset((Record("5"),), "one")
    policy = tiny(0)
    whole = Episodes(Sums(2), group_size=40)
    assert 0 < drawn(whole, context(policy, data, rows=40)).columns["reward"].sum() < 40
    assert drawn(replace(whole, max_turns=1), context(policy, data, rows=40)).columns["reward"].sum() == 0
    # From the back there is a reward from the first step.
    back = replace(whole, prefix=Demonstrated(1))
    assert drawn(back, context(policy, data, rows=40)).columns["reward"].sum() > 0
