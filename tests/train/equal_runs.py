"""Whole runs of recipes whose numbers must not depend on how many processes share them; a program for each of those.

python equal_runs.py [--resume] OUT SLUG ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from train.running import PAIRS, RECORDS, recipe, run, student

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "kd": {},
    "gkd": {},
    "dpo": {},
    "kdrl": {"group_size": 2},
    "grpo": {"group_size": 2, "minibatches": 2, "epochs": 2},
    "ppo": {"minibatches": 2, "epochs": 1, "target": 0.05, "horizon": 100.0},
    "minillm": {"epochs": 2},
    "disco": {"group_size": 2, "minibatches": 3},
    "inpo": {"group_size": 3, "steps_per_round": 2},
    "distillm": {},
}
"""Distillation, preferences, rewards; whitening, controllers, surveys, dropped rows, snapshots, a replay buffer.

Three groups of two are uneven shares for two processes.
"""


def go(out: Path, slug: str, **more: Any) -> None:
    options: dict[str, Any] = {"steps": 5, "batch_size": 6, "save_every": 2, "student": student(dropout=0.0)}
    options["data"] = PAIRS if slug == "dpo" else RECORDS
    options["micro_batch_size"] = None if slug == "kd" else 2
    if slug == "distillm":
        options["validation"] = RECORDS[:4]
    run(recipe(slug, **RECIPES[slug]), out / slug, **{**options, **more})


def differences(one: Path, two: Path, relative: float = 1e-5, absolute: float = 1e-6) -> tuple[int, list[str]]:
    """How many lines were compared, and where the runs in two directories say something else."""
    found, lines = [], 0
    for name in ("metrics.jsonl", "validation.jsonl"):
        a, b = ([json.loads(line) for line in (d / name).read_text().splitlines()] for d in (one, two))
        if len(a) != len(b):
            found.append(f"{one.name}/{name}: {len(a)} and {len(b)} lines")
        for before, after in zip(a, b):
            lines += 1
            if before.keys() != after.keys():
                found.append(f"{one.name}/{name} step {before['step']}: other keys")
            for key in before.keys() & after.keys():
                x, y = float(before[key]), float(after[key])
                if abs(x - y) > relative * abs(x) + absolute * max(1.0, abs(float(before.get("grad_norm", 1.0)))):
                    found.append(f"{one.name}/{name} step {before['step']}: {key} {x} and {y}")
    return lines, found


def main(arguments: Sequence[str]) -> None:
    torch.set_num_threads(1)
    resume = arguments[0] == "--resume"
    out, *slugs = arguments[resume:]
    for slug in slugs:
        go(Path(out), slug, resume=resume)


if __name__ == "__main__":
    main(sys.argv[1:])
