"""How a model fares in an environment of several turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from leibler.environment.playing import Episode, Start, environment_of, play, sampled_turn
from leibler.errors import DataError
from leibler.measure.samples import mean_pass_at_k
from leibler.policy.randomness import uniforms

if TYPE_CHECKING:
    from leibler.data import Dataset
    from leibler.environment import Environment
    from leibler.policy import CausalLM


def success(
    model: CausalLM,
    dataset: Dataset,
    n_samples: int = 0,
    temperature: float = 1.0,
    max_new_tokens: int = 16,
    seed: int = 0,
    *,
    environment: Environment | None = None,
    batch_size: int = 64,
    after: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """The share of tasks that a model solves, turn by turn.

    Args:
        model: the player.
        dataset: tasks, as ``env:NAME`` makes them. An episode with a reward of at least 1 is a success.
        n_samples: sampled episodes of each task; 0: only the greedy one.
        temperature: of the samples, above 0.
        max_new_tokens: the longest action.
        seed: of the samples; the same seed asks the same of another model.
        environment: is played instead of what the records name.
        batch_size: episodes played side by side; changes nothing but memory and rounding.
        after: called with the number of episodes that are over, for progress.

    Returns:
        ``tasks``, ``success`` (greedy), ``reward``, ``turns`` (of the greedy episodes), ``finished`` (share that the
        environment ended), ``overflow`` (share that the model's context ended); with samples ``pass@1``, ``pass@2``,
        ``pass@4``, ... up to ``n_samples``.

    Raises:
        DataError: there is no task, or the temperature is not above 0.

    Examples:
        >>> from leibler.data import load
        >>> from leibler.environment import TextWorld
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> model = tiny_llama(character_tokenizer(TextWorld().alphabet), hidden=16, layers=1, heads=2, max_length=400)
        >>> found = success(model, load("env:textworld:rooms=3,depth=1,limit=2,n=2"), max_new_tokens=4)
        >>> found["tasks"], found["success"], found["turns"]
        (2, 0.0, 2.0)
    """
    if not len(dataset):
        raise DataError(f"{dataset.name} is empty; give at least one task.")
    if n_samples and temperature <= 0:
        raise DataError(f"samples cannot be drawn at temperature {temperature}; give one above 0, or n_samples=0.")
    starts = [Start(*environment_of(record, environment)) for record in dataset]
    over = 0

    def played(part: Sequence[Start], first: int, temperature: float) -> list[Episode]:
        nonlocal over
        before = over

        def act(dialogues: Sequence[list[int]], turn: int, which: Sequence[int]) -> list[tuple[list[int], list[float]]]:
            if temperature == 0:
                numbers = torch.zeros((len(which), max_new_tokens), dtype=torch.float64)
            else:
                rows = [uniforms(seed, f"success/{turn}", 0, 1, max_new_tokens, first_row=first + w) for w in which]
                numbers = torch.cat(rows)
            return sampled_turn(model, dialogues, numbers, temperature)

        def tell(turn: int, ended: int) -> None:
            if after is not None:
                after(before + ended)

        limit = model.context or 1 << 30
        episodes = play(model, part, act, max_new_tokens=max_new_tokens, max_length=limit, after=tell)
        over += len(part)
        return episodes

    greedy = [e for i in range(0, len(starts), batch_size) for e in played(starts[i : i + batch_size], i, 0.0)]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values)

    result: dict[str, Any] = {
        "tasks": len(starts),
        "success": mean([e.reward >= 1 for e in greedy]),
        "reward": mean([e.reward for e in greedy]),
        "turns": mean([e.turns for e in greedy]),
        "finished": mean([e.done for e in greedy]),
        "overflow": mean([e.overflow for e in greedy]),
    }
    if not n_samples:
        return result
    many = [start for start in starts for _ in range(n_samples)]
    sampled = [e for i in range(0, len(many), batch_size) for e in played(many[i : i + batch_size], i, temperature)]
    counts = [sum(e.reward >= 1 for e in sampled[i : i + n_samples]) for i in range(0, len(sampled), n_samples)]
    k = 1
    while k <= n_samples:
        result[f"pass@{k}"] = mean_pass_at_k(n_samples, counts, k)
        k *= 2
    return result
