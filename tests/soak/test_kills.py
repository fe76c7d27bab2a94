"""Killed with SIGKILL and gone on with: bit for bit the run that nobody touched; and what is left out is seen."""

from __future__ import annotations

import json
import signal

import pytest

from soak.kills import CASES, SABOTAGE, Place, _script, counting, forked, inject, spoil, written


def test_killed_runs_end_as_unbroken_ones(tmp_path):
    """Two kills each of an off-policy, an on-policy and a replay recipe; ``make soak`` does twenty of six."""
    faults = inject(tmp_path, seed=0, number=2, cases=("kd", "grpo", "replay"))
    assert len(faults) == 6
    assert len({(f.case, f.fault, f.at) for f in faults}) == 6
    for fault in faults:
        assert fault.survived, fault
        assert (fault.bits_different, fault.rows_lost) == (0, 0), fault


@pytest.mark.slow
def test_every_piece_of_state_is_missed(tmp_path):
    """Denied any piece of its state a resumed run ends otherwise; denied none, it does not."""
    _script(tmp_path, "unbroken", *CASES, hash_seed=1)
    lines = _script(tmp_path, "sabotage", *CASES, hash_seed=2).splitlines()
    bits = {(f["case"], f["fault"]): f["bits_different"] for f in map(json.loads, lines)}
    unharmed = {k: v for k, v in bits.items() if k[1] == "nothing"}
    assert unharmed == {(case, "nothing"): 0 for case in CASES}
    harmed = {name: bits[sabotage.case, name] for name, sabotage in SABOTAGE.items()}
    assert all(harmed.values()), harmed


# ---- the harness itself ----------------------------------------------------------------------------------------------


def test_a_child_dies_at_the_chosen_call(tmp_path):
    place = Place("here", "json", "dumps")

    def work() -> None:
        with counting(place, 3):
            for i in range(5):
                text = json.dumps(i)
                (tmp_path / text).touch()

    assert forked(work, tmp_path / "log") == -signal.SIGKILL
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "log") == ["0", "1"]
    original = json.dumps
    with counting(place) as calls:
        json.dumps([json.dumps(1)])
    assert calls == [2]
    assert json.dumps is original


def test_a_child_that_fails_says_why(tmp_path):
    def work() -> None:
        raise ValueError("no")

    assert forked(work, tmp_path / "log") == 1
    assert "ValueError: no" in (tmp_path / "log").read_text()


def test_clocks_are_not_compared_and_all_else_is(tmp_path):
    for name, text in {"metrics.jsonl": "1", "timings.jsonl": "2", "final/model": "3", "run.yaml": "4"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    state = tmp_path / "checkpoints" / "step-1" / "state.json"
    state.parent.mkdir(parents=True)
    state.write_text(json.dumps({"lengths": {"timings.jsonl": 3, "metrics.jsonl": 4}, "step": 1}))
    found = written(tmp_path)
    assert set(found) == {"metrics.jsonl", "final/model", "checkpoints/step-1/state.json"}
    assert json.loads(found["checkpoints/step-1/state.json"]) == {"lengths": {"metrics.jsonl": 4}, "step": 1}


@pytest.mark.parametrize("how", ["truncated", "altered", "manifest gone"])
def test_a_checkpoint_is_spoilt(how, tmp_path):
    from leibler.train import checkpoint
    from train.test_checkpoint import write

    assert not spoil(tmp_path, how)
    older, newest = (write(tmp_path / "checkpoints", step) for step in (5, 10))
    assert checkpoint.latest(tmp_path / "checkpoints")[0] == newest
    assert spoil(tmp_path, how)
    assert checkpoint.latest(tmp_path / "checkpoints")[0] == older
