"""The claims about latent reasoning are refuted by recipes, and by parts, that are broken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from claims.breaking import Broken, case, flipped, refute, sourced, with_, without
from leibler.claims import latent as c
from leibler.divergence import JensenShannon, ReverseKL
from leibler.objective import Imitate, Match, SoftTokens, TokenMean
from leibler.policy.latent import embedding_rows
from leibler.train import Recipe
from leibler.train.latents import Latents


class Shifted(Latents):
    """One place too early: the state that reads a thought is to predict it."""

    def draw(self, context: Any, state: Any) -> Any:
        drawn, state = super().draw(context, state)
        rows = drawn["main"]
        index, weight = (torch.roll(x, 1, dims=1) for x in (rows.soft.index, rows.soft.weight))
        return {"main": replace(rows, soft=SoftTokens(index, weight))}, state


def shifted(recipe: Recipe) -> Recipe:
    return sourced(Shifted(open=c.OPEN, close=c.CLOSE))(recipe)


BROKEN = [
    case(c.certain_thoughts_are_tokens, "latent-sft", "sign", flipped()),
    case(c.certain_thoughts_are_tokens, "latent-sft", "no-thoughts", without(Match)),
    case(c.certain_thoughts_are_tokens, "latent-sft", "no-answer", without(Imitate)),
    case(c.certain_thoughts_are_tokens, "latent-sft", "half", with_(Match, coefficient=0.5)),
    case(c.certain_thoughts_are_tokens, "latent-sft", "everywhere", with_(Match, where=None)),
    case(c.certain_thoughts_are_tokens, "latent-sft", "exchanged", with_(Match, where="answer")),
    case(c.certain_thoughts_are_tokens, "latent-sft", "mean-of-all", with_(Match, reduce=TokenMean())),
    case(c.certain_thoughts_are_tokens, "latent-sft", "jensen", with_(Match, divergence=JensenShannon(0.5))),
    # Beyond its entries a thought gives probability 0, so the other direction is infinite.
    case(c.certain_thoughts_are_tokens, "latent-sft", "reverse", with_(Match, divergence=ReverseKL())),
    case(c.certain_thoughts_are_tokens, "latent-sft", "shifted", shifted),
    case(c.own_thoughts_cost_nothing, "latent-sft", "shifted", shifted),
    case(c.own_thoughts_cost_nothing, "latent-sft", "sign", flipped()),
    case(c.own_thoughts_cost_nothing, "latent-sft", "zero", without(Match)),
    case(c.own_thoughts_cost_nothing, "latent-sft", "answers", with_(Match, where="answer")),
]

BROKEN_FULL = [
    case(c.laws_answer_what_their_argmax_cannot, "latent-sft", "no-thoughts", without(Match)),
    case(c.laws_answer_what_their_argmax_cannot, "latent-sft", "shifted", shifted),
]

OTHERWISE = [c.thoughts_lie_in_the_hull, c.paths_are_counted]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_recipe_is_refuted(broken: Broken):
    refute(broken)


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN_FULL)
def test_a_broken_recipe_is_refuted_by_its_behaviour(broken: Broken):
    refute(broken)


@pytest.mark.slow
def test_laws_answer_what_their_argmax_cannot():
    shown, holds = c.laws_answer_what_their_argmax_cannot()
    assert holds, shown


def test_thoughts_that_leave_the_hull_are_seen():
    def unnormalised(model: Any, soft: SoftTokens) -> Tensor:
        return 2 * soft.weight @ embedding_rows(model)

    def flattened(model: Any, soft: SoftTokens) -> Tensor:
        return 0.9 * soft.weight @ embedding_rows(model)

    assert c.thoughts_lie_in_the_hull()[1]
    assert not c.thoughts_lie_in_the_hull(unnormalised)[1]
    assert not c.thoughts_lie_in_the_hull(flattened)[1]


def test_paths_that_are_counted_otherwise_are_seen():
    def entropy(scores: Tensor) -> float:
        p = scores.softmax(-1)
        return float(-torch.special.xlogy(p, p).sum())

    def participation(scores: Tensor) -> float:
        return float(1 / scores.softmax(-1).max() + 0.01)

    assert c.paths_are_counted()[1]
    assert not c.paths_are_counted(entropy)[1]
    assert not c.paths_are_counted(participation)[1]
