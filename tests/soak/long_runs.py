"""Every recipe for many steps: the numbers stay finite, the memory stays bounded, old checkpoints go."""

from __future__ import annotations

import json
import math
import resource
import string
import time
from functools import partial
from pathlib import Path
from typing import Any

from leibler import recipes
from leibler.data import Brackets
from leibler.policy import CausalLM, MaskedLM, character_tokenizer, tiny_llama, tiny_masked
from leibler.sweep.needs import asked
from leibler.train import fit, recipes_of
from leibler.train.masking import reads_masked
from soak.table import Row

STEPS = 300
TASK = Brackets(depth=2, length=4)
WORLD = "env:textworld:rooms=2,depth=1,limit=4,n=64"
ALPHABET = string.printable[:95] + "\n"
PARAMETERS = {"latent-sft": {"open": "(", "close": ")"}}
"""Markers that the alphabet has."""
GROWTH = 64_000
"""Kilobytes that the peak may grow by: what grew with the number of steps is at most some tens of megabytes."""


def run(out: Path, seed: int, scale: float) -> list[Row]:
    started, survived, lost = time.monotonic(), 0, 0
    slugs, steps = recipes.names(), max(round(STEPS * scale), 60)
    for slug in slugs:
        faults, missing = endure(slug, out, steps=steps, seed=seed)
        survived += not faults
        lost += missing
        for fault in faults:
            print(f"{slug}: {fault}")
    return [Row("long runs", f"{steps} steps of each recipe", len(slugs), survived, lost, None,
                time.monotonic() - started)]  # fmt: skip


def endure(slug: str, out: Path, *, steps: int = STEPS, seed: int = 0) -> tuple[list[str], int]:
    """Train by one recipe; what went wrong in it, and how many lines of metrics are missing or twice."""
    warm = go(slug, 20, out / f"{slug}-warm", seed)  # imports, caches and buffers
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    long = go(slug, steps, out / f"{slug}-long", seed)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    faults = []
    expected = list(range(1, steps + 1))
    found = [line["step"] for line in long]
    if found != expected:
        faults.append(f"the lines are of the steps {found}")
    for line in (*warm, *long):
        faults += [f"{n} is {v} at step {line['step']}" for n, v in line.items() if not math.isfinite(float(v))]
    if after - before > GROWTH:
        faults.append(f"the memory grew by {after - before} kB")
    for folder in (out / f"{slug}-long").rglob("checkpoints"):
        kept = len(list(folder.iterdir()))
        if kept > 2:
            faults.append(f"{kept} checkpoints were kept in {folder}")
    return faults, abs(len(found) - len(expected)) + len(set(expected) - set(found))


def go(slug: str, steps: int, out: Path, seed: int) -> list[dict[str, float]]:
    method = recipes.get(slug, **PARAMETERS.get(slug, {}))
    needs = asked(method)
    episodes = any("environment" in columns for columns in needs.columns.values())
    masked = any(reads_masked(recipe.source) for recipe in recipes_of(method).values())
    model: Any = partial(masked_model if masked else small, ALPHABET if episodes else TASK.alphabet)
    run = fit(
        method,
        student=model(0),
        teacher=model(1) if "teacher" in needs.models else None,
        models={name: model(2) for name in needs.models - {"teacher"}},
        data={name: WORLD if episodes else rows(name in needs.pairs) for name in needs.data},
        out=out,
        steps=steps,
        batch_size=16,
        learning_rate=1e-3,
        max_new_tokens=6,
        save_every=50,
        seed=seed,
        quiet=True,
    )
    lines: list[dict[str, float]] = []
    for file in sorted(run.out.rglob("metrics.jsonl")):  # a stage counts its steps from 1
        before = len(lines)
        found = [json.loads(line) for line in file.read_text().splitlines()]
        lines += [{**line, "step": line["step"] + before} for line in found]
    return lines


def small(alphabet: str, seed: int) -> CausalLM:
    return tiny_llama(character_tokenizer(alphabet), hidden=32, layers=1, heads=2, seed=seed, max_length=512)


def masked_model(alphabet: str, seed: int) -> MaskedLM:
    return tiny_masked(character_tokenizer(alphabet), hidden=32, layers=1, heads=2, seed=seed)


def rows(pairs: bool) -> list[dict[str, Any]]:
    """Prompts with right answers, wrong ones where pairs are asked for, and the columns that some methods read."""
    records = TASK.sample(200, seed=0)
    if pairs:
        return [{"prompt": r.prompt, "chosen": str(r.completion), "rejected": "(("} for r in records]
    return [
        {
            "prompt": r.prompt,
            "completion": str(r.completion),
            "answer": str(r.answer),
            "pass_rate": i % 5 / 4,
            "label_logp": [-0.5] * (len(str(r.completion)) + 1),  # one a character, and one for the end
            "latents": {"token": [[4, 5], [6]], "weight": [[0.75, 0.25], [1.0]]},
        }
        for i, r in enumerate(records)
    ]
