"""What a run works with: its data and its models, read and checked before the first step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from leibler.train import run_file, setup, stored
from leibler.train.masking import check_kind
from leibler.train.models import measured, resolve
from leibler.train.options import Options
from leibler.train.recipe import Recipe

if TYPE_CHECKING:
    from leibler.cache import TeacherCache
    from leibler.data import Dataset
    from leibler.policy import CausalLM


@dataclass(frozen=True, eq=False)
class Material:
    """Data and models of a run.

    Attributes:
        options: the run's, where a validation changed them.
        policy: what is trained.
        models: all language models in memory, by name, the policy among them.
        modules: side modules by name.
        stored: the teacher caches that stand for models.
        data, validation: records.
        identity: what a resumed run must find again.
    """

    options: Options
    policy: CausalLM
    models: dict[str, CausalLM]
    modules: dict[str, nn.Module]
    stored: dict[str, TeacherCache]
    data: dict[str, Dataset]
    validation: Dataset | None
    identity: dict[str, dict[str, str]]


def load(
    recipe: Recipe,
    options: Options,
    aside: Path | None,
    say: Callable[[str], None],
    resumed: Path | None,
    *,
    student: Any,
    teacher: Any,
    models: Mapping[str, Any],
    data: Any,
    validation: Any,
) -> Material:
    """Read data and models: what can fail before the processes need each other.

    Args:
        recipe, options: of the run.
        aside: where rows that cannot be used are written; None where another process does that.
        say: shows a sentence to whoever watches.
        resumed: the directory of the run that is gone on with.
        student, teacher, models, data, validation: as `leibler.train.fit` takes them.
    """
    policy = setup.load_model(student, options, trained=True, key="student")
    policy.requires_grad_(True) if not policy.has_adapter else None
    given = setup.load_models(recipe, teacher, models, options)
    specs = data if isinstance(data, Mapping) and not hasattr(data, "column_names") else {"train": data}
    loaded = setup.load_data(recipe, specs, policy, options, aside)
    options, loaded, held_out = setup.load_validation(validation, recipe, policy, options, loaded, aside)
    for name, dataset in {**{f"data.{n}": d for n, d in loaded.items()}, "validation": held_out}.items():
        if dataset is not None and dataset.set_aside_count:
            say(f"{name}: {dataset.set_aside_report()}")

    caches = stored.stored_models(recipe.models, given)
    live = {name: rule for name, rule in recipe.models.items() if name not in caches}
    found, modules = resolve(live, policy, given, options.align)
    modules |= measured(live, policy, found, loaded)
    found["policy"] = policy
    check_kind(recipe, found)
    stored.check(recipe, caches, policy, loaded, options.temperature)
    identity = run_file.identity(loaded, found, caches)
    if resumed is not None:
        run_file.check_identity(resumed, identity)
    return Material(options, policy, found, modules, caches, loaded, held_out, identity)
