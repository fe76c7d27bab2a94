"""Two processes are as good as one: the same numbers, whatever share of the rows each has, and one voice."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from leibler.errors import RunError
from leibler.policy import CausalLM
from train.equal_runs import RECIPES, differences, go
from train.launching import TESTS, TORCHRUN, Started, finish, started, workers
from train.running import PAIRS, RECORDS, student

EQUAL_RUNS = [sys.executable, str(TESTS / "train" / "equal_runs.py")]

MEETING = """
import json, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from leibler.errors import DataError
from leibler.train import Options, journal, run_file
from leibler.train.processes import Processes, leave
from train.equal_runs import go
from train.running import RECORDS

out = Path(sys.argv[1])
p = Processes.start(Options(), out)
seen = {"world": p.world, "rank": p.rank, "main": p.main}
seen["sum"] = float(p.sum(torch.tensor(1.0 + p.rank)))
seen["most"] = p.most(10 * p.rank)
seen["gathered"] = p.gather({"from": p.rank})
seen["from main"] = p.from_main(lambda: f"said by {p.rank}")

a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
a.grad = torch.full((2,), 1.0 + p.rank)
if p.rank == 1:
    b.grad = torch.full((2,), 4.0)
p.average([a, b, c])
seen["average"] = [a.grad.tolist(), b.grad.tolist(), c.grad is None]

def fails(where, error):
    if p.rank == where:
        raise error
    return "fine"

for name, where, error in (("ours", 1, DataError("no such file.")), ("theirs", 0, TypeError("not a number"))):
    try:
        p.together(lambda: fails(where, error))
    except Exception as found:
        seen[name] = [type(found).__name__, str(found), getattr(found, "elsewhere", None)]

def within(error, nested):
    def make():
        if p.rank == 0:
            raise error
        return p.gather("from within")
    return p.together(make) if nested else make()

# The first fails within an exchange of the others: they hear of it once, and the next exchange is one of its own.
for name, nested, error in (("within", False, DataError("row 3.")), ("nested", True, TypeError("not a number"))):
    try:
        p.together(lambda: within(error, nested))
    except Exception as found:
        seen[name] = [type(found).__name__, str(found), getattr(found, "elsewhere", None), p.gather(p.rank)]

write, begin = run_file.write, journal.Journal.__init__

def slowly(*given, **named):
    time.sleep(0.3)
    return write(*given, **named)

def looking(self, where, *given):
    seen["run.yaml stands"] = (where / "run.yaml").exists()
    begin(self, where, *given)

