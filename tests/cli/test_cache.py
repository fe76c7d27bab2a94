"""``leibler cache`` as a user meets it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leibler import cli
from leibler.cache import TeacherCache, write
from leibler.cache.layout import save_array
from train.running import RECORDS, student


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    student(0, dropout=0.0).save("small")
    student(1, dropout=0.0).save("large")
    Path("sums.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS))
    return tmp_path


@pytest.fixture
def leibler(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


MAKE = ("cache", "--teacher", "large", "--data", "sums.jsonl", "--top-k", "4", "--out", "caches/sums")


def test_a_cache_is_made_checked_and_trained_from(place: Path, leibler: Any) -> None:
    status, out, err = leibler(*MAKE)
    assert (status, err) == (0, "")
    assert "30 different completions, " in out
    assert "top 4 of 16 entries" in out
    assert out.endswith("train with: teacher=cache:caches/sums\n")
    before = (place / "caches/sums/manifest.json").read_bytes()
    status, out, err = leibler(*MAKE)
    assert status == 2
    assert err == (
        "error: caches/sums holds a finished teacher cache; train with teacher=cache:caches/sums, or give another "
        "directory.\n"
    )
    assert (place / "caches/sums/manifest.json").read_bytes() == before
    assert leibler("cache", "--check", "caches/sums")[1].startswith("caches/sums: whole; 30 different completions")
    given = ("student=small", "teacher=cache:caches/sums", "data=sums.jsonl", "steps=2", "quiet=true")
    status, _, err = leibler("train", "kd", *given, "out=run")
    assert status == 0, err
    shard = place / "caches/sums/shard-00000.npy"
    content = bytearray(shard.read_bytes())
    content[-20] ^= 4
    shard.write_bytes(bytes(content))
    status, _, err = leibler("cache", "--check", "caches/sums")
    assert status == 2
    assert "shard-00000.npy was altered" in err


def test_a_students_own_completions(place: Path, leibler: Any) -> None:
    options = ("--samples", "3", "--max-new-tokens", "5", "--limit", "10", "--quiet")
    own = (*MAKE[:-1], "own", "--student", "small", *options)
    status, out, err = leibler(*own)
    assert status == 0, err
    lines = [json.loads(line) for line in Path("own/rollouts.jsonl").read_text().splitlines()]
    counts = json.loads(Path("own/rollouts.json").read_text())["counts"]
    assert counts["completions"] == len(lines)
    assert counts["completions"] + counts["blank"] == 30
    assert {line["prompt"] for line in lines} <= {r["prompt"] for r in RECORDS[:10]}
    assert all(line["answer"] for line in lines)
    assert out.endswith("train with: teacher=cache:own data=own/rollouts.jsonl\n")
    given = (
        "student=small",
        "teacher=cache:own",
        "data=own/rollouts.jsonl",
        "steps=2",
        "max_new_tokens=5",
        "quiet=true",
    )
    status, _, err = leibler("train", "gkd", *given, "out=run")
    assert status == 2
    assert "recipe.source=Data()" in err
    status, _, err = leibler("train", "gkd", "recipe.source=Data()", *given, "out=run")
    assert status == 0, err


def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(
    place: Path, leibler: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["leibler.cache.writer"]
    monkeypatch.setattr(write, "__kwdefaults__", {**(write.__kwdefaults__ or {}), "shard_tokens": 20})
    saved = save_array
    names: list[str] = []

    def interrupted(path: Path, array: Any) -> Any:
        names.append(path.name)
        if len(names) == 3:
            raise KeyboardInterrupt
        return saved(path, array)

    monkeypatch.setattr(module, "save_array", interrupted)
    status, _, err = leibler(*MAKE)
    assert status == 130
    assert "what is finished stays in caches/sums: the same command goes on" in err
    assert names == ["index.npy", "shard-00000.npy", "shard-00001.npy"]
    status, _, err = leibler("train", "kd", "student=small", "teacher=cache:caches/sums", "data=sums.jsonl", "out=run")
    assert status == 2
    assert "is unfinished (1 of" in err
    assert leibler(*MAKE)[0] == 0
    assert names.count("shard-00000.npy") == 1
    assert TeacherCache("caches/sums", thorough=True).manifest.complete


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--teacher", "large"), "--data was not given; `leibler cache --help` has an example."),
        (("--teacher", "nowhere", "--data", "sums.jsonl", "--out", "c"), "--teacher nowhere: There is no directory"),
        (("--teacher", "large", "--data", "no.jsonl", "--out", "c"), "no data file no.jsonl"),
        (("--teacher", "large", "--data", "prompts.jsonl", "--out", "c"), "no completions that a teacher could read"),
        (("--teacher", "large", "--data", "sums.jsonl", "--out", "."), "is not empty (it holds"),
        (("--teacher", "large", "--data", "sums.jsonl", "--out", "c", "--dtype", "int8"), "float32 or float16"),
        (
            ("--teacher", "nowhere", "--data", "sums.jsonl", "--out", "c", "--limit", "0"),
            "--limit 0 leaves no record of",
        ),
        (("--check", "large"), "large is no teacher cache"),
    ],
)
def test_mistakes_are_one_sentence(place: Path, leibler: Any, arguments: tuple[str, ...], says: str) -> None:
    Path("prompts.jsonl").write_text('{"prompt": "1+1="}\n')
    status, _, err = leibler("cache", *arguments)
    assert status == 2
    assert err.startswith("error: ")
    assert says in err
    assert err.count("\n") == 1
    assert not Path("c").exists()


@pytest.mark.slow
def test_from_a_shell_without_a_terminal(place: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "leibler", *MAKE],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert TeacherCache(place / "caches/sums").manifest.k == 4
