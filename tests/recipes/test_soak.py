"""Every recipe for many steps: the numbers stay finite and the memory stays bounded. Only ``make soak`` runs it."""

from __future__ import annotations

import json
import math
import resource
from pathlib import Path

import pytest

from leibler import recipes
from leibler.data import Brackets
from leibler.objective import Preference
from leibler.policy import CausalLM, character_tokenizer, tiny_llama
from leibler.train import fit

STEPS = 300
TASK = Brackets(depth=2, length=4)


def small(seed: int) -> CausalLM:
    return tiny_llama(character_tokenizer(TASK.alphabet), hidden=32, layers=1, heads=2, seed=seed)


def rows(slug: str) -> list[dict[str, str]]:
    """Prompts with right answers, and wrong ones for methods that learn from given pairs."""
    records = TASK.sample(200, seed=0)
    recipe = recipes.get(slug)
    pairs = (
        any(isinstance(t, Preference) for t in recipe.objective.terms) and "labels" in recipe.source.datasets().values()
    )
    if pairs:
        return [{"prompt": r.prompt, "chosen": str(r.completion), "rejected": "(("} for r in records]
    return [{"prompt": r.prompt, "completion": str(r.completion), "answer": str(r.answer)} for r in records]


@pytest.mark.soak
@pytest.mark.parametrize("slug", recipes.names())
def test_a_recipe_runs_for_long(slug: str, tmp_path: Path):
    recipe = recipes.get(slug)
    sources = {rule.source for rule in recipe.models.values()} - {"initial"}
    memory: list[int] = []

    def go(steps: int, out: str) -> list[dict[str, float]]:
        run = fit(
            recipe,
            student=small(0),
            teacher=small(1) if "teacher" in sources else None,
            models={name: small(2) for name in sources - {"teacher"}},
            data=rows(slug),
            out=tmp_path / out,
            steps=steps,
            batch_size=16,
            learning_rate=1e-3,
            max_new_tokens=6,
            save_every=50,
            quiet=True,
        )
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        return [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]

    go(20, "warm")  # imports, caches and buffers
    lines = go(STEPS, "long")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        for name, value in line.items():
            assert math.isfinite(float(value)), (line["step"], name, value)
    # Kilobytes at the peak: what grew with the number of steps is at most some tens of megabytes.
    assert memory[1] - memory[0] < 64_000, memory
    assert len(list((tmp_path / "long" / "checkpoints").iterdir())) <= 2, "old checkpoints are removed"
