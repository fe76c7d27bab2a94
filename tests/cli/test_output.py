"""Plain tables."""

from __future__ import annotations

from leibler.cli.output import table


def test_the_last_column_wraps_under_itself():
    text = table(["slug", "about"], [["kd", "match the teacher on given completions"], ["ppo", ""]], width=32)
    assert text.splitlines() == [
        "slug  about",
        "kd    match the teacher on given",
        "      completions",
        "ppo",
    ]


def test_no_wrapping_where_there_is_no_room_or_no_terminal():
    long = "word " * 40 + "end"
    assert table(["a", "b"], [["x", long]], width=0).splitlines()[1] == f"x  {long}"
    assert table(["a", "b"], [["x", long]], width=10).splitlines()[1] == f"x  {long}"
