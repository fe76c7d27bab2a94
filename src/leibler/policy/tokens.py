"""Rows of tokens: padding them into a batch, and the log-probability of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leibler.divergence import SampledLogProb
from leibler.errors import DataError
from leibler.fused import Want, functionals
from leibler.policy.model import CausalLM, check_causal


def right_pad(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int = 0
) -> tuple[Int[Tensor, "batch time"], Bool[Tensor, "batch time"], Bool[Tensor, "batch time-1"]]:
    """Prompts and completions as one right-padded batch.

    Args:
        pairs: (prompt ids, completion ids) of each row.
        pad_id: stands at padding; it is never attended to.

    Returns:
        ``tokens``, ``attention`` (the tokens that are there) and ``mask`` over predictions: ``mask[b, t]`` says that
        position ``t`` predicts ``tokens[b, t + 1]`` and that this is a token of the completion.

    Raises:
        DataError: there is no row, or a prompt is empty (its first completion token is predicted from nothing).

    Examples:
        >>> tokens, attention, mask = right_pad([([5, 6], [7]), ([8], [9, 10, 11])])
        >>> tokens.tolist()
        [[5, 6, 7, 0], [8, 9, 10, 11]]
        >>> mask.int().tolist()
        [[0, 1, 0], [1, 1, 1]]
    """
    if not pairs:
        raise DataError("A batch needs at least one row; the data is empty.")
    for number, (prompt, _) in enumerate(pairs):
        if not len(prompt):
            raise DataError(f"Row {number} has an empty prompt; start it with the begin token (encode_prompt does).")
    length = max(len(prompt) + len(completion) for prompt, completion in pairs)
    tokens = torch.full((len(pairs), length), pad_id, dtype=torch.long)
    attention = torch.zeros((len(pairs), length), dtype=torch.bool)
    mask = torch.zeros((len(pairs), max(length - 1, 0)), dtype=torch.bool)
    for row, (prompt, completion) in enumerate(pairs):
        start, end = len(prompt), len(prompt) + len(completion)
        tokens[row, :end] = torch.tensor([*prompt, *completion], dtype=torch.long)
        attention[row, :end] = True
        mask[row, start - 1 : max(end - 1, start - 1)] = True
    return tokens, attention, mask


def logprobs(
    model: CausalLM,
    tokens: Int[Tensor, "batch time"],
    attention: Bool[Tensor, "batch time"],
    mask: Bool[Tensor, "batch time-1"],
    *,
    temperature: float = 1.0,
) -> Float[Tensor, " events"]:
    """Log-probability (nats) of each token that ``mask`` marks, flat in row-major order; differentiable in the model.

    The logits of all tokens are never held at once.

    Args:
        model: whose law.
        tokens: as ``right_pad`` returns them (left padding will do as well).
        attention: the tokens that are there.
        mask: ``mask[b, t]`` asks for the log-probability of ``tokens[b, t + 1]``.
        temperature: log-probs of the law proportional to ``p ** (1 / temperature)``.

    Raises:
        ModelError: a masked language model, which would read the tokens themselves.
    """
    check_causal(model)
    head = model.linear(model(tokens, attention)[:, :-1][mask], temperature)
    wants = [Want(SampledLogProb())]
    return functionals(head, wants, token=tokens[:, 1:][mask], vocab=model.vocab_size)[0]
