"""Named models and how their weights move."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from leibler.environment.dialogue import encode_record
from leibler.errors import DataError, ModelError
from leibler.represent.activation import ActivationBand
from leibler.train.sharding import reshard

if TYPE_CHECKING:
    from leibler.data import Dataset
    from leibler.policy import CausalLM


class ModelRule:
    """What stands behind a model's name, and when it changes.

    ``source`` is ``"initial"`` (the policy's weights at the start of the run) or the name of a model given to the run.
    """

    source: str = "initial"
    side: ClassVar[bool] = False
    """True for what is no language model but a module beside the policy."""

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

    side: ClassVar[bool] = True
    spec: ValueHead = field(default_factory=ValueHead)
    learning_rate: float | None = None
    """None: the policy's."""

    @property
    def moves(self) -> bool:
        return True


@dataclass(frozen=True)
class Measured(ModelRule):
    """An `ActivationBand`: of each unit of a model's last hidden states, the mean plus and minus some deviations.

    It is measured once, before the first step, at every response of a data set of the run.

    Attributes:
        data: the name of the data set.
        of: the model; by default the policy's initial weights.
        sigmas: how many standard deviations the band reaches either side of the mean.
    """

    side: ClassVar[bool] = True
    data: str
    of: str = "initial"
    sigmas: float = 1.0

    @property
    def moves(self) -> bool:
        return True  # in the checkpoint: what a run goes on with does not hang on measuring the same again

    def measure(self, model: CausalLM, data: Dataset, rows: int = 16) -> ActivationBand:
        """The band of a model's hidden states, which predict the tokens of every completion."""
        from leibler.policy import right_pad
        from leibler.policy.model import evaluating

        def states() -> Iterator[torch.Tensor]:
            for start in range(0, len(data), rows):
                records = [data[i] for i in range(start, min(start + rows, len(data)))]
                pairs = [encode_record(model, r)[:2] for r in records]
                tokens, attention, mask = (x.to(model.device) for x in right_pad(pairs))
                yield model(tokens, attention)[:, :-1][mask]

        with torch.no_grad(), evaluating(model):
            return ActivationBand.of(states(), self.sigmas).to(model.device)


def _interpolate(model: nn.Module, policy: nn.Module, rate: float) -> None:
    reshard(model, policy)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), policy.parameters(), strict=True):
            if rate == 1.0:
                mine.copy_(theirs)
            else:
                mine.lerp_(theirs, rate)


def measured(
    rules: Mapping[str, ModelRule], policy: CausalLM, models: Mapping[str, CausalLM], data: Mapping[str, Dataset]
) -> dict[str, nn.Module]:
    """The side modules of a recipe that are measured before the first step, by name."""
    found: dict[str, nn.Module] = {}
    for name, rule in rules.items():
        if isinstance(rule, Measured):
            if rule.of != "initial" and rule.of not in models:
                raise ModelError(f"the band {name!r} is to be measured of {rule.of!r}, which the recipe has not.")
            if rule.data not in data:
                raise DataError(f"the band {name!r} is measured on the data {rule.data!r}, which no source draws.")
            found[name] = rule.measure(policy if rule.of == "initial" else models[rule.of], data[rule.data])
    return found


def source_of(name: str, rule: ModelRule, given: Container[str]) -> str:
    """What stands behind a model's name: the model given by that name, or what its rule says.

    Raises:
        ModelError: neither was given.
    """
    if name in given or rule.source == "initial" or rule.source in given:
        return name if name in given else rule.source
    option = "teacher=DIR" if rule.source == "teacher" else f"models.{rule.source}=DIR"
    raise ModelError(f"the recipe needs the model {rule.source!r}, which was not given; add {option}.")


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
        if rule.side:
            continue  # made once the data is at hand: see `measured`
        source = source_of(name, rule, given)
        if source not in frozen:
            # The student itself may stand for another model too: then its weights of now are meant.
            itself = source == "initial" or given[source] is policy
            frozen[source] = policy.copy() if itself else given[source].eval().requires_grad_(False)
        if rule.moves or align == "tokens":
            names = ("student", "teacher" if name == "teacher" else f"model {name}")
            same_tokenizer(policy, frozen[source], names, None if rule.moves else "align=text")
        models[name] = frozen[source].copy() if rule.moves else frozen[source]
    return models, modules
