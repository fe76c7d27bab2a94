"""Soft tokens: what models read at them, how they travel with their rows, and the law they are as a target."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from leibler.divergence import ForwardKL
from leibler.errors import RecipeError
from leibler.fused import Linear, Want, functionals
from leibler.objective import Match, Rows, Soft, SoftTokens, concatenate
from leibler.objective.soft import _others
from leibler.policy import CausalLM, character_tokenizer, tiny_llama
from leibler.train.stored import written

TOKENIZER = character_tokenizer("0123456789+=")


def model(tie: bool = True) -> CausalLM:
    network = tiny_llama(TOKENIZER, hidden=16, layers=2, heads=2, tie=tie, seed=3).double().requires_grad_(True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return network


def laws(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)


def entries(*shape: int, seed: int = 0) -> Tensor:
    """Distinct entries of the vocabulary in the last dimension."""
    noise = torch.rand(*shape[:-1], len(TOKENIZER), generator=torch.Generator().manual_seed(seed))
    return noise.argsort(-1)[..., : shape[-1]]


def rows(soft: SoftTokens | None, tokens: Tensor, start: int = 2) -> Rows:
    batch, length = tokens.shape
    mask = torch.zeros(batch, length - 1, dtype=torch.bool)
    mask[:, start:] = True
    numbers = torch.arange(batch)
    return Rows(tokens, torch.ones_like(tokens, dtype=torch.bool), mask, numbers, torch.zeros_like(numbers), soft=soft)


def soft_at(places: list[tuple[int, int]], batch: int, length: int, k: int = 3, seed: int = 0) -> SoftTokens:
    weight = torch.zeros(batch, length, k, dtype=torch.float64)
    for number, place in enumerate(places):
        weight[place] = laws(k, seed=seed + number)
    return SoftTokens(entries(batch, length, k, seed=seed), weight)


@pytest.mark.parametrize("tie", [True, False])
def test_one_hot_laws_are_ordinary_tokens_bit_for_bit(tie: bool):
    network = model(tie)
    tokens = entries(2, 7)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    weight = torch.zeros(2, 7, 3, dtype=torch.float64)
    weight[:, 2:5, 0] = 1.0
    index = torch.cat([tokens[..., None], (tokens[..., None] + torch.tensor([1, 2])) % 16], dim=-1)
    # What stands in `tokens` at a soft place is not read.
    hidden = network(torch.where(weight[..., 0] > 0, 0, tokens), attention, SoftTokens(index, weight))
    assert torch.equal(hidden, network(tokens, attention))


@pytest.mark.parametrize("tie", [True, False])
def test_a_law_is_read_as_the_mean_of_its_embeddings(tie: bool):
    network = model(tie)
    tokens, soft = entries(2, 7), soft_at([(0, 3), (1, 5), (1, 6)], 2, 7)
    matrix = network.causal.get_input_embeddings().weight
    expected = matrix[tokens].clone()
    for b, t in [(0, 3), (1, 5), (1, 6)]:
        expected[b, t] = sum(w * matrix[i] for w, i in zip(soft.weight[b, t], soft.index[b, t], strict=True))
    torch.testing.assert_close(network.embed(tokens, soft), expected, rtol=1e-12, atol=1e-14)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    base = network.causal.base_model(inputs_embeds=expected, attention_mask=attention).last_hidden_state
    torch.testing.assert_close(network(tokens, attention, soft), base, rtol=1e-10, atol=1e-12)


def test_no_gradient_goes_through_a_soft_token_into_the_embedding():
    network = model()
    tokens, soft = entries(1, 4), soft_at([(0, 1)], 1, 4)
    matrix = network.causal.get_input_embeddings().weight
    network.embed(tokens, soft).sum().backward()
    touched = matrix.grad.abs().sum(-1).nonzero()[:, 0].tolist()
    assert touched == sorted(tokens[0, [0, 2, 3]].tolist())


def test_in_half_precision_a_law_is_summed_in_single_precision():
    network = model().to(torch.bfloat16)
    tokens, soft = entries(1, 4), soft_at([(0, 1)], 1, 4, k=16)
    matrix = network.causal.get_input_embeddings().weight.double()
    expected = (soft.weight[0, 1, :, None] * matrix[soft.index[0, 1]]).sum(0)
    found = network.embed(tokens, soft)[0, 1]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.to(torch.bfloat16)) or float((found - expected).abs().max()) < 2**-8 * float(
        expected.abs().max()
    )


def test_rows_carry_their_soft_tokens():
    tokens = entries(3, 6)
    mine = rows(soft_at([(0, 3), (2, 4)], 3, 6), tokens)
    mine = Rows(**{**vars(mine), "attention": torch.arange(6) < torch.tensor([[6], [3], [5]])})
    assert mine.soft is not None
    picked = mine.select(torch.tensor([2, 1]))
    assert picked.soft is not None
    assert torch.equal(picked.soft.weight, mine.soft.weight[1:, :5])
    assert torch.equal(picked.soft.index, mine.soft.index[1:, :5])
    moved = mine.to("cpu")
    assert moved.soft is not None
    assert torch.equal(moved.soft.index, mine.soft.index)


def test_batches_with_laws_of_other_sizes_and_with_none_lie_end_to_end():
    short, long, none = soft_at([(0, 3)], 1, 4, k=2), soft_at([(1, 4), (0, 5)], 2, 7, k=5, seed=9), None
    parts = [rows(short, entries(1, 4)), rows(none, entries(1, 6)), rows(long, entries(2, 7))]
    whole = concatenate(parts)
    assert whole.soft is not None
    assert whole.soft.index.shape == (4, 7, 5)
    for start, part in zip((0, 1, 2), parts, strict=True):
        here = whole.soft.next(*only(whole, range(start, start + len(part))))
        if part.soft is None:
            assert torch.equal(here.logp.exp()[:, 0], torch.ones(len(here.logp)))
            continue
        there = part.soft.next(part.mask, part.label)
        assert torch.equal(dense(here), dense(there))
        assert all(len(set(index)) == 5 for index in here.index.tolist())
    assert concatenate(parts[1:2]).soft is None


def only(whole: Rows, picks: range) -> tuple[Tensor, Tensor]:
    mask = whole.mask & torch.isin(torch.arange(len(whole)), torch.tensor(list(picks)))[:, None]
    return mask, whole.tokens[:, 1:][mask]


def dense(law) -> Tensor:
    out = torch.zeros(len(law.index), len(TOKENIZER), dtype=law.logp.dtype)
    return out.scatter_add(1, law.index, law.logp.exp())


@given(st.lists(st.integers(0, 12), min_size=1, max_size=6, unique=True), st.integers(0, 8))
@settings(max_examples=60, deadline=None)
def test_filling_entries_are_the_smallest_that_do_not_occur(taken: list[int], count: int):
    found = _others(torch.tensor([taken]), count)[0].tolist()
    assert found == [n for n in range(40) if n not in taken][:count]


def test_the_target_is_the_law_at_the_next_position_against_brute_force():
    """The event at t predicts the soft token at t + 1: its KL is over the whole vocabulary of the model."""
    tokens, soft = entries(2, 6, seed=4), soft_at([(0, 3), (1, 4)], 2, 6)
    batch = rows(soft, tokens, start=1)
    head = Linear(torch.randn(int(batch.mask.sum()), 8).double().requires_grad_(), torch.randn(16, 8).double())
    target = written(Soft(), {}, batch, 0.7)
    assert target is not None
    model_side = Linear(head.hidden, head.weight, None, 0.7)
    (found,) = functionals(model_side, [Want(ForwardKL(), 0)], [target], vocab=16)
    logp = (head.hidden @ head.weight.T / 0.7).log_softmax(-1)
    expected, at = [], 0
    for b in range(2):
        for t in range(1, 5):
            w = torch.zeros(16, dtype=torch.float64)
            if (b, t + 1) in [(0, 3), (1, 4)]:
                w[soft.index[b, t + 1]] = soft.weight[b, t + 1]
            else:
                w[tokens[b, t + 1]] = 1.0
            expected.append((torch.special.xlogy(w, w) - w * logp[at]).sum())
            at += 1
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-9)
    (mine,) = torch.autograd.grad(found.sum(), head.hidden)
    (theirs,) = torch.autograd.grad(torch.stack(expected).sum(), head.hidden)
    torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-8)


def test_weights_are_renormalised():
    soft = SoftTokens(torch.tensor([[[0, 0], [3, 5]]]), torch.tensor([[[0.0, 0.0], [0.3, 0.1]]]))
    law = soft.next(torch.tensor([[True]]), torch.tensor([3]))
    torch.testing.assert_close(law.logp.exp(), torch.tensor([[0.75, 0.25]]))


def test_mistakes_are_told():
    with pytest.raises(RecipeError, match="one shape"):
        SoftTokens(torch.zeros(1, 2, 3, dtype=torch.long), torch.zeros(1, 2, 2))
    with pytest.raises(RecipeError, match="no soft tokens"):
        Soft().law(rows(None, entries(1, 5)))
    with pytest.raises(RecipeError, match="Exact"):
        Soft().sampled(lambda handle: torch.zeros(1))
    with pytest.raises(RecipeError, match="soft tokens, which only"):
        _ = rows(soft_at([(0, 1)], 1, 5), entries(1, 5)).hard
    assert Match(ForwardKL(), to=Soft("latents")).name == "ForwardKL(latents)"