run_file.write, journal.Journal.__init__ = slowly, looking
go(out, "grpo", steps=2)                  # three groups: two and one
go(out / "small", "kdrl", steps=1, batch_size=2, validation=RECORDS[7:8])   # one and none
Path(sys.argv[2] + str(p.rank)).write_text(json.dumps(seen))
leave()
"""


def test_two_processes_meet(tmp_path):
    script, seen = tmp_path / "script.py", tmp_path / "seen-"
    script.write_text(MEETING)
    with workers([sys.executable, str(script), str(tmp_path / "two"), str(seen)], tmp_path / "said") as both:
        go(tmp_path / "one", "grpo", steps=2)
        go(tmp_path / "one" / "small", "kdrl", steps=1, batch_size=2, validation=RECORDS[7:8])
        assert finish(both) == [0, 0], both[0].text + both[1].text
    first, second = (json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in (0, 1))
    for rank, found in enumerate((first, second)):
        assert (found["world"], found["rank"], found["main"]) == (2, rank, rank == 0)
        assert (found["sum"], found["most"]) == (3.0, 10)
        assert found["gathered"] == [{"from": 0}, {"from": 1}]
        assert found["from main"] == "said by 0"
        assert found["run.yaml stands"]
        # A gradient in one process only counts half; where there is none, none is made.
        assert found["average"] == [[1.5, 1.5], [2.0, 2.0], True]
    assert first["ours"] == ["DataError", "no such file.", True]
    assert second["ours"] == ["DataError", "no such file.", False]
    assert first["theirs"][0] == "TypeError"
    assert second["theirs"] == [
        "RunError", "process 0 failed (TypeError: not a number); its traceback says where.", True,
    ]  # fmt: skip
    assert first["within"] == ["DataError", "row 3.", False, [0, 1]]
    assert second["within"] == ["DataError", "row 3.", True, [0, 1]]
    assert first["nested"] == ["TypeError", "not a number", False, [0, 1]]
    assert second["nested"] == [
        "RunError", "process 0 failed (TypeError: not a number); its traceback says where.", True, [0, 1],
    ]  # fmt: skip
    for slug in ("grpo", "small/kdrl"):
        compared, found = differences(tmp_path / "one" / slug, tmp_path / "two" / slug)
        assert compared
        assert not found
        files = [{p.name for p in (tmp_path / w / slug).rglob("*")} for w in ("one", "two")]
        assert files[0] == files[1]


def test_more_processes_than_accelerate_finds(tmp_path, monkeypatch):
    from leibler.train import Options
    from leibler.train.processes import Processes

    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(RunError, match="3 processes were started but Accelerate found 1"):
        Processes.start(Options(), tmp_path)


@pytest.mark.slow
def test_two_processes_are_one(tmp_path):
    with workers([*EQUAL_RUNS, str(tmp_path / "2"), *RECIPES], tmp_path / "said") as both:
        for slug in RECIPES:
            go(tmp_path / "1", slug)
        assert finish(both) == [0, 0], both[0].text[-3000:] + both[1].text[-3000:]
    for slug in RECIPES:
        compared, found = differences(tmp_path / "1" / slug, tmp_path / "2" / slug)
        assert compared >= 5
        assert not found
        saved = [{p.name for p in (tmp_path / n / slug / "checkpoints").iterdir()} for n in ("1", "2")]
        assert saved[0] == saved[1]


# ---- the command line ------------------------------------------------------------------------------------------------


def command(tmp_path: Path, recipe: str, out: str, **changes: Any) -> list[str]:
    """``leibler train`` on files; made where they are not there yet."""
    if not (tmp_path / "student").exists():
        student(dropout=0.0).save(tmp_path / "student")
        student(1, dropout=0.0).save(tmp_path / "teacher")
        for name, records in (("records", RECORDS), ("pairs", PAIRS)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    keys: dict[str, Any] = {
        "student": tmp_path / "student", "out": tmp_path / out, "steps": 8, "batch_size": 6, "learning_rate": 0.01,
        "max_new_tokens": 4, "save_every": 2, "seed": 3,
        "data": tmp_path / ("pairs.jsonl" if recipe == "dpo" else "records.jsonl"),
    }  # fmt: skip
    if recipe != "dpo":
        keys["teacher"] = tmp_path / "teacher"
    if recipe == "kdrl":
        keys["recipe.group_size"] = 2
    return ["train", recipe, *(f"{name}={value}" for name, value in {**keys, **changes}.items())]


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for_step(out: Path, step: int, both: Sequence[Started], timeout: float = 120) -> None:
    """Until the run has done ``step`` optimiser steps."""
    limit = time.monotonic() + timeout
    while len(lines(out / "metrics.jsonl")) < step:
        assert time.monotonic() < limit, "the run did not get that far"
        assert all(one.process.poll() is None for one in both), both[0].text + both[1].text
        time.sleep(0.05)


def written(out: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "samples.jsonl", "final/model.safetensors")
    return {name: (out / name).read_bytes() for name in names}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["gkd", "dpo", "kdrl"])
def test_the_command_line_under_torchrun(tmp_path, recipe):
    with started([*TORCHRUN, "-m", "leibler", *command(tmp_path, recipe, "two")], tmp_path) as launcher:
        assert launcher.wait() == 0, launcher.text
        said = launcher.text
    with started([sys.executable, "-m", "leibler", *command(tmp_path, recipe, "one")], tmp_path) as alone:
        assert alone.wait() == 0, alone.text
    compared, found = differences(tmp_path / "one", tmp_path / "two")
    assert compared == 8
    assert not found
    # One voice: the last step and the summary are said once.
    assert said.count("train 8/8") == 1
    assert said.count("the trained model") == 1
    assert CausalLM.load(tmp_path / "two" / "final").vocab_size == student().vocab_size


@pytest.mark.slow
def test_two_processes_killed_and_gone_on_with(tmp_path):
    whole = command(tmp_path, "kdrl", "whole")
    with workers([sys.executable, "-m", "leibler", *whole], tmp_path / "said-whole") as both:
        assert finish(both) == [0, 0], both[0].text
    with workers([sys.executable, "-m", "leibler", *command(tmp_path, "kdrl", "killed")], tmp_path / "said") as both:
        wait_for_step(tmp_path / "killed", 5, both)
        for one in both:
            one.process.kill()
    assert not (tmp_path / "killed" / "final").exists()
    resume = [sys.executable, "-m", "leibler", "train", "--resume", str(tmp_path / "killed")]
    with workers(resume, tmp_path / "said-again") as both:
        assert finish(both) == [0, 0], both[0].text
    assert written(tmp_path / "killed") == written(tmp_path / "whole")


@pytest.mark.slow
def test_both_use_the_checkpoint_that_the_first_finds_whole(tmp_path):
    stops = command(tmp_path, "gkd", "torn", steps=4)
    with workers([sys.executable, "-m", "leibler", *stops], tmp_path / "said") as both:
        assert finish(both) == [0, 0], both[0].text
    newest = tmp_path / "torn" / "checkpoints" / "step-00000004" / "policy.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1] + b"\0")
    resume = [sys.executable, "-m", "leibler", "train", "--resume", str(tmp_path / "torn")]
    with workers(resume, tmp_path / "said-again") as both:
        assert finish(both) == [0, 0], both[0].text + both[1].text
        assert both[0].text.count("was passed over") == 1
        assert "passed over" not in both[1].text
    assert [m["step"] for m in lines(tmp_path / "torn" / "metrics.jsonl")] == [1, 2, 3, 4]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "to"), [(signal.SIGINT, (0, 1)), (signal.SIGTERM, (1,))])
def test_a_signal_to_either_saves_once_and_ends_both(tmp_path, number, to):
    endless = command(tmp_path, "gkd", "out", steps=2000, save_every=0)
    with workers([sys.executable, "-m", "leibler", *endless], tmp_path / "said") as both:
        wait_for_step(tmp_path / "out", 3, both)
        for rank in to:
            os.kill(both[rank].process.pid, number)
        assert finish(both, timeout=60) == [130, 130], both[0].text + both[1].text
        assert both[0].text.count("go on with: leibler train --resume") == 2  # the loop's line and the command's
        assert "go on with" not in both[1].text
    done = lines(tmp_path / "out" / "metrics.jsonl")[-1]["step"]
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == [f"step-{done:08d}"]


@pytest.mark.slow
def test_a_mistake_is_said_once_and_ends_both(tmp_path):
    wrong = command(tmp_path, "gkd", "out", data="nowhere.jsonl")
    with workers([sys.executable, "-m", "leibler", *wrong], tmp_path / "said") as both:
        assert finish(both, timeout=60) == [2, 2]
        assert sum(one.text.count("nowhere.jsonl") for one in both) == 1, both[0].text + both[1].text
        assert all("Traceback" not in one.text for one in both)
    assert not (tmp_path / "out").exists()


LATE = """
import sys
from pathlib import Path
import torch
from leibler.cli import main
from leibler.train import engine

