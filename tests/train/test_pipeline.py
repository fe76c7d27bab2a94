"""Runs in several stages: what each starts from and reads, what a resume does again, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.cache import fingerprint
from leibler.divergence import ForwardKL, ReverseKL
from leibler.errors import LeiblerError, ModelError, RecipeError, RunError
from leibler.objective import Imitate, Match, Model, Objective, Reference, Teacher
from leibler.policy import CausalLM
from leibler.train import Data, Frozen, OnPolicy, Pipeline, Recipe, Run, Score, TrainingStage, describe, fit
from leibler.train.pipeline import DONE, divided
from train.conformance import reward
from train.running import RECORDS, Stopped, stopped, student

IMITATE = Recipe(Data(), Objective(Imitate()))


def follow(name: str = "last") -> Recipe:
    return Recipe(Data(), Objective(Match(ForwardKL(), to=Model(name)), Match(ReverseKL(), to=Reference())))


def three(stop: tuple[str, int] | None = None) -> Pipeline:
    """Imitate; from there, with dropout and own samples; from the student again, reading both results."""
    own = Recipe(OnPolicy(2) >> Score(reward), Objective(Match(ReverseKL(), to=Teacher())))
    both = Recipe(Data(), Objective(Match(ForwardKL(), to=Model("one")), Match(ReverseKL(), to=Model("two"))))
    stages = {
        "first": TrainingStage(IMITATE, learning_rate=0.02),
        "second": TrainingStage(own, start="first", share=2),
        "third": TrainingStage(both, models={"one": "first", "two": "second"}),
    }
    if stop is not None:
        name, draw = stop
        recipe = stages[name].recipe
        stages[name] = replace(stages[name], recipe=replace(recipe, source=stopped(recipe.source, draw)))
    return Pipeline(stages)


def run(made: Pipeline, out: Path, **options: Any) -> Run:
    given: dict[str, Any] = {
        "student": student(), "teacher": student(1, dropout=0.0), "data": RECORDS, "steps": 12, "batch_size": 8,
        "learning_rate": 0.01, "max_new_tokens": 3, "seed": 11, "quiet": True, "save_every": 2,
    }  # fmt: skip
    return fit(made, out=out, **{**given, **options})


def written(out: Path) -> dict[str, bytes]:
    """Everything that must be equal in a repeated run, of all stages."""
    names = ("metrics.jsonl", "samples.jsonl", "validation.jsonl", "model.safetensors")
    found = (p for p in out.rglob("*") if p.name in names and "checkpoints" not in p.parts)
    return {str(p.relative_to(out)): p.read_bytes() for p in found}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    run(three(), out)
    return out


def weights(path: Path) -> str:
    return fingerprint(CausalLM.load(path))


def test_each_stage_is_a_run_of_its_own(whole):
    assert [p.name for p in sorted(whole.iterdir())] == ["1-first", "2-second", "3-third", "final", "run.yaml", DONE]
    counts = [len((whole / n / "metrics.jsonl").read_text().splitlines()) for n in ("1-first", "2-second", "3-third")]
    assert counts == [3, 6, 3]
    rates = [json.loads((whole / n / "metrics.jsonl").read_text().splitlines()[0])["learning_rate"] for n in
             ("1-first", "2-second")]  # fmt: skip
    assert rates == [0.02, 0.01]
    assert weights(whole / "final") == weights(whole / "3-third" / "final")
    assert len({weights(whole / n / "final") for n in ("1-first", "2-second", "3-third")}) == 3


def test_a_stage_by_itself_does_what_it_does_in_the_pipeline(whole, tmp_path):
    """What it starts from, what it reads and its options are those that its place says."""
    from leibler.train.run_file import read_run_file

    options = {**read_run_file(whole / "3-third")["options"]}
    recipe = three().stages["third"].recipe
    models = {"one": whole / "1-first" / "final", "two": whole / "2-second" / "final"}
    fit(recipe, student=student(), models=models, data=RECORDS, out=tmp_path / "alone", quiet=True, **options)
    assert weights(tmp_path / "alone" / "final") == weights(whole / "final")
    options = {**read_run_file(whole / "2-second")["options"]}
    recipe, start = three().stages["second"].recipe, whole / "1-first" / "final"
    # The dropout that the student was made with is not written down, and so not there in what it left.
    fit(recipe, student=start, teacher=student(1), data=RECORDS, out=tmp_path / "b", quiet=True, **options)
    assert weights(tmp_path / "b" / "final") == weights(whole / "2-second" / "final")


@pytest.mark.parametrize("stop", [("first", 1), ("second", 0), ("second", 3), ("third", 2)])
def test_a_run_that_was_killed_goes_on_bit_for_bit(stop, whole, tmp_path):
    with pytest.raises(Stopped):
        run(three(stop), tmp_path / "run")
    run(three(), tmp_path / "run", resume=True)
    assert written(tmp_path / "run") == written(whole)


def test_kills_between_stages_leave_a_run_that_goes_on(whole, tmp_path):
    """As if killed after a stage's model was written, before it was marked; before the last copy; in the copy."""
    for number, lose in enumerate(([DONE, "2-second", "3-third", "final"], [DONE, "final"], ["final"])):
        out = tmp_path / str(number)
        shutil.copytree(whole, out)
        for name in lose:
            (shutil.rmtree if (out / name).is_dir() else Path.unlink)(out / name)
        (out / ".writing-final").mkdir()
        run(three(), out, resume=True)
        assert written(out) == written(whole)
        assert not (out / ".writing-final").exists()


