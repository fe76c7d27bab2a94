"""Effective compression and parallelism, against plain loops and closed forms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leibler.data import Dataset, Record, load
from leibler.errors import DataError
from leibler.measure.latent import (
    effective_compression,
    effective_paths,
    evaluate_latent,
    greedy_matching,
    parallelism,
)
from leibler.policy import character_tokenizer, tiny_llama

EYE = torch.eye(8, dtype=torch.float64)


@given(st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_the_number_of_paths_lies_between_one_and_all(scores: list[float]):
    found = effective_paths(torch.tensor(scores))
    assert 1 - 1e-9 <= found <= len(scores) + 1e-9
    assert effective_paths(torch.full((len(scores),), scores[0])) == pytest.approx(len(scores), rel=1e-9)


def test_the_number_of_paths_is_the_perplexity_of_the_posterior():
    scores = torch.tensor([0.3, -1.2, 0.9])
    p = [math.exp(s) for s in scores.tolist()]
    p = [x / sum(p) for x in p]
    assert effective_paths(scores) == pytest.approx(math.exp(-sum(x * math.log(x) for x in p)), rel=1e-6)
    assert effective_paths(torch.tensor([0.0, -math.inf])) == pytest.approx(1.0)


def test_pairs_are_taken_most_similar_first_and_used_once():
    alike = torch.tensor([[0.9, 0.95, 0.1], [0.2, 0.94, 0.3]])
    assert greedy_matching(alike) == [(0, 1), (1, 2)]
    assert greedy_matching(alike.T) == [(1, 0), (2, 1)]


def law(*weights: float) -> torch.Tensor:
    return torch.tensor([weights], dtype=torch.float64)


def test_a_score_is_the_mean_log_mass_on_the_matched_segments():
    index = torch.tensor([[0, 1, 2], [3, 4, 5]])
    weight = torch.cat([law(0.6, 0.3, 0.1), law(0.2, 0.3, 0.5)])
    solutions = [[[0], [5]], [[1, 2], [3, 4]], [[7]]]
    found = parallelism(index, weight, solutions, EYE)
    expected = [math.log(0.6 * 0.5) / 2, math.log(0.4 * 0.5) / 2, math.log(1e-9)]
    assert found.scores == pytest.approx(expected, rel=1e-9)
    assert found.paths == pytest.approx(effective_paths(torch.tensor(expected)), rel=1e-6)
    # Only the two most likely entries of each law count.
    few = parallelism(index, weight, solutions, EYE, top_k=2)
    assert few.scores[:2] == pytest.approx([math.log(0.6 * 0.5) / 2, math.log(0.3 * 0.3) / 2], rel=1e-9)


def test_matching_by_similarity_finds_what_random_matching_does_not():
    """Each of two solutions in order against thoughts that hold both: two paths; at random, some are lost."""
    index = torch.tensor([[0, 1], [2, 3], [4, 5]])
    weight = torch.full((3, 2), 0.5, dtype=torch.float64)
    both = [[[0], [2], [4]], [[1], [3], [5]]]
    found = parallelism(index, weight, both, EYE, trials=200)
    assert found.paths == pytest.approx(2.0)
    assert found.random < 1.9
    assert found.ratio == pytest.approx(found.paths / found.random)
    sure = parallelism(index, torch.tensor([[1.0, 0.0]] * 3), both, EYE)
    assert sure.paths < 1.01
    again = parallelism(index, weight, both, EYE, trials=200)
    assert again.random == found.random


def test_compression_is_of_all_questions_together():
    assert effective_compression([10, 2], [2, 1]) == pytest.approx(4.0)
    with pytest.raises(DataError, match="some thought"):
        effective_compression([10], [0])
    with pytest.raises(DataError):
        effective_compression([10], [1, 2])


def test_a_model_is_measured_by_what_the_data_says():
    model = tiny_llama(character_tokenizer("0123456789+=[]"), hidden=16, layers=1, heads=2)
    rows = [
        {"prompt": f"{i}=", "answer": str(i), "reasoning": "1+1+1", "paths": [["1", "+"], ["2", "3"]]} for i in range(5)
    ]
    options = {"max_latent": 3, "max_new_tokens": 2, "open": "[", "close": "]", "batch_size": 2}
    seen: list[tuple[int, int]] = []
    found = evaluate_latent(model, load(rows), progress=lambda *done: seen.append(done), **options)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert found["questions"] == 5
    assert found["compression"] == pytest.approx(5 / found["thoughts"])
    assert 1 <= found["paths"] <= 2
    assert 0 <= found["accuracy"] <= 1
    half = replace(load(rows), check=lambda record, text: 0.5)
    assert evaluate_latent(model, half, **options)["accuracy"] == 0.0  # right is what the checker gives 1
    with pytest.raises(DataError, match="none is empty"):
        evaluate_latent(model, Dataset((), "none"), **options)
    plain = evaluate_latent(model, load([Record("1=")]), **options)
    assert set(plain) == {"questions", "thoughts", "closed"}
    with pytest.raises(DataError, match="alternative solutions"):
        evaluate_latent(model, load([{"prompt": "1=", "paths": "1+1"}]), **options)


def test_mistakes_are_told():
    with pytest.raises(DataError, match="at least one thought"):
        parallelism(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2), [[[1]]], EYE)
    with pytest.raises(DataError, match="not empty"):
        parallelism(torch.tensor([[1]]), torch.tensor([[1.0]]), [[[]]], EYE)
