"""Excerpts, what foretells memorisation, and the answers of models compared."""

from __future__ import annotations

import math
import zlib

import pytest
import torch

from leibler.data import Addition, Record
from leibler.errors import DataError
from leibler.measure.fidelity import fidelity, of_models
from leibler.measure.memorisation import Excerpt, excerpts, foretold, inheritance, predictors
from leibler.policy import character_tokenizer, tiny_llama

TOKENIZER = character_tokenizer("abcdefgh")
MODELS = [tiny_llama(TOKENIZER, hidden=16, layers=1, heads=2, seed=s) for s in (0, 1)]


def test_excerpts_are_cut_by_tokens_and_short_texts_left_out():
    records = [Record("ab", completion="cdefgh"), Record("abc"), Record("", completion="hgfedcba")]
    found = excerpts(MODELS[0], records, prefix=3, suffix=4)
    assert [e.text for e in found] == ["defg", "fedc"]
    begin = MODELS[0].encode_prompt("")
    assert found[1].prefix == (*begin, *MODELS[0].encode_prompt("hg")), "an empty prompt is the begin token"
    with pytest.raises(DataError, match="no text has 20 tokens"):
        excerpts(MODELS[0], [Record("abc")], 10, 10)


def test_predictors_are_those_of_dense_logits():
    texts = ["abcdefgh", "aabbccdd", "hgfedcba"]
    found = predictors(*MODELS, excerpts(MODELS[0], [Record(t) for t in texts], 3, 4), batch_size=2)
    for i, text in enumerate(texts):
        tokens = torch.tensor([MODELS[0].encode_prompt(text[:3]) + MODELS[0].encode_completion(text[3:7])[:-1]])
        with torch.no_grad():
            q, p = (
                m.network(input_ids=tokens).logits[0, -5:-1, : m.vocab_size].double().log_softmax(-1) for m in MODELS
            )
        taken = tokens[0, -4:, None]
        assert found["teacher_nll"][i] == pytest.approx(-float(q.gather(1, taken).mean()), rel=1e-5)
        assert found["baseline_nll"][i] == pytest.approx(-float(p.gather(1, taken).mean()), rel=1e-5)
        assert found["forward_kl"][i] == pytest.approx(float((q.exp() * (q - p)).sum(-1).mean()), rel=1e-4)
        assert found["zlib"][i] == len(zlib.compress(text[3:7].encode(), 9))


def test_what_is_told_by_a_column_is_foretold_and_noise_is_not():
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(200, generator=g).tolist()
    truth = [x > 0.4 for x in torch.randn(200, generator=g).tolist()]
    signal = [2.0 * t + n for t, n in zip(truth, torch.randn(200, generator=g).tolist())]
    assert foretold({"signal": signal, "noise": noise}, truth)[0] > 0.85
    assert 0.35 < foretold({"noise": noise}, truth)[0] < 0.65
    with pytest.raises(DataError, match="too few for 5 folds"):
        foretold({"x": [0.0, 1.0]}, [True, False])


def test_fidelity_of_models_is_that_of_their_greedy_answers():
    task = Addition(digits=1)
    tokenizer = character_tokenizer(task.alphabet)
    one, two = (tiny_llama(tokenizer, hidden=16, layers=1, heads=2, seed=s) for s in (0, 1))
    found = of_models(one, two, one, task.dataset(20), max_new_tokens=3)
    assert found.agreement == found.kappa == 1.0 or math.isnan(found.kappa)
    assert found.error_inheritance == 1.0
    assert found.accuracy == found.teacher_accuracy


def test_kappa_is_0_for_independent_answers_and_edges_are_told():
    g = torch.Generator().manual_seed(0)
    a, b, gold = (torch.randint(4, (20_000,), generator=g).tolist() for _ in range(3))
    assert abs(fidelity(a, b, b, gold).kappa) < 0.02
    assert math.isnan(fidelity([1], [1], [1], [1]).error_inheritance)
    assert math.isnan(fidelity([1], [1], [1], [1]).gap_closed)
    with pytest.raises(DataError, match="cannot be compared"):
        fidelity([], [], [], [])
    with pytest.raises(DataError, match="cannot be compared"):
        inheritance([True], [], [True])
    assert Excerpt((1,), (2,)).text == ""
