"""More than one process: the numbers of one, whatever each has of the rows or the weights; and one of two killed.

python tests/soak/run.py --only processes
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from soak.table import Row, different_bits
from train.equal_runs import RECIPES, differences, go
from train.launching import SHARDED, TESTS, Started, finish, workers

SECTION = "processes"
PROGRAM = [sys.executable, str(TESTS / "train" / "equal_runs.py")]
FIRST = ("gkd", "dpo", "kdrl")
"""A distillation, a preference and an on-policy recipe: never left out."""
STEPS = 5
COMPARED = ("metrics.jsonl", "samples.jsonl", "final/model.safetensors")


def run(out: Path, seed: int, scale: float) -> list[Row]:
    slugs = [*FIRST, *(slug for slug in RECIPES if slug not in FIRST)][: max(len(FIRST), round(len(RECIPES) * scale))]
    for slug in slugs:
        go(out / "one", slug)
    return [
        equal(out, "two", slugs, {}, "rows shared out between two processes: losses within 1e-5 of one's"),
        equal(out, "sharded", slugs, SHARDED, "weights shared out too (FSDP2): losses within 1e-5 of one's"),
        killed(out, seed, max(1, round(3 * scale))),
    ]


def equal(out: Path, name: str, slugs: Sequence[str], env: Mapping[str, str], fault: str) -> Row:
    """Each recipe once more, by two processes."""
    begun = time.monotonic()
    with workers([*PROGRAM, str(out / name), *slugs], out / f"said-{name}", **env) as both:
        if any(finish(both, timeout=600)):
            print(*(one.text[-2000:] for one in both), sep="\n", file=sys.stderr)
    same = lost = 0
    for slug in slugs:
        one, two = out / "one" / slug, out / name / slug
        lost += max(lines(one) - lines(two), 0)
        if lines(two) == lines(one) and (two / "final" / "model.safetensors").exists():
            found = differences(one, two)[1]
            print(*found, sep="\n", file=sys.stderr, end="\n" if found else "")
            same += not found
    return Row(SECTION, fault, len(slugs), same, lost, None, time.monotonic() - begun)


def killed(out: Path, seed: int, times: int) -> Row:
    """One of two processes is killed; the other must end by itself, and both go on to the same bytes."""
    begun, chance = time.monotonic(), random.Random(seed)
    whole = out / "unbroken"
    with workers([*PROGRAM, str(whole), "kdrl"], out / "said-unbroken") as both:
        finish(both)
    survived = bits = lost = 0
    for number in range(times):
        place, after, rank = out / f"killed-{number}", chance.randint(1, STEPS - 2), chance.randint(0, 1)
        with workers([*PROGRAM, str(place), "kdrl"], out / f"said-killed-{number}") as both:
            wait(place / "kdrl", after, both)
            both[rank].process.kill()
            left = both[1 - rank].wait(60)
            told = "another process of this run ended" in both[1 - rank].text
        with workers([*PROGRAM, "--resume", str(place), "kdrl"], out / f"said-resumed-{number}") as both:
            ended = finish(both)
        survived += bool(left) and told and ended == [0, 0]
        lost += max(lines(whole / "kdrl") - lines(place / "kdrl"), 0)
        for file in COMPARED:
            before, after_all = whole / "kdrl" / file, place / "kdrl" / file
            bits += different_bits(before.read_bytes(), after_all.read_bytes() if after_all.exists() else b"")
    fault = "one of two processes killed; the other ends by itself, both go on"
    return Row(SECTION, fault, times, survived, lost, bits, time.monotonic() - begun)


def lines(run: Path) -> int:
    path = run / "metrics.jsonl"
    return len([json.loads(line) for line in path.read_text().splitlines()]) if path.exists() else 0


def wait(run: Path, step: int, both: Sequence[Started], timeout: float = 120) -> None:
    limit = time.monotonic() + timeout
    while lines(run) < step and time.monotonic() < limit and all(one.process.poll() is None for one in both):
        time.sleep(0.02)
