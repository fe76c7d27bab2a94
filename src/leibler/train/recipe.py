"""Recipes: typed values that check themselves when they are built."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace

from leibler.errors import RecipeError
from leibler.estimate import check, exactness, spelt
from leibler.objective.needs import Comparison, LogProb, Need, Output, OverVocabulary
from leibler.objective.objective import Objective, walk
from leibler.objective.schedules import Hinge
from leibler.objective.signals import Importance, Signal
from leibler.objective.targets import Behaviour, Given, Handle, Old, Only, Policy
from leibler.objective.terms import Match, PolicyGradient, Term
from leibler.train.models import Frozen, Measured, ModelRule, Trained
from leibler.train.sources import Origin, Source

RESERVED = {"policy", "old", "behaviour"}


@dataclass(frozen=True)
class Schedule:
    """How often a drawn batch is used, and when rounds turn.

    Attributes:
        minibatches: optimiser batches that a draw is cut into (whole groups).
        epochs: passes over each draw.
        steps_per_round: optimiser steps in a round; `Snapshot` models follow rounds. 0: one endless round.
    """

    minibatches: int = 1
    epochs: int = 1
    steps_per_round: int = 0

    def __post_init__(self) -> None:
        for name in ("minibatches", "epochs"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name}={getattr(self, name)} must be at least 1.")
        used = self.minibatches * self.epochs
        if self.steps_per_round < 0 or self.steps_per_round % used:
            raise RecipeError(
                f"steps_per_round={self.steps_per_round} must be a multiple of the {used} steps that each draw is used "
                "for, so that rounds turn between draws."
            )

    @property
    def single_use(self) -> bool:
        """Each drawn batch sees exactly one optimiser step: the old policy is the current one."""
        return self.minibatches * self.epochs == 1


@dataclass(frozen=True)
class Recipe:
    """A training method as a value: where rows come from, what is descended, which models take part.

    Building one checks it: every stream that a term names exists, every sampled estimator is exact for the law that
    its events come from (the law is inferred from the stream's origin and the target), every model has a rule.

    Attributes:
        source, objective, schedule, models: see above.
        elsewhere: the policy's responses come from another engine, whose law is the policy's up to its arithmetic.
            Sampled terms then weight each token by policy / behaviour; the policy gradient by at most 2 (truncated
            importance sampling: Your Efficient RL Framework Secretly Brings You Off-Policy RL Training, 2025).

    Examples:
        >>> from leibler.divergence import ForwardKL
        >>> from leibler.objective import Match, Objective, Teacher
        >>> from leibler.train import Data, Recipe
        >>> recipe = Recipe(Data(), Objective(Match(ForwardKL(), to=Teacher())))
        >>> sorted(recipe.models)
        ['teacher']
    """

    source: Source
    objective: Objective
    schedule: Schedule = field(default_factory=Schedule)
    models: Mapping[str, ModelRule] = field(default_factory=dict)
    elsewhere: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.objective, Term):
            object.__setattr__(self, "objective", Objective(self.objective))
        if not self.objective.terms:
            raise RecipeError("the objective has no term with a coefficient other than 0; add one.")
        streams = self.source.streams()
        bound = tuple(self._bind(term, streams) for term in self.objective.terms)
        object.__setattr__(self, "objective", Objective(*bound))
        object.__setattr__(self, "models", self._with_defaults())
        self._check_modules()

    def _bind(self, term: Term, streams: Mapping[str, Origin]) -> Term:
        on = term.on
        if on is None:
            if len(streams) > 1:
                raise RecipeError(f"the term {term.name} must say which stream it is on: {', '.join(streams)}.")
            on = next(iter(streams))
            term = replace(term, on=on)
        if on not in streams:
            raise RecipeError(f"the term {term.name} is on {on!r}, but the source has {', '.join(streams)}.")
        law = streams[on].law
        if isinstance(term, Match) and not term.exact:
            term = self._bind_sampler(term, streams[on])
        if isinstance(term, PolicyGradient) and law is None and on in self.source.fresh():
            raise RecipeError(
                f"the responses of {on!r} are of no single law, so no ratio makes a policy gradient of them; draw the "
                "stream with OnPolicy(), or match a divergence over the vocabulary with Exact()."
            )
        if isinstance(term, PolicyGradient) and law not in (None, Old()) and term.surrogate.anchor == Old():
            raise RecipeError(
                f"the ratio of the policy gradient on {term.on!r} is taken to the old policy, but its responses are "
                "sampled from another law; use a surrogate with anchor=Behaviour()."
            )
        if self.elsewhere and isinstance(term, PolicyGradient) and law == Old() and term.surrogate.anchor == Old():
            # The terms take the samples for the policy's own, which another engine's are nearly, but not quite.
            nearly = Importance(Policy() if self.schedule.single_use else Old(), Behaviour(), most=2.0)
            if nearly not in [part for part, _ in walk(term)]:
                term = replace(term, weight=nearly if term.weight == 1.0 else nearly * term.weight)
        self._check_coefficient(term)
        return term

    def _check_coefficient(self, term: Term) -> None:
        coefficient = term.coefficient
        if isinstance(coefficient, Signal) and coefficient.reach != "batch":
            raise RecipeError(
                f"the coefficient of {term.name} gives one number per {coefficient.reach}, not one; make it the weight."
            )
        if any(isinstance(s, Hinge) and s is not coefficient for s, _ in walk(term)):
            raise RecipeError(
                f"a Hinge must be the whole coefficient of a term, not a part of a signal of {term.name}."
            )
        if not isinstance(coefficient, Hinge):
            return
        if not isinstance(term, Match):
            raise RecipeError(f"a Hinge bounds the divergence of a Match, and {term.name} is none; use a number there.")
        law = term.sampled_from
        if law is not None and not (term.credit == "token" and exactness(term.divergence, term.estimator, law).value):
            raise RecipeError(
                f"a Hinge reads the value of {term.name}, and {spelt(term.estimator)} does not average to it; use "
                "Exact(), or K1() on samples of the target."
            )

    def _bind_sampler(self, term: Match, origin: Origin) -> Match:
        if origin.law is None:
            held = "responses of no single law" if term.on in self.source.fresh() else "data"
            raise RecipeError(
                f"{term.name} with {type(term.estimator).__name__}() needs sampled sequences, but its stream "
                f"{term.on!r} holds {held}; use Exact(), or draw the stream with OnPolicy()."
            )
        own = origin.law == Old() and not self.elsewhere
        fresh = own and self.schedule.single_use
        if term.to == origin.law:
            term = replace(term, sampled_from="target")
        elif fresh:
            term = replace(term, sampled_from="model")
        else:
            behaviour = Old() if own else Behaviour()
            term = replace(term, sampled_from="behaviour", behaviour=behaviour)
        if term.credit != "token" and self.elsewhere:
            raise RecipeError(
                f"credit={term.credit!r} weights whole responses, which another engine's log-probs are too coarse for; "
                "leave out rollouts=."
            )
        if term.credit != "token" and (origin.law != Old() or term.sampled_from == "target"):
            raise RecipeError(
                f"credit={term.credit!r} needs responses sampled from the policy itself, and a target other than it; "
                "use OnPolicy() without a sampler, or credit='token'."
            )
        assert term.sampled_from is not None
        if term.credit == "token":
            check(term.divergence, term.estimator, term.sampled_from, target_normalised=term.to.normalised)
        return term

    def _with_defaults(self) -> dict[str, ModelRule]:
        rules = dict(self.models)
        for handle in sorted(self.handles(), key=lambda h: h.name):
            if handle.name not in RESERVED and handle.name not in rules:
                rules[handle.name] = Frozen("initial" if handle.name == "reference" else handle.name)
        return rules

    def _check_modules(self) -> None:
        for handle in self.source.handles():
            if isinstance(handle, Given):
                raise RecipeError(f"responses cannot be sampled from {handle.name!r} given a view; name the model.")
            if isinstance(handle, Only):
                raise RecipeError("responses cannot be sampled from a Routed law; name one model, or mix them.")
        for need in self.needs():
            if isinstance(need, LogProb) and isinstance(need.of, Given) and need.of.name == "policy":
                raise RecipeError("a log-prob of the policy given a view is taken once per draw: name it Given(Old()).")
            if isinstance(need, Output) and not isinstance(self.models.get(need.module), Trained):
                raise RecipeError(
                    f"the objective reads the output of {need.module!r}, which no model rule trains; "
                    f"add models={{{need.module!r}: Trained(ValueHead())}}."
                )
            if isinstance(need, Comparison) and not isinstance(self.models.get(need.module), Measured):
                raise RecipeError(
                    f"the objective compares hidden states by {need.module!r}, which nothing has measured; "
                    f"add models={{{need.module!r}: Measured(data=NAME)}}."
                )
            if isinstance(need, OverVocabulary):
                for handle in need.to.handles:
                    if handle.name in ("old", "behaviour"):
                        raise RecipeError(
                            f"a divergence over the whole vocabulary to {handle.name!r} needs its weights: name a "
                            "model with the rule Snapshot() and match that, or use a sampled estimator."
                        )

    def needs(self) -> set[Need]:
        """Every need of every term and signal."""
        found = {n for term in self.objective.terms for n in term.needs()}
        return found | {n for signal, _ in self.objective.walk() for n in signal.needs()}

    def stateful(self) -> dict[Signal, Hashable]:
        """The signals that keep state, in order, with the part that each belongs to."""
        found: dict[Signal, Hashable] = {}
        for signal, owner in self.objective.walk():
            if signal.init() is not None:
                found.setdefault(signal, owner)
        return found

    def handles(self) -> set[Handle]:
        """Every model that some part reads."""
        found = {*self.source.handles(), *self.source.readers()}
        for need in self.needs():
            if isinstance(need, LogProb):
                found.add(need.of)
            elif isinstance(need, OverVocabulary):
                found |= set(need.to.handles)
            elif isinstance(need, Comparison):
                found.add(need.to)
        return found | {Policy()}
