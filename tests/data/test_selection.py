"""Rules over columns, reasons for every record, files that are never overwritten."""

from __future__ import annotations

import datetime
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leibler.data import Dataset, Record, load
from leibler.data.selection import AboveMean, Between, Every, TopShare, select
from leibler.errors import DataError

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40)


@given(numbers, st.floats(0.01, 1.0))
def test_the_top_share_is_as_large_as_said_and_nothing_left_out_beats_what_is_kept(values, share):
    reasons = TopShare("x", share)({"x": values})
    kept = [v for v, r in zip(values, reasons, strict=True) if r is None]
    assert len(kept) == math.ceil(share * len(values) - 1e-9)
    left = [v for v, r in zip(values, reasons, strict=True) if r is not None]
    assert not left or max(left) <= min(kept)


@given(numbers)
def test_something_always_reaches_the_mean(values):
    assert None in AboveMean("x")({"x": values})


@given(numbers, st.floats(-10, 10))
def test_every_keeps_what_all_keep(values, edge):
    rules = (Between("x", least=edge), AboveMean("x"))
    both = Every(rules)({"x": values})
    assert [r is None for r in both] == [a is None and b is None for a, b in zip(*(r({"x": values}) for r in rules))]


DATA = Dataset(
    tuple(Record(f"{i}+", completion=str(i), source=f"f:{i + 1}", extra={"level": i}) for i in range(4)), "d"
)


def test_what_is_written_can_be_loaded_and_says_why(tmp_path):
    found = select(DATA, {"score": [0.5, 0.1, 0.9, 0.2]}, TopShare("score", 0.5))
    reasons = found.write(tmp_path / "new" / "kept.jsonl")
    again = load(tmp_path / "new" / "kept.jsonl")
    assert [(r.prompt, r.completion, r.extra["level"], r.extra["score"]) for r in again] == [
        ("0+", "0", 0, 0.5),
        ("2+", "2", 2, 0.9),
    ]
    lines = [json.loads(line) for line in reasons.read_text().splitlines()]
    assert [line["kept"] for line in lines] == [True, False, True, False]
    assert lines[1]["source"] == "f:2"
    assert lines[1]["reason"] == "score 0.1 is below 0.5, the least of the top 50%"
    assert found.summary() == "2 of 4 records kept; left out by score: 2"
    with pytest.raises(DataError, match="exists; give another name"):
        found.write(tmp_path / "new" / "kept.jsonl")


def test_dates_are_written_as_text(tmp_path):
    data = Dataset((Record("a", completion="b", extra={"day": datetime.date(2020, 1, 2)}),), "d")
    select(data, {"score": [1.0]}).write(tmp_path / "kept.jsonl")
    assert load(tmp_path / "kept.jsonl")[0].extra == {"day": "2020-01-02", "score": 1.0}


def test_what_cannot_be_written_leaves_nothing_behind(tmp_path):
    data = Dataset((Record("a"), Record("b", extra={"names": {(1, 2): 3}})), "d")
    with pytest.raises(TypeError, match="keys must be"):
        select(data, {"score": [1.0, 2.0]}).write(tmp_path / "kept.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopShare("x", 0.0), "share of 0.0 cannot be kept"),
        (lambda: select(DATA, {"x": [1.0]}), "'x' has 1 numbers for 4 records"),
        (lambda: select(DATA, {"x": [1.0] * 4}, Between("x", 2.0)), "no record of d is kept"),
        (lambda: select(DATA, {"x": [1.0] * 4}, AboveMean("y")), "no column 'y' to choose by; there are: x"),
        (lambda: select(DATA, {"x": [1.0, math.nan, 1.0, 1.0]}, AboveMean("x")), "'x' is not a number in row 2"),
    ],
)
def test_mistakes_are_told(make, message):
    with pytest.raises(DataError, match=message):
        make()
