"""`leibler train` of a method in two stages: stop, kill, go on, one stage again, the report."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from leibler.policy import character_tokenizer, tiny_llama
from leibler.train.pipeline import DONE

COMMAND = [sys.executable, "-m", "leibler"]
OPTIONS = ("steps=8", "batch_size=8", "max_new_tokens=3", "learning_rate=1e-2", "save_every=2")
ADPA = (
    "train", "adpa", "recipe.variant=adpa+", "student=student", "teacher=teacher", "models.teacher_base=base",
    "data=pairs.jsonl", *OPTIONS,
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    tokenizer = character_tokenizer("0123456789+=")
    for seed, name in enumerate(("student", "teacher", "base")):
        tiny_llama(tokenizer, hidden=16, layers=1, heads=2, seed=seed).save(folder / name)
    pairs = [{"prompt": f"{i}+{j}=", "chosen": str(i + j), "rejected": f"{i + j}1"} for i in range(4) for j in range(4)]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    done = leibler(*ADPA, "out=whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def leibler(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL
    )


def written(out: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "samples.jsonl", "model.safetensors")
    return {
        str(p.relative_to(out)): p.read_bytes()
        for p in out.rglob("*")
        if p.name in names and "checkpoints" not in p.parts
    }


@pytest.mark.slow
@pytest.mark.parametrize(("how", "step", "stage"), [("INT", 1, "2-adpa"), ("KILL", 3, "1-dckd")])
def test_a_stopped_or_killed_run_goes_on_bit_for_bit(how, step, stage, place):
    out = place / how.lower()
    process = subprocess.Popen([*COMMAND, *ADPA, f"out={out.name}"], cwd=place, stderr=subprocess.PIPE, text=True)
    metrics = out / stage / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step) and time.monotonic() < until:
        time.sleep(0.005)
    os.kill(process.pid, getattr(signal, f"SIG{how}"))
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait(timeout=60) == (130 if how == "INT" else -signal.SIGKILL)
    assert how == "KILL" or f"go on with: leibler train --resume {out.name}" in said
    # The directory of a stage leads to its run.
    again = leibler("train", "--resume", f"{out.name}/{stage}", cwd=place)
    assert again.returncode == 0, again.stderr
    assert written(out) == written(place / "whole")


@pytest.mark.slow
def test_one_stage_again_the_whole_again_and_the_report(place):
    one = leibler("train", "whole/2-adpa/run.yaml", "out=one", cwd=place)
    assert one.returncode == 0, one.stderr
    alone = (place / "one" / "final" / "model.safetensors").read_bytes()
    assert alone == (place / "whole" / "final" / "model.safetensors").read_bytes()
    assert not (place / "one" / DONE).exists()
    again = leibler("train", "--resume", "one", cwd=place)
    assert again.returncode == 0, again.stderr
    changed = leibler("train", "whole/run.yaml", "out=two", "recipe.stages.adpa.learning_rate=1e-9", cwd=place)
    assert changed.returncode == 0, changed.stderr
    first = [(place / n / "1-dckd" / "metrics.jsonl").read_bytes() for n in ("whole", "two")]
    assert first[0] == first[1]
    assert (place / "two" / "final" / "model.safetensors").read_bytes() != alone
    report = leibler("report", "whole", cwd=place)
    assert report.returncode == 0, report.stderr
    page = (place / "whole" / "report.html").read_text()
    for part in ("adpa, 1-dckd", "adpa, 2-adpa", "2 stages begun", 'id="1-dckd-curves"', 'id="2-adpa-curves"'):
        assert part in page
    # Only the last stage's model is measured.
    assert 'id="2-adpa-calibration"' in page
    assert 'id="1-dckd-calibration"' not in page
    for file, change in (("run.yaml", "stage: adpa"),):
        path = place / "one" / file
        path.write_text(path.read_text().replace(change, "stage: other"))
    refused = leibler("train", "one/run.yaml", "out=three", cwd=place)
    assert refused.returncode == 2
    assert "adpa has no stage 'other', but dckd, adpa" in refused.stderr
