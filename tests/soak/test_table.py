"""The soak's table: it adds up, it knows a failure, and it goes between a page's markers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from soak.run import BEGIN, END, main, write
from soak.table import Row, different_bits, markdown, total

GOOD = Row("kills", "in a rollout", 6, 6, 0, 0)


@pytest.mark.parametrize(
    ("row", "passed"),
    [
        (GOOD, True),
        (Row("guards", "a reward that raises", 3, 3), True),
        (Row("kills", "in a rollout", 6, 5, 0, 0), False),
        (Row("kills", "in a rollout", 6, 6, 1, 0), False),
        (Row("kills", "in a rollout", 6, 6, 0, 1), False),
        (Row("kills", "nothing was injected", 0, 0, 0, 0), False),
    ],
)
def test_a_row_passes_if_nothing_was_lost(row, passed):
    assert row.passed is passed


def test_the_table_adds_up():
    rows = [GOOD, Row("fuzz", "torn lines", 50_000, 49_999, 2, None)]
    assert total(rows) == (50_006, 50_005, 2, 0)
    assert markdown(rows).splitlines()[2:] == [
        "| kills | in a rollout | 6 | 6 | 0 | 0 |",
        "| fuzz | torn lines | 50,000 | 49,999 | 2 |  |",
        "| **All** | | **50,006** | **50,005** | **2** | **0** |",
    ]


@pytest.mark.parametrize(("one", "two", "bits"), [(b"ab", b"ab", 0), (b"\x00", b"\x81", 2), (b"a", b"abc", 16)])
def test_bits_are_counted(one, two, bits):
    assert different_bits(one, two) == different_bits(two, one) == bits


def test_the_table_goes_between_the_markers(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    for _ in range(2):
        write(page, "new")
        assert page.read_text() == f"above\n{BEGIN}\nnew\n{END}\nbelow\n"
    page.write_text("no markers")
    with pytest.raises(SystemExit, match="add the two markers"):
        write(page, "new")


def test_a_section_that_fails_fails_the_soak(tmp_path, monkeypatch, capsys):
    from soak import long_runs

    monkeypatch.setattr(long_runs, "run", lambda out, seed, scale: [GOOD])
    assert main(["--only", "long_runs"]) == 0
    monkeypatch.setattr(long_runs, "run", lambda out, seed, scale: [GOOD, Row("kills", "worse", 1, 0)])
    assert main(["--only", "long_runs"]) == 1

    def broken(out: Path, seed: int, scale: float) -> list[Row]:
        raise RuntimeError("not today")

    monkeypatch.setattr(long_runs, "run", broken)
    assert main(["--only", "long_runs"]) == 1
    shown = capsys.readouterr()
    assert "| long_runs | the section itself failed | 1 | 0 |" in shown.out
    assert "not today" in shown.err


def test_it_runs_from_anywhere(tmp_path):
    script = Path(__file__).with_name("run.py")
    shown = subprocess.run([sys.executable, str(script), "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0
    assert "--scale" in shown.stdout
