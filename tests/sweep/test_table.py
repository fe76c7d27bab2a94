"""Means, spreads, order and findings of a sweep."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest

from leibler.measure.report.sweep import figure, report, scatter
from leibler.sweep.settings import Settings, Setup
from leibler.sweep.table import as_markdown, as_text, findings, ordered, summary

SETUP = Setup("m/s", {"teacher": "m/t"}, {"train": "task"}, "held", "tune", None, 100, 10, "a task")


def result(name: str, seed: int = 0, /, **metrics: float) -> dict[str, Any]:
    return {"name": name, "kind": "train", "slug": name, "seed": seed, "parameters": 5, "metrics": metrics}


def made(*results: dict[str, Any], slugs=("kd", "gkd"), seeds=1, left_out=None, failed=None) -> dict[str, Any]:
    return summary(SETUP, Settings(options={"learning_rate": 0.1}), slugs, left_out or {}, seeds, results, failed or {})


def numbers(accuracy: float, kl: float, **more: float) -> dict[str, float]:
    return {"accuracy": accuracy, "own_reverse_kl": kl, "forward_kl": kl, "reverse_kl": kl, **more}


BASE = (result("baseline-student", **numbers(0.2, 2.0)), result("baseline-teacher", **numbers(0.8, 0.0)))


def test_means_and_spreads_are_over_seeds():
    content = made(
        *BASE, result("kd-0", 0, **numbers(0.5, 1.0)), result("kd-1", 1, **numbers(0.7, 2.0)), slugs=["kd"], seeds=2
    )
    row = content["rows"][-1]
    assert row["metrics"]["accuracy"] == pytest.approx(0.6)
    assert row["spread"]["accuracy"] == pytest.approx(0.2 / math.sqrt(2))
    assert row["seeds"] == [0, 1]
    assert content["complete"]
    assert "60.0 ± 14.1" in as_text(content)
    assert "| `kd` |" in as_markdown(content)


def test_the_learning_rate_is_chosen_by_problems_that_are_not_compared_on():
    tried = [
        result("kd-0-0.1", **numbers(0.9, 1.0), learning_rate=0.1, tuning=0.4),
        result("kd-0-0.01", **numbers(0.5, 2.0), learning_rate=0.01, tuning=0.6),
    ]
    content = summary(SETUP, Settings(learning_rates=(0.1, 0.01)), ["kd"], {}, 1, [*BASE, *tried], {})
    row = content["rows"][-1]
    assert row["metrics"]["learning_rate"] == 0.01
    assert row["metrics"]["accuracy"] == 0.5
    assert [other["learning_rate"] for other in row["tried"]] == [0.1, 0.01]
    assert content["complete"]
    assert "learning rate" in as_text(content)
    assert "learning rate" not in as_text(made(*BASE, result("kd-0", **numbers(0.3, 1.0)), slugs=["kd"]))
    half = summary(SETUP, Settings(learning_rates=(0.1, 0.01)), ["kd"], {}, 1, [*BASE, tried[0]], {})
    assert half["missing"] == ["kd-0-0.01"]


def test_what_did_not_run_and_what_failed_is_told_apart():
    content = made(*BASE, result("kd-0", **numbers(0.5, 1.0)), slugs=["kd", "gkd", "akl"], failed={"gkd-0": "no room"})
    assert not content["complete"]
    assert content["missing"] == ["akl-0"]
    assert content["rows"][-2]["errors"] == ["no room"]
    assert "gkd-0 failed: no room" in as_text(content)
    page = report(content)
    assert "gkd-0 failed: no room" in page
    assert "Not run yet: akl-0." in page


def test_rows_stand_from_the_most_accurate_down_behind_the_baselines():
    content = made(*BASE, result("kd-0", **numbers(0.3, 1.0)), result("gkd-0", **numbers(0.6, 1.5)))
    assert [row["name"] for row in ordered(content["rows"])] == ["student, before", "teacher", "gkd", "kd"]


def test_findings_come_out_either_way():
    def said(*rows: dict[str, Any], seeds: int = 1) -> str:
        return " ".join(made(*BASE, *rows, seeds=seeds)["findings"])

    a = said(result("kd-0", **numbers(0.9, 1.0)), result("gkd-0", **numbers(0.6, 0.5)))
    assert "kd is the most accurate (greedy) (90.0 %; next, gkd, 60.0 %)." in a
    assert "gkd is the nearest to the teacher by forward KL (0.500; next, kd, 1.00)." in a
    assert "More accurate than the teacher (80 %): kd." in a
    assert "All are more accurate than the student was before (20 %), or as accurate." in a
    b = said(result("kd-0", **numbers(0.1, 1.0)), result("gkd-0", **numbers(0.6, 0.5)))
    assert "gkd is the most accurate" in b
    assert "None is more accurate than the teacher (80 %)." in b
    assert "Less accurate than the student was before (20 %): kd." in b
    tie = said(result("kd-0", **numbers(0.6, 1.0)), result("gkd-0", **numbers(0.6, 0.5)))
    assert "None is the most accurate (greedy) alone: kd, gkd share 60.0 %." in tie


def test_a_difference_within_the_spread_of_the_seeds_has_no_winner():
    rows = [
        result(f"{s}-{k}", k, **numbers(v, 1.0 + k))
        for s, pair in (("kd", (0.4, 0.7)), ("gkd", (0.5, 0.5)))
        for k, v in enumerate(pair)
    ]
    said = next(f for f in made(*BASE, *rows, seeds=2)["findings"] if "most accurate" in f)
    assert said.endswith("; their difference is within the spread of the seeds, so neither has won.")


def test_a_rate_that_diverged_is_not_chosen_and_the_edge_of_those_tried_is_told():
    rates, tuning = (1.0, 0.1, 0.01), {"kd": (math.nan, 0.5, 0.6), "gkd": (0.7, 0.6, 0.5), "akl": (0.5, 0.7, 0.6)}
    results = [
        result(f"{slug}-0-{rate:g}", **numbers(0.5, 1.0), learning_rate=rate, tuning=found)
        for slug, all_found in tuning.items()
        for rate, found in zip(rates, all_found, strict=True)
    ]
    content = summary(SETUP, Settings(learning_rates=rates), list(tuning), {}, 1, [*BASE, *results], {})
    best = {row["slug"]: row["metrics"]["learning_rate"] for row in content["rows"] if row["slug"]}
    assert best == {"kd": 0.01, "gkd": 1.0, "akl": 0.1}
    said = [f for f in content["findings"] if f.startswith("Best at the")]
    assert [f.split(": ")[1] for f in said] == ["kd.", "gkd."]


def test_a_run_that_diverged_stops_neither_table_nor_pictures():
    rows = [result(f"kd-{k}", k, **{**numbers(0.5, 1.0), "own_reverse_kl": kl}) for k, kl in enumerate((1.0, math.inf))]
    content = made(*BASE, *rows, result("gkd-0", **numbers(0.5, 1.0)), result("gkd-1", 1, **numbers(0.5, 1.0)), seeds=2)
    assert math.isnan(next(row for row in content["rows"] if row["name"] == "kd")["spread"]["own_reverse_kl"])
    assert "kd" in as_text(content)
    assert "kd" in report(content)


def test_what_one_seed_and_equal_tokens_leave_open_is_said():
    def rows(steps: int, seeds: int) -> list[dict[str, Any]]:
        return [
            result(f"{s}-{k}", k, **numbers(0.5, 1.0), steps=n)
            for s, n in (("kd", 100), ("llkd", steps))
            for k in range(seeds)
        ]

    slugs = ("kd", "llkd")
    said = " ".join(made(*BASE, *rows(2500, 1), slugs=slugs)["findings"])
    assert "llkd takes 2,500 of the optimiser, kd 100." in said
    assert "Each ran with one seed" in said
    said = " ".join(made(*BASE, *rows(150, 2), slugs=slugs, seeds=2)["findings"])
    assert "of the optimiser" not in said
    assert "one seed" not in said


@pytest.mark.parametrize(
    ("sign", "said"), [(-1, "the nearer to the teacher, the more accurate"), (1, "the FARTHER from")]
)
def test_ranks_tell_whether_nearness_goes_with_accuracy(sign, said):
    rows = [
        {
            "name": f"m{i}",
            "slug": f"m{i}",
            "spread": {},
            "values": {},
            "metrics": {"own_reverse_kl": 1.0 + i, "accuracy": 0.5 + sign * i / 20},
        }
        for i in range(6)
    ]
    for row in rows:
        row["values"] = {key: [value] for key, value in row["metrics"].items()}
    assert any(said in sentence for sentence in findings(rows))


def test_the_pictures_show_every_method_and_escape_names():
    content = made(*BASE, result("kd-0", **numbers(0.5, 1.0)), result("gkd-0", **numbers(0.6, math.inf)))
    content["rows"][2]["name"] = "<kd>"
    drawn = figure(content)
    assert "&lt;kd&gt;" in drawn
    assert "<kd>" not in drawn
    assert drawn.count("<circle") == 4 * 3 - 2  # an infinite divergence has no dot
    assert "prefers-color-scheme" not in drawn
    assert "prefers-color-scheme:dark" in figure(content, alone=False)
    assert scatter(content)


def test_one_that_went_astray_pushes_the_others_together_in_no_panel():
    slugs = ("kd", "gkd", "akl")
    rows = [
        result(f"{s}-0", **numbers(a, kl)) for s, a, kl in zip(slugs, (0.9, 0.8, 0.02), (0.01, 0.03, 4.0), strict=True)
    ]
    drawn = figure(made(*BASE, *rows, slugs=slugs))

    def place(name: str, head: str) -> float:
        found = re.search(rf'<circle cx="([\d.]+)"[^>]*><title>{name}: {head} ', drawn)
        assert found is not None
        return float(found[1])

    assert place("gkd", "reverse KL") - place("kd", "reverse KL") > 10  # a scale of logarithms
    assert "teacher: reverse KL" not in drawn  # its 0 has no place there
    middle = (place("kd", "accuracy") + place("akl", "accuracy")) / 2
    assert abs(place("student, before", "accuracy") - middle) > 10  # 20 % lies low, and not in the middle of 2 and 90
    assert figure(made(*BASE, result("kd-0", **numbers(math.nan, math.inf))))


def test_a_user_without_a_checker_gets_a_table_without_accuracy():
    rows = [result(n, forward_kl=v, reverse_kl=v, own_reverse_kl=v) for n, v in (("kd-0", 1.0), ("gkd-0", 2.0))]
    content = made(result("baseline-student", forward_kl=3.0), *rows)
    assert "accuracy" not in as_text(content).splitlines()[0]
    assert scatter(content) == ""
    assert "Near the teacher, or right?" not in report(content)
