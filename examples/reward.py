"""GRPO with a reward of one's own: any function of the records and the texts of the responses.

    python examples/reward.py [--steps 40] [--out runs/reward]

The reward here wants few different letters and a short answer; it needs no label. What the published recipe takes from
the checker of a data set (``Score(Answer())``), a recipe of one's own takes from ``Score(function)``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

from leibler.data import Record
from leibler.divergence import ReverseKL
from leibler.estimate import K2
from leibler.objective import Clip, GroupNormalised, Match, Objective, PolicyGradient, Reference, Reward
from leibler.policy import character_tokenizer, tiny_llama
from leibler.train import OnPolicy, Recipe, Score, fit


def few_letters(records: Sequence[Record], responses: Sequence[str]) -> list[float]:
    """One finite number for each response: 1 for a single repeated letter, less for every other one."""
    return [1.0 / max(len(set(text)), 1) if text else 0.0 for text in responses]


def recipe(coefficient: float = 0.02) -> Recipe:
    """Advantages relative to the group, and a reverse KL to the model that the run began with."""
    return Recipe(
        OnPolicy(group_size=8) >> Score(few_letters),
        Objective(
            PolicyGradient(Reward() >> GroupNormalised(), Clip(0.2)),
            Match(ReverseKL(), to=Reference(), estimator=K2(), coefficient=coefficient),
        ),
    )


def main(out: Path, steps: int = 40, batch_size: int = 64) -> tuple[float, float]:
    """Returns the mean reward at the first and at the last step."""
    model = tiny_llama(character_tokenizer("abcd"), hidden=32, layers=1, heads=4)
    prompts = [{"prompt": a + b} for a in "abcd" for b in "abcd"]
    size = {"batch_size": batch_size, "max_new_tokens": 6, "learning_rate": 3e-3, "quiet": True}
    first = fit(recipe(), student=model.copy(), data=prompts, out=out / "first", steps=1, **size).metrics["reward"]
    last = fit(recipe(), student=model.copy(), data=prompts, out=out / "all", steps=steps, **size).metrics["reward"]
    print(f"mean reward {first:.3f} at the first step, {last:.3f} after {steps}")
    return first, last


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=None, help="a new directory; a temporary one by default")
    arguments = parser.parse_args()
    main(arguments.out or Path(tempfile.mkdtemp(prefix="leibler-")), arguments.steps)
