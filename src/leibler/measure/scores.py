"""A few numbers for each record, to choose data by: how models read its completion, and how often it is solved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from leibler.divergence import SampledLogProb
from leibler.environment.dialogue import text_to_score
from leibler.errors import DataError
from leibler.fused import Want, functionals
from leibler.measure.models import _linear, _padded
from leibler.policy import CausalLM, sample, uniforms
from leibler.policy.model import evaluating
from leibler.policy.reading import Progress, by_length, reading, shares_right

if TYPE_CHECKING:
    from leibler.data import Dataset, Record


def read(
    model: CausalLM, records: Sequence[Record], batch_size: int = 16, *, progress: Progress | None = None
) -> dict[str, list[float]]:
    """How a model reads each completion: means over its tokens, the end token included.

    Args:
        model: the model.
        records: with completions.
        batch_size: completions read at a time; changes nothing but memory and rounding.
        progress: is told how far it is.

    Returns:
        ``nll`` (nats per token), ``confidence`` (``exp(-nll)``: the geometric mean of the tokens' probabilities) and
        ``uncertainty`` (the entropy of the next-token law over that of the uniform one, in [0, 1]); a list each, in
        the order of the records.

    Raises:
        DataError: a record has no completion.

    Examples:
        >>> from leibler.data import Record
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> model = tiny_llama(character_tokenizer("01+="), hidden=16, layers=1, heads=2)
        >>> found = read(model, [Record("1+0=", completion="1"), Record("1+1=", completion="10")])
        >>> sorted(found), len(found["nll"]), all(0 < c < 1 for c in found["confidence"])
        (['confidence', 'nll', 'uncertainty'], 2, True)
    """
    return reading(model, _encoded(model, records), batch_size, progress)


def label_logps(model: CausalLM, records: Sequence[Record], batch_size: int = 16) -> list[list[float]]:
    """The log-probability (nats) that a model gives each token of a completion, its end token included.

    It is what `leibler.recipes.get("transfer-limits")` learns from, as the column ``label_logp``.

    Args:
        model: the model.
        records: with completions.
        batch_size: completions read at a time; changes nothing but memory and rounding.

    Raises:
        DataError: a record has no completion.

    Examples:
        >>> from leibler.data import Record
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> model = tiny_llama(character_tokenizer("01+="), hidden=16, layers=1, heads=2)
        >>> [len(row) for row in label_logps(model, [Record("1+0=", completion="1"), Record("1+1=", completion="10")])]
        [2, 3]
    """
    pairs = _encoded(model, records)
    out: list[list[float]] = [[] for _ in pairs]
    with torch.no_grad(), evaluating(model):
        for part in by_length(pairs, batch_size):
            rows = _padded(model, [pairs[i] for i in part])
            token = rows[0][:, 1:][rows[2]]
            (logp,) = functionals(_linear(model, *rows), [Want(SampledLogProb())], token=token, vocab=model.vocab_size)
            for i, own in zip(part, logp.cpu().split(rows[2].sum(1).tolist()), strict=True):
                out[i] = own.tolist()
    return out


def _encoded(model: CausalLM, records: Sequence[Record]) -> list[tuple[list[int], list[int]]]:
    return [(model.encode_prompt(r.prompt), model.encode_completion(text_to_score(r))) for r in records]


def pass_rates(
    model: CausalLM,
    dataset: Dataset,
    samples: int = 8,
    *,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> list[float]:
    """The share of a model's own answers to each record that are right; one cut off at the limit is wrong.

    Args:
        model: the model.
        dataset: questions with a checker; an answer counts as right when the checker gives 1.
        samples: answers to each question.
        temperature, max_new_tokens, seed: of the samples.
        batch_size: answers sampled at a time; changes nothing but memory and rounding.
        progress: is told how far it is.

    Raises:
        DataError: the data set has no checker.

    Examples:
        >>> from leibler.data import Addition
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> task = Addition(digits=1)
        >>> model = tiny_llama(character_tokenizer(task.alphabet), hidden=16, layers=1, heads=2)
        >>> len(pass_rates(model, task.dataset(3), samples=2, max_new_tokens=2))
        3
    """
    check = dataset.checker()
    if samples < 1:
        raise DataError(f"a pass rate cannot be told from {samples} samples; draw at least one.")
    numbers = uniforms(seed, "pass-rate", 0, rows=len(dataset) * samples, n=max_new_tokens)
    each = max(batch_size // samples, 1)
    rates: list[float] = []
    for start in range(0, len(dataset), each):
        records = dataset.records[start : start + each]
        drawn = sample(
            model,
            [model.encode_prompt(record.prompt) for record in records],
            uniforms=numbers[start * samples : (start + len(records)) * samples],
            temperature=temperature,
            group_size=samples,
        )
        rates += shares_right(model, drawn, samples, lambda i, text: check(records[i], text) >= 1.0)  # noqa: B023
        if progress is not None:
            progress(len(rates), len(dataset))
    return rates
