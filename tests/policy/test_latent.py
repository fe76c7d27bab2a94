"""Thinking in laws, against a plain loop that reads everything anew at each step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from leibler.errors import DataError, ModelError
from leibler.policy import CausalLM, character_tokenizer, sample, tiny_llama, uniforms
from leibler.policy.latent import decode_latent, logits, marker

TOKENIZER = character_tokenizer("0123456789+=[]")
PROMPTS = ["1+2=", "3", "12+34=", "7="]


def model(seed: int = 0, tie: bool = True, loud: float = 6.0) -> CausalLM:
    network = tiny_llama(TOKENIZER, hidden=16, layers=2, heads=2, tie=tie, seed=seed).double()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(loud if parameter.ndim > 1 else 1)
    return network


def slow(network: CausalLM, prompt: list[int], most: int, new: int, top_k: int | None = None):
    """One row: (laws, closed, answer) by whole forward passes over the embeddings."""
    matrix = network.causal.get_input_embeddings().weight[: network.vocab_size].detach()
    first, last = marker(network, "["), marker(network, "]")
    read = matrix[torch.tensor([*prompt, first])]
    laws: list[Tensor] = []
    answer: list[int] = []
    closed = False

    def law(read: Tensor) -> Tensor:
        hidden = network.causal.base_model(inputs_embeds=read[None]).last_hidden_state[0, -1]
        return (hidden @ network.causal.get_output_embeddings().weight[: network.vocab_size].T).softmax(-1).detach()

    while True:
        w = law(read)
        closed = int(w.argmax()) == last
        if closed or len(laws) == most:
            break
        laws.append(w)
        if top_k is not None:
            kept = w.topk(top_k)
            w = torch.zeros_like(w).index_put((kept.indices,), kept.values / kept.values.sum())
        read = torch.cat([read, (w @ matrix)[None]])
    read = torch.cat([read, matrix[[last]]])
    while len(answer) < new and (not answer or answer[-1] not in network.stop_ids):
        answer.append(int(law(read).argmax()))
        read = torch.cat([read, matrix[[answer[-1]]]])
    return laws, closed, answer


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("top_k", [None, 3])
def test_it_is_what_a_plain_loop_thinks_and_says(tie: bool, top_k: int | None):
    seen = set()
    for seed in range(4):
        network = model(seed, tie)
        prompts = [network.encode_prompt(p) for p in PROMPTS]
        options = {"open": "[", "close": "]", "max_latent": 5, "max_new_tokens": 4, "keep": network.vocab_size}
        for max_batch in (None, 3):
            found = decode_latent(network, prompts, top_k=top_k, max_batch=max_batch, **options)
            for row, prompt in enumerate(prompts):
                laws, closed, answer = slow(network, prompt, 5, 4, top_k)
                assert int(found.steps[row]) == len(laws)
                assert bool(found.closed[row]) == closed
                assert found.answers.completions()[row] == answer
                seen.add((len(laws), closed))
                for step, law in enumerate(laws):
                    index, weight = found.laws.index[row, step], found.laws.weight[row, step]
                    torch.testing.assert_close(weight.double(), law[index], rtol=1e-5, atol=1e-7)
                assert not found.laws.weight[row, len(laws) :].any()
    assert {closed for _, closed in seen} == {True, False}  # rows that close by themselves, and rows that are cut


def test_without_thoughts_it_is_ordinary_decoding_after_both_markers():
    network = model(1)
    prompts = [network.encode_prompt(p) for p in PROMPTS]
    numbers = uniforms(0, "answers", 0, rows=4, n=5)
    marked = [[*p, marker(network, "["), marker(network, "]")] for p in prompts]
    for temperature in (0.0, 0.8):
        options = {"max_latent": 0, "max_new_tokens": 5, "temperature": temperature}
        found = decode_latent(network, prompts, open="[", close="]", uniforms=numbers, **options)
        expected = sample(network, marked, uniforms=numbers, temperature=temperature)
        assert found.answers.completions() == expected.completions()
        torch.testing.assert_close(found.answers.logp.double(), expected.logp, rtol=1e-5, atol=1e-6)
        assert not found.steps.any()


def test_logits_are_those_of_the_network_with_an_adapter_on_the_head_too():
    from leibler.policy import Lora

    network = model(2, tie=False).adapted(Lora(rank=2, targets=("lm_head",)))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[4, 7, 9]])
    attention = torch.ones_like(tokens, dtype=torch.bool)
    whole = network.network(input_ids=tokens).logits[0, :, : network.vocab_size]
    torch.testing.assert_close(logits(network, network(tokens, attention)[0]), whole)


def test_mistakes_are_told():
    network = model()
    prompts = [network.encode_prompt("1+2=")]
    with pytest.raises(ModelError, match=r"no token '<think>'.*extend"):
        decode_latent(network, prompts)
    options = {"open": "[", "close": "]"}
    with pytest.raises(DataError, match="at least one token"):
        decode_latent(network, [[]], **options)
    with pytest.raises(DataError, match="max_latent=-1"):
        decode_latent(network, prompts, max_latent=-1, **options)
    with pytest.raises(DataError, match="with uniforms="):
        decode_latent(network, prompts, temperature=1.0, **options)
    with pytest.raises(DataError, match="rows of at least"):
        decode_latent(network, prompts, uniforms=torch.zeros(1, 2, dtype=torch.float64), **options)
    with pytest.raises(ModelError, match="exceeds the model's context"):
        decode_latent(network, prompts, max_latent=300, **options)
