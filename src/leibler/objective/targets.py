"""Distributions as values: handles of models, and expressions over them.

The same expression serves as the target of a divergence, an operand of an advantage, the anchor of a clip, and the
law that sequences are sampled from. Handles are names; the engine knows which weights stand behind a name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from leibler.divergence.rows import LOG2E
from leibler.errors import RecipeError

Lookup = Callable[["Handle"], Tensor]


class Target:
    """A law of the next token given the context (level: full vocabulary, or the sampled token only).

    ``handles`` are the models it reads; ``sampled`` combines their log-probs of the sampled token; ``combine``, their
    base-2 log-probability rows (None: the single handle's logits are the target's).
    """

    normalised: ClassVar[bool] = True

    @property
    def handles(self) -> tuple[Handle, ...]:
        raise NotImplementedError

    def sampled(self, logp: Lookup) -> Float[Tensor, " n"]:
        raise NotImplementedError

    @property
    def combine(self) -> Callable[[tuple[Tensor, ...]], Tensor] | None:
        return None


@dataclass(frozen=True)
class Handle(Target):
    """A model by its name in the recipe."""

    name: str

    @property
    def handles(self) -> tuple[Handle, ...]:
        return (self,)

    def sampled(self, logp: Lookup) -> Tensor:
        return logp(self)


@dataclass(frozen=True)
class Given(Handle):
    """A model that reads another view of the rows: the same events after another prompt, such as one that holds the
    answer (privileged information). The source of the rows makes the view.

    Examples:
        >>> Given(Teacher(), "privileged")
        Given(name='teacher', view='privileged')
    """

    view: str = "privileged"

    def __init__(self, model: Handle | str, view: str = "privileged") -> None:
        object.__setattr__(self, "name", model if isinstance(model, str) else model.name)
        object.__setattr__(self, "view", view)


@dataclass(frozen=True)
class Only(Handle):
    """A model that is asked about the rows of some domains, for `Routed`.

    Elsewhere its law is uniform, and its log-probs are 0.
    """

    column: str = ""
    values: tuple[str, ...] = ()
    known: tuple[str, ...] = ()


def Policy() -> Handle:
    """The model being trained, at this very step."""
    return Handle("policy")


def Old() -> Handle:
    """The policy when the batch was drawn, recomputed by the trainer."""
    return Handle("old")


def Behaviour() -> Handle:
    """What the sampler reported while sampling (a mixture, a stale policy, another engine's arithmetic)."""
    return Handle("behaviour")


def Reference() -> Handle:
    """The model that the policy is kept close to: by default, its own initial weights."""
    return Handle("reference")


def Teacher() -> Handle:
    """The model to be imitated."""
    return Handle("teacher")


def Model(name: str) -> Handle:
    """Any other named model of the recipe."""
    return Handle(name)


def as_target(value: Target | str) -> Target:
    return Handle(value) if isinstance(value, str) else value


def _pairs(parts: Mapping[Target | str, float] | tuple[tuple[Target, float], ...]) -> tuple[tuple[Target, float], ...]:
    items = parts.items() if isinstance(parts, Mapping) else parts
    # A zero coefficient times a log-prob of -inf would be NaN: prune it here, once.
    parts = tuple((as_target(t), float(c)) for t, c in items if c != 0)
    for part, _ in parts:
        if not part.handles:
            raise RecipeError(f"{type(part).__name__} is the law of no model and cannot be combined; match it alone.")
    return parts


def _rows_of(parts: tuple[tuple[Target, float], ...], leaves: tuple[Tensor, ...]) -> list[Tensor]:
    """The log-score rows of each operand, from the rows of all their handles."""
    out, at = [], 0
    for part, _ in parts:
        count = len(part.handles)
        rows = leaves[at : at + count]
        out.append(rows[0] if part.combine is None else _log_normalised(part.combine(rows)))
        at += count
    return out


def _log_normalised(scores: Tensor) -> Tensor:
    """Base-2 log-softmax."""
    top = scores.amax(-1, keepdim=True)
    return scores - top - torch.log2(torch.exp2(scores - top).sum(-1, keepdim=True))


@dataclass(frozen=True)
class LogLinear(Target):
    """``prod_k target_k ** c_k``, normalised at each token when the whole vocabulary is at hand.

    At the sampled level the product cannot be normalised: gradients of ``K2`` are unaffected, values shift by log Z.
    ``clip`` bounds the log-ratio of each other model to the first, in nats (extrapolation blows up on tokens that a
    negatively weighted model finds rare).

    Examples:
        >>> LogLinear({Teacher(): 1.25, Reference(): -0.25}).handles
        (Handle(name='teacher'), Handle(name='reference'))
    """

    parts: tuple[tuple[Target, float], ...]
    clip: float | None = None
    normalised: ClassVar[bool] = False

    def __init__(
        self, parts: Mapping[Target | str, float] | tuple[tuple[Target, float], ...], clip: float | None = None
    ) -> None:
        object.__setattr__(self, "parts", _pairs(parts))
        object.__setattr__(self, "clip", clip)
        if not self.parts:
            raise RecipeError("LogLinear needs at least one model with a coefficient other than 0.")

    @property
    def handles(self) -> tuple[Handle, ...]:
        return tuple(h for part, _ in self.parts for h in part.handles)

    def sampled(self, logp: Lookup) -> Tensor:
        return self._sum([part.sampled(logp) for part, _ in self.parts], 1.0)

    @property
    def combine(self) -> Callable[[tuple[Tensor, ...]], Tensor]:
        return lambda leaves: self._sum(_rows_of(self.parts, leaves), LOG2E)

    def _sum(self, logs: list[Tensor], unit: float) -> Tensor:
        coefficients = [c for _, c in self.parts]
        if self.clip is None:
            return sum((c * x for c, x in zip(coefficients[1:], logs[1:], strict=True)), coefficients[0] * logs[0])
        # first ** (sum c) * prod (other / first) ** c, each log-ratio bounded.
        total = sum(coefficients) * logs[0]
        for c, x in zip(coefficients[1:], logs[1:], strict=True):
            total = total + c * (x - logs[0]).clamp(-self.clip * unit, self.clip * unit)
        return total


@dataclass(frozen=True)
class Arithmetic(Target):
    """``sum_k w_k target_k``: a mixture of laws, token by token (weights sum to 1).

    Parts that are only known up to a constant are normalised where the whole vocabulary is at hand; from sampled tokens
    such a mixture cannot be told.
    """

    parts: tuple[tuple[Target, float], ...]

    def __init__(self, parts: Mapping[Target | str, float] | tuple[tuple[Target, float], ...]) -> None:
        object.__setattr__(self, "parts", _pairs(parts))
        total = sum(w for _, w in self.parts)
        if abs(total - 1) > 1e-9 or any(w < 0 for _, w in self.parts):
            raise RecipeError(f"the weights of Arithmetic must be positive and sum to 1, not {total:g}.")

    @property
    def normalised(self) -> bool:  # type: ignore[override]
        return all(part.normalised for part, _ in self.parts)

    @property
    def handles(self) -> tuple[Handle, ...]:
        return tuple(h for part, _ in self.parts for h in part.handles)

    def sampled(self, logp: Lookup) -> Tensor:
        if not self.normalised:
            raise RecipeError(
                "a mixture of laws without their normaliser cannot be told from sampled tokens; use Exact()."
            )
        logs = [part.sampled(logp) for part, _ in self.parts]
        weights = torch.tensor([w for _, w in self.parts], dtype=logs[0].dtype, device=logs[0].device).log()
        return torch.logsumexp(torch.stack(logs) + weights[:, None], dim=0)

    @property
    def combine(self) -> Callable[[tuple[Tensor, ...]], Tensor]:
        def mix(leaves: tuple[Tensor, ...]) -> Tensor:
            total: Tensor | None = None
            for rows, (_, w) in zip(_rows_of(self.parts, leaves), self.parts, strict=True):
                total = w * torch.exp2(rows) if total is None else total + w * torch.exp2(rows)
            assert total is not None
            return torch.log2(total.clamp_min(2.0**-120))

        return mix


@dataclass(frozen=True)
class Tempered(Target):
    """``target ** (1 / temperature)``, normalised at each token."""

    target: Target
    temperature: float = 1.0
    normalised: ClassVar[bool] = False

    @property
    def handles(self) -> tuple[Handle, ...]:
        return self.target.handles

    def sampled(self, logp: Lookup) -> Tensor:
        return self.target.sampled(logp) / self.temperature

    @property
    def combine(self) -> Callable[[tuple[Tensor, ...]], Tensor]:
        inner = self.target.combine
        return lambda leaves: (leaves[0] if inner is None else inner(leaves)) / self.temperature


@dataclass(frozen=True)
class Routed(Target):
    """Another model for each domain: the one that a column of the row's record names.

    Each model reads its own rows only; every one's head is multiplied over the whole batch where the vocabulary is
    summed over. Merging several teachers that way: Learning beyond Teacher (2026).

    Args:
        column: of the data; a record with a value that is not named here is an error.
        models: the model of each value, by name or handle.

    Examples:
        >>> experts = Routed("domain", {"math": "teacher_math", "code": "teacher_code"})
        >>> [handle.name for handle in experts.handles]
        ['teacher_math', 'teacher_code']
        >>> target = LogLinear({experts: 1.25, Reference(): -0.25})
    """

    column: str
    models: tuple[tuple[str, str], ...]

    def __init__(self, column: str, models: Mapping[str, Handle | str] | tuple[tuple[str, Handle | str], ...]) -> None:
        pairs = models.items() if isinstance(models, Mapping) else models
        if not pairs:
            raise RecipeError(f"Routed({column!r}) has no model; name one for each value of the column.")
        for value, model in pairs:
            if not isinstance(model, str) and type(model) is not Handle:
                raise RecipeError(f"Routed takes models by name, and {value!r} has {type(model).__name__}; name one.")
        named = tuple((str(v), m if isinstance(m, str) else m.name) for v, m in pairs)
        if reserved := {m for _, m in named} & {"policy", "old", "behaviour"}:
            raise RecipeError(f"Routed chooses among fixed models, and {min(reserved)!r} is the one that is trained.")
        object.__setattr__(self, "column", column)
        object.__setattr__(self, "models", named)

    @property
    def handles(self) -> tuple[Handle, ...]:
        values: dict[str, list[str]] = {}
        for value, model in self.models:
            values.setdefault(model, []).append(value)
        known = tuple(value for value, _ in self.models)
        return tuple(Only(model, self.column, tuple(own), known) for model, own in values.items())

    def sampled(self, logp: Lookup) -> Tensor:
        return torch.stack([logp(handle) for handle in self.handles]).sum(0)

    @property
    def combine(self) -> Callable[[tuple[Tensor, ...]], Tensor]:
        # A uniform law shifts every log-prob by the same number, which normalising takes away.
        return lambda leaves: sum(leaves[1:], leaves[0])


@dataclass(frozen=True)
class Lift(Target):
    """The law of a model with another tokenizer, lifted onto the student's vocabulary, which extends the model's.

    A new token n that the model reads as ``v_1 ... v_m`` gets ``tau(n | x) = prod_j p(v_j | x, v_<j)``, less what goes
    to longer new tokens that begin with it, and an old token what is left of ``p(v | x)``. Matching the model itself
    instead adds the student's new tokens to their first pieces: that takes no further forward pass, but does not see
    how mass divides between a new token and its first piece. By the data-processing inequality that is the smaller
    divergence. Source: KL-based self-distillation for large language models (2025); the construction is exact whatever
    the paper's own may be.

    Args:
        target: the model.
        threshold: a beginning of a new token with less probability than this is not followed: the new tokens behind it
            get 0, and it keeps its mass. Each one that is followed costs the model a forward pass.

    Examples:
        >>> Lift(Teacher(), threshold=1e-3).handles
        (Handle(name='teacher'),)
    """

    target: Handle
    threshold: float = 1e-3

    def __post_init__(self) -> None:
        if not isinstance(self.target, Handle):
            raise RecipeError("Lift takes the name of a model, such as Teacher(), not an expression over several.")
        if not 0 <= self.threshold < 1:
            raise RecipeError(f"the threshold of Lift is a probability from 0 to below 1, not {self.threshold}.")

    @property
    def handles(self) -> tuple[Handle, ...]:
        return self.target.handles

    def sampled(self, logp: Lookup) -> Tensor:
        raise RecipeError("a lifted law is made over the whole vocabulary, not told from sampled tokens; use Exact().")


@dataclass(frozen=True)
class Geometric:
    """A law of whole sequences, ``prod_k model_k(y|x) ** w_k`` up to a function of the prompt.

    Its log-density is the unnormalised weighted sum of log-probs over the sequence: normalising at each token would be
    another law with other preference margins. Not a token target, and never turned into one.
    """

    parts: tuple[tuple[Target, float], ...]

    def __init__(
        self, parts: Mapping[Target | str, float] | tuple[tuple[Target, float], ...] = (), **named: float
    ) -> None:
        given = parts if isinstance(parts, tuple) else _pairs(parts or {})
        pairs = given + _pairs({Handle(n): w for n, w in named.items()})
        object.__setattr__(self, "parts", pairs)
        if abs(sum(w for _, w in pairs) - 1) > 1e-9:
            raise RecipeError("the weights of Geometric must sum to 1.")

    @property
    def handles(self) -> tuple[Handle, ...]:
        return tuple(h for part, _ in self.parts for h in part.handles)

    def sampled(self, logp: Lookup) -> Tensor:
        total: Tensor | None = None
        for part, w in self.parts:
            term = w * part.sampled(logp)
            total = term if total is None else total + term
        assert total is not None
        return total
