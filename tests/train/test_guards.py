"""Guards: each is provoked in a whole run, and what it promises is checked."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leibler.divergence import ReverseKL
from leibler.errors import RunError
from leibler.objective import Imitate, Match, Objective, PolicyGradient, Reference, Reward, Rows
from leibler.train import Context, Data, Mixture, OnPolicy, Options, Recipe, Score
from leibler.train.guards import Drift, FailedRewards, Guards, NonFinite, Tripwire, read_batch
from leibler.train.sources import Staged
from train.conformance import reward
from train.running import RECORDS, Stopped, recipe, run, stopped, student, written


def lines(out: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


@dataclass(frozen=True)
class Poison:
    """A stage that spoils the numbers of some draws: the rows' column becomes NaN, and with it the loss."""

    draws: tuple[int, ...]

    def __call__(self, rows: Rows, context: Context) -> Rows:
        if context.draw not in self.draws:
            return rows
        return rows.with_columns(reward=torch.full_like(rows.columns["reward"], math.nan))


def poisoned(*draws: int, **params: Any) -> Recipe:
    made = recipe("grpo", group_size=4, **params)
    return replace(made, source=Staged(made.source, Poison(draws)))


def weights(model: Any) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


# ---- steps that are not finite ---------------------------------------------------------------------------------------


def test_a_step_that_is_not_finite_is_skipped_and_its_batch_written_aside(tmp_path, capsys):
    done = run(poisoned(2), tmp_path / "run", save_every=1, keep=9, steps=5, quiet=False)
    metrics = lines(tmp_path / "run")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    assert metrics[2]["loss"] == "nan"
    assert all(math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"]) for i, m in enumerate(metrics) if i != 2)
    assert all(p.isfinite().all() for p in done.policy.parameters())
    # Weights and optimiser state are those of before.
    for name in ("policy.safetensors", "optimizer.safetensors"):
        at = [(tmp_path / "run" / "checkpoints" / f"step-{n:08d}" / name).read_bytes() for n in (2, 3, 4)]
        assert at[0] == at[1] != at[2]
    said = capsys.readouterr().err
    path = tmp_path / "run" / "guards" / "step-00000003.safetensors"
    assert "step 3 was skipped (loss/policy_gradient nan, loss nan, grad_norm nan, gradients not finite in" in said
    assert f"; its batch is in {path}" in said
    assert path.exists()
    (warning,) = lines(tmp_path / "run", "warnings.jsonl")
    assert (warning["step"], warning["guard"]) == (3, "non_finite")
    assert warning["batch"] == "guards/step-00000003.safetensors"


def test_the_batch_that_was_written_aside_is_the_step_again(tmp_path):
    seen: list[Rows] = []

    @dataclass(frozen=True)
    class Keep:
        def __call__(self, rows: Rows, context: Context) -> Rows:
            seen.append(rows)
            return rows

    made = poisoned(1)
    run(replace(made, source=Staged(made.source, Keep())), tmp_path / "run", steps=3)
    (rows,) = read_batch(tmp_path / "run" / "guards" / "step-00000002.safetensors").values()
    for name in ("tokens", "attention", "mask", "group", "role"):
        assert torch.equal(getattr(rows, name), getattr(seen[1], name))
    assert rows.columns.keys() == seen[1].columns.keys()
    assert torch.equal(rows.columns["behaviour_logp"], seen[1].columns["behaviour_logp"])
    assert rows.columns["reward"].isnan().all()
    about = json.loads((tmp_path / "run" / "guards" / "step-00000002.json").read_text())
    assert (about["step"], about["seed"], about["loss"]) == (2, 11, "nan")
    assert [r["response"] for r in about["streams"]["main"]] == list(seen[1].texts)
    with pytest.raises(RunError, match="does not exist; give a file that a guard wrote"):
        read_batch(tmp_path / "none.safetensors")


def test_broken_weights_are_seen_and_named(tmp_path):
    """NaN hidden states are no infinite divergence: they reach the guard, which says where they come from."""
    model = student(dropout=0.0)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "norm" in n)[0] = math.nan
    for name, made in {"kd": recipe("kd"), "sft": recipe("sft")}.items():
        with pytest.raises(RunError, match=r"5 steps in a row were skipped.*weights not finite in .*norm"):
            run(made, tmp_path / name, student=model, steps=9)
        assert len(lines(tmp_path / name)) == 5


