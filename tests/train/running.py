"""Small whole runs: a student with dropout, records, recipes with fixed rewards, and a way to stop in the middle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leibler import recipes
from leibler.data import Record
from leibler.objective import Rows
from leibler.policy import CausalLM
from leibler.train import Context, Mixture, Recipe, Run, fit
from leibler.train.sources import Source, Staged
from train.conformance import reward, scored, tiny

RECORDS = [
    {"prompt": f"{i}+{j}=", "completion": str(i + j), "answer": str(i + j), "id": f"{i}{j}"}
    for i in range(6)
    for j in range(5)
]
PAIRS = [{"prompt": r["prompt"], "chosen": r["answer"], "rejected": r["answer"] + "1"} for r in RECORDS]


def student(seed: int = 0, dropout: float = 0.2) -> CausalLM:
    return tiny(seed, dropout=dropout, dtype=torch.float32, loud=6.0)


class Stopped(Exception):
    """Stands for a machine that was switched off."""


@dataclass(frozen=True)
class StopAt:
    """A stage that lets draws pass until one."""

    draw: int

    def __call__(self, rows: Rows, context: Context) -> Rows:
        if context.draw == self.draw:
            raise Stopped
        return rows


def recipe(slug: str, stop: int | None = None, **params: Any) -> Recipe:
    made = recipes.get(slug, **params)
    source = scored(made.source)
    return Recipe(source if stop is None else stopped(source, stop), made.objective, made.schedule, made.models)


def stopped(source: Source, draw: int) -> Source:
    if isinstance(source, Mixture):
        (name, first), *rest = source.sources
        return Mixture(((name, stopped(first, draw)), *rest))
    return Staged(source, StopAt(draw))


def run(made: Recipe, out: Path, **options: Any) -> Run:
    """A run of the recipe on the student with dropout."""
    given: dict[str, Any] = {
        "student": student(), "data": RECORDS, "steps": 6, "batch_size": 8, "learning_rate": 0.01, "max_new_tokens": 4,
        "seed": 11, "quiet": True, "sample_every": 2,
    }  # fmt: skip
    if "teacher" in made.models:
        given["teacher"] = student(1, dropout=0.0)
    if "base" in made.models:
        given["models"] = {"base": student(2, dropout=0.0)}
    return fit(made, out=out, **{**given, **options})


def written(out: Path) -> dict[str, bytes]:
    """What must be equal in a repeated run: everything but clocks."""
    found = {n: (out / n).read_bytes() for n in ("metrics.jsonl", "samples.jsonl", "validation.jsonl")}
    found["weights"] = (out / "final" / "model.safetensors").read_bytes()
    return found


def interrupted(make: Callable[[int | None], Recipe], out: Path, stop: int, **options: Any) -> Run:
    """The run stopped at a draw, without warning, and gone on with."""
    try:
        run(make(stop), out, **options)
    except Stopped:
        pass
    else:
        raise AssertionError("the run was not stopped")
    return run(make(None), out, resume=True, **options)


__all__ = [
    "PAIRS",
    "RECORDS",
    "Record",
    "StopAt",
    "Stopped",
    "interrupted",
    "recipe",
    "reward",
    "run",
    "student",
    "written",
]
