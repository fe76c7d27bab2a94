"""Decoding trajectories of a masked language model: which token was revealed when, and what is masked on the way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from leibler.environment.dialogue import later_turns
from leibler.errors import DataError, RecipeError
from leibler.objective.rows import SAMPLE, Rows
from leibler.objective.targets import Handle
from leibler.train.masking import masked_policy, masked_rows
from leibler.train.sources import Context, Source, State, _next_records

if TYPE_CHECKING:
    from leibler.data import Dataset, Record
    from leibler.policy import MaskedLM


def partition(
    step: Int[Tensor, "batch length"], state: Int[Tensor, " batch"], delta: int
) -> tuple[Bool[Tensor, "batch length"], Bool[Tensor, "batch length"]]:
    """The masked positions of a state: those revealed within ``delta`` further passes, and those revealed later.

    Args:
        step: the pass, from 1, that revealed each position.
        state: passes done; a position is masked where ``step > state``.
        delta: passes to look ahead.

    Examples:
        >>> near, distant = partition(torch.tensor([[1, 3, 2, 4]]), torch.tensor([1]), delta=2)
        >>> near.int().tolist(), distant.int().tolist()
        ([[0, 1, 1, 0]], [[0, 0, 0, 1]])
    """
    masked, soon = step > state[:, None], step <= state[:, None] + delta
    return masked & soon, masked & ~soon


@dataclass(frozen=True)
class Trajectories(Source):
    """States on the way of a frozen model's decoding, each response decoded once, when it is first drawn.

    A state has done ``s`` of the ``N`` forward passes, ``s`` uniform in 0 to ``N - 1``. Its masked positions are the
    events, labelled with the token that the trajectory reveals there; the column ``near`` marks those revealed by pass
    ``min(s + delta, N)``, ``distant`` the others. The view ``privileged`` is the same state after a prompt that also
    holds the gold answer. Source: TAD: Temporal-Aware Trajectory Self-Distillation for Fast and Accurate Diffusion LLM
    (2026).

    Responses are decoded greedily with the hint in the prompt, so they depend on the record and the frozen model alone;
    they stand in the checkpoint, so a resumed run goes on with the very same.

    Attributes:
        delta: passes that near tokens are ahead. 0: all are distant; the number of passes or more: all are near.
        commit: tokens that a pass of the trajectory reveals.
        name: which of the run's data sets holds prompts and gold answers.
        hint: the privileged prompt, with ``{answer}`` and ``{prompt}`` in it.
        hinted: decode with the hint in the prompt; False: from the prompt alone.
        model: the frozen model that decodes.
        rows: states per optimiser batch; None: the run's batch size.
        length: positions of a response; None: the run's ``max_new_tokens``.

    Examples:
        >>> Trajectories(delta=4).handles()
        (Handle(name='initial'),)
    """

    delta: int = 8
    commit: int = 1
    name: str = "train"
    hint: str = "Reference Answer: {answer}\n{prompt}"
    hinted: bool = True
    model: str = "initial"
    rows: int | None = None
    length: int | None = None
    masked: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.delta < 0:
            raise RecipeError(f"delta={self.delta} must be at least 0.")
        for name in ("commit", "rows", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name}={value} must be at least 1.")
        for part in ("{answer}", "{prompt}"):
            if part not in self.hint:
                raise RecipeError(f"hint={self.hint!r} must hold {part}; the teacher reads both prompt and answer.")

    def handles(self) -> tuple[Handle, ...]:
        return (Handle(self.model),)

    def datasets(self) -> Mapping[str, str]:
        return {self.name: "both"}

    def init(self) -> State:
        return {"position": 0, "tokens": None, "step": None}

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        from leibler.policy import MaskedSamples
        from leibler.policy.randomness import uniforms

        data, count = context.dataset(self.name), self.rows or context.rows
        drawn, state = _next_records(data, state, count, context.seed)
        state = self._decoded(data, sorted({index for index, _ in drawn}), context, state)
        mine = list(context.share(count))
        numbers = uniforms(context.seed, "state", context.draw, count, 1)[mine, 0]
        index, records = [drawn[i][0] for i in mine], [drawn[i][1] for i in mine]
        canvas, step = state["tokens"][index].long(), state["step"][index].long()
        passes = -(-canvas.shape[1] // self.commit)
        done = (numbers * passes).long().clamp(max=passes - 1)
        near, distant = partition(step, done, self.delta)
        policy = masked_policy(context)
        texts = [policy.decode(ids) for ids in MaskedSamples(canvas, step, passes, policy.stop_ids).completions()]
        group = torch.arange(len(mine))
        empty = torch.zeros(len(mine), 1, dtype=torch.bool)
        like = Rows(
            group[:, None], empty, empty[:, :0], group, torch.full_like(group, SAMPLE), {}, None, records, texts
        )
        hide = near | distant
        rows = masked_rows([context.policy.encode_prompt(r.prompt) for r in records], canvas, hide, like, context)
        hinted = masked_rows([self._privileged(r, context) for r in records], canvas, hide, like, context)
        zeros = torch.zeros(rows.mask.shape)
        columns = {
            name: zeros.masked_scatter(rows.mask, part[hide].float())
            for name, part in (("near", near), ("distant", distant))
        }
        return {"main": rows.with_columns(**columns).with_view("privileged", hinted)}, state

    def _privileged(self, record: Record, context: Context) -> list[int]:
        answer, where = record.completion, record.source or "a record"
        if answer is None:
            raise DataError(f"{where} has no completion to hint at; add the column.")
        if later_turns(record):
            raise DataError(f"{where} is a dialogue; a masked language model fills in one response after a prompt.")
        parts = {"{answer}": answer, "{prompt}": record.prompt}
        # At once: a text may hold the other's placeholder.
        return context.policy.encode_prompt(re.sub(r"\{answer\}|\{prompt\}", lambda m: parts[m.group()], self.hint))

    def _decoded(self, data: Dataset, wanted: Sequence[int], context: Context, state: State) -> State:
        """The state with the trajectories of the records ``wanted``, on every process those of all."""
        from leibler.policy import decode_masked

        n = self.length or context.max_new_tokens
        tokens, step = state["tokens"], state["step"]
        if tokens is None:
            tokens = torch.zeros(len(data), n, dtype=torch.int32)
            step = torch.zeros(len(data), n, dtype=torch.int32)
        elif tokens.shape != (len(data), n):
            raise RecipeError(
                f"the checkpoint holds trajectories of {tokens.shape[1]} positions for {tokens.shape[0]} records, not "
                f"{n} for {len(data)}; go on with the data and max_new_tokens of the run."
            )
        missing = [index for index in wanted if not int(step[index, 0])]
        if not missing:
            return {**state, "tokens": tokens, "step": step}
        mine = [missing[i] for i in context.share(len(missing))]
        prompts = [
            self._privileged(data[i], context) if self.hinted else context.policy.encode_prompt(data[i].prompt)
            for i in mine
        ]
        model = cast("MaskedLM", context.models[self.model]) if self.model != "policy" else masked_policy(context)
        found = decode_masked(model, prompts, length=n, commit=self.commit)
        tokens, step = tokens.clone(), step.clone()
        for index, text, order in context.gather((mine, found.tokens.int().cpu(), found.step.int().cpu())):
            tokens[index], step[index] = text, order
        return {**state, "tokens": tokens, "step": step}
