"""Small models and tokenizers that are made in a second: for tests, demonstrations and published claims.

They are ordinary Transformers objects: ``save_pretrained`` writes what ``AutoTokenizer`` and ``AutoModelForCausalLM``
read back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch

from leibler.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from leibler.policy.masked import MaskedLM
    from leibler.policy.model import CausalLM

# Mathematical brackets, not "<eos>": a text that happens to contain "<eos>" must come back as it was.
PAD, BOS, EOS, UNK, MASK = "⟨pad⟩", "⟨bos⟩", "⟨eos⟩", "⟨unk⟩", "⟨mask⟩"


def _wrap(tokenizer: Tokenizer, unknown: str | None) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    special = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS} | ({"unk_token": unknown} if unknown else {})
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **special)


def character_tokenizer(texts: str | Iterable[str]) -> PreTrainedTokenizerFast:
    """One token for each character that occurs in ``texts`` (an alphabet, or texts to collect it from).

    Encoding and decoding gives back every text over the alphabet exactly; another character becomes the unknown token.
    Entries 0 to 3 are padding, begin, end and unknown; the characters follow in code-point order. It adds no special
    token of its own accord.

    Args:
        texts: a string or several.

    Returns:
        A fast tokenizer with padding, begin, end and unknown tokens.

    Raises:
        ModelError: no character was given.

    Examples:
        >>> tokenizer = character_tokenizer("0123456789+=")
        >>> tokenizer.decode(tokenizer.encode("12+34=46"))
        '12+34=46'
        >>> len(tokenizer)
        16
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted({character for text in ([texts] if isinstance(texts, str) else texts) for character in text})
    if not alphabet:
        raise ModelError("A character tokenizer needs at least one character; give it an alphabet or some texts.")
    vocabulary = {entry: number for number, entry in enumerate([PAD, BOS, EOS, UNK, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without it the characters would be joined by spaces
    return _wrap(tokenizer, UNK)


def train_bpe(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level byte-pair encoding learned from ``texts``: every text round-trips, none is unknown.

    Source: Neural Machine Translation of Rare Words with Subword Units (2016), on bytes.

    Args:
        texts: what to learn the merges from.
        size: the number of entries, counting 256 bytes and 3 special tokens; fewer when the texts have too few pairs.

    Raises:
        ModelError: ``size`` is too small for the bytes.

    Examples:
        >>> tokenizer = train_bpe(["def f(x):\\n    return x\\n"] * 4, size=270)
        >>> tokenizer.decode(tokenizer.encode("def g(é):\\n"))
        'def g(é):\\n'
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = [PAD, BOS, EOS]
    if size < 256 + len(special):
        raise ModelError(
            f"A byte-level tokenizer needs at least {256 + len(special)} entries, not {size}; "
            "use character_tokenizer for a smaller vocabulary."
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, None)


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    intermediate: int | None = None,
    max_length: int = 256,
    tie: bool = True,
    seed: int = 0,
) -> CausalLM:
    """A Llama with random weights, small enough to train in seconds.

    Args:
        tokenizer: fixes the vocabulary and the special tokens.
        hidden: width of the residual stream, a multiple of ``2 * heads``.
        layers: how many blocks.
        heads: attention heads (as many for keys and values).
        intermediate: width of the feed-forward part; ``8/3 * hidden`` rounded up to a multiple of 8 when not given.
        max_length: longest sequence, prompt and completion together.
        tie: share the embedding with the head.
        seed: of the weights; the global generator is left as it was.

    Raises:
        ModelError: ``hidden`` does not divide among the heads.

    Examples:
        >>> model = tiny_llama(character_tokenizer("ab"), hidden=16, layers=1, heads=2)
        >>> model.vocab_size, model.hidden_size
        (6, 16)
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    from leibler.policy.model import CausalLM

    if hidden % (2 * heads):
        raise ModelError(f"hidden={hidden} must be a multiple of 2 * heads = {2 * heads} (rotary pairs in each head).")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate or -(-8 * hidden // 24) * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max_length,
        tie_word_embeddings=tie,
        pad_token_id=cast(int, tokenizer.pad_token_id),
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
    )
    with torch.random.fork_rng(devices=[]):  # Transformers draws initial weights from the global generator
        torch.manual_seed(seed)
        return CausalLM(LlamaForCausalLM(config), tokenizer).eval()


def tiny_masked(
    tokenizer: PreTrainedTokenizerFast,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    intermediate: int | None = None,
    max_length: int = 256,
    seed: int = 0,
) -> MaskedLM:
    """A ModernBERT with random weights, small enough to train in seconds; every layer sees the whole text.

    Args:
        tokenizer: fixes the vocabulary and the special tokens; one without a mask token is copied and gets one, at the
            end of the vocabulary.
        hidden: width of the residual stream, a multiple of ``2 * heads``.
        layers: how many blocks.
        heads: attention heads.
        intermediate: width of the feed-forward part; ``4/3 * hidden`` rounded up to a multiple of 8 when not given (it
            is gated, so there are two of them).
        max_length: longest sequence, prompt and completion together.
        seed: of the weights; the global generator is left as it was.

    Raises:
        ModelError: ``hidden`` does not divide among the heads.

    Examples:
        >>> model = tiny_masked(character_tokenizer("ab"), hidden=16, layers=1, heads=2)
        >>> model.vocab_size, model.hidden_size, model.mask_id
        (7, 16, 6)
    """
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    from leibler.policy.masked import MaskedLM

    if hidden % (2 * heads):
        raise ModelError(f"hidden={hidden} must be a multiple of 2 * heads = {2 * heads} (rotary pairs in each head).")
    if tokenizer.mask_token_id is None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.add_special_tokens({"mask_token": MASK})
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=intermediate or -(-4 * hidden // 24) * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_length,
        layer_types=["full_attention"] * layers,
        pad_token_id=cast(int, tokenizer.pad_token_id),
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        cls_token_id=cast(int, tokenizer.bos_token_id),
        sep_token_id=cast(int, tokenizer.eos_token_id),
    )
    with torch.random.fork_rng(devices=[]):  # Transformers draws initial weights from the global generator
        torch.manual_seed(seed)
        return MaskedLM(ModernBertForMaskedLM(config), tokenizer).eval()
