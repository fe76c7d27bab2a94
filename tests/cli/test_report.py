"""``leibler report`` and ``leibler demo``: what the commands add to the functions behind them."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import pytest

from leibler import cli
from leibler.data import load
from leibler.policy import character_tokenizer, tiny_llama
from leibler.train import fit


@pytest.fixture
def leibler(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture
def run_dir(tmp_path) -> Path:
    student = tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2)
    rows = load([{"prompt": "2+2=", "completion": "4"}] * 4)
    return fit("sft", student=student, data=rows, out=tmp_path / "run", steps=2, batch_size=4, quiet=True).out


def test_a_report_is_written_and_its_place_is_printed(leibler, run_dir):
    status, out, _ = leibler("report", "run")
    assert status == 0
    assert out == "run/report.html\n"
    assert "<html" in (run_dir / "report.html").read_text()


def test_a_report_is_opened_on_request(leibler, run_dir, monkeypatch):
    opened = []
    monkeypatch.setattr(webbrowser, "open", lambda address: bool(opened.append(address)))
    status, _, err = leibler("report", "run", "--open")
    assert status == 0
    assert opened == [(run_dir / "report.html").as_uri()]
    assert err == f"no browser was found; open {run_dir / 'report.html'} in one\n"


def test_a_directory_without_a_run_is_a_mistake(leibler):
    status, _, err = leibler("report", "nothing")
    assert status == 2
    assert err.startswith("error: ")
    assert "nothing" in err
    assert err.count("\n") == 1


def test_a_demo_needs_a_positive_scale_and_an_empty_place(leibler, tmp_path):
    status, _, err = leibler("demo", "--steps-scale", "0")
    assert (status, err) == (2, "error: --steps-scale=0.0 must be greater than 0.\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("mine")
    status, _, err = leibler("demo", "--out", "full")
    assert status == 2
    assert "full is not empty" in err
    assert (tmp_path / "full" / "letter.txt").read_text() == "mine"


@pytest.mark.slow
def test_the_demo_runs_from_nothing_and_twice(leibler):
    status, out, _ = leibler("demo", "--steps-scale", "0.02")
    assert status == 0
    assert "report: demo/report.html" in out
    assert Path("demo/report.html").exists()
    assert leibler("demo", "--steps-scale", "0.02")[0] == 0
