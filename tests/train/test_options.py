"""Options of a run."""

from __future__ import annotations

import math

import pytest

from leibler.errors import RunError
from leibler.train import Options


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        ("none", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1.0, 1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4)]),
    ],
)
def test_learning_rate(decay, expected):
    options = Options(steps=6, warmup=2, decay=decay, learning_rate=2.0)
    assert [options.rate(s) for s in range(6)] == pytest.approx([2 * x for x in expected])


def test_learning_rate_without_warmup():
    assert [Options(steps=4, learning_rate=1.0, decay="linear").rate(s) for s in range(5)] == [
        1.0,
        0.75,
        0.5,
        0.25,
        0.0,
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps=0 must be at least 1"),
        ({"batch_size": -1}, "batch_size=-1 must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be greater than 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be greater than 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be greater than 0"),
        ({"micro_batch_size": 0}, "micro_batch_size=0 must be at least 1"),
        ({"tokens": 0}, "tokens=0 must be at least 1; leave it out"),
        ({"keep": 0}, "keep=0 must be at least 1"),
        ({"save_every": -1}, "save_every=-1 must be at least 0"),
        ({"validate_every": -1}, "validate_every=-1 must be at least 0"),
        ({"warmup": -1}, "warmup=-1 must be at least 0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0 must be greater than 0; inf switches clipping off"),
        ({"max_grad_norm": math.nan}, "max_grad_norm=nan must be greater than 0"),
        ({"beta1": 1.0}, "beta1=1.0 must be at least 0 and below 1"),
        ({"beta2": -0.1}, "beta2=-0.1 must be at least 0 and below 1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 must be at least 0"),
        ({"adapter_rank": 0}, "adapter_rank=0 must be at least 1; leave it out"),
        ({"on_divergence": "rollback"}, "save_every=0 writes none; set save_every"),
        ({"decay": "step"}, "decay='step' must be one of none, linear, cosine"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(RunError, match=message):
        Options(**changes)


def test_clipping_can_be_switched_off():
    assert Options(max_grad_norm=math.inf, beta1=0.0, adapter_rank=None).max_grad_norm == math.inf