def test_finished_stages_are_left_as_they_are(whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "3-third")
    shutil.rmtree(out / "final")
    done = json.loads((out / DONE).read_text())
    (out / DONE).write_text(json.dumps({n: h for n, h in done.items() if n != "third"}))
    stamps = {p: p.stat().st_mtime_ns for n in ("1-first", "2-second") for p in (out / n).rglob("*") if p.is_file()}
    run(three(), out, resume=True, quiet=False)
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}
    assert "stage 3 of 3, third: 3 steps" in capsys.readouterr().err
    assert written(out) == written(whole)


def test_a_model_that_is_not_the_one_its_stage_left_is_refused(whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "1-first" / "final" / "model.safetensors").write_bytes(b"another")
    with pytest.raises(RunError, match="1-first/final is not the one that the stage 'first' left"):
        run(three(), out, resume=True)


def test_going_on_with_another_student_or_other_records_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(RunError, match="weights of the model student are not those"):
        run(three(), tmp_path / "run", resume=True, student=student(5))
    with pytest.raises(RunError, match=r"records of data\.train are not those"):
        run(three(), tmp_path / "run", resume=True, data=RECORDS[:20])
    with pytest.raises(RunError, match="weights of the model teacher are not those"):
        run(three(), tmp_path / "run", resume=True, teacher=student(6))


def test_a_finished_run_says_so_and_gives_its_model(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path / "run")
    again = run(three(), tmp_path / "run", resume=True, quiet=False)
    assert "is finished" in capsys.readouterr().err
    assert again.out == tmp_path / "run"
    assert fingerprint(again.policy) == weights(whole / "final")


def test_the_student_in_memory_stays_as_it_was(tmp_path):
    mine = student()
    before = fingerprint(mine)
    made = Pipeline({"a": TrainingStage(IMITATE), "b": TrainingStage(follow(), models={"last": "a"})})
    done = run(made, tmp_path / "run", student=mine, teacher=None, steps=4)
    assert fingerprint(mine) == before != fingerprint(done.policy)


def test_stages_draw_other_random_numbers(tmp_path):
    """Two stages that sample from one model must not see the same responses."""
    recipe = Recipe(OnPolicy(2) >> Score(reward), Objective(Match(ReverseKL(), to=Reference())))
    made = Pipeline({"a": TrainingStage(recipe), "b": TrainingStage(recipe)})
    run(made, tmp_path / "run", teacher=None, steps=2, sample_every=1)
    first, second = ((tmp_path / "run" / n / "samples.jsonl").read_text() for n in ("1-a", "2-b"))
    assert [json.loads(x)["prompt"] for x in first.splitlines()] != [
        json.loads(x)["prompt"] for x in second.splitlines()
    ]


