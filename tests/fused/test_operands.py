from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from fused.helpers import Entropy, Reverse, Sampled, heads
from leibler.errors import DataError, LeiblerError, ModelError, RecipeError
from leibler.fused import Linear, TargetRows, Want, functionals
from leibler.fused.blocks import CHUNKS, block_rows, chunk_tokens


def test_chunks_fit_the_budget_and_depend_on_shapes_alone() -> None:
    for vocab in (19, 4096, 32768, 151936, 10**6):
        for hidden in (64, 896, 4096):
            for count in (1, 2, 5):
                chunk = chunk_tokens(vocab, hidden, count)
                budget = max(256 * 2**20, 4 * vocab * hidden)
                assert chunk in CHUNKS
                assert chunk == CHUNKS[-1] or count * chunk * vocab * 4 <= budget
                assert chunk == CHUNKS[0] or 2 * chunk * vocab * 4 * count > budget


def test_row_blocks_stay_near_two_megabytes() -> None:
    for vocab in (19, 4096, 32768, 151936):
        assert block_rows(vocab) * vocab * 4 <= 2**21 + 4 * vocab
        assert block_rows(vocab) >= 2
    assert block_rows(10**7) == 2


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda m, t: functionals(m, []), RecipeError, "at least one Want"),
        (lambda m, t: functionals(m, [Want(Reverse)]), RecipeError, "needs a target"),
        (lambda m, t: functionals(m, [Want(Reverse, 1)], [t]), RecipeError, "1 targets"),
        (lambda m, t: functionals(m, [Want(Reverse, -1)], [t]), RecipeError, "target -1"),
        (lambda m, t: TargetRows(()), RecipeError, "at least one leaf"),
        (lambda m, t: TargetRows((m, m)), RecipeError, "combine"),
        (lambda m, t: functionals(m, [Want(Sampled)], token=torch.zeros(22).long()), DataError, "one integer"),
        (lambda m, t: functionals(m, [Want(Sampled)], token=torch.zeros(23)), DataError, "one integer"),
        (lambda m, t: functionals(m, [Want(Sampled)], token=torch.full((23,), -100)), DataError, "-100"),
        (lambda m, t: functionals(m, [Want(Sampled)], token=torch.full((23,), 13)), DataError, "vocabulary of 13"),
        (
            lambda m, t: functionals(m, [Want(Sampled)], token=torch.full((23,), 12), vocab=12),
            DataError,
            "vocabulary of 12",
        ),
        (
            lambda m, t: functionals(m, [Want(Reverse, 0)], [heads(target_vocab=16)[1]]),
            ModelError,
            "13 and 16 vocabulary",
        ),
        (
            lambda m, t: functionals(m, [Want(Reverse, 0)], [TargetRows((replace(m, hidden=m.hidden[1:]),))]),
            ModelError,
            "same tokens",
        ),
        (
            lambda m, t: functionals(Linear(m.hidden.to("meta"), m.weight.to("meta")), [Want(Reverse, 0)], [t]),
            ModelError,
            "different devices",
        ),
        (lambda m, t: Linear(m.hidden, m.weight.to("meta")), ModelError, "different devices"),
    ],
)
def test_mistakes_are_named(
    build: Callable[[Linear, TargetRows], object], error: type[LeiblerError], says: str
) -> None:
    model, target, _ = heads()
    with pytest.raises(error, match=says):
        build(model, target)


def test_integer_tokens_of_any_width_do() -> None:
    model, _, token = heads()
    wants = [Want(Sampled), Want(Entropy)]
    assert torch.equal(functionals(model, wants, token=token), functionals(model, wants, token=token.to(torch.int32)))
