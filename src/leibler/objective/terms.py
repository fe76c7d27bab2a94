"""Terms: the only things with a gradient. An objective is their sum.

A term states its mathematics once, over a `View`; it never learns how the batch was cut or which plan computed its
needs. ``loss`` returns a value and a weight per unit (event, row or comparison); the engine adds
``coefficient * weight * value / count`` with the count of the whole optimiser batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from torch import Tensor

from leibler.divergence import Divergence
from leibler.errors import RecipeError
from leibler.estimate import Exact, value
from leibler.estimate.estimators import Estimator
from leibler.objective.advantages import SequenceCredit
from leibler.objective.needs import Comparison, LogProb, Need, TokenDivergence, TokenEntropy, sampled, sampled_needs
from leibler.objective.preference import Contrast, Link, Logistic, Pairs, Score
from leibler.objective.reduce import Reduction, TokenMean
from leibler.objective.rows import Rows, View
from leibler.objective.signals import LogRatio, PerViolation, Signal
from leibler.objective.soft import Soft
from leibler.objective.surrogates import Clip, Surrogate
from leibler.objective.targets import Handle, Old, Policy, Reference, Target

Couples = Literal["token", "sequence", "group", "batch"]
Units = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Term:
    """What all terms share.

    Attributes:
        on: the stream of rows it sees (None: the recipe's only stream).
        coefficient: a number, a schedule or a controller.
        weight: detached numbers per event or row.
        reduce: how events become one number.
        where: the events that it is about: a role (``"chosen"``), or the name of a column of 0 and 1; None: all. The
            others neither contribute nor count.
    """

    on: str | None = None
    coefficient: Signal | float = 1.0
    weight: Signal | float = 1.0
    reduce: Reduction = field(default_factory=TokenMean)
    where: str | None = None
    couples: ClassVar[Couples] = "token"

    @property
    def name(self) -> str:
        """The name in the metrics."""
        raise NotImplementedError

    def needs(self) -> tuple[Need, ...]:
        """What ``loss`` reads from the view (signals' needs apart)."""
        raise NotImplementedError

    def signals(self) -> tuple[Signal, ...]:
        return tuple(s for s in (self.coefficient, self.weight) if isinstance(s, Signal))

    def loss(self, view: View) -> Units:
        raise NotImplementedError

    def measures(self, view: View) -> dict[str, Tensor]:
        """Numbers per event worth a line in the metrics, beside the loss."""
        return {}

    def count(self, rows: Rows) -> float:
        """The denominator: muted rows stay in it."""
        return self.reduce.count(self._inside(rows))

    def _inside(self, rows: Rows) -> Rows:
        return rows if self.where is None else replace(rows, mask=rows.inside(self.where))

    def _weights(self, view: View) -> Tensor:
        """The reduction's weight times the term's own, 0 at muted rows and outside of ``where``."""
        weight = self.reduce.weight(view, self._inside(view.rows).length)
        if self.where is not None:
            weight = weight * view.inside(self.where).to(weight.dtype)
        if self.weight != 1.0:
            weight = weight * view.signal(self.weight)
        if view.rows.muted is not None:
            weight = weight * (~view.to_events(view.rows.muted)).to(weight.dtype)
        return weight


@dataclass(frozen=True)
class PolicyGradient(Term):
    """``surrogate(log policy - log anchor, advantage)`` per event; the advantage is a signal."""

    advantage: Signal
    surrogate: Surrogate = field(default_factory=Clip)

    @property
    def name(self) -> str:
        return "policy_gradient"

    def needs(self) -> tuple[Need, ...]:
        return (LogProb(Policy()), *sampled_needs(self.surrogate.anchor))

    def signals(self) -> tuple[Signal, ...]:
        return (self.advantage, *super().signals())

    def loss(self, view: View) -> Units:
        # Detached: with the policy itself as anchor, the ratio is 1 in value and its gradient is the score.
        log_ratio = view.get(LogProb(Policy())) - sampled(self.surrogate.anchor, view.get).detach()
        return self.surrogate(log_ratio, view.signal(self.advantage)), self._weights(view)


@dataclass(frozen=True)
class Match(Term):
    """Descends the gradient of ``divergence(policy || to)`` at the visited contexts.

    With `Exact` the sum runs over the whole vocabulary; with a sampled estimator the recipe's check refuses every
    combination of divergence, sampling law and estimator whose gradient is another's. ``credit`` says which divergence
    of sequences is meant: ``token``, the conditional one at the visited contexts (as in distillation); ``to_go`` and
    ``sequence``, the divergence between whole responses, including the effect on later contexts.
    """

    divergence: Divergence
    to: Target
    estimator: Estimator = field(default_factory=Exact)
    credit: Literal["token", "to_go", "sequence"] = "token"
    sampled_from: Literal["model", "target", "behaviour"] | None = None
    behaviour: Target = field(default_factory=Old)
    """Both are inferred from the stream's origin when the recipe is built; not for the user to type."""

    def __post_init__(self) -> None:
        if self.credit != "token" and isinstance(self.estimator, Exact):
            raise RecipeError(
                f"credit={self.credit!r} needs a sampled estimator such as K1() or ScoreFunction(), not Exact()."
            )

    @property
    def name(self) -> str:
        of = self.to.name if isinstance(self.to, Soft) else "+".join(dict.fromkeys(h.name for h in self.to.handles))
        return f"{type(self.divergence).__name__}({of})"

    @property
    def exact(self) -> bool:
        return isinstance(self.estimator, Exact)

    def needs(self) -> tuple[Need, ...]:
        if self.exact:
            return (TokenDivergence(self.divergence, self.to),)
        needs: tuple[Need, ...] = (LogProb(Policy()), *sampled_needs(self.to))
        return (*needs, *sampled_needs(self.behaviour)) if self._reweighted else needs

    def signals(self) -> tuple[Signal, ...]:
        return super().signals() if self.credit == "token" else (self._credit, *super().signals())

    @property
    def _reweighted(self) -> bool:
        return self.sampled_from == "behaviour" or (self.credit != "token" and self.sampled_from == "model")

    @property
    def _credit(self) -> Signal:
        """The score-function coefficient of the sequences' divergence, per event."""
        assert self.credit != "token"
        return LogRatio(Old(), self.to) >> SequenceCredit(self.divergence, self.credit)

    def loss(self, view: View) -> Units:
        return self._value(view), self._weights(view)

    def _value(self, view: View) -> Tensor:
        if self.exact:
            return view.get(TokenDivergence(self.divergence, self.to))
        if self.sampled_from is None:
            raise RecipeError(f"{self.name} has no sampling law: it must be part of a Recipe before it is used.")
        logp = view.get(LogProb(Policy()))
        behaviour = sampled(self.behaviour, view.get) if self._reweighted else None
        if self.credit != "token":
            # exp(log p - log mu): the ratio on stale samples, and 1 in value with the score as gradient on fresh ones.
            assert behaviour is not None
            return (logp - behaviour).clamp(max=20.0).exp() * view.signal(self._credit)
        target = sampled(self.to, view.get)
        return self.estimator.loss(self.divergence, logp, target, self.sampled_from, behaviour_logp=behaviour)

    def measures(self, view: View) -> dict[str, Tensor]:
        """The divergence itself (unbiased), whatever was descended; nothing where sampled tokens cannot tell it."""
        if self.exact:
            return {"divergence": view.get(TokenDivergence(self.divergence, self.to))}
        if not self.to.normalised:
            return {}
        measured = value(
            view.get(LogProb(Policy())),
            sampled(self.to, view.get),
            divergence=self.divergence,
            sampled_from=self.sampled_from or "model",
            behaviour_logp=sampled(self.behaviour, view.get) if self.sampled_from == "behaviour" else None,
            reduction="none",
        )
        return {"divergence": measured}


@dataclass(frozen=True)
class Imitate(Term):
    """``-log policy(label)`` (negative log-likelihood, nats per event)."""

    @property
    def name(self) -> str:
        return "nll"

    def needs(self) -> tuple[Need, ...]:
        return (LogProb(Policy()),)

    def loss(self, view: View) -> Units:
        return -view.get(LogProb(Policy())), self._weights(view)


@dataclass(frozen=True)
class EntropyBonus(Term):
    """``-coefficient * entropy`` of the policy's next-token law."""

    @property
    def name(self) -> str:
        return "entropy_bonus"

    def needs(self) -> tuple[Need, ...]:
        return (TokenEntropy(),)

    def loss(self, view: View) -> Units:
        return -view.get(TokenEntropy()), self._weights(view)


@dataclass(frozen=True)
class Preference(Term):
    """``link(contrast of the rows' scores)``, a mean over comparisons of the whole optimiser batch."""

    score: Score
    link: Link = field(default_factory=Logistic)
    contrast: Contrast = field(default_factory=Pairs)
    couples: ClassVar[Couples] = "group"

    def __post_init__(self) -> None:
        if self.weight != 1.0 or self.reduce != TokenMean() or self.where is not None:
            raise RecipeError(
                "Preference compares whole responses: it takes no weight, reduce or where; scale it by its coefficient."
            )

    @property
    def name(self) -> str:
        return "preference"

    def needs(self) -> tuple[Need, ...]:
        return self.score.needs()

    def count(self, rows: Rows) -> float:
        return self.contrast.count(rows)

    def loss(self, view: View) -> Units:
        z, weight = self.contrast(self.score(view), view.rows)
        return self.link(z), weight


@dataclass(frozen=True)
class MatchHidden(Term):
    """Keeps the policy's last hidden states in the bands that another model's were in: the activation margin loss.

    With ``per="violation"`` (as published) the loss is the sum of all violations over their number, so it is as large
    for one entry that has left its band as for many; the number is that at the draw, over the whole batch. Mending
    small violations can raise such a mean. ``per="entry"`` divides by all tokens times units. Source: Towards
    Efficient Anti-Forgetting in Continual Learning of LLM via General Samples Replay (2025).

    Attributes:
        to: the model whose hidden states are kept.
        band: the side module that knows the bands (a model rule `Measured`).
        per: see above.
    """

    to: Handle = field(default_factory=Reference)
    band: str = "band"
    per: Literal["violation", "entry"] = "violation"

    @property
    def name(self) -> str:
        return f"hidden({self.to.name})"

    def needs(self) -> tuple[Need, ...]:
        return (Comparison(self.band, self.to),)

    def signals(self) -> tuple[Signal, ...]:
        return (*self._per, *super().signals())

    @property
    def _per(self) -> tuple[Signal, ...]:
        return (PerViolation(Comparison(self.band, self.to, 1), self.where),) if self.per == "violation" else ()

    def loss(self, view: View) -> Units:
        weight = self._weights(view)
        for signal in self._per:
            weight = weight * view.signal(signal)
        return view.get(Comparison(self.band, self.to)), weight


@dataclass(frozen=True)
class SquaredError:
    """``(prediction - target)^2 / 2``."""

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return 0.5 * (prediction - target) ** 2


@dataclass(frozen=True)
class Fit(Term):
    """``loss(prediction, target)`` per event for a trained side module, e.g. a critic."""

    loss_function: SquaredError
    prediction: Need
    target: Signal

    @property
    def name(self) -> str:
        return f"fit({getattr(self.prediction, 'module', 'output')})"

    def needs(self) -> tuple[Need, ...]:
        return (self.prediction,)

    def signals(self) -> tuple[Signal, ...]:
        return (self.target, *super().signals())

    def loss(self, view: View) -> Units:
        return self.loss_function(view.get(self.prediction), view.signal(self.target)), self._weights(view)
