"""A source that revises: the policy's responses, repaired where another model disagrees most."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.divergence import Divergence, ForwardKL, Functional, Row
from leibler.errors import RecipeError
from leibler.fused import TargetRows, Want, functionals
from leibler.objective.rows import SAMPLE, Rows
from leibler.objective.targets import Handle, Target, Teacher
from leibler.train.sources import Context, OnPolicy, Origin, Source, State, _rows

if TYPE_CHECKING:
    from leibler.policy import CausalLM

_TOKENS = 16_384
"""Tokens that a model reads at a time."""


@dataclass(frozen=True)
class Repair(Source):
    """Sampled responses, each corrected at its worst token and sampled anew from there.

    Of a response ``y`` every token is read by the policy (``p``) and by the law ``q`` that repairs: with
    ``a_i = argmax q(. | y_<i)`` and ``d_i = D(p, q)`` there, the error is at ``j``, where ``d`` is largest among the
    tokens with ``y_i != a_i`` (the first of equals). Then ``y_<j`` stays, ``y_j`` becomes ``a_j``, and the source
    samples the rest again, up to its limit on new tokens; a repaired end of text ends the row. A response without a
    disagreement stays as it is. The divergence is exact over the vocabulary, at the run's temperature.

    What comes out follows no single law, neither the policy's nor the teacher's: divergences that are exact over the
    vocabulary can be matched on it, estimates from the sampled tokens cannot. Stages that score belong behind it. Adds
    the columns ``repaired``, 1 at the tokens that were put in place of the policy's (so a term can be ``where`` they
    are), and ``finished``. Source: Multi-Granularity Semantic Revision for Large Language Model Distillation (2024).

    Attributes:
        source: what is repaired; its sampler, temperature and limit serve for the rest of each response too.
        by: the law whose most likely token is right.
        divergence: what says how wrong a token is; `ForwardKL` is KL(q || p).
        times: repairs of each response, one after the other; each may go back behind the last.

    Raises:
        RecipeError: the source does not sample, or ``times`` is less than 1.

    Examples:
        >>> from leibler.train import OnPolicy, Repair
        >>> source = Repair(OnPolicy(group_size=4))
        >>> sorted(handle.name for handle in source.handles())
        ['old', 'teacher']
    """

    source: OnPolicy = field(default_factory=OnPolicy)
    by: Target = field(default_factory=Teacher)
    divergence: Divergence = field(default_factory=ForwardKL)
    times: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.source, OnPolicy):
            raise RecipeError(
                f"Repair rewrites sampled responses, and {type(self.source).__name__} does not sample; give it "
                "OnPolicy() and put stages behind it."
            )
        if self.times < 1:
            raise RecipeError(f"times={self.times} must be at least 1; without a repair, use OnPolicy() itself.")

    def streams(self) -> Mapping[str, Origin]:
        return {name: Origin() for name in self.source.streams()}

    def handles(self) -> tuple[Handle, ...]:
        return tuple(dict.fromkeys((*self.source.handles(), *self.by.handles)))

    def datasets(self) -> Mapping[str, str]:
        return self.source.datasets()

    def draw(self, context: Context, state: State) -> tuple[dict[str, Rows], State]:
        drawn, state = self.source.draw(context, state)
        ((name, rows),) = drawn.items()
        rows = replace(rows, columns={"finished": rows.columns["finished"], "repaired": torch.zeros(rows.mask.shape)})
        for time in range(self.times):
            rows = self._once(rows, context, time)
        return {name: rows}, state

    def _once(self, rows: Rows, context: Context, time: int) -> Rows:
        place, token = self._errors(rows, context)
        chosen: list[int] = (place >= 0).nonzero()[:, 0].tolist()
        if not chosen:
            return rows
        items, marks = _parts(rows), [rows.columns["repaired"][i][rows.mask[i]].tolist() for i in range(len(rows))]
        finished = rows.columns["finished"].clone()
        longest, stops = self.source.longest(context), set(context.policy.stop_ids)
        again = []
        for i in chosen:
            prompt, response = items[i]
            j, right = int(place[i]), int(token[i])
            items[i], marks[i] = (prompt, [*response[:j], right]), [*marks[i][:j], 1.0]
            finished[i] = float(right in stops)
            if right not in stops and j + 1 < longest:
                again.append(i)
        if again:
            size = self.source.group_size
            out = self.source.respond(
                context,
                [items[i][0] + items[i][1] for i in again],
                # By its number among the rows of all processes, whoever else is repaired.
                [(context.rank + i // size * context.world) * size + i % size for i in again],
                f"repair/{time}",
                limits=[longest - len(items[i][1]) for i in again],
            )
            for i, rest, ended in zip(again, out.completions(), out.finished.tolist(), strict=True):
                items[i][1].extend(rest)
                marks[i] += [0.0] * len(rest)
                finished[i] = float(ended)
        made = _rows(items, rows.group.tolist(), [SAMPLE] * len(items), rows.records, context)
        flat = torch.tensor([m for row in marks for m in row])
        return made.with_columns(
            finished=finished, repaired=torch.zeros(made.mask.shape).masked_scatter(made.mask, flat)
        )

    def _errors(self, rows: Rows, context: Context) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
        """Where each response is worst (-1: nowhere) and the token that is right there."""
        from leibler.policy.model import evaluating

        names = [h.name if h.name != "old" else "policy" for h in self.by.handles]
        models = {name: context.models[name] for name in ("policy", *names)}
        place = torch.full((len(rows),), -1)
        token = torch.zeros(len(rows), dtype=torch.long)
        wants = [Want(self.divergence, 0), Want(cast(Functional, _Choice()), 0)]
        with torch.no_grad(), evaluating(*models.values()):
            for index in _micro(rows):
                part = rows.select(index).to(context.policy.device)
                heads = {n: m.linear(_states(m, part), context.temperature) for n, m in models.items()}
                target = TargetRows(tuple(heads[name] for name in names), self.by.combine)
                label = part.label
                worse, best = functionals(heads["policy"], wants, [target], vocab=context.policy.vocab_size).cpu()
                label, best = label.cpu(), best.long()
                worse = torch.where(best != label, worse, -torch.inf)
                mask = part.mask.cpu()
                dense = torch.full(mask.shape, -torch.inf, dtype=worse.dtype).masked_scatter(mask, worse)
                at = dense.argmax(dim=1)
                wrong = dense.amax(dim=1) > -torch.inf
                first = mask.long().argmax(dim=1)
                place[index] = torch.where(wrong, at - first, -1)
                right = torch.zeros(mask.shape, dtype=torch.long).masked_scatter(mask, best)
                token[index] = right.gather(1, at[:, None])[:, 0]
        return place, token


@dataclass(frozen=True)
class _Choice:
    """The target's most likely token, as a number (exact in float32: no vocabulary has 2^24 entries)."""

    @property
    def needs_target(self) -> bool:
        return True

    def value(
        self, model: Row, target: Row | None = None, token: Int[Tensor, " rows"] | None = None
    ) -> tuple[Float[Tensor, " rows"], None]:
        assert target is not None
        return target.logits.argmax(dim=-1).to(target.logits.dtype), None

    def add_gradient(self, *_: Any) -> None:
        raise RecipeError("the most likely token has no gradient; compute it under no_grad.")


def _states(model: CausalLM, rows: Rows) -> Float[Tensor, "events hidden"]:
    return model(rows.tokens, rows.attention)[:, :-1][rows.mask]


def _parts(rows: Rows) -> list[tuple[list[int], list[int]]]:
    """Prompt and response of each row."""
    out = []
    for i, length in enumerate(rows.length.tolist()):
        tokens: list[int] = rows.tokens[i][rows.attention[i]].tolist()
        out.append((tokens[: len(tokens) - length], tokens[len(tokens) - length :]))
    return out


def _micro(rows: Rows) -> Iterator[Int[Tensor, " some"]]:
    """Rows of like length together, as many as may be read at once."""
    length: Sequence[int] = rows.attention.sum(dim=1).tolist()
    order = sorted(range(len(rows)), key=lambda i: length[i])
    while order:
        count = 1
        while count < len(order) and (count + 1) * length[order[count]] <= _TOKENS:
            count += 1
        part, order = order[:count], order[count:]
        yield torch.tensor(sorted(part))
