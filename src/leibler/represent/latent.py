"""Reasoning compressed into laws over the vocabulary: the encoder that makes the data of the recipe ``latent-sft``.

The encoder, a copy of the language model, reads question and reasoning and a compress token for each segment of the
reasoning. Its hidden state h there gives a law ``w = softmax(W h)``, and the decoder, another copy, reads ``W^T w``: a
thought is a point in the convex hull of the embedding's rows, nothing else. Both learn so that the decoder answers from
question and thoughts alone.

Source: Latent Reasoning in LLMs as a Vocabulary-Space Superposition (2025). The attention masks and the schedule of
freezing are reconstructed from its description.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from leibler.divergence import SampledLogProb
from leibler.errors import DataError
from leibler.fused import Want, functionals
from leibler.policy import CausalLM, right_pad
from leibler.policy.latent import CLOSE, OPEN, embedding_rows, logits, marker

if TYPE_CHECKING:
    from leibler.data import Record


@dataclass(frozen=True)
class Example:
    """The tokens of one record.

    Args:
        question, reasoning, answer: its parts; the answer is ended.
    """

    question: list[int]
    reasoning: list[int]
    answer: list[int]

    def thoughts(self, rate: int) -> int:
        """How many segments the reasoning has."""
        return -(-len(self.reasoning) // rate)


def read(record: Record, model: CausalLM, open: str = OPEN, close: str = CLOSE) -> Example:
    """Question, reasoning and answer: of the columns ``prompt``, ``reasoning`` and ``completion``; without the second,
    the reasoning stands in the completion, between the markers as text.

    Raises:
        DataError: there is no reasoning or no answer.

    Examples:
        >>> from leibler.data import Record
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> model = tiny_llama(character_tokenizer("<think>/0123+="), hidden=16, layers=1, heads=2)
        >>> found = read(Record("1+2=", completion="<think>1+1+1</think>3"), model)
        >>> model.decode(found.reasoning), model.decode(found.answer)
        ('1+1+1', '3')
    """
    reasoning, answer = record.get("reasoning"), record.completion or ""
    if reasoning is None and close in answer:
        reasoning, _, answer = answer.partition(close)
        reasoning = reasoning.strip().removeprefix(open).strip()
        answer = answer.lstrip("\n")
    if not isinstance(reasoning, str) or not reasoning or not answer:
        raise DataError(
            f"{record.source or 'a record'} has no reasoning before its answer; give the columns 'prompt', 'reasoning' "
            f"and 'completion', or completions such as '{open}...{close}answer'."
        )
    tokens = list(model.tokenizer.encode(reasoning, add_special_tokens=False))
    return Example(model.encode_prompt(record.prompt), tokens, model.encode_completion(answer))


@dataclass(frozen=True, eq=False)
class Layout:
    """What the encoder reads: question, reasoning and, after them, the compress tokens.

    Args:
        tokens: ``[batch length]``; anything at compress tokens.
        compress: ``[batch length]`` where they are.
        positions: ``[batch length]`` a compress token's is that of the token after its segment.
        visible: ``[batch length length]`` which tokens (last) each token sees.
    """

    tokens: Int[Tensor, "batch length"]
    compress: Bool[Tensor, "batch length"]
    positions: Int[Tensor, "batch length"]
    visible: Bool[Tensor, "batch length length"]


def layout(examples: Sequence[Example], rate: int, span: int) -> Layout:
    """Lay a batch out for the encoder.

    Text sees the text before it, and no compress token. The compress token of a segment sees the question, this segment
    and the ``span - 1`` before it (all, for a span of 0), and itself; no other compress token, so each law is a
    function of the text alone. Padding sees itself only.

    Examples:
        >>> found = layout([Example([1], [2, 3, 4], [5])], rate=2, span=1)
        >>> found.tokens.tolist(), found.positions.tolist()
        ([[1, 2, 3, 4, 0, 0]], [[0, 1, 2, 3, 3, 4]])
        >>> found.visible[0, 4:].int().tolist()
        [[1, 1, 1, 0, 1, 0], [1, 0, 0, 1, 0, 1]]
    """
    counts = [(len(e.question), len(e.reasoning), e.thoughts(rate)) for e in examples]
    length = max(sum(c) for c in counts)
    tokens, positions = (torch.zeros(len(examples), length, dtype=torch.long) for _ in range(2))
    # The segment of each token: -1 in the question.
    segment = torch.full((len(examples), length), -1)
    compress, text = (torch.zeros(len(examples), length, dtype=torch.bool) for _ in range(2))
    for row, (example, (question, reasoning, thoughts)) in enumerate(zip(examples, counts, strict=True)):
        words = question + reasoning
        tokens[row, :words] = torch.tensor([*example.question, *example.reasoning])
        ends = (torch.arange(1, thoughts + 1) * rate).clamp(max=reasoning)
        positions[row, : words + thoughts] = torch.cat([torch.arange(words), question + ends])
        segment[row, question:words] = torch.arange(reasoning) // rate
        segment[row, words : words + thoughts] = torch.arange(thoughts)
        text[row, :words], compress[row, words : words + thoughts] = True, True
    back = segment[:, :, None] - segment[:, None, :]
    near = (segment[:, None, :] < 0) | ((back >= 0) & (back < (span or length)))
    order = torch.arange(length)
    seen = torch.where(compress[:, :, None], near, order[None, :, None] >= order)
    visible = (seen & text[:, None, :] & (text | compress)[:, :, None]) | torch.eye(length, dtype=torch.bool)
    return Layout(tokens, compress, positions, visible)


class Encoder(nn.Module):
    """A language model that reads compress tokens, one vector of its own, and tells a law at each of them.

    Args:
        model: the language model; it is trained in place.
        never: entries that no thought gives anything: the markers, and what ends or pads a text. (A law whose most
            likely entry is the closing marker would say that thinking is over.)
    """

    def __init__(self, model: CausalLM, never: Sequence[int]) -> None:
        super().__init__()
        self.model = model
        self.compress = nn.Parameter(embedding_rows(model).detach().mean(0).clone())
        self.never: Tensor
        self.register_buffer("never", torch.tensor(sorted(set(never)), device=model.device), persistent=False)

    def forward(self, batch: Layout) -> Float[Tensor, "thoughts vocab"]:
        """The laws at the compress tokens of all rows, laid end to end."""
        model, device = self.model, self.model.device
        compress = batch.compress.to(device)
        embedded = model.embed(batch.tokens.to(device))
        embedded = torch.where(compress[..., None], self.compress.to(embedded.dtype), embedded)
        mask = torch.zeros(batch.visible.shape, dtype=embedded.dtype, device=device)
        mask.masked_fill_(~batch.visible.to(device), torch.finfo(embedded.dtype).min)
        found = model.hidden(
            batch.tokens.to(device), mask[:, None], batch.positions.to(device), embedded, use_cache=False
        )
        z = logits(model, found.last_hidden_state[compress])
        return z.index_fill(-1, self.never, -torch.inf).softmax(-1)


def answer_logp(
    decoder: CausalLM,
    examples: Sequence[Example],
    laws: Float[Tensor, "thoughts vocab"],
    counts: Sequence[int],
    open: str = OPEN,
    close: str = CLOSE,
) -> Float[Tensor, " events"]:
    """Log-probability (nats) of each answer token given question and thoughts; differentiable in the laws.

    The decoder reads question, opening marker, thoughts, closing marker and answer, and never the reasoning. No
    gradient goes through a thought into the embedding, which the laws are read by.

    Args:
        decoder: the model.
        examples: the records.
        laws: the thoughts of all rows, laid end to end.
        counts: thoughts of each row.
        open, close: the markers.
    """
    first, last = marker(decoder, open), marker(decoder, close)
    pairs = [([*e.question, first, *[first] * m, last], e.answer) for e, m in zip(examples, counts, strict=True)]
    decoder.check_length(max(len(p) + len(a) for p, a in pairs))
    tokens, attention, mask = (x.to(decoder.device) for x in right_pad(pairs))
    soft = torch.zeros_like(attention)
    for row, (example, m) in enumerate(zip(examples, counts, strict=True)):
        soft[row, len(example.question) + 1 : len(example.question) + 1 + m] = True
    matrix = embedding_rows(decoder).detach()
    embedded = decoder.embed(tokens)
    embedded = embedded.masked_scatter(soft[..., None], (laws.to(matrix.dtype) @ matrix).to(embedded.dtype))
    hidden = decoder.hidden(tokens, attention, embedded=embedded, use_cache=False).last_hidden_state[:, :-1][mask]
    wants = [Want(SampledLogProb())]
    return functionals(decoder.linear(hidden), wants, token=tokens[:, 1:][mask], vocab=decoder.vocab_size)[0]
