"""``leibler select``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from leibler import cli
from leibler.data import Addition, load
from leibler.policy import character_tokenizer, tiny_llama

TASK = "task:addition:digits=1,n=12"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        tokenizer = character_tokenizer(Addition(digits=1).alphabet)
        tiny_llama(tokenizer, hidden=16, layers=1, heads=2, seed=seed).save(folder / name)
    return str(folder / "a"), str(folder / "b")


def leibler(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main([str(a) for a in arguments])
    return int(caught.value.code or 0)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_difference_keeps_the_share_and_tells_why(models, tmp_path, capsys):
    out = tmp_path / "kept.jsonl"
    given = ("select", "difference", "--data", TASK, "--teacher", models[0], "--reference", models[1], "--out", out)
    assert leibler(*given, "--share", "0.25") == 0
    assert "3 of 12 records kept; left out by difference: 9" in capsys.readouterr().out
    reasons = rows(tmp_path / "kept.reasons.jsonl")
    least = min(r["difference"] for r in reasons if r["kept"])
    assert sum(r["kept"] for r in reasons) == 3
    assert all(r["difference"] <= least for r in reasons if not r["kept"])
    assert all(abs(r["difference"] - (r["reference_nll"] - r["teacher_nll"])) < 1e-9 for r in reasons)
    assert len(load(out)) == 3
    assert leibler(*given) == 2
    assert "kept.jsonl exists; give another name" in capsys.readouterr().err


def test_confident_keeps_what_both_conditions_keep(models, tmp_path):
    out = tmp_path / "kept.jsonl"
    assert (
        leibler("select", "confident", "--data", TASK, "--teacher", models[0], "--student", models[1], "--out", out)
        == 0
    )
    reasons = rows(tmp_path / "kept.reasons.jsonl")
    for name in ("confidence", "uncertainty"):
        mean = sum(r[name] for r in reasons) / 12
        assert all(r[name] >= mean for r in reasons if r["kept"])
        assert all(r[name] < mean for r in reasons if r["reason"].startswith(name))


def test_pass_rates_are_a_column_that_paced_trains_on(models, tmp_path):
    out = tmp_path / "rated.jsonl"
    given = ("select", "pass-rate", "--data", TASK, "--model", models[0], "--samples", 2, "--max-new-tokens", 3)
    assert leibler(*given, "--out", out) == 0
    assert {r["pass_rate"] for r in rows(out)} <= {0.0, 0.5, 1.0}
    assert len(rows(out)) == 12
    train = ("train", "paced", f"student={models[0]}", f"teacher={models[1]}", f"data={out}", f"out={tmp_path / 'run'}")
    assert leibler(*train, "steps=1", "batch_size=4") == 0
    assert leibler(*given, "--least", 2, "--most", 3, "--out", tmp_path / "none.jsonl") == 2


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("kept.parquet", "kept.parquet does not end in .jsonl; give the selected data a name that does"),
        ("kept", "kept does not end in .jsonl"),
        ("old.jsonl", "old.reasons.jsonl exists; give another name"),
    ],
)
def test_where_nothing_can_be_written_no_model_is_read(out, says, tmp_path, capsys):
    (tmp_path / "old.reasons.jsonl").write_text("mine")
    models = ("--teacher", tmp_path / "nowhere", "--reference", tmp_path / "nowhere")
    assert leibler("select", "difference", "--data", TASK, *models, "--out", tmp_path / out) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["old.reasons.jsonl"]
