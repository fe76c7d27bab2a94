"""Whether two models mean the same by every token id."""

from __future__ import annotations

from typing import TYPE_CHECKING

from leibler.errors import ModelError
from leibler.policy.model import LanguageModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def same_tokenizer(
    a: LanguageModel | PreTrainedTokenizerBase,
    b: LanguageModel | PreTrainedTokenizerBase,
    names: tuple[str, str] = ("student", "teacher"),
    option: str | None = None,
) -> None:
    """Check that two models mean the same by every token id, which a divergence between them needs.

    Padding rows beyond the tokenizer (151,936 against 152,064) do not matter.

    Args:
        a, b: the models, or their tokenizers.
        names: what the message calls them.
        option: what the caller offers instead, such as ``"align=text"``.

    Raises:
        ModelError: naming the first difference.
    """
    difference = tokenizer_difference(a, b, names)
    if difference is not None:
        instead = f", or compare them through the text that both read with {option}" if option else ""
        raise ModelError(f"The tokenizers differ: {difference}; take {names[1]} and {names[0]} of one family{instead}.")


def tokenizer_difference(
    a: LanguageModel | PreTrainedTokenizerBase,
    b: LanguageModel | PreTrainedTokenizerBase,
    names: tuple[str, str] = ("student", "teacher"),
) -> str | None:
    """The first entry that two tokenizers do not share, in words; None where they mean the same by every id."""
    first, second = (model.tokenizer if isinstance(model, LanguageModel) else model for model in (a, b))
    if first is second:
        return None
    left, right = first.get_vocab(), second.get_vocab()
    if left != right:
        by_id = [{number: entry for entry, number in vocabulary.items()} for vocabulary in (left, right)]
        where = min(
            number for number in by_id[0].keys() | by_id[1].keys() if by_id[0].get(number) != by_id[1].get(number)
        )
        entries = [repr(vocabulary[where]) if where in vocabulary else "nothing" for vocabulary in by_id]
        return (
            f"the {names[0]} has {len(left)} entries and the {names[1]} {len(right)}, "
            f"and entry {where} is {entries[0]} for one and {entries[1]} for the other"
        )
    if first.eos_token_id != second.eos_token_id:
        return f"the {names[0]} ends with {first.eos_token!r}, the {names[1]} with {second.eos_token!r}"
    return None
