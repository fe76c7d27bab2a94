"""Sources that choose records: by the rules of `leibler select`, over whole data sets or the whole of each batch."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from leibler.data import Dataset, Record
from leibler.data.selection import Between, Difference, Every, SureAndUnsure, TopShare, sure_and_unsure
from leibler.divergence import ForwardKL
from leibler.errors import DataError, ModelError, RecipeError, RunError
from leibler.measure.scores import read
from leibler.measure.selecting import miniplm
from leibler.objective import Imitate, Match, Objective, Rows, Signal, Teacher, View
from leibler.policy import CausalLM, sample, tiny_llama, train_bpe, uniforms
from leibler.train import Context, Data, Filtered, Mixture, OnPolicy, PassRate, Recipe, Selected
from leibler.train.log import Progress
from train.conformance import TEMPERATURE, tiny
from train.running import RECORDS, Stopped, recipe, run, student, written

TEXTS = Dataset(tuple(Record(f"{i}+", completion=str(i % 10) * (1 + i % 4)) for i in range(20)), "texts")
DIFFERENCE = Selected(Data(), Difference("teacher", "small"), TopShare("difference", 0.4))
SURE = Filtered(Data(), SureAndUnsure(), sure_and_unsure())


@pytest.fixture(scope="module")
def models() -> dict[str, CausalLM]:
    return {"policy": tiny(0), "teacher": tiny(1, padding=3), "small": tiny(2)}


def context(models: Any, **changes: Any) -> Context:
    options: dict[str, Any] = {
        "models": models, "data": {"train": TEXTS}, "seed": 3, "draw": 0, "step": 0, "steps": 10, "rows": 8,
        "max_new_tokens": 5, "max_length": 64, "temperature": TEMPERATURE,
    }  # fmt: skip
    return Context(**{**options, **changes})


def draws(source: Any, models: Any, count: int, **changes: Any) -> tuple[list[Rows], Any]:
    state, out = source.init(), []
    for draw in range(count):
        drawn, state = source.draw(context(models, draw=draw, **changes), state)
        state = json.loads(json.dumps(state))  # as it stands in a checkpoint
        out.append(drawn["main"])
    return out, state


def prompts(rows: Rows) -> list[str]:
    return [r.prompt for r in rows.records]


def both(source: Any, models: Any, count: int) -> list[list[Rows]]:
    """What each of two processes draws: threads that wait for each other in every exchange."""
    meeting, table = Barrier(2, timeout=60), [None, None]

    def one(rank: int) -> tuple[list[Rows], Any]:
        def gather(item: Any) -> list[Any]:
            table[rank] = item
            meeting.wait()
            found = list(table)
            meeting.wait()
            return found

        return draws(source, models, count, rank=rank, world=2, gather=gather)

    with ThreadPoolExecutor(2) as pool:
        (first, mine), (second, theirs) = pool.map(one, (0, 1))
    assert mine == theirs, "a checkpoint does not show which process wrote it"
    return [first, second]


def test_what_is_selected_is_what_the_command_selects(models):
    expected = miniplm(TEXTS, models["teacher"], models["small"], 0.4)
    wanted = [i for i, reason in enumerate(expected.reasons) if reason is None]
    rows, state = draws(DIFFERENCE, models, 4)
    assert state["kept"] == wanted
    assert len(wanted) == 8
    # Every epoch has each kept record once, in the order in which the data set of them is drawn.
    kept = TEXTS.select(wanted)
    for epoch, drawn in enumerate(rows):
        assert prompts(drawn) == [kept[i].prompt for i in kept.order(epoch, 3)]


def test_models_read_once(models, monkeypatch):
    seen: list[tuple[str, int, int]] = []
    _, state = draws(DIFFERENCE, models, 1, working=lambda what, done, total: seen.append((what, done, total)))
    assert seen[-1] == ("score", 40, 40)
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    # From the checkpoint nothing is read again.
    DIFFERENCE.draw(context({"policy": models["policy"]}, draw=1), state)


def test_two_processes_select_what_one_does(models):
    alone, state = draws(DIFFERENCE, models, 3)
    for whole, first, second in zip(alone, *both(DIFFERENCE, models, 3), strict=True):
        assert prompts(first) == prompts(whole)[::2]
        assert prompts(second) == prompts(whole)[1::2]
    assert state["kept"]


def test_of_each_batch_what_the_teacher_is_sure_of_and_the_student_is_not(models):
    plain, _ = draws(Data(), models, 4)
    found, state = draws(SURE, models, 4)
    dropped = 0
    for before, after in zip(plain, found, strict=True):
        sure = read(models["teacher"], before.records)["confidence"]
        unsure = read(models["policy"], before.records)["uncertainty"]
        a, b = math.fsum(sure) / len(sure), math.fsum(unsure) / len(unsure)
        kept = [r.prompt for r, s, u in zip(before.records, sure, unsure, strict=True) if s >= a and u >= b]
        assert prompts(after) == kept
        dropped += len(before) - len(kept)
    assert dropped > 8
    assert set(state["read"]) == {"teacher"}, "the student is read anew at every draw"
    assert len(state["read"]["teacher"]) == 20


def test_the_teacher_is_read_once_and_the_student_as_it_is_now(models, monkeypatch):
    asked: list[tuple[str, int]] = []
    from leibler.train import selected

    original = selected.reading
    names = {id(m): n for n, m in models.items()}

    def counted(model: CausalLM, pairs: Any, **options: Any) -> Any:
        asked.append((names[id(model)], len(pairs)))
        return original(model, pairs, **options)

    monkeypatch.setattr(selected, "reading", counted)
    draws(SURE, models, 5)
    assert sum(n for name, n in asked if name == "teacher") == 20
    assert [n for name, n in asked if name == "policy"] == [8] * 5


def test_two_processes_filter_what_one_does(models):
    alone, _ = draws(SURE, models, 4)
    plain, _ = draws(Data(), models, 4)
    for before, whole, first, second in zip(plain, alone, *both(SURE, models, 4), strict=True):
        # The thresholds are those of the whole batch, whoever holds a row.
        assert sorted(prompts(first) + prompts(second)) == sorted(prompts(whole))
        assert set(prompts(first)) <= set(prompts(before)[::2])


def test_a_record_drawn_twice_in_a_batch_is_judged_twice_alike(models):
    rows, _ = draws(Filtered(Data(), SureAndUnsure(), Every((Between("confidence", 0.0),))), models, 1, rows=50)
    assert len(rows[0]) == 50


# ---- runs --------------------------------------------------------------------------------------------------------


def test_thresholds_of_zero_are_plain_pseudo_labelling_bit_for_bit(tmp_path: Path):
    run(recipe("sft"), tmp_path / "plain")
    run(recipe("llkd", confidence=0.0, uncertainty=0.0), tmp_path / "all", teacher=student(1, dropout=0.0))
    assert written(tmp_path / "plain") == written(tmp_path / "all")


def test_rows_that_are_left_out_are_not_counted(tmp_path: Path):
    found = run(recipe("llkd"), tmp_path / "some", teacher=student(1, dropout=0.0), steps=8)
    steps = [json.loads(line) for line in (tmp_path / "some" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= s["rows"] < 8 for s in steps)
    assert sum(s["rows"] for s in steps) > 0
    assert found.metrics["loss"] >= 0


def test_a_batch_of_which_nothing_is_left_is_drawn_anew(tmp_path: Path):
    teacher = student(1, dropout=0.0)
    data = [Record(r["prompt"], completion=r["completion"]) for r in RECORDS]
    sure = sorted(read(teacher, data)["confidence"])
    made = recipe("llkd", confidence=sure[-3], uncertainty=0.0)  # three of thirty records: most batches have none
    found = run(made, tmp_path / "few", teacher=teacher, batch_size=4)
    assert found.metrics["rows"] >= 1
    with pytest.raises(RunError, match="20 draws in a row left no row to learn from"):
        run(recipe("llkd", confidence=2.0), tmp_path / "none", teacher=teacher)


@pytest.mark.parametrize("slug", ["miniplm", "llkd"])
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, slug: str):
    models: dict[str, Any] = {"teacher": student(1, dropout=0.0)}
    if slug == "miniplm":
        models["models"] = {"reference_small": student(2, dropout=0.0)}
    run(recipe(slug), tmp_path / "whole", save_every=2, **models)
    with pytest.raises(Stopped):
        run(recipe(slug, stop=3), tmp_path / "cut", save_every=2, **models)
    run(recipe(slug), tmp_path / "cut", resume=True, save_every=2, **models)
    assert written(tmp_path / "whole") == written(tmp_path / "cut")


def test_readers_may_have_another_tokenizer(tmp_path: Path):
    other = tiny_llama(train_bpe(["1+1=2"] * 4, size=262), hidden=16, layers=1, heads=2)
    given: dict[str, Any] = {"teacher": other, "models": {"reference_small": student(2)}, "steps": 2}
    with pytest.raises(ModelError, match="align=text"):
        run(recipe("miniplm"), tmp_path / "refused", **given)
    assert run(recipe("miniplm"), tmp_path / "read", align="text", **given).metrics["rows"] == 8


def test_what_can_be_chosen_from(models):
    with pytest.raises(RecipeError, match=r"Selected chooses among the records of Data\(\), and OnPolicy is another"):
        Selected(OnPolicy(), Difference(), TopShare("difference", 0.5))  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no record of texts is kept; loosen the rule"):
        draws(Selected(Data(), Difference("teacher", "small"), Between("difference", 1e9)), models, 1)
    with pytest.raises(DataError, match="'1' has no 'completion' to score"):
        draws(DIFFERENCE, models, 1, data={"train": Dataset((Record("1"),), "bare")})
    # It composes: a stream of its own beside another, with the models that it reads.
    mixed = Mixture(chosen=SURE, all=Data())
    made = Recipe(mixed, Objective(Imitate(on="chosen"), Match(ForwardKL(), to=Teacher(), on="all")))
    assert {h.name for h in made.handles()} == {"policy", "teacher"}
    assert (SURE >> (lambda rows, context: rows)).readers() == SURE.readers()
    assert SURE.fresh() == frozenset()


# ---- pass rates --------------------------------------------------------------------------------------------------

ASKED = Dataset(
    tuple(Record(f"{i}+", completion="1", answer="1") for i in range(10)),
    "asked",
    lambda record, text: float(len(text) % 2),
)


def test_a_pass_rate_is_that_of_answers_that_end(models):
    policy = models["policy"]
    plain = draws(Data(), models, 1, data={"train": ASKED})[0][0]
    rows = draws(Data() >> PassRate(6), models, 1, data={"train": ASKED})[0][0]
    assert prompts(rows) == prompts(plain)
    cut = 0
    for i, record in enumerate(plain.records):
        numbers = uniforms(3, "pass-rate", 0, rows=6, n=5, first_row=6 * i)
        asked = [policy.encode_prompt(record.prompt)]
        out = sample(policy, asked, uniforms=numbers, temperature=TEMPERATURE, group_size=6)
        right = [len(policy.decode(ids)) % 2 == 1 for ids in out.completions()]
        cut += sum(r and not end for r, end in zip(right, out.finished.tolist(), strict=True))
        rate = sum(r and end for r, end in zip(right, out.finished.tolist(), strict=True)) / 6
        assert float(rows.columns["pass_rate"][i]) == pytest.approx(rate)
    assert cut, "some right answers were cut off, and do not count"
    assert 0 < float(rows.columns["pass_rate"].mean()) < 1
    halves = [draws(Data() >> PassRate(6), models, 1, data={"train": ASKED}, rank=r, world=2)[0][0] for r in (0, 1)]
    for rank, half in enumerate(halves):
        assert torch.equal(half.columns["pass_rate"], rows.columns["pass_rate"][rank::2])


def test_answers_fit_where_the_row_does(models):
    """A prompt that leaves room for two tokens, beside a short one: nobody's answer exceeds the context."""
    long = Dataset((Record("1" * 62, completion="1", answer="1"), ASKED[0]), "long", ASKED.check)
    rows = draws(Data() >> PassRate(4), models, 1, data={"train": long}, rows=2)[0][0]
    assert int(rows.attention.sum(1).max()) == 64
    assert len(rows.columns["pass_rate"]) == 2
    with pytest.raises(RecipeError, match="samples=1 tell no rate between 0 and 1"):
        PassRate(1)


