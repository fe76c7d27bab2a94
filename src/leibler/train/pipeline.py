"""Training in several stages: each is an ordinary run, whose model later ones start from or read."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leibler import durable
from leibler.cache import fingerprint
from leibler.errors import DataError, ModelError, RecipeError, RunError
from leibler.objective.targets import Old, Policy
from leibler.policy.randomness import derived_seed
from leibler.safety import plain_name, printable
from leibler.train import run_file, setup
from leibler.train.models import source_of
from leibler.train.options import Options
from leibler.train.processes import Processes
from leibler.train.recipe import Recipe
from leibler.train.result import Run, finished
from leibler.train.stored import is_stored

if TYPE_CHECKING:
    from leibler.policy import CausalLM, LanguageModel

STUDENT = "student"
"""What a stage starts from, or reads, if not the result of an earlier stage."""
DONE = "stages.json"
"""In the run directory: the finished stages with the hashes of their models."""


@dataclass(frozen=True)
class TrainingStage:
    """One stage of a `Pipeline`.

    Attributes:
        recipe: what is done in it.
        start: what is trained: ``"student"``, the run's own, or the result of an earlier stage by its name.
        models: which of the recipe's named models are results of earlier stages (or ``"student"``, the run's own); the
            others are given to the run. ``reference`` is, as in any run, what this stage starts from.
        share: of the run's steps (and tokens), relative to the shares of the other stages.
        learning_rate: None: the run's.
    """

    recipe: Recipe
    start: str = STUDENT
    models: Mapping[str, str] = field(default_factory=dict)
    share: float = 1.0
    learning_rate: float | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < math.inf:
            raise RecipeError(f"share={self.share} of a stage must be greater than 0.")
        if self.learning_rate is not None and not self.learning_rate > 0:
            raise RecipeError(f"learning_rate={self.learning_rate} of a stage must be greater than 0.")
        for name in self.models:
            if name not in setup.models_read(self.recipe):
                known = ", ".join(sorted(setup.models_read(self.recipe) - {"initial"})) or "none"
                raise RecipeError(f"a stage sets the model {name!r}, which its recipe does not read (but: {known}).")


@dataclass(frozen=True)
class Pipeline:
    """A method of several stages, as a value; `fit` takes it in the place of a `Recipe`.

    Each stage is a run of its own in a numbered directory below the run's (``1-teach``, ``2-distil``), with everything
    that a run has; ``final`` is the last one's model. Steps are divided by the stages' shares, warm-up and decay of the
    learning rate are each stage's own, and each stage draws other random numbers. Going on with a run leaves finished
    stages as they are.

    Attributes:
        stages: by name, in their order.

    Raises:
        RecipeError: a stage names one that does not come before it.

    Examples:
        >>> from leibler.divergence import ForwardKL
        >>> from leibler.objective import Imitate, Match, Model, Objective
        >>> from leibler.train import Data, Pipeline, Recipe, TrainingStage
        >>> imitate = Recipe(Data(), Objective(Imitate()))
        >>> again = Recipe(Data(), Objective(Match(ForwardKL(), to=Model("last"))))  # born again
        >>> born = Pipeline({"first": TrainingStage(imitate), "second": TrainingStage(again, models={"last": "first"})})
        >>> list(born.stages)
        ['first', 'second']
    """

    stages: Mapping[str, TrainingStage]

    def __post_init__(self) -> None:
        if not self.stages:
            raise RecipeError("a Pipeline without stages does nothing; give at least one.")
        before = [STUDENT]
        for name, stage in self.stages.items():
            plain_name(name, "the stage")
            if name == STUDENT:
                raise RecipeError(f"a stage cannot be called {STUDENT!r}, which stands for the run's own model.")
            for what, of in (("starts from", stage.start), *((f"reads as {n!r}", m) for n, m in stage.models.items())):
                if of not in before:
                    raise RecipeError(f"the stage {name!r} {what} {of!r}, but before it are: {', '.join(before)}.")
            before.append(name)

    def folders(self) -> dict[str, str]:
        """The directory of each stage, below the run's."""
        return {name: f"{number}-{name}" for number, name in enumerate(self.stages, 1)}


def recipes_of(method: Recipe | Pipeline) -> dict[str, Recipe]:
    """The recipes of a method by stage; a recipe by itself has no name."""
    if isinstance(method, Recipe):
        return {"": method}
    return {name: stage.recipe for name, stage in method.stages.items()}


