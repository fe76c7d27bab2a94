from __future__ import annotations

import string
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from leibler.errors import ModelError
from leibler.policy import ValueHead, character_tokenizer, tiny_llama, train_bpe

PRINTABLE = "".join(chr(code) for code in range(32, 127)) + "\n"


def test_characters_are_entries_in_order() -> None:
    tokenizer = character_tokenizer(["ba", "ca\n"])
    assert tokenizer.encode("\nabc") == [4, 5, 6, 7]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (
        0,
        1,
        2,
        3,
    )
    assert tokenizer.encode("axb") == [5, 3, 6]
    assert tokenizer.encode("") == []
    with pytest.raises(ModelError, match="at least one character"):
        character_tokenizer("")


@settings(max_examples=50)
@given(text=st.text(alphabet=PRINTABLE, max_size=60))
def test_characters_round_trip(text: str) -> None:
    tokenizer = CHARACTERS
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


CHARACTERS = character_tokenizer(PRINTABLE)
BPE = train_bpe(["the cat sat on the mat\n" * 5, "def f(x):\n    return x + 1\n" * 5], 280)


@settings(max_examples=50)
@given(text=st.text(max_size=40))
def test_bytes_round_trip(text: str) -> None:
    text = text.encode("utf-8", "ignore").decode()
    ids = BPE.encode(text)
    assert BPE.decode(ids, skip_special_tokens=True) == text
    assert BPE.unk_token_id not in ids


def test_merges_are_learned_and_repeatable() -> None:
    assert len(BPE) == 280
    assert len(BPE.encode("the cat sat")) < len("the cat sat")
    again = train_bpe(["the cat sat on the mat\n" * 5, "def f(x):\n    return x + 1\n" * 5], 280)
    assert again.get_vocab() == BPE.get_vocab()
    with pytest.raises(ModelError, match="at least 259"):
        train_bpe(["a"], 100)


@pytest.mark.parametrize("tokenizer", [CHARACTERS, BPE], ids=["characters", "bpe"])
def test_tokenizers_survive_the_disk(tmp_path: Path, tokenizer) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = string.ascii_letters + " <eos> <|endoftext|> [PAD]  two  spaces, don't\n\n" + string.punctuation
    assert again.encode(text) == tokenizer.encode(text)
    assert again.decode(again.encode(text)) == text
    assert again.get_vocab() == tokenizer.get_vocab()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "unk_token_id"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_weights_depend_on_the_seed_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (tiny_llama(CHARACTERS, hidden=16, heads=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.head()[0], other.head()[0])


def test_shape_of_the_model() -> None:
    model = tiny_llama(CHARACTERS, hidden=24, layers=3, heads=3, intermediate=40, max_length=77, tie=False)
    config = model.causal.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 3, 3)
    assert (config.intermediate_size, model.context, model.vocab_size) == (40, 77, len(CHARACTERS))
    assert model.head()[0] is not model.causal.get_input_embeddings().weight
    assert not model.training
    with pytest.raises(ModelError, match="multiple of 2 \\* heads = 6"):
        tiny_llama(CHARACTERS, hidden=32, heads=3)


def test_value_head_starts_at_zero_and_learns() -> None:
    head, hidden = ValueHead(8), torch.randn(4, 5, 8)
    assert torch.equal(head(hidden), torch.zeros(4, 5))
    (head(hidden) - 1).square().mean().backward()
    assert head.linear.weight.grad.abs().max() > 0
    assert ValueHead(8, outputs=2)(hidden.bfloat16()).shape == (4, 5, 2)
