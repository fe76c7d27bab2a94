"""Rollouts: completions sampled in batches, each row from its own uniform numbers.

What a row draws is decided by its prompt, the models and its row of ``uniforms`` alone: not by its batch mates, the
size of the sub-batches, or who finished early. (Floating-point sums may differ in their last bits between batch
shapes, so a draw can differ where a uniform number falls within about 1e-7 of a boundary.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from leibler.errors import DataError, ModelError
from leibler.policy.decode import decoder
from leibler.policy.draw import invert, law_
from leibler.policy.model import CausalLM, check_causal, evaluating
from leibler.policy.tokenizers import same_tokenizer

_COMPACT_AT = 0.25
"""Finished rows are dropped from the batch when they are this share of it; each drop copies the cache once."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Completions, right-padded.

    Args:
        tokens: the completions without their prompts; the padding id where ``mask`` is False.
        mask: the tokens that were sampled, the stop token included.
        logp: log-probability (nats) of each token under the law it was sampled from (temperature, mixture and nucleus
            included): the behaviour's log-probs. 0 where ``mask`` is False.
        finished: rows that ended with a stop token rather than at the limit.
    """

    tokens: Int[Tensor, "batch time"]
    mask: Bool[Tensor, "batch time"]
    logp: Float[Tensor, "batch time"]
    finished: Bool[Tensor, " batch"]

    def completions(self) -> list[list[int]]:
        """The sampled tokens of each row, as lists."""
        lengths = self.mask.sum(1).tolist()
        return [row[:length] for row, length in zip(self.tokens.tolist(), lengths, strict=True)]


def sample(
    models: CausalLM | Sequence[tuple[CausalLM, float]],
    prompts: Sequence[Sequence[int]],
    *,
    uniforms: Float64[Tensor, "batch max_new"],
    temperature: float = 1.0,
    top_p: float | None = None,
    group_size: int = 1,
    limits: Sequence[int] | None = None,
    max_batch: int | None = None,
) -> Samples:
    """Sample ``group_size`` completions of each prompt from a model or a mixture of models.

    At each token the law is ``sum_i w_i softmax(logits_i / temperature)``: probabilities are mixed, as in
    MiniLLM: Knowledge Distillation of Large Language Models (2024). Row ``i`` takes at step ``t`` the first token whose
    cumulative probability exceeds ``uniforms[i, t]``. Equal prompts are read once.

    Args:
        models: one model, or models with weights that sum to 1 and one tokenizer.
        prompts: token ids; row ``i`` of the result continues ``prompts[i // group_size]``.
        uniforms: numbers in [0, 1), one row per completion (``len(prompts) * group_size``); their second dimension is
            the largest number of new tokens. See ``randomness.uniforms``.
        temperature: divides the logits; 0 takes the most likely token and ignores the numbers in ``uniforms``.
        top_p: keep the smallest set of most likely tokens with this probability, and renormalise.
        group_size: completions per prompt.
        limits: the largest number of new tokens for each prompt, where they differ: 1 to the columns of ``uniforms``.
        max_batch: sample at most so many rows at a time; all at once when not given.

    Raises:
        DataError: prompts, uniforms and limits do not fit, or a prompt is empty.
        ModelError: prompt and completion would exceed a model's context, or the models' tokenizers differ.

    Examples:
        >>> from leibler.policy import character_tokenizer, tiny_llama, randomness
        >>> model = tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2)
        >>> numbers = randomness.uniforms(0, "rollout", 0, rows=4, n=5)
        >>> prompts = [model.encode_prompt("1+2="), model.encode_prompt("3=")]
        >>> samples = sample(model, prompts, uniforms=numbers, group_size=2)
        >>> samples.tokens.shape[0], bool((samples.logp <= 0).all())
        (4, True)
    """
    mixture = _mixture(models)
    main = mixture[0][0]
    _check(mixture, prompts, uniforms, temperature, top_p, group_size, limits, max_batch)
    device = main.device
    limit = uniforms.shape[1]
    # Rows sorted by prompt, so that padding is small and the rows of a group stay together.
    rows = sorted(range(uniforms.shape[0]), key=lambda row: len(prompts[row // group_size]))
    dtype = torch.float64 if main.head()[0].dtype == torch.float64 else torch.float32
    tokens = torch.full((len(rows), limit), main.pad_id, dtype=torch.long, device=device)
    logp = torch.zeros((len(rows), limit), dtype=dtype, device=device)
    length = torch.zeros(len(rows), dtype=torch.long, device=device)
    finished = torch.zeros(len(rows), dtype=torch.bool, device=device)
    ends = torch.tensor([limit] * len(prompts) if limits is None else limits, dtype=torch.long, device=device)
    ends = ends.repeat_interleave(group_size)
    step = max_batch or max(len(rows), 1)
    with torch.inference_mode(), evaluating(*(model for model, _ in mixture)):
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            law = _Law([model for model, _ in mixture], [weight for _, weight in mixture], temperature, top_p)
            law.read([tuple(prompts[row // group_size]) for row in part], limit)
            _roll(law, torch.tensor(part, device=device), uniforms.to(device), ends, (tokens, logp, length, finished))
    longest = int(length.max()) if len(rows) else 0
    mask = torch.arange(longest, device=device) < length[:, None]
    # clone: tensors made in inference mode cannot be saved for a backward pass.
    return Samples(tokens[:, :longest].clone(), mask, logp[:, :longest].clone(), finished.clone())


class _Law:
    """The sampling law of a batch of rows, advanced token by token: models, their caches and what was attended to."""

    def __init__(self, models: list[CausalLM], weights: list[float], temperature: float, top_p: float | None) -> None:
        self.models, self.weights = models, weights
        self.temperature, self.top_p = temperature, top_p
        self.heads: list[tuple[Tensor, Tensor | None]] = []
        self.buffers: dict[int, Tensor] = {}
        for model in models:
            weight, bias = model.head()
            # Rows beyond the tokenizer are padding of the matrix, never tokens.
            self.heads.append((weight[: model.vocab_size], None if bias is None else bias[: model.vocab_size]))

    def read(self, prompts: list[tuple[int, ...]], limit: int) -> None:
        """Prefill each different prompt once, then one row of the cache for each of ``prompts``."""
        distinct = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        longest = max(map(len, distinct))
        device = self.models[0].device
        tokens = torch.full((len(distinct), longest), self.models[0].pad_id, dtype=torch.long, device=device)
        attention = torch.zeros((len(distinct), longest + limit), dtype=torch.bool, device=device)
        attention[:, longest:] = True
        for prompt, number in distinct.items():
            tokens[number, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            attention[number, longest - len(prompt) : longest] = True
        self.decoders = [decoder(model) for model in self.models]
        self.used, self.padded = longest, not bool(attention.all())
        self.attention = attention
        self.next_position = attention[:, :longest].sum(1)
        self.last_position = min(longest + limit, *(m.context or longest + limit for m in self.models)) - 1
        self.states = [one.read(tokens, attention[:, :longest], limit) for one in self.decoders]
        if len(distinct) < len(prompts):
            self.keep(torch.tensor([distinct[prompt] for prompt in prompts], device=device))

    def keep(self, index: Tensor) -> None:
        """Go on with the rows ``index`` (repeats allowed)."""
        for one in self.decoders:
            one.keep(index)
        self.attention, self.next_position = self.attention[index], self.next_position[index]
        self.states = [state[index] for state in self.states]

    def advance(self, token: Tensor) -> None:
        """Append one token to each row."""
        self.used += 1
        attention = self.attention[:, : self.used] if self.padded else None
        self.states = [one.advance(token, attention, self.next_position) for one in self.decoders]
        self.next_position = self.next_position + 1
        # A row that has its tokens goes on beside the others, unread; its positions must still be some.
        self.next_position.clamp_(max=self.last_position)

    def draw(self, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """One token for each row, with its log-probability under the law that it was drawn from."""
        logits = [self._logits(number) for number in range(len(self.models))]
        if self.temperature > 0:
            return invert(law_(logits, self.weights, self.top_p), uniform)
        token = (logits[0] if len(logits) == 1 else law_(logits, self.weights)).argmax(-1)
        return token, torch.zeros_like(token, dtype=logits[0].dtype)  # the greedy law gives it probability 1

    def _logits(self, number: int) -> Tensor:
        """Base-2 logits at the temperature, in a buffer that the next call overwrites."""
        weight, bias = self.heads[number]
        state = self.states[number]
        scale = math.log2(math.e) / (self.temperature or 1.0)
        adapters = self.models[number].low_rank(state)
        if weight.dtype not in (torch.float32, torch.float64):  # scaled before the product it would be rounded twice
            logits = torch.nn.functional.linear(state, weight, bias).float()
            for pair in adapters:
                logits += (pair.hidden @ pair.weight[: weight.shape[0]].t()).float()
            return logits.mul_(scale)
        if number not in self.buffers:
            self.buffers[number] = state.new_empty((state.shape[0], weight.shape[0]))
        out = torch.mm(state * scale, weight.t(), out=self.buffers[number][: state.shape[0]])
        for pair in adapters:
            out.addmm_(pair.hidden.to(out.dtype), pair.weight[: weight.shape[0]].to(out.dtype).t(), alpha=scale)
        return out if bias is None else out.add_(bias * scale)


def _roll(law: _Law, rows: Tensor, uniforms: Tensor, ends: Tensor, out: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Sample until every row has stopped or has its ``ends`` tokens; writes row ``rows[j]`` of the outputs."""
    tokens, logp, length, finished = out
    stop = torch.tensor(law.models[0].stop_ids, device=rows.device)
    live = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for step in range(uniforms.shape[1]):
        token, value = law.draw(uniforms[rows, step])
        where = rows[live]
        tokens[where, step], logp[where, step] = token[live], value[live].to(logp.dtype)
        length[where] += 1
        ended = live & torch.isin(token, stop)
        finished[rows[ended]] = True
        live = live & ~ended & (ends[rows] > step + 1)
        left = int(live.sum())
        if not left:
            return
        if left <= (1 - _COMPACT_AT) * len(rows):
            index = live.nonzero()[:, 0]
            law.keep(index)
            rows, token, live = rows[index], token[index], live[index]
        law.advance(token)