def divided(total: int, shares: Sequence[float]) -> list[int]:
    """A whole number in parts as near to the shares as can be, each at least 1.

    Examples:
        >>> divided(10, [1, 1, 2]), divided(3, [1, 1000])
        ([3, 2, 5], [1, 2])
    """
    exact = [total * share / sum(shares) for share in shares]
    parts = [max(math.floor(x), 1) for x in exact]
    while (over := sum(parts) - total) != 0:
        gap = [(x - part) for x, part in zip(exact, parts, strict=True)]
        at = gap.index(max(gap)) if over < 0 else max((i for i, p in enumerate(parts) if p > 1), key=lambda i: -gap[i])
        parts[at] += 1 if over < 0 else -1
    return parts


@dataclass(frozen=True, eq=False)
class _Given:
    """What the run was given, and what each stage gets of it."""

    pipeline: Pipeline
    student: Any
    teacher: Any
    models: Mapping[str, Any]
    data: Mapping[str, Any]
    validation: Any
    out: Path
    options: Options

    def names(self, name: str) -> set[str]:
        """The models that a stage can read, by name."""
        return {*self.models, *self.pipeline.stages[name].models, *(["teacher"] if self.teacher is not None else [])}

    def arguments(self, name: str) -> dict[str, Any]:
        """What `fit` takes, for one stage."""
        stage, read = self.pipeline.stages[name], setup.models_read(self.pipeline.stages[name].recipe)
        models = {n: model for n, model in self.models.items() if n in read}
        return {
            "student": self._result(stage.start, trained=True),
            "teacher": None if "teacher" in stage.models else self.teacher,
            "models": {**models, **{n: self._result(of) for n, of in stage.models.items()}},
            "data": {n: spec for n, spec in self.data.items() if n in stage.recipe.source.datasets()},
            "validation": self.validation,
            "options": self.of_stage(name),
        }

    def _result(self, of: str, *, trained: bool = False) -> Any:
        if of != STUDENT:
            return str(self.out / self.pipeline.folders()[of] / "final")
        return self.student if isinstance(self.student, (str, Path)) else _twin(self.student, trained)

    def of_stage(self, name: str) -> Options:
        options, number = self.options, list(self.pipeline.stages).index(name)
        stage, shares = self.pipeline.stages[name], [s.share for s in self.pipeline.stages.values()]
        samples = bool({Old(), Policy()} & set(stage.recipe.source.handles()))
        return replace(
            options,
            steps=divided(options.steps, shares)[number],
            tokens=divided(options.tokens, shares)[number] if options.tokens else options.tokens,
            learning_rate=stage.learning_rate or options.learning_rate,
            # Where two stages sample from one model, they must not draw the same responses.
            seed=derived_seed(options.seed, "stage", number, bits=31) if number else options.seed,
            rollouts=options.rollouts if samples else "here",
        )


def run(
    pipeline: Pipeline,
    fit: Callable[..., Run],
    origin: Mapping[str, Any],
    *,
    student: LanguageModel | str | Path,
    data: Any,
    out: Path,
    teacher: Any,
    models: Mapping[str, Any],
    validation: Any,
    options: Options,
    resume: bool,
    quiet: bool,
) -> Run:
    """`leibler.train.fit` of a pipeline: ``fit`` of each stage that is not finished, in order."""
    specs = data if isinstance(data, Mapping) and not hasattr(data, "column_names") else {"train": data}
    given = _Given(pipeline, student, teacher, models, specs, validation, out, options)
    processes = Processes.start(options, out)
    made = processes.from_main(lambda: setup.claim_directory(out, resume=resume))
    try:
        identity = processes.together(lambda: _check(given))
    except BaseException:
        if made and processes.main:
            setup.remove_empty(out)
        raise
    folders = pipeline.folders()
    show = not quiet and processes.main
    if resume:
        processes.from_main(lambda: run_file.check_identity(out, identity))
    else:
        inputs = {"student": student, "teacher": teacher, "models": models, "data": data, "validation": validation}
        whole = {**origin, "stages": list(folders.values())}
        differs = processes.from_main(
            lambda: run_file.write(
                *(out, whole, inputs, options, pipeline, identity), device=processes.device, processes=processes.world
            )
        )
        if differs and show:
            print(printable(run_file.sentence(differs, origin["repeats"])), file=sys.stderr, flush=True)
    last: Run | None = None
    for number, (name, folder) in enumerate(folders.items(), 1):
        if processes.from_main(lambda folder=out / folder, name=name: _is_finished(out, name, folder)):
            continue
        begun = processes.from_main(lambda folder=out / folder: (folder / run_file.RUN_FILE).exists())
        arguments = given.arguments(name)
        if show:
            steps = arguments["options"].steps
            print(f"stage {number} of {len(folders)}, {name}: {steps} steps", file=sys.stderr, flush=True)
        mine = {**{k: v for k, v in origin.items() if k != "repeats"}, "stage": name}
        last = None  # the last stage's model is not needed any more
        last = fit(pipeline.stages[name].recipe, out=out / folder, resume=begun, quiet=quiet, origin=mine, **arguments)
        processes.from_main(lambda folder=out / folder, name=name: _mark(out, name, folder))
    folder = out / list(folders.values())[-1]
    processes.from_main(lambda: _copy(folder / "final", out / "final"))
    if last is None and show:
        print(f"the run in {out} is finished; its model is in {out / 'final'}", file=sys.stderr, flush=True)
    return replace(last or finished(folder, options, quiet=True), out=out)


