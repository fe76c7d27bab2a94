"""A student's completions as a data set."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from leibler.cache import roll_out
from leibler.data import Dataset, Record, load
from leibler.errors import RunError
from train.running import RECORDS, student


class Killed(Exception):
    pass


def draw(folder: Path, **options: Any) -> tuple[Path, dict[str, int]]:
    prompts = load(RECORDS[:10], needs=("prompt",))
    given: dict[str, Any] = {"samples": 2, "max_new_tokens": 4, "seed": 3, "batch_size": 4, **options}
    return roll_out(student(0, dropout=0.0), prompts, folder, **given)


def test_a_killed_call_goes_on_and_draws_the_same(tmp_path: Path) -> None:
    whole, counts = draw(tmp_path / "whole")
    assert counts["completions"] + counts["blank"] == 20
    assert not (tmp_path / "whole" / "rollouts.partial.jsonl").exists()

    def kill(done: int, total: int, tokens: int) -> None:
        if done == 8:
            raise Killed

    with pytest.raises(Killed):
        draw(tmp_path / "broken", progress=kill)
    partial = tmp_path / "broken" / "rollouts.partial.jsonl"
    assert len(partial.read_text().splitlines()) == 2
    with partial.open("a") as file:
        file.write('[{"prompt": "torn')
    seen: list[int] = []
    again, same = draw(tmp_path / "broken", progress=lambda done, total, tokens: seen.append(done))
    assert seen == [10]
    assert again.read_bytes() == whole.read_bytes()
    assert same == counts == draw(tmp_path / "broken")[1]


def test_lines_say_what_was_sampled(tmp_path: Path) -> None:
    out, counts = draw(tmp_path, temperature=0.5)
    model = student(0, dropout=0.0)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert sum(not line["finished"] for line in lines) == counts["unfinished"]
    assert sum(line["changed"] for line in lines) == counts["changed"]
    for line in lines:
        assert line["answer"] == next(r["answer"] for r in RECORDS if r["prompt"] == line["prompt"])
        if not line["finished"] and not line["changed"]:
            assert len(model.encode_completion(line["completion"])) == 5  # four tokens and the end


def test_dates_of_a_record_are_kept_as_text(tmp_path: Path) -> None:
    prompts = Dataset(tuple(Record(r["prompt"], extra={"day": datetime.date(2020, 1, 2)}) for r in RECORDS[:3]), "d")
    out, _ = roll_out(student(0, dropout=0.0), prompts, tmp_path, samples=3, max_new_tokens=3)
    assert {json.loads(line)["day"] for line in out.read_text().splitlines()} == {"2020-01-02"}


@pytest.mark.parametrize("settings", [None, "", '{"student": 1', "[]", "{}"])
@pytest.mark.parametrize("left", ["rollouts.jsonl", "rollouts.partial.jsonl"])
def test_rollouts_without_whole_settings_are_refused(tmp_path: Path, left: str, settings: str | None) -> None:
    (tmp_path / left).write_text("")
    if settings is not None:
        (tmp_path / "rollouts.json").write_text(settings)
    with pytest.raises(RunError, match=r"missing or damaged, .* to sample again|rollouts of another student;"):
        draw(tmp_path)
    assert (tmp_path / left).read_text() == ""


def test_other_arguments_are_refused(tmp_path: Path) -> None:
    draw(tmp_path)
    with pytest.raises(RunError, match=r"rollouts of another seed \(3 then, 4 now\)"):
        draw(tmp_path, seed=4)
    with pytest.raises(RunError, match="another student;"):
        roll_out(student(1), load(RECORDS[:10], needs=("prompt",)), tmp_path)
