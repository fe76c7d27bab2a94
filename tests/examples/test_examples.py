"""The examples run, and what they say they show is seen."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def example(name: str):
    import sys

    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_all_are_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"distil", "custom_divergence", "reward"}


def test_distilling_brings_the_student_nearer(tmp_path):
    found = example("distil").main(tmp_path, steps=12, batch_size=32, questions=24)
    assert found["after"]["reverse_kl"] < found["before"]["reverse_kl"]


def test_both_forms_of_the_divergence_agree(tmp_path):
    module = example("custom_divergence")
    (a, slope_a), (b, slope_b) = (module.gradients(d) for d in (module.BY_AUTOGRAD, module.SymmetricChiSquared()))
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(slope_a, slope_b)
    assert 0 < float(a) < 2


def test_a_divergence_of_ones_own_is_descended(tmp_path):
    first, last = example("custom_divergence").main(tmp_path, steps=10)
    assert last < first


def test_a_reward_of_ones_own_is_learned(tmp_path):
    first, last = example("reward").main(tmp_path, steps=15, batch_size=64)
    assert last > first + 0.05


@pytest.mark.parametrize(("texts", "rewards"), [(["aaa", "ab", ""], [1.0, 0.5, 0.0])])
def test_the_reward_itself(texts, rewards):
    assert example("reward").few_letters([], texts) == rewards
