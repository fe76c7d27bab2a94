"""Trajectories: states of a decoding, near and distant tokens, the privileged view, resuming."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.data import Dataset, Record
from leibler.errors import DataError, RecipeError
from leibler.objective import Objective, Rows
from leibler.policy import character_tokenizer, decode_masked, load, tiny_masked
from leibler.recipes.diffusion import tad
from leibler.train import Context, Recipe, Trajectories, fit
from leibler.train.engine import Engine
from leibler.train.trajectories import partition
from train.conformance import tiny_filling

HINT = "{answer}={prompt}"
RECORDS = [Record(p, completion=c) for p, c in (("1+2=", "3"), ("9=", "9"), ("12+34=", "46"), ("5+5+5=", "15"))]


def context(model: Any, **changes: Any) -> Context:
    given = {"max_new_tokens": 5, "max_length": 64, "rows": 4, "temperature": 1.0, "draw": 0, **changes}
    data = {"train": Dataset(tuple(RECORDS), "made")}
    return Context(models={"policy": model, "initial": model}, data=data, seed=3, step=0, steps=10, **given)


def drawn(source: Trajectories, made: Context) -> tuple[Rows, dict[str, Any]]:
    rows, state = source.draw(made, source.init())
    return rows["main"], state


@given(st.permutations(list(range(6))), st.integers(1, 4), st.integers(0, 6), st.integers(0, 8))
def test_near_and_distant_part_the_masked_positions(order: list[int], commit: int, state: int, delta: int):
    step = torch.tensor([[1 + place // commit for place in order]])
    passes = -(-6 // commit)
    near, distant = partition(step, torch.tensor([state]), delta)
    for i, revealed in enumerate(step[0].tolist()):
        assert bool(near[0, i]) == (state < revealed <= min(state + delta, passes))
        assert bool(distant[0, i]) == (revealed > min(state + delta, passes))
    assert not (near & distant).any()
    assert torch.equal(near | distant, step > state)


@pytest.mark.parametrize("commit", [1, 2])
@pytest.mark.parametrize("hinted", [True, False])
def test_states_are_those_of_the_decoding(commit: int, hinted: bool):
    model = tiny_filling(0)
    source = Trajectories(delta=1, commit=commit, hint=HINT, hinted=hinted)
    rows, _ = drawn(source, context(model, rows=8))
    passes, states = -(-5 // commit), set()
    for i, record in enumerate(rows.records):
        prompt = model.encode_prompt(record.prompt)
        hint = model.encode_prompt(f"{record.completion}={record.prompt}")
        found = decode_masked(model, [hint if hinted else prompt], length=5, commit=commit)
        text, step = found.tokens[0].tolist(), found.step[0].tolist()
        canvas = rows.tokens[i][rows.attention[i]].tolist()[len(prompt) :]
        hidden = [token == model.mask_id for token in canvas]
        state = max([s for s, h in zip(step, hidden, strict=True) if not h], default=0)
        assert hidden == [s > state for s in step]
        assert state < passes
        states.add(state)
        assert [c for c, h in zip(canvas, hidden, strict=True) if not h] == [
            t for t, h in zip(text, hidden, strict=True) if not h
        ]
        assert rows.labels is not None
        assert rows.labels[i][rows.mask[i]].tolist() == [t for t, h in zip(text, hidden, strict=True) if h]
        soon = [s <= state + 1 for s, h in zip(step, hidden, strict=True) if h]
        assert rows.columns["near"][i][rows.mask[i]].tolist() == [float(x) for x in soon]
        assert rows.columns["distant"][i][rows.mask[i]].tolist() == [float(not x) for x in soon]
        view = rows.views["privileged"]
        assert view.tokens[i][view.attention[i]].tolist() == hint + canvas
        assert (view.mask[i].nonzero()[:, 0] - len(hint)).tolist() == (
            rows.mask[i].nonzero()[:, 0] - len(prompt)
        ).tolist()
    assert len(states) > 1


def test_texts_end_where_responses_end(monkeypatch: pytest.MonkeyPatch):
    model = tiny_filling(0)
    source = Trajectories(hint=HINT)
    _, state = drawn(source, context(model))
    stop = int(state["tokens"][:, 1].mode().values)
    monkeypatch.setattr(type(model), "stop_ids", property(lambda self: (stop,)))
    rows, state = drawn(source, context(model))
    found = {r.prompt: t for r, t in zip(rows.records, rows.texts, strict=True)}
    for record, ids in zip(RECORDS, state["tokens"].tolist(), strict=True):
        ended = ids[: ids.index(stop) + 1] if stop in ids else ids
        assert found[record.prompt] == model.decode(ended)
    assert any(stop in ids[:-1] for ids in state["tokens"].tolist())


def test_each_response_is_decoded_once(monkeypatch: pytest.MonkeyPatch):
    model, asked = tiny_filling(0), []

    def counted(of: Any, prompts: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        return decode_masked(of, prompts, **options)

    monkeypatch.setattr("leibler.policy.decode_masked", counted)
    source = Trajectories(hint=HINT)
    made = context(model, rows=3)
    _, state = source.draw(made, source.init())
    before = {name: value.clone() for name, value in state.items() if name != "position"}
    _, later = source.draw(replace(made, draw=1), state)
    assert asked == [3, 1]
    assert all(torch.equal(state[name], value) for name, value in before.items()), "a state is a value"
    source.draw(replace(made, draw=2), later)
    assert asked == [3, 1]


def test_no_number_of_processes_changes_a_draw():
    model = tiny_filling(0)
    source = Trajectories(delta=2, hint=HINT)
    one, alone = drawn(source, context(model))
    halves = [context(model, rank=rank, world=2) for rank in (0, 1)]
    given: list[Any] = []
    for made in halves:  # what each process would give the others
        source.draw(replace(made, gather=lambda item: [given.append(item) or item]), source.init())
    for rank, made in enumerate(halves):
        rows, state = drawn(source, replace(made, gather=lambda item: given))
        assert torch.equal(state["tokens"], alone["tokens"])
        assert torch.equal(state["step"], alone["step"])
        for i, number in enumerate(range(rank, 4, 2)):
            for name in ("near", "distant"):
                assert (
                    rows.columns[name][i][rows.mask[i]].tolist() == one.columns[name][number][one.mask[number]].tolist()
                )
            assert rows.tokens[i][rows.attention[i]].tolist() == one.tokens[number][one.attention[number]].tolist()


@pytest.mark.parametrize(("delta", "empty"), [(0, "near"), (5, "distant"), (99, "distant")])
def test_an_empty_region_is_a_zero_with_a_gradient(delta: int, empty: str):
    model = tiny_filling(0).requires_grad_(True)
    recipe = tad(delta=delta, hint=HINT)
    source: Any = recipe.source
    rows, _ = drawn(source, context(model))
    assert float(rows.columns[empty].sum()) == 0
    engine = Engine(recipe, model, {"policy": model, "initial": model.copy()}, {})
    step = engine.accumulate(engine.annotate({"main": rows}, 0, {}))
    names = {"near": "loss/nll", "distant": "loss/ForwardKL(initial)"}
    other = "distant" if empty == "near" else "near"
    assert step.metrics[names[empty]] == 0.0
    assert step.metrics["loss"] == step.metrics[names[other]] > 0.01
    for parameter in model.parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all()
    # Alone, the empty term leaves a gradient of exactly 0.
    model.zero_grad()
    alone = Recipe(source, Objective(next(t for t in recipe.objective.terms if t.where == empty)), models=recipe.models)
    engine = Engine(alone, model, {"policy": model, "initial": model.copy()}, {})
    assert engine.accumulate(engine.annotate({"main": rows}, 0, {})).metrics["loss"] == 0.0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_mistakes_are_told():
    model = tiny_filling(0)
    with pytest.raises(RecipeError, match=r"delta=-1 must be at least 0"):
        Trajectories(delta=-1)
    with pytest.raises(RecipeError, match=r"commit=0 must be at least 1"):
        Trajectories(commit=0)
    with pytest.raises(RecipeError, match=r"must hold \{answer\}"):
        Trajectories(hint="{prompt}")
    bare = replace(context(model), data={"train": Dataset((Record("1="),), "made")})
    with pytest.raises(DataError, match="has no completion to hint at"):
        Trajectories().draw(bare, Trajectories().init())
    turned = Record("1=", completion="2", source="file:3", extra={"turns": [["3=", "4"]]})
    dialogue = replace(context(model), data={"train": Dataset((turned,), "made")})
    with pytest.raises(DataError, match="file:3 is a dialogue; a masked language model fills in one response"):
        Trajectories(hint=HINT).draw(dialogue, Trajectories().init())
    _, state = drawn(Trajectories(hint=HINT), context(model))
    with pytest.raises(RecipeError, match=r"trajectories of 5 positions for 4 records, not 6 for 4"):
        Trajectories(hint=HINT).draw(context(model, max_new_tokens=6), state)


def test_a_hint_may_hold_braces():
    model = tiny_filling(0)
    record = Record("{answer}1=", completion="{prompt}")
    found = Trajectories(hint=HINT)._privileged(record, context(model))
    assert found == model.encode_prompt("{prompt}={answer}1=")


# ---- runs ------------------------------------------------------------------------------------------------------------


def _student(folder: Path) -> tuple[Path, Path]:
    student = tiny_masked(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2, max_length=64)
    student.save(folder / "student")
    lines = [json.dumps({"prompt": r.prompt, "completion": r.completion}) for r in RECORDS * 4]
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "student", folder / "data.jsonl"


def test_a_resumed_run_is_the_run(tmp_path: Path):
    """Interrupted in the first epoch: some trajectories are made before, some after."""
    student, data = _student(tmp_path)
    options: dict[str, Any] = {
        "student": student,
        "data": data,
        "max_new_tokens": 5,
        "batch_size": 4,
        "save_every": 3,
        "quiet": True,
        "learning_rate": 1e-2,
    }
    recipe = tad(delta=2, hint=HINT)
    whole = fit(recipe, out=tmp_path / "whole", steps=8, **options)
    fit(recipe, out=tmp_path / "cut", steps=3, **options)
    run_file = tmp_path / "cut" / "run.yaml"
    run_file.write_text((tmp_path / "whole" / "run.yaml").read_text().replace("whole", "cut"))
    for path in (tmp_path / "cut" / "final").iterdir():
        path.unlink()
    (tmp_path / "cut" / "final").rmdir()
    resumed = fit(recipe, out=tmp_path / "cut", steps=8, resume=True, **options)
    for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_from_the_command_line_and_after_a_kill(tmp_path: Path):
    student, data = _student(tmp_path)
    command = [sys.executable, "-m", "leibler", "train"]
    shared = [
        f"student={student}",
        f"data={data}",
        f"validation={data}",
        "max_new_tokens=5",
        "batch_size=4",
        "quiet=true",
    ]
    shared += ["save_every=2", "learning_rate=1e-2"]
    run = [*command, "tad", *shared, f"recipe.hint={HINT}", "recipe.delta=2", "steps=12"]
    subprocess.run([*run, f"out={tmp_path / 'whole'}"], check=True, timeout=300)
    killed = subprocess.Popen([*run, f"out={tmp_path / 'killed'}"])
    deadline = time.monotonic() + 240
    while not list((tmp_path / "killed" / "checkpoints").glob("step-*")) and killed.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run([*command, "--resume", str(tmp_path / "killed")], check=True, timeout=300)
    a, b = (load(tmp_path / name / "final") for name in ("whole", "killed"))
    for one, other in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(one, other)
