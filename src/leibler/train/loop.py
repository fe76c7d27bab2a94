"""The loop: draw, annotate, step, write down, check-point."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from leibler import durable
from leibler.errors import RunError
from leibler.objective.rows import Rows, View
from leibler.objective.signals import StepEnd, Validation
from leibler.safety import printable
from leibler.train import checkpoint, environment, material, pipeline, rollouts, run_file, setup, sharding
from leibler.train.aligned import alignments
from leibler.train.engine import Engine
from leibler.train.guarding import Guarding
from leibler.train.guards import Guards
from leibler.train.interrupt import interruptible
from leibler.train.journal import Journal, speed
from leibler.train.log import Progress
from leibler.train.minibatches import Minibatches
from leibler.train.models import Trained
from leibler.train.options import Options
from leibler.train.pipeline import Pipeline
from leibler.train.processes import Processes
from leibler.train.recipe import Recipe
from leibler.train.result import Run, finished
from leibler.train.sources import Context
from leibler.train.tally import Step
from leibler.train.validation import validate

if TYPE_CHECKING:
    from leibler.cache import TeacherCache
    from leibler.policy import CausalLM, LanguageModel

T = TypeVar("T")


def fit(
    recipe: Recipe | Pipeline | str,
    *,
    student: LanguageModel | str | Path,
    data: Any,
    out: str | Path,
    teacher: CausalLM | TeacherCache | str | Path | None = None,
    models: Mapping[str, CausalLM | TeacherCache | str | Path] | None = None,
    validation: Any = None,
    options: Options | None = None,
    resume: bool = False,
    quiet: bool = False,
    origin: Mapping[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """Train a model by a recipe.

    Args:
        recipe: a `Recipe` or a `Pipeline`, or the slug of a published one.
        student: the model to train: a directory, a hub id or a `LanguageModel` (which is trained in place).
        data: records (a file, ``task:NAME``, ``corpus:stdlib``, a Datasets object, a list of dicts), or a mapping of
            names to such when the recipe draws from several.
        out: the run directory; it must not hold another run.
        teacher, models: the other models that the recipe names; ``cache:DIR`` (or a `TeacherCache`) stands for one that
            was run before, by ``leibler cache``.
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
    options = replace(options or Options(), **changes)
    if isinstance(recipe, str):
        from leibler import recipes

        origin = origin or {"recipe": recipe}
        recipe = recipes.get(recipe)
    out, models = Path(out), models or {}
    if isinstance(recipe, Pipeline):
        return pipeline.run(
            *(recipe, fit, origin or {"recipe": "custom"}), student=student, teacher=teacher, models=models, data=data,
            validation=validation, out=out, options=options, resume=resume, quiet=quiet,
        )  # fmt: skip
    processes = Processes.start(options, out)
    options = replace(options, mixed_precision=processes.accelerator.mixed_precision)
    made = processes.from_main(lambda: setup.claim_directory(out, resume=resume))
    if resume and (out / "final").exists() and checkpoint.latest(out / "checkpoints")[0] is None:
        return finished(out, options, quiet or not processes.main)
    try:
        trainer = _Trainer(recipe, student, teacher, models, data, validation, out, options, resume, quiet, processes)
    except BaseException:
        if made and processes.main:
            setup.remove_empty(out)
        raise
    if not resume:
        given = {"student": student, "teacher": teacher, "models": models, "data": data, "validation": validation}
        origin = origin or {"recipe": "custom"}
        # It stands before any process goes on: a kill from here on leaves a run that can be resumed.
        differs = processes.from_main(
            lambda: run_file.write(
                *(out, origin, given, options, trainer.recipe, trainer.identity),
                device=processes.device,
                processes=processes.world,
            )
        )
        if differs:
            trainer._say(run_file.sentence(differs, origin["repeats"]))
    with processes.watched():
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
        processes: Processes,
    ) -> None:
        recipe, self.rollouts = rollouts.arrange(recipe, options, student, out, processes.world)
        self.recipe, self.options, self.out, self.quiet = recipe, options, out, quiet
        self.processes, self.accelerator = processes, processes.accelerator
        aside, known = out if self.main else None, out if resume else None
        made = processes.together(
            lambda: material.load(
                *(recipe, options, aside, self._say, known),
                student=student, teacher=teacher, models=models, data=data, validation=validation,
            )
        )  # fmt: skip
        options, policy = made.options, made.policy
        self.options, self.data, self.validation = options, made.data, made.validation
        self.models, self.modules, self.stored, self.identity = made.models, made.modules, made.stored, made.identity
        self.blank = sharding.blank(policy) if processes.sharding else None
        processes.place(self.models.values(), self.modules.values())
        self.raw_optimizer = setup.optimizer(policy, self.modules, recipe, options)
        # Prepared as if for evaluation: the engine adds the gradients up itself, once per optimiser step.
        prepared = self.accelerator.prepare_model(policy, device_placement=False, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(self.raw_optimizer)
        several = processes.world > 1
        self.alignments = alignments(recipe, policy, self.models)
        self.engine = Engine(
            recipe,
            prepared,
            self.models,
            self.modules,
            temperature=options.temperature,
            micro_rows=options.micro_batch_size,
            seed=options.seed,
            backward=self.accelerator.backward,
            reduce=processes.sum if several else None,
            most=processes.most if several else None,
            average=processes.average if several else None,
            autocast=lambda: self.accelerator.autocast(),
            world=processes.world,
            lockstep=processes.sharding is not None,
            alignments=self.alignments,
            stored=self.stored,
        )
        self.minibatches = Minibatches(
            recipe.schedule, options.seed, processes.rank, processes.world, self.engine.most, self.engine.reduce
        )
        self.step = self.draw = self.tokens = 0
        self.source_state = recipe.source.init()
        self.stateful = recipe.stateful()
        self.states: dict[Hashable, Any] = {s: s.init() for s in self.stateful}
        self.stop = False
        self.last: dict[str, float] = {}
        self.validated: dict[str, float] = {}
        self.saved_at = self.validated_at = -1
        self.resume = resume

    def _begin(self) -> None:
        """What touches the run's files; ``run.yaml`` stands before, so a kill earlier leaves nothing of a run."""
        self.journal = Journal(self.out, self.options, self.engine.reduce, self.main)
        guards = Guards.of(self.options, self.recipe)
        self.guarding = Guarding(guards, self.out, self.journal, self._say, self.processes.rank, self.processes.gather)
        if self.resume:
            if self.main:
                durable.sweep(self.out)
            self._resume()
        if self.options.tensorboard:
            self.accelerator.init_trackers("tensorboard")

    # ---- the loop --------------------------------------------------------------------------------------------------

    def run(self) -> Run:
        self._begin()
        total = self.options.tokens or self.options.steps
        progress = Progress(total, quiet=self.quiet or not self.main, done=self._done)
        self.working = progress.working
        try:
            with interruptible(self._request_stop):
                while self._done < total and not self._anywhere(self.stop):
                    self._refresh_rounds()
                    started = time.monotonic()
                    drawn = self.processes.together(self._draw)
                    if not self._guarded(self.guarding.after_draw, self.draw - 1, drawn):
                        continue
                    if self._use(drawn, progress, started):
                        self._due()
                    else:
                        self._restore(self._newest(), undone=True)
            if self._anywhere(self.stop):
                self._save()
                progress.say(f"interrupted after step {self.step}; go on with: leibler train --resume {self.out}")
                raise KeyboardInterrupt
            progress.close()
            return self._end()
        finally:
            progress.close()
            self.journal.close()
            if self.rollouts is not None:
                self.rollouts.close()

    def _end(self) -> Run:
        """The model is written before the last validation: that one may fail and cost no more than its numbers."""
        policy = self.models["policy"] if self.blank is None else sharding.fill(self.blank, self.models["policy"])
        if self.main:
            with durable.folder(self.out / "final") as folder:
                policy.save(folder)
        self.accelerator.wait_for_everyone()
        if self.validation is not None and self.validated_at != self.step:
            self._validate()
        if self.options.tensorboard:
            self.accelerator.end_training()
        return Run(self.out, policy.eval(), self.last, self.validated)

    def _guarded(self, guard: Callable[..., T], *given: Any, save: bool = True) -> T:
        """Ask a guard; where it ends the run, the run is saved first, unless it is the weights that are at fault."""
        try:
            return guard(*given)
        except RunError as error:
            self.guarding.forgive()
            if save:
                self._save()
            raise self.processes.agreed(error) from None

    @property
    def _done(self) -> int:
        """How far the run is, in what its length is given in: tokens or optimiser steps."""
        return self.tokens if self.options.tokens else self.step

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
            failed=self.guarding.failed,
            say=self._say,
            rank=self.processes.rank,
            world=self.processes.world,
            gather=self.processes.gather,
            rollouts=self.rollouts,
            working=self.working,
        )
        # No set: all processes must gather the models in one order.
        source = self.recipe.source
        sampled = dict.fromkeys("policy" if h.name == "old" else h.name for h in (*source.handles(), *source.readers()))
        with self.processes.whole(*(self.models[name] for name in sampled)):
            drawn, self.source_state = self.recipe.source.draw(context, self.source_state)
        self.draw += 1
        return drawn

    def _use(self, drawn: Mapping[str, Rows], progress: Progress, started: float) -> bool:
        """The optimiser steps of one draw; ``started`` says when the draw began, so that sampling counts as time.

        Returns False if the run must go back to its last checkpoint.
        """
        views = self.engine.annotate(drawn, self.step, self.states)
        measured = self.engine.measured(views)
        heard = measured.own
        for batch in self.minibatches(views, self.draw):
            batch = {s: v.at(self.step, self.states) for s, v in batch.items()}
            result = self._optimise(batch, heard)
            # A draw is measured once, so its controllers hear of it once, however many steps it serves.
            heard = {}
            result.metrics.update(measured.metrics)
            self.step += 1
            seconds = time.monotonic() - started
            self.tokens += int(result.metrics["tokens"])
            self.last = self.journal.step(self.step, result.metrics, batch, seconds)
            if self.options.tensorboard and self.main:
                self.accelerator.log(self.last, step=self.step)
            progress.update(self._done, self.last, speed(self.last, seconds))
            self._guarded(self.guarding.after_step, self.step, self.last)
            saved = self._newest() is not None
            if self._guarded(self.guarding.tripped, self.step, self.last, saved, save=False):
                return False
            started = time.monotonic()
            if self._done >= (self.options.tokens or self.options.steps):
                break
        return True

    def _optimise(self, batch: Mapping[str, View], heard: Mapping[Hashable, Mapping[str, float]]) -> Step:
        rate = self.options.rate(self.step)
        for group in self.raw_optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self.optimizer.zero_grad()
        self.engine.raised = self.guarding.raised
        result = self.engine.accumulate(batch)
        parameters = [p for g in self.raw_optimizer.param_groups for p in g["params"]]
        norm = self.processes.clip(parameters, self.options.max_grad_norm)
        result.metrics["grad_norm"] = norm
        result.metrics["learning_rate"] = rate
        scaled = self.accelerator.scaler is not None
        broken = self.guarding.broken(result.metrics, scaled=scaled)
        if scaled or not broken:  # a scaler of losses leaves such steps out by itself, and learns from them
            self.optimizer.step()
        if broken:
            named = {n: p for m in self._saved_modules().values() for n, p in m.named_parameters()}
            self.guarding.skipped(self.step + 1, self.options.seed, batch, result, named)
            return result
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
        return self.processes.main

    def _say(self, message: str) -> None:
        if not self.quiet and self.main:
            print(printable(message), file=sys.stderr, flush=True)

    def _on(self, every: int) -> bool:
        return self.step // every > max(self.last_due, 0) // every

    last_due = 0
    working: Callable[[str, int, int], None] | None = None

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

    def _validate(self) -> None:
        assert self.validation is not None
        with self.processes.whole(self.models["policy"]):
            metrics = validate(
                self.models,
                self.validation,
                temperature=self.options.temperature,
                max_new_tokens=self.options.max_new_tokens,
                alignments=self.alignments,
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
        if self.saved_at == self.step:
            return
        state = {
            "draw": self.draw,
            "tokens": self.tokens,
            "last_due": self.last_due,
            "validated": [self.validated_at, self.validated],
            "source": self.source_state,
            "guards": self.guarding.state,
            "environment": self._environment(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "signals": [self.states[s] for s in self.stateful],
            "lengths": self.journal.sync() if self.main else {},
            "last": self.last,
        }
        checkpoint.save(
            self.out / "checkpoints",
            self.step,
            self._saved_modules(),
            self.raw_optimizer,
            state,
            keep=self.options.keep,
            main=self.main,
        )
        self.saved_at = self.step

    def _resume(self) -> None:
        # One process chooses: another might find a different checkpoint whole.
        path, complaints = self.processes.from_main(lambda: checkpoint.latest(self.out / "checkpoints"))
        for complaint in complaints:
            self._say(complaint)
        if path is None:
            # Interrupted before the first checkpoint: the same run from its first step.
            self.journal.cut({})
            return
        differs = environment.difference(self._restore(path), self._environment())
        if self.main:
            checkpoint.tidy(path.parent, self.step, self.options.keep)
        if differs:
            self._say(differs)

    def _newest(self) -> Path | None:
        """The checkpoint that this run would go back to."""
        path = checkpoint.named(self.out / "checkpoints", self.saved_at)
        return path if self.saved_at >= 0 and path.exists() else None

    def _environment(self) -> dict[str, Any]:
        return environment.environment(self.options, self.recipe, self.models["policy"], self.processes.world)

    def _restore(self, path: Path | None, *, undone: bool = False) -> dict[str, Any]:
        """Put a checkpoint in place; returns the environment that it was written in.

        With ``undone`` the run itself goes back: what the tripwire saw, and every warning, stays.
        """
        assert path is not None
        state = checkpoint.load(path, self._saved_modules(), self.raw_optimizer)
        self.step, self.draw, self.tokens = state["step"], state["draw"], state["tokens"]
        self.last_due = state["last_due"]
        self.source_state = state["source"]
        self.guarding.put(state["guards"], undone=undone)
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.states = dict(zip(self.stateful, state["signals"], strict=True))
        self.last, (self.validated_at, self.validated) = state["last"], state["validated"]
        for complaint in self.journal.cut(state["lengths"], warnings=not undone):
            self._say(complaint)
        self.saved_at = self.step
        return state["environment"]
