"""The loop: draw, annotate, step, write down, check-point."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from leibler.errors import RunError
from leibler.objective.rows import Rows, View
from leibler.objective.signals import Signal, StepEnd, Validation
from leibler.train import checkpoint, setup
from leibler.train.engine import Engine, Step
from leibler.train.interrupt import interruptible
from leibler.train.journal import Journal, speed
from leibler.train.log import Progress
from leibler.train.models import Trained, resolve
from leibler.train.options import Options
from leibler.train.recipe import Recipe
from leibler.train.result import Run, finished
from leibler.train.sources import Context
from leibler.train.validation import validate

if TYPE_CHECKING:
    from accelerate import Accelerator

    from leibler.data import Dataset
    from leibler.policy import CausalLM

EMPTY_DRAWS = 20
"""Draws in a row that may leave no row to learn from before the run stops with a diagnosis."""


def fit(
    recipe: Recipe | str,
    *,
    student: CausalLM | str | Path,
    data: Any,
    out: str | Path,
    teacher: CausalLM | str | Path | None = None,
    models: Mapping[str, CausalLM | str | Path] | None = None,
    validation: Any = None,
    options: Options | None = None,
    resume: bool = False,
    quiet: bool = False,
    origin: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """Train a model by a recipe.

    Args:
        recipe: a `Recipe`, or the slug of a published one.
        student: the model to train: a directory, a hub id or a `CausalLM` (which is trained in place).
        data: records (a file, ``task:NAME``, ``corpus:stdlib``, a Datasets object, a list of dicts), or a mapping of
            names to such when the recipe draws from several.
        out: the run directory; it must not hold another run.
        teacher, models: the other models that the recipe names.
        validation: held-out records.
        options, **changes: see `Options`; ``fit(..., steps=100)`` changes one.
        resume: go on with the run in ``out`` from its newest whole checkpoint.
        quiet: show nothing.
        origin: what to write into ``run.yaml`` about where the recipe came from (its slug and overrides).

    Returns:
        The finished run; ``out/final`` holds the model as a Transformers checkpoint.

    Raises:
        LeiblerError: in one sentence, what does not fit, before the first step.
        KeyboardInterrupt: after a checkpoint was saved.

    Examples:
        >>> import tempfile
        >>> from leibler.data import load
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> from leibler.train import fit
        >>> records = [{"prompt": "2+2=", "completion": "4"}] * 4
        >>> student = tiny_llama(character_tokenizer(["0123456789+="]), hidden=16, layers=1, heads=2)
        >>> out = tempfile.mkdtemp()
        >>> run = fit("sft", student=student, data=records, out=out, steps=2, batch_size=4, quiet=True)
        >>> sorted(p.name for p in run.out.iterdir() if p.name != "checkpoints")[:2]
        ['final', 'metrics.jsonl']
    """
    from accelerate import Accelerator

    options = replace(options or Options(), **changes)
    if isinstance(recipe, str):
        from leibler import recipes

        origin = origin or {"recipe": recipe}
        recipe = recipes.get(recipe)
    out = Path(out)
    try:
        accelerator = Accelerator(
            mixed_precision=options.mixed_precision,
            log_with="tensorboard" if options.tensorboard else None,
            project_dir=str(out),
        )
    except ValueError as error:
        raise RunError(
            f"mixed_precision={options.mixed_precision} cannot be set ({str(error).split(', ')[0]}); it holds for a "
            "whole Python process, so start a new one."
        ) from error
    # The first process claims the directory before the others look whether it is free.
    with accelerator.main_process_first():
        made = setup.claim_directory(out, resume=resume)
    if resume and (out / "final").exists() and checkpoint.latest(out / "checkpoints")[0] is None:
        return finished(out, options, quiet)
    try:
        trainer = _Trainer(
            recipe, student, teacher, models or {}, data, validation, out, options, resume, quiet, accelerator
        )
    except BaseException:
        if made:
            setup.remove_empty(out)
        raise
    if not resume and trainer.main:
        given = {"student": student, "teacher": teacher, "models": models or {}, "data": data, "validation": validation}
        setup.write_run_file(out, origin or {"recipe": "custom"}, given, options, trainer.recipe, trainer.identity)
    return trainer.run()


class _Trainer:
    def __init__(
        self,
        recipe: Recipe,
        student: Any,
        teacher: Any,
        models: Mapping[str, Any],
        data: Any,
        validation: Any,
        out: Path,
        options: Options,
        resume: bool,
        quiet: bool,
        accelerator: Accelerator,
    ) -> None:
        self.recipe, self.options, self.out, self.quiet = recipe, options, out, quiet
        self.accelerator = accelerator
        policy = setup.load_model(student, options, trained=True, key="student")
        policy.requires_grad_(True) if not policy.has_adapter else None
        given = setup.load_models(recipe, teacher, models, options)
        specs = data if isinstance(data, Mapping) and not hasattr(data, "column_names") else {"train": data}
        self.data: dict[str, Dataset] = setup.load_data(recipe, specs, policy, options, out)
        self.validation = self._validation(validation, policy)
        for name, dataset in self.data.items():
            if dataset.set_aside_count:
                self._say(f"data.{name}: {dataset.set_aside_report()}")

        device = self.accelerator.device
        policy.to(device)
        self.models, self.modules = resolve(recipe.models, policy, given)
        for model in (*self.models.values(), *self.modules.values()):
            model.to(device)
        self.models["policy"] = policy
        self.identity = setup.identity(self.data, self.models)
        if resume:
            setup.check_identity(out, self.identity)
        groups: list[dict[str, Any]] = [{"params": [p for p in policy.parameters() if p.requires_grad], "scale": 1.0}]
        for name, module in self.modules.items():
            rule = recipe.models[name]
            assert isinstance(rule, Trained)
            scale = rule.learning_rate / options.learning_rate if rule.learning_rate else 1.0
            groups.append({"params": list(module.parameters()), "scale": scale})
        self.raw_optimizer = torch.optim.AdamW(
            groups,
            lr=options.learning_rate,
            betas=(options.beta1, options.beta2),
            weight_decay=options.weight_decay,
            foreach=True,
        )
        wrapped, self.optimizer = self.accelerator.prepare(policy, self.raw_optimizer)
        world = self.accelerator.num_processes
        self.engine = Engine(
            recipe,
            wrapped,
            self.models,
            self.modules,
            temperature=options.temperature,
            micro_rows=options.micro_batch_size,
            seed=options.seed,
            backward=self.accelerator.backward,
            reduce=_summed(self.accelerator) if world > 1 else None,
            most=_largest(self.accelerator) if world > 1 else None,
            autocast=lambda: self.accelerator.autocast(),
            world=world,
        )
        self.step = self.draw = 0
        self.source_state = recipe.source.init()
        self.stateful = _stateful(recipe)
        self.states: dict[Hashable, Any] = {s: s.init() for s in self.stateful}
        self.stop = False
        self.last: dict[str, float] = {}
        self.validated: dict[str, float] = {}
        self.saved_at = self.validated_at = -1
        self.journal = Journal(out, options, self.engine.reduce, self.main)
        if resume:
            self._resume()
        if options.tensorboard:
            self.accelerator.init_trackers("tensorboard")

    # ---- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> Run:
        progress = Progress(self.options.steps, quiet=self.quiet or not self.main, done=self.step)
        empty = 0
        try:
            with interruptible(self._request_stop):
                while self.step < self.options.steps and not self._anywhere(self.stop):
                    self._refresh_rounds()
                    started = time.monotonic()
                    drawn = self._draw()
                    if not self._anywhere(any(len(rows) for rows in drawn.values())):
                        empty += 1
                        if empty >= EMPTY_DRAWS:
                            raise RunError(
                                f"{empty} draws in a row left no row to learn from; the stages drop every group: "
                                "check the reward or the judge on samples.jsonl."
                            )
                        continue
                    empty = 0
                    self._use(drawn, progress, started)
                    self._due()
            if self._anywhere(self.stop):
                self._save()
                progress.say(f"interrupted after step {self.step}; go on with: leibler train --resume {self.out}")
                raise KeyboardInterrupt
        finally:
            progress.close()
        if self.validation is not None and self.validated_at != self.step:
            self._validate()
        if self.main:
            self.models["policy"].save(self.out / "final")
        self.journal.close()
        if self.options.tensorboard:
            self.accelerator.end_training()
        return Run(self.out, self.models["policy"].eval(), self.last, self.validated)

    def _anywhere(self, here: bool) -> bool:
        """True if it is true of some process."""
        return bool(self.engine.most(int(here)))

    def _draw(self) -> dict[str, Rows]:
        schedule = self.recipe.schedule
        context = Context(
            models=self.models,
            data=self.data,
            seed=self.options.seed,
            draw=self.draw,
            step=self.step,
            steps=self.options.steps,
            rows=self.options.batch_size * schedule.minibatches,
            max_new_tokens=self.options.max_new_tokens,
            max_length=setup.max_length(self.models["policy"]),
            temperature=self.options.temperature,
            rank=self.accelerator.process_index,
            world=self.accelerator.num_processes,
        )
        drawn, self.source_state = self.recipe.source.draw(context, self.source_state)
        self.draw += 1
        return drawn

    def _use(self, drawn: Mapping[str, Rows], progress: Progress, started: float) -> None:
        """The optimiser steps of one draw; ``started`` says when the draw began, so that sampling counts as time."""
        views = self.engine.annotate(drawn, self.step, self.states)
        measured = self.engine.measured(views)
        heard = measured.own
        for batch in self._batches(views):
            result = self._optimise(batch, heard)
            # A draw is measured once, so its controllers hear of it once, however many steps it serves.
            heard = {}
            result.metrics.update(measured.metrics)
            self.step += 1
            seconds = time.monotonic() - started
            self.last = self.journal.step(self.step, result.metrics, batch, seconds)
            if self.options.tensorboard and self.main:
                self.accelerator.log(self.last, step=self.step)
            progress.update(self.step, self.last, speed(self.last, seconds))
            started = time.monotonic()
            if self.step >= self.options.steps:
                return

    def _batches(self, views: Mapping[str, View]) -> Iterator[dict[str, View]]:
        """Optimiser batches of whole groups, in an order derived from (seed, draw, epoch)."""
        from leibler.policy.randomness import generator

        schedule = self.recipe.schedule
        if schedule.single_use:
            yield {s: v.at(self.step, self.states) for s, v in views.items()}
            return
        for epoch in range(schedule.epochs):
            parts = {}
            for stream, view in views.items():
                source = generator(self.options.seed, f"minibatch/{stream}", self.draw, epoch)
                number = self._group_numbers(view.rows)
                # All processes cut the same order of the groups that are left on any of them.
                total = self.engine.most(int(number.max()) + 1 if len(number) else 0)
                left = torch.zeros(total, device=number.device).index_fill(0, number, 1.0)
                left = self.engine.reduce(left).cpu() > 0
                order = torch.randperm(total, generator=source)
                parts[stream] = order[left[order]]
            for at in range(schedule.minibatches):
                batch = {}
                for stream, view in views.items():
                    here = parts[stream][at :: schedule.minibatches].to(view.rows.tokens.device)
                    batch[stream] = view.select(torch.isin(self._group_numbers(view.rows), here).nonzero()[:, 0])
                yield {s: v.at(self.step, self.states) for s, v in batch.items()}

    def _group_numbers(self, rows: Rows) -> torch.Tensor:
        """The number of each row's group among those of all processes."""
        return rows.group * self.accelerator.num_processes + self.accelerator.process_index

    def _optimise(self, batch: Mapping[str, View], heard: Mapping[Hashable, Mapping[str, float]]) -> Step:
        rate = self.options.rate(self.step)
        for group in self.raw_optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.zero_grad()
        result = self.engine.accumulate(batch)
        parameters = [p for g in self.raw_optimizer.param_groups for p in g["params"]]
        norm = self.accelerator.clip_grad_norm_(parameters, self.options.max_grad_norm)
        self.optimizer.step()
        result.metrics["grad_norm"] = 0.0 if norm is None else float(norm)
        result.metrics["learning_rate"] = rate
        for name, rule in self.recipe.models.items():
            if not isinstance(rule, Trained) and rule.due(self.step + 1, 0):
                rule.refresh(self.models[name], self.models["policy"])
        for signal_, owner in self.stateful.items():
            event = StepEnd(self.step + 1, result.metrics, {**heard, **result.own}.get(owner, {}))
            self.states[signal_] = signal_.observe(self.states[signal_], event)
        return result

    def _refresh_rounds(self) -> None:
        every = self.recipe.schedule.steps_per_round
        for name, rule in self.recipe.models.items():
            if every and not isinstance(rule, Trained) and rule.due(self.step, every) and not rule.due(self.step, 0):
                rule.refresh(self.models[name], self.models["policy"])

    # ---- what is due, and what is said ------------------------------------------------------------------------------

    def _request_stop(self) -> bool:
        """The first request ends the run after the current draw; False for a second one."""
        first, self.stop = not self.stop, True
        if first:
            self._say("stopping after this draw and saving; once more to stop at once without saving")
        return first

    @property
    def main(self) -> bool:
        return self.accelerator.is_main_process

    def _say(self, message: str) -> None:
        if not self.quiet and self.main:
            print(message, file=sys.stderr, flush=True)

    def _on(self, every: int) -> bool:
        return self.step // every > max(self.last_due, 0) // every

    last_due = 0

    def _due(self) -> None:
        """Validation and checkpoint, when a multiple of their interval was reached since the last draw."""
        o = self.options
        validate = o.validate_every and self.validation is not None and self._on(o.validate_every)
        save = o.save_every and self._on(o.save_every)
        # Before saving: a resumed run must not find the same interval due again.
        self.last_due = self.step
        if validate:
            self._validate()
        if save:
            self._save()

    def _validation(self, given: Any, policy: CausalLM) -> Dataset | None:
        listens = self.recipe.source.needs_validation
        if listens and not self.options.validate_every:
            # A source that listens to the validation gets twenty looks at it.
            self.options = replace(self.options, validate_every=max(self.options.steps // 20, 1))
        if given is not None:
            needs = ("prompt", "completion") if listens else ("prompt",)
            return setup.usable(given, needs, policy, self.options, self.out / setup.ASIDE / "validation.jsonl")
        if not listens:
            return None
        # It was given none: a twentieth of the data.
        name = next(iter(self.data))
        self.data[name], held_out = self.data[name].split(0.05, self.options.seed)
        return held_out

    def _validate(self) -> None:
        assert self.validation is not None
        metrics = validate(
            self.models,
            self.validation,
            temperature=self.options.temperature,
            max_new_tokens=self.options.max_new_tokens,
        )
        self.validated, self.validated_at = metrics, self.step
        self.journal.validation(self.step, metrics)
        event = Validation(self.step, metrics)
        self.source_state = self.recipe.source.observe(self.source_state, event)
        for signal_ in self.stateful:
            self.states[signal_] = signal_.observe(self.states[signal_], event)

    # ---- saving ---------------------------------------------------------------------------------------------------

    def _saved_modules(self) -> dict[str, torch.nn.Module]:
        moving = {n: self.models[n] for n, r in self.recipe.models.items() if r.moves and n in self.models}
        return {"policy": self.models["policy"], **moving, **self.modules}

    def _save(self) -> None:
        if not self.main or self.saved_at == self.step:
            return
        state = {
            "draw": self.draw,
            "last_due": self.last_due,
            "validated": [self.validated_at, self.validated],
            "source": self.source_state,
            "signals": [self.states[s] for s in self.stateful],
            "lengths": self.journal.sync(),
            "last": self.last,
        }
        checkpoint.save(
            self.out / "checkpoints", self.step, self._saved_modules(), self.raw_optimizer, state, self.options.keep
        )
        self.saved_at = self.step

    def _resume(self) -> None:
        path, complaints = checkpoint.latest(self.out / "checkpoints")
        for complaint in complaints:
            self._say(complaint)
        if path is None:
            # Interrupted before the first checkpoint: the same run from its first step.
            self.journal.cut({})
            return
        state = checkpoint.load(path, self._saved_modules(), self.raw_optimizer)
        self.step, self.draw, self.last_due = state["step"], state["draw"], state["last_due"]
        self.source_state = state["source"]
        self.states = dict(zip(self.stateful, state["signals"], strict=True))
        self.last, (self.validated_at, self.validated) = state["last"], state["validated"]
        self.journal.cut(state["lengths"])
        self.saved_at = self.step


def _summed(accelerator: Accelerator) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: cast(torch.Tensor, accelerator.reduce(x, "sum"))


def _largest(accelerator: Accelerator) -> Callable[[int], int]:
    def most(number: int) -> int:
        every = cast(torch.Tensor, accelerator.gather(torch.tensor([number], device=accelerator.device)))
        return int(every.max())

    return most


def _stateful(recipe: Recipe) -> dict[Signal, Hashable]:
    """The signals that keep state, in order, with the part that each belongs to."""
    found: dict[Signal, Hashable] = {}
    for signal_, owner in recipe.objective.walk():
        if signal_.init() is not None:
            found.setdefault(signal_, owner)
    return found
