"""Errata, fourth part: losses of distillation, what their released forms report, and how students are measured."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from leibler.claims.simplex import minimise
from leibler.divergence import AdaptiveKL, ArgmaxMargin, SkewForwardKL
from leibler.measure.fidelity import fidelity
from leibler.policy import CausalLM, character_tokenizer, extend, tiny_llama
from leibler.theory import partial_soft_labels, risk

F64 = torch.float64


def rows(seed: int, *shape: int, spread: float = 1.5) -> Tensor:
    return spread * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_gap_weights_are_no_number_where_the_student_is_the_teacher():
    z = rows(0, 3, 6)
    p = z.softmax(-1)
    gap = (p - p).abs()
    assert ((gap[:, :2].sum(-1)) / gap.sum(-1)).isnan().all()
    student = z.clone().requires_grad_()
    value = AdaptiveKL()(student, z)
    assert value.abs().max() < 1e-12
    value.sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-7


def test_a_skewed_cross_entropy_is_not_zero_at_the_teacher():
    """-sum q log(l q + (1-l) p) has the gradient of the skewed KL, and is its value plus the teacher's entropy."""
    model, target = rows(1, 4, 7).requires_grad_(), rows(2, 4, 7)
    q = target.softmax(-1)

    def released(z: Tensor) -> Tensor:
        return -(q * (0.1 * q + 0.9 * z.softmax(-1)).log()).sum(-1)

    ours = SkewForwardKL(0.1)(model, target)
    (wanted,) = torch.autograd.grad(ours.sum(), model)
    (found,) = torch.autograd.grad(released(model).sum(), model)
    entropy = -(q * q.log()).sum(-1)
    assert torch.allclose(found, wanted, atol=1e-9)
    assert torch.allclose(released(model), ours + entropy)
    assert (released(target) > 0.5).all(), "although nothing is left to learn"


def test_the_loss_on_first_choices_is_log_two_where_nothing_is_left_to_learn():
    teacher = rows(3, 5, 6)
    student = (0.2 * teacher).requires_grad_()  # the same first choices, another law
    loss = ArgmaxMargin(1.0)(student, teacher)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([math.log(2)] * 5)
    assert student.grad is not None
    assert (student.grad == 0).all()


def test_margins_of_log_probs_in_bfloat16_are_rounding():
    """Log-probs around -5 are spaced 1/32 apart in bfloat16: as much as the margins are large."""
    teacher, student = rows(4, 200, 2000), rows(5, 200, 2000)
    student = teacher + 0.02 * student

    def margin(dtype: torch.dtype) -> Tensor:
        """By how much the student prefers the teacher's first choice to its second, more than the teacher does."""
        p, q = (z.log_softmax(-1).to(dtype).double() for z in (student, teacher))
        ours, theirs = (x.gather(1, teacher.topk(2, -1).indices) for x in (p, q))
        return (ours[:, 0] - ours[:, 1]) - (theirs[:, 0] - theirs[:, 1])

    exact, coarse = margin(torch.float64), margin(torch.bfloat16)
    assert (coarse - exact).abs().median() > 0.2 * exact.abs().median()
    assert ((coarse.sign() != exact.sign()) & (exact != 0)).double().mean() > 0.05


def test_one_reference_in_both_places_is_not_the_reward_correction():
    """Reward log(teacher / its base), anchor the student's base: replacing both references by either is another law."""
    teacher, theirs, own = (rows(s, 5, 6).log_softmax(-1) for s in (6, 7, 8))
    wanted = (own + 1.25 * (teacher - theirs)).softmax(-1)
    for base in (theirs, own):
        assert float(((1.25 * teacher - 0.25 * base).softmax(-1) - wanted).abs().max()) > 0.1
    assert torch.allclose((own + 1.0 * (teacher - own)).softmax(-1), teacher.exp()), "at 1, one base in both cancels"
    assert not torch.allclose((own + teacher - theirs).softmax(-1), teacher.exp(), atol=0.05), "two do not, even at 1"


