"""Masked language models: what fills in masked positions from both sides, and how a text is decoded from one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from leibler.errors import DataError, ModelError
from leibler.policy.draw import invert, law_
from leibler.policy.loading import MASKED, masked_architecture
from leibler.policy.model import CausalLM, LanguageModel, evaluating

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LOGITS = 1 << 25
"""Logits held at a time while decoding."""


def _distilbert(network: Any, states: Tensor) -> Tensor:
    return network.vocab_layer_norm(network.activation(network.vocab_transform(states)))


_TRANSFORMS: Mapping[str, Callable[[Any, Tensor], Tensor]] = {
    "bert": lambda network, states: network.cls.predictions.transform(states),
    "modernbert": lambda network, states: network.head(states),
    "distilbert": _distilbert,
}
"""What stands between the base model and the matrix of the head, by the model's type."""


class MaskedLM(LanguageModel):
    """A model that predicts masked positions from what stands on both sides of them: see `LanguageModel`.

    The hidden state of position ``t + 1``, which predicts the token there, is given out at ``t``: so whatever works on
    "the state at ``t`` predicts token ``t + 1``" works on both kinds of model. The mask token itself has probability 0
    everywhere, as in Simple and Effective Masked Diffusion Language Models (2024).

    Args:
        network: a Transformers masked-LM model of type BERT, ModernBERT or DistilBERT, or a PEFT model around one.
        tokenizer: its tokenizer, which must have a mask token. Where it has no end-of-sequence token, its separator
            ends a completion.

    Raises:
        ModelError: another architecture, or no mask token.

    Examples:
        >>> from leibler.policy import character_tokenizer, tiny_masked
        >>> model = tiny_masked(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2)
        >>> model.decode([model.mask_id, *model.encode_completion("12")])
        '12'
    """

    masked: ClassVar[bool] = True

    def __init__(self, network: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        plain: Any = cast(Any, network).get_base_model() if hasattr(network, "peft_config") else network
        kind = getattr(getattr(plain, "config", None), "model_type", type(plain).__name__)
        if kind not in _TRANSFORMS or not type(plain).__name__.endswith("ForMaskedLM"):
            raise ModelError(f"{type(plain).__name__} is not a masked language model that can be used ({MASKED}).")
        if tokenizer.mask_token_id is None:
            raise ModelError("The tokenizer has no mask token; set tokenizer.mask_token.")
        super().__init__(network, tokenizer)

    @property
    def mask_id(self) -> int:
        """The token that stands at a position whose own token is not known."""
        return cast(int, self.tokenizer.mask_token_id)

    @property
    def eos_id(self) -> int:
        eos = self.tokenizer.eos_token_id
        return cast(int, self.tokenizer.sep_token_id if eos is None else eos)

    def _never_predicted(self) -> set[int]:
        return {self.mask_id}

    def _before_head(self, tokens: Tensor, attention: Tensor, embedded: Tensor | None = None) -> Tensor:
        states = super()._before_head(tokens, attention, embedded)
        return _TRANSFORMS[self.pretrained.config.model_type](self.pretrained, states)

    def _predicting(self, states: Tensor) -> Tensor:
        # The first token has none in front of it: its state goes to the end, which predicts nothing.
        return states.roll(-1, dims=1)


def load(source: str | Path, **options: Any) -> CausalLM | MaskedLM:
    """Read a checkpoint of either kind; which it is, its configuration says.

    Args:
        source: a directory or a hub id.
        **options: see `LanguageModel.load`.

    Raises:
        ModelError: in one sentence, why the checkpoint cannot be used.
    """
    return (MaskedLM if masked_architecture(source) else CausalLM).load(source, **options)


@dataclass(frozen=True, eq=False)
class MaskedSamples:
    """Completions decoded from a masked language model, with the order in which their tokens appeared.

    Args:
        tokens: all positions of each completion's canvas, also those behind its end.
        step: the forward pass, from 1, that revealed each token: the state after ``s`` passes has masks where
            ``step > s``.
        passes: how many forward passes there were.
        stop_ids: tokens that end a completion.
    """

    tokens: Int[Tensor, "batch length"]
    step: Int[Tensor, "batch length"]
    passes: int
    stop_ids: tuple[int, ...]

    def completions(self) -> list[list[int]]:
        """The tokens of each row up to its end, the end token included."""
        rows = []
        for row in self.tokens.tolist():
            ends = [i for i, token in enumerate(row) if token in self.stop_ids]
            rows.append(row[: ends[0] + 1] if ends else row)
        return rows


def decode_masked(
    model: MaskedLM,
    prompts: Sequence[Sequence[int]],
    *,
    length: int,
    commit: int = 1,
    temperature: float = 0.0,
    uniforms: Float64[Tensor, "batch length"] | None = None,
    max_batch: int | None = None,
) -> MaskedSamples:
    """Fill ``length`` masked positions after each prompt, the surest first.

    Each forward pass reveals the ``commit`` masked positions of a row whose most likely token is the most probable
    (the earlier ones among equals); ``ceil(length / commit)`` passes reveal all. A position takes the first token whose
    cumulative probability exceeds its own uniform number. Which position is next does not depend on those numbers, so
    with ``commit=1`` and ``temperature=1`` the completion is a sample of the product of the model's own conditionals.
    Source: MaskGIT: Masked Generative Image Transformer (2022); Large Language Diffusion Models (2025).

    Args:
        model: the model.
        prompts: token ids.
        length: positions to fill: the longest completion, its end token included.
        commit: positions revealed by a forward pass (tokens per forward).
        temperature: of the laws that tokens are drawn from; 0 takes the most likely one.
        uniforms: numbers in [0, 1), one for each position; needed above temperature 0. See ``randomness.uniforms``.
        max_batch: decode at most so many rows at a time; all at once when not given.

    Raises:
        DataError: the arguments do not fit each other, or a prompt is empty.
        ModelError: prompt and completion would exceed the model's context.

    Examples:
        >>> from leibler.policy import character_tokenizer, tiny_masked
        >>> model = tiny_masked(character_tokenizer("ab"), hidden=16, layers=1, heads=2)
        >>> found = decode_masked(model, [model.encode_prompt("ab"), model.encode_prompt("b")], length=5, commit=2)
        >>> found.tokens.shape, found.passes, sorted(found.step[0].tolist())
        (torch.Size([2, 5]), 3, [1, 1, 2, 2, 3])
    """
    _check(model, prompts, length, commit, temperature, uniforms, max_batch)
    tokens = torch.full((len(prompts), length), model.mask_id, dtype=torch.long, device=model.device)
    step = torch.zeros_like(tokens)
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
    with torch.inference_mode(), evaluating(model):
        for start in range(0, len(order), max_batch or max(len(order), 1)):
            rows = order[start : start + (max_batch or len(order))]
            numbers = None if uniforms is None else uniforms[rows].to(model.device)
            found = _reveal(model, [prompts[row] for row in rows], length, commit, temperature, numbers)
            tokens[rows], step[rows] = found
    # clone: tensors made in inference mode cannot be saved for a backward pass.
    return MaskedSamples(tokens.clone(), step.clone(), -(-length // commit), model.stop_ids)


def _reveal(
    model: MaskedLM,
    prompts: Sequence[Sequence[int]],
    length: int,
    commit: int,
    temperature: float,
    uniforms: Float64[Tensor, "batch length"] | None,
) -> tuple[Int[Tensor, "batch length"], Int[Tensor, "batch length"]]:
    device = model.device
    starts = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(starts.max()) + length
    tokens = torch.full((len(prompts), width), model.pad_id, dtype=torch.long, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    at = starts[:, None] + torch.arange(length, device=device)
    tokens.scatter_(1, at, model.mask_id)
    attention = torch.arange(width, device=device) < (starts + length)[:, None]
    step = torch.zeros((len(prompts), length), dtype=torch.long, device=device)
    for number in range(1, -(-length // commit) + 1):
        masked = step == 0
        states = model(tokens, attention).gather(1, (at - 1)[..., None].expand(-1, -1, model.hidden_size))
        drawn, top = _drawn(model, states[masked], temperature, None if uniforms is None else uniforms[masked])
        sure = top.new_full(step.shape, -1.0).masked_scatter(masked, top)
        # Stable: the earlier position among equals, on every machine. Every row has as many masks as the others.
        chosen = sure.argsort(dim=1, descending=True, stable=True)[:, : min(commit, length - (number - 1) * commit)]
        tokens.scatter_(1, at.gather(1, chosen), torch.zeros_like(step).masked_scatter(masked, drawn).gather(1, chosen))
        step.scatter_(1, chosen, number)
    return tokens.gather(1, at), step


def _drawn(
    model: MaskedLM, states: Float[Tensor, "n hidden"], temperature: float, uniforms: Float64[Tensor, " n"] | None
) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
    """A token for each state, and the largest probability that any token has there (at temperature 1)."""
    weight, bias = model.head()
    weight, bias = weight[: model.vocab_size], None if bias is None else bias[: model.vocab_size]
    parts: list[tuple[Tensor, Tensor]] = []
    for part in range(0, max(len(states), 1), max(_LOGITS // model.vocab_size, 1)):
        here = slice(part, part + max(_LOGITS // model.vocab_size, 1))
        logits = nn.functional.linear(states[here], weight, bias)
        for pair in model.low_rank(states[here]):
            logits = logits + pair.hidden @ pair.weight[: model.vocab_size].t()
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        best, token = logits.max(-1)
        top = (best - logits.logsumexp(-1)).exp()
        if uniforms is not None and temperature > 0:
            token = invert(law_([logits * (math.log2(math.e) / temperature)], [1.0]), uniforms[here])[0]
        parts.append((token, top))
    return torch.cat([token for token, _ in parts]), torch.cat([top for _, top in parts])


def _check(
    model: MaskedLM,
    prompts: Sequence[Sequence[int]],
    length: int,
    commit: int,
    temperature: float,
    uniforms: Tensor | None,
    max_batch: int | None,
) -> None:
    for name, value in (("length", length), ("commit", commit), ("max_batch", 1 if max_batch is None else max_batch)):
        if value < 1:
            raise DataError(f"{name} must be at least 1, not {value}.")
    if temperature < 0:
        raise DataError(f"temperature must be at least 0, not {temperature}.")
    if temperature > 0 and uniforms is None:
        raise DataError("above temperature 0 tokens are drawn: give uniforms, one number for each position.")
    if uniforms is not None and (uniforms.shape != (len(prompts), length) or uniforms.dtype != torch.float64):
        raise DataError(
            f"uniforms must be float64 numbers of shape {(len(prompts), length)}, one for each position, not "
            f"{uniforms.dtype} of shape {tuple(uniforms.shape)}."
        )
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"Prompt {number} is empty; start it with the begin token (encode_prompt does).")
    model.check_length(max(map(len, prompts), default=0) + length)


def hidden_rows(
    prompts: Sequence[Sequence[int]],
    canvas: Int[Tensor, "batch length"],
    hide: Bool[Tensor, "batch length"],
    mask_id: int,
    pad_id: int,
) -> tuple[
    Int[Tensor, "batch time"],
    Bool[Tensor, "batch time"],
    Bool[Tensor, "batch time-1"],
    Int[Tensor, "batch time-1"],
]:
    """Prompts and completions as one right-padded batch in which some positions of the completions are masked.

    Args:
        prompts: ids of each row.
        canvas: the completions, all equally long.
        hide: where the mask token stands instead.
        mask_id, pad_id: tokens.

    Returns:
        ``tokens``, ``attention``, ``mask`` over predictions (``mask[b, t]``: position ``t + 1`` is masked) and
        ``labels`` (``labels[b, t]``: the token that stands there in truth).

    Examples:
        >>> canvas, hide = torch.tensor([[7, 8], [7, 9]]), torch.tensor([[True, False], [True, True]])
        >>> tokens, _, mask, labels = hidden_rows([[5, 6], [5]], canvas, hide, mask_id=1, pad_id=0)
        >>> tokens.tolist(), labels[mask].tolist()
        ([[5, 6, 1, 8], [5, 1, 1, 0]], [7, 7, 9])
    """
    from leibler.policy.tokens import right_pad

    pairs = [(prompt, row) for prompt, row in zip(prompts, canvas.tolist(), strict=True)]
    whole, attention, there = right_pad(pairs, pad_id)
    mask = torch.zeros_like(there).masked_scatter(there, hide.flatten())
    tokens = whole.clone()
    tokens[:, 1:] = torch.where(mask, mask_id, tokens[:, 1:])
    return tokens, attention, mask, whole[:, 1:]
