from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from leibler.policy import CausalLM, Lora, decode, sample, uniforms
from leibler.policy.decode import Cached, Lean, agree, decoder

KNOWN = {
    "llama": {},
    "llama tied": {"tie_word_embeddings": True},
    "llama biased": {"attention_bias": True, "mlp_bias": True},
    "llama one key head": {"num_key_value_heads": 1},
    "llama far": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama wide heads": {"head_dim": 16},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": None},
}


def built(make_network: Callable[..., torch.nn.Module], tokenizer, kind: str, **changes) -> CausalLM:
    network = make_network(kind.split()[0], **{**KNOWN.get(kind, {}), **changes})
    with torch.no_grad():  # norms and biases start at ones and zeros, where a mistake would not show
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return CausalLM(network, tokenizer).eval()


def run(made, prompts: list[list[int]]) -> torch.Tensor:
    """Final hidden states of prompts and then three tokens each, after a change of rows on the way."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    attention = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts])
    position = attention.sum(1)
    states = [made.read(tokens, attention, 3)]
    index = torch.tensor([0, 0, *range(1, len(prompts))])
    for step in range(3):
        if step < 2:  # repeats, then fewer rows
            made.keep(index)
            position, attention = position[index], attention[index]
        attention = torch.cat((attention, attention.new_ones(len(attention), 1)), 1)
        whole = attention if not attention.all() else None
        states.append(made.advance(torch.arange(5, 5 + len(attention)), whole, position))
        position = position + 1
        index = torch.arange(len(attention) - 2)
    return torch.cat(states)


@pytest.mark.parametrize("ragged", [True, False])
@pytest.mark.parametrize("kind", list(KNOWN))
@torch.inference_mode()
def test_lean_equals_the_models_own_forward_pass(make_network, tokenizer, kind: str, ragged: bool) -> None:
    model = built(make_network, tokenizer, kind).double()
    assert isinstance(decoder(model), Lean)
    prompts = (
        [[5, 6, 7, 8, 9, 10], [11, 12], [13], [14, 15, 16, 17]] if ragged else [[5, 6, 7], [8, 9, 10], [11, 12, 13]]
    )
    # Rotary angles are float32 numbers in both.
    torch.testing.assert_close(run(Lean(model), prompts), run(Cached(model), prompts), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_adapters_take_part(make_network, tokenizer) -> None:
    model = built(make_network, tokenizer, "llama").adapted(Lora(rank=2)).eval()
    plain = run(Lean(model), [[5, 6, 7], [8], [9, 10]])
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    assert isinstance(decoder(model), Lean)
    adapted = run(Lean(model), [[5, 6, 7], [8], [9, 10]])
    torch.testing.assert_close(adapted, run(Cached(model), [[5, 6, 7], [8], [9, 10]]), rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("mistral", {"sliding_window": 6}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
        ("gpt2", {}),
        ("gemma3_text", {}),
        ("opt", {}),
    ],
)
def test_what_is_not_known_goes_the_ordinary_way(make_network, tokenizer, kind: str, changes: dict) -> None:
    assert isinstance(decoder(built(make_network, tokenizer, kind, **changes)), Cached)


@torch.inference_mode()
def test_circumstances_that_need_the_ordinary_way(make_network, tokenizer) -> None:
    model = built(make_network, tokenizer, "llama")
    assert isinstance(decoder(model), Lean)
    with torch.autocast("cpu", torch.bfloat16):
        assert isinstance(decoder(model), Cached)
    handle = model.causal.base_model.layers[1].register_forward_hook(lambda *_: None)
    assert isinstance(decoder(model), Cached)
    handle.remove()
    assert isinstance(decoder(model), Lean)
    assert isinstance(decoder(model.to(torch.bfloat16)), Cached)


@torch.inference_mode()
def test_a_known_name_with_other_arithmetic_is_found_out(make_network, tokenizer, monkeypatch) -> None:
    model = built(make_network, tokenizer, "llama")
    attention = type(model.causal.base_model.layers[0].self_attn)
    original = attention.forward

    def other(self, hidden_states, **options):
        return original(self, hidden_states=1.1 * hidden_states, **options)

    monkeypatch.setattr(attention, "forward", other)
    assert not agree(Lean(model), Cached(model), model)
    assert isinstance(decoder(model), Cached)


def test_both_ways_draw_the_same(make_network, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(make_network, tokenizer, "qwen2")
    prompts = [[5, 6, 7, 8], [9], [10, 11]]
    numbers = uniforms(0, "test", 0, rows=6, n=12)
    lean = sample(model, prompts, uniforms=numbers, group_size=2)
    assert model.decodes_lean
    monkeypatch.setattr(decode, "_KNOWN_LAYERS", frozenset())
    ordinary = sample(model, prompts, uniforms=numbers, group_size=2)
    assert torch.equal(lean.tokens, ordinary.tokens)
    torch.testing.assert_close(lean.logp, ordinary.logp, rtol=1e-5, atol=2e-6)
