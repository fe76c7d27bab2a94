"""Small random models whose laws are far from uniform, one for each of several architectures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from leibler.policy import CausalLM, character_tokenizer, tiny_llama

ALPHABET = "abcdefghijklmnopqrstuvwxyz 0123456789"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "mistral": {"sliding_window": 6},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma3_text": {"head_dim": 8, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}


def loud(model: torch.nn.Module, factor: float = 3.0) -> None:
    """Larger matrices: an untrained model is otherwise nearly uniform, and a wrong law would look right."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(factor)


def network(kind: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random Transformers model with 7 rows of padding beyond the tokenizer's entries."""
    settings: dict[str, Any] = {
        "vocab_size": len(character_tokenizer(ALPHABET)) + 7,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(kind, **{**settings, **ARCHITECTURES.get(kind, {}), **changes})
    torch.manual_seed(seed)
    made = AutoModelForCausalLM.from_config(config)
    loud(made)
    return made.eval()


@pytest.fixture(params=list(ARCHITECTURES))
def any_model(request: pytest.FixtureRequest) -> CausalLM:
    return CausalLM(network(request.param), character_tokenizer(ALPHABET))


@pytest.fixture
def make_network() -> Callable[..., torch.nn.Module]:
    return network


@pytest.fixture
def tokenizer():
    return character_tokenizer(ALPHABET)


@pytest.fixture
def model(tokenizer) -> CausalLM:
    made = tiny_llama(tokenizer, hidden=32, layers=2, heads=2, max_length=64)
    loud(made, 4.0)
    return made


@pytest.fixture
def prompts(model: CausalLM) -> list[list[int]]:
    return [model.encode_prompt(text) for text in ("abc def 123", "q", "hello there", "z9")]
