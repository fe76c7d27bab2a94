"""Scores of records: judged by dense logits, in the order of the records whatever the batches."""

from __future__ import annotations

import math

import pytest
import torch

from leibler.data import Addition, Dataset, Record
from leibler.errors import DataError
from leibler.measure.scores import pass_rates, read
from leibler.policy import character_tokenizer, tiny_llama

MODEL = tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2, seed=3).to(torch.float64)
RECORDS = [Record(f"{i}+=", completion="123456789"[: 1 + (5 * i) % 7]) for i in range(9)]


def dense(record: Record) -> tuple[float, float]:
    prompt, answer = MODEL.encode_prompt(record.prompt), MODEL.encode_completion(record.completion)
    tokens = torch.tensor([prompt + answer])
    with torch.no_grad():
        law = MODEL.network(input_ids=tokens).logits[0, len(prompt) - 1 : -1, : MODEL.vocab_size].log_softmax(-1)
    nll = -law.gather(1, torch.tensor(answer)[:, None]).mean()
    return float(nll), float(-(law.exp() * law).sum(-1).mean())


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_reading_is_that_of_dense_logits(batch_size):
    seen = []
    found = read(MODEL, RECORDS, batch_size, progress=lambda done, total: seen.append((done, total)))
    for i, record in enumerate(RECORDS):
        nll, entropy = dense(record)
        assert found["nll"][i] == pytest.approx(nll, rel=1e-6)
        assert found["confidence"][i] == pytest.approx(math.exp(-nll), rel=1e-6)
        assert found["uncertainty"][i] == pytest.approx(entropy / math.log(MODEL.vocab_size), rel=1e-6)
    assert seen[-1] == (9, 9)


def test_pass_rates_count_right_answers_and_do_not_depend_on_the_batches():
    data = Addition(digits=1).dataset(5)
    asked: list[str] = []

    def check(record: Record, text: str) -> float:
        asked.append(record.prompt)
        return float(len(text) % 2)

    data = Dataset(data.records, data.name, check)
    model = tiny_llama(character_tokenizer(Addition(digits=1).alphabet), hidden=16, layers=1, heads=2)
    one = pass_rates(model, data, samples=4, max_new_tokens=4, batch_size=4)
    assert [asked.count(r.prompt) for r in data] == [4 * sum(r.prompt == o.prompt for o in data) for r in data]
    assert one == pass_rates(model, data, samples=4, max_new_tokens=4, batch_size=1000)
    assert all(rate * 4 == int(rate * 4) for rate in one)
    assert 0 < sum(one) < 5


def test_mistakes_are_told():
    with pytest.raises(DataError, match="has no 'completion' to score"):
        read(MODEL, [Record("1+")])
    with pytest.raises(DataError, match="has no checker"):
        pass_rates(MODEL, Dataset((Record("1+"),), "plain"))
    with pytest.raises(DataError, match="cannot be told from 0 samples"):
        pass_rates(MODEL, Addition(digits=1).dataset(2), samples=0)


def test_a_dialogue_is_not_scored_as_one_text():
    record = Record("1>", completion="2", extra={"turns": [["3>", "4"]]}, source="talks.jsonl:3")
    with pytest.raises(DataError, match=r"talks\.jsonl:3 is a dialogue of several turns"):
        read(MODEL, [record])
