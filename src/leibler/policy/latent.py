"""Reasoning in laws: a model feeds its own next-token law back as its input until it closes its thoughts, then answers.

Source: Latent Reasoning in LLMs as a Vocabulary-Space Superposition (2025).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from leibler.errors import DataError, ModelError
from leibler.objective.soft import SoftTokens
from leibler.policy.cache import make_cache
from leibler.policy.draw import invert, law_
from leibler.policy.model import CausalLM, check_causal, evaluating
from leibler.policy.sampler import Samples

OPEN, CLOSE = "<think>", "</think>"
"""What stands around thoughts where nothing else is said: the markers of most reasoning models."""


def marker(model: CausalLM, text: str) -> int:
    """The entry of the vocabulary that a marker such as ``<think>`` is.

    Raises:
        ModelError: the tokenizer has no single entry of that text.

    Examples:
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> marker(tiny_llama(character_tokenizer("[]01"), hidden=16, layers=1, heads=2), "[")
        6
    """
    number = model.tokenizer.get_vocab().get(text)
    if number is None:
        raise ModelError(
            f"The tokenizer has no token {text!r}; name tokens that it has with open= and close=, or add it to the "
            f"model with leibler.policy.extend(model, [{text!r}])."
        )
    return number


def embedding_rows(model: CausalLM) -> Float[Tensor, "vocab hidden"]:
    """What each real entry of the vocabulary is read as."""
    embedding = cast(nn.Module, model.pretrained.get_input_embeddings())
    if type(embedding) is nn.Embedding:
        return embedding.weight[: model.vocab_size]
    return embedding(torch.arange(model.vocab_size, device=model.device))


def logits(model: CausalLM, hidden: Float[Tensor, "n hidden"]) -> Float[Tensor, "n vocab"]:
    """The logits over the real entries of the vocabulary, in single precision at least; differentiable."""
    head = model.linear(hidden)
    parts = [(states @ weight[: model.vocab_size].t()) for states, weight in head.products]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    total = total.to(torch.promote_types(total.dtype, torch.float32))
    return total if head.bias is None else total + head.bias[: model.vocab_size]


@dataclass(frozen=True, eq=False)
class Thoughts:
    """Thoughts and the answers after them.

    Args:
        answers: what was written after the closing marker.
        steps: thoughts of each row; the markers do not count.
        closed: rows whose law had the closing marker as its most likely entry; the others were cut at the limit.
        laws: the most likely entries of each thought, renormalised, ``[batch, most steps, k]``; 0 weight beyond the
            row's steps.
    """

    answers: Samples
    steps: Int[Tensor, " batch"]
    closed: Bool[Tensor, " batch"]
    laws: SoftTokens


def decode_latent(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_latent: int = 64,
    max_new_tokens: int = 64,
    open: str = OPEN,
    close: str = CLOSE,
    top_k: int | None = None,
    keep: int = 16,
    temperature: float = 0.0,
    uniforms: Float64[Tensor, "batch max_new"] | None = None,
    max_batch: int | None = None,
) -> Thoughts:
    """Think in laws, then answer in tokens.

    After prompt and opening marker, repeat ``w = softmax(z)``, next input ``sum_v w_v E_v``, until the most likely
    entry of w is the closing marker (or ``max_latent`` laws were read); that marker is read, and decoding goes on with
    tokens.

    Args:
        model: trained to think so, as by the recipe ``latent-sft``.
        prompts: token ids, without the opening marker.
        max_latent: thoughts at most; 0 answers at once.
        max_new_tokens: tokens of the answer at most.
        open, close: the markers.
        top_k: feed back only the k most likely entries, renormalised, as in the data that the model was trained on;
            None: the whole law, as published.
        keep: entries of each thought that are returned.
        temperature: of the answer (not of the thoughts); 0 takes the most likely token.
        uniforms: numbers in [0, 1) for each row, where the answers are sampled: see ``randomness.uniforms``.
        max_batch: rows at a time at most.

    Raises:
        DataError: an option out of range, an empty prompt, or a temperature without numbers.
        ModelError: the markers are no tokens, or the context is too short.

    Examples:
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> model = tiny_llama(character_tokenizer("[]01"), hidden=16, layers=1, heads=2)
        >>> found = decode_latent(model, [model.encode_prompt("01")], max_latent=3, open="[", close="]")
        >>> int(found.steps) <= 3
        True
    """
    _check(model, prompts, max_latent, max_new_tokens, top_k, keep, temperature, uniforms)
    first, last = marker(model, open), marker(model, close)
    size = max_batch or max(len(prompts), 1)
    parts = []
    with torch.inference_mode(), evaluating(model):
        for start in range(0, len(prompts), size):
            some = [[*prompt, first] for prompt in prompts[start : start + size]]
            numbers = None if uniforms is None else uniforms[start : start + size].to(model.device)
            thinker = _Thinker(model, last, top_k, min(keep, model.vocab_size), temperature, numbers)
            parts.append(thinker.run(some, max_latent, max_new_tokens))
    return _joined(parts)


def _check(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_latent: int,
    max_new_tokens: int,
    top_k: int | None,
    keep: int,
    temperature: float,
    uniforms: Tensor | None,
) -> None:
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise DataError("decode_latent needs prompts of at least one token each; encode_prompt makes them so.")
    if max_latent < 0 or max_new_tokens < 1 or keep < 1 or (top_k is not None and top_k < 1):
        raise DataError(
            f"max_latent={max_latent} must be at least 0, and max_new_tokens={max_new_tokens}, keep={keep} and "
            f"top_k={top_k} at least 1."
        )
    if temperature < 0 or (temperature > 0 and uniforms is None):
        raise DataError(f"temperature={temperature:g} must be 0, or above 0 with uniforms= to draw the answers by.")
    if uniforms is not None and (uniforms.shape[0] != len(prompts) or uniforms.shape[1] < max_new_tokens):
        raise DataError(
            f"uniforms must have {len(prompts)} rows of at least {max_new_tokens} numbers, not {list(uniforms.shape)}."
        )
    check_causal(model)
    model.check_cache()
    model.check_length(max(map(len, prompts)) + 2 + max_latent + max_new_tokens)


class _Thinker:
    """A batch of rows, each thinking or answering; all read one input a step."""

    def __init__(
        self, model: CausalLM, close: int, top_k: int | None, keep: int, temperature: float, uniforms: Tensor | None
    ) -> None:
        self.model, self.close, self.top_k, self.keep = model, close, top_k, keep
        self.temperature, self.uniforms = temperature, uniforms
        self.stop = torch.tensor(model.stop_ids, device=model.device)

    def run(self, prompts: list[list[int]], max_latent: int, max_new: int) -> Thoughts:
        rows, device = len(prompts), self.model.device
        longest = max(map(len, prompts))
        tokens = torch.full((rows, longest), self.model.pad_id, dtype=torch.long, device=device)
        seen = torch.zeros((rows, longest), dtype=torch.bool, device=device)
        for row, prompt in enumerate(prompts):
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            seen[row, longest - len(prompt) :] = True
        cache: Any = make_cache(self.model, max_latent + 1 + max_new)
        state = self.model.hidden(tokens, seen, past_key_values=cache, use_cache=True).last_hidden_state[:, -1]
        position = seen.sum(1)
        thinking = torch.ones(rows, dtype=torch.bool, device=device)
        live, closed, finished = thinking.clone(), ~thinking, ~thinking
        steps, length = (torch.zeros(rows, dtype=torch.long, device=device) for _ in range(2))
        index = torch.zeros((rows, max(max_latent, 1), self.keep), dtype=torch.long, device=device)
        weight = torch.zeros(index.shape, device=device)
        out = torch.full((rows, max_new), self.model.pad_id, dtype=torch.long, device=device)
        logp = torch.zeros((rows, max_new), device=device)
        while bool(live.any()):
            z = logits(self.model, state)
            ends = z.argmax(-1) == self.close
            # The closing marker is read where the law asks for it, and where there is no room for another thought.
            closing = thinking & (ends | (steps >= max_latent))
            closed |= thinking & ends
            thought, answering = thinking & ~closing, ~thinking & live
            token = torch.full((rows,), self.close, dtype=torch.long, device=device)
            if bool(answering.any()):
                token[answering], value = self._draw(z[answering], answering, length)
                where = answering.nonzero()[:, 0]
                out[where, length[where]] = token[where]
                logp[where, length[where]] = value.to(logp.dtype)
                length[where] += 1
                finished |= answering & torch.isin(token, self.stop)
                live = live & ~finished & ~(answering & (length >= max_new))
            soft = None
            if bool(thought.any()):
                law = z.softmax(-1)
                best = law.topk(self.keep, dim=-1)
                where = thought.nonzero()[:, 0]
                index[where, steps[where]] = best.indices[where]
                weight[where, steps[where]] = (best.values / best.values.sum(-1, keepdim=True))[where].float()
                soft = self._mixed(law)
                steps[where] += 1
            thinking = thought
            if not bool(live.any()):
                break
            read = self.model.embed(token[:, None])
            if soft is not None:
                read = torch.where(thought[:, None, None], soft[:, None].to(read.dtype), read)
            seen = torch.nn.functional.pad(seen, (0, 1), value=True)
            state = self.model.hidden(
                token[:, None], seen, position[:, None], read, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            position = position + 1
        most, longest = int(steps.max()), int(length.max())
        mask = torch.arange(longest, device=device) < length[:, None]
        answers = Samples(out[:, :longest], mask, logp[:, :longest], finished)
        return Thoughts(answers, steps, closed, SoftTokens(index[:, :most], weight[:, :most]))

    def _mixed(self, law: Tensor) -> Tensor:
        """What a law is read as."""
        rows = embedding_rows(self.model)
        if self.top_k is None or self.top_k >= law.shape[-1]:
            return law.to(rows.dtype) @ rows
        best = law.topk(self.top_k, dim=-1)
        share = best.values / best.values.sum(-1, keepdim=True)
        soft = SoftTokens(best.indices[:, None], share[:, None])
        return self.model.embed(best.indices[:, :1], soft)[:, 0]

    def _draw(self, z: Tensor, which: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
        if self.temperature == 0:
            return z.argmax(-1), torch.zeros(len(z), device=z.device)
        assert self.uniforms is not None
        numbers = self.uniforms[which, length[which]]
        return invert(law_([z * (math.log2(math.e) / self.temperature)], [1.0]), numbers)


def _joined(parts: list[Thoughts]) -> Thoughts:
    """Batches one below the other: ordinary tensors again, which a backward pass may save."""

    def wide(tensors: list[Tensor]) -> Tensor:
        width = max(t.shape[1] for t in tensors)
        ends = [(0, 0) * (t.ndim - 2) + (0, width - t.shape[1]) for t in tensors]
        return torch.cat([torch.nn.functional.pad(t, end) for t, end in zip(tensors, ends, strict=True)])

    tokens, mask, logp = (wide([getattr(p.answers, name) for p in parts]) for name in ("tokens", "mask", "logp"))
    answers = Samples(tokens, mask, logp, torch.cat([p.answers.finished for p in parts]))
    laws = SoftTokens(wide([p.laws.index for p in parts]), wide([p.laws.weight for p in parts]))
    return Thoughts(answers, torch.cat([p.steps for p in parts]), torch.cat([p.closed for p in parts]), laws)
