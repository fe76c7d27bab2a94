"""Pairs of responses sampled now, one of each of two laws."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from leibler.errors import RecipeError
from leibler.objective.rows import CHOSEN, REJECTED, Rows
from leibler.objective.targets import Handle
from leibler.train.sources import Context, OnPolicy, Source, State, _next_records, _rows

if TYPE_CHECKING:
    from leibler.data import Record


@dataclass(frozen=True)
class Paired(Source):
    """For each prompt one response of each of two samplers: the first is taken for chosen, the second for rejected.

    Attributes:
        chosen, rejected: laws, temperatures and limits of the two; prompts and rows are the chosen one's.

    Raises:
        RecipeError: one does not sample single responses.

    Examples:
        >>> from leibler.train import OnPolicy, Paired, Sampled
        >>> [handle.name for handle in Paired(Sampled("teacher"), OnPolicy()).handles()]
        ['teacher', 'old']
    """

    chosen: OnPolicy
    rejected: OnPolicy = field(default_factory=OnPolicy)

    def __post_init__(self) -> None:
        for source in (self.chosen, self.rejected):
            if not isinstance(source, OnPolicy) or source.group_size != 1:
                raise RecipeError(
                    "Paired samples one response of each of two laws to a prompt; give it two OnPolicy() of "
                    "group_size=1, and put stages behind it."
                )

    def handles(self) -> tuple[Handle, ...]:
        return (*self.chosen.handles(), *self.rejected.handles())

    def datasets(self) -> Mapping[str, str]:
        return self.chosen.datasets()

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        count = max((self.chosen.rows or context.rows) // 2, 1)
        records, state = _next_records(context.dataset(self.chosen.prompts), state, count, context.seed)
        mine = list(context.share(count))
        prompts = [context.policy.encode_prompt(records[i][1].prompt) for i in mine]
        items: list[tuple[list[int], list[int]]] = []
        group: list[int] = []
        owners: list[Record] = []
        for source, purpose in ((self.chosen, "chosen"), (self.rejected, "rejected")):
            out = source.respond(context, prompts, mine, purpose)
            completions = [tokens[kept].tolist() for tokens, kept in zip(out.tokens, out.mask, strict=True)]
            items += zip(prompts, completions, strict=True)
            group += range(len(mine))
            owners += [records[i][1] for i in mine]
        role = [CHOSEN] * len(mine) + [REJECTED] * len(mine)
        return {"main": _rows(items, group, role, owners, context)}, state
