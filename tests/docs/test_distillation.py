"""The page of the comparison says what its numbers say."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from leibler.measure.report.sweep import figure
from leibler.sweep.table import findings

FIGURES = Path(__file__).parents[2] / "docs" / "figures"
sys.path.insert(0, str(FIGURES))
make_sweep = importlib.import_module("make_sweep")


@pytest.fixture(scope="module")
def content():
    return json.loads((FIGURES / "sweep.json").read_text(encoding="utf-8"))


def test_the_page_is_what_the_script_makes_of_the_numbers(content):
    page = make_sweep.PAGE.read_text(encoding="utf-8")
    assert make_sweep.filled(page, content) == page
    assert (FIGURES / "sweep.svg").read_text(encoding="utf-8") == figure(content)
    assert "figures/sweep.svg" in page


def test_the_findings_follow_from_the_rows(content):
    assert content["findings"] == findings(content["rows"])
    assert len(content["findings"]) >= 6


def test_every_run_trained_on_equally_many_tokens_within_one_batch(content):
    budget = content["setup"]["tokens"]
    for row in content["rows"]:
        for tokens, steps in zip(row["values"].get("tokens", []), row["values"].get("steps", []), strict=True):
            assert budget <= tokens < budget + 4 * tokens / steps, row["name"]


def test_the_numbers_name_no_directory_of_the_machine_that_ran_them(content):
    assert '"/' not in json.dumps(content)


def test_a_page_without_its_markers_is_not_filled(content):
    with pytest.raises(ValueError, match="lacks <!-- sweep: table -->"):
        make_sweep.filled(make_sweep.PAGE.read_text(encoding="utf-8").replace("<!-- sweep: table -->", ""), content)
