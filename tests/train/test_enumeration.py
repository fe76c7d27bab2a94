"""All responses of a tiny space, each once, weighted by its probability: gradients against exact ones.

With the alphabet ``a`` there are 5 tokens, and 85 responses of at most 3 of them (``⟨eos⟩`` ends one). The mean over
the policy's own samples is then a weighted sum that one step of the engine takes, and the divergence of whole responses
is a number that automatic differentiation knows.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from leibler.divergence import Alpha, ForwardKL, JensenShannon, ReverseKL
from leibler.estimate import K1, K2, K3, ScoreFunction
from leibler.objective import (
    Column,
    InReward,
    LogRatio,
    Match,
    Model,
    Objective,
    Old,
    Policy,
    PolicyGradient,
    Ratio,
    Reward,
    Rows,
    SequenceMean,
    Teacher,
    ToGo,
)
from leibler.policy import character_tokenizer, right_pad
from leibler.train import OnPolicy, Recipe, Sampled, Schedule
from train.conformance import STEP, Prepared, distance, size, tiny

TOKENIZER = character_tokenizer("a")
END = TOKENIZER.eos_token_id
PROMPT = [4, 3]


def responses() -> list[list[int]]:
    found = []
    for length in (1, 2, 3):
        for tokens in product(range(len(TOKENIZER)), repeat=length):
            if END not in tokens[:-1] and (tokens[-1] == END or length == 3):
                found.append(list(tokens))
    return found


def every_response(**columns: Tensor) -> Rows:
    tokens, attention, mask = right_pad([(PROMPT, r) for r in responses()])
    count = len(tokens)
    return Rows(tokens, attention, mask, torch.zeros(count).long(), torch.zeros(count).long(), columns)


def laws(model: Any, rows: Rows) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the tokens taken ``[rows, time]`` (0 where none), and all of them."""
    logits = model.network(input_ids=rows.tokens, attention_mask=rows.attention.long()).logits[:, :-1]
    law = logits.log_softmax(-1)
    taken = law.gather(-1, rows.tokens[:, 1:, None])[..., 0]
    return torch.where(rows.mask, taken, 0.0), law


WORLD = SequenceMean("sum")
"""Sums over the events of a row; times the number of rows it is a sum over rows."""


class Space:
    def __init__(self) -> None:
        self.policy = tiny(0, tokenizer=TOKENIZER).requires_grad_(True)
        self.teacher, self.sampler = (tiny(s, tokenizer=TOKENIZER).requires_grad_(False) for s in (1, 2))
        self.rows = every_response()
        self.logp, self.law = laws(self.policy, self.rows)
        self.logq, self.target = laws(self.teacher, self.rows)
        self.logs, _ = laws(self.sampler, self.rows)
        self.p, self.q, self.s = (x.sum(1).exp() for x in (self.logp, self.logq, self.logs))

    def expected(self, loss: Tensor) -> dict[str, Tensor]:
        named = dict(self.policy.named_parameters())
        grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        return {f"policy.{n}": g for n, g in zip(named, grads, strict=True)}

    def descended(
        self,
        *terms: Any,
        weight: Tensor | None = None,
        schedule: Schedule | None = None,
        source: Any = None,
        **columns: Any,
    ) -> dict[str, Tensor]:
        """The mean of the terms' gradient over responses of probability ``weight`` (the policy's own law)."""
        columns = {"chance": (self.p if weight is None else weight).detach(), **columns}
        rows = every_response(**columns)
        recipe = Recipe(source or OnPolicy(), Objective(*terms), schedule or Schedule())
        models = {"policy": self.policy, "teacher": self.teacher, "sampler": self.sampler}
        made = Prepared(recipe, self.policy, self.policy.copy(), models, {}, {}, {})
        engine = made.engine()
        engine.temperature = 1.0
        made.views = engine.annotate({"main": rows}, STEP, {})
        named = made.parameters()
        for parameter in named.values():
            parameter.grad = None
        engine.accumulate(made.views)
        return {n: p.grad.clone() for n, p in named.items()}


@pytest.fixture(scope="module")
def space() -> Space:
    return Space()


def weighted(**changes: Any) -> dict[str, Any]:
    return {"weight": Column("chance"), "reduce": WORLD, "coefficient": float(len(responses())), **changes}


def test_the_space_is_whole(space):
    for chance in (space.p, space.q, space.s):
        assert float(chance.detach().sum()) == pytest.approx(1.0, abs=1e-12)


def sequence_divergence(divergence: Any, space: Space) -> Tensor:
    return (space.q * divergence.f(space.p.log() - space.q.log())).sum()


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


@pytest.mark.parametrize("credit", ["to_go", "sequence"])
def test_reverse_kl_of_whole_responses(space, credit):
    exact = space.expected((space.p * (space.p.log() - space.q.log())).sum())
    got = space.descended(Match(ReverseKL(), to=Teacher(), estimator=K1(), credit=credit, **weighted()))
    assert size(exact) > 0.1
    assert distance(got, exact) < 1e-6


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(0.3), Alpha(0.5)], ids=repr)
def test_any_divergence_of_whole_responses(space, divergence):
    exact = space.expected(sequence_divergence(divergence, space))
    got = space.descended(Match(divergence, to=Teacher(), estimator=ScoreFunction(), credit="sequence", **weighted()))
    assert distance(got, exact) < 1e-6


