"""Data with thoughts: between question and answer stand laws over the vocabulary instead of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.errors import DataError
from leibler.objective.rows import SAMPLE, Rows
from leibler.objective.soft import SoftTokens, joined
from leibler.policy.latent import CLOSE, OPEN, marker
from leibler.train.sources import Context, Source, State, _next_records, _rows

if TYPE_CHECKING:
    from leibler.data import Record
    from leibler.policy import CausalLM

COLUMN = "latents"
"""The column of a data file that holds thoughts."""


def to_column(index: Int[Tensor, "m k"], weight: Float[Tensor, "m k"], model: CausalLM) -> dict[str, Any]:
    """Thoughts as JSON values: the entries of each law, their weights, and the most likely entry as it is spelt.

    Examples:
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> model = tiny_llama(character_tokenizer("01"), hidden=16, layers=1, heads=2)
        >>> to_column(torch.tensor([[4, 5]]), torch.tensor([[0.75, 0.25]]), model)
        {'token': [[4, 5]], 'weight': [[0.75, 0.25]], 'likely': ['0']}
    """
    weights = [[float(f"{w:.7g}") for w in row] for row in weight.tolist()]
    return {"token": index.tolist(), "weight": weights, "likely": _likely(index, weight, model)}


def from_column(record: Record, model: CausalLM, column: str = COLUMN) -> SoftTokens:
    """The laws of a record as a row of soft tokens, ``[1, m, k]``; shorter laws are filled up without weight.

    Raises:
        DataError: there are none, they are not laws, or they are of another tokenizer.
    """
    where = record.source or "a record"
    value = record.get(column)
    if not isinstance(value, Mapping) or not {"token", "weight"} <= value.keys():
        raise DataError(
            f"{where} has no thoughts in the column {column!r}; make the file with `leibler represent latent`."
        )
    tokens, weights = value["token"], value["weight"]
    if not isinstance(tokens, list) or not isinstance(weights, list) or not tokens or len(tokens) != len(weights):
        raise DataError(
            f"the column {column!r} of {where} must hold as many lists of tokens as of weights, at least one."
        )
    parts = []
    for token, weight in zip(tokens, weights, strict=True):
        fault = _fault(token, weight, model.vocab_size)
        if fault:
            raise DataError(f"a thought of {where} {fault}; make the file with `leibler represent latent`.")
        law = torch.tensor(weight, dtype=torch.float64)
        parts.append(SoftTokens(torch.tensor(token)[None, None], (law / law.sum()).float()[None, None]))
    k = max(part.index.shape[-1] for part in parts)
    parts = [part.padded(1, k) for part in parts]
    soft = SoftTokens(*(torch.cat([getattr(p, name) for p in parts], dim=1) for name in ("index", "weight")))
    if value.get("likely") is not None and value["likely"] != _likely(soft.index[0], soft.weight[0], model):
        raise DataError(f"the thoughts of {where} are of another tokenizer than the student's; make them with its own.")
    return soft


def _likely(index: Tensor, weight: Tensor, model: CausalLM) -> list[str]:
    best = index.gather(-1, weight.argmax(-1, keepdim=True))[:, 0].tolist()
    return list(model.tokenizer.convert_ids_to_tokens(best))


def _fault(token: Any, weight: Any, vocab: int) -> str | None:
    """What is wrong with a law, as the end of a sentence."""
    if not isinstance(token, list) or not isinstance(weight, list) or not token or len(token) != len(weight):
        return "does not have one weight for each of its tokens"
    if not all(isinstance(t, int) and not isinstance(t, bool) and 0 <= t < vocab for t in token):
        return f"has a token outside of the vocabulary of {vocab}"
    if len(set(token)) < len(token):
        return "has a token twice"
    if not all(isinstance(w, (int, float)) and not isinstance(w, bool) and 0 <= w < float("inf") for w in weight):
        return "has a weight that is no number of 0 or more"
    return None if sum(weight) > 0 else "has no weight above 0"


@dataclass(frozen=True)
class Latents(Source):
    """Records with thoughts: question, opening marker, a soft token for each law of the column, closing marker, answer.

    The batch's column ``latent`` is 1 where a soft token is predicted, by the position in front of it (the opening
    marker for the first), and ``answer`` is 1 where the closing marker and the completion are: without the former in
    some loss, the model would never learn to stop thinking.

    Attributes:
        name: which of the run's data sets.
        column: of the thoughts, as `leibler.represent.latent.export` writes them.
        open, close: the markers; each must be one token of the student's.
        rows: sequences per optimiser batch; None: the run's batch size.
    """

    name: str = "train"
    column: str = COLUMN
    open: str = OPEN
    close: str = CLOSE
    rows: int | None = None

    def datasets(self) -> Mapping[str, str]:
        return {self.name: "labels"}

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        model, data = context.policy, context.dataset(self.name)
        first, last = marker(model, self.open), marker(model, self.close)
        records, state = _next_records(data, state, self.rows or context.rows, context.seed)
        mine = [record for _, record in (records[i] for i in context.share(len(records)))]
        items, places, laws = [], [], []
        for record in mine:
            if record.completion is None:
                raise DataError(f"{record.source or data.name} has no completion to learn from; add the column.")
            law = from_column(record, model, self.column)
            likely = law.index.gather(-1, law.weight.argmax(-1, keepdim=True))[0, :, 0].tolist()
            prompt = [*model.encode_prompt(record.prompt), first]
            items.append((prompt, [*likely, last, *model.encode_completion(record.completion)]))
            places.append(len(prompt))
            laws.append(law)
        rows = _rows(items, list(range(len(items))), [SAMPLE] * len(items), mine, context)
        rows = replace(rows, soft=_placed(laws, places, rows.tokens.shape[1]))
        latent = torch.zeros(rows.mask.shape) if rows.soft is None else rows.soft.there[:, 1:].float()
        return {"main": rows.with_columns(latent=latent, answer=1 - latent)}, state


def _placed(laws: list[SoftTokens], places: list[int], length: int) -> SoftTokens | None:
    """Laws at their places in rows of a length."""
    moved = []
    for law, place in zip(laws, places, strict=True):
        front = (0, 0, place, 0)
        index, weight = (torch.nn.functional.pad(x, front) for x in (law.index, law.weight))
        moved.append((SoftTokens(index, weight), index[..., 0]))
    return joined(moved, length)
