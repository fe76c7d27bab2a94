from __future__ import annotations

import itertools

import pytest
import torch

from leibler.errors import DataError, ModelError
from leibler.policy import (
    CausalLM,
    character_tokenizer,
    decode,
    logprobs,
    right_pad,
    sample,
    sampler,
    tiny_llama,
    uniforms,
)


def pairs_of(prompts: list[list[int]], samples: sampler.Samples, group: int) -> list[tuple[list[int], list[int]]]:
    return [(prompts[row // group], completion) for row, completion in enumerate(samples.completions())]


def next_law(model: CausalLM, prefix: list[int], temperature: float = 1.0) -> torch.Tensor:
    """The model's law of the next token by Transformers' own forward pass, in float64."""
    with torch.no_grad():
        logits = model.causal(input_ids=torch.tensor([prefix])).logits[0, -1, : model.vocab_size]
    return (logits.double() / temperature).softmax(-1)


def invert(law: torch.Tensor, uniform: float) -> int:
    return min(int((law.cumsum(0) <= uniform).sum()), len(law) - 1)


def reference(law, prompts: list[list[int]], numbers: torch.Tensor, group: int, stop: int = 2):
    """What the sampler should do, token by token and row by row, with no cache and no batch."""
    completions, logps = [], []
    for row, uniform in enumerate(numbers.tolist()):
        prompt, completion, logp = prompts[row // group], [], []
        for number in uniform:
            probabilities = law([*prompt, *completion])
            completion.append(invert(probabilities, number))
            logp.append(probabilities[completion[-1]].log().item())
            if completion[-1] == stop:
                break
        completions.append(completion)
        logps += logp
    return completions, torch.tensor(logps)


def check(samples: sampler.Samples, completions: list[list[int]], logps: torch.Tensor) -> None:
    assert samples.completions() == completions
    torch.testing.assert_close(samples.logp[samples.mask], logps.to(samples.logp.dtype), rtol=1e-5, atol=1e-5)
    assert samples.finished.tolist() == [completion[-1] == 2 for completion in completions]
    assert (samples.logp[~samples.mask] == 0).all()
    assert (samples.tokens[~samples.mask] == 0).all()
    assert samples.tokens.shape[1] == max(map(len, completions))


def eager_to_stop(model: CausalLM, share: float = 0.15) -> CausalLM:
    """The same model with a head that gives the end token about that probability, so that rows stop at many lengths."""
    weight = model.head()[0]
    head = torch.nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_()
        head.weight[2] = 0.0
        typical = (
            torch.randn(256, weight.shape[1], generator=torch.Generator().manual_seed(0)) @ weight.t()
        ).logsumexp(1)
        head.bias[2] = typical.median() + torch.tensor(share).logit()
    model.causal.set_output_embeddings(head)
    return model


# -- the law ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_equals_token_by_token_inversion(any_model: CausalLM, prompts: list[list[int]], temperature: float) -> None:
    numbers = uniforms(1, "test", 0, rows=8, n=10)
    samples = sample(any_model, prompts, uniforms=numbers, group_size=2, temperature=temperature)
    check(samples, *reference(lambda prefix: next_law(any_model, prefix, temperature), prompts, numbers, 2))


def test_frequencies_on_a_grid_are_the_sequence_probabilities() -> None:
    """All sequences of two tokens over five entries: a grid of uniforms gives each its probability."""
    model = tiny_llama(character_tokenizer("a"), hidden=16, layers=1, heads=2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.dim() > 1 else 1)
    points = 60
    axis = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    numbers = torch.cartesian_prod(axis, axis)
    samples = sample(model, [[1, 4]], uniforms=numbers, group_size=points**2)
    drawn = [tuple(completion) for completion in samples.completions()]
    total = 0.0
    first = next_law(model, [1, 4])
    for one in range(5):
        second = next_law(model, [1, 4, one])
        outcomes = [((one,), first[one])] if one == 2 else [((one, two), first[one] * second[two]) for two in range(5)]
        for outcome, probability in outcomes:
            total += probability.item()
            # a step of the grid at each end of an interval, in both directions
            assert abs(drawn.count(outcome) / points**2 - probability.item()) <= 2.5 / points
    assert total == pytest.approx(1.0)
    share = sum(completion[0] == 0 for completion in drawn) / points**2
    assert share == pytest.approx(first[0].item(), abs=1 / points)


def test_mixture_mixes_probabilities(model: CausalLM, tokenizer, prompts: list[list[int]]) -> None:
    other = tiny_llama(tokenizer, hidden=16, layers=1, heads=2, seed=5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)
    numbers = uniforms(2, "test", 0, rows=8, n=8)

    def law(prefix: list[int]) -> torch.Tensor:
        return 0.25 * next_law(model, prefix, 0.8) + 0.75 * next_law(other, prefix, 0.8)

    samples = sample([(model, 0.25), (other, 0.75)], prompts, uniforms=numbers, group_size=2, temperature=0.8)
    check(samples, *reference(law, prompts, numbers, 2))
    alone = sample(model, prompts, uniforms=numbers, group_size=2)
    assert (
        sample([(model, 1.0), (other, 0.0)], prompts, uniforms=numbers, group_size=2).completions()
        == alone.completions()
    )
    assert samples.completions() != alone.completions()


@pytest.mark.parametrize("half", [0, 1])
def test_models_of_a_mixture_may_differ_in_precision(
    half: int, model: CausalLM, tokenizer, prompts: list[list[int]]
) -> None:
    models = [model, tiny_llama(tokenizer, hidden=16, layers=1, heads=2, seed=5)]
    models[half] = models[half].to(torch.bfloat16)
    numbers = uniforms(2, "test", 0, rows=4, n=4)
    samples = sample([(models[0], 0.25), (models[1], 0.75)], prompts, uniforms=numbers)
    assert samples.logp.isfinite().all()
    assert samples.mask.any(1).all()


def test_nucleus_is_part_of_the_behaviour_law(model: CausalLM, prompts: list[list[int]]) -> None:
    numbers = uniforms(3, "test", 0, rows=4, n=8)

    def law(prefix: list[int]) -> torch.Tensor:
        p = next_law(model, prefix)
        order = p.argsort(descending=True)
        keep = order[: 1 + int((p[order].cumsum(0) < 0.7).sum())]
        cut = torch.zeros_like(p)
        cut[keep] = p[keep]
        return cut / cut.sum()

    check(sample(model, prompts, uniforms=numbers, top_p=0.7), *reference(law, prompts, numbers, 1))


def test_padding_rows_of_the_head_are_never_sampled(make_network, tokenizer) -> None:
    padded = make_network("llama", tie_word_embeddings=False)
    with torch.no_grad():
        padded.get_output_embeddings().weight[41:] *= 100.0
    model = CausalLM(padded, tokenizer)
    samples = sample(model, [[5]], uniforms=uniforms(0, "t", 0, 64, 4), group_size=64)
    assert samples.tokens.max() < 41
    tokens, attention, mask = right_pad(pairs_of([[5]], samples, 64))
    torch.testing.assert_close(logprobs(model, tokens, attention, mask), samples.logp[samples.mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behaviour_log_probs_equal_the_training_forward(
    any_model: CausalLM, prompts: list[list[int]], temperature: float
) -> None:
    numbers = uniforms(4, "test", 0, rows=12, n=12)
    samples = sample(any_model, prompts, uniforms=numbers, group_size=3, temperature=temperature)
    tokens, attention, mask = right_pad(pairs_of(prompts, samples, 3), any_model.pad_id)
    again = logprobs(any_model, tokens, attention, mask, temperature=temperature)
    assert again.requires_grad
    torch.testing.assert_close(again, samples.logp[samples.mask], rtol=0, atol=1e-5)


def test_greedy_equals_generate(any_model: CausalLM, prompts: list[list[int]]) -> None:
    samples = sample(any_model, prompts, uniforms=torch.zeros(4, 12, dtype=torch.float64), temperature=0.0)
    for prompt, completion in zip(prompts, samples.completions(), strict=True):
        ids = torch.tensor([prompt])
        theirs = any_model.causal.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=12,
            pad_token_id=0,
            suppress_tokens=list(range(any_model.vocab_size, any_model.vocab_size + 7)),  # padding of the head
        )
        assert completion == theirs[0, len(prompt) :].tolist()
    assert (samples.logp == 0).all()


# -- independence -----------------------------------------------------------------------------------------------------


def test_batch_mates_change_no_draw(any_model: CausalLM, prompts: list[list[int]]) -> None:
    numbers = uniforms(5, "test", 0, rows=8, n=10)
    whole = sample(any_model, prompts, uniforms=numbers, group_size=2)
    for size in (1, 3, 5):
        part = sample(any_model, prompts, uniforms=numbers, group_size=2, max_batch=size)
        assert torch.equal(part.tokens, whole.tokens)
        assert torch.equal(part.mask, whole.mask)
        torch.testing.assert_close(part.logp, whole.logp, rtol=0, atol=1e-5)
    alone = sample(any_model, prompts[2:3], uniforms=numbers[4:6], group_size=2)
    assert alone.completions() == whole.completions()[4:6]
    longer = sample(any_model, prompts, uniforms=uniforms(5, "test", 0, rows=8, n=14), group_size=2)
    assert [completion[:10] for completion in longer.completions()] == whole.completions()


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_dropping_finished_rows_changes_nothing(
    model: CausalLM, prompts: list[list[int]], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = eager_to_stop(model)
    numbers = uniforms(6, "test", 0, rows=32, n=20)
    monkeypatch.setattr(sampler, "_COMPACT_AT", share)
    samples = sample(model, prompts, uniforms=numbers, group_size=8)
    lengths = {len(completion) for completion in samples.completions()}
    assert len(lengths) > 4  # rows do stop at many lengths, or this test would see nothing
    check(samples, *reference(lambda prefix: next_law(model, prefix), prompts, numbers, 8))


def test_finished_rows_leave_the_batch(
    model: CausalLM, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = eager_to_stop(model)
    sizes = []

    def watched(model: CausalLM):
        made = decode.decoder(model)
        for name in ("read", "advance"):
            method = getattr(made, name)
            monkeypatch.setattr(
                made, name, lambda tokens, *rest, method=method: (sizes.append(len(tokens)), method(tokens, *rest))[1]
            )
        return made

    monkeypatch.setattr(sampler, "decoder", watched)
    sample(model, prompts, uniforms=uniforms(6, "test", 0, rows=32, n=20), group_size=8)
    assert sizes[0] == 4  # each prompt is read once
    assert sizes[1] == 32
    assert sizes[1:] == sorted(sizes[1:], reverse=True)
    assert all(small == large or small <= 0.75 * large for large, small in itertools.pairwise(sizes[1:]))
    assert sizes[-1] < 8


def test_equal_prompts_are_read_once(model: CausalLM, prompts: list[list[int]]) -> None:
    numbers = uniforms(7, "test", 0, rows=6, n=6)
    grouped = sample(model, prompts[:2], uniforms=numbers, group_size=3)
    repeated = sample(model, [prompts[0]] * 3 + [prompts[1]] * 3, uniforms=numbers)
    assert torch.equal(grouped.tokens, repeated.tokens)


def test_dropout_is_off_and_the_mode_is_put_back(make_network, tokenizer, prompts: list[list[int]]) -> None:
    model = CausalLM(make_network("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), tokenizer).train()
    numbers = uniforms(8, "test", 0, rows=4, n=8)
    state = torch.get_rng_state()
    trained = sample(model, prompts, uniforms=numbers)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert torch.equal(trained.tokens, sample(model.eval(), prompts, uniforms=numbers).tokens)


def test_samples_can_take_part_in_a_backward_pass(model: CausalLM, prompts: list[list[int]]) -> None:
    samples = sample(model, prompts, uniforms=uniforms(9, "test", 0, rows=4, n=5))
    weight = torch.ones_like(samples.logp, requires_grad=True)
    (weight * samples.logp).sum().backward()  # tensors of inference mode would refuse
    assert torch.equal(weight.grad, samples.logp)


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_mistakes(model: CausalLM, prompts: list[list[int]]) -> None:
    numbers = uniforms(0, "test", 0, rows=4, n=6)
    with pytest.raises(DataError, match="4 prompts times 2 rows"):
        sample(model, prompts, uniforms=numbers, group_size=2)
    with pytest.raises(DataError, match="Prompt 1 is empty"):
        sample(model, [[5], []], uniforms=numbers[:2])
    with pytest.raises(DataError, match="float64 numbers"):
        sample(model, prompts, uniforms=numbers.float())
    with pytest.raises(DataError, match="float64 numbers"):
        sample(model, prompts, uniforms=numbers + 1.0)
    with pytest.raises(DataError, match="temperature"):
        sample(model, prompts, uniforms=numbers, temperature=-1.0)
    with pytest.raises(DataError, match="top_p"):
        sample(model, prompts, uniforms=numbers, top_p=0.0)
    with pytest.raises(DataError, match="max_batch"):
        sample(model, prompts, uniforms=numbers, max_batch=0)
    with pytest.raises(ModelError, match="sum to 1"):
        sample([(model, 0.5), (model, 0.6)], prompts, uniforms=numbers)
    with pytest.raises(ModelError, match="72 tokens exceeds the model's context of 64"):
        sample(model, prompts, uniforms=uniforms(0, "test", 0, rows=4, n=61))
    with pytest.raises(ModelError, match="tokenizers differ"):
        sample([(model, 0.5), (tiny_llama(character_tokenizer("ab")), 0.5)], prompts, uniforms=numbers)


def test_models_without_a_key_value_cache_are_refused(make_network, tokenizer) -> None:
    model = CausalLM(make_network("mamba", state_size=4), tokenizer)
    with pytest.raises(ModelError, match="no key-value cache"):
        sample(model, [[5]], uniforms=uniforms(0, "test", 0, rows=1, n=2))


def test_limits_of_their_own_cut_rows_and_change_no_draw(any_model: CausalLM, prompts: list[list[int]]) -> None:
    numbers = uniforms(2, "limits", 0, rows=2 * len(prompts), n=7)
    whole = sample(any_model, prompts, uniforms=numbers, group_size=2)
    limits = [1 + 2 * i % 7 for i in range(len(prompts))]
    cut = sample(any_model, prompts, uniforms=numbers, group_size=2, limits=limits)
    for i, (long, short) in enumerate(zip(whole.completions(), cut.completions(), strict=True)):
        assert short == long[: limits[i // 2]]
        assert bool(cut.finished[i]) == (bool(whole.finished[i]) and len(long) <= limits[i // 2])
    # A row's own limit counts against the context, not the padding before it.
    room = any_model.context - len(prompts[0])
    two = [prompts[0], prompts[0] * 2]
    sample(any_model, two, uniforms=uniforms(2, "limits", 0, 2, room), limits=[room, room - len(prompts[0])])
    with pytest.raises(ModelError):
        sample(any_model, two, uniforms=uniforms(2, "limits", 0, 2, room), limits=[room, room])
    for wrong in ([1], [0, 1], [1, room + 1]):
        with pytest.raises(DataError, match=f"limits must be 2 numbers from 1 to {room}, one per prompt"):
            sample(any_model, two, uniforms=uniforms(2, "limits", 0, 2, room), limits=wrong)


def test_nothing_to_sample(model: CausalLM) -> None:
    assert sample(model, [], uniforms=torch.zeros(0, 5, dtype=torch.float64)).completions() == []
    assert sample(model, [[5]], uniforms=torch.zeros(1, 0, dtype=torch.float64)).completions() == [[]]


def test_a_row_that_has_its_tokens_asks_for_no_position_beyond_the_context(any_model: CausalLM) -> None:
    """It goes on beside the others until a quarter of the rows is done."""
    room = any_model.context - 2
    prompts = [[1, *[5, 6] * (room // 2)], *[[1, 7]] * 9]
    limits = [any_model.context - len(prompts[0]), *[room] * 9]
    numbers = uniforms(0, "limits", 0, rows=10, n=room)
    found = sample(any_model, prompts, uniforms=numbers, limits=limits)
    alone = sample(any_model, prompts[1:2], uniforms=numbers[1:2])
    assert found.completions()[1] == alone.completions()[0]
    assert len(found.completions()[0]) <= limits[0]
