"""The language-model side: loading, hidden states and heads, log-probs, sampling, tokenizers, derived randomness."""

from __future__ import annotations

from leibler.policy.extension import extend
from leibler.policy.heads import ValueHead
from leibler.policy.model import CausalLM, Lora, same_tokenizer
from leibler.policy.randomness import generator, uniforms
from leibler.policy.sampler import Samples, sample
from leibler.policy.tiny import character_tokenizer, tiny_llama, train_bpe
from leibler.policy.tokens import logprobs, right_pad
from leibler.policy.vocabulary import Reading, TextAlignment, common_cells

__all__ = [
    "CausalLM",
    "Lora",
    "Reading",
    "Samples",
    "TextAlignment",
    "ValueHead",
    "character_tokenizer",
    "common_cells",
    "extend",
    "generator",
    "logprobs",
    "right_pad",
    "same_tokenizer",
    "sample",
    "tiny_llama",
    "train_bpe",
    "uniforms",
]
