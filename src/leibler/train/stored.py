"""Laws that were written down: of models that are only known by a teacher cache, and of the rows' own soft tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from leibler.cache import PREFIX, TeacherCache
from leibler.errors import RecipeError
from leibler.fused import Coarse, TopK
from leibler.objective.needs import Comparison, LogProb, Need, OverVocabulary, TokenDivergence, WholeRows
from leibler.objective.objective import walk
from leibler.objective.soft import Soft
from leibler.objective.targets import Given, Handle, Target
from leibler.objective.terms import Term
from leibler.train.models import ModelRule, Trained

if TYPE_CHECKING:
    from leibler.data import Dataset
    from leibler.objective.rows import Rows
    from leibler.policy import CausalLM
    from leibler.train.recipe import Recipe


def is_stored(given: Any) -> bool:
    """Whether a model was given as a teacher cache, or by the name of one."""
    return isinstance(given, TeacherCache) or (isinstance(given, str) and given.startswith(PREFIX))


def opened(given: TeacherCache | str) -> TeacherCache:
    """The cache itself."""
    return given if isinstance(given, TeacherCache) else TeacherCache.of(given)


def stored_models(rules: Mapping[str, ModelRule], given: Mapping[str, Any]) -> dict[str, TeacherCache]:
    """The models of a recipe that caches stand for, by their names in the recipe."""
    found = {}
    for name, rule in rules.items():
        source = given.get(name if name in given else rule.source)
        if isinstance(source, TeacherCache) and not isinstance(rule, Trained):
            found[name] = source
    return found


def written(target: Target, stored: Mapping[str, TeacherCache], rows: Rows, temperature: float = 1.0) -> Coarse | None:
    """The laws of a target at the events of a batch, where they were written down; None for any other target.

    Soft tokens are laws of k entries and nothing beyond, at whatever temperature the run takes its laws.
    """
    if isinstance(target, Soft):
        law = target.law(rows)
        return Coarse(law.index, TopK(law.logp, law.logp.new_full(law.logp.shape[:1], -torch.inf), temperature))
    cache = stored.get(target.handles[0].name)
    return None if cache is None else cache.target(rows)


def check(
    recipe: Recipe,
    stored: Mapping[str, TeacherCache],
    policy: CausalLM,
    data: Mapping[str, Dataset],
    temperature: float,
) -> None:
    """Whatever a cache cannot give is refused before the first step.

    A cache knows a model's law at the texts it was made of, on the top k entries and the rest together: so it serves a
    divergence to that model itself, and the log-probs of the texts' own tokens. It has no weights, no law at new texts
    and no entries that could be combined with another model's or tempered.

    Raises:
        RecipeError: the recipe asks for something else.
        LeiblerError: tokenizer, temperature or data are not those of the cache.
    """
    for name, cache in stored.items():
        if recipe.models[name].moves:
            raise RecipeError(
                f"the weights of {name!r} change during the run ({type(recipe.models[name]).__name__}), and a teacher "
                f"cache has none; give {name} as a model."
            )
        if Handle(name) in recipe.source.handles():
            raise RecipeError(
                f"responses are sampled from {name!r}, and a teacher cache cannot be sampled from; {_LIVE}"
            )
        if Handle(name) in recipe.source.readers():
            raise RecipeError(
                f"records are chosen by what {name!r} makes of them, which no teacher cache tells; {_LIVE}"
            )
        cache.check_model(policy)
        cache.check_temperature(temperature)
    fresh, read = recipe.source.fresh(), recipe.source.stream_data()
    for term in recipe.objective.terms:
        for need in _needs(term):
            names = _names(need) & stored.keys()
            if not names:
                continue
            name = min(names)
            if isinstance(need, Comparison):
                raise RecipeError(f"hidden states of {name!r} are compared, and a teacher cache has none; {_LIVE}")
            if isinstance(need, WholeRows):
                raise RecipeError(
                    f"{term.name} couples whole rows of {name!r}, of which a teacher cache has the top k entries only; "
                    f"{_LIVE}"
                )
            if isinstance(need, LogProb) and isinstance(need.of, Given):
                raise RecipeError(f"a teacher cache knows {name!r} after the texts' own prompts only; {_LIVE}")
            if isinstance(need, TokenDivergence) and need.to != Handle(name):
                raise RecipeError(
                    f"{term.name} compares with an expression over {name!r} ({type(need.to).__name__}), which the "
                    f"top-k log-probs of a teacher cache do not tell; match {name} itself, or give it as a model."
                )
            assert term.on is not None
            if term.on in fresh:
                raise RecipeError(
                    f"{term.name} reads {name!r} at responses that are sampled during the run, which no teacher cache "
                    "can know; train on the texts that were cached (recipe.source=Data(); `leibler cache --student` "
                    f"samples and caches a student's own), or give {name} as a model."
                )
            for source in read[term.on]:
                stored[name].check_data(data[source], policy)


_LIVE = "give the model itself, or train on texts that it wrote before."


def _needs(term: Term) -> Iterator[Need]:
    yield from term.needs()
    for signal, _ in walk(term):
        yield from signal.needs()


def _names(need: Need) -> set[str]:
    if isinstance(need, LogProb):
        return {need.of.name}
    if isinstance(need, Comparison):
        return {need.to.name}
    return {h.name for h in need.to.handles} if isinstance(need, OverVocabulary) else set()
