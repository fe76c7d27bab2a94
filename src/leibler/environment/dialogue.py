"""Demonstrations in several turns: as columns of a record, and as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from leibler.data.records import Record
from leibler.environment.base import Environment
from leibler.errors import DataError

if TYPE_CHECKING:
    from leibler.policy import CausalLM


def later_turns(record: Record) -> list[tuple[str, str]]:
    """The column ``turns`` of a record: each later action with the text before it, which the player did not write.

    Empty for a record without the column: a completion is a dialogue of one turn.

    Raises:
        DataError: the column is not a list of pairs of texts.

    Examples:
        >>> later_turns(Record("1>", completion="2", extra={"turns": [["3>", "4"]]}))
        [('3>', '4')]
    """
    value = record.extra.get("turns")
    if value is None:
        return []
    if not isinstance(value, (list, tuple)) or not all(_is_pair(pair) for pair in value):
        raise DataError(
            f"the column 'turns' of {record.source or 'a record'} is {value!r:.60}; give a list of pairs: the "
            "environment's text and the action after it."
        )
    return [(text, action) for text, action in value]


def _is_pair(pair: object) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(isinstance(part, str) for part in pair)


def demonstration(record: Record, environment: Environment, task: str) -> list[str]:
    """The actions of a demonstration: those that the record holds, else those of the environment's script.

    Raises:
        DataError: there is neither.
    """
    if record.completion is not None:
        return [record.completion, *(action for _, action in later_turns(record))]
    script = environment.script(task)
    if script is None:
        raise DataError(
            f"{record.source or repr(task)} has no demonstration: {environment.spec()} has no script; give the columns "
            "'completion' and 'turns' with a teacher's actions."
        )
    return list(script)


def encode_text(model: CausalLM, text: str) -> list[int]:
    """Text inside a dialogue: without the special tokens that begin or end one."""
    return list(model.tokenizer.encode(text, add_special_tokens=False))


def text_to_score(record: Record) -> str:
    """The completion of a record, where it stands for the whole of it.

    Raises:
        DataError: there is none, or later turns follow it.

    Examples:
        >>> text_to_score(Record("1+1=", completion="2"))
        '2'
    """
    where = record.source or repr(record.prompt[:60])
    if record.completion is None:
        raise DataError(f"{where} has no 'completion' to score; add one to each record.")
    if later_turns(record):
        raise DataError(f"{where} is a dialogue of several turns, which is not scored as one text; leave it out.")
    return record.completion


def encode_record(
    model: CausalLM, record: Record, text: str | None = None
) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """A record's prompt and its completion with all later turns, and where those stand that the player did not write.

    Args:
        model: whose tokens.
        record: what is encoded.
        text: a response that stands by itself, such as the chosen one; the completion where none is given.
    """
    prompt = model.encode_prompt(record.prompt)
    turns = later_turns(record) if text is None else []
    return prompt, *encode_turns(model, record.completion or "" if text is None else text, turns, len(prompt))


def encode_turns(
    model: CausalLM, completion: str, turns: Sequence[tuple[str, str]], at: int
) -> tuple[list[int], list[tuple[int, int]]]:
    """A completion and the turns after it, when the dialogue so far has ``at`` tokens.

    Returns:
        The tokens, and where in the dialogue those stand that the player did not write: ``(begin, end)`` each.
    """
    tokens, silent = model.encode_completion(completion), []
    for text, action in turns:
        between = encode_text(model, text)
        silent.append((at + len(tokens), at + len(tokens) + len(between)))
        tokens += between + model.encode_completion(action)
    return tokens, silent
