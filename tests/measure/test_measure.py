from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.errors import DataError
from leibler.measure import (
    Point,
    calibration,
    distinct_answers,
    distinct_n,
    entropy_summary,
    frontier,
    mean_pass_at_k,
    pass_at_k,
    token_calibration,
)


@given(outcomes=st.lists(st.booleans(), min_size=1, max_size=9), data=st.data())
def test_pass_at_k_counts_the_subsets_with_a_right_sample(outcomes, data):
    n = len(outcomes)
    k = data.draw(st.integers(1, n))
    subsets = list(combinations(outcomes, k))
    assert pass_at_k(n, sum(outcomes), k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    n, k, p = 6, 3, 0.3
    weights = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    assert sum(w * pass_at_k(n, c, k) for c, w in enumerate(weights)) == pytest.approx(truth, abs=1e-12)
    assert sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights)) < truth - 0.01


def test_pass_at_k_at_its_ends():
    assert pass_at_k(10, 0, 5) == 0.0
    assert pass_at_k(10, 6, 5) == 1.0
    assert pass_at_k(5000, 1, 2500) == 0.5  # binomials far beyond the largest float
    assert mean_pass_at_k(4, [0, 4], 2) == 0.5
    for n, c, k in ((3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)):
        with pytest.raises(DataError):
            pass_at_k(n, c, k)
    with pytest.raises(DataError, match="no question"):
        mean_pass_at_k(4, [], 1)


@given(
    pairs=st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60),
    bins=st.integers(1, 12),
    binning=st.sampled_from(["width", "mass"]),
)
def test_calibration_agrees_with_its_definition(pairs, bins, binning):
    p, hit = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    found = calibration(p, hit, bins, binning)
    error, seen = 0.0, 0
    for part in found.bins:
        inside = [i for i, x in enumerate(p) if (part.low < x or (part.low == 0 == x)) and x <= part.high]
        assert part.count == len(inside)
        seen += len(inside)
        if inside:
            accuracy = sum(hit[i] for i in inside) / len(inside)
            assert part.accuracy == pytest.approx(accuracy)
            assert part.confidence == pytest.approx(sum(p[i] for i in inside) / len(inside))
            error += len(inside) / len(p) * abs(accuracy - part.confidence)
    assert seen == len(p) == found.count
    assert found.error == pytest.approx(error, abs=1e-12)
    assert found.error <= found.worst + 1e-12
    assert found.bins[0].low == 0.0
    assert found.bins[-1].high == 1.0


def test_calibration_of_known_cases():
    assert calibration([0.8] * 5, [1, 1, 1, 1, 0]).error == pytest.approx(0.0)
    overconfident = calibration([1.0] * 4, [1, 0, 0, 0])
    assert (overconfident.error, overconfident.worst, overconfident.brier) == (0.75, 0.75, 0.75)
    equal_mass = calibration(np.linspace(0.9, 1.0, 100), np.ones(100), bins=4, binning="mass")
    assert [part.count for part in equal_mass.bins] == [25, 25, 25, 25]
    # A model that is sure of what happens as often as it says: the error is only noise.
    generator = np.random.default_rng(0)
    p = generator.random(20_000)
    assert calibration(p, generator.random(20_000) < p).error < 0.02
    assert calibration(p, generator.random(20_000) < p**2).error > 0.1


@pytest.mark.parametrize(
    ("p", "hit", "options", "message"),
    [
        ([0.5], [1, 0], {}, "1 confidences do not fit 2"),
        ([], [], {}, "no confidence to measure"),
        ([1.5], [1], {}, r"outside \[0, 1\]"),
        ([float("nan")], [1], {}, r"outside \[0, 1\]"),
        ([0.5], [1], {"bins": 0}, "0 bins"),
        ([0.5], [1], {"binning": "depth"}, "choose width or mass"),
    ],
)
def test_calibration_refuses(p, hit, options, message):
    with pytest.raises(DataError, match=message):
        calibration(p, hit, **options)


def test_token_calibration_takes_the_most_likely_token():
    torch.manual_seed(0)
    logits, tokens, mask = torch.randn(4, 6, 9), torch.randint(9, (4, 6)), torch.rand(4, 6) < 0.7
    confidence, best = logits.double().softmax(-1).max(-1)
    expected = calibration(confidence[mask], (best == tokens)[mask])
    assert token_calibration(logits, tokens, mask) == expected
    spoiled = logits.clone()
    spoiled[~mask] = float("nan")
    assert token_calibration(spoiled, tokens, mask) == expected
    with pytest.raises(DataError, match="no confidence"):
        token_calibration(logits, tokens, torch.zeros_like(mask))


def test_distinct():
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 3 / 4
    assert distinct_n(["aaaa"], 1) == 1 / 4
    assert distinct_n(["a"], 2) == 0.0
    assert distinct_answers([]) == 0
    assert distinct_answers(["1,000", "1000", "b", "B "]) == 2
    with pytest.raises(DataError):
        distinct_n(["a"], 0)


def test_entropy_summary():
    values = torch.tensor([[0.0, 0.001, 1.0], [2.0, 3.0, 99.0]])
    found = entropy_summary(values, torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert (found.count, found.median, found.top, found.decided) == (5, 1.0, 3.0, 0.4)
    assert found.mean == pytest.approx(1.2002)
    assert found.branching == pytest.approx(math.exp(1.2002))
    for broken in ([float("nan")], [-0.5], [float("inf")], []):
        with pytest.raises(DataError):
            entropy_summary(broken)
    assert entropy_summary(torch.tensor([1.5], dtype=torch.bfloat16)).mean == 1.5


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=20))
def test_the_frontier_is_what_nobody_beats(points):
    found = frontier(points)
    beaten = {(k, r) for k, r in points for k2, r2 in points if (k2 <= k and r2 > r) or (k2 < k and r2 >= r)}
    assert [(p.kl, p.reward) for p in found] == sorted(set(points) - beaten)


def test_a_frontier_keeps_labels_and_refuses_nan():
    assert frontier([Point(1.0, 2.0, "a"), Point(1.0, 2.0, "b")]) == [Point(1.0, 2.0, "a")]
    assert frontier([]) == []
    with pytest.raises(DataError, match="NaN"):
        frontier([(float("nan"), 1.0)])
