"""Errata about choosing what to learn from; see docs/errata.md."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import torch
from torch import Tensor

from leibler import recipes
from leibler.claims.selection import _corpus, _counted, _shares, _texts, _worlds
from leibler.data.selection import AboveMean, Columns, Rule, TopShare, select, sure_and_unsure
from leibler.measure.scores import read
from leibler.measure.selecting import miniplm
from leibler.objective import Rows, Signal, View
from leibler.train import Recipe

F64 = torch.float64


def test_a_difference_of_losses_has_the_other_sign_than_one_of_log_likelihoods():
    corpus, models = _corpus(20)
    loss: dict[str, Tensor] = {
        name: torch.tensor(read(model, corpus.records)["nll"], dtype=F64) for name, model in models.items()
    }
    transcribed = (loss["teacher"] - loss["reference"]).tolist()  # the teacher first, as the formula has it
    wrong = _shares(select(corpus, {"score": transcribed}, TopShare("score", 1 / 3)))
    right = _shares(miniplm(corpus, **models, share=1 / 3))
    assert right["hard"] > 0.9
    assert right["noise"] == 0
    assert wrong["hard"] == 0
    assert wrong["noise"] > 0.5


def test_a_teacher_that_has_seen_the_noise_finds_it_worth_learning():
    """Noise cannot be learnt, but it can be remembered: the difference does not tell the two apart."""
    corpus, models = _corpus(20)
    noise = [r.completion for r in corpus if r.extra["kind"] == "noise" and r.completion is not None]
    unseen = [t for n, table in enumerate(_worlds()) for t in _texts(table, 400, 64, 20 + n)]
    kept = []
    for seen in ([], noise * 50):
        teacher: Any = _counted(unseen + seen)
        kept.append(_shares(miniplm(corpus, teacher, models["reference"], share=1 / 3))["noise"])
    assert kept[0] == 0
    assert kept[1] > 0.5


def test_a_student_that_has_learnt_the_labels_is_unsure_where_they_are_wrong():
    """Of 200 questions with a share of wrong labels each, a perfect fit to the labels is least sure of the noisiest."""
    wrong = torch.linspace(0, 0.5, 200, dtype=F64)
    student = torch.cat([1 - wrong[:, None], wrong[:, None].expand(-1, 9) / 9], dim=1)
    entropy = -torch.special.xlogy(student, student).sum(-1) / math.log(10)
    teacher = (1 - wrong).tolist()  # less sure of what it gets wrong
    columns: Columns = {"uncertainty": entropy.tolist(), "confidence": teacher}

    def mistaken(rule: Rule) -> float:
        return float(wrong[torch.tensor([reason is None for reason in rule(columns)])].mean())

    assert mistaken(AboveMean("uncertainty")) > 1.3 * float(wrong.mean())
    assert mistaken(sure_and_unsure()) < float(wrong.mean())


def test_without_a_baseline_the_signal_to_noise_of_solved_problems_has_no_bell():
    """Squared mean over variance of (r - b) d log pi(answer), by enumeration: p / (1 - p) without b, p (1 - p) near the
    ends with b = p."""
    z = torch.tensor([-6.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0], dtype=F64, requires_grad=True)
    p = z.sigmoid().detach()
    score = [torch.autograd.grad(torch.nn.functional.logsigmoid(s * z).sum(), z)[0] for s in (1, -1)]

    def ratio(baseline: Tensor) -> Tensor:
        right, wrong = (1 - baseline) * score[0], (0 - baseline) * score[1]
        mean = p * right + (1 - p) * wrong
        return mean**2 / (p * (right - mean) ** 2 + (1 - p) * (wrong - mean) ** 2)

    plain, compared = ratio(torch.zeros_like(p)), ratio(p)
    torch.testing.assert_close(plain, p / (1 - p))
    assert (plain.diff() > 0).all()
    assert (compared[[1, 2]] > compared[[0, 1]]).all()
    assert (compared[[4, 5]] > compared[[5, 6]]).all()
    torch.testing.assert_close(compared[[0, -1]], (p * (1 - p))[[0, -1]], rtol=0.02, atol=0.0)


def test_weights_over_their_sum_in_each_batch_are_other_weights():
    """Every batch of two problems of a pool, enumerated: what each problem counts, summed over all batches."""
    rate = torch.tensor([0.5, 0.5, 0.02, 0.02, 0.98, 0.98], dtype=F64)
    kernel = 6 * rate * (1 - rate)
    batches = torch.tensor(list(product(range(6), repeat=2)))

    def counted(weight: Tensor) -> Tensor:
        total = torch.zeros(6, dtype=F64).index_add_(0, batches.flatten(), weight.flatten())
        return total / total.sum()

    extreme = (rate - 0.5).abs() > 0.4
    of_all = counted(kernel[batches])
    of_batch = counted(kernel[batches] / kernel[batches].sum(1, keepdim=True))
    torch.testing.assert_close(of_all, kernel / kernel.sum())
    assert 0.13 < of_all[extreme].sum() < 0.14
    assert 0.47 < of_batch[extreme].sum() < 0.48

    # The recipe's mean is over tokens, however little they count: a batch of extremes moves little.
    def gradient(rates: Tensor) -> Tensor:
        recipe = recipes.get("paced")
        assert isinstance(recipe, Recipe)
        term = recipe.objective.terms[0]
        rows = Rows(
            torch.zeros(2, 2, dtype=torch.long), torch.ones(2, 2, dtype=torch.bool),
            torch.ones(2, 1, dtype=torch.bool), torch.arange(2), torch.zeros(2, dtype=torch.long), {"pass_rate": rates},
        )  # fmt: skip
        view = View(rows)
        assert isinstance(term.weight, Signal)
        return (
            view.signal(term.weight, reach="sequence") * term.reduce.weight(view, rows.length) / term.reduce.count(rows)
        )

    torch.testing.assert_close(gradient(rate[2:4]), kernel[2:4] / 2)
