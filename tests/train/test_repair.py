"""Repaired responses: where they are repaired, what stays, what is sampled anew; nobody else's draw changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leibler.data import Dataset, Record
from leibler.divergence import Divergence, ForwardKL, ReverseKL
from leibler.errors import RecipeError
from leibler.estimate import K2
from leibler.objective import Arithmetic, Imitate, Match, Objective, Old, Policy, Rows, Teacher
from leibler.policy import CausalLM, Samples, logprobs, sample
from leibler.policy.randomness import uniforms
from leibler.train import (
    Adaptive,
    Answer,
    Context,
    Data,
    OnPolicy,
    RaiseOnWorse,
    Recipe,
    Repair,
    Score,
    describe,
    repair,
)
from train.conformance import TEMPERATURE, tiny
from train.running import interrupted, run, stopped, written

PROMPTS = Dataset(tuple(Record(p, answer="1") for p in ("9=", "1+2=", "12+34=", "5+5+5=", "7=", "8+1=")), "prompts")
LONGEST = 6


@pytest.fixture(scope="module")
def models() -> dict[str, CausalLM]:
    return {"policy": tiny(0, loud=5.0), "teacher": tiny(1, padding=3)}


def context(models: Any, **changes: Any) -> Context:
    options: dict[str, Any] = {
        "models": models, "data": {"train": PROMPTS}, "seed": 3, "draw": 0, "step": 0, "steps": 10, "rows": 12,
        "max_new_tokens": LONGEST, "max_length": 64, "temperature": TEMPERATURE,
    }  # fmt: skip
    return Context(**{**options, **changes})


def draw(source: Any, models: Any, **changes: Any) -> Rows:
    here = context(models, **changes)
    return source.draw(here, source.init())[0]["main"]


def parts(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each row."""
    out = []
    for i in range(len(rows)):
        tokens = rows.tokens[i][rows.attention[i]].tolist()
        cut = len(tokens) - int(rows.mask[i].sum())
        out.append((tokens[:cut], tokens[cut:]))
    return out