@pytest.mark.parametrize("slug", ["grpo", "ppo", "minillm", "disco", "dpo"])
def test_nan_is_seen_under_every_plan(slug, tmp_path):
    """One pass, two passes, survey and replay: wherever values are summed."""
    from train.running import PAIRS

    model = student(dropout=0.0)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "mlp" in n)[0, 0] = math.nan
    params = {"group_size": 4} if slug in ("grpo", "disco") else {}
    with pytest.raises(RunError, match="steps in a row were skipped"):
        run(
            recipe(slug, **params), tmp_path / slug, student=model, steps=9, data=PAIRS if slug == "dpo" else RECORDS,
            guard_steps=2, micro_batch_size=2,
        )  # fmt: skip
    assert len(lines(tmp_path / slug)) == 2


def test_an_infinite_divergence_is_none_of_the_guards_business(tmp_path):
    """It is exact, has gradient 0, and is counted; the step is taken."""
    from leibler.train.tally import finite

    values = torch.tensor([1.0, math.inf, -math.inf, math.nan], requires_grad=True)
    out = finite(values)
    assert out[:3].tolist() == [1, 0, 0]
    assert out[3].isnan()
    out[:3].sum().backward()
    assert values.grad is not None
    assert values.grad[:3].tolist() == [1, 0, 0]


def test_what_any_process_sees_is_said(tmp_path):
    """Where weights are shared out, each process knows of its share alone."""
    from leibler.train.guarding import Guarding
    from leibler.train.journal import Journal
    from leibler.train.tally import Step

    parameters = {name: torch.nn.Parameter(torch.tensor([value])) for name, value in (("a", math.nan), ("b", 1.0))}
    parameters["b"].grad = torch.tensor([math.inf])
    guards, said = Guards.of(Options(), recipe("sft")), []
    theirs = {"weights": ["a", "c"], "gradients": []}
    journal = Journal(tmp_path, Options(), lambda x: x, main=True)
    guarding = Guarding(guards, tmp_path, journal, said.append, 0, lambda mine: [mine, theirs])
    guarding.broken({"loss": math.nan, "grad_norm": 1.0})
    guarding.skipped(4, 0, {}, Step({"loss": math.nan}, {}), parameters)
    journal.close()
    (sentence,) = said
    seen = "loss nan, weights not finite in a and 1 more, gradients not finite in b"
    assert sentence.startswith(f"step 4 was skipped ({seen})")


def test_a_batch_is_flushed_before_it_has_its_name(tmp_path, monkeypatch):
    from leibler import durable

    flushed = []
    write = durable.write
    monkeypatch.setattr(durable, "write", lambda path, fill: (flushed.append(path.suffix), write(path, fill)))
    run(poisoned(0), tmp_path / "run", steps=1)
    assert ".safetensors" in flushed


