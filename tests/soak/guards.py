"""Guards: runs in which things go wrong, and which must go on, or stop, as promised."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from leibler.errors import RunError
from leibler.objective import Rows
from leibler.train import Context, Recipe, Score
from leibler.train.guards import read_batch
from leibler.train.sources import Source, Staged
from soak.table import Row
from train.conformance import reward
from train.running import recipe, student
from train.running import run as train

STEPS = 16


@dataclass(frozen=True)
class Broken:
    """A stage under which the numbers of some draws are not finite."""

    draws: frozenset[int]
    value: float

    def __call__(self, rows: Rows, context: Context) -> Rows:
        if context.draw not in self.draws:
            return rows
        spoilt = rows.columns["behaviour_logp"].masked_fill(rows.mask, self.value)
        return rows.with_columns(reward=torch.full_like(rows.columns["reward"], self.value), behaviour_logp=spoilt)


def staged(made: Recipe, stage: Any) -> Recipe:
    source: Source = Staged(made.source, stage)
    return replace(made, source=source)


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = out / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def missing(out: Path, steps: int = STEPS) -> int:
    """Lines of metrics that are not there, or are there twice."""
    found = [line["step"] for line in lines(out)]
    return len(set(range(1, steps + 1)) ^ set(found)) + len(found) - len(set(found))


def not_finite(out: Path, randomness: random.Random) -> tuple[int, int, int]:
    """Steps that are not finite: skipped one by one, their batches kept, the weights finite at the end."""
    draws = frozenset(randomness.sample(range(STEPS), 5))
    made = staged(recipe("grpo", group_size=4), Broken(draws, randomness.choice([math.nan, math.inf, -math.inf])))
    done = train(made, out, steps=STEPS, seed=randomness.randrange(1000), guard_steps=STEPS)
    warned = [w["step"] - 1 for w in lines(out, "warnings.jsonl") if w["guard"] == "non_finite"]
    kept = [read_batch(out / "guards" / f"step-{d + 1:08d}.safetensors") for d in warned]
    good = all(p.isfinite().all() for p in done.policy.parameters())
    survived = sum(d in draws for d in warned) if good and len(kept) == len(warned) else 0
    return len(draws), survived, missing(out)


def diverging(out: Path, randomness: random.Random) -> tuple[int, int, int]:
    """A learning rate that no model survives: skipped, then stopped with a diagnosis."""
    try:
        train(recipe("sft"), out, steps=STEPS, learning_rate=1e30, seed=randomness.randrange(1000))
    except RunError as error:
        return 1, int("steps in a row were skipped" in str(error) and "not finite" in str(error)), missing(out, 6)
    return 1, 0, 0


def failing_rewards(out: Path, randomness: random.Random) -> tuple[int, int, int]:
    """Rewards that raise or return nonsense for one response in eight: each set aside with its reason."""
    failed, seen = [0], [0]
    nonsense: list[Callable[[], Any]] = [lambda: math.nan, lambda: None, lambda: "good", lambda: 1 / 0, lambda: [1, 2]]

    def by(records: Any, texts: Any) -> list[Any]:
        values: list[Any] = list(reward(records, texts))
        if len(texts) > 1:
            seen[0] += len(texts)
            at = randomness.randrange(len(texts))
            fault = randomness.choice([f for f in nonsense if f is not nonsense[3]])
            values[at] = fault()
            failed[0] += 1
        return values

    train(staged(recipe("grpo", group_size=4), Score(by)), out, steps=STEPS, seed=randomness.randrange(1000))
    aside = lines(out, "set_aside/responses.jsonl")
    learnt = sum(int(line["rows"]) for line in lines(out))
    # Every response was learnt from or stands in the file; groups of four that lose one keep three.
    lost = seen[0] - learnt - len(aside)
    return failed[0], len(aside), abs(lost) + missing(out)


def raising_rewards(out: Path, randomness: random.Random) -> tuple[int, int, int]:
    """Rewards that raise on some texts, whatever else is in the call."""
    letter = randomness.choice("0123456789")

    def by(records: Any, texts: Any) -> list[float]:
        if any(t.startswith(letter) for t in texts):
            raise ValueError(f"no {letter}")
        return list(reward(records, texts))

    train(staged(recipe("grpo", group_size=8), Score(by)), out, steps=STEPS, seed=randomness.randrange(1000))
    aside = lines(out, "set_aside/responses.jsonl")
    good = sum(a["response"].startswith(letter) and f"ValueError: no {letter}" in a["reason"] for a in aside)
    return max(len(aside), 1), good, missing(out)


def dead_reward(out: Path, randomness: random.Random) -> tuple[int, int, int]:
    """A reward that always raises: stopped with its reason."""

    def by(records: Any, texts: Any) -> list[float]:
        raise KeyError("answer")

    try:
        train(staged(recipe("grpo", group_size=4), Score(by)), out, seed=randomness.randrange(1000))
    except RunError as error:
        return 1, int("every response of 3 draws in a row" in str(error) and "KeyError: 'answer'" in str(error)), 0
    return 1, 0, 0


def tripwire(out: Path, randomness: random.Random) -> tuple[int, int, int]:
    """A divergence beyond its bound: gone back, with a larger coefficient, until it holds or the run stops."""
    options: dict[str, Any] = {"steps": STEPS, "learning_rate": 0.03, "seed": randomness.randrange(1000)}
    made = recipe("grpo", group_size=4, coefficient=0.2)
    train(made, out / "free", student=student(dropout=0.0), **options)
    name = "divergence/ReverseKL(reference)"
    bound = 0.8 * max(line[name] for line in lines(out / "free"))
    try:
        train(made, out / "held", student=student(dropout=0.0), save_every=2, max_divergence=bound,
            on_divergence="rollback", **options)  # fmt: skip
    except RunError as error:
        held = "after going back 5 times" in str(error)
        return 1, int(held), 0
    held = all(line[name] <= bound for line in lines(out / "held")) and bool(lines(out / "held", "warnings.jsonl"))
    return 1, int(held), missing(out / "held")


FAULTS: dict[str, Callable[[Path, random.Random], tuple[int, int, int]]] = {
    "loss or gradient not finite": not_finite,
    "learning rate that no model survives": diverging,
    "reward returns nonsense": failing_rewards,
    "reward raises": raising_rewards,
    "reward always raises": dead_reward,
    "divergence beyond its bound": tripwire,
}


def run(out: Path, seed: int, scale: float) -> list[Row]:
    rows = []
    for fault, provoke in FAULTS.items():
        started, sums = time.monotonic(), [0, 0, 0]
        for i in range(max(round(4 * scale), 1)):
            randomness = random.Random(f"{seed}/{fault}/{i}")
            folder = out / f"{provoke.__name__}-{i}"
            folder.parent.mkdir(parents=True, exist_ok=True)
            sums = [a + b for a, b in zip(sums, provoke(folder, randomness), strict=True)]
        rows.append(Row("guards", fault, *sums, None, time.monotonic() - started))
    return rows
