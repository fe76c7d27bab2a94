"""The language-model side: loading, hidden states and heads, log-probs, sampling, tokenizers, derived randomness."""

from __future__ import annotations

from leibler.policy.extension import extend
from leibler.policy.heads import ValueHead
from leibler.policy.latent import Thoughts, decode_latent, marker
from leibler.policy.masked import MaskedLM, MaskedSamples, decode_masked, load
from leibler.policy.model import CausalLM, LanguageModel, Lora
from leibler.policy.randomness import generator, uniforms
from leibler.policy.sampler import Samples, sample
from leibler.policy.tiny import character_tokenizer, tiny_llama, tiny_masked, train_bpe
from leibler.policy.tokenizers import same_tokenizer
from leibler.policy.tokens import logprobs, right_pad
from leibler.policy.vocabulary import Reading, TextAlignment, common_cells

__all__ = [
    "CausalLM",
    "LanguageModel",
    "Lora",
    "MaskedLM",
    "MaskedSamples",
    "Reading",
    "Samples",
    "TextAlignment",
    "Thoughts",
    "ValueHead",
    "character_tokenizer",
    "common_cells",
    "decode_latent",
    "decode_masked",
    "extend",
    "generator",
    "load",
    "logprobs",
    "marker",
    "right_pad",
    "same_tokenizer",
    "sample",
    "tiny_llama",
    "tiny_masked",
    "train_bpe",
    "uniforms",
]
