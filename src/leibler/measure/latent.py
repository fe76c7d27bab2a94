"""What thoughts that are laws over the vocabulary hold: how much reasoning, and how many paths of it at once.

Source: Latent Reasoning in LLMs as a Vocabulary-Space Superposition (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.errors import DataError
from leibler.policy.latent import CLOSE, OPEN, decode_latent, embedding_rows
from leibler.policy.randomness import generator

if TYPE_CHECKING:
    from leibler.data import Dataset, Record
    from leibler.policy import CausalLM

Pairs = list[tuple[int, int]]
_LEAST = 1e-9
"""Stands for a segment of which a thought holds nothing."""


def effective_compression(explicit: Sequence[int], thoughts: Sequence[int]) -> float:
    """Tokens of explicit reasoning for each thought that stands for it, over all questions.

    Examples:
        >>> effective_compression([12, 8], [3, 2])
        4.0
    """
    if len(explicit) != len(thoughts) or not sum(thoughts):
        raise DataError("a compression needs a number of tokens and of thoughts for each question, and some thought.")
    return sum(explicit) / sum(thoughts)


def effective_paths(scores: Float[Tensor, " paths"]) -> float:
    """How many of M paths are followed at once: ``exp(H(softmax(scores)))``, from 1 (one of them) to M (all alike).

    Examples:
        >>> [round(effective_paths(torch.tensor(scores)), 6) for scores in ([-1.0, -1.0, -1.0], [0.0, -99.0])]
        [3.0, 1.0]
    """
    logp = scores.double().log_softmax(-1)
    return float((-(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum()).exp())


@dataclass(frozen=True)
class Parallelism:
    """How many alternative solutions a chain of thoughts follows.

    Args:
        paths: effective number of paths, 1 to M.
        random: its mean with thoughts and segments matched at random.
        scores: of each path: the mean log-mass (nats) that its thoughts give to its segments.
    """

    paths: float
    random: float
    scores: tuple[float, ...]

    @property
    def ratio(self) -> float:
        """The effective number by that of the random control: what is reported."""
        return self.paths / self.random


def parallelism(
    index: Int[Tensor, "thoughts k"],
    weight: Float[Tensor, "thoughts k"],
    solutions: Sequence[Sequence[Sequence[int]]],
    embedding: Float[Tensor, "vocab hidden"],
    *,
    top_k: int = 100,
    trials: int = 64,
    seed: int = 0,
) -> Parallelism:
    """How far a chain of thoughts is a superposition of M alternative solutions.

    Thoughts are matched with the segments of each solution, most similar pair first, none used twice; similarity is the
    cosine of the thought's mean embedding and the segment's. A solution's score is the mean over its pairs of the log
    of the probability that the thought gives to the segment's tokens; the scores' softmax is the posterior over
    solutions, and its perplexity the effective number of paths.

    Args:
        index, weight: entries and weights of the laws.
        solutions: M alternatives, each a list of segments of tokens.
        embedding: of each token.
        top_k: entries of a law that count.
        trials: random matchings of the control.
        seed: of these.

    Raises:
        DataError: there is no thought, or a solution or a segment is empty.

    Examples:
        >>> index, weight = torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]])
        >>> round(parallelism(index, weight, [[[0]], [[1]]], torch.eye(3)).paths, 6)
        2.0
    """
    if not len(index) or not solutions or not all(len(s) and all(map(len, s)) for s in solutions):
        raise DataError("parallelism needs at least one thought and solutions of segments that are not empty.")
    best = weight.topk(min(top_k, weight.shape[-1]), dim=-1)
    index, weight = index.gather(-1, best.indices), best.values
    matrix = embedding.double()
    thoughts = (matrix[index] * (weight / weight.sum(-1, keepdim=True))[..., None].double()).sum(-2)
    # The log-mass that each thought gives to each segment, and how alike they are.
    held, alike = [], []
    for segments in solutions:
        tokens = [torch.tensor(sorted(set(segment)), device=index.device) for segment in segments]
        mass = [(weight.double() * torch.isin(index, t)).sum(-1) for t in tokens]
        held.append(torch.stack(mass, -1).clamp(min=_LEAST).log())
        means = torch.stack([matrix[torch.tensor(s, device=index.device)].mean(0) for s in segments])
        alike.append(torch.nn.functional.cosine_similarity(thoughts[:, None], means[None], dim=-1))
    scores = torch.stack([_score(h, greedy_matching(a)) for h, a in zip(held, alike, strict=True)])
    source, control = generator(seed, "parallelism"), []
    for _ in range(trials):
        drawn = [_score(h, _random_matching(h.shape[0], h.shape[1], source)) for h in held]
        control.append(effective_paths(torch.stack(drawn)))
    random = sum(control) / len(control) if control else 1.0
    return Parallelism(effective_paths(scores), random, tuple(scores.tolist()))


def greedy_matching(similarity: Float[Tensor, "thoughts segments"]) -> Pairs:
    """Pairs, most similar first, with no row and no column used twice.

    Examples:
        >>> greedy_matching(torch.tensor([[0.9, 0.8], [0.7, 0.1]]))
        [(0, 0), (1, 1)]
    """
    rows, columns = similarity.shape
    pairs: Pairs = []
    for place in similarity.flatten().argsort(descending=True, stable=True).tolist():
        row, column = divmod(place, columns)
        if all(row != r and column != c for r, c in pairs):
            pairs.append((row, column))
        if len(pairs) == min(rows, columns):
            break
    return pairs


def _random_matching(rows: int, columns: int, source: torch.Generator) -> Pairs:
    count = min(rows, columns)
    first, second = (torch.randperm(n, generator=source)[:count].tolist() for n in (rows, columns))
    return list(zip(first, second, strict=True))


def _score(held: Tensor, pairs: Pairs) -> Tensor:
    return torch.stack([held[pair] for pair in pairs]).mean()


def evaluate_latent(
    model: CausalLM,
    dataset: Dataset,
    *,
    max_latent: int = 64,
    max_new_tokens: int = 64,
    open: str = OPEN,
    close: str = CLOSE,
    top_k: int | None = None,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """How a model answers that thinks in laws, and what its thoughts are worth.

    Args:
        model: trained by ``latent-sft``.
        dataset: questions; with answers, the accuracy is measured; with the column ``reasoning``, the compression; with
            the column ``paths`` (alternative solutions, each a list of texts of segments), the parallelism.
        max_latent, max_new_tokens, open, close, top_k: see `leibler.policy.latent.decode_latent`.
        batch_size: questions at a time.
        progress: called with the questions done, and all of them.

    Returns:
        ``questions``, ``thoughts`` (mean number), ``closed`` (the share that stopped thinking by itself), and
        ``accuracy``, ``compression``, ``paths``, ``paths/random``, ``paths/ratio`` where they can be measured.

    Raises:
        DataError: there is no question, or the column ``paths`` does not hold lists of texts.
    """
    if not len(dataset):
        raise DataError(f"{dataset.name} is empty; give at least one question.")
    right, explicit, steps, found = 0, [], [], []
    closed = 0
    matrix = embedding_rows(model).detach()
    for start in range(0, len(dataset), batch_size):
        records = dataset.records[start : start + batch_size]
        prompts = [model.encode_prompt(r.prompt) for r in records]
        out = decode_latent(
            model, prompts, max_latent=max_latent, max_new_tokens=max_new_tokens, open=open, close=close, top_k=top_k,
            keep=100,
        )  # fmt: skip
        closed += int(out.closed.sum())
        for row, (record, tokens) in enumerate(zip(records, out.answers.completions(), strict=True)):
            count = int(out.steps[row])
            steps.append(count)
            if dataset.check is not None:
                right += dataset.check(record, model.decode(tokens)) >= 1.0
            if isinstance(record.get("reasoning"), str):
                explicit.append((len(_encoded(model, record.get("reasoning"))), count))
            if record.get("paths") and count:
                laws = out.laws.index[row, :count], out.laws.weight[row, :count]
                found.append(parallelism(*laws, _solutions(record, model), matrix))
        progress(min(start + batch_size, len(dataset)), len(dataset))
    result: dict[str, Any] = {"questions": len(dataset), "thoughts": sum(steps) / len(steps)}
    result["closed"] = closed / len(dataset)
    if dataset.check is not None:
        result["accuracy"] = right / len(dataset)
    if sum(count for _, count in explicit):
        result["compression"] = effective_compression([e for e, _ in explicit], [c for _, c in explicit])
    if found:
        paths, random = (sum(getattr(p, name) for p in found) / len(found) for name in ("paths", "random"))
        ratio = sum(p.ratio for p in found) / len(found)
        result |= {"paths": paths, "paths/random": random, "paths/ratio": ratio}
    return result


def _encoded(model: CausalLM, text: str) -> list[int]:
    return list(model.tokenizer.encode(text, add_special_tokens=False))


def _solutions(record: Record, model: CausalLM) -> list[list[list[int]]]:
    paths = record.get("paths")
    if not isinstance(paths, list) or not all(
        isinstance(p, list) and all(isinstance(s, str) for s in p) for p in paths
    ):
        raise DataError(
            f"the column 'paths' of {record.source or 'a record'} must hold alternative solutions, each a list of "
            "texts."
        )
    return [[_encoded(model, segment) for segment in path] for path in paths]