def test_extrapolating_each_token_is_not_extrapolating_responses():
    """Two symbols: the token-wise target's first marginal and that of teacher^s base^(1-s) over whole responses."""
    first = {n: rows(s, 3).log_softmax(-1) for n, s in (("teacher", 1), ("base", 2))}
    second = {n: rows(s, 3, 3).log_softmax(-1) for n, s in (("teacher", 3), ("base", 4))}
    for scale, same in ((0.0, True), (1.0, True), (1.5, False)):
        token = (scale * first["teacher"] + (1 - scale) * first["base"]).softmax(-1)
        whole = {n: first[n][:, None] + second[n] for n in first}
        law = (scale * whole["teacher"] + (1 - scale) * whole["base"]).flatten().softmax(-1).reshape(3, 3).sum(-1)
        assert bool((token - law).abs().max() < 1e-12) == same


def nats(model: CausalLM, text: str) -> tuple[float, int]:
    """The cost of a whole text, and in how many tokens."""
    begin, ids = model.encode_prompt(""), model.encode_completion(text)
    with torch.no_grad():
        laws = model.network(input_ids=torch.tensor([[*begin, *ids]])).logits[0].log_softmax(-1)
    start = len(begin) - 1
    return -float(laws[start:-1].gather(-1, torch.tensor(ids)[:, None]).sum()), len(ids)


def test_nats_per_token_rank_tokenizers_and_not_models():
    small = tiny_llama(character_tokenizer("abc "), hidden=16, layers=1, heads=2, seed=1)
    large = extend(small, ["abc", "cab"], "mean")
    text = "abc cab abc abc cab"
    (cost, tokens), (other, fewer) = nats(small, text), nats(large, text)
    assert fewer <= tokens / 2
    assert other < cost, "the text is more likely to the extended model"
    assert other / fewer > cost / tokens, "although each of its tokens is less likely"


def test_agreement_rises_with_accuracy_without_any_copying():
    g = torch.Generator().manual_seed(0)
    gold = torch.randint(10, (4000,), generator=g)

    def guesser(accuracy: float) -> Tensor:
        wrong = (gold + torch.randint(1, 10, gold.shape, generator=g)) % 10
        return torch.where(torch.rand(len(gold), generator=g) < accuracy, gold, wrong)

    teacher = guesser(0.9)
    found = [fidelity(guesser(a).tolist(), gold.tolist(), teacher.tolist(), gold.tolist()) for a in (0.5, 0.7, 0.95)]
    assert [f.agreement for f in found] == sorted(f.agreement for f in found)
    assert found[-1].agreement > 0.85
    assert all(f.agreement >= f.accuracy + f.teacher_accuracy - 1 for f in found)
    assert max(f.error_inheritance for f in found) < 0.12, "of the errors, none is copied"


def test_regressing_log_probs_on_raw_logits_leaves_the_law_open():
    """Two of four labels seen: with logits, the loss is 0 whatever the law; with log-probs, the seen ones are right."""
    q = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=F64)
    seen = torch.tensor([0, 1])

    def loss(z: Tensor, normalise: bool) -> Tensor:
        return ((z.log_softmax(-1) if normalise else z)[seen] - q[seen].log()).square().sum()

    raw, right = (minimise(lambda z, n=n: loss(z, n), torch.zeros(4)) for n in (False, True))
    assert float(loss(raw, False)) < 1e-12
    assert float((raw.softmax(-1)[seen] - q[seen]).abs().max()) > 0.1
    assert torch.allclose(right.softmax(-1)[seen], q[seen], atol=1e-6)


def test_on_a_fixed_teacher_the_error_falls_faster_than_one_over_n():
    """The rate S A / n of partial soft labels is that of the worst teacher for each n; a given one is learnt faster."""
    teacher = rows(9, 20, 10).softmax(-1)
    errors = []
    for n in (400, 1600, 6400):
        total = 0.0
        for repeat in range(20):
            drawn = torch.multinomial(
                teacher.flatten() / 20, n, replacement=True, generator=torch.Generator().manual_seed(repeat)
            )
            total += risk(partial_soft_labels(drawn.bincount(minlength=200).reshape(20, 10), teacher), teacher) / 20
        errors.append(total)
    assert errors[0] / errors[1] > 6, "four times the samples: 1/n would give 4"
    assert errors[1] / errors[2] > 8
