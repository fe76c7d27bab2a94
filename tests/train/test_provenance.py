"""Where a run came from stands in its directory, and is enough to have it again, bit for bit."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from leibler import cli
from leibler.data import load
from leibler.policy import CausalLM, character_tokenizer, tiny_llama
from leibler.train import fit
from leibler.train.run_file import git_state, hardware

ROWS = [{"prompt": f"{i}+{j}=", "completion": str(i + j), "answer": str(i + j)} for i in range(5) for j in range(4)]


def small(seed: int = 0) -> CausalLM:
    return tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2, seed=seed)


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """A working directory with two models, records and a repository."""
    here = tmp_path / "work"
    here.mkdir()
    small(0).save(here / "models" / "small")
    small(1).save(here / "models" / "large")
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    git(here, "init", "-q")
    git(here, "add", "rows.jsonl")
    git(here, "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "rows")
    monkeypatch.chdir(here)
    return here


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def leibler(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    return int(caught.value.code or 0)


def begin(recipe: str, *more: str, out: str = "runs/a") -> Path:
    given = ["student=models/small", "data=rows.jsonl", f"out={out}", "steps=3", "batch_size=8", "learning_rate=1e-2"]
    given += ["max_new_tokens=3", "sample_every=1", "seed=5"]
    assert leibler("train", recipe, *given, *more) == 0
    return Path(out).resolve()


def content(run: Path) -> dict:
    return yaml.safe_load((run / "run.yaml").read_text())


def same(a: Path, b: Path) -> bool:
    files = ("metrics.jsonl", "samples.jsonl", "final/model.safetensors")
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in files)


CASES = {
    "sft": [],
    "gkd": ["teacher=models/large", "recipe.divergence=JensenShannon(beta=0.3)"],
    "grpo": ["recipe.group_size=4"],
}


@pytest.mark.parametrize("recipe", CASES)
def test_the_command_that_a_run_records_repeats_it_from_anywhere(place, tmp_path, monkeypatch, recipe):
    first = begin(recipe, *CASES[recipe])
    command = shlex.split(content(first)["rerun"])
    assert command == ["leibler", "train", str(first / "run.yaml")]
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert leibler(*command[1:], f"out={tmp_path / 'again'}") == 0
    assert same(first, tmp_path / "again")
    assert "differs" not in content(tmp_path / "again")
    assert content(tmp_path / "again")["repeats"] == str(first / "run.yaml")


@pytest.mark.slow
def test_another_process_repeats_it_too(place, tmp_path):
    first = begin("grpo")
    command = [sys.executable, "-m", *shlex.split(content(first)["rerun"]), "out=again", "quiet=true"]
    subprocess.run(command, check=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=600)
    assert same(first, tmp_path / "again")


def test_paths_are_absolute_also_from_python_and_relative_ones_are_found_beside_the_file(place, tmp_path, monkeypatch):
    fit("sft", student="models/small", data="rows.jsonl", out="runs/b", steps=2, batch_size=4, quiet=True)
    run = place / "runs" / "b"
    written = content(run)
    assert written["student"] == str(place / "models" / "small")
    assert written["data"] == str(place / "rows.jsonl")
    assert written["out"] == str(run)
    # written by hand, with paths beside the file
    (place / "by-hand.yaml").write_text(
        yaml.safe_dump({**written, "student": "models/small", "data": {"train": "rows.jsonl"}})
    )
    monkeypatch.chdir(tmp_path)
    assert leibler("train", "work/by-hand.yaml", "out=c", "quiet=true") == 0
    assert same(run, tmp_path / "c")


def test_what_a_run_was_made_of_is_recorded(place):
    run = begin("sft")
    written = content(run)
    assert written["options"]["seed"] == 5
    assert written["data_hashes"] == {"train": load("rows.jsonl").content_hash}
    assert set(written["weight_hashes"]) == {"policy"}
    assert written["versions"]["torch"] == torch.__version__
    assert written["directory"] == str(place)
    assert written["hardware"] == hardware("cpu", 1)
    assert written["hardware"]["threads"] == torch.get_num_threads()
    assert written["hardware"]["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert written["git"]["directory"]["commit"] == git(place, "rev-parse", "HEAD")
    assert written["git"]["directory"]["dirty"] is True  # the models are not committed
    assert written["git"]["leibler"]["commit"]


def test_the_state_of_a_repository(place, tmp_path):
    commit = git(place, "rev-parse", "HEAD")
    (place / ".gitignore").write_text("models\nruns\n.gitignore\n")
    assert git_state(place) == {"root": str(place), "commit": commit, "dirty": False}
    (place / "rows.jsonl").write_text("other\n")
    first = git_state(place)
    assert first is not None
    assert first["dirty"] is True
    (place / "rows.jsonl").write_text("and other\n")
    second = git_state(place)
    (place / "new.py").write_text("")
    third = git_state(place)
    assert second is not None
    assert third is not None
    assert len({state["changes_hash"] for state in (first, second, third)}) == 3
    git(place, "checkout", "-q", "rows.jsonl")
    (place / "new.py").unlink()
    assert git_state(place) == {"root": str(place), "commit": commit, "dirty": False}
    assert git_state(tmp_path) is None
    (tmp_path / "fresh").mkdir()
    git(tmp_path / "fresh", "init", "-q")
    assert git_state(tmp_path / "fresh") == {"root": str(tmp_path / "fresh"), "commit": "none yet", "dirty": False}


def test_without_git_a_run_is_none_the_worse(place, monkeypatch):
    monkeypatch.setenv("PATH", "")
    run = begin("sft")
    assert content(run)["git"] == {}


def test_a_repository_names_no_program_that_is_run(place):
    (place / "watch").write_text(f"#!/bin/sh\ntouch {place}/canary\n")
    (place / "watch").chmod(0o755)
    for key in ("core.fsmonitor", "diff.external"):
        git(place, "config", key, str(place / "watch"))
    (place / "rows.jsonl").write_text("other\n")
    state = git_state(place)
    assert state is not None
    assert state["dirty"] is True
    assert not (place / "canary").exists()


def test_a_run_of_what_only_python_has_says_so_and_cannot_be_repeated(place, capsys):
    fit("sft", student=small(), data=ROWS, out="runs/m", steps=1, batch_size=4, quiet=True)
    written = content(Path("runs/m"))
    assert written["rerun"].startswith("only in Python, with fit()")
    assert written["student"] == "<CausalLM given in memory>"
    assert leibler("train", "runs/m") == 2
    assert (
        "records a student that was built in Python; repeat or resume it there, with fit()" in capsys.readouterr().err
    )


def test_records_that_are_a_part_of_a_file_are_not_taken_for_it(place, capsys):
    part = load("rows.jsonl")[:8]
    fit("sft", student="models/small", data=part, out="runs/p", steps=1, batch_size=4, quiet=True)
    assert leibler("train", "runs/p", "out=runs/q") == 0
    assert "not an exact repetition of" in capsys.readouterr().err
    assert content(Path("runs/q"))["differs"] == ["the records of data.train are others"]


def test_a_repetition_that_cannot_be_one_says_why(place, capsys):
    first = begin("sft")
    with (place / "rows.jsonl").open("a") as file:
        file.write('{"prompt": "9+9=", "completion": "18"}\n')
    small(3).save(place / "models" / "small")
    path = first / "run.yaml"
    path.write_text(path.read_text().replace(f"torch: {torch.__version__}", "torch: 1.0.0"))
    capsys.readouterr()
    assert leibler("train", str(first), "out=again") == 0
    said = capsys.readouterr().err
    for what in ("the records of data.train are others", "the weights of student are others", "torch was 1.0.0 and is"):
        assert what in said
    assert len(content(Path("again"))["differs"]) == 3
