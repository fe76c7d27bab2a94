"""Whole sweeps of a few steps: equal tokens, going on, failing, the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from leibler import cli, recipes
from leibler.errors import RunError
from leibler.policy import character_tokenizer, tiny_llama
from leibler.sweep import Settings, run_sweep
from leibler.sweep import run as runs
from leibler.sweep.provide import prepare
from leibler.sweep.settings import Setup, read_json
from leibler.sweep.worker import work

RECORDS = [
    {"prompt": f"{i}+{j}=", "completion": str(i + j), "answer": str(i + j)}
    for i in range(10)
    for j in range(10)
    if i + j
]
OPTIONS = {"batch_size": 8, "max_new_tokens": 8, "learning_rate": 0.01, "tokens": 150}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """A student, a teacher and a file of sums."""
    folder = tmp_path_factory.mktemp("given")
    for name, seed in (("student", 0), ("teacher", 1)):
        tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2, seed=seed).save(folder / name)
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in RECORDS))
    return {"student": str(folder / "student"), "teacher": str(folder / "teacher"), "data": str(folder / "sums.jsonl")}


def settings(given: dict[str, str], **more: Any) -> Settings:
    own = {"student": given["student"], "teacher": given["teacher"], "data": {"train": given["data"]}}
    return Settings(**{**own, "options": OPTIONS, "samples": 2, "limit": 8, **more})


@pytest.fixture
def here(monkeypatch) -> list[dict[str, Any]]:
    """Jobs are done in this process; what was done, in order."""
    done: list[dict[str, Any]] = []

    def process(out: Path, text: str, log: Path, look: Any = lambda: None, echo: Any = None) -> int:
        job = json.loads(text)
        done.append(job)
        with log.open("w") as file, pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", file)
            status = work(out, job)
        if status == 130:
            raise KeyboardInterrupt
        return status

    monkeypatch.setattr(runs, "_process", process)
    return done


def trained(out: Path, name: str) -> list[float]:
    lines = (out / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["tokens"] for line in lines]


def test_methods_train_on_equally_many_tokens_within_one_batch(given, here, tmp_path):
    content = run_sweep(["sft", "kd", "gkd"], tmp_path, settings(given), quiet=True)
    assert [row["name"] for row in content["rows"]] == ["student, before", "teacher", "sft", "kd", "gkd"]
    assert content == read_json(tmp_path / "sweep.json")
    assert content["complete"]
    for row in content["rows"][2:]:
        tokens = trained(tmp_path, f"{row['slug']}-0")
        assert sum(tokens) == row["metrics"]["tokens"] >= 150 > sum(tokens[:-1])
        assert row["metrics"]["steps"] == len(tokens)
        assert row["metrics"]["tokens_per_second"] > 0
        assert row["metrics"]["memory"] >= 0  # nothing, where an earlier test of this process took more
        assert 0 <= row["metrics"]["accuracy"] <= 1
    before, teacher = content["rows"][:2]
    assert teacher["metrics"]["forward_kl"] == pytest.approx(0, abs=1e-6)
    assert before["metrics"]["forward_kl"] > 0.001
    assert before["metrics"]["pass@2"] >= before["metrics"]["pass@1"]
    assert "tokens" not in before["metrics"]
    held_out = {json.loads(line)["prompt"] for line in (tmp_path / "setup" / "held_out.jsonl").read_text().splitlines()}
    assert held_out.isdisjoint(
        json.loads(x)["prompt"] for x in (tmp_path / "setup" / "train.jsonl").read_text().splitlines()
    )


def test_what_a_method_asks_for_is_made_once_and_what_cannot_be_had_is_told(given, here, tmp_path):
    content = run_sweep(["paced", "transfer-limits", "dpo", "g-opd", "tcod"], tmp_path, settings(given), quiet=True)
    assert content["failed"] == {}
    assert content["left_out"] == {"g-opd": "the model base", "tcod": "the column environment"}
    data = tmp_path / "setup" / "data"
    rates = [json.loads(line)["pass_rate"] for line in (data / "train+pass_rate.jsonl").read_text().splitlines()]
    assert all(rate in (0.0, 0.5, 1.0) for rate in rates)
    row = json.loads((data / "train+label_logp.jsonl").read_text().splitlines()[0])
    assert len(row["label_logp"]) == len(row["completion"]) + 1
    assert all(x < 0 for x in row["label_logp"])
    pairs = [json.loads(line) for line in (data / "train+pairs.jsonl").read_text().splitlines()]
    assert all(p["chosen"] == p["answer"] != p["rejected"].strip() for p in pairs)
    given_base = settings(given, models={"base": given["teacher"]})
    assert run_sweep(["g-opd"], tmp_path / "more", given_base, quiet=True)["left_out"] == {}


def test_a_finished_run_is_not_run_again_and_later_methods_and_seeds_join(given, here, tmp_path):
    run_sweep(["sft"], tmp_path, settings(given), quiet=True)
    here.clear()
    again = run_sweep(["sft", "kd"], tmp_path, settings(given), seeds=2, quiet=True)
    assert [job["name"] for job in here if job["kind"] != "prepare"] == ["kd-0", "sft-1", "kd-1"]
    assert [row["seeds"] for row in again["rows"][2:]] == [[0, 1], [0, 1]]
    assert again["rows"][2]["spread"]
    with pytest.raises(RunError, match="holds a sweep with samples=2, not 3; give another directory"):
        run_sweep(["sft"], tmp_path, settings(given, samples=3), quiet=True)


def test_an_interrupted_run_goes_on_and_ends_as_if_it_had_not_been(given, here, tmp_path, monkeypatch):
    from leibler.train import loop

    whole = run_sweep(["gkd"], tmp_path / "whole", settings(given), quiet=True)
    draw = loop._Trainer._draw

    def stopping(self: Any) -> Any:
        if self.step == 2:
            self.stop = True
        return draw(self)

    monkeypatch.setattr(loop._Trainer, "_draw", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(["gkd"], tmp_path / "parts", settings(given), quiet=True)
    assert list((tmp_path / "parts" / "runs" / "gkd-0" / "checkpoints").iterdir())
    assert not (tmp_path / "parts" / "results" / "gkd-0.json").exists()
    monkeypatch.setattr(loop._Trainer, "_draw", draw)
    parts = run_sweep(["gkd"], tmp_path / "parts", settings(given), quiet=True)
    clocks = ("tokens_per_second", "memory")
    one, other = ({k: v for k, v in c["rows"][-1]["metrics"].items() if k not in clocks} for c in (whole, parts))
    assert one == other
    assert not list((tmp_path / "parts" / "runs").rglob("checkpoints"))


def test_a_method_that_fails_does_not_stop_the_others_and_is_tried_again(given, here, tmp_path):
    wrong = settings(given, overrides={"gkd": {"recipe.source": "OnPolicy(prompts='train', max_new_tokens=2000)"}})
    content = run_sweep(["gkd", "kd"], tmp_path, wrong, quiet=True)
    assert list(content["failed"]) == ["gkd-0"]
    assert "exceeds the model's context" in content["failed"]["gkd-0"]
    assert not content["complete"]
    assert [row["slug"] for row in content["rows"] if row["metrics"]] == ["", "", "kd"]
    here.clear()
    run_sweep(["gkd", "kd"], tmp_path, wrong, quiet=True)
    assert [job["name"] for job in here if job["kind"] == "train"] == ["gkd-0"]


def test_a_directory_of_something_else_and_one_at_work_are_refused(given, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(RunError, match="holds something else than a sweep"):
        run_sweep(["sft"], tmp_path, settings(given), quiet=True)
    out = tmp_path / "sweep"
    settings(given).claim(out)
    with runs._alone(out), pytest.raises(RunError, match="another sweep is at work"):
        run_sweep(["sft"], out, settings(given), quiet=True)


# ---- the command ---


def command(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


def test_the_command_prints_the_table_and_writes_page_and_picture(given, here, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = [f"student={given['student']}", f"teacher={given['teacher']}", f"data={given['data']}", "quiet=true"]
    knobs = ["tokens=60", "batch_size=8", "max_new_tokens=3", "gkd.divergence=reverse_kl"]
    status, out, _ = command(capsys, "train", "--sweep", "kd", "gkd", "tcod", "--out", "sweep", *own, *knobs)
    assert status == 0
    assert "tcod was left out; it needs the column environment" in out
    assert "60 tokens each; 1 seed" in out
    assert (tmp_path / "sweep" / "figure.svg").read_text().startswith("<svg")
    assert "ReverseKL" in (tmp_path / "sweep" / "runs" / "gkd-0" / "run.yaml").read_text()
    page = tmp_path / "sweep" / "report.html"
    page.unlink()
    assert command(capsys, "report", "sweep")[0] == 0
    assert "All numbers" in page.read_text()


def test_a_failed_run_is_the_exit_status(given, here, tmp_path, capsys):
    own = [f"student={given['student']}", f"teacher={given['teacher']}", f"data={given['data']}", "quiet=true"]
    wrong = ["sft.source=OnPolicy(max_new_tokens=2000)", "tokens=60", "batch_size=8"]
    status, out, _ = command(capsys, "train", "--sweep", "sft", "--out", str(tmp_path / "s"), *own, *wrong)
    assert status == 1
    assert "sft-0 failed: a row of" in out or "sft-0 failed:" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "kd"], "no directory was given; add --out DIR."),
        (["--sweep", "kdd", "--out", "x"], "'kdd' is not a known method"),
        (["--sweep", "kd", "--family", "policy", "--out", "x"], "keep one of the two"),
        (["--sweep", "--family", "poetry", "--out", "x"], "choose one of distillation"),
        (["--sweep", "kd", "--out", "x", "seed=1"], "a sweep takes --seeds N"),
        (["--sweep", "kd", "--out", "x", "recipe.imitate=1"], "write SLUG.imitate=."),
        (["--sweep", "kd", "--out", "x", "data=task:addition"], "needs student=DIR, teacher=DIR and data=FILE"),
        (["--sweep", "kd", "--out", "x", "student=a"], "needs teacher=DIR and data=FILE as well"),
        (["--sweep", "kd", "--out", "x", "--steps-scale", "0"], "must be greater than 0"),
        (["--sweep", "kd", "--out", "x", "--threads", "0"], "must be at least 1"),
        (["--sweep", "kd", "--out", "x", "--seeds", "0"], "must be at least 1"),
        (["--sweep", "kd", "--out", "x", "learning_rate=-1"], "must be greater than 0"),
        (["kd", "--seeds", "2"], "--seeds is an option of a sweep; add --sweep."),
        (["--sweep", "--resume", "x"], "leave out --resume"),
    ],
)
def test_mistakes_are_told_in_a_sentence(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = command(capsys, "train", *arguments)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help_shows_an_example(capsys):
    status, out, _ = command(capsys, "train", "--help")
    assert status == 0
    assert "leibler train --sweep --out sweep" in out


# ---- in processes of their own ---


@pytest.mark.slow
def test_a_sweep_that_is_killed_leaves_nothing_at_work_and_goes_on(given, tmp_path):
    out = tmp_path / "sweep"
    own = [f"student={given['student']}", f"teacher={given['teacher']}", f"data={given['data']}", "quiet=true"]
    line = [sys.executable, "-m", "leibler", "train", "--sweep", "kd", "gkd", "--out", str(out), *own]
    line += ["tokens=4000", "batch_size=8", "max_new_tokens=3"]
    process = subprocess.Popen(line)
    run = out / "runs" / "gkd-0"
    while not list(run.glob("checkpoints/step-*")):
        assert process.poll() is None
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    first = read_json(out / "results" / "kd-0.json")
    time.sleep(1.0)
    size = (run / "metrics.jsonl").stat().st_size
    time.sleep(1.0)
    assert (run / "metrics.jsonl").stat().st_size == size, "the worker goes on without the sweep"
    assert not (out / "results" / "gkd-0.json").exists()
    assert subprocess.run(line, check=False).returncode == 0
    content = read_json(out / "sweep.json")
    assert content["complete"]
    assert read_json(out / "results" / "kd-0.json") == first
    steps = [json.loads(x)["step"] for x in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert content["rows"][-1]["metrics"]["tokens"] >= 4000


@pytest.mark.slow
def test_every_distillation_method_takes_part_or_says_why_not(tmp_path, capsys):
    arguments = ["--sweep", "--out", str(tmp_path / "sweep"), "--steps-scale", "0.01", "--threads", "1", "quiet=true"]
    status, out, _ = command(capsys, "train", *arguments)
    content = read_json(tmp_path / "sweep" / "sweep.json")
    assert status == 0, content["failed"]
    family = {slug for slug in recipes.names() if recipes.find(slug).family == "distillation"}
    there = {row["slug"] for row in content["rows"] if row["slug"]}
    assert there | set(content["left_out"]) == family
    budget = Setup.read(tmp_path / "sweep").tokens
    for row in content["rows"]:
        if row["slug"]:
            assert row["metrics"]["tokens"] >= budget, row["slug"]
    assert out.count("was left out") == len(content["left_out"])


def test_each_learning_rate_is_run_and_kept(given, here, tmp_path):
    own = {k: v for k, v in OPTIONS.items() if k != "learning_rate"}
    asked = settings(given, options=own, learning_rates=(0.01, 0.001))
    content = run_sweep(["sft"], tmp_path, asked, quiet=True)
    assert [job["name"] for job in here if job["kind"] == "train"] == ["sft-0-0.01", "sft-0-0.001"]
    rates = [json.loads((tmp_path / "runs" / f"sft-0-{r}" / "metrics.jsonl").read_text().splitlines()[0]) for r in
             ("0.01", "0.001")]  # fmt: skip
    assert [rate["learning_rate"] for rate in rates] == [0.01, 0.001]
    tried = content["rows"][-1]["tried"]
    assert content["rows"][-1]["metrics"]["tuning"] == max(t["tuning"] for t in tried)
    here.clear()
    assert run_sweep(["sft"], tmp_path, asked, quiet=True)["rows"] == content["rows"]
    assert not [job for job in here if job["kind"] == "train"]


@pytest.mark.parametrize("rates", ["", "a,b", "0.1,-1", "inf"])
def test_learning_rates_that_are_none_are_named(rates, tmp_path):
    from leibler.cli.sweep import sweep_command

    with pytest.raises(RunError, match="--learning-rates"):
        sweep_command(["sft", f"out={tmp_path}"], None, None, None, None, rates)


def test_a_reference_of_ones_own_is_not_replaced_by_the_student(given, tmp_path):
    for models in ({}, {"reference": given["teacher"]}):
        setup = prepare(tmp_path / str(len(models)), settings(given, models=models), lambda sentence: None)
        assert setup.models["reference"] == models.get("reference", given["student"])


def test_learning_rates_are_not_chosen_on_problems_that_were_trained_on(given, tmp_path):
    made = {"data": {"train": "task:addition:digits=1,n=40"}, "validation": "task:addition:digits=1,n=40,seed=1"}
    prepare(tmp_path / "one", settings(given, **made), lambda sentence: None)
    with pytest.raises(RunError, match="that no run is trained on"):
        prepare(tmp_path / "more", settings(given, **made, learning_rates=(1e-3, 1e-4)), lambda sentence: None)
