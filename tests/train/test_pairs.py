"""Pairs of one response of a teacher and one of the policy, and the preference between them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from leibler.errors import RecipeError
from leibler.objective import CHOSEN, REJECTED
from leibler.recipes.distillation import dpkd
from leibler.train import Answer, OnPolicy, Paired, Sampled, Score
from train.conformance import TEMPERATURE, Prepared, distance, gradient, ready


def logp(made: Prepared, name: str, stream: str) -> Tensor:
    """Of each token that came next, ``[batch, time]``; 0 elsewhere."""
    rows = made.rows[stream]
    model = made.policy if name == "policy" else made.models[name]
    logits = model.network(input_ids=rows.tokens, attention_mask=rows.attention.long()).logits
    law = (logits[:, :-1, : model.vocab_size] / TEMPERATURE).log_softmax(-1)
    return law.gather(-1, rows.tokens[:, 1:, None])[..., 0] * rows.mask


def test_each_prompt_gets_a_response_of_the_teacher_and_one_of_the_policy():
    made = ready(dpkd(level="sequence"))
    rows = made.rows["pairs"]
    half = len(rows) // 2
    assert rows.role.tolist() == [CHOSEN] * half + [REJECTED] * half
    assert rows.group[:half].tolist() == rows.group[half:].tolist()
    assert [r.prompt for r in rows.records[:half]] == [r.prompt for r in rows.records[half:]]
    # Each side is what its own model finds likely: the laws are far apart.
    more = (logp(made, "teacher", "pairs") - logp(made, "policy", "pairs")).sum(1)
    assert more[:half].mean() > 1
    assert more[half:].mean() < -1


def test_the_gradient_is_of_the_published_loss():
    made = ready(dpkd(level="sequence", beta=2.0, share=0.75))
    rows, data = made.rows["pairs"], made.rows["data"]
    ratio = (logp(made, "policy", "pairs") - logp(made, "teacher", "pairs").detach()).sum(1) / rows.mask.sum(1)
    half = len(rows) // 2
    preference = -torch.nn.functional.logsigmoid(2.0 * (ratio[:half] - ratio[half:])).mean()
    loss = 0.75 * preference - 0.25 * logp(made, "policy", "data").sum() / data.mask.sum()
    found, _ = gradient(made)
    names = made.parameters()
    grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    wanted = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(names.items(), grads, strict=True)}
    assert distance(found, wanted) < 1e-6


@pytest.mark.parametrize("micro", [2, 5])
def test_cutting_the_batch_changes_nothing(micro: int):
    made = ready(dpkd(level="sequence"))
    whole, _ = gradient(made)
    cut, _ = gradient(made, micro_rows=micro)
    assert distance(cut, whole) < 1e-7


def test_groups_and_stages_are_no_pairs():
    wrong: list[Any] = [OnPolicy(group_size=4), OnPolicy() >> Score(Answer())]
    for source in wrong:
        with pytest.raises(RecipeError, match="two OnPolicy"):
            Paired(Sampled("teacher"), source)