@pytest.mark.parametrize("samples", [2, 5])
def test_the_estimated_weight_is_unbiased(samples: int):
    from leibler import recipes

    (term,) = recipes.get("paced", samples=samples).objective.terms
    column = torch.arange(samples + 1) / samples
    from objective.made import rows as made_rows

    view = View(made_rows([1] * (samples + 1)).with_columns(pass_rate=column))
    assert isinstance(term.weight, Signal)
    weight = view.signal(term.weight, reach="sequence").double()
    for p in (0.1, 0.5, 0.9):
        law = [math.comb(samples, k) * p**k * (1 - p) ** (samples - k) for k in range(samples + 1)]
        assert float(torch.tensor(law, dtype=torch.float64) @ weight) == pytest.approx(6 * p * (1 - p), rel=1e-6)


def test_a_run_that_estimates_its_pass_rates_goes_on_bit_for_bit(tmp_path: Path):
    given: dict[str, Any] = {"teacher": student(1, dropout=0.0), "save_every": 2}
    run(recipe("paced", samples=4), tmp_path / "whole", **given)
    with pytest.raises(Stopped):
        run(recipe("paced", stop=3, samples=4), tmp_path / "cut", **given)
    run(recipe("paced", samples=4), tmp_path / "cut", resume=True, **given)
    assert written(tmp_path / "whole") == written(tmp_path / "cut")


def test_no_cache_stands_for_a_reader(tmp_path: Path):
    from leibler.train import stored

    class Cache:
        pass

    with pytest.raises(RecipeError, match="records are chosen by what 'teacher' makes of them, which no teacher cache"):
        stored.check(recipe("llkd"), {"teacher": Cache()}, student(), {}, 1.0)  # type: ignore[dict-item]


def test_long_work_is_told_with_the_time_left(capsys, monkeypatch):
    clock = iter([0.0, 0.0, 6.0, 7.0, 12.0])
    progress = Progress(10)
    Progress(10, quiet=True).working("score", 1, 2)
    monkeypatch.setattr("leibler.train.log.time.monotonic", lambda: next(clock))
    for done in (0, 10, 11, 12, 30):
        progress.working("score", done, 40)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("score 11/40")
    assert lines[0].endswith("left")
    assert len(lines) == 2
