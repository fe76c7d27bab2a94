"""Hostile files, rows, paths and configurations: a clear error or a row set aside each time, nothing lost, no hang."""

from __future__ import annotations

import pytest

from fuzz import harness
from fuzz.harness import Case, Lost
from fuzz.readers import CASES, read
from leibler.data import load
from leibler.data.hashing import generator

FAST, MANY = 2_000, 50_000


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


def judged(total: int, seed: int, scratch, capsys) -> None:
    found = harness.fuzz(total, seed, scratch)
    with capsys.disabled():
        print(f"\n{harness.report(found)}")
    assert sum(t.injected for t in found.values()) >= total
    assert [fault for tally in found.values() for fault in tally.faults] == []
    assert sum(t.rows_lost for t in found.values()) == 0
    # The cases are not all refused at the door, which would test nothing behind it.
    assert found["lines"].rows > 2 * found["lines"].injected


def test_two_thousand_cases(scratch, capsys):
    judged(FAST, 0, scratch, capsys)


@pytest.mark.slow
def test_fifty_thousand_cases(scratch, capsys):
    judged(MANY, 1, scratch, capsys)


def test_a_case_can_be_repeated_alone(scratch):
    case = CASES["lines"]
    first = [harness.one("lines", case, 3, n, scratch) for n in range(20)]
    assert [harness.one("lines", case, 3, n, scratch) for n in reversed(range(20))] == first[::-1]


def wrong(name: str, scratch) -> str:
    def bad(draw, place):
        if name == "hang":
            while True:
                pass
        if name == "crash":
            raise KeyError("x")
        if name == "lost":
            raise Lost(2, "lines 1 and 2")
        raise harness.Broken("a promise")

    return harness.one("bad", Case("", 1, bad), 0, 0, scratch)[2]


def test_the_judge_sees_every_kind_of_failure(scratch, monkeypatch):
    monkeypatch.setattr(harness, "SECONDS", 0.05)
    monkeypatch.setattr(harness.deadline.__wrapped__, "__defaults__", (0.05,))
    assert "no end after" in wrong("hang", scratch)
    assert "KeyError" in wrong("crash", scratch)
    assert "2 rows lost" in wrong("lost", scratch)
    assert "Broken" in wrong("promise", scratch)


def test_a_reader_that_drops_a_row_is_caught(scratch, monkeypatch):
    """The invariant is not one that holds whatever the reader does."""
    from fuzz import readers

    def forgetful(spec, **options):
        data = load(spec, **options)
        return data.select(range(len(data) - 1)) if len(data) > 1 else data

    monkeypatch.setattr(readers, "load", forgetful)
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"}]

    def every() -> None:
        for n in range(20):
            read(rows, generator("dropped", n), scratch, {1, 2, 3})
            harness.empty(scratch)

    with pytest.raises(Lost, match=r"lines \[3\]"):
        every()
