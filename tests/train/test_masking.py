"""Masked rows: what is masked, its weight, which models may read it, held-out numbers."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from leibler.data import Dataset, Record
from leibler.divergence import ForwardKL
from leibler.errors import DataError, ModelError, RecipeError
from leibler.objective import Column, Imitate, Match, Objective, SoftTokens, Teacher
from leibler.objective.reduce import SequenceMean
from leibler.policy import MaskedLM, uniforms
from leibler.recipes.diffusion import llada, tad
from leibler.train import Context, Data, Masked, Mixture, OnPolicy, Recipe, Replay, fit
from leibler.train.engine import Engine
from leibler.train.masking import random_masks, reads_masked, validate_masked
from train.conformance import tiny, tiny_filling

RECORDS = [Record(p, completion=c) for p, c in (("1+2=", "3"), ("9=", "9"), ("12+34=", "46"), ("5+5+5=", "15"))]


def context(model: Any, records: list[Record] | None = None, **changes: Any) -> Context:
    given = {"max_new_tokens": 4, "max_length": 64, "rows": 4, "temperature": 1.0, "draw": 0, **changes}
    data = {"train": Dataset(tuple(records or RECORDS), "made")}
    return Context(models={"policy": model, "initial": model}, data=data, seed=3, step=0, steps=10, **given)


def test_a_random_part_is_masked_and_labelled():
    model = tiny_filling(0)
    rows = Masked(Data()).draw(context(model), {})[0]["main"]
    plain = Data().draw(context(model), {})[0]["main"]
    for i in range(4):
        truth = plain.tokens[i][plain.attention[i]].tolist()
        start = int(plain.mask[i].nonzero()[0]) + 1
        truth += [model.eos_id] * (start + 4 - len(truth))
        seen = rows.tokens[i][rows.attention[i]].tolist()
        hidden = [k for k in range(len(truth)) if seen[k] == model.mask_id]
        assert hidden
        assert min(hidden) >= start
        assert [s for k, s in enumerate(seen) if k not in hidden] == [t for k, t in enumerate(truth) if k not in hidden]
        assert (rows.mask[i].nonzero()[:, 0] + 1).tolist() == hidden
        assert rows.labels is not None
        assert rows.labels[i][rows.mask[i]].tolist() == [truth[k] for k in hidden]
        assert rows.columns["inverse_share"][i].item() == pytest.approx(4 / len(hidden))


def test_what_is_known_of_whole_rows_stays():
    """A muted row that was heard again would be learned; thoughts that were lost would be learned as words."""

    class Known(Data):
        def draw(self, context: Context, state: dict[str, Any]) -> Any:
            drawn, state = super().draw(context, state)
            rows = drawn["main"].with_columns(reward=torch.arange(4.0), credit=torch.ones(drawn["main"].mask.shape))
            return {"main": replace(rows, muted=torch.tensor([True, False, False, True]))}, state

    class Thinking(Data):
        def draw(self, context: Context, state: dict[str, Any]) -> Any:
            drawn, state = super().draw(context, state)
            shape = (*drawn["main"].tokens.shape, 1)
            soft = SoftTokens(torch.zeros(shape, dtype=torch.long), torch.zeros(shape))
            return {"main": replace(drawn["main"], soft=soft)}, state

    rows = Masked(Known()).draw(context(tiny_filling(0)), {})[0]["main"]
    assert rows.muted is not None
    assert rows.muted.tolist() == [True, False, False, True]
    assert rows.columns["reward"].tolist() == [0, 1, 2, 3]
    assert set(rows.columns) == {"reward", "inverse_share"}  # numbers of other positions would be wrong ones
    with pytest.raises(RecipeError, match="soft tokens"):
        Masked(Thinking()).draw(context(tiny_filling(0)), {})


def test_every_count_is_equally_likely_and_every_choice_of_as_many():
    n, draws = 3, 12_000
    hide, share = random_masks(uniforms(0, "mask", 0, draws, n + 1))
    assert torch.equal(hide.sum(1), (share * n).round().long())
    for bits in itertools.product([False, True], repeat=n):
        m = sum(bits)
        expected = 0.0 if m == 0 else 1 / n / math.comb(n, m)
        found = float((hide == torch.tensor(bits)).all(1).double().mean())
        assert abs(found - expected) <= 4.5 * math.sqrt(expected * (1 - expected) / draws), bits


@torch.no_grad()
def _by_orders(model: MaskedLM, prompt: list[int], answer: list[int]) -> float:
    """The mean over all orders of revealing of -log p(answer in that order)."""
    total, orders = 0.0, list(itertools.permutations(range(len(answer))))
    for order in orders:
        row = [model.mask_id] * len(answer)
        for k in order:
            logits = model.pretrained(input_ids=torch.tensor([prompt + row])).logits[0, len(prompt) + k]
            logits = logits[: model.vocab_size].clone()
            logits[model.mask_id] = -torch.inf
            total -= float(logits.log_softmax(-1)[answer[k]])
            row[k] = answer[k]
    return total / len(orders)


def _weighted_mean(model: MaskedLM, recipe: Recipe, n: int) -> float:
    """The loss of the recipe, averaged over every mask with its probability."""
    record, total = RECORDS[2], 0.0
    for bits in itertools.product([False, True], repeat=n):
        m = sum(bits)
        if not m:
            continue
        # Uniform numbers that choose exactly this mask.
        numbers = [(m - 0.5) / n, *(0.25 if bit else 0.75 for bit in bits)]
        hide, _ = random_masks(torch.tensor([numbers], dtype=torch.float64))
        assert hide[0].tolist() == list(bits)
        inner: Any = recipe.source
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("leibler.policy.randomness.uniforms", lambda *a, k=numbers, **o: torch.tensor([k]).double())
            drawn = inner.draw(context(model, [record], rows=1, max_new_tokens=n), {})[0]
        engine = Engine(recipe, model, {"policy": model}, {})
        step = engine.accumulate(engine.annotate(drawn, 0, {}))
        total += step.metrics["loss"] / n / math.comb(n, m)
    return total


def test_the_loss_averages_to_the_mean_over_orders():
    model = tiny_filling(1)
    prompt, answer = model.encode_prompt("12+34="), model.encode_completion("46")
    expected = _by_orders(model, prompt, answer)
    assert _weighted_mean(model, llada(), 3) == pytest.approx(expected, rel=1e-6)
    plain = Recipe(Masked(Data()), Objective(Imitate(reduce=SequenceMean("sum"))))
    assert _weighted_mean(model, plain, 3) < 0.95 * expected
    other = Recipe(Masked(Data()), Objective(Imitate(weight=Column("inverse_share"))))
    assert abs(_weighted_mean(model, other, 3) - expected) > 0.05 * expected


def test_no_number_of_processes_changes_what_is_masked():
    model = tiny_filling(0)
    one = Masked(Data()).draw(context(model), {})[0]["main"]
    for rank in (0, 1):
        part = Masked(Data()).draw(context(model, rank=rank, world=2), {})[0]["main"]
        for i, number in enumerate(range(rank, 4, 2)):
            assert part.tokens[i][part.attention[i]].tolist() == one.tokens[number][one.attention[number]].tolist()
    other = Masked(Data()).draw(context(model, draw=1), {})[0]["main"]
    assert not torch.equal(other.mask.sum(1), one.mask.sum(1)) or not torch.equal(other.mask, one.mask)
    many = [Record("1=", completion="1")] * 2
    none = Masked(Data()).draw(context(model, many, rows=2, rank=2, world=3), {})[0]["main"]
    assert len(none) == 0


def test_pairs_are_masked_apart():
    model = tiny_filling(0)
    pairs = [Record("1+2=", chosen="3", rejected="4", completion="3")] * 2
    rows = Masked(Data()).draw(context(model, pairs), {})[0]["main"]
    assert len(rows) == 4
    assert rows.role.tolist() == [1, 2, 1, 2]
    assert len({tuple(row) for row in rows.mask.int().tolist()}) > 1


def test_what_does_not_fit_is_told():
    model = tiny_filling(0)
    with pytest.raises(DataError, match=r"3 tokens is longer than the 2 positions .* max_new_tokens to at least 3"):
        Masked(Data()).draw(context(model, max_new_tokens=2), {})
    with pytest.raises(DataError, match="more than the model's context of 9"):
        Masked(Data()).draw(context(model, max_length=9), {})
    with pytest.raises(RecipeError, match="Masked takes responses that are given"):
        Masked(OnPolicy())
    with pytest.raises(RecipeError, match="length=0 must be at least 1"):
        Masked(Data(), length=0)


def test_rows_of_both_kinds_are_refused():
    assert reads_masked(Masked(Data()))
    assert not reads_masked(Replay(OnPolicy()))
    assert reads_masked(Mixture(a=Masked(Data()), b=Replay(Masked(Data(rows=2)))))
    assert reads_masked(tad().source)
    with pytest.raises(RecipeError, match=r"some of the recipe's rows are masked and others are not"):
        reads_masked(Mixture(a=Masked(Data()), b=Data()))


def test_a_model_of_the_wrong_kind_is_refused(tmp_path: Any):
    records = [{"prompt": r.prompt, "completion": r.completion} for r in RECORDS]
    options: dict[str, Any] = {"data": records, "steps": 1, "max_new_tokens": 4, "quiet": True}
    filling, reading = tiny_filling(0).float(), tiny(0).float()
    with pytest.raises(ModelError, match=r"student \(LlamaForCausalLM\) reads from left to right.*give a masked"):
        fit("llada", student=reading, out=tmp_path / "a", **options)
    with pytest.raises(ModelError, match=r"student \(BertForMaskedLM\) fills in masked positions.*Masked\(Data\(\)\)"):
        fit("sft", student=filling, out=tmp_path / "b", **options)
    other = tiny(1, tokenizer=filling.tokenizer).float()
    recipe = Recipe(Masked(Data()), Objective(Match(ForwardKL(), to=Teacher())))
    with pytest.raises(ModelError, match=r"model 'teacher' \(LlamaForCausalLM\) reads from left to right"):
        fit(recipe, student=filling, teacher=other, out=tmp_path / "c", **options)
    with pytest.raises(ModelError, match=r"models\.initial is not used by this recipe"):
        fit(tad(), student=filling, models={"initial": other}, out=tmp_path / "d", **options)


def test_validation_is_the_same_at_every_call_and_counts_masks():
    model = tiny_filling(0)
    data = replace(Dataset(tuple(RECORDS), "made"), check=lambda record, text: float(text == record.completion))
    first = validate_masked(model, data, temperature=1.0, max_new_tokens=4)
    assert first == validate_masked(model, data, temperature=1.0, max_new_tokens=4)
    assert set(first) == {"nll_bound", "entropy", "accuracy"}
    one = validate_masked(
        model, replace(data, records=data.records[2:3]), temperature=1.0, max_new_tokens=3, draws=4000
    )
    prompt, answer = model.encode_prompt("12+34="), model.encode_completion("46")
    assert one["nll_bound"] * 3 == pytest.approx(_by_orders(model, prompt, answer), rel=0.05)
    without = validate_masked(model, replace(data, check=None), temperature=1.0, max_new_tokens=1)
    assert without == {}  # no completion fits, and there is no checker
