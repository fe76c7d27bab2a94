"""Named models and how their weights move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from leibler.errors import ModelError
from leibler.train.sharding import reshard

if TYPE_CHECKING:
    from leibler.policy import CausalLM


class ModelRule:
    """What stands behind a model's name, and when it changes.

    ``source`` is ``"initial"`` (the policy's weights at the start of the run) or the name of a model given to the run.
    """

    source: str = "initial"

    @property
    def moves(self) -> bool:
        """True if the weights change during the run (they belong in the checkpoint)."""
        return False

    def due(self, step: int, steps_per_round: int) -> bool:
        """True if the weights are refreshed before optimiser step ``step``."""
        return False

    def refresh(self, model: nn.Module, policy: nn.Module) -> None:
        """Bring the weights up to date, in place."""


@dataclass(frozen=True)
class Frozen(ModelRule):
    """Never changes."""

    source: str = "initial"


@dataclass(frozen=True)
class Snapshot(ModelRule):
    """A copy of the policy, renewed every ``every`` rounds."""

    every: int = 1
    source: str = "initial"

    @property
    def moves(self) -> bool:
        return True

    def due(self, step: int, steps_per_round: int) -> bool:
        return step > 0 and steps_per_round > 0 and step % (steps_per_round * self.every) == 0

    def refresh(self, model: nn.Module, policy: nn.Module) -> None:
        _interpolate(model, policy, 1.0)


@dataclass(frozen=True)
class EMA(ModelRule):
    """A moving average: after each step, ``weights += rate * (policy - weights)``."""

    rate: float = 0.01
    source: str = "initial"

    @property
    def moves(self) -> bool:
        return True

    def due(self, step: int, steps_per_round: int) -> bool:
        return step > 0

    def refresh(self, model: nn.Module, policy: nn.Module) -> None:
        _interpolate(model, policy, self.rate)


@dataclass(frozen=True)
class ValueHead:
    """Specification of a critic: a linear head on the policy's hidden states, one value per event.

    With ``through=False`` the policy's trunk gets no gradient from the critic.
    """

    through: bool = False


@dataclass(frozen=True)
class Trained(ModelRule):
    """A side module that is trained beside the policy."""

    spec: ValueHead = field(default_factory=ValueHead)
    learning_rate: float | None = None
    """None: the policy's."""

    @property
    def moves(self) -> bool:
        return True


def _interpolate(model: nn.Module, policy: nn.Module, rate: float) -> None:
    reshard(model, policy)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), policy.parameters(), strict=True):
            if rate == 1.0:
                mine.copy_(theirs)
            else:
                mine.lerp_(theirs, rate)


def resolve(
    rules: Mapping[str, ModelRule], policy: CausalLM, given: Mapping[str, CausalLM], align: str = "tokens"
) -> tuple[dict[str, CausalLM], dict[str, nn.Module]]:
    """The language models and the trained side modules of a recipe, by name.

    Equal frozen sources share one set of weights. Raises `ModelError` for a model that the recipe needs and the run
    was not given, and for one of another tokenizer unless ``align`` is ``"text"`` and it never changes.
    """
    from leibler.policy import ValueHead as ValueModule
    from leibler.policy import same_tokenizer

    models: dict[str, CausalLM] = {}
    modules: dict[str, nn.Module] = {}
    frozen: dict[str, CausalLM] = {}
    for name, rule in rules.items():
        if isinstance(rule, Trained):
            modules[name] = ValueModule(policy.hidden_size)
            continue
        if name in given:
            source = name
        elif rule.source == "initial" or rule.source in given:
            source = rule.source
        else:
            option = "teacher=DIR" if rule.source == "teacher" else f"models.{rule.source}=DIR"
            raise ModelError(f"the recipe needs the model {rule.source!r}, which was not given; add {option}.")
        if source not in frozen:
            # The student itself may stand for another model too: then its weights of now are meant.
            itself = source == "initial" or given[source] is policy
            frozen[source] = policy.copy() if itself else given[source].eval().requires_grad_(False)
        if rule.moves or align == "tokens":
            names = ("student", "teacher" if name == "teacher" else f"model {name}")
            same_tokenizer(policy, frozen[source], names, None if rule.moves else "align=text")
        models[name] = frozen[source].copy() if rule.moves else frozen[source]
    return models, modules
