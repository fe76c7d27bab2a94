"""A run that was stopped and gone on with is the run that was never stopped: every weight, every byte."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leibler.errors import RunError
from leibler.train import RaiseOnWorse
from train.running import PAIRS, RECORDS, Stopped, interrupted, recipe, run, stopped, student, written

Options = dict[str, Any]

CASES: dict[str, tuple[str, dict[str, Any], int, Options]] = {
    # recipe, its parameters, the draw at which it is stopped, options
    "kd": ("kd", {}, 4, {"save_every": 3}),
    "gkd, so many tokens": ("gkd", {}, 3, {"save_every": 2, "tokens": 160}),
    "sft, decay": ("sft", {}, 4, {"save_every": 2, "decay": "cosine", "warmup": 2, "weight_decay": 0.1}),
    "grpo": ("grpo", {"group_size": 4}, 5, {"save_every": 2}),
    "grpo, stale": ("grpo", {"group_size": 2, "minibatches": 2, "epochs": 2}, 2, {"save_every": 3, "steps": 12}),
    "kdrl": ("kdrl", {"group_size": 4}, 3, {"save_every": 2}),
    "ppo": (
        "ppo",
        {"minibatches": 2, "epochs": 2, "target": 0.01, "horizon": 50.0},
        2,
        {"save_every": 4, "steps": 14},
    ),
    "distillm": ("distillm", {"capacity": 20}, 9, {"save_every": 4, "steps": 12, "validate_every": 2}),
    "inpo": ("inpo", {"group_size": 3, "steps_per_round": 2}, 5, {"save_every": 3, "steps": 7}),
    "minillm": ("minillm", {"epochs": 2}, 2, {"save_every": 2}),
    "dpo": ("dpo", {}, 4, {"save_every": 3, "data": PAIRS}),
    "disco": ("disco", {"group_size": 4}, 2, {"save_every": 2}),
    "g-opd": ("g-opd", {}, 3, {"save_every": 2}),
}


def make(slug: str, params: dict[str, Any]):
    def build(stop: int | None):
        made = recipe(slug, stop, **params)
        if slug == "distillm":
            # Every validation raises phi, so that fresh and replayed rows occur in a short run.
            source = replace(recipe(slug, **params).source, phi=RaiseOnWorse(by=0.5, tolerance=-10.0))
            made = replace(made, source=source if stop is None else stopped(source, stop))
        return made

    return build


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_ends_as_if_it_had_not_been(name, tmp_path):
    slug, params, stop, options = CASES[name]
    build = make(slug, params)
    whole = run(build(None), tmp_path / "whole", **options)
    again = interrupted(build, tmp_path / "stopped", stop, **options)
    assert list((tmp_path / "stopped" / "checkpoints").iterdir()), "it went on from a checkpoint"
    assert written(tmp_path / "stopped") == written(tmp_path / "whole")
    assert again.metrics == whole.metrics
    assert again.validation == whole.validation
    steps = [json.loads(line)["step"] for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, options.get("steps", 6) + 1))


def test_the_cases_are_no_idle_ones(tmp_path):
    """The controller moved, the buffer was used, the snapshot was renewed, dropout dropped."""
    slug, params, _, options = CASES["ppo"]
    run(make(slug, params)(None), tmp_path / "ppo", **options)
    state = json.loads(next((tmp_path / "ppo" / "checkpoints").glob("step-*12/state.json")).read_text())
    assert state["signals"][0]["coefficient"] != 0.1
    slug, params, _, options = CASES["distillm"]
    run(make(slug, params)(None), tmp_path / "distillm", **options)
    state = json.loads(next((tmp_path / "distillm" / "checkpoints").glob("step-*12/state.json")).read_text())
    assert state["source"]["phi"]["phi"] == 1.0
    rollouts = state["source"]["rollouts"]["position"] // 8
    data = state["source"]["data"]["position"] // 8
    assert rollouts >= 1
    assert data >= 1
    assert rollouts + data < 12, "some draws came from the buffer"
    first, second = (run(recipe("kd"), tmp_path / n, student=student(dropout=d)) for n, d in (("a", 0.0), ("b", 0.2)))
    assert first.metrics["loss"] != second.metrics["loss"]


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tmp_path):
    build = make("kd", {})
    run(build(None), tmp_path / "whole")
    interrupted(build, tmp_path / "stopped", 3)
    assert written(tmp_path / "stopped") == written(tmp_path / "whole")


@pytest.mark.parametrize("how", ["torn", "all"])
def test_a_spoilt_checkpoint_is_passed_over(how, tmp_path, capsys):
    build = make("kd", {})
    run(build(None), tmp_path / "whole", save_every=2)
    out = tmp_path / "stopped"
    with pytest.raises(Stopped):
        run(build(5), out, save_every=2)
    kept = sorted((out / "checkpoints").glob("step-*"))
    assert [p.name for p in kept] == ["step-00000002", "step-00000004"]
    for path in kept[1:] if how == "torn" else kept:
        (path / "policy.safetensors").write_bytes(b"torn")
    run(build(None), out, save_every=2, resume=True, quiet=False)
    assert "step-00000004 has an altered policy.safetensors and was passed over" in capsys.readouterr().err
    assert written(out) == written(tmp_path / "whole")


def test_a_finished_run_may_be_resumed_and_is_left_as_it_was(tmp_path):
    build = make("grpo", {"group_size": 4})
    options: Options = {"save_every": 3, "validation": RECORDS[:4], "validate_every": 3}
    run(build(None), tmp_path / "run", **options)
    before = written(tmp_path / "run")
    run(build(None), tmp_path / "run", resume=True, **options)
    assert written(tmp_path / "run") == before


def test_validation_happens_once_at_each_interval(tmp_path):
    """Also where a checkpoint is due at the same step, and after a resume."""
    options: Options = {"save_every": 2, "validation": RECORDS[:4], "validate_every": 2, "steps": 7}
    interrupted(make("kd", {}), tmp_path / "run", 5, **options)
    lines = (tmp_path / "run" / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 7]


def test_resuming_with_other_records_or_weights_is_refused(tmp_path):
    out = tmp_path / "run"
    build = make("kd", {})
    with pytest.raises(Stopped):
        run(build(4), out, save_every=2)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(RunError, match=r"the records of data.train are not those that the run in .* was begun with"):
        run(build(None), out, save_every=2, resume=True, data=RECORDS[1:])
    with pytest.raises(RunError, match="the weights of the model student are not those"):
        run(build(None), out, save_every=2, resume=True, student=student(4))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_trained_student_in_memory_is_not_the_one_that_began(tmp_path):
    model = student()
    with pytest.raises(Stopped):
        run(recipe("dpo", 4), tmp_path / "run", student=model, data=PAIRS, save_every=2)
    with pytest.raises(RunError, match="a model in memory that was trained since is another one"):
        run(recipe("dpo"), tmp_path / "run", student=model, data=PAIRS, save_every=2, resume=True)


def test_what_was_already_written_twice_is_cut_off(tmp_path):
    """Lines after the checkpoint are of steps that are done again."""
    build = make("kd", {})
    with pytest.raises(Stopped):
        run(build(4), tmp_path / "run", save_every=3)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 4
    run(build(None), tmp_path / "run", save_every=3, resume=True)
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 6
    assert len((tmp_path / "run" / "timings.jsonl").read_text().splitlines()) == 6


def test_what_breaks_bit_equality_is_told(tmp_path, capsys):
    """And the run goes on."""
    out = tmp_path / "run"
    build = make("kd", {})
    with pytest.raises(Stopped):
        run(build(4), out, save_every=2)
    state = json.loads((out / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["environment"].keys() >= {
        "torch",
        "threads",
        "processes",
        "cpu_capability",
        "device",
        "dtype",
        "recipe",
    }
    # The same again: nothing to say but that a stage is gone, which stopped it.
    run(build(4), out, save_every=2, resume=True, quiet=False, steps=4)
    assert "because steps was 6 and is 4" in capsys.readouterr().err
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        run(build(None), out, save_every=3, resume=True, quiet=False, learning_rate=0.02, keep=5)
    finally:
        torch.set_num_threads(threads)
    said = capsys.readouterr().err
    changed = (
        f"threads was {threads} and is {threads + 1}, the recipe is another one, learning_rate was 0.01 and is 0.02"
    )
    assert f"not bit-exact with an unbroken run, because {changed}\n" in said
    assert (out / "final").exists()


def test_an_unchanged_run_has_nothing_to_say(tmp_path, capsys):
    build = make("kd", {})
    run(build(None), tmp_path / "run", save_every=4)
    run(build(None), tmp_path / "run", save_every=4, resume=True, quiet=False)
    assert "bit-exact" not in capsys.readouterr().err


def test_options_that_change_no_number_change_no_environment():
    from leibler.train import Options
    from leibler.train.environment import environment

    def known(**options: Any) -> dict[str, Any]:
        return environment(Options(**options), recipe("sft"), student(), 1)

    assert known(sample_every=3, guard_steps=9, guard_draws=9, save_every=7) == known()
    assert known(max_divergence=1.0) != known()


def test_log_files_that_lost_lines_are_told(tmp_path, capsys):
    build = make("kd", {})
    with pytest.raises(Stopped):
        run(build(4), tmp_path / "run", save_every=3)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    run(build(None), tmp_path / "run", save_every=3, resume=True, quiet=False)
    assert "metrics.jsonl lacks lines that were written before the checkpoint" in capsys.readouterr().err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [4, 5, 6]


def test_a_run_killed_in_its_set_up_is_begun_again(tmp_path):
    """What stands there before run.yaml is whole is no run: the same command works."""
    out = tmp_path / "run"
    (out / "set_aside").mkdir(parents=True)
    (out / ".writing-run.yaml").write_text("recipe: h")
    run(make("kd", {})(None), out)
    run(make("kd", {})(None), tmp_path / "whole")
    assert written(out) == written(tmp_path / "whole")
    assert not list(out.glob(".writing*"))


def test_a_run_killed_while_its_model_was_written_goes_on(tmp_path):
    build = make("kd", {})
    run(build(None), tmp_path / "whole")
    out = tmp_path / "run"
    run(build(None), out)
    (out / "final").rename(out / ".writing-final")
    (out / ".writing-final" / "model.safetensors").write_bytes(b"half")
    run(build(None), out, resume=True)
    assert written(out) == written(tmp_path / "whole")
    assert not list(out.glob(".writing*"))


SCRIPT = """
import sys, time
from pathlib import Path
from dataclasses import replace
import torch
torch.set_num_threads(1)
from train.running import recipe, run
from leibler.train.sources import Staged

class Slow:
    def __call__(self, rows, context):
        print("draw", context.draw, flush=True)
        time.sleep(0.15)
        return rows

made = recipe("grpo", group_size=4)
run(replace(made, source=Staged(made.source, Slow())), Path(sys.argv[1]), resume=sys.argv[2] == "resume", steps=12)
"""


def test_ctrl_c_saves_and_the_run_goes_on(tmp_path):
    """The first signal ends the run after the draw at hand, with a checkpoint; resumed, it ends as an unbroken one."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(out), "new"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line == "draw 3\n":
            process.send_signal(signal.SIGINT)
            break
    _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in error
    saved = [p.name for p in (out / "checkpoints").iterdir()]
    assert saved == ["step-00000004"]
    assert not (out / "final").exists()
    made = recipe("grpo", group_size=4)
    threads = torch.get_num_threads()
    run(made, out, resume=True, steps=12)
    run(made, tmp_path / "whole", steps=12)
    assert torch.get_num_threads() == threads
    assert written(out) == written(tmp_path / "whole")