def dense(model: CausalLM, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities of the next token after each token, in float64."""
    with torch.no_grad():
        logits = model.network(input_ids=torch.tensor([tokens])).logits[0, :, : model.vocab_size]
    return (logits.double() / TEMPERATURE).log_softmax(-1)


def worst(models: Any, prompt: list[int], response: list[int], reverse: bool = False) -> tuple[int, int] | None:
    """The place and the right token, by plain loops."""
    p, q = (dense(models[name], prompt + response) for name in ("policy", "teacher"))
    found = None
    most = -1.0
    for i, token in enumerate(response):
        at = len(prompt) + i - 1
        right = int(q[at].argmax())
        a, b = (p[at], q[at]) if reverse else (q[at], p[at])
        d = float((a.exp() * (a - b)).sum())
        if token != right and d > most:
            most, found = d, (i, right)
    return found


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL()])
@pytest.mark.parametrize("group_size", [1, 3])
def test_the_worst_disagreement_is_repaired_and_the_rest_sampled_anew(models, group_size: int, divergence: Divergence):
    inner = OnPolicy(group_size=group_size)
    raw, made = draw(inner, models), draw(Repair(inner, divergence=divergence), models)
    assert torch.equal(raw.group, made.group)
    eos = models["policy"].tokenizer.eos_token_id
    repaired = 0
    for i, ((prompt, before), (same, after)) in enumerate(zip(parts(raw), parts(made), strict=True)):
        assert prompt == same
        marks = made.columns["repaired"][i][made.mask[i]].tolist()
        found = worst(models, prompt, before, reverse=divergence == ReverseKL())
        if found is None:
            assert after == before
            assert marks == [0.0] * len(after)
            continue
        repaired += 1
        j, right = found
        assert after[: j + 1] == [*before[:j], right]
        assert marks == [float(k == j) for k in range(len(after))]
        numbers = uniforms(3, "repair/0", 0, rows=1, n=LONGEST, first_row=i)
        left = LONGEST - j - 1
        rest: list[int] = []
        if right != eos and left:
            begun = prompt + after[: j + 1]
            drawn = sample(models["policy"], [begun], uniforms=numbers[:, :left], temperature=TEMPERATURE)
            rest = drawn.completions()[0]
        assert after[j + 1 :] == rest
        assert bool(made.columns["finished"][i]) == (after[-1] == eos)
        assert made.texts[i] == models["policy"].decode(after)
    assert repaired > len(raw) // 2


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), group_size=st.sampled_from([1, 2]), times=st.integers(1, 3))
def test_invariants(models, seed: int, group_size: int, times: int):
    inner = OnPolicy(group_size=group_size)
    raw, made = draw(inner, models, seed=seed), draw(Repair(inner, times=times), models, seed=seed)
    eos = models["policy"].tokenizer.eos_token_id
    assert [r.prompt for r in made.records] == [r.prompt for r in raw.records]
    for i, ((prompt, before), (same, after)) in enumerate(zip(parts(raw), parts(made), strict=True)):
        marks = made.columns["repaired"][i][made.mask[i]].tolist()
        assert prompt == same
        assert 1 <= len(after) <= LONGEST
        assert eos not in after[:-1]
        assert len(after) == LONGEST or after[-1] == eos
        first = marks.index(1.0) if 1.0 in marks else len(after)
        assert after[:first] == before[:first]
        law = dense(models["teacher"], prompt + after)
        for j, mark in enumerate(marks):
            if mark:
                assert after[j] == int(law[len(prompt) + j - 1].argmax())
    assert float(made.columns["repaired"].sum(1).max()) <= times


def test_two_repairs_are_one_after_the_other(models):
    once, twice = draw(Repair(), models), draw(Repair(times=2), models)
    changed = 0
    for i, ((prompt, before), (_, after)) in enumerate(zip(parts(once), parts(twice), strict=True)):
        found = worst(models, prompt, before)
        if found is None:
            assert after == before
        else:
            j, right = found
            assert after[: j + 1] == [*before[:j], right]
            if after[j + 1 :]:
                # Other numbers than those of the first repair.
                numbers = uniforms(3, "repair/1", 0, rows=1, n=LONGEST - j - 1, first_row=i)
                drawn = sample(models["policy"], [prompt + after[: j + 1]], uniforms=numbers, temperature=TEMPERATURE)
                assert after[j + 1 :] == drawn.completions()[0]
                changed += 1
    assert changed


def test_without_a_disagreement_nothing_changes(models):
    greedy = OnPolicy(temperature=0.0, group_size=2)
    agreed = {**models, "teacher": models["policy"]}
    raw, made = draw(greedy, agreed), draw(Repair(greedy), agreed)
    assert parts(raw) == parts(made)
    assert not made.columns["repaired"].any()
    assert torch.equal(raw.columns["finished"], made.columns["finished"])
    # And the law that repairs may be an expression: half the policy's own greedy choice is still agreement.
    mixed = Repair(greedy, by=Arithmetic({Old(): 0.5, Teacher(): 0.5}))
    assert parts(draw(mixed, agreed)) == parts(raw)


def test_what_the_teacher_ends_is_ended(models):
    """A teacher that always ends: every repaired row ends at its repair."""
    ending: Any = tiny(1)
    eos = ending.tokenizer.eos_token_id
    with torch.no_grad():
        weight, _ = ending.head()
        # The law of the end of text is the largest whatever the context: the head reads only a constant direction.
        weight.zero_()
        ending.causal.base_model.norm.weight.zero_()
    bias = torch.zeros(weight.shape[0], dtype=weight.dtype)
    bias[eos] = 4.0
    ending.gaps = bias
    made = draw(Repair(), {**models, "teacher": ending})
    raw = draw(OnPolicy(), models)
    shorter = 0
    for (_, before), (_, after) in zip(parts(raw), parts(made), strict=True):
        assert after[-1] == eos
        shorter += len(after) < len(before)
    assert shorter > len(raw) // 2
    assert made.columns["finished"].all()


def test_a_repaired_row_fits_where_the_raw_one_did(models):
    """The longest prompt's row just fits the context; a shorter one repaired late beside it asks for no more."""
    long = Dataset((Record("1+" * 28 + "1="), Record("9="), Record("7=")), "long")
    longest = max(len(models["policy"].encode_prompt(r.prompt)) for r in long)
    room = models["policy"].context - longest
    made = draw(Repair(), models, data={"train": long}, rows=3, max_new_tokens=room)
    assert max(len(p) + len(r) for p, r in parts(made)) <= models["policy"].context
    assert made.columns["repaired"].any()


def test_another_engine_samples_the_rest_too(models):
    class Elsewhere:
        def __init__(self) -> None:
            self.calls: list[Any] = []

        def follow(self, model: CausalLM, version: int) -> None: ...

        def sample(self, model: CausalLM, prompts: Any, *, seeds: Any, max_new_tokens: int, **options: Any) -> Samples:
            self.calls.append((len(prompts), options["limits"], seeds))
            table = torch.cat([uniforms(s, "there", 0, options["group_size"], max_new_tokens) for s in seeds])
            return sample(model, prompts, uniforms=table, **options)

    there: Any = Elsewhere()
    made = draw(Repair(), models, rollouts=there)
    assert [limits is None for _, limits, _ in there.calls] == [True, False]
    assert len(set(there.calls[1][2]) | set(there.calls[0][2])) == there.calls[0][0] + there.calls[1][0]
    assert max(len(r) for _, r in parts(made)) <= LONGEST


@pytest.mark.parametrize("group_size", [1, 2])
def test_two_processes_draw_what_one_does(models, group_size: int):
    source = Repair(OnPolicy(group_size=group_size), times=2)
    alone = parts(draw(source, models, rows=5 * group_size))
    shares = [parts(draw(source, models, rows=5 * group_size, rank=rank, world=2)) for rank in (0, 1)]
    together: list[Any] = [None] * len(alone)
    for rank, share in enumerate(shares):
        for i, row in enumerate(share):
            together[(rank + i // group_size * 2) * group_size + i % group_size] = row
    assert together == alone
    empty = draw(source, models, rows=group_size, rank=1, world=2)
    assert len(empty) == 0
    assert set(empty.columns) == {"finished", "repaired"}


def test_how_many_rows_are_read_at_once_changes_nothing(models, monkeypatch):
    whole = parts(draw(Repair(OnPolicy(group_size=2)), models))
    monkeypatch.setattr(repair, "_TOKENS", 1)
    assert parts(draw(Repair(OnPolicy(group_size=2)), models)) == whole


def test_the_teacher_likes_repaired_responses_better(models):
    def liked(rows: Rows) -> float:
        with torch.no_grad():
            found = logprobs(models["teacher"], rows.tokens, rows.attention, rows.mask, temperature=TEMPERATURE)
        return float(found.mean())

    raw, once, often = (
        [liked(draw(source, models, draw=k, rows=24)) for k in range(4)]
        for source in (OnPolicy(), Repair(), Repair(times=3))
    )
    assert all(b > a for a, b in zip(raw, once, strict=True))
    assert sum(often) > sum(once)


def test_only_exact_divergences_are_matched_on_it():
    Recipe(Repair(), Objective(Match(ForwardKL(), to=Teacher())))
    for source in (Repair(), Adaptive(Data(), Repair())):
        with pytest.raises(RecipeError, match="its stream 'main' holds responses of no single law; use Exact") as found:
            Recipe(source, Objective(Match(ReverseKL(), to=Teacher(), estimator=K2())))
        assert str(found.value).count(".") == 1


def test_what_cannot_be_repaired():
    with pytest.raises(RecipeError, match="Data does not sample"):
        Repair(Data())  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="Staged does not sample; give it OnPolicy"):
        Repair(OnPolicy() >> Score(Answer()))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="times=0 must be at least 1"):
        Repair(times=0)


def test_stages_and_terms_behind_it(models):
    made = draw(Repair(OnPolicy(group_size=2)) >> Score(lambda records, texts: [len(t) for t in texts]), models)
    assert made.columns["reward"].tolist() == [float(len(t)) for t in made.texts]
    recipe = Recipe(Repair(), Objective(Imitate(where="repaired")))
    assert "Repair(" in describe(recipe)
    assert {h.name for h in recipe.handles()} == {"policy", "old", "teacher"}
    assert Repair(by=Policy()).handles() == (Old(), Policy())


def test_a_run_goes_on_bit_for_bit(tmp_path: Path):
    def always(stop: int | None) -> Recipe:
        source = Repair(OnPolicy(group_size=2), times=2)
        return Recipe(source if stop is None else stopped(source, stop), Objective(Match(ForwardKL(), to=Teacher())))

    run(always(None), tmp_path / "whole", save_every=2)
    interrupted(always, tmp_path / "cut", 3, save_every=2)
    assert written(tmp_path / "whole") == written(tmp_path / "cut")


def test_beside_data_in_an_adaptive_source(tmp_path: Path):
    source = Adaptive(Data(), Repair(OnPolicy(group_size=2)), RaiseOnWorse(initial=1.0), capacity=16)
    made = Recipe(source, Objective(Match(ForwardKL(), to=Teacher())))
    found = run(made, tmp_path / "run", steps=12, validation=[{"prompt": "1+1=", "completion": "2"}])
    assert found.metrics["loss"] > 0