# A mistake that one process meets in the middle of a run, between two collective operations.
accumulate = engine.Engine.accumulate
def broken(self, batch):
    import os
    if os.environ["RANK"] == "1" and sys.argv[1] == "raise" and next(iter(batch.values())).step == 2:
        from leibler.errors import DataError
        raise DataError("row 17 is not what it seemed.")
    if os.environ["RANK"] == "1" and sys.argv[1] == "die" and next(iter(batch.values())).step == 2:
        os._exit(9)
    return accumulate(self, batch)
engine.Engine.accumulate = broken
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "status"), [("raise", 2), ("die", 9)])
def test_what_one_meets_in_a_step_does_not_hang_the_other(tmp_path, how, status):
    script = tmp_path / "late.py"
    script.write_text(LATE)
    begun = time.monotonic()
    with workers([sys.executable, str(script), how, *command(tmp_path, "gkd", "out")], tmp_path / "said") as both:
        assert finish(both, timeout=90) == [2, status], both[0].text + both[1].text
        assert "error: another process of this run ended" in both[0].text
        assert "Traceback" not in both[0].text + both[1].text
        assert ("error: row 17 is not what it seemed." in both[1].text) == (how == "raise")
    assert time.monotonic() - begun < 90
    # What was saved is whole, and the run can be gone on with.
    resume = [sys.executable, "-m", "leibler", "train", "--resume", str(tmp_path / "out")]
    with workers(resume, tmp_path / "said-again") as both:
        assert finish(both) == [0, 0], both[0].text + both[1].text
    assert [m["step"] for m in lines(tmp_path / "out" / "metrics.jsonl")] == list(range(1, 9))