def _mixture(models: CausalLM | Sequence[tuple[CausalLM, float]]) -> list[tuple[CausalLM, float]]:
    check_causal(models)
    if isinstance(models, CausalLM):
        return [(models, 1.0)]
    mixture = [(model, float(weight)) for model, weight in models if weight != 0]
    if not mixture or any(weight < 0 for _, weight in mixture) or abs(sum(weight for _, weight in mixture) - 1) > 1e-6:
        raise ModelError(f"Mixture weights must be non-negative and sum to 1, not {[float(w) for _, w in models]}.")
    check_causal(*(model for model, _ in mixture))
    for other, _ in mixture[1:]:
        same_tokenizer(mixture[0][0], other, ("first model", "other model"))
    return mixture


def _check(
    mixture: list[tuple[CausalLM, float]],
    prompts: Sequence[Sequence[int]],
    uniforms: Tensor,
    temperature: float,
    top_p: float | None,
    group_size: int,
    limits: Sequence[int] | None,
    max_batch: int | None,
) -> None:
    if uniforms.dim() != 2 or uniforms.shape[0] != len(prompts) * group_size:
        raise DataError(
            f"uniforms must have one row per completion: {len(prompts)} prompts times {group_size} rows, "
            f"not shape {tuple(uniforms.shape)}."
        )
    if uniforms.dtype != torch.float64 or (uniforms.numel() and not bool(((uniforms >= 0) & (uniforms < 1)).all())):
        raise DataError(
            "uniforms must be float64 numbers in [0, 1); draw them with leibler.policy.randomness.uniforms."
        )
    if limits is not None and (len(limits) != len(prompts) or not all(1 <= n <= uniforms.shape[1] for n in limits)):
        raise DataError(f"limits must be {len(prompts)} numbers from 1 to {uniforms.shape[1]}, one per prompt.")
    if temperature < 0:
        raise DataError(f"temperature must be at least 0, not {temperature}.")
    if top_p is not None and not 0 < top_p <= 1:
        raise DataError(f"top_p must be above 0 and at most 1, not {top_p}.")
    if group_size < 1 or (max_batch is not None and max_batch < 1):
        raise DataError(f"group_size and max_batch must be at least 1, not {group_size} and {max_batch}.")
    ends = [uniforms.shape[1]] * len(prompts) if limits is None else limits
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"Prompt {number} is empty; start it with the begin token (encode_prompt does).")
    for model, _ in mixture:
        model.check_cache()
        # Padding in front of a shorter prompt is no position of its row.
        model.check_length(max((len(p) + n for p, n in zip(prompts, ends, strict=True)), default=0))