def test_too_many_in_a_row_end_the_run_and_it_can_be_gone_on_with(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(
        RunError, match=r"3 steps in a row were skipped, the last being step 5 .*loss nan.*after step 2"
    ):
        run(poisoned(2, 3, 4), out, guard_steps=3, steps=7)
    assert [p.name for p in (out / "checkpoints").iterdir()] == ["step-00000005"]
    run(poisoned(2, 3, 4), out, guard_steps=3, steps=7, resume=True)
    assert [m["step"] for m in lines(out)] == [1, 2, 3, 4, 5, 6, 7]


def test_steps_that_are_not_in_a_row_do_not_end_it(tmp_path):
    run(poisoned(0, 1, 3, 4, 6), tmp_path / "run", guard_steps=3, steps=8)
    assert len(lines(tmp_path / "run", "warnings.jsonl")) == 5


def test_a_sick_run_does_not_fill_the_disk(tmp_path):
    guard, state = NonFinite(kept=2), NonFinite().init()
    for _ in range(4):
        state = guard.observe(state, True)
    assert state == {"in_a_row": 4, "skipped": 4}
    made = poisoned(*range(0, 50, 2))
    run(made, tmp_path / "run", steps=46, max_new_tokens=1, batch_size=4)
    assert len(list((tmp_path / "run" / "guards").glob("*.safetensors"))) == NonFinite().kept
    assert len(lines(tmp_path / "run", "warnings.jsonl")) == 23


def test_models_that_follow_the_policy_do_not_follow_a_skipped_step(tmp_path):
    """Neither the moving average nor a controller hears of it."""
    from leibler.objective import AdaptiveKL, Model
    from leibler.train import EMA

    term = Match(ReverseKL(), to=Model("slow"), coefficient=AdaptiveKL(target=0.01, initial=0.5, horizon=20.0))
    base = poisoned(2)
    made = Recipe(base.source, Objective(*base.objective.terms[:1], term), models={"slow": EMA(0.5)})
    run(made, tmp_path / "run", steps=4, save_every=1, keep=9)
    folders = [tmp_path / "run" / "checkpoints" / f"step-{n:08d}" for n in (2, 3, 4)]
    slow = [(f / "slow.safetensors").read_bytes() for f in folders]
    signals = [json.loads((f / "state.json").read_text())["signals"] for f in folders]
    assert slow[0] == slow[1] != slow[2]
    assert signals[0] == signals[1] != signals[2]


# ---- resumed ---------------------------------------------------------------------------------------------------------


def same(out: Path, whole: Path, *names: str) -> None:
    assert written(out) == written(whole)
    newest = [max((folder / "checkpoints").iterdir()) / "state.json" for folder in (out, whole)]
    seen = [json.loads(path.read_text())["guards"] for path in newest]
    assert seen[0] == seen[1]
    for name in names:
        assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("stop", [2, 4, 5])
def test_a_guarded_run_resumes_exactly(stop, tmp_path):
    """Skipped steps and set-aside responses before, at and after the place where it was stopped."""
    poison = poisoned(1, 3)
    made = replace(poison, source=Staged(Staged(recipe("grpo", group_size=4).source, Sometimes()), Poison((1, 3))))
    names = ("warnings.jsonl", "set_aside/responses.jsonl", "guards/step-00000002.json", "guards/step-00000004.json")
    run(made, tmp_path / "whole", save_every=2, steps=7, guard_steps=2)
    with pytest.raises(Stopped):
        run(replace(made, source=stopped(made.source, stop)), tmp_path / "out", save_every=2, steps=7, guard_steps=2)
    run(made, tmp_path / "out", save_every=2, steps=7, guard_steps=2, resume=True)
    same(tmp_path / "out", tmp_path / "whole", *names)


# ---- rewards ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sometimes:
    """Scores responses again; those of odd length have no reward in even draws."""

    def __call__(self, rows: Rows, context: Context) -> Rows:
        def by(records: Any, texts: Any) -> list[float]:
            if context.draw % 2:
                return list(reward(records, texts))
            return [math.nan if len(t) % 2 else r for t, r in zip(texts, reward(records, texts), strict=True)]

        return Score(by)(rows, context)


def test_a_failed_reward_costs_one_response(tmp_path, capsys):
    made = recipe("grpo", group_size=4)
    run(replace(made, source=Staged(made.source, Sometimes())), tmp_path / "run", steps=4, quiet=False)
    aside = lines(tmp_path / "run", "set_aside/responses.jsonl")
    assert aside
    assert {a["draw"] for a in aside} <= {0, 2}
    assert all(a["reason"] == "is nan; return a finite number for every response" for a in aside)
    assert all(len(a["response"]) % 2 for a in aside)
    assert aside[0].keys() == {"draw", "source", "reason", "prompt", "response"}
    assert capsys.readouterr().err.count("its reward is nan") == 1
    rows = [m["rows"] for m in lines(tmp_path / "run")]
    assert len(rows) == 4
    assert rows[1] == rows[3] == 8
    assert min(rows[0], rows[2]) < 8
    # Nothing is lost: what is not learnt from is set aside, or was left without a sibling.
    assert all(8 - r <= sum(a["draw"] == d for a in aside) * 2 for d, r in ((0, rows[0]), (2, rows[2])))


def test_a_reward_that_always_fails_ends_the_run_with_its_reason(tmp_path):
    def broken(records: Any, texts: Any) -> list[float]:
        raise KeyError("answer")

    made = recipe("grpo", group_size=4)
    made = replace(made, source=Staged(made.source, Score(broken)))
    with pytest.raises(
        RunError, match=r"every response of 3 draws in a row: it is missing: KeyError: 'answer' \(test_gu"
    ):
        run(made, tmp_path / "run")
    assert len(lines(tmp_path / "run", "set_aside/responses.jsonl")) == 24
    with pytest.raises(RunError, match="every response of 1 draws in a row"):
        run(made, tmp_path / "other", guard_draws=1)
    assert len(lines(tmp_path / "other", "set_aside/responses.jsonl")) == 8


def test_text_beside_the_rewards_does_not_hide_that_all_fail(tmp_path):
    def broken(records: Any, texts: Any) -> list[float]:
        raise KeyError("answer")

    source = Mixture(main=OnPolicy(2) >> Score(broken), text=Data())
    made = Recipe(source, Objective(PolicyGradient(Reward(), on="main"), Imitate(on="text")))
    with pytest.raises(RunError, match="the reward failed for every response of 2 draws in a row"):
        run(made, tmp_path / "run", guard_draws=2)


def test_draws_without_a_reward_are_counted_in_a_row():
    guard = FailedRewards(most=3)
    state = guard.init()
    for failed, rows, expected in ((4, 0, 1), (0, 8, 0), (4, 0, 1), (4, 0, 2), (2, 6, 0), (4, 0, 1), (0, 0, 1)):
        state = guard.observe(state, failed, rows, "why")
        assert state["in_a_row"] == expected
    assert state == {"in_a_row": 1, "failed": 18, "last": "why"}


# ---- the tripwire ----------------------------------------------------------------------------------------------------


def leaning(coefficient: float = 0.01) -> Recipe:
    """Imitation that leaves the reference, held back by a divergence."""
    return Recipe(Data(), Objective(Imitate(), Match(ReverseKL(), to=Reference(), coefficient=coefficient)))


NAME = "ReverseKL(reference)"
FREE: dict[str, Any] = {"learning_rate": 0.05, "steps": 12, "student": None}


def lean(out: Path, made: Recipe | None = None, **options: Any) -> Any:
    given = {**FREE, "student": student(dropout=0.0), **options}
    return run(made or leaning(), out, **given)


def test_a_divergence_beyond_the_bound_ends_the_run(tmp_path):
    lean(tmp_path / "free")
    drift = [m[f"divergence/{NAME}"] for m in lines(tmp_path / "free")]
    bound = sorted(drift)[6]
    first = next(i for i, d in enumerate(drift) if d > bound) + 1
    with pytest.raises(RunError, match=rf"at step {first} the divergence .* nats, beyond max_divergence=.*rollback"):
        lean(tmp_path / "held", max_divergence=bound)
    assert len(lines(tmp_path / "held")) == first
    assert not (tmp_path / "held" / "final").exists()


def test_it_goes_back_and_raises_the_coefficient(tmp_path, capsys):
    lean(tmp_path / "free")
    bound = max(m[f"divergence/{NAME}"] for m in lines(tmp_path / "free")) * 0.8
    options = {"max_divergence": bound, "on_divergence": "rollback", "save_every": 2}
    # A coefficient that matters once it is doubled a few times.
    made = leaning(0.4)
    lean(tmp_path / "whole", made, quiet=False, **options)
    metrics, warnings = lines(tmp_path / "whole"), lines(tmp_path / "whole", "warnings.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 13))
    assert 1 <= len(warnings) <= 5
    assert all(m[f"divergence/{NAME}"] <= bound for m in metrics)
    assert f"going back to the last checkpoint with the coefficient of {NAME} x 2" in capsys.readouterr().err
    state = json.loads((tmp_path / "whole" / "checkpoints" / "step-00000012" / "state.json").read_text())
    assert state["guards"]["tripwire"] == {"times": len(warnings), "raised": {NAME: 2.0 ** len(warnings)}}
    loss = metrics[-1]["loss/nll"] + 0.4 * 2 ** len(warnings) * metrics[-1][f"loss/{NAME}"]
    assert metrics[-1]["loss"] == pytest.approx(loss)
    # Killed after it went back, and before the next checkpoint: it goes back again, the same.
    back = next(w["step"] for w in warnings)
    for stop in (back - 1, back, back + 1):
        out = tmp_path / str(stop)
        with pytest.raises(Stopped):
            lean(out, replace(made, source=stopping(stop)), **options)
        lean(out, made, resume=True, **options)
        same(out, tmp_path / "whole", "warnings.jsonl")


class StopAfter(Data):
    """Stops after so many draws in this process, whatever their numbers: some are done twice."""

    times: int

    def draw(self, context: Context, state: Any) -> Any:
        object.__setattr__(self, "times", self.times - 1)
        if self.times < 0:
            raise Stopped
        return super().draw(context, state)


def stopping(times: int) -> StopAfter:
    source = StopAfter()
    object.__setattr__(source, "times", times)
    return source


def test_it_cannot_always_go_back(tmp_path):
    wire = {"max_divergence": 1e-9, "on_divergence": "rollback"}
    with pytest.raises(RunError, match="no checkpoint to go back to yet; lower save_every"):
        lean(tmp_path / "a", **wire, save_every=9)
    with pytest.raises(RunError, match="after going back 5 times; lower learning_rate"):
        lean(tmp_path / "b", **wire, save_every=1)


def test_the_bound_is_one_per_token(tmp_path):
    """What a controller in the reward hears of is a sum over a sequence: no business of the wire's."""
    run(recipe("ppo", minibatches=1, epochs=1), tmp_path / "run", max_divergence=1e-9, steps=2, learning_rate=0.05)
    assert lines(tmp_path / "run")[-1]["divergence_per_sequence/InReward"] > 1e-9


def test_options_are_checked():
    for wrong in ({"max_divergence": 0.0}, {"on_divergence": "cry"}, {"guard_steps": 0}, {"guard_draws": -1}):
        with pytest.raises(RunError, match=f"{next(iter(wrong))}="):
            Options(**wrong)  # type: ignore[arg-type]
    assert Tripwire(None).tripped({"divergence/x": math.inf}) == {}
    assert Tripwire(1.0).tripped({"divergence/x": 1.5, "divergence/y": 0.5, "loss": 9.0}) == {"x": 1.5}


# ---- drift -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.1, 3.0])
def test_drift_is_told_once_and_not_for_noise(factor):
    guard, state, told = Drift("entropy", factor, "it went", window=5), Drift("entropy", factor, "x").init(), []
    values = (
        [1.0, 1.2, 0.8, 1.1, 0.9] + [1.0, 0.5, 1.5, 0.0 if factor < 1 else 4.0] + [factor * (0.5, 2)[factor > 1]] * 40
    )
    for step, value in enumerate(values):
        state, message = guard.observe(json.loads(json.dumps(state)), {"entropy": value})
        if message:
            told.append((step, message))
    ((step, message),) = told
    assert step >= 10
    assert message.startswith("it went: the mean entropy is ")
    assert message.endswith("and was 1 in the first 5 steps")
    assert Drift("length", 3.0, "x").observe(state, {"entropy": 1.0}) == (state, None)


def test_who_imitates_is_not_warned():
    assert Guards.of(Options(), recipe("kd")).drifts == ()
    assert [d.metric for d in Guards.of(Options(), recipe("grpo")).drifts] == ["entropy", "length"]


def test_each_stream_that_is_sampled_is_watched(tmp_path):
    """The metrics that are watched are metrics that are written."""
    source = Mixture(main=OnPolicy(2) >> Score(reward), text=Data())
    made = Recipe(source, Objective(PolicyGradient(Reward(), on="main"), Imitate(on="text")))
    watched = [d.metric for d in Guards.of(Options(), made).drifts]
    assert watched == ["entropy", "length/main"]
    run(made, tmp_path / "run", steps=1)
    assert set(watched) <= lines(tmp_path / "run")[0].keys()


def test_entropy_that_collapses_is_told(tmp_path, capsys):
    """A reward for one letter, and a rate that makes the policy write nothing else."""

    def letter(records: Any, texts: Any) -> list[float]:
        return [float(t.count("1")) - len(t) for t in texts]

    made = recipe("grpo", group_size=8, coefficient=0.0)
    made = replace(made, source=Staged(made.source, Score(letter)))
    run(made, tmp_path / "run", steps=60, batch_size=16, learning_rate=0.03, quiet=False)
    entropy = [m["entropy"] for m in lines(tmp_path / "run")]
    assert sum(entropy[-5:]) / 5 < 0.05 * sum(entropy[:10]) / 10
    (warning,) = [w for w in lines(tmp_path / "run", "warnings.jsonl") if "entropy" in w["message"]]
    assert warning["guard"] == "drift"
    assert capsys.readouterr().err.count("the entropy has collapsed: the mean entropy is") == 1


# ---- two processes ---------------------------------------------------------------------------------------------------

SCRIPT = """
import hashlib, os, sys
from dataclasses import replace
from pathlib import Path
import torch
torch.set_num_threads(1)
from leibler.train import Score
from leibler.train.sources import Staged
from train.conformance import reward
from train.running import recipe, run

class Uneven:
    # The second process alone meets a reward that is no number in draw 1, and NaN in draw 3.
    def __call__(self, rows, context):
        if context.rank == 0:
            return rows
        def by(records, texts):
            return [None if context.draw == 1 and i == 0 else r for i, r in enumerate(reward(records, texts))]
        rows = Score(by)(rows, context)
        if context.draw == 3:
            rows = rows.with_columns(reward=torch.full_like(rows.columns["reward"], float("nan")))
        return rows

made = recipe("grpo", group_size=3)
done = run(replace(made, source=Staged(made.source, Uneven())), Path(sys.argv[1]), steps=5, batch_size=12, save_every=1,
           keep=9)
state = b"".join(p.detach().numpy().tobytes() for p in done.policy.parameters())
print("weights", hashlib.sha256(state).hexdigest(), bool(all(p.isfinite().all() for p in done.policy.parameters())))
"""


@pytest.mark.slow
def test_all_processes_skip_together(tmp_path):
    """NaN in one of two processes skips the step in both; a response set aside in the second is in the file."""
    import sys

    from train.launching import finish, workers

    out, script = tmp_path / "run", tmp_path / "script.py"
    script.write_text(SCRIPT)
    with workers([sys.executable, str(script), str(out)], tmp_path / "said") as both:
        assert finish(both) == [0, 0], [one.text[-2000:] for one in both]
        said = [line for one in both for line in one.text.splitlines() if line.startswith("weights")]
    assert len(said) == 2
    assert said[0] == said[1]
    assert said[0].endswith("True")
    assert [m["step"] for m in lines(out)] == [1, 2, 3, 4, 5]
    assert [w["step"] for w in lines(out, "warnings.jsonl")] == [4]
    saved = [(out / "checkpoints" / f"step-{n:08d}" / "policy.safetensors").read_bytes() for n in (3, 4, 5)]
    assert saved[0] == saved[1] != saved[2]
    assert [a["draw"] for a in lines(out, "set_aside/responses.jsonl")] == [1]
    shares = [out / "guards" / "step-00000004.safetensors", out / "guards" / "process-1" / "step-00000004.safetensors"]
    rows = [read_batch(path)["main"] for path in shares]
    assert [len(r) for r in rows] == [6, 6]
    assert [bool(r.columns["reward"].isnan().all()) for r in rows] == [False, True]
    assert [m["rows"] for m in lines(out)] == [12, 11, 12, 12, 12]