def _check(given: _Given) -> dict[str, dict[str, str]]:
    """Every complaint about any stage comes before the first; returns what a resumed run must find again."""
    stages, options = given.pipeline.stages, given.options
    for what, total in (("steps", options.steps), ("tokens", options.tokens)):
        if total and total < len(stages):
            raise RunError(f"{what}={total} cannot be divided among {len(stages)} stages; give each at least one.")
    read = set().union(*(setup.models_read(s.recipe) - set(s.models) for s in stages.values()))
    for name in given.models:
        if name not in read:
            known = ", ".join(sorted(read - {"initial"})) or "none"
            raise ModelError(f"models.{name} is not used by any stage; they read: {known}; leave it out.")
    needed = {name for s in stages.values() for name in s.recipe.source.datasets()}
    for name in given.data:
        if name not in needed:
            raise DataError(f"data.{name} is not used by any stage; they draw from: {', '.join(needed)}; leave it out.")
    for name, stage in stages.items():
        for model, rule in stage.recipe.models.items():
            if not rule.side:
                source_of(model, rule, given.names(name))
        if stage.recipe.source.needs_validation and given.validation is None:
            raise RunError(f"the stage {name!r} listens to a validation; give validation=FILE, held out of all stages.")
    policy = setup.load_model(given.student, replace(options, adapter_rank=None), trained=False, key="student")
    data: dict[str, str] = {}
    for name, stage in stages.items():
        loaded = setup.load_data(stage.recipe, given.arguments(name)["data"], policy, given.of_stage(name), None)
        data = {**{n: d.content_hash for n, d in loaded.items()}, **data}
    weights, caches = {"policy": fingerprint(policy)}, {}
    for name, model in _named(given, read):
        # One after the other, and none is kept: the stages load what they need.
        if is_stored(model):
            caches[name] = setup.load_given(model, options, name).hash
        else:
            weights[name] = fingerprint(setup.load_given(model, options, f"models.{name}"))
    return {"data_hashes": data, "weight_hashes": weights, "cache_hashes": caches}


def _named(given: _Given, read: set[str]) -> Iterator[tuple[str, Any]]:
    if given.teacher is not None and "teacher" in read:
        yield "teacher", given.teacher
    yield from given.models.items()


def _twin(model: CausalLM, trained: bool) -> CausalLM:
    """A copy: a later stage must find the student as it was."""
    twin = model.copy()
    for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
        mine.requires_grad_(trained and theirs.requires_grad)
    return twin


def _done(out: Path) -> dict[str, Any]:
    path = out / DONE
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except ValueError as error:
        raise RunError(f"{path} cannot be read ({error}); remove it, and all stages are looked at again.") from error


def _is_finished(out: Path, name: str, folder: Path) -> bool:
    written = _done(out).get(name)
    if written is None:
        return False
    if written != _hashes(folder / "final"):
        raise RunError(
            f"the model in {folder / 'final'} is not the one that the stage {name!r} left; restore it, or begin the "
            "run again in another directory."
        )
    return True


def _mark(out: Path, name: str, folder: Path) -> None:
    durable.write_text(out / DONE, json.dumps({**_done(out), name: _hashes(folder / "final")}, indent=1))


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _copy(source: Path, target: Path) -> None:
    if not target.exists():
        durable.sweep(target.parent)
        with durable.folder(target) as aside:
            shutil.copytree(source, aside, dirs_exist_ok=True)
