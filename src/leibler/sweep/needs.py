"""What a method asks for beside a student, read off its recipe, and what it still lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from leibler.objective.targets import Lift
from leibler.objective.terms import Preference
from leibler.train.episodes import Episodes
from leibler.train.latents import Latents
from leibler.train.masking import reads_masked
from leibler.train.pipeline import Pipeline, recipes_of
from leibler.train.sources import Data
from leibler.train.stages import Answer, AnswerJudge

if TYPE_CHECKING:
    from leibler.train import Recipe

PAIR = ("chosen", "rejected")


@dataclass(frozen=True)
class Asked:
    """What a method needs to be given.

    Attributes:
        models: by the names that it reads them under.
        data: what it draws from, by name, and what it needs of it: ``prompts``, ``labels`` or ``both``.
        columns: of each data set, beside the usual ones.
        pairs: the data sets that must hold a chosen and a rejected response.
        answers: whether it asks a checker which responses are right.
        validation: whether it listens to a validation.
        other: in one sentence each, what no comparison of models of one tokenizer, layout and task can give it.
    """

    models: frozenset[str] = frozenset()
    data: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    pairs: frozenset[str] = frozenset()
    answers: bool = False
    validation: bool = False
    other: tuple[str, ...] = ()


def asked(method: Recipe | Pipeline) -> Asked:
    """What a recipe, or all stages of a pipeline together, needs to be given.

    Examples:
        >>> from leibler import recipes
        >>> found = asked(recipes.get("paced"))
        >>> sorted(found.models), dict(found.data), dict(found.columns)
        (['teacher'], {'train': 'labels'}, {'train': ('pass_rate',)})
    """
    models: set[str] = set()
    data: dict[str, str] = {}
    columns: dict[str, tuple[str, ...]] = {}
    pairs: set[str] = set()
    other: list[str] = []
    answers = validation = False
    made = {n: set(s.models) for n, s in method.stages.items()} if isinstance(method, Pipeline) else {"": set[str]()}
    for stage, recipe in recipes_of(method).items():
        given = {rule.source for name, rule in recipe.models.items() if not rule.side and name not in made[stage]}
        models |= given - made[stage] - {"initial"}  # what starts as the student is there anyway
        for name, kind in recipe.source.datasets().items():
            data[name] = kind if data.get(name, kind) == kind else "both"
        for part in parts(recipe.source):
            for name, wanted in _columns(part).items():
                columns[name] = tuple(dict.fromkeys((*columns.get(name, ()), *wanted)))
            answers |= isinstance(part, (Answer, AnswerJudge))
        if reads_masked(recipe.source):
            other.append("a student that fills in masked positions")
        if any(isinstance(part, Lift) for part in parts(recipe.objective)):
            other.append("a teacher of a smaller vocabulary than the student's")
        pairs |= _paired(recipe)
        validation |= recipe.source.needs_validation
    named = {name: found for name, found in columns.items() if found}
    return Asked(frozenset(models), data, named, frozenset(pairs), answers, validation, tuple(dict.fromkeys(other)))


def _columns(part: Any) -> dict[str, tuple[str, ...]]:
    """The columns that a part of a source reads by itself, by data set."""
    if isinstance(part, Data):
        return {part.name: part.columns}
    if isinstance(part, Latents):
        return {part.name: (part.column,)}
    if isinstance(part, Episodes) and part.environment is None:
        return {part.tasks: ("environment",)}
    return {}


def _paired(recipe: Recipe) -> set[str]:
    """The data sets behind streams of data whose terms tell a chosen response from a rejected one."""
    streams, read = recipe.source.streams(), recipe.source.stream_data()
    telling = {t.on for t in recipe.objective.terms if isinstance(t, Preference) or t.where in PAIR}
    return {name for on in telling if on is not None and streams[on].law is None for name in read[on]}


def parts(value: Any) -> Iterator[Any]:
    """A frozen part and every part inside it."""
    if is_dataclass(value) and not isinstance(value, type):
        yield value
        value = [getattr(value, f.name) for f in fields(value)]
    if isinstance(value, Mapping):
        value = [*value.keys(), *value.values()]
    if isinstance(value, (list, tuple, frozenset, set)):
        for each in value:
            yield from parts(each)


@dataclass(frozen=True)
class Offered:
    """What a sweep can give, by the same names as in `Asked`."""

    models: frozenset[str]
    data: frozenset[str]
    columns: frozenset[str]
    answers: bool


def lacking(needs: Asked, offered: Offered) -> str:
    """In words, what a method asks for and cannot get; empty if it can take part.

    Examples:
        >>> offered = Offered(frozenset({"teacher"}), frozenset({"train"}), frozenset(), answers=True)
        >>> lacking(Asked(models=frozenset({"teacher", "critic"}), data={"episodes": "prompts"}), offered)
        'the model critic; the data episodes'
    """
    missing = [f"the model {name}" for name in sorted(needs.models - offered.models)]
    missing += [f"the data {name}" for name in sorted(set(needs.data) - offered.data)]
    wanted = {column for columns in needs.columns.values() for column in columns}
    missing += [f"the column {name}" for name in sorted(wanted - offered.columns)]
    if needs.answers and not offered.answers:
        missing.append("a checker of answers")
    return "; ".join([*missing, *needs.other])
