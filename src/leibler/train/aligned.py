"""Models of a run that have another tokenizer: their laws are compared with the student's through the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from leibler.errors import RecipeError
from leibler.fused import Linear, TargetRows
from leibler.fused.coarse import OtherVocabulary
from leibler.objective.needs import LogProb, TokenDivergence, WholeRows
from leibler.objective.targets import Given, Handle, Lift, Only, Target
from leibler.train.recipe import Recipe

if TYPE_CHECKING:
    from leibler.policy import CausalLM
    from leibler.policy.vocabulary import Reading, TextAlignment


def alignments(recipe: Recipe, policy: CausalLM, models: Mapping[str, CausalLM]) -> dict[str, TextAlignment]:
    """The alignment of each model whose tokenizer is not the policy's, by name; none where all are the same.

    Raises:
        RecipeError: the recipe asks something of such a model that only a common tokenizer can answer.
        ModelError: the tokenizers cannot be aligned.
    """
    from leibler.policy.tokenizers import tokenizer_difference
    from leibler.policy.vocabulary import TextAlignment

    others = {n: m for n, m in models.items() if m is not policy and tokenizer_difference(policy, m) is not None}
    for handle in recipe.source.handles():
        if handle.name in others:
            raise RecipeError(
                f"responses are sampled from {handle.name!r}, whose tokenizer is not the student's; sample from the "
                "student, or write the responses to a file first and train on that."
            )
    for handle in recipe.handles():
        if isinstance(handle, Given) and handle.name in others:
            raise RecipeError(
                f"{handle.name!r} is to read another view of the rows, but its tokenizer is not the student's; give a "
                "model of the same tokenizer."
            )
        if isinstance(handle, Only) and handle.name in others:
            raise RecipeError(
                f"{handle.name!r} is asked about the rows of one domain, but its tokenizer is not the student's; give "
                "a model of the same tokenizer."
            )
    lifted: set[str] = set()
    for need in recipe.needs():
        if isinstance(need, LogProb) and need.of.name in others:
            raise RecipeError(
                f"the recipe reads the log-prob of single tokens under {need.of.name!r}, whose tokenizer is not the "
                "student's; align=text compares laws over the vocabulary: use the estimator Exact()."
            )
        if isinstance(need, WholeRows) and (found := {h.name for h in need.to.handles} & others.keys()):
            raise RecipeError(
                f"a term couples whole rows of {min(found)!r}, whose tokenizer is not the student's; match it by a "
                "divergence, which align=text compares."
            )
        if isinstance(need, TokenDivergence):
            names = {handle.name for handle in need.to.handles}
            if isinstance(need.to, Lift) and names & others.keys():
                lifted |= names
            if names & others.keys() and len(names) > 1:
                raise RecipeError(
                    f"a target combines {', '.join(sorted(names))}, whose tokenizers differ; match each of them in a "
                    "term of its own."
                )
    made: dict[int, TextAlignment] = {}
    for model in others.values():
        if id(model) not in made:
            made[id(model)] = TextAlignment(policy, model).to(policy.device)
    for name in lifted:
        _ = made[id(others[name])].lifting  # what cannot be lifted is said now, not at the first step
    return {name: made[id(model)] for name, model in others.items()}


def event_states(states: Tensor, reading: Reading) -> Tensor:
    """``[events, hidden]``: of the hidden states of a reading, those that say how each event's text goes on."""
    return states.flatten(0, 1)[reading.place]


def target_rows(
    target: Target,
    leaves: Mapping[Handle, Linear],
    alignments: Mapping[str, TextAlignment],
    readings: Mapping[str, Reading],
    states: Callable[[str, Tensor, Tensor], Tensor],
    limit: int,
) -> TargetRows | OtherVocabulary:
    """The rows of a target from those of its models, over common cells where they have another tokenizer.

    Args:
        target: the expression.
        leaves: the heads of its models at the events.
        alignments, readings: of the models of another tokenizer.
        states: runs a model, by name; ``limit`` tokens at a time at most.
        limit: see there.
    """
    rows = TargetRows(tuple(leaves[h] for h in target.handles), target.combine)
    name = target.handles[0].name
    if name not in readings:
        return rows
    alignment, reading = alignments[name], readings[name]
    if isinstance(target, Lift):
        return alignment.lifting.target(rows, reading, partial(states, name), target.threshold, limit)
    return alignment.merged(rows, reading)