@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon(0.3), ForwardKL()], ids=repr)
def test_credit_to_go_is_the_sum_over_visited_contexts(space, divergence):
    """``sum_t E_{c_t ~ p} D(p(.|c_t) || q(.|c_t))`` with the law of the contexts moving too."""
    each = divergence(space.law.reshape(-1, 5), space.target.reshape(-1, 5)).reshape(space.rows.mask.shape)
    exact = space.expected((space.p[:, None] * each * space.rows.mask).sum())
    got = space.descended(Match(divergence, to=Teacher(), estimator=ScoreFunction(), credit="to_go", **weighted()))
    assert distance(got, exact) < 1e-6


@pytest.mark.parametrize(
    "estimator", [K2(), K1(weight="differentiable"), K3(weight="differentiable"), ScoreFunction()], ids=repr
)
def test_credit_of_tokens_is_myopic(space, estimator):
    """The same sum with the contexts held: what distillation means, and not the divergence of responses."""
    each = kl(space.law, space.target.detach())
    myopic = space.expected((space.p.detach()[:, None] * each * space.rows.mask).sum())
    got = space.descended(Match(ReverseKL(), to=Teacher(), estimator=estimator, **weighted()))
    assert distance(got, myopic) < 1e-6
    whole = space.expected((space.p * (space.p.log() - space.q.log())).sum())
    assert distance(got, whole) > 0.05
    over_rows = space.descended(Match(ReverseKL(), to=Teacher(), **weighted()))
    assert distance(over_rows, myopic) < 1e-6


def test_the_divergence_inside_the_reward_with_returns_to_go(space):
    """The gradient of the expected reward less the coefficient times the reverse KL of responses."""
    reward = torch.linspace(-1, 2, len(responses()), dtype=torch.float64)
    exact = space.expected(-(space.p * reward).sum() + 0.3 * (space.p * (space.p.log() - space.q.log())).sum())
    advantage = Reward() >> InReward(Teacher(), 0.3) >> ToGo()
    got = space.descended(PolicyGradient(advantage, Ratio(), **weighted()), reward=reward)
    assert distance(got, exact) < 1e-6


def test_a_reward_alone(space):
    reward = torch.linspace(-1, 2, len(responses()), dtype=torch.float64)
    exact = space.expected(-(space.p * reward).sum())
    assert distance(space.descended(PolicyGradient(Reward(), Ratio(), **weighted()), reward=reward), exact) < 1e-6


@pytest.mark.parametrize("start", [0, 1])
def test_the_two_parts_of_minillm(space, start):
    """Exact single steps plus log-ratios still to come: the gradient for responses; at start 0 one is counted twice."""
    exact = space.expected((space.p * (space.p.log() - space.q.log())).sum())
    future = LogRatio(Teacher(), Old()) >> ToGo(start=start)
    got = space.descended(PolicyGradient(future, Ratio(), **weighted()), Match(ReverseKL(), to=Teacher(), **weighted()))
    assert (distance(got, exact) < 1e-6) == (start == 1)


def test_a_log_ratio_of_the_step_is_k2(space):
    """On fresh samples the policy gradient of ``LogRatio(target, Policy())`` and ``Match(..., K2())`` are one thing."""
    a = space.descended(PolicyGradient(LogRatio(Teacher(), Policy()), Ratio(), **weighted()))
    b = space.descended(Match(ReverseKL(), to=Teacher(), estimator=K2(), **weighted()))
    assert distance(a, b) < 1e-9


@pytest.mark.parametrize("estimator", [K1(), K3()], ids=repr)
def test_forward_kl_from_the_targets_samples(space, estimator):
    """On responses of the target, token credit already is the divergence of responses."""
    exact = space.expected((space.q.detach() * (space.q.detach().log() - space.p.log())).sum())
    term = Match(ForwardKL(), to=Teacher(), estimator=estimator, **weighted())
    assert distance(space.descended(term, weight=space.q, source=Sampled("teacher")), exact) < 1e-6


def test_another_samplers_responses_are_weighted_token_by_token(space):
    """The law of the contexts is the sampler's; at each of them the gradient is exact."""
    each = kl(space.law, space.target.detach())
    myopic = space.expected((space.s[:, None] * each * space.rows.mask).sum())
    for estimator in (K2(), K1(weight="differentiable"), ScoreFunction()):
        term = Match(ReverseKL(), to=Teacher(), estimator=estimator, **weighted())
        got = space.descended(term, weight=space.s, source=Sampled("sampler"), behaviour_logp=space.logs)
        assert distance(got, myopic) < 1e-6


def test_the_anchor_is_the_law_that_was_sampled(space):
    reward = torch.linspace(-1, 2, len(responses()), dtype=torch.float64)
    term = PolicyGradient(Reward(), Ratio(anchor=Model("sampler")), **weighted())
    got = space.descended(term, weight=space.s, source=Sampled("sampler"), reward=reward)
    ratio = (space.logp - space.logs).exp()
    exact = space.expected(-(space.s[:, None] * ratio * reward[:, None] * space.rows.mask).sum())
    assert distance(got, exact) < 1e-6
