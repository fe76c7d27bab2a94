"""Whole runs: what they leave behind, what they refuse, and how named models and coefficients move meanwhile."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_model

from leibler.divergence import ReverseKL
from leibler.errors import DataError, ModelError, RunError
from leibler.objective import (
    AdaptiveKL,
    Imitate,
    ImplicitReward,
    Linear,
    Match,
    Model,
    Objective,
    Preference,
    Reference,
)
from leibler.policy import CausalLM, Lora
from leibler.policy import ValueHead as ValueModule
from leibler.train import (
    EMA,
    BestAndWorst,
    Data,
    Mixture,
    OnPolicy,
    Recipe,
    Schedule,
    Score,
    Snapshot,
    WinRate,
    describe,
    fit,
)
from train.conformance import reward, tiny
from train.running import PAIRS, RECORDS, Stopped, recipe, run, student


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def far(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


# ---- what is left behind -----------------------------------------------------------------------------------------


def test_a_run_directory(tmp_path):
    out = tmp_path / "run"
    done = run(recipe("grpo", group_size=4), out, steps=4, save_every=2, validation=RECORDS[:5], validate_every=2)
    assert {p.name for p in out.iterdir()} == {
        "run.yaml", "metrics.jsonl", "timings.jsonl", "samples.jsonl", "validation.jsonl", "checkpoints", "final",
    }  # fmt: skip
    metrics = lines(out)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    for m in metrics:
        assert {
            "loss", "loss/policy_gradient", "loss/ReverseKL(reference)", "divergence/ReverseKL(reference)", "reward",
            "entropy", "length", "grad_norm", "learning_rate", "tokens",
        } <= m.keys()  # fmt: skip
        assert all(isinstance(v, (int, float)) and math.isfinite(v) for v in m.values())
        assert "seconds" not in m
    assert metrics[-1] == {"step": 4, **done.metrics}
    assert all(t["seconds"] > 0 for t in lines(out, "timings.jsonl"))
    assert [v["step"] for v in lines(out, "validation.jsonl")] == [2, 4]
    assert {"nll", "entropy", "accuracy"} <= done.validation.keys()
    sample = lines(out, "samples.jsonl")[0]
    assert {"step", "stream", "prompt", "completion", "reward"} <= sample.keys()
    assert sorted(p.name for p in (out / "checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
    again = CausalLM.load(out / "final")
    assert far(weights(again), weights(done.policy)) == 0
    assert not done.policy.training


def test_the_run_file_repeats_the_run(tmp_path):
    run(recipe("grpo", group_size=4), tmp_path / "a", steps=2, warmup=1)
    file = yaml.safe_load((tmp_path / "a" / "run.yaml").read_text())
    assert file["recipe"] == "custom"
    assert file["options"]["steps"] == 2
    assert file["options"]["warmup"] == 1
    assert file["options"]["seed"] == 11
    assert set(file["data_hashes"]) == {"train"}
    assert {"policy", "reference"} == set(file["weight_hashes"])
    assert file["description"] == describe(recipe("grpo", group_size=4))
    assert file["versions"]["torch"] == torch.__version__
    assert "memory" in file["student"]


def test_the_same_run_twice_is_the_same(tmp_path):
    """Nothing reads global random state."""
    for name in ("a", "b"):
        torch.manual_seed(hash(name) % 1000)
        run(recipe("grpo", group_size=4), tmp_path / name, steps=3)
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()
    run(recipe("grpo", group_size=4), tmp_path / "c", steps=3, seed=12)
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() != (tmp_path / "c" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("slug", ["kd", "ppo", "dpo"])
def test_the_size_of_a_micro_batch_changes_no_number(slug, tmp_path):
    params: dict[str, Any] = {"ppo": {"minibatches": 2, "epochs": 1}}.get(slug, {})
    data = PAIRS if slug == "dpo" else RECORDS
    found = []
    for rows in (None, 3):
        out = tmp_path / str(rows)
        run(recipe(slug, **params), out, data=data, student=student(dropout=0.0), steps=4, micro_batch_size=rows)
        found.append(lines(out))
    for a, b in zip(*found, strict=True):
        assert a.keys() == b.keys()
        assert a == pytest.approx(b, rel=2e-3, abs=2e-5)


def test_a_run_by_slug_learns(tmp_path):
    done = fit("sft", student=student(dropout=0.0), data=RECORDS[:4], out=tmp_path / "run", steps=60, batch_size=4,
               learning_rate=0.02, quiet=True)  # fmt: skip
    losses = [m["loss"] for m in lines(tmp_path / "run")]
    assert losses[0] > 1.5
    assert losses[-1] < 0.3
    assert yaml.safe_load((tmp_path / "run" / "run.yaml").read_text())["recipe"] == "sft"
    assert done.metrics["loss"] == losses[-1]


def test_rewards_are_learnt(tmp_path):
    """The share of responses that begin with the digit 7 rises from one in sixteen or so."""

    def sevens(records: Any, texts: Any) -> list[float]:
        return [float(t.startswith("7")) for t in texts]

    made = recipe("grpo", group_size=8, coefficient=0.0)
    made = Recipe(OnPolicy(8) >> Score(sevens), made.objective)
    run(
        made,
        tmp_path / "run",
        student=student(dropout=0.0),
        steps=40,
        batch_size=64,
        learning_rate=0.01,
        max_new_tokens=2,
    )
    rewards = [m["reward"] for m in lines(tmp_path / "run")]
    assert sum(rewards[:3]) / 3 < 0.3
    assert sum(rewards[-3:]) / 3 > 0.8


# ---- what is refused ---------------------------------------------------------------------------------------------


def contents(out: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in out.rglob("*") if p.is_file()}


def test_a_directory_that_holds_another_run_is_left_alone(tmp_path):
    out = tmp_path / "run"
    run(recipe("sft"), out, steps=1)
    before = contents(out)
    with pytest.raises(
        RunError, match=r"holds another run; give another directory, or go on with `leibler train --resume"
    ):
        run(recipe("sft"), out, steps=1)
    assert contents(out) == before


def test_a_directory_that_holds_something_else_is_left_alone(tmp_path):
    out = tmp_path / "notes"
    out.mkdir()
    (out / "a.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        run(recipe("sft"), out)
    assert contents(out) == {str(out / "a.txt"): b"mine"}
    with pytest.raises(RunError, match="is a file; give a directory"):
        run(recipe("sft"), out / "a.txt")
    with pytest.raises(RunError, match="holds no run to resume"):
        run(recipe("sft"), out, resume=True)
    with pytest.raises(RunError, match="holds no run to resume"):
        run(recipe("sft"), tmp_path / "none", resume=True)


def test_what_a_refused_run_left_does_not_block_the_next(tmp_path):
    """The weights for another engine are written before the data is read."""
    initial = tmp_path / "run" / "rollouts" / "initial"
    initial.mkdir(parents=True)
    (initial / "model.safetensors").write_text("weights")
    run(recipe("sft"), tmp_path / "run", steps=1)
    with pytest.raises(RunError, match="holds another run"):
        run(recipe("sft"), tmp_path / "run", steps=1)


def test_another_engine_is_closed_however_the_run_ends(tmp_path, monkeypatch):
    from leibler.train import loop

    closed = []

    class Engine:
        def close(self) -> None:
            closed.append(True)

    monkeypatch.setattr(loop.rollouts, "arrange", lambda recipe, *_: (recipe, Engine()))
    with pytest.raises(Stopped):
        run(recipe("sft", stop=1), tmp_path / "a")
    assert closed == [True]
    run(recipe("sft"), tmp_path / "b", steps=1)
    assert closed == [True, True]


def test_only_the_first_process_opens_files(tmp_path):
    from leibler.train.journal import Journal
    from leibler.train.options import Options

    Journal(tmp_path, Options(), lambda x: x, main=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["responses", "validation"])
def test_no_data_set_shares_a_file_with_the_run(tmp_path, name):
    made = Recipe(Data(name), Objective(Imitate()))
    with pytest.raises(DataError, match=f"would share set_aside/{name}.jsonl with the run; name it otherwise"):
        run(made, tmp_path / "run", data={name: RECORDS})


@pytest.mark.parametrize(
    ("slug", "given", "error", "message"),
    [
        ("sft", {"data": {"train": RECORDS, "other": RECORDS}}, DataError, "data.other is not used by this recipe"),
        (
            "sft",
            {"data": {"other": RECORDS}},
            DataError,
            "data.other is not used by this recipe, which draws from: train",
        ),
        ("sft", {"data": {}}, DataError, "draws from the data 'train', which was not given; add data=FILE"),
        ("sft", {"data": [{"prompt": "1+1="}]}, DataError, "no usable row.*'completion' is missing"),
        ("dpo", {}, DataError, "no usable row.*'chosen' is missing"),
        ("sft", {"data": "nowhere.jsonl"}, DataError, "nowhere.jsonl"),
        ("sft", {"student": "/nowhere"}, ModelError, "student=/nowhere: "),
        (
            "sft",
            {"models": {"tacher": "/nowhere"}},
            ModelError,
            "models.tacher is not used by this recipe, which reads: none",
        ),
    ],
)
def test_mistakes_come_before_the_first_step_and_leave_no_directory(slug, given, error, message, tmp_path):
    with pytest.raises(error, match=message) as caught:
        run(recipe(slug), tmp_path / "run", **given)
    assert "\n" not in str(caught.value)
    # What was set aside stays to be looked at, and does not stand in the way of the next attempt.
    left = {p.relative_to(tmp_path / "run").parts[0] for p in (tmp_path / "run").rglob("*")}
    assert left <= {"set_aside"}
    run(recipe("sft"), tmp_path / "run", steps=1)


def test_a_missing_teacher_is_named(tmp_path):
    with pytest.raises(ModelError, match="needs the model 'teacher', which was not given; add teacher=DIR"):
        fit(recipe("kd"), student=student(), data=RECORDS, out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_teacher_that_nothing_reads_is_not_loaded(tmp_path):
    given: dict[str, Any] = {"student": student(), "teacher": "/nowhere", "data": RECORDS, "quiet": True}
    options: dict[str, Any] = {"steps": 1, "batch_size": 8, "max_new_tokens": 4}
    fit(recipe("kdrl", group_size=4, coefficient=0.0), out=tmp_path / "a", **given, **options)
    with pytest.raises(ModelError, match="teacher=/nowhere"):
        fit(recipe("kdrl", group_size=4), out=tmp_path / "b", **given, **options)


def test_rows_that_do_not_fit_are_set_aside(tmp_path):
    long = {"prompt": "1+" * 40, "completion": "1"}
    run(recipe("sft"), tmp_path / "run", data=[long, {"prompt": "1+1="}, *RECORDS], steps=1)
    (file,) = (tmp_path / "run" / "set_aside").iterdir()
    reasons = sorted(json.loads(line)["reason"] for line in file.read_text().splitlines())
    assert reasons == ["'completion' is missing", "longer than the model's context"]
    # The length of what is to be sampled counts too.
    with pytest.raises(DataError, match="longer than the model's context"):
        run(recipe("gkd"), tmp_path / "b", max_new_tokens=63)


def test_a_pair_beside_a_completion_is_no_label(tmp_path):
    """Of a data set with completions and pairs, maximum likelihood learns the completions only."""
    both = [{**r, "chosen": "99999", "rejected": "000"} for r in RECORDS]
    run(recipe("sft"), tmp_path / "a", data=both, steps=2)
    run(recipe("sft"), tmp_path / "b", data=RECORDS, steps=2)
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == (tmp_path / "b" / "metrics.jsonl").read_bytes()


def test_pairs_and_text_side_by_side(tmp_path):
    """Each data set needs what its own stream learns."""
    made = Recipe(
        Mixture(pairs=Data(), text=Data("text")),
        Objective(Preference(ImplicitReward(), on="pairs"), Imitate(on="text")),
    )
    run(made, tmp_path / "run", data={"train": PAIRS, "text": RECORDS}, steps=2)
    assert {"loss/preference", "loss/nll", "length/pairs", "length/text"} <= lines(tmp_path / "run")[0].keys()


def test_draws_that_stay_empty_end_the_run(tmp_path):
    made = Recipe(
        OnPolicy(2) >> WinRate(lambda record, a, b: 0.5) >> BestAndWorst(),
        Preference(ImplicitReward()),
    )
    with pytest.raises(RunError, match="20 draws in a row left no row to learn from"):
        run(made, tmp_path / "run")


# ---- what moves --------------------------------------------------------------------------------------------------


def saved(out: Path, step: int, name: str) -> list[torch.Tensor]:
    """The weights of a model (or critic) in a checkpoint."""
    module = ValueModule(16) if name == "critic" else student()
    load_model(module, str(out / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors"))
    return weights(module)


def test_an_average_follows_every_step(tmp_path):
    made = Recipe(Data(), Objective(Imitate(), Match(ReverseKL(), to=Model("slow"))), models={"slow": EMA(0.25)})
    model = student(dropout=0.0)
    average = weights(model)
    run(made, tmp_path / "run", student=model, steps=3, save_every=1, keep=9)
    for step in (1, 2, 3):
        policy, slow = saved(tmp_path / "run", step, "policy"), saved(tmp_path / "run", step, "slow")
        average = [a.lerp(p, 0.25) for a, p in zip(average, policy, strict=True)]
        assert far(slow, average) < 1e-6
    assert far(average, policy) > 1e-3


def test_a_snapshot_follows_rounds(tmp_path):
    """Rounds of four steps, a renewal every second round: at step 9 it holds the policy of step 8."""
    made = Recipe(
        Data(), Objective(Imitate(), Match(ReverseKL(), to=Model("past"))), Schedule(minibatches=2, steps_per_round=4),
        models={"past": Snapshot(every=2)},
    )  # fmt: skip
    model = student(dropout=0.0)
    initial = weights(model)
    run(made, tmp_path / "run", student=model, steps=18, save_every=2, keep=99)

    def holds(step: int) -> int:
        past = saved(tmp_path / "run", step, "past")
        moments = {0: initial, **{s: saved(tmp_path / "run", s, "policy") for s in range(2, 19, 2)}}
        (found,) = [s for s, w in moments.items() if far(w, past) == 0]
        return found

    assert [holds(s) for s in (2, 4, 6, 8, 10, 12, 16, 18)] == [0, 0, 0, 0, 8, 8, 8, 16]


def test_a_frozen_reference_stays(tmp_path):
    made = Recipe(Data(), Objective(Imitate(), Match(ReverseKL(), to=Reference(), coefficient=0.1)))
    run(made, tmp_path / "run", student=student(dropout=0.0), steps=8, save_every=4)
    drift = [m["divergence/ReverseKL(reference)"] for m in lines(tmp_path / "run")]
    assert drift[0] == pytest.approx(0, abs=1e-6)
    assert drift[-1] > 10 * max(drift[1], 1e-9) > 0
    assert {p.name for p in (tmp_path / "run" / "checkpoints" / "step-00000008").iterdir()} == {
        "manifest.json", "optimizer.safetensors", "policy.safetensors", "state.json",
        "state.safetensors",
    }  # fmt: skip


def test_the_controller_of_ppo_hears_of_each_draw_once(tmp_path):
    """Two draws of four steps each: two movements, by the divergence and the number of responses of the draw."""
    run(
        recipe("ppo", minibatches=2, epochs=2, target=0.05, horizon=100.0, initial=0.1), tmp_path / "run", steps=12,
        student=student(dropout=0.0), save_every=4, keep=9, learning_rate=0.03,
    )  # fmt: skip
    measured = [m["divergence_per_sequence/InReward"] for m in lines(tmp_path / "run")]
    assert measured[:4] == [measured[0]] * 4
    assert measured[4] != measured[0]
    coefficient = 0.1
    for draw in range(3):
        error = min(max(measured[4 * draw] / 0.05 - 1, -0.2), 0.2)
        coefficient *= 1 + error * 16 / 100.0
        state = json.loads((tmp_path / "run" / "checkpoints" / f"step-{4 * draw + 4:08d}" / "state.json").read_text())
        assert state["signals"] == [{"coefficient": pytest.approx(coefficient)}]
    assert coefficient != pytest.approx(0.1, rel=1e-3)


def test_a_controller_of_a_term_hears_of_each_step(tmp_path):
    controller = AdaptiveKL(target=1e-6, initial=0.5, horizon=10.0)
    made = Recipe(Data(), Objective(Imitate(), Match(ReverseKL(), to=Reference(), coefficient=controller)))
    run(made, tmp_path / "run", student=student(dropout=0.0), steps=4)
    used = [m["coefficient/ReverseKL(reference)"] for m in lines(tmp_path / "run")]
    # Below the target at first (they are equal), far above it afterwards.
    assert used == pytest.approx([0.5, 0.5 * 0.84, 0.5 * 0.84 * 1.16, 0.5 * 0.84 * 1.16**2], rel=1e-5)


def test_schedules_are_of_the_step(tmp_path):
    made = Recipe(Data(), Objective(Imitate(coefficient=Linear(1.0, 0.0, steps=4))), Schedule(minibatches=2))
    run(made, tmp_path / "run", steps=6, warmup=2, decay="linear", learning_rate=0.4)
    metrics = lines(tmp_path / "run")
    assert [m["coefficient/nll"] for m in metrics] == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0, 0.0])
    assert [m["learning_rate"] for m in metrics] == pytest.approx([0.2, 0.4, 0.4, 0.3, 0.2, 0.1])
    assert [m["loss"] for m in metrics] == pytest.approx([m["loss/nll"] * m["coefficient/nll"] for m in metrics])


def test_gradients_are_clipped_to_the_norm(tmp_path):
    """With the plainest AdamW a huge bound and a tiny one differ; the norm that is written is that before."""
    first = {}
    for bound in (1e9, 1e-3):
        run(recipe("sft"), tmp_path / str(bound), student=student(dropout=0.0), steps=1, max_grad_norm=bound)
        first[bound] = lines(tmp_path / str(bound))[0]["grad_norm"]
    assert first[1e9] == pytest.approx(first[1e-3])
    assert first[1e9] > 0.1


def test_a_critic_may_learn_at_its_own_rate(tmp_path):
    from dataclasses import replace

    from leibler.train import Trained, ValueHead

    made = recipe("ppo", minibatches=1, epochs=1)
    made = replace(made, models={**made.models, "critic": Trained(ValueHead(), learning_rate=1e-9)})
    run(made, tmp_path / "slow", steps=3, save_every=3)
    run(recipe("ppo", minibatches=1, epochs=1), tmp_path / "fast", steps=3, save_every=3)
    slow, fast = (max(float(x.abs().max()) for x in saved(tmp_path / n, 3, "critic")) for n in ("slow", "fast"))
    assert slow < 1e-7
    assert fast > 1e-3


def test_a_source_that_listens_to_the_validation_gets_one(tmp_path):
    run(recipe("distillm"), tmp_path / "a", steps=40, batch_size=2)
    assert [v["step"] for v in lines(tmp_path / "a", "validation.jsonl")] == list(range(2, 41, 2))
    # Given its records, it still looks often enough.
    run(recipe("distillm"), tmp_path / "b", steps=4, batch_size=2, validation=RECORDS[:3])
    assert [v["step"] for v in lines(tmp_path / "b", "validation.jsonl")] == [1, 2, 3, 4]
    with pytest.raises(DataError, match="'completion' is missing"):
        run(recipe("distillm"), tmp_path / "c", steps=4, validation=[{"prompt": "1+1="}])


def test_the_model_is_written_before_the_last_validation(tmp_path, monkeypatch):
    from leibler.train import loop

    def fails(*_: Any, **__: Any) -> dict[str, float]:
        raise MemoryError("no room for the validation")

    monkeypatch.setattr(loop, "validate", fails)
    with pytest.raises(MemoryError):
        run(recipe("sft"), tmp_path / "run", steps=1, validation=RECORDS[:3])
    assert CausalLM.load(tmp_path / "run" / "final").vocab_size == student().vocab_size


def test_a_validation_prompt_that_leaves_no_room_for_an_answer_is_set_aside(tmp_path, capsys):
    """The prompt alone fits the context of 64 tokens; with the answer that validation samples it does not."""
    long = {"prompt": "1+" * 30 + "1=", "completion": "1", "answer": "1"}
    run(recipe("sft"), tmp_path / "run", steps=1, validation=[*RECORDS[:3], long], max_new_tokens=8, quiet=False)
    assert "validation: " in capsys.readouterr().err
    (aside,) = lines(tmp_path / "run", "set_aside/validation.jsonl")
    assert "longer than the model's context" in aside["reason"]


def test_validation_without_a_completion_beside_an_aligned_teacher():
    from leibler.data import load
    from leibler.policy.vocabulary import TextAlignment
    from leibler.train.validation import validate

    model = student(dropout=0.0)
    models = {"policy": model, "teacher": model}
    alignments = {"teacher": TextAlignment(model, model)}
    data = load([{"prompt": "1+1="}], needs=("prompt",))
    assert validate(models, data, temperature=1.0, max_new_tokens=2, alignments=alignments) == {}


def test_a_student_may_be_its_own_teacher(tmp_path):
    model = student(dropout=0.0)
    done = fit(recipe("kd"), student=model, teacher=model, data=RECORDS, out=tmp_path / "run", steps=1, batch_size=4,
               learning_rate=0.1, quiet=True)  # fmt: skip
    assert done.metrics["loss"] < 1e-6


@pytest.mark.parametrize("slug", ["sft", "ppo"])
def test_dropout_of_an_adapter_on_the_head_is_derived_too(slug, tmp_path):
    """In one pass, and in a survey with its replay."""
    for name in ("a", "b"):
        model = tiny(1, dtype=torch.float32).adapted(Lora(rank=2, targets=("lm_head",), dropout=0.5))
        torch.manual_seed(ord(name))
        run(recipe(slug), tmp_path / name, student=model, steps=3, learning_rate=0.1)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_an_adapter_alone_is_trained(tmp_path):
    model = tiny(0, dtype=torch.float32)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    run(recipe("grpo", group_size=4), tmp_path / "run", student=model, steps=2, adapter_rank=2, save_every=1)
    merged = CausalLM.load(tmp_path / "run" / "final")
    moved = {n for n, p in merged.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("proj" in n for n in moved)
    assert reward([], []) == []


@pytest.fixture
def fresh_accelerate():
    """Mixed precision is set once in a process; a test that sets it starts and ends with a clean slate."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerate")
def test_mixed_precision_is_that_of_every_model(tmp_path):
    """The reference is the policy at first: in the same arithmetic their divergence is exactly 0."""
    run(recipe("grpo", group_size=4), tmp_path / "a", student=student(dropout=0.0), steps=2, mixed_precision="bf16")
    first, second = (m["divergence/ReverseKL(reference)"] for m in lines(tmp_path / "a"))
    assert first == 0
    assert second > 1e-4
    with pytest.raises(RunError, match=r"mixed_precision=no cannot be set .* start a new one"):
        run(recipe("grpo", group_size=4), tmp_path / "b")


# ---- so many tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("slug", "steps"), [("sft", 2), ("sft", 50), ("kdrl", 3)])
def test_a_run_of_so_many_tokens_ends_within_one_batch_of_them(slug, steps, tmp_path):
    run(recipe(slug), tmp_path / "run", steps=steps, tokens=100)
    trained = [json.loads(line)["tokens"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(trained) >= 100 > sum(trained[:-1])
