"""Rows in which some positions of the responses are masked, for masked language models: which may read them, their
loss, and held-out numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from leibler.divergence import Entropy, SampledLogProb
from leibler.errors import DataError, ModelError, RecipeError
from leibler.fused import Want, functionals
from leibler.objective.rows import REJECTED, Rows
from leibler.objective.signals import Validation
from leibler.train.sources import Context, Origin, Source, State

if TYPE_CHECKING:
    from leibler.data import Dataset
    from leibler.policy import MaskedLM
    from leibler.train.recipe import Recipe


def check_kind(recipe: Recipe, models: Mapping[str, Any]) -> None:
    """Refuse models of the wrong kind: masked rows are for masked language models, all others for causal ones.

    A masked language model that read a whole text would see the very tokens that it is asked for.

    Args:
        recipe: what is to be trained.
        models: all models by name, ``policy`` among them.

    Raises:
        RecipeError: see `reads_masked`.
        ModelError: a model that cannot read the recipe's rows.
    """
    from leibler.policy import LanguageModel
    from leibler.policy.loading import MASKED

    masked = reads_masked(recipe.source)
    for name, model in models.items():
        if not isinstance(model, LanguageModel) or model.masked == masked:
            continue
        who = f"the {'student' if name == 'policy' else f'model {name!r}'} ({type(model.pretrained).__name__})"
        if masked:
            raise ModelError(
                f"{who} reads from left to right, and the recipe draws masked rows; give a masked language model "
                f"({MASKED})."
            )
        raise ModelError(
            f"{who} fills in masked positions, and the recipe reads from left to right; use llada or tad, or draw "
            "masked rows with recipe.source='Masked(Data())'."
        )


def reads_masked(source: Source) -> bool:
    """Whether the rows of a source are for a masked language model.

    Raises:
        RecipeError: some of its rows are masked and others are not.
    """
    kinds = {leaf.masked for leaf in _leaves(source)}
    if len(kinds) > 1:
        raise RecipeError("some of the recipe's rows are masked and others are not; no model reads both: mask all.")
    return True in kinds


def _leaves(source: Source) -> Iterator[Source]:
    """The sources that decide what rows look like: those without another inside, and `Masked`."""
    inner = [value for f in fields(cast(Any, source)) for value in _sources(getattr(source, f.name))]
    if source.masked or not inner:
        yield source
        return
    for part in inner:
        yield from _leaves(part)


def _sources(value: Any) -> list[Source]:
    if isinstance(value, tuple):
        return [source for item in value for source in _sources(item)]
    return [value] if isinstance(value, Source) else []


def masked_rows(
    prompts: Sequence[Sequence[int]],
    canvas: Int[Tensor, "batch length"],
    hide: Bool[Tensor, "batch length"],
    like: Rows,
    context: Context,
) -> Rows:
    """Rows whose events are the masked positions of equally long completions.

    Args:
        prompts: ids of each row.
        canvas: the completions.
        hide: the positions that are masked.
        like: what else is known of the rows: group, role, records, texts, who is muted, and numbers of whole rows.
        context: of the draw.

    Raises:
        DataError: a row exceeds the model's context.
    """
    from leibler.policy.masked import hidden_rows

    if not prompts:
        return like
    longest = max(map(len, prompts)) + canvas.shape[1]
    if longest > context.max_length:
        raise DataError(
            f"a prompt and {canvas.shape[1]} masked positions are {longest} tokens, more than the model's context of "
            f"{context.max_length}; lower max_new_tokens, or shorten the prompts."
        )
    model = masked_policy(context)
    tokens, attention, mask, labels = hidden_rows(prompts, canvas, hide, model.mask_id, model.pad_id)
    # Numbers of tokens are of other positions.
    kept = {name: value for name, value in like.columns.items() if value.ndim == 1}
    made = replace(like, tokens=tokens, attention=attention, mask=mask, labels=labels, columns=kept)
    return replace(made, views={}, soft=None)


def masked_policy(context: Context) -> MaskedLM:
    """The policy, which `check_kind` has seen to be a masked language model."""
    return cast("MaskedLM", context.policy)


@dataclass(frozen=True)
class Masked(Source):
    """Given responses with a random part masked: what a masked language model learns from.

    The response, continued by end tokens to ``n = length`` positions, gets ``m`` of them masked: ``m`` uniform in 1 to
    ``n``, then every choice of ``m`` equally likely. With the column ``inverse_share = n / m`` as weight, the sum of
    ``-log p`` over masked positions has the mean ``E_order[-log p(response in that order)]`` over all orders in which
    positions could be revealed, and that is at least ``-log p(response)`` (nats). Source: Large Language Diffusion
    Models (2025), whose loss with each position masked with probability ``t``, ``t`` uniform, and weight ``1 / t`` has
    the same mean and a larger variance.

    Attributes:
        source: the responses.
        length: positions of a response, its end included; None: the run's ``max_new_tokens``. Decode with as many.

    Examples:
        >>> from leibler.train import Data
        >>> Masked(Data()).datasets()
        {'train': 'both'}
    """

    source: Source
    length: int | None = None
    masked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.source.fresh():
            raise RecipeError("Masked takes responses that are given, such as Data(); none are sampled for it.")
        if self.length is not None and self.length < 1:
            raise RecipeError(f"length={self.length} must be at least 1.")

    def streams(self) -> Mapping[str, Origin]:
        return self.source.streams()

    def datasets(self) -> Mapping[str, str]:
        return dict.fromkeys(self.source.datasets(), "both")  # room for a whole canvas after the prompt

    def stream_data(self) -> Mapping[str, tuple[str, ...]]:
        return self.source.stream_data()

    @property
    def needs_validation(self) -> bool:
        return self.source.needs_validation

    def init(self) -> State:
        return self.source.init()

    def observe(self, state: State, event: Validation) -> State:
        return self.source.observe(state, event)

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        drawn, state = self.source.draw(context, state)
        return {name: self._masked(rows, context) for name, rows in drawn.items()}, state

    def _masked(self, rows: Rows, context: Context) -> Rows:
        from leibler.policy.randomness import uniforms

        n = self.length or context.max_new_tokens
        prompts: list[list[int]] = []
        completions: list[list[int]] = []
        for i in range(len(rows)):
            whole, start = rows.hard[i][rows.attention[i]].tolist(), int(rows.mask[i].nonzero()[0]) + 1
            if len(whole) - start != int(rows.length[i]):
                raise DataError(
                    f"{rows.records[i].source or 'a record'} has turns that are not to be learned between its "
                    "responses; a masked language model learns one response after a prompt."
                )
            prompts.append(whole[:start])
            completions.append(whole[start:])
        # By the numbers that the rows have over all processes: no draw depends on how many there are.
        numbers = [
            2 * (g * context.world + context.rank) + int(role == REJECTED)
            for g, role in zip(rows.group.tolist(), rows.role.tolist(), strict=True)
        ]
        tables = [uniforms(context.seed, "mask", context.draw, 1, n + 1, first_row=number) for number in numbers]
        table = torch.cat(tables) if tables else torch.zeros(0, n + 1, dtype=torch.float64)
        hide, share = random_masks(table)
        made = masked_rows(prompts, canvas(completions, n, masked_policy(context).eos_id), hide, rows, context)
        return made.with_columns(inverse_share=1.0 / share)


def canvas(completions: Sequence[Sequence[int]], length: int, end: int) -> Int[Tensor, "batch length"]:
    """Completions continued by end tokens to ``length`` positions.

    Raises:
        DataError: one is longer.
    """
    longest = max(map(len, completions), default=0)
    if longest > length:
        raise DataError(
            f"a completion of {longest} tokens is longer than the {length} positions that are masked and filled; set "
            f"max_new_tokens to at least {longest}."
        )
    return torch.tensor([[*row, *[end] * (length - len(row))] for row in completions]).view(len(completions), length)


def random_masks(
    uniforms: Float[Tensor, "batch length+1"],
) -> tuple[Bool[Tensor, "batch length"], Float[Tensor, " batch"]]:
    """Which positions are masked, and which share of them that is: 1 to ``length`` positions, all counts equally likely
    and all choices of as many."""
    n = uniforms.shape[1] - 1
    count = 1 + (uniforms[:, 0] * n).long().clamp(max=n - 1)
    rank = uniforms[:, 1:].argsort(dim=1).argsort(dim=1)
    return rank < count[:, None], count.to(torch.float32) / n


@torch.no_grad()
def validate_masked(
    policy: MaskedLM, data: Dataset, *, temperature: float, max_new_tokens: int, limit: int = 128, draws: int = 4
) -> dict[str, float]:
    """Mean ``nll_bound`` (nats per position, see `Masked`) and ``entropy`` of masked positions, ``accuracy``.

    Args:
        policy: the model, in evaluation mode.
        data: held-out records; the first ``limit`` are used, those whose completions fit into ``max_new_tokens``.
        temperature: of the laws.
        max_new_tokens: positions that are masked and filled.
        limit: see there.
        draws: random masks for each record, the same at every call.
    """
    from leibler.policy import decode_masked, uniforms
    from leibler.policy.masked import hidden_rows

    records, out = data.records[:limit], {}
    texts = [r.completion if r.completion is not None else r.chosen for r in records]
    pairs = [
        (policy.encode_prompt(r.prompt), ids)
        for r, text in zip(records, texts, strict=True)
        if text is not None and len(ids := policy.encode_completion(text)) <= max_new_tokens
    ]
    sums: dict[str, float] = {"nll_bound": 0.0, "entropy": 0.0}
    masked = 0
    for start in range(0, len(pairs) * draws, 32):
        part = [pairs[i // draws] for i in range(start, min(start + 32, len(pairs) * draws))]
        hide, share = random_masks(uniforms(0, "validation", 0, len(part), max_new_tokens + 1, first_row=start))
        rows = hidden_rows(
            [prompt for prompt, _ in part],
            canvas([ids for _, ids in part], max_new_tokens, policy.eos_id),
            hide,
            policy.mask_id,
            policy.pad_id,
        )
        tokens, attention, mask, labels = (x.to(policy.device) for x in rows)
        head = policy.linear(policy(tokens, attention)[:, :-1][mask], temperature)
        wants = [Want(SampledLogProb()), Want(Entropy())]
        values = functionals(head, wants, token=labels[mask], vocab=policy.vocab_size).double()
        weight = (1 / share.double()).repeat_interleave(hide.sum(1)).to(values.device)
        sums["nll_bound"] -= float((values[0] * weight).sum())
        sums["entropy"] += float(values[1].sum())
        masked += int(hide.sum())
    if masked:
        out["nll_bound"] = sums["nll_bound"] / (len(pairs) * draws * max_new_tokens)
        out["entropy"] = sums["entropy"] / masked
    if data.check is not None:
        prompts = [policy.encode_prompt(r.prompt) for r in records]
        found = decode_masked(policy, prompts, length=max_new_tokens, max_batch=64).completions()
        right = [data.check(r, policy.decode(ids)) for r, ids in zip(records, found, strict=True)]
        out["accuracy"] = sum(right) / len(right)
    return out
