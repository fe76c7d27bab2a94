"""Two processes are as good as one: the same numbers, whatever share of the rows each has."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from train.running import PAIRS, RECORDS, recipe, run, student

RECIPES = {
    "kd": {},
    "dpo": {},
    "grpo": {"group_size": 2, "minibatches": 2, "epochs": 2},
    "ppo": {"minibatches": 2, "epochs": 1, "target": 0.05, "horizon": 100.0},
    "minillm": {"epochs": 2},
    "disco": {"group_size": 2, "minibatches": 3},
    "inpo": {"group_size": 3, "steps_per_round": 2},
}
out = Path(sys.argv[1])
for slug, params in RECIPES.items():
    data = PAIRS if slug == "dpo" else RECORDS
    run(recipe(slug, **params), out / slug, data=data, student=student(dropout=0.0), steps=5, batch_size=6,
        micro_batch_size=None if slug == "kd" else 2, save_every=2)
"""


def launch(script: Path, out: Path, processes: int) -> None:
    here = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*start, str(script), str(out)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, error = process.communicate(timeout=400)
    finally:
        # Workers that wait for each other would outlive their launcher.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, error[-3000:]


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    for processes in (1, 2):
        launch(script, tmp_path / str(processes), processes)
    compared = 0
    for one in sorted((tmp_path / "1").iterdir()):
        two = tmp_path / "2" / one.name
        for name in ("metrics.jsonl", "validation.jsonl"):
            a, b = ([json.loads(line) for line in (d / name).read_text().splitlines()] for d in (one, two))
            assert len(a) == len(b)
            for before, after in zip(a, b, strict=True):
                compared += 1
                assert before.keys() == after.keys()
                assert after == pytest.approx(before, rel=2e-3, abs=2e-4), (one.name, before["step"])
        saved = [{p.name for p in (d / "checkpoints").iterdir()} for d in (one, two)]
        assert saved[0] == saved[1]
    assert compared >= 35
