from __future__ import annotations

import pytest
import torch

from leibler.errors import DataError
from leibler.policy import CausalLM, logprobs, right_pad


def test_mask_marks_what_predicts_the_completion() -> None:
    tokens, attention, mask = right_pad([([3, 4], [5]), ([6], [7, 8, 9]), ([1, 2], [])], pad_id=99)
    assert tokens.tolist() == [[3, 4, 5, 99], [6, 7, 8, 9], [1, 2, 99, 99]]
    assert attention.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert tokens[:, 1:][mask].tolist() == [5, 7, 8, 9]
    assert not mask[~attention[:, 1:]].any()


def test_mistakes_are_named() -> None:
    with pytest.raises(DataError, match="at least one row"):
        right_pad([])
    with pytest.raises(DataError, match="Row 1 has an empty prompt"):
        right_pad([([1], [2]), ([], [2])])


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_logprobs_equal_the_models_own(any_model: CausalLM, prompts: list[list[int]], temperature: float) -> None:
    tokens, attention, mask = right_pad([(prompt[:1], prompt[1:]) for prompt in prompts])
    values = logprobs(any_model, tokens, attention, mask, temperature=temperature)
    expected = []
    for prompt in prompts:
        logits = any_model.causal(input_ids=torch.tensor([prompt])).logits[0, :-1, : any_model.vocab_size]
        rows = (logits / temperature).log_softmax(-1)
        expected.append(rows.gather(1, torch.tensor(prompt)[1:, None])[:, 0])
    torch.testing.assert_close(values, torch.cat(expected), rtol=1e-5, atol=1e-5)

    parameters = list(any_model.parameters())
    weight = torch.rand(len(values))
    for mine, theirs in zip(
        torch.autograd.grad((values * weight).sum(), parameters, allow_unused=True),
        torch.autograd.grad((torch.cat(expected) * weight).sum(), parameters, allow_unused=True),
        strict=True,
    ):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_no_event_at_all(model: CausalLM) -> None:
    tokens, attention, mask = right_pad([([5, 6], [])])
    assert logprobs(model, tokens, attention, mask).shape == (0,)
