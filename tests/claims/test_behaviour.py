"""The claims about behaviour over tables are refuted by recipes, and rules, that are broken."""

from __future__ import annotations

from typing import Any

import pytest

from claims.breaking import Broken, case, flipped, refute, with_
from leibler.claims import behaviour as b
from leibler.divergence import ForwardKL, Jeffreys, ReverseKL
from leibler.objective import Column, Fit, Match, Teacher
from leibler.theory import full_soft_labels, hard_labels

BROKEN = [
    case(b.akl_stands_between_head_and_tail, "akl", "sign", flipped()),
    case(b.akl_stands_between_head_and_tail, "akl", "forward", with_(Match, divergence=ForwardKL())),
    case(b.akl_stands_between_head_and_tail, "akl", "reverse", with_(Match, divergence=ReverseKL())),
    case(b.distillm_can_be_estimated, "distillm", "unskewed", lam=0.0),
    case(b.distillm_bounds_each_pull, "distillm", "unskewed", lam=0.0),
    case(b.distillm_bounds_each_pull, "distillm", "other-skew", lam=0.2),
    case(b.distillm_bounds_each_pull, "distillm", "jeffreys", with_(Match, divergence=Jeffreys())),
]

BROKEN_FULL = [
    case(b.akl_ends_where_both_end, "akl", "sign", flipped()),
    case(b.generations_from_samples, "recursive-meta-distillation", "no-anchor", anchor=0.0),
    case(b.generations_from_samples, "recursive-meta-distillation", "always-anchored", anchor=0.3),
    case(b.generations_from_samples, "recursive-meta-distillation", "geometric", geometric=True),
    case(b.generations_from_samples, "recursive-meta-distillation", "from-the-teacher", with_(Match, to=Teacher())),
    case(
        b.transfer_by_gradients,
        "transfer-limits",
        "twice-the-logarithm",
        with_(Fit, target=Column("label_logp", reach="token") + Column("label_logp", reach="token")),
    ),
]

OTHERWISE = [b.transfer_rates]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_method_refutes_its_claim(broken: Broken):
    refute(broken)


@pytest.mark.slow
@pytest.mark.parametrize("broken", BROKEN_FULL)
def test_a_broken_method_refutes_its_behaviour(broken: Broken):
    refute(broken)


@pytest.mark.parametrize(
    "wrong",
    [
        {"partial": lambda counts, teacher: hard_labels(counts)},
        {"hard": full_soft_labels},
        {"weighted": lambda counts, teacher: hard_labels(counts)},
        {"full": lambda counts, teacher: hard_labels(counts)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_other_rules_refute_the_rates(wrong: dict[str, Any]):
    observed, holds = b.transfer_rates({**b.RULES, **wrong})  # type: ignore[call-arg]
    assert not holds, observed
