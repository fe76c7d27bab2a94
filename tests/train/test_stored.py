"""Training with no teacher in memory: a cache gives what the teacher gave, or is refused at the start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from leibler import recipes
from leibler.cache import TeacherCache, write
from leibler.data import load
from leibler.divergence import ForwardKL, JensenShannon, ReverseKL
from leibler.errors import DataError, ModelError, RecipeError, RunError
from leibler.objective import Imitate, LogLinear, Match, Objective, Preference, Reference, Teacher
from leibler.policy import character_tokenizer
from leibler.train import EMA, Data, Mixture, OnPolicy, Recipe, fit
from train.conformance import tiny
from train.running import PAIRS, RECORDS, StopAt, Stopped, run, student


def made(folder: Path, data: Any = RECORDS, seed: int = 1, **options: Any) -> Path:
    if not folder.exists():
        write(student(seed, dropout=0.0), load(data, needs=("prompt",)), folder, **options)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every entry kept."""
    return made(tmp_path_factory.mktemp("whole") / "cache", shard_tokens=30)


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("eight") / "cache", top_k=8)


def metrics(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_alike(a: Path, b: Path, tolerance: float = 2e-6) -> None:
    """The same metrics and weights up to rounding."""
    for left, right in zip(metrics(a), metrics(b), strict=True):
        assert left.keys() == right.keys()
        for key, value in left.items():
            assert value == pytest.approx(right[key], abs=tolerance, rel=10 * tolerance), key
    one, two = (load_file(str(out / "final" / "model.safetensors")) for out in (a, b))
    for name, weight in one.items():
        assert float((weight - two[name]).abs().max()) < 1e-4, name


BOTH = Recipe(
    Mixture(data=Data("train"), more=Data("more")),
    Objective(
        Match(ForwardKL(), to=Teacher(), on="data"),
        Match(ReverseKL(), to=Teacher(), on="more"),
        Imitate(on="data"),
    ),
)


@pytest.mark.parametrize("name", ["kd", "gkd", "akl", "two streams"])
def test_with_every_entry_kept_a_cache_is_the_teacher(name: str, whole: Path, tmp_path: Path) -> None:
    recipe = BOTH
    if name != "two streams":
        recipe = recipes.get(name)
        recipe = Recipe(Data(), recipe.objective, recipe.schedule, recipe.models)
    data = {"train": RECORDS, "more": RECORDS[5:25]} if name == "two streams" else RECORDS
    # AdamW would turn rounding in gradients near 0 into steps of full size.
    options: dict[str, Any] = {"data": data, "learning_rate": 1e-3, "micro_batch_size": 3}
    run(recipe, tmp_path / "live", **options)
    run(recipe, tmp_path / "cached", **options, teacher=f"cache:{whole}")
    assert_alike(tmp_path / "live", tmp_path / "cached")
    # The rule is an option of the run, not of what it is run on: another teacher shows.
    run(recipe, tmp_path / "other", **options, teacher=student(2, dropout=0.0))
    with pytest.raises(AssertionError):
        assert_alike(tmp_path / "live", tmp_path / "other")


def test_a_reference_in_a_cache_serves_preferences(tmp_path: Path) -> None:
    """Log-probs of the texts' own tokens are exact, whether they are among the top k or not."""
    cache = made(tmp_path / "cache", PAIRS, seed=0, top_k=2)
    recipe = recipes.get("dpo")
    assert any(isinstance(t, Preference) for t in recipe.objective.terms)
    options: dict[str, Any] = {"data": PAIRS, "learning_rate": 1e-3}
    run(recipe, tmp_path / "live", **options)
    run(recipe, tmp_path / "cached", **options, models={"reference": f"cache:{cache}"})
    assert_alike(tmp_path / "live", tmp_path / "cached")


@pytest.mark.parametrize("tail", ["bucket", "renormalise"])
def test_training_on_the_top_eight_comes_near_to_the_teacher(tail: str, eight: Path, tmp_path: Path) -> None:
    recipe = recipes.get("kd")
    held = load(RECORDS, needs=("prompt", "completion"))
    options: dict[str, Any] = {
        "student": student(0, dropout=0.0), "data": held, "steps": 60, "batch_size": 30, "learning_rate": 3e-3,
    }  # fmt: skip
    done = run(recipe, tmp_path / "run", **options, teacher=f"cache:{eight}:tail={tail}")
    from leibler.measure import compare

    teacher = student(1, dropout=0.0)
    before = compare(student(0, dropout=0.0), teacher, held, {"kl": ForwardKL()})["divergence/kl"]
    after = compare(done.policy, teacher, held, {"kl": ForwardKL()})["divergence/kl"]
    assert after < 0.4 * before
    assert not any(key.startswith("support_violations") for line in metrics(tmp_path / "run") for key in line)


EXPRESSION = Recipe(Data(), Objective(Match(ForwardKL(), to=LogLinear({Teacher(): 2.0, Reference(): -1.0}))))
MOVING = Recipe(Data(), Objective(Match(ForwardKL(), to=Teacher())), models={"teacher": EMA(0.1, source="teacher")})
FROM_TEACHER = Recipe(OnPolicy(sampler=Teacher()), Objective(Imitate()))
PARTLY = Recipe(
    Mixture(data=Data(), own=OnPolicy()),
    Objective(Match(ForwardKL(), to=Teacher(), on="data"), Match(JensenShannon(), to=Teacher(), on="own")),
)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (recipes.get("gkd"), "reads 'teacher' at responses that are sampled during the run.*recipe.source=Data()"),
        (recipes.get("kdrl"), "responses that are sampled during the run"),
        (recipes.get("minillm"), "responses are sampled from 'teacher', and a teacher cache cannot be sampled from"),
        (recipes.get("distillm"), "responses that are sampled during the run"),
        (recipes.get("delta-kd"), "compares with an expression over 'teacher' .LogLinear"),
        (EXPRESSION, "an expression over 'teacher' .LogLinear"),
        (MOVING, "weights of 'teacher' change during the run .EMA"),
        (FROM_TEACHER, "cannot be sampled from"),
        (PARTLY, r"JensenShannon\(teacher\) reads 'teacher' at responses that are sampled"),
    ],
)
def test_what_a_cache_cannot_give_is_refused_before_the_first_step(
    recipe: Recipe, says: str, whole: Path, tmp_path: Path
) -> None:
    models = {name: student(2, dropout=0.0) for name in recipe.models if name in ("base", "teacher_base")}
    with pytest.raises(RecipeError, match=says):
        run(recipe, tmp_path / "run", teacher=f"cache:{whole}", models=models)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"temperature": 0.5}, RecipeError, "made at temperature 1 and the run is at 0.5; set temperature=1"),
        ({"data": [*RECORDS, {"prompt": "9+9=", "completion": "18"}]}, DataError, r"no row for rows:31 .*'9\+9='"),
        ({"student": tiny(0, tokenizer=character_tokenizer("0123456789+=a"))}, ModelError, "tokenizers differ"),
        ({"teacher": "cache:nowhere"}, DataError, "nowhere is no teacher cache"),
        ({"teacher": "cache:nowhere:tail=none"}, RecipeError, "tail must be"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    changes: dict[str, Any], error: type[Exception], says: str, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        run(recipes.get("kd"), tmp_path / "run", **{"teacher": f"cache:{whole}", **changes})
    assert not (tmp_path / "run").exists()


def test_a_subset_with_duplicates_in_another_order_is_found(eight: Path, tmp_path: Path) -> None:
    data = [RECORDS[i] for i in (7, 2, 19)] + [{**RECORDS[2], "id": "again"}]
    run(recipes.get("kd"), tmp_path / "run", data=data, teacher=TeacherCache(eight), steps=3, batch_size=4)
    assert len(metrics(tmp_path / "run")) == 3


def test_a_resumed_run_is_the_run_and_wants_the_same_cache(
    eight: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kd = recipes.get("kd")
    cache = Path(shutil.copytree(eight, tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"teacher": "cache:cache:tail=renormalise", "save_every": 2}
    run(kd, tmp_path / "straight", **given)
    stopping = Recipe(Data() >> StopAt(4), kd.objective, kd.schedule, kd.models)
    with pytest.raises(Stopped):
        run(stopping, tmp_path / "broken", **given)
    content = yaml.safe_load((tmp_path / "broken" / "run.yaml").read_text())
    assert content["teacher"] == f"cache:{cache}:tail=renormalise"
    assert content["cache_hashes"] == {"teacher": TeacherCache.of(content["teacher"]).hash}
    for other in (made(tmp_path / "other", top_k=4), Path(f"{cache}")):  # another cache; another tail
        with pytest.raises(RunError, match="contents of the teacher cache of teacher are not those"):
            run(kd, tmp_path / "broken", teacher=f"cache:{other}", resume=True)
    run(kd, tmp_path / "broken", **given, resume=True)
    for name in ("metrics.jsonl", "final/model.safetensors"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_no_model_but_the_student_is_read(whole: Path, tmp_path: Path) -> None:
    from leibler.policy import CausalLM

    student(0, dropout=0.0).save(tmp_path / "student")
    read: list[Any] = []
    load_one = CausalLM.load.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, source: Any, **options: Any) -> CausalLM:
        read.append(str(source))
        return load_one(cls, source, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CausalLM, "load", classmethod(counted))
        options: dict[str, Any] = {
            "steps": 1,
            "batch_size": 4,
            "quiet": True,
            "validation": RECORDS[:4],
            "max_new_tokens": 4,
        }
        done = fit(
            "kd",
            student=tmp_path / "student",
            teacher=f"cache:{whole}",
            data=RECORDS,
            out=tmp_path / "run",
            **options,
        )
    assert read == [str(tmp_path / "student")]
    assert "nll" in done.validation
    # Nor has the report a teacher to compare with: it takes the weights that the run began with.
    from leibler.measure.report import write_report

    page = write_report(tmp_path / "run").read_text()
    assert "differs from the initial weights" in page
    assert "There is no directory" not in page
