"""Measurements of language models on held-out data: drift from a target, calibration, accuracy, and token by token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.divergence import Divergence, Entropy, ForwardKL, Functional, ReverseKL, Row, SampledLogProb
from leibler.errors import DataError, RecipeError
from leibler.fused import Linear, TargetRows, Want, functionals, support_violations
from leibler.measure.calibration import Calibration, calibration
from leibler.measure.samples import distinct_answers, mean_pass_at_k
from leibler.measure.summaries import entropy_summary
from leibler.policy import CausalLM, MaskedLM, decode_masked, right_pad, same_tokenizer, sample, uniforms
from leibler.policy.model import check_causal, evaluating
from leibler.policy.reading import by_length

if TYPE_CHECKING:
    from leibler.data import Dataset, Record


@dataclass(frozen=True)
class _Measured:
    """A functional that is read and never differentiated."""

    @property
    def needs_target(self) -> bool:
        return False

    def add_gradient(self, *_: Any) -> None:
        raise RecipeError(f"{type(self).__name__} is a measurement without a gradient; compute it under no_grad.")


@dataclass(frozen=True)
class TopProbability(_Measured):
    """The probability of the most likely token, ``max_v p_v``."""

    def value(
        self, model: Row, target: Row | None = None, token: Int[Tensor, " rows"] | None = None
    ) -> tuple[Float[Tensor, " rows"], None]:
        return 1.0 / model.total.squeeze(-1), None  # the largest unnormalised weight is 1


@dataclass(frozen=True)
class TopHit(_Measured):
    """1 where the most likely token is the token that came, else 0."""

    def value(
        self, model: Row, target: Row | None = None, token: Int[Tensor, " rows"] | None = None
    ) -> tuple[Float[Tensor, " rows"], None]:
        if token is None:
            raise RecipeError("TopHit needs the token of every row: pass `token`.")
        return (model.logits.argmax(-1) == token).to(model.logits.dtype), None


def compare(
    model: CausalLM,
    target: CausalLM,
    records: Dataset | Sequence[Record],
    divergences: Sequence[Divergence] | Mapping[str, Divergence] = (ForwardKL(), ReverseKL()),
    batch_size: int = 16,
    *,
    bins: int = 10,
) -> dict[str, Any]:
    """How a model stands to a target on held-out completions: means per token, exact over the vocabulary.

    Each completion is read with its prompt by both models (teacher forcing); the end-of-sequence token counts as a
    token. Nothing is sampled, and no logits of more than a block of tokens are held.

    Args:
        model: the model, p.
        target: what it is compared with, q; of the same tokenizer.
        records: with completions.
        divergences: from the model to the target; each is also measured the other way round, with the arguments
            exchanged. A sequence is named by its classes in snake case.
        batch_size: completions read at a time; changes nothing but memory and rounding.
        bins: of the reliability diagrams.

    Returns:
        ``tokens``; ``divergence/NAME`` (nats per token) and ``divergence/NAME/swapped``, each with ``.../infinite``,
        the number of tokens where it is infinite (these make the mean infinite); and for ``model`` and ``target``:
        ``.../nll``, ``.../perplexity``, ``.../entropy``, ``.../accuracy`` (of the most likely token),
        ``.../calibration_error`` and ``.../reliability`` (the bins).

    Raises:
        DataError: there is no completion.
        ModelError: the tokenizers differ, or a model is a masked language model.

    Examples:
        >>> from leibler.data import Record
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> model = tiny_llama(character_tokenizer("01+="), hidden=16, layers=1, heads=2)
        >>> found = compare(model, model.copy(), [Record("1+0=", completion="1")])
        >>> found["tokens"], found["divergence/reverse_kl"]
        (2, 0.0)
    """
    same_tokenizer(model, target, ("model", "target"))
    named = dict(divergences) if isinstance(divergences, Mapping) else _named(divergences)
    there = [*named.values(), SampledLogProb(), Entropy(), TopProbability(), TopHit()]
    # The exchanged divergences are those of the target to the model: one sweep each way.
    values = [[], []]
    with torch.no_grad(), evaluating(model, target):
        for rows in _batches(model, records, batch_size):
            heads = _linear(model, *rows), _linear(target, *rows)
            token = rows[0][:, 1:][rows[2]]
            for out, (one, other) in zip(values, (heads, heads[::-1])):
                wants = [Want(f, 0 if isinstance(f, Divergence) else None) for f in there]
                numbers = functionals(one, wants, [TargetRows((other,))], token=token, vocab=model.vocab_size)
                out.append(numbers.double().cpu())
    result: dict[str, Any] = {}
    for which, suffix, parts in (("model", "", values[0]), ("target", "/swapped", values[1])):
        numbers = torch.cat(parts, 1)
        result["tokens"] = numbers.shape[1]
        for name, row in zip(named, numbers):
            result[f"divergence/{name}{suffix}"] = float(row.mean())
            result[f"divergence/{name}{suffix}/infinite"] = int(support_violations(row))
        logp, entropy, sure, hit = numbers[len(named) :]
        found = calibration(sure, hit, bins)
        result |= {f"{which}/{key}": value for key, value in _side(-logp, entropy, found).items()}
    return result


def evaluate(
    model: CausalLM | MaskedLM,
    dataset: Dataset,
    n_samples: int = 8,
    temperature: float = 1.0,
    max_new_tokens: int = 64,
    seed: int = 0,
    *,
    batch_size: int = 64,
    commit: int = 1,
) -> dict[str, Any]:
    """Accuracy of the greedy answer, and what ``n_samples`` sampled answers show.

    Args:
        model: the model.
        dataset: questions with a checker; an answer counts as right when the checker gives 1.
        n_samples: answers sampled for each question; 0 for the greedy one only.
        temperature: of the samples, above 0.
        max_new_tokens: the longest answer.
        seed: of the samples; the same seed asks the same of another model.
        batch_size: answers sampled at a time; changes nothing but memory and rounding.
        commit: tokens that a masked language model reveals in a forward pass; such a model is not sampled here.

    Returns:
        ``questions``, ``accuracy`` (greedy); and, with samples, ``pass@1``, ``pass@2``, ``pass@4``, ... up to
        ``n_samples``, ``entropy`` (nats per sampled token, exact over the vocabulary at ``temperature``),
        ``entropy/top`` (its upper fifth), ``distinct`` and ``distinct_right`` (different answers, and different right
        ones, per question), ``length`` (tokens) and ``finished`` (share that ended by itself).

    Raises:
        DataError: the data set has no checker or no record, or samples of a masked language model are asked for.

    Examples:
        >>> from leibler.data import Addition
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> task = Addition(digits=1)
        >>> model = tiny_llama(character_tokenizer(task.alphabet), hidden=16, layers=1, heads=2)
        >>> found = evaluate(model, task.dataset(4), n_samples=2, max_new_tokens=3)
        >>> found["questions"], found["pass@1"] <= found["pass@2"]
        (4, True)
    """
    check = dataset.checker()
    if not len(dataset):
        raise DataError(f"{dataset.name} is empty; give at least one record.")
    if n_samples and temperature <= 0:
        raise DataError(f"samples cannot be drawn at temperature {temperature}; give one above 0, or n_samples=0.")
    if isinstance(model, MaskedLM) and n_samples:
        raise DataError("a masked language model is asked for its surest answers only; give --samples 0 (n_samples=0).")
    prompts = [model.encode_prompt(record.prompt) for record in dataset]
    answers = greedy(model, prompts, max_new_tokens, batch_size, commit)
    right = [check(r, model.decode(ids)) >= 1.0 for r, ids in zip(dataset, answers)]
    result: dict[str, Any] = {"questions": len(prompts), "accuracy": sum(right) / len(right)}
    if isinstance(model, MaskedLM) or not n_samples:
        return result
    numbers = uniforms(seed, "evaluate", 0, rows=len(prompts) * n_samples, n=max_new_tokens)
    drawn = sample(
        model, prompts, uniforms=numbers, temperature=temperature, group_size=n_samples, max_batch=batch_size
    )
    completions = drawn.completions()
    counts, distinct, distinct_right = [], 0, 0
    for i, record in enumerate(dataset):
        answers = [model.decode(ids) for ids in completions[i * n_samples : (i + 1) * n_samples]]
        correct = [answer for answer in answers if check(record, answer) >= 1.0]
        counts.append(len(correct))
        distinct += distinct_answers(answers)
        distinct_right += distinct_answers(correct)
    k = 1
    while k <= n_samples:
        result[f"pass@{k}"] = mean_pass_at_k(n_samples, counts, k)
        k *= 2
    pairs = [(prompts[i // n_samples], ids) for i, ids in enumerate(completions)]
    found = entropy_summary(_entropies(model, pairs, temperature, batch_size))
    return result | {
        "entropy": found.mean,
        "entropy/top": found.top,
        "distinct": distinct / len(prompts),
        "distinct_right": distinct_right / len(prompts),
        "length": sum(map(len, completions)) / len(completions),
        "finished": float(drawn.finished.double().mean()),
    }


@dataclass(frozen=True)
class TokenView:
    """One token of a text and how two models saw it coming.

    Args:
        text: the token as text.
        token: its id.
        model_logp: its log-probability (nats) under the model.
        target_logp: the same under the target.
        forward_kl: KL(target || model) of the next-token laws at this place, nats.
        reverse_kl: KL(model || target).
        model_top: the model's most likely tokens with their probabilities, from the most likely down.
        target_top: the target's.
    """

    text: str
    token: int
    model_logp: float
    target_logp: float
    forward_kl: float
    reverse_kl: float
    model_top: tuple[tuple[str, float], ...]
    target_top: tuple[tuple[str, float], ...]


def token_view(
    model: CausalLM, target: CausalLM, text: str, *, prompt: str = "", top: int = 5, end: bool = True
) -> list[TokenView]:
    """Each token of a text with both divergences at its place and what both models would have preferred.

    Args:
        model: the model, p.
        target: the target, q; of the same tokenizer.
        text: what to look at.
        prompt: what stands before it and is not looked at; without one the text follows the begin token.
        top: how many alternatives.
        end: look at the end-of-sequence token after the text as well.

    Raises:
        DataError: the text has no token.
        ModelError: the tokenizers differ, or the text is longer than a model's context.

    Examples:
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> tokenizer = character_tokenizer("01+=")
        >>> one, two = (tiny_llama(tokenizer, hidden=16, layers=1, heads=2, seed=seed) for seed in (0, 1))
        >>> [view.text for view in token_view(one, two, "10", prompt="1+1=", end=False)]
        ['1', '0']
    """
    same_tokenizer(model, target, ("model", "target"))
    ids = model.encode_completion(text)
    ids = ids if end else ids[:-1]
    if not ids:
        raise DataError("the text to look at has no token; give some text, or end=True.")
    rows = _padded(model, [(model.encode_prompt(prompt), ids)])
    token = rows[0][:, 1:][rows[2]]
    with torch.no_grad(), evaluating(model, target):
        p, q = _linear(model, *rows), _linear(target, *rows)
        wants = [Want(ForwardKL(), 0), Want(ReverseKL(), 0), Want(SampledLogProb())]
        forward, reverse, logp = functionals(p, wants, [TargetRows((q,))], token=token, vocab=model.vocab_size).tolist()
        (target_logp,) = functionals(q, wants[2:], token=token, vocab=model.vocab_size).tolist()
        tops = [_top(model, side, top) for side in (p, q)]
    texts = [_token_text(model, i) for i in ids]
    return [TokenView(*values) for values in zip(texts, ids, logp, target_logp, forward, reverse, *tops, strict=True)]


# -- shared ----------------------------------------------------------------------------------------------------------

_Rows = tuple[Tensor, Tensor, Tensor]


def _named(divergences: Sequence[Divergence]) -> dict[str, Divergence]:
    named: dict[str, Divergence] = {}
    for divergence in divergences:
        name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(divergence).__name__).lower()
        # Two of one class, such as two skews, are told apart by their parameters.
        named[name if name not in named else repr(divergence)] = divergence
    return named


def _side(nll: Tensor, entropy: Tensor, found: Calibration) -> dict[str, Any]:
    mean = nll.mean()
    return {
        "nll": float(mean),
        "perplexity": float(mean.exp()),
        "entropy": float(entropy.mean()),
        "accuracy": found.accuracy,
        "calibration_error": found.error,
        "reliability": [asdict(part) for part in found.bins],
    }


def _padded(model: CausalLM, pairs: Sequence[tuple[list[int], list[int]]]) -> _Rows:
    tokens, attention, mask = right_pad(pairs, model.pad_id)
    return tokens.to(model.device), attention.to(model.device), mask.to(model.device)


def _batches(model: CausalLM, records: Iterable[Record], batch_size: int) -> Iterator[_Rows]:
    pairs = []
    for record in records:
        if record.completion is None:
            where = record.source or repr(record.prompt[:60])
            raise DataError(f"{where} has no 'completion' to measure on; add one to each record.")
        pairs.append((model.encode_prompt(record.prompt), model.encode_completion(record.completion)))
    if not pairs:
        raise DataError("there is no record to measure on; give at least one with a completion.")
    yield from _cut(model, pairs, batch_size)


def _cut(model: CausalLM, pairs: list[tuple[list[int], list[int]]], batch_size: int) -> Iterator[_Rows]:
    for part in by_length(pairs, batch_size):
        yield _padded(model, [pairs[i] for i in part])


def greedy(
    model: CausalLM | MaskedLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    commit: int = 1,
) -> list[list[int]]:
    """The most likely answer to each prompt, token by token (of a masked model: ``commit`` in a pass, surest first)."""
    if isinstance(model, MaskedLM):
        found = decode_masked(model, prompts, length=max_new_tokens, commit=commit, max_batch=batch_size)
        return found.completions()
    none = torch.zeros((len(prompts), max_new_tokens), dtype=torch.float64)
    return sample(model, prompts, uniforms=none, temperature=0.0, max_batch=batch_size).completions()


def _linear(model: CausalLM, tokens: Tensor, attention: Tensor, mask: Tensor, temperature: float = 1.0) -> Linear:
    """The head at the positions that predict a token of a completion."""
    check_causal(model)
    hidden = model(tokens.to(model.device), attention.to(model.device))[:, :-1][mask.to(model.device)]
    tensors = model.linear(hidden).tensors
    return Linear.of([None if t is None else t.to(tokens.device) for t in tensors], temperature)


def _entropies(
    model: CausalLM, pairs: list[tuple[list[int], list[int]]], temperature: float, batch_size: int
) -> Tensor:
    parts = []
    with torch.no_grad(), evaluating(model):
        for rows in _cut(model, pairs, batch_size):
            head = _linear(model, *rows, temperature=temperature)
            parts.append(functionals(head, [Want(cast(Functional, Entropy()))], vocab=model.vocab_size)[0].cpu())
    return torch.cat(parts)


def _top(model: CausalLM, head: Linear, top: int) -> list[tuple[tuple[str, float], ...]]:
    found = []
    bias = None if head.bias is None else head.bias[: model.vocab_size]
    for start in range(0, head.tokens, 64):  # not the logits of a whole document at once
        parts = (h[start : start + 64].float() @ w[: model.vocab_size].float().t() for h, w in head.products)
        logits = sum(parts, torch.zeros(())) if bias is None else sum(parts, bias.float())
        best = torch.softmax(logits, -1).topk(min(top, model.vocab_size), -1)
        for values, ids in zip(best.values.tolist(), best.indices.tolist()):
            found.append(tuple((_token_text(model, i), value) for i, value in zip(ids, values)))
    return found


def _token_text(model: CausalLM, token: int) -> str:
    """A token as text, special ones by their name."""
    return cast(str, model.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False))
