"""How a step is computed: which numbers the head pass yields for each stream, and in how many passes."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from leibler.divergence import Entropy, SampledLogProb
from leibler.divergence.rows import Functional
from leibler.estimate import exactness
from leibler.objective.advantages import InReward
from leibler.objective.coupled import Coupled
from leibler.objective.needs import Comparison, LogProb, Need, Output, TokenDivergence, TokenEntropy
from leibler.objective.schedules import Hinge
from leibler.objective.signals import Chain, Column, Combined, Reward, rollout_parts
from leibler.objective.targets import Arithmetic, Geometric, Given, Handle, LogLinear, Old, Policy, Routed, Target
from leibler.objective.terms import Match, Term
from leibler.train.pipeline import STUDENT, Pipeline
from leibler.train.recipe import Recipe
from leibler.train.sources import Mixture, Staged

Kind = Literal["one pass", "two-pass head", "survey and replay"]


@dataclass(frozen=True)
class StreamPlan:
    """The work on one stream.

    Attributes:
        terms: those that read the policy's rows over the vocabulary.
        side: those that read trained side modules only.
        coupled: those of several rows over the vocabulary.
        wants: the policy's numbers per event, in the order of the head pass.
        targets: the distinct targets of the wants that have one.
        constants: log-probs that do not change during the draw, computed once per draw.
        outputs: side modules that are read with gradient, and at the draw.
        kind: how the differentiable parts are coupled.
        survey: true if some coefficient depends on a measurement over the whole optimiser batch.
    """

    stream: str
    terms: tuple[Term, ...]
    side: tuple[Term, ...]
    coupled: tuple[Coupled, ...]
    wants: tuple[Need, ...]
    targets: tuple[Target, ...]
    constants: tuple[LogProb, ...]
    outputs: tuple[Output | Comparison, ...]
    drawn_outputs: tuple[Output | Comparison, ...]
    substitute_old: bool
    kind: Kind
    survey: bool

    @property
    def every(self) -> tuple[Term, ...]:
        return (*self.terms, *self.side, *self.coupled)

    def functional(self, need: Need) -> tuple[Functional, int | None]:
        """The functional behind a want and the index of its target."""
        if isinstance(need, LogProb):
            return SampledLogProb(), None
        if isinstance(need, TokenEntropy):
            return Entropy(), None
        assert isinstance(need, TokenDivergence)
        return need.divergence, self.targets.index(need.to)


def of_policy(need: Need) -> bool:
    """True for numbers that the policy's own head pass yields at the step."""
    return need == LogProb(Policy()) or isinstance(need, (TokenEntropy, TokenDivergence))


def make_plan(recipe: Recipe, stream: str) -> StreamPlan:
    """The cheapest exact plan of one stream."""
    terms = [t for t in recipe.objective.terms if t.on == stream]
    head = tuple(t for t in terms if any(of_policy(n) for n in t.needs()))
    coupled = tuple(t for t in terms if isinstance(t, Coupled))
    side = tuple(t for t in terms if t not in head and not isinstance(t, Coupled))
    # Signals of the step clock read the policy's current numbers; those of the rollout clock the draw's.
    term_needs = [n for t in terms for n in t.needs()]
    top = [s for t in terms for s in t.signals()]
    signal_needs = [n for s in top for n in s.needs()]
    wants = dict.fromkeys([n for n in (*term_needs, *signal_needs) if of_policy(n)])
    wants.setdefault(TokenEntropy(), None)
    targets = dict.fromkeys([*(n.to for n in wants if isinstance(n, TokenDivergence)), *(t.law for t in coupled)])
    needs_old_at_draw = LogProb(Old()) in [n for s in top for part in rollout_parts(s) for n in part.needs()]
    substitute = recipe.schedule.single_use and not needs_old_at_draw
    constants = dict.fromkeys(
        n
        for n in (*term_needs, *signal_needs)
        if isinstance(n, LogProb) and n.of != Policy() and not (substitute and n.of == Old())
    )
    couples = {t.couples for t in head}
    survey = any(isinstance(t.coefficient, Hinge) for t in terms)
    kind: Kind = "one pass"
    if couples - {"token"}:
        kind = "survey and replay" if survey or "batch" in couples else "two-pass head"
    return StreamPlan(
        stream,
        head,
        side,
        coupled,
        tuple(wants),
        tuple(targets),
        tuple(constants),
        tuple(dict.fromkeys(n for n in term_needs if isinstance(n, (Output, Comparison)))),
        tuple(dict.fromkeys(n for n in signal_needs if isinstance(n, (Output, Comparison)))),
        substitute,
        kind,
        survey,
    )


def describe(recipe: Recipe | Pipeline) -> str:
    """The recipe, the plan of each stream, the models with their rules, and what is biased; for people.

    Of a pipeline, all that for each stage.
    """
    if isinstance(recipe, Pipeline):
        return "\n\n".join(f"{_stage(recipe, name)}\n{describe(s.recipe)}" for name, s in recipe.stages.items())
    lines = ["Recipe", f"  source: {_short(recipe.source)}", *_schedule(recipe)]
    lines.append("  objective (a sum of terms)")
    for term in recipe.objective.terms:
        lines.append(f"    {term.name}: {_short(term)}")
    lines.append("Models")
    lines.append("  policy: trained")
    lines += [f"  {name}: {_short(rule)}" for name, rule in recipe.models.items()]
    lines.append("Plan")
    for stream in recipe.source.streams():
        plan = make_plan(recipe, stream)
        if not plan.every:
            continue
        read = dict.fromkeys(h for t in plan.targets for h in t.handles)
        lines.append(f"  {stream}: {plan.kind}" + (", after a survey of the optimiser batch" if plan.survey else ""))
        lines.append(f"    per token: {', '.join(_need(n) for n in plan.wants)}")
        for term in plan.coupled:
            lines.append(
                f"    {term.name}: whole rows at {term.sites} events of each process at most, kept until all are read; "
                "a pass without gradient before, where the batch is cut"
            )
        if plan.constants:
            lines.append(f"    once per draw: {', '.join(_need(n) for n in plan.constants)}")
        forward, backward = 1 + len(read), 2
        if plan.kind == "two-pass head":
            forward *= 2
        if plan.survey or plan.kind == "survey and replay":
            forward *= 2
        lines.append(f"    products with a head: {forward} forward, {backward} backward")
    lines.append("Exactness")
    lines += [f"  {line}" for line in _exactness(recipe)]
    return "\n".join(lines)


