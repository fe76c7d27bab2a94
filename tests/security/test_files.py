"""Nothing that a run, a checkpoint or a cache writes leaves its directory, whatever that directory held before."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from leibler.cache import write
from leibler.data import load
from leibler.divergence import ForwardKL
from leibler.errors import LeiblerError, RunError
from leibler.objective import Match, Objective, Teacher
from leibler.policy import character_tokenizer, tiny_llama
from leibler.safety import plain_name, printable, refuse_links
from leibler.train import Data, Recipe, checkpoint, fit

ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(8)]
GIVEN = {"steps": 2, "batch_size": 4, "save_every": 1, "quiet": True}


def student(seed: int = 0):
    return tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2, seed=seed)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run that can be gone on with: two steps of three are done."""
    out = tmp_path / "run"
    fit("sft", student=student(), data=ROWS, out=out, **GIVEN)
    return out


def resume(out: Path) -> None:
    fit("sft", student=student(), data=ROWS, out=out, resume=True, **{**GIVEN, "steps": 3})


FILES = ["metrics.jsonl", "samples.jsonl", "timings.jsonl", "run.yaml", "final", "checkpoints"]


@pytest.mark.parametrize("name", FILES)
def test_a_link_out_of_a_run_directory_stops_a_resume(run, tmp_path, name):
    """Otherwise a run directory from elsewhere could have any file of ours written over."""
    mine = tmp_path / "mine"
    (run / name).rename(mine)
    (run / name).symlink_to(mine)
    before = digest(mine)
    with pytest.raises(RunError, match=rf"{name} is a link to .*mine, out of the run directory"):
        resume(run)
    assert digest(mine) == before


def digest(path: Path) -> str:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


def test_a_link_deep_inside_is_found_and_one_that_stays_inside_is_not_minded(run, tmp_path):
    deep = next((run / "checkpoints").iterdir())
    (deep / "inside.json").symlink_to("state.json")
    refuse_links(run)
    (deep / "outside.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match=r"outside.json is a link"):
        refuse_links(run)


def test_a_pipe_in_a_run_directory_is_not_waited_for(run):
    os.mkfifo(run / "checkpoints" / "pipe")
    with pytest.raises(RunError, match="neither a file nor a folder"):
        resume(run)


def test_a_link_in_what_a_refused_attempt_left_stops_a_new_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "set_aside").symlink_to(tmp_path / "mine")
    (tmp_path / "mine").mkdir()
    with pytest.raises(RunError, match="out of the run directory"):
        fit("sft", student=student(), data=[*ROWS, {"prompt": 1}], out=tmp_path / "run", **GIVEN)
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize(
    "name", ["../state.json", "/etc/passwd", "..", ".", "", "a/../state.json", "missing.json", "folder"]
)
def test_a_manifest_names_files_beside_it(run, name):
    newest, older = sorted((run / "checkpoints").iterdir(), reverse=True)
    (newest / "folder").mkdir()
    path = newest / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][name] = "00"
    path.write_text(json.dumps(manifest))
    found, complaints = checkpoint.latest(run / "checkpoints")
    assert found == older
    assert f"lacks {name} " in complaints[0]


@pytest.mark.parametrize(
    "content", ["", "[]", "null", '{"version": 2, "files": 3}', "[" * 5000, "\x00", '{"files": {"a": 1}}']
)
def test_a_manifest_of_any_content_is_passed_over(run, content):
    newest, older = sorted((run / "checkpoints").iterdir(), reverse=True)
    (newest / checkpoint.MANIFEST).write_text(content)
    found, complaints = checkpoint.latest(run / "checkpoints")
    assert found == older
    assert "manifest" in complaints[0]


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", ".hidden", "a\x00b", "", "x" * 300, "a\nb"])
def test_names_of_data_and_models_become_names_of_files_only_if_they_can(tmp_path, name):
    with pytest.raises(RunError, match="cannot be the name of a file"):
        plain_name(name, "the data")
    recipe = Recipe(Data(name), Objective(Match(ForwardKL(), to=Teacher())))
    with pytest.raises(LeiblerError, match="cannot be the name of a file"):
        fit(
            recipe,
            student=student(),
            teacher=student(1),
            data={name: [*ROWS, {"prompt": 1}]},
            out=tmp_path / "run",
            **GIVEN,
        )
    assert list(tmp_path.iterdir()) == []


def test_a_model_cannot_be_named_out_of_the_checkpoint(tmp_path):
    from leibler.objective import Model

    recipe = Recipe(Data(), Objective(Match(ForwardKL(), to=Model("../../evil"))))
    with pytest.raises(RunError, match=r"the model '../../evil' cannot be the name of a file"):
        fit(recipe, student=student(), models={"../../evil": student(1)}, data=ROWS, out=tmp_path / "run", **GIVEN)
    assert list(tmp_path.iterdir()) == []


def test_a_cache_is_not_written_through_a_link(tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / ".writing-index.npy").symlink_to(tmp_path / "mine")
    with pytest.raises(RunError, match="out of the run directory"):
        write(student(), load(ROWS), tmp_path / "cache", top_k=2)
    assert not (tmp_path / "mine").exists()


# ---- the terminal ------------------------------------------------------------------------------------------------

HOSTILE = "\x1b[31m\x1b]0;owned\x07\x9b2J\x08\r\u202etxt.exe\x00\ud800[/bold][link=x]"


def test_control_characters_are_shown_as_what_they_are():
    shown = printable(HOSTILE + "\n\tä👩‍👩‍👧 שלום")
    assert shown.startswith(r"\x1b[31m\x1b]0;owned\x07\x9b2J\x08\x0d\u202etxt.exe\x00\ud800[/bold]")
    assert shown.endswith("\n\tä👩‍👩‍👧 שלום")


def test_what_a_run_says_about_data_holds_no_control_characters(tmp_path, capsys):
    name = tmp_path / "d\x1b[31m[bold].jsonl"
    name.write_text("".join(json.dumps(r) + "\n" for r in ROWS) + '{"prompt": "\x1b[31m\n')
    fit("sft", student=student(), data=str(name), out=tmp_path / "run", steps=1, batch_size=4)
    out, err = capsys.readouterr()
    assert "set aside" in err
    assert r"d\x1b[31m[bold].jsonl" in err
    assert "\x1b" not in out + err


def test_a_line_above_the_bar_is_no_markup():
    from io import StringIO

    from rich.console import Console

    from leibler.train.log import Progress

    shown = Progress(3, quiet=True)
    shown.bar = type("Bar", (), {"console": Console(file=StringIO(), width=200)})
    shown.say(f"out={HOSTILE}")
    text = shown.bar.console.file.getvalue()
    assert "[/bold][link=x]" in text
    assert "\x1b" not in text


def test_errors_of_the_command_line_hold_no_control_characters(capsys):
    from leibler import cli

    with pytest.raises(SystemExit):
        cli.main(["train", "sft", "student=x", f"data={HOSTILE.replace(chr(0), '')}.jsonl", "out=\x1b[2Jo"])
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert "\x1b" not in err
    assert "\x07" not in err