# ---- what is refused, before the first step ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2}, "steps=2 cannot be divided among 3 stages"),
        ({"teacher": None}, "needs the model 'teacher', which was not given; add teacher=DIR"),
        ({"models": {"other": student(3)}}, r"models.other is not used by any stage; they read: teacher"),
        ({"data": {"train": RECORDS, "more": RECORDS}}, "data.more is not used by any stage"),
        ({"data": {"other": RECORDS}}, "data.other is not used by any stage"),
    ],
)
def test_what_any_stage_lacks_is_told_before_the_first(changes, message, tmp_path):
    with pytest.raises(LeiblerError, match=message):
        run(three(), tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_later_stages_model_is_looked_at_before_the_first_step(tmp_path):
    made = Pipeline({"a": TrainingStage(IMITATE), "b": TrainingStage(follow("more"))})
    with pytest.raises(ModelError, match=r"models\.more=nowhere"):
        run(made, tmp_path / "run", teacher=None, models={"more": "nowhere"})
    assert not (tmp_path / "run").exists()


def test_a_directory_that_holds_another_run_is_refused(whole):
    with pytest.raises(RunError, match="holds another run"):
        run(three(), whole)


def test_a_pipeline_checks_itself():
    with pytest.raises(RecipeError, match="'b' starts from 'c', but before it are: student, a"):
        Pipeline({"a": TrainingStage(IMITATE), "b": TrainingStage(IMITATE, start="c"), "c": TrainingStage(IMITATE)})
    with pytest.raises(RecipeError, match="'a' reads as 'last' 'a', but before it are: student"):
        Pipeline({"a": TrainingStage(follow(), models={"last": "a"})})
    with pytest.raises(RecipeError, match=r"'teacher', which its recipe does not read \(but: last, reference\)"):
        TrainingStage(follow(), models={"teacher": "student"})
    with pytest.raises(RecipeError, match="cannot be called 'student'"):
        Pipeline({"student": TrainingStage(IMITATE)})
    with pytest.raises(LeiblerError, match="cannot be the name of a file"):
        Pipeline({"../a": TrainingStage(IMITATE)})
    with pytest.raises(RecipeError, match="without stages"):
        Pipeline({})
    for wrong in ({"share": 0.0}, {"learning_rate": -1.0}):
        with pytest.raises(RecipeError, match="must be greater than 0"):
            TrainingStage(IMITATE, **wrong)


def test_it_describes_every_stage():
    text = describe(three())
    for part in ("Stage 2-second", "trains: the model that first left", "one: the model that first left", "50% of the"):
        assert part in text


def test_the_reference_of_a_stage_is_what_it_starts_from(tmp_path):
    """Unless it is set: the run's own student may stand in its place."""
    recipe = Recipe(Data(), Objective(Match(ReverseKL(), to=Reference())), models={"reference": Frozen("initial")})
    made = Pipeline({"a": TrainingStage(IMITATE), "b": TrainingStage(recipe, start="a"),
                     "c": TrainingStage(recipe, start="a", models={"reference": "student"})})  # fmt: skip
    run(made, tmp_path / "run", teacher=None, steps=6, student=student(dropout=0.0))
    first = {
        n: json.loads((tmp_path / "run" / n / "metrics.jsonl").read_text().splitlines()[0]) for n in ("2-b", "3-c")
    }
    assert first["2-b"]["divergence/ReverseKL(reference)"] == pytest.approx(0.0, abs=1e-6)
    assert first["3-c"]["divergence/ReverseKL(reference)"] > 1e-4


@given(st.integers(1, 500), st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_steps_are_divided_without_loss(total, shares):
    if total < len(shares):
        return
    parts = divided(total, shares)
    assert sum(parts) == total
    assert min(parts) >= 1
    exact = [total * s / sum(shares) for s in shares]
    if min(exact) >= 1:
        assert all(abs(x - p) < 1 + 1e-9 for x, p in zip(exact, parts, strict=True))
    assert torch.tensor(parts).sum() == total
