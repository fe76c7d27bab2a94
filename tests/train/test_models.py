"""Named models and how their weights move."""

from __future__ import annotations

import pytest
import torch

from leibler.data import Dataset, Record
from leibler.errors import ModelError
from leibler.policy import character_tokenizer
from leibler.train import EMA, Frozen, Snapshot, Trained, ValueHead
from leibler.train.models import Measured, resolve
from train.conformance import tiny


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_initial_is_the_policy_as_it_was():
    policy = tiny(0).requires_grad_(True)
    models, modules = resolve({"reference": Frozen(), "previous": Snapshot(), "slow": EMA(0.1)}, policy, {})
    assert modules == {}
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1.0)
    for model in models.values():
        assert not same(model, policy)
        assert not any(p.requires_grad for p in model.parameters())
        assert not model.training
    assert all(p.requires_grad for p in policy.parameters())


def test_equal_frozen_models_share_their_weights_and_moving_ones_do_not():
    policy, teacher = tiny(0), tiny(1)
    rules = {
        "a": Frozen("teacher"),
        "teacher": Frozen("teacher"),
        "b": EMA(0.1, "teacher"),
        "c": Snapshot(1, "teacher"),
    }
    models, _ = resolve(rules, policy, {"teacher": teacher})
    assert models["a"] is models["teacher"] is teacher
    assert len({id(models[n]) for n in "abc"}) == 3
    assert same(models["b"], teacher)


def test_a_given_model_stands_for_its_name():
    given = tiny(2)
    models, _ = resolve({"reference": Frozen("initial")}, tiny(0), {"reference": given})
    assert models["reference"] is given


def test_the_student_may_be_its_own_teacher():
    policy = tiny(0).requires_grad_(True)
    models, _ = resolve({"teacher": Frozen("teacher")}, policy, {"teacher": policy})
    assert models["teacher"] is not policy
    assert all(p.requires_grad for p in policy.parameters())


def test_a_missing_model_names_the_option():
    with pytest.raises(ModelError, match="needs the model 'teacher', which was not given; add teacher=DIR"):
        resolve({"teacher": Frozen("teacher")}, tiny(0), {})
    with pytest.raises(ModelError, match=r"needs the model 'base'.* add models.base=DIR"):
        resolve({"base": Frozen("base")}, tiny(0), {})


def test_models_must_share_the_tokenizer():
    other = tiny(1, tokenizer=character_tokenizer("0123456789-="))
    with pytest.raises(ModelError, match="tokenizers differ"):
        resolve({"teacher": Frozen("teacher")}, tiny(0), {"teacher": other})


def test_a_critic_starts_at_zero():
    _, modules = resolve({"critic": Trained(ValueHead())}, tiny(0), {})
    assert float(modules["critic"](torch.ones(3, 16)).abs().max()) == 0


def test_when_they_move():
    snapshot, ema = Snapshot(every=2), EMA(0.1)
    assert [s for s in range(13) if snapshot.due(s, 3)] == [6, 12]
    assert not any(snapshot.due(s, 0) for s in range(13))
    assert [s for s in range(4) if ema.due(s, 3)] == [1, 2, 3]
    assert not any(Frozen().due(s, 3) for s in range(13))
    assert (snapshot.moves, ema.moves, Frozen().moves, Trained().moves) == (True, True, False, True)


def test_how_they_move():
    policy, model = tiny(0), tiny(2)
    before = weights(model)
    EMA(0.25).refresh(model, policy)
    for now, old, theirs in zip(model.parameters(), before, policy.parameters(), strict=True):
        torch.testing.assert_close(now, old + 0.25 * (theirs - old))
    Snapshot().refresh(model, policy)
    assert same(model, policy)
    with torch.no_grad():
        next(policy.parameters()).add_(1.0)
    assert not same(model, policy)


def test_a_band_is_measured_without_dropout_and_the_model_goes_on_as_it_was():
    policy = tiny(0)
    seen: list[bool] = []
    policy.register_forward_hook(lambda module, given, out: seen.append(module.training))
    policy.train()
    Measured("train").measure(policy, Dataset((Record("1+2=", completion="3"),) * 3, "three"), rows=2)
    assert seen == [False, False]
    assert policy.training
