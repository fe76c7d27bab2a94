"""Success in an environment, against playing it by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from environment.made import Sums
from leibler.cli import main
from leibler.data import Dataset, Record
from leibler.environment import TextWorld
from leibler.errors import DataError
from leibler.measure import mean_pass_at_k, success
from leibler.policy import character_tokenizer, sample, tiny_llama, uniforms
from train.conformance import tiny

GAME = Sums(2)
TASKS = Dataset(tuple(Record(str(i)) for i in range(12)), "tasks")


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(0, loud=6.0)


def by_hand(model: Any, task: str, numbers: Any, temperature: float) -> float:
    """The reward of one episode, one dialogue at a time."""
    session = GAME.session()
    dialogue, reward = model.encode_prompt(session.reset(task) + "="), 0.0
    for turn in range(2):
        (action,) = sample(model, [dialogue], uniforms=numbers(turn), temperature=temperature).completions()
        outcome = session.step(model.decode(action).strip())
        reward += outcome.reward
        dialogue = dialogue + action + model.tokenizer.encode(outcome.observation + "=", add_special_tokens=False)
    return reward


def test_greedy_and_sampled_success_are_those_of_playing_by_hand(model):
    found = success(model, TASKS, 4, 0.7, 3, seed=5, environment=GAME)
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    greedy = [by_hand(model, r.prompt, lambda turn: zeros, 0.0) for r in TASKS]
    assert found["success"] == found["reward"] == sum(greedy) / 12
    counts = []
    for i, record in enumerate(TASKS):
        rewards = [
            by_hand(model, record.prompt, lambda t, row=4 * i + g: uniforms(5, f"success/{t}", 0, 1, 3, row), 0.7)
            for g in range(4)
        ]
        counts.append(int(sum(rewards)))
    assert 0 < sum(counts) < 48
    assert {k: found[k] for k in ("pass@1", "pass@2", "pass@4")} == {
        f"pass@{k}": mean_pass_at_k(4, counts, k) for k in (1, 2, 4)
    }
    assert (found["tasks"], found["turns"], found["finished"], found["overflow"]) == (12, 2.0, 1.0, 0.0)


def test_how_many_are_played_together_changes_nothing_and_progress_is_told(model):
    told: list[int] = []
    whole = success(model, TASKS, 2, 0.7, 3, environment=GAME)
    assert success(model, TASKS, 2, 0.7, 3, environment=GAME, batch_size=5, after=told.append) == whole
    assert told == sorted(told)
    assert told[-1] == 36


def test_a_full_context_is_counted(model):
    found = success(model, TASKS, max_new_tokens=28, environment=Sums(9))
    assert found["overflow"] == 1.0
    assert found["finished"] == found["success"] == 0.0


def test_mistakes_are_told(model):
    with pytest.raises(DataError, match="temperature 0"):
        success(model, TASKS, 2, 0.0, environment=GAME)
    with pytest.raises(DataError, match="names no task of an environment"):
        success(model, TASKS)


def test_from_the_command_line(tmp_path, capsys):
    model = tiny_llama(character_tokenizer(TextWorld().alphabet), hidden=16, layers=1, heads=2, max_length=400)
    model.save(tmp_path / "model")
    house = "env:textworld:rooms=2,depth=1,doors=0,limit=2,n=3"
    call = ["measure", "success", "--model", str(tmp_path / "model"), "--data", house, "--max-new-tokens", "3"]
    with pytest.raises(SystemExit) as stop:
        main([*call, "--samples", "1", "--json"])
    assert not stop.value.code
    assert '"tasks": 3' in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main([*call[:5], "task:addition:n=2"])
    assert stop.value.code == 2
    assert "names no task of an environment" in capsys.readouterr().err
