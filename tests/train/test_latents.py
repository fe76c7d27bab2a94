"""Data with thoughts: how a row is laid out, and what is told about a column that holds none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leibler import recipes
from leibler.data import Dataset, Record
from leibler.errors import DataError, RecipeError
from leibler.objective import Rows
from leibler.policy import CausalLM, character_tokenizer, tiny_llama
from leibler.train import Context, Replay, fit
from leibler.train.latents import Latents, from_column, to_column
from train.running import Stopped, stopped

TOKENIZER = character_tokenizer("0123456789+=[]")
SOURCE = Latents(open="[", close="]")


def model() -> CausalLM:
    return tiny_llama(TOKENIZER, hidden=16, layers=1, heads=2)


def records() -> list[Record]:
    laws = [{"token": [[4, 5], [6]], "weight": [[3, 1], [2.0]]}, {"token": [[9, 8, 7]], "weight": [[0.2, 0.5, 0.3]]}]
    return [
        Record(p, completion=c, extra={"latents": x}) for p, c, x in zip(["1+2=", "7"], ["3", "49"], laws, strict=True)
    ]


def drawn(source: Any, made: list[Record], *, draws: int = 1) -> Rows:
    context = Context(
        {"policy": model()}, {"train": Dataset(tuple(made), "made")}, seed=0, draw=0, step=0, steps=1, rows=2,
        max_new_tokens=8, max_length=32, temperature=1.0,
    )  # fmt: skip
    state = source.init()
    rows = None
    for _ in range(draws):
        found, state = source.draw(context, state)
        rows = found["main"]
    assert rows is not None
    return rows


def test_a_row_is_question_thoughts_and_answer_between_markers():
    rows = drawn(SOURCE, records())
    assert rows.soft is not None
    for row, record in enumerate(rows.records):
        prompt, answer = model().encode_prompt(record.prompt), model().encode_completion(record.completion)
        laws = record.extra["latents"]
        m, s = len(laws["token"]), len(prompt) + 1
        likely = [t[w.index(max(w))] for t, w in zip(laws["token"], laws["weight"], strict=True)]
        assert rows.tokens[row][rows.attention[row]].tolist() == [*prompt, 16, *likely, 17, *answer]
        assert rows.soft.there[row].nonzero()[:, 0].tolist() == list(range(s, s + m))
        for j, (token, weight) in enumerate(zip(laws["token"], laws["weight"], strict=True)):
            found = dict(zip(rows.soft.index[row, s + j].tolist(), rows.soft.weight[row, s + j].tolist(), strict=True))
            for t, w in zip(token, weight, strict=True):
                assert found.pop(t) == pytest.approx(w / sum(weight))
            assert not any(found.values())
        assert rows.mask[row].nonzero()[:, 0].tolist() == list(range(s - 1, s + m + len(answer)))
        assert rows.inside("latent")[row].nonzero()[:, 0].tolist() == list(range(s - 1, s + m - 1))
        assert rows.inside("answer")[row].nonzero()[:, 0].tolist() == list(range(s + m - 1, s + m + len(answer)))


def test_a_buffer_keeps_thoughts():
    fresh, kept = drawn(SOURCE, records()), drawn(Replay(SOURCE, capacity=2), records(), draws=2)
    assert fresh.soft is not None
    assert kept.soft is not None
    assert torch.equal(fresh.soft.weight.sum(-1).sort(0).values, kept.soft.weight.sum(-1).sort(0).values)


def test_what_is_written_is_read_back():
    network = model()
    index = torch.tensor([[4, 5, 6], [9, 3, 8]])
    weight = torch.tensor([[0.5, 0.3, 0.2], [0.9, 0.06, 0.04]])
    soft = from_column(Record("1", extra={"latents": to_column(index, weight, network)}), network)
    assert torch.equal(soft.index[0], index)
    torch.testing.assert_close(soft.weight[0], weight)


@pytest.mark.parametrize(
    ("latents", "what"),
    [
        (None, "no thoughts in the column 'latents'"),
        ([1, 2], "no thoughts"),
        ({"token": [[4]]}, "no thoughts"),
        ({"token": [], "weight": []}, "as many lists of tokens as of weights"),
        ({"token": [[4]], "weight": [[1.0], [1.0]]}, "as many lists"),
        ({"token": [[4, 5]], "weight": [[1.0]]}, "one weight for each"),
        ({"token": [[4, 99]], "weight": [[1.0, 1.0]]}, "outside of the vocabulary of 18"),
        ({"token": [[4, -1]], "weight": [[1.0, 1.0]]}, "outside of the vocabulary"),
        ({"token": [[4, 4]], "weight": [[1.0, 1.0]]}, "a token twice"),
        ({"token": [[4, 5]], "weight": [[1.0, -1.0]]}, "no number of 0 or more"),
        ({"token": [[4, 5]], "weight": [[1.0, "a"]]}, "no number of 0 or more"),
        ({"token": [[4, 5]], "weight": [[0.0, 0.0]]}, "no weight above 0"),
        ({"token": [[4]], "weight": [[1.0]], "likely": ["z"]}, "of another tokenizer"),
    ],
)
def test_a_column_that_holds_no_laws_is_told(latents: Any, what: str):
    with pytest.raises(DataError, match=what) as caught:
        from_column(Record("1", source="a.jsonl:3", extra={"latents": latents}), model())
    assert "a.jsonl:3" in str(caught.value)


def test_text_cannot_be_compared_across_tokenizers_at_thoughts():
    with pytest.raises(RecipeError, match="which only a model of the student's tokenizer"):
        _ = drawn(SOURCE, records()).hard


def test_a_run_goes_on_bit_for_bit(tmp_path: Path):
    def run(out: str, stop: int | None = None, **options: Any) -> Any:
        made = recipes.get("latent-sft", open="[", close="]")
        made = made if stop is None else replace(made, source=stopped(made.source, stop))
        settings = {"batch_size": 4, "learning_rate": 1e-2, "steps": 5, "save_every": 2, "quiet": True}
        return fit(made, student=model(), data=records() * 3, out=tmp_path / out, **settings, **options)

    whole = run("whole")
    with pytest.raises(Stopped):
        run("cut", stop=3)
    again = run("cut", resume=True)
    for a, b in zip(whole.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)
