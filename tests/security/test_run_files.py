"""A run file from elsewhere is data: it runs nothing, allows nothing and cannot fill the memory."""

from __future__ import annotations

import json
import shutil
import time
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from leibler import cli
from leibler.cli.expressions import ExpressionError, evaluate
from leibler.cli.train import from_file
from leibler.data import load
from leibler.errors import DataError, LeiblerError, ModelError, RunError
from leibler.measure.report.measured import load_pair
from leibler.policy import character_tokenizer, tiny_llama
from leibler.train.run_file import LARGEST, read_yaml

RUN = {"recipe": "sft", "student": "models/small", "data": {"train": "task:addition:n=8"}, "options": {"steps": 3}}


def file(tmp_path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system [touch canary]",
        "!!python/object/apply:subprocess.check_output [[touch, canary]]",
        "!!python/object/new:os.system [touch canary]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!canary x",
        "!!binary aGk=",
    ],
)
def test_no_tag_is_read(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"is not valid YAML .*line 2: the tag"):
        from_file(file(tmp_path, f"recipe: sft\nstudent: {tag}\n"))
    assert not Path("canary").exists()


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [lol, lol, lol, lol, lol, lol, lol, lol, lol]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"recipe: *a{levels - 1}", ""])


def test_a_billion_laughs_are_not_told(tmp_path):
    tracemalloc.start()
    with pytest.raises(RunError, match="anchors and aliases are not read"):
        from_file(file(tmp_path, bomb(12)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_a_large_or_deep_file_is_refused_at_once(tmp_path):
    started = time.process_time()
    for text in (
        "x: " + "a" * 10_000_000,
        "[" * 100_000,
        "a:\n" * 100_000,
        "- " * 100_000,
        "{a: " * 50_000,
        "a: 1\n" * 200_000,
    ):
        with pytest.raises(RunError, match=r"run.yaml is not valid YAML"):
            from_file(file(tmp_path, text))
    assert time.process_time() - started < 30  # seconds for what would be minutes
    with pytest.raises(ValueError, match="longer than"):
        read_yaml("a" * (LARGEST + 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("recipe: sft\nrecipe: kd\n", "line 2: a key is given twice|a key is given twice"),
        ("? [a]\n: 1\n", "unhashable|found unhashable key"),
        ("when: 2001-99-99\nrecipe: x\n", "month must be in 1..12"),
        (
            "n: 0x" + "f" * 9000 + "\nrecipe: sft\noptions: {seed: 0x" + "f" * 9000 + "}\n",
            "options.seed that is neither text nor a number",
        ),
        ("recipe: [1]\n", "a recipe that is neither text nor a number"),
        ("recipe: sft\noptions: [1]\n", "options that is no mapping"),
        ("recipe: sft\noptions: {1: 2}\n", "sets the option 1, which this version"),
        ("recipe: sft\noptions: {steps: many}\n", "steps=many: expected a whole number"),
        ("recipe: sft\noptions: {learning_rate: .nan}\n", "learning_rate=nan: expected a number"),
        ("recipe: sft\noverrides: {recipe.x: null}\n", "says nothing"),
        ("recipe: sft\nstudent: {a: 1}\n", "a student that is neither text nor a number"),
        ("- 1\n", "does not describe a run"),
        ("", "does not describe a run"),
    ],
)
def test_values_of_other_types_are_named(tmp_path, text, message):
    with pytest.raises(LeiblerError, match=message) as caught:
        from_file(file(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "run.yaml"
    for raw in (b"recipe: \xff\n", b"recipe: \xe2\x82", "recipe: sft".encode("utf-16"), b"recipe: a\x00b"):
        path.write_bytes(raw)
        with pytest.raises(RunError, match=r"is not UTF-8|is not valid YAML"):
            from_file(path)


# ---- a file does not allow code of checkpoints -------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "small"
    tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2).save(folder)
    return folder


def hostile(model: Path, at: Path, canary: Path) -> Path:
    shutil.copytree(model, at)
    (at / "own.py").write_text(
        f"from pathlib import Path\nPath({str(canary)!r}).touch()\nfrom transformers import LlamaConfig as C\n"
    )
    config = json.loads((at / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.C"}}
    (at / "config.json").write_text(json.dumps(config))
    return at


def test_a_run_file_cannot_allow_code_of_a_checkpoint(model, tmp_path, capsys):
    """Repeating, resuming and reporting on a directory from elsewhere run nothing of it."""
    evil = hostile(model, tmp_path / "evil", tmp_path / "canary")
    run = tmp_path / "run"
    run.mkdir()
    content = {**RUN, "student": str(evil), "options": {"steps": 1, "trust_remote_code": True}}
    (run / "run.yaml").write_text(yaml.safe_dump(content))
    for arguments in (["train", str(run)], ["train", str(run / "run.yaml"), "seed=3"], ["train", "--resume", str(run)]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
        assert "if you trust the models, add trust_remote_code=true" in capsys.readouterr().err
    with pytest.raises(ModelError, match="brings code of its own"):
        load_pair(evil, model, content["options"])
    assert not (tmp_path / "canary").exists()
    assert from_file(run, trusted=True).options["trust_remote_code"] is True


def test_the_permission_is_heard_on_the_command_line(model, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    content = {**RUN, "student": str(tmp_path / "nowhere"), "options": {"trust_remote_code": True}}
    (run / "run.yaml").write_text(yaml.safe_dump(content))
    for arguments in (
        ["train", str(run), "trust_remote_code=true"],
        ["train", "--resume", str(run), "trust_remote_code=true"],
    ):
        with pytest.raises(SystemExit):
            cli.main(arguments)
        assert "nowhere" in capsys.readouterr().err  # it got as far as the model
    with pytest.raises(SystemExit):
        cli.main(["train", "--resume", str(run), "seed=1"])
    assert "--resume goes on with" in capsys.readouterr().err


# ---- expressions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('touch canary')", "().__class__.__base__.__subclasses__()", "open('canary', 'w')",
        "exec('x')", "eval('1')", "[x for x in (1,)]", "(lambda: 1)()", "f'{1}'", "Linear.__init__", "leibler.cli",
        "print(1)",
        "getattr(Linear, 'x')", "Linear(*[1])", "Linear(**{'a': 1})", "1 if 1 else 2", "(x := 1)", "'a' * 10000",
        "[0] * 10000",
        "10**10**10", "b'a'", "...", "1j", "-" * 5000 + "1", "(" * 500, "1+" * 4000 + "1", "9" * 5000, "2**63 * 2**63",
        "9223372036854775807 * 9223372036854775807", "{[]: 1}", "'" + "a" * 20_000 + "'", "1 >> 1", "1 >> -1",
    ],
)  # fmt: skip
def test_expressions_are_parts_and_plain_values(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text == "1 >> 1":
        assert evaluate(text) == 0
        return
    with pytest.raises(ExpressionError):
        evaluate(text)
    assert not Path("canary").exists()


# ---- tables ------------------------------------------------------------------------------------------------------


def test_a_table_cannot_bring_a_pickled_type(tmp_path):
    """An extension type in the metadata of a Parquet file was once unpickled by its reader."""
    canary = tmp_path / "canary"
    payload = b"cpathlib\nPosixPath\n(V" + str(canary).encode() + b"\ntRp0\n0cpathlib\nPath.touch\n(g0\ntR."
    name = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": payload}
    schema = pa.schema([pa.field("prompt", pa.string(), metadata=name)])
    pq.write_table(pa.table({"prompt": ["a"]}, schema=schema), tmp_path / "d.parquet")
    assert [r.prompt for r in load(str(tmp_path / "d.parquet"))] == ["a"]
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["pipe", "zero", "loop", "folder"])
def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path, kind):
    import os

    path = tmp_path / "d.jsonl"
    make = {
        "pipe": lambda: os.mkfifo(path),
        "zero": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path),
        "folder": path.mkdir,
    }
    make[kind]()
    started = time.monotonic()
    with pytest.raises(DataError, match=r"no ordinary file|cannot read|is a folder"):
        load(path)
    with pytest.raises(RunError, match=r"no ordinary file|cannot be read|does not exist"):
        from_file(path)
    assert time.monotonic() - started < 30