def _stage(pipeline: Pipeline, name: str) -> str:
    """The heading of a stage: where it stands, what it starts from, what it reads, its part of the run."""
    stage, shares = pipeline.stages[name], [s.share for s in pipeline.stages.values()]
    lines = [f"Stage {pipeline.folders()[name]}", f"  trains: {_of(stage.start)}"]
    lines += [f"  {model}: {_of(of)}" for model, of in stage.models.items()]
    rate = "" if stage.learning_rate is None else f", learning rate {stage.learning_rate:g}"
    return "\n".join([*lines, f"  steps: {stage.share / sum(shares):.0%} of the run's{rate}"])


def _of(stage: str) -> str:
    return "the student as given" if stage == STUDENT else f"the model that {stage} left"


def _exactness(recipe: Recipe) -> list[str]:
    out = []
    for term in recipe.objective.terms:
        if not isinstance(term, Match):
            continue
        if term.exact:
            out.append(f"{term.name}: exact over the vocabulary, at the visited contexts")
            continue
        assert term.sampled_from is not None
        if term.credit != "token":
            stale = "" if recipe.schedule.single_use else " at the first step of a draw, then weighted token by token"
            out.append(f"{term.name}: score function of whole responses (credit {term.credit}), unbiased{stale}")
            continue
        verdict = exactness(term.divergence, term.estimator, term.sampled_from)
        out.append(
            f"{term.name}: sampled from the {term.sampled_from}; the gradient is "
            f"{'unbiased' if verdict.gradient else 'BIASED'}, the loss's value is "
            f"{'unbiased' if verdict.value else 'biased'}" + (f" ({verdict.note})" if verdict.note else "")
        )
    for _, owner in recipe.objective.walk():
        if isinstance(owner, InReward):
            line = (
                f"ReverseKL({_short(owner.to)}) inside the reward: k1, unbiased for whole responses with returns to go"
            )
            out += [line] if line not in out else []
    return out or ["no divergence is matched"]


def _schedule(recipe: Recipe) -> list[str]:
    s = recipe.schedule
    used = "once" if s.single_use else f"in {_many(s.epochs, 'epoch')} of {_many(s.minibatches, 'optimiser batch')}"
    rounds = f", rounds of {s.steps_per_round} steps" if s.steps_per_round else ""
    return [f"  schedule: each draw is used {used}{rounds}"]


def _many(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}{'es' if what.endswith('tch') else 's'}"


def _need(need: Need) -> str:
    if isinstance(need, LogProb):
        return f"log-prob under {_short(need.of)}"
    if isinstance(need, TokenEntropy):
        return "entropy"
    assert isinstance(need, TokenDivergence)
    return f"{_short(need.divergence)} to {_short(need.to)}"


def _short(value: Any) -> str:
    """A dataclass without the fields that stand at their defaults."""
    if isinstance(value, Handle):
        return f"{value.name} given {value.view}" if isinstance(value, Given) else value.name
    if isinstance(value, dict) or hasattr(value, "items"):
        return "{" + ", ".join(f"{_short(k)}: {_short(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return "(" + ", ".join(_short(v) for v in value) + ("," if len(value) == 1 else "") + ")"
    if isinstance(value, Chain):
        return f"{_short(value.first)} >> {_short(value.then)}"
    if isinstance(value, Combined):
        left, right = (f"({_short(v)})" if isinstance(v, Chain) else _short(v) for v in (value.left, value.right))
        return f"({left} {value.operation} {right})"
    if isinstance(value, Staged):
        return f"{_short(value.source)} >> {_short(value.stage)}"
    if isinstance(value, Mixture):
        return f"Mixture({', '.join(f'{name}={_short(source)}' for name, source in value.sources)})"
    if isinstance(value, (LogLinear, Arithmetic, Geometric)):
        inside = ", ".join(f"{_short(part)}: {weight:.4g}" for part, weight in value.parts)
        clip = getattr(value, "clip", None)
        return f"{type(value).__name__}({{{inside}}}{'' if clip is None else f', clip={clip:g}'})"
    if isinstance(value, Routed):
        return f"Routed({value.column}, {_short(dict(value.models))})"
    if isinstance(value, Column) and value == Reward():
        return "Reward()"
    if not is_dataclass(value) or isinstance(value, type):
        return getattr(value, "__name__", None) or repr(value)
    shown = []
    for f in fields(value):
        here = getattr(value, f.name)
        if f.name in ("on", "sampled_from", "behaviour") or not f.repr:
            continue
        try:
            default = f.default_factory() if callable(f.default_factory) else f.default  # type: ignore[misc]
        except TypeError:
            default = f.default
        if here != default:
            shown.append(f"{f.name}={_short(here)}")
    return f"{type(value).__name__}({', '.join(shown)})"
