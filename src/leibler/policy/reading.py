"""What a model makes of given completions: a few numbers for each; and of its own answers, how many are right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from leibler.divergence import Entropy, SampledLogProb
from leibler.errors import DataError
from leibler.fused import Want, functionals
from leibler.policy.model import CausalLM, check_causal, evaluating
from leibler.policy.sampler import Samples
from leibler.policy.tokens import right_pad

Pair = tuple[Sequence[int], Sequence[int]]
Progress = Callable[[int, int], None]
"""Called with what is done and how much there is."""


def part(progress: Progress | None, passes: Sequence[str], name: str) -> Progress | None:
    """The progress of one of several passes over the same records."""
    if progress is None:
        return None
    before = passes.index(name)
    return lambda done, total: progress(before * total + done, len(passes) * total)


def by_length(pairs: Sequence[Pair], batch_size: int) -> Iterator[list[int]]:
    """Indices of rows, those of similar length together: less padding.

    Raises:
        DataError: ``batch_size`` is less than 1.
    """
    if batch_size < 1:
        raise DataError(f"a batch cannot have {batch_size} rows; give batch_size of at least 1.")
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def row_means(values: Float[Tensor, " events"], mask: Bool[Tensor, "rows time"]) -> Float64[Tensor, " rows"]:
    """The mean of each row's events, on the CPU."""
    owner, length = mask.nonzero()[:, 0].cpu(), mask.sum(1).cpu()
    return torch.zeros(len(mask), dtype=torch.float64).index_add_(0, owner, values.double().cpu()) / length


def reading(
    model: CausalLM, pairs: Sequence[Pair], batch_size: int = 16, progress: Progress | None = None
) -> dict[str, list[float]]:
    """How a model reads completions after their prompts: means over the completions' tokens.

    Args:
        model: the model.
        pairs: token ids of prompt and completion.
        batch_size: completions read at a time; changes nothing but memory and rounding.
        progress: is told how far it is.

    Returns:
        ``nll`` (nats per token), ``confidence`` (``exp(-nll)``: the geometric mean of the tokens' probabilities) and
        ``uncertainty`` (the entropy of the next-token law over that of the uniform one, in [0, 1]); a list each.

    Examples:
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> model = tiny_llama(character_tokenizer("01"), hidden=16, layers=1, heads=2)
        >>> found = reading(model, [([1, 4], [5, 2]), ([1, 5], [4, 4, 2])])
        >>> len(found["nll"]), all(0 <= u <= 1 for u in found["uncertainty"])
        (2, True)
    """
    check_causal(model)
    nll, entropy = torch.zeros(len(pairs), dtype=torch.float64), torch.zeros(len(pairs), dtype=torch.float64)
    done = 0
    with torch.no_grad(), evaluating(model):
        for some in by_length(pairs, batch_size):
            tokens, attention, mask = (x.to(model.device) for x in right_pad([pairs[i] for i in some], model.pad_id))
            head = model.linear(model(tokens, attention)[:, :-1][mask])
            wants = [Want(SampledLogProb()), Want(Entropy())]
            numbers = functionals(head, wants, token=tokens[:, 1:][mask], vocab=model.vocab_size)
            nll[some], entropy[some] = -row_means(numbers[0], mask), row_means(numbers[1], mask)
            done += len(some)
            if progress is not None:
                progress(done, len(pairs))
    largest = math.log(model.vocab_size)
    return {
        "nll": nll.tolist(),
        "confidence": (-nll).exp().tolist(),
        "uncertainty": (entropy / largest).clamp(0, 1).tolist(),
    }


def shares_right(model: CausalLM, answers: Samples, samples: int, right: Callable[[int, str], bool]) -> list[float]:
    """The share of right answers to each question; one that was cut off before its end is wrong.

    Args:
        model: turns answers into text.
        answers: ``samples`` in a row to each question.
        samples: answers to each question.
        right: ``right(question, text)``.
    """
    ended = answers.finished.tolist()
    found = [
        right(i // samples, model.decode(ids)) and end
        for i, (ids, end) in enumerate(zip(answers.completions(), ended, strict=True))
    ]
    return [sum(found[i : i + samples]) / samples for i in range(0, len(found), samples)]
