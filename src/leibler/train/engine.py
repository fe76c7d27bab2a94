"""One optimiser step: annotate a draw, measure where a coefficient asks for it, accumulate the gradient.

The engine knows nothing of methods. It computes each need once, hands terms a `View`, and uses whichever of three
exact plans is cheapest; denominators are taken over the whole optimiser batch (and all processes) before it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from leibler.cache import TeacherCache
from leibler.divergence import SampledLogProb
from leibler.errors import RecipeError
from leibler.fused import Linear, TargetRows, Want, functionals, one_pass
from leibler.fused.coarse import OtherVocabulary
from leibler.objective.needs import Comparison, LogProb, Need, Output, TokenDivergence
from leibler.objective.objective import walk
from leibler.objective.rows import Rows, View
from leibler.objective.schedules import Hinge
from leibler.objective.signals import Shaper, Signal, rollout_parts
from leibler.objective.targets import Behaviour, Given, Handle, Lift, Old, Policy
from leibler.objective.terms import Term
from leibler.policy import CausalLM, LanguageModel
from leibler.policy.model import evaluating
from leibler.policy.randomness import forked
from leibler.policy.vocabulary import Reading, TextAlignment
from leibler.train.aligned import event_states, target_rows
from leibler.train.coupled import Coupling
from leibler.train.coupled import check as check_coupled
from leibler.train.minibatches import micro_batches
from leibler.train.plan import StreamPlan, make_plan
from leibler.train.recipe import Recipe
from leibler.train.routing import asked, placed
from leibler.train.stored import written
from leibler.train.tally import Step, Tally, finite, metric_names


class Engine:
    """Runs the terms of a recipe over batches.

    Args:
        recipe: what to descend.
        policy: the module that is called (it may be wrapped, for compilation).
        models: all language models by name, ``policy`` among them (unwrapped).
        modules: trained side modules by name.
        temperature: every log-prob is taken at the sampling temperature.
        micro_rows: rows in a micro-batch at most; None: as many as ``micro_tokens`` allows.
        backward: the accelerator's.
        autocast: the context that forward passes run in.
        reduce, most, world: the sum of a tensor and the largest of a number over all processes, and how many they are.
        alignments: of the models whose tokenizer is not the policy's, by name.
        stored: what is known of models that are not in memory, by name.
        average: makes the gradients of parameters their mean over all processes, once an optimiser step.
        lockstep: True where every pass through a model is one of all processes (its weights are sharded), so that all
            must make equally many.
    """

    def __init__(
        self,
        recipe: Recipe,
        policy: nn.Module,
        models: Mapping[str, CausalLM],
        modules: Mapping[str, nn.Module],
        *,
        temperature: float = 1.0,
        micro_rows: int | None = None,
        micro_tokens: int = 16_384,
        seed: int = 0,
        backward: Callable[[Tensor], None] | None = None,
        reduce: Callable[[Tensor], Tensor] | None = None,
        most: Callable[[int], int] | None = None,
        average: Callable[[Iterable[nn.Parameter]], None] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        world: int = 1,
        alignments: Mapping[str, TextAlignment] | None = None,
        stored: Mapping[str, TeacherCache] | None = None,
        lockstep: bool = False,
    ) -> None:
        self.recipe = recipe
        self.policy = policy
        self.models = models
        self.modules = modules
        self.temperature = temperature
        self.micro_rows = micro_rows
        self.micro_tokens = micro_tokens
        self.seed = seed
        self.backward = backward or (lambda loss: loss.backward())
        self.reduce = reduce or (lambda x: x)
        self.autocast = autocast
        self.alignments = alignments or {}
        if lockstep and any(isinstance(n.to, Lift) for n in recipe.needs() if isinstance(n, TokenDivergence)):
            raise RecipeError("a lifted law takes passes that differ by process; train it without sharded weights.")
        if lockstep and any(isinstance(n, Comparison) for n in recipe.needs()):
            raise RecipeError("hidden states are compared within one process; train it without sharded weights.")
        check_coupled(recipe, lockstep)
        self.stored = stored or {}
        self.most = most or (lambda n: n)
        self.average = average or (lambda parameters: None)
        self.world = world
        self.lockstep = lockstep
        self.plans = {s: make_plan(recipe, s) for s in recipe.source.streams()}
        self.names = metric_names(recipe.objective.terms)
        self.raised: Mapping[str, float] = {}
        """A factor on the coefficient of a term, where a guard has raised it."""
        self.device = models["policy"].device
        # Numbers per event: float32 at least, whatever the weights.
        self.dtype = torch.promote_types(models["policy"].head()[0].dtype, torch.float32)

    # ---- once per draw -------------------------------------------------------------------------------------------

    def annotate(self, drawn: Mapping[str, Rows], step: int, states: Mapping[Hashable, Any]) -> dict[str, View]:
        """Constants and rollout-clock signals, over whole groups, without gradient."""
        return {s: self._annotate(self.plans[s], rows.to(self.device), step, states) for s, rows in drawn.items()}

    def _annotate(self, plan: StreamPlan, rows: Rows, step: int, states: Mapping[Hashable, Any]) -> View:
        view = View(rows, {}, {}, step, states, together=self.reduce if self.world > 1 else None)
        values: dict[Need, Tensor] = {}
        with torch.no_grad(), evaluating(self.models["policy"], *self.modules.values()):
            if LogProb(Behaviour()) in plan.constants:
                values[LogProb(Behaviour())] = view.column("behaviour_logp")
            by_model: dict[Handle, list[Need]] = {}
            for need in plan.constants:
                if need.of != Behaviour():
                    by_model.setdefault(need.of, []).append(need)
            for output in plan.drawn_outputs:
                by_model.setdefault(Old(), []).append(output)
            for handle, needs in by_model.items():
                values.update(self._constants(handle, needs, rows))
            view = view.with_values(values)
            for term in plan.every:
                for signal in (part for whole in term.signals() for part in rollout_parts(whole)):
                    if signal not in view.signals:
                        view = view.with_signals({signal: signal(view)})
        return view

    def measured(self, views: Mapping[str, View]) -> Step:
        """What the shapers that hold a controller measure over a draw: once per draw, over all processes."""
        step = Step({}, {})
        with torch.no_grad():
            for stream, plan in self.plans.items():
                owners = dict.fromkeys(o for t in plan.every for _, o in walk(t) if isinstance(o, Shaper))
                for owner in owners:
                    view = views.get(stream)
                    found = owner.measures(view) if view is not None and len(view.rows) else {}
                    count = found.get("sequences", 0.0)
                    pair = torch.tensor([found.get("divergence_per_sequence", 0.0) * count, count], dtype=torch.float64)
                    total, count = self.reduce(pair.to(self.device)).tolist()
                    if count:
                        step.own[owner] = {"divergence_per_sequence": total / count, "sequences": count}
                        step.metrics[f"divergence_per_sequence/{type(owner).__name__}"] = total / count
        return step

    def _constants(self, handle: Handle, needs: list[Need], rows: Rows) -> dict[Need, Tensor]:
        if (chosen := asked(handle, rows)) is not None:
            found = self._constants(Handle(handle.name), needs, rows.select(chosen))
            at = _events_of(rows, chosen)
            return {n: x.new_zeros(at.shape).masked_scatter(at, x) for n, x in found.items()}
        if handle.name in self.stored:
            return {need: self.stored[handle.name].logp(rows).to(self.dtype) for need in needs}
        model = self._model(handle)
        total = rows.row.shape[0]
        out = {need: torch.zeros(total, dtype=self.dtype, device=self.device) for need in needs}
        cuts = self._cut(rows)
        idle = self._fewer(cuts)
        for index in cuts:
            part = rows.select(index)
            at = _events_of(rows, index)
            hidden = self._event_hidden(model, self._seen(handle, part))
            for need in needs:
                if isinstance(need, (Output, Comparison)):
                    out[need][at] = self._side(need, hidden, part)
                else:
                    want = [Want(SampledLogProb())]
                    value = functionals(self._linear(model, hidden), want, token=part.label, vocab=model.vocab_size)
                    out[need][at] = value[0].to(self.dtype)
        for _ in range(idle):
            self._idle_pass(model)
        return out

    # ---- once per optimiser step ---------------------------------------------------------------------------------

    def accumulate(self, views: Mapping[str, View]) -> Step:
        """Add the gradient of the objective over one optimiser batch to the parameters' ``grad``."""
        step = Step({}, {})
        counts = self._counts(views)
        log = Tally(self.names)
        self.models["policy"].train()
        for module in self.modules.values():
            module.train()
        for stream, view in views.items():
            plan = self.plans[stream]
            if plan.every:
                self._accumulate(plan, view, counts, log, step)
        self.average(p for m in (self.models["policy"], *self.modules.values()) for p in m.parameters())
        self._finish(views, counts, log, step)
        return step

    def _accumulate(self, plan: StreamPlan, view: View, counts: dict[int, float], log: Tally, step: Step) -> None:
        cuts = self._cut(view.rows, whole_groups=plan.kind == "two-pass head")
        replay = plan.kind == "survey and replay" or (
            plan.kind == "two-pass head"
            and self.micro_rows is not None
            and self.most(max(map(len, cuts), default=0)) > self.micro_rows
        )
        if replay:
            cuts = self._cut(view.rows)
        surveyed = self._survey(plan, view, cuts) if plan.survey or replay else None
        scales = self._scales(plan, view, surveyed, counts, step)
        cotangents = self._cotangents(plan, surveyed, scales, log) if replay and surveyed is not None else None
        forward, vocab = partial(self._forward, plan, view), self.models["policy"].vocab_size
        coupling = Coupling(plan, view, cuts, forward, scales, log, self.seed, vocab) if plan.coupled else None
        idle = self._fewer(cuts)
        for number, index in enumerate(cuts):
            micro, hidden, model, targets = forward(number, index)
            loss = self._side_loss(plan, micro, hidden, scales, log)
            log.aligned(plan, targets)
            wants = self._wants(plan)
            options = {"token": micro.rows.label, "vocab": vocab}
            if cotangents is not None:
                at = _events_of(view.rows, index)
                total, values = one_pass(model, wants, targets, _replay(cotangents[:, at]), **options)
                log.values(plan, micro.with_values(self._named(plan, values)))
            elif plan.kind == "one pass":
                loss_of = self._chunk_loss(plan, micro, scales, log)
                total, values = one_pass(model, wants, targets, loss_of, **options)
                log.values(plan, micro.with_values(self._named(plan, values)))
            else:
                values = functionals(model, wants, targets, **options)
                whole = micro.with_values(self._named(plan, values))
                total = self._sum(plan.terms, whole, scales, log).sum()
                log.values(plan, whole.detached())
            if coupling is not None:
                total = total + coupling.replay(number, model, targets)
            self.backward((total if loss is None else total + loss) * self.world)
        for _ in range(idle):
            hidden = self._idle_pass(self.policy)
            self._idle_targets(plan)
            head = self._linear(self.models["policy"], hidden.flatten(0, -2))
            sums = [t.sum() for t in head.tensors if t is not None and t.requires_grad]
            self.backward(0.0 * sum(sums, torch.zeros((), device=self.device)))

    def _forward(
        self, plan: StreamPlan, view: View, number: int, index: Tensor
    ) -> tuple[View, Tensor, Linear, list[TargetRows | OtherVocabulary]]:
        """A micro-batch, its hidden states and the operands of its head pass."""
        micro = view.select(index)
        # Randomness inside the pass is derived too: a replayed or resumed one drops the same units.
        with forked(self.device, self.seed, f"dropout/{plan.stream}", view.step, number):
            hidden = self._event_hidden(self.policy, micro.rows)
            # Within: an adapter on the head drops units too.
            return micro, hidden, *self._operands(plan, micro.rows, hidden)

    def _fewer(self, cuts: list[Tensor]) -> int:
        """How many passes fewer than the busiest process this one makes, where that matters."""
        return self.most(len(cuts)) - len(cuts) if self.lockstep else 0

    def _idle_pass(self, model: nn.Module) -> Tensor:
        """A forward pass whose result is not used: this process's part in a pass of the others."""
        one = torch.ones(1, 1, dtype=torch.long, device=self.device)
        with self.autocast():
            return model(one, one.bool())

    def _idle_targets(self, plan: StreamPlan) -> None:
        with torch.no_grad():
            for handle in self._target_models(plan):
                self._idle_pass(self._model(handle))

    def _survey(self, plan: StreamPlan, view: View, cuts: list[Tensor]) -> View:
        """All of the policy's numbers over the optimiser batch, without gradient."""
        total = torch.zeros(len(plan.wants), view.rows.row.shape[0], dtype=self.dtype, device=self.device)
        idle = self._fewer(cuts)
        with torch.no_grad():
            for number, index in enumerate(cuts):
                micro, _, model, targets = self._forward(plan, view, number, index)
                total[:, _events_of(view.rows, index)] = functionals(
                    model, self._wants(plan), targets, token=micro.rows.label, vocab=self.models["policy"].vocab_size
                ).to(self.dtype)
            for _ in range(idle):
                self._idle_pass(self.policy)
                self._idle_targets(plan)
        return view.with_values(self._named(plan, total))

    def _scales(
        self, plan: StreamPlan, view: View, surveyed: View | None, counts: dict[int, float], step: Step
    ) -> dict[int, Tensor]:
        """``coefficient / count`` of each term."""
        scales = {}
        for term in plan.every:
            number = id(term)
            if isinstance(term.coefficient, Hinge):
                assert surveyed is not None
                value, weight = term.loss(surveyed)
                measured = self.reduce((finite(value) * weight).sum()) / counts[number]
                coefficient = term.coefficient.of(measured)
            else:
                coefficient = view._signal(term.coefficient)
            if isinstance(term.coefficient, Signal):
                step.metrics[f"coefficient/{self.names[number]}"] = float(coefficient)
            scales[number] = coefficient * self.raised.get(self.names[number], 1.0) / counts[number]
        return scales

    def _cotangents(self, plan: StreamPlan, surveyed: View, scales: dict[int, Tensor], log: Tally) -> Tensor:
        """The derivative of the objective by each number per event, ``[wants, events]``."""
        values = torch.stack([surveyed.values[n] for n in plan.wants]).requires_grad_()
        if not len(surveyed.rows):
            return torch.zeros_like(values)
        with torch.enable_grad():
            view = surveyed.with_values(self._named(plan, values))
            total = self._sum(plan.terms, view, scales, log).sum()
            (cotangents,) = torch.autograd.grad(total, values)
        return cotangents

    def _chunk_loss(
        self, plan: StreamPlan, micro: View, scales: dict[int, Tensor], log: Tally
    ) -> Callable[[Tensor, Tensor], Tensor]:
        def loss(values: Tensor, index: Tensor) -> Tensor:
            part = micro.slice(index).with_values(self._named(plan, values))
            return self._sum(plan.terms, part, scales, log)

        return loss

    def _sum(self, terms: tuple[Term, ...], view: View, scales: dict[int, Tensor], log: Tally) -> Tensor:
        """The terms' contributions per unit; streams of one coupling have equal units only when all are tokens."""
        total: Tensor | None = None
        for term in terms:
            value, weight = term.loss(view)
            # Outside the support the value is infinite and the gradient 0: neither may spoil the sum.
            contribution = finite(value) * weight
            log.add(term, value, weight, contribution)
            contribution = contribution * scales[id(term)]
            if view.events is None:
                contribution = contribution.sum()
            total = contribution if total is None else total + contribution
        if total is None:  # a stream on which side modules alone are trained
            return torch.zeros(() if view.events is None else view.events.shape, device=self.device)
        return total

    def _side_loss(
        self, plan: StreamPlan, micro: View, hidden: Tensor, scales: dict[int, Tensor], log: Tally
    ) -> Tensor | None:
        if not plan.side:
            return None
        values: dict[Need, Tensor] = {}
        for need in plan.outputs:
            values[need] = self._side(need, hidden, micro.rows)
        return self._sum(plan.side, micro.with_values(values), scales, log)

    def _side(self, need: Output | Comparison, hidden: Tensor, rows: Rows) -> Tensor:
        """A side module's number per event."""
        module, rule = self.modules[need.module], cast(Any, self.recipe.models[need.module])
        if isinstance(need, Output):
            return module(hidden if rule.spec.through else hidden.detach()).to(self.dtype)
        with torch.no_grad():
            other = self._event_hidden(self._model(need.to), self._seen(need.to, rows))
        return module(hidden, other)[need.number].to(self.dtype)

    # ---- pieces ---------------------------------------------------------------------------------------------------

    def _named(self, plan: StreamPlan, values: Tensor) -> dict[Need, Tensor]:
        named: dict[Need, Tensor] = dict(zip(plan.wants, values, strict=True))
        if plan.substitute_old and LogProb(Policy()) in named:
            # The draw is used once, so the old policy is this one: no forward pass is spent on it.
            named[LogProb(Old())] = named[LogProb(Policy())].detach()
        return named

    def _wants(self, plan: StreamPlan) -> list[Want]:
        return [Want(*plan.functional(n)) for n in plan.wants]

    def _event_hidden(self, model: nn.Module, rows: Rows) -> Tensor:
        """``[events, hidden]``: the hidden state that predicts each event, of any model in the same arithmetic."""
        soft = () if rows.soft is None else (rows.soft,)
        return self._states(model, rows.tokens, rows.attention, *soft)[:, :-1][rows.mask]

    def _states(self, model: nn.Module, *read: Any) -> Tensor:
        """``[batch length hidden]``, in the dtype of the model's head; ``read``: tokens, attention, soft tokens."""
        with self.autocast():
            hidden = model(*read)
        unwrapped = model if isinstance(model, LanguageModel) else self.models["policy"]
        return hidden.to(unwrapped.head()[0].dtype)

    def _states_of(self, name: str, tokens: Tensor, attention: Tensor) -> Tensor:
        return self._states(self.models[name], tokens, attention)

    def _linear(self, model: CausalLM, hidden: Tensor) -> Linear:
        return model.linear(hidden, self.temperature)

    def _operands(
        self, plan: StreamPlan, rows: Rows, hidden: Tensor
    ) -> tuple[Linear, list[TargetRows | OtherVocabulary]]:
        policy = self._linear(self.models["policy"], hidden)
        leaves: dict[Handle, Linear] = {Policy(): policy.detached()}
        readings: dict[str, Reading] = {}
        with torch.no_grad():
            for handle in self._target_models(plan):
                model, name = self._model(handle), handle.name
                if name in self.alignments:
                    reading = self.alignments[name].read(rows.hard, rows.attention, rows.mask)
                    states = self._states(model, reading.tokens, reading.attention)
                    leaves[handle], readings[name] = self._linear(model, event_states(states, reading)), reading
                else:
                    leaves[handle] = self._leaf(handle, model, rows)
            targets = [
                written(t, self.stored, rows, self.temperature)
                or target_rows(t, leaves, self.alignments, readings, self._states_of, self.micro_tokens)
                for t in plan.targets
            ]
        return policy, targets

    def _leaf(self, handle: Handle, model: CausalLM, rows: Rows) -> Linear:
        """A model's heads at the events; where it is asked about some rows only, a pass over those."""
        chosen = asked(handle, rows)
        if chosen is None:
            return self._linear(model, self._event_hidden(model, self._seen(handle, rows)))
        at = _events_of(rows, chosen)
        if self.lockstep:  # as many passes as the other processes make
            hidden = self._event_hidden(model, rows)[at]
        elif len(chosen):
            hidden = self._event_hidden(model, rows.select(chosen))
        else:
            hidden = model.head()[0][:0]
        return placed(self._linear(model, hidden), at)

    def _target_models(self, plan: StreamPlan) -> list[Handle]:
        """The models in memory, beside the policy itself, whose rows the targets are made of."""
        handles = dict.fromkeys(h for t in plan.targets for h in t.handles)
        return [h for h in handles if h != Policy() and h.name not in self.stored]

    def _model(self, handle: Handle) -> CausalLM:
        return self.models["policy" if handle.name == "old" else handle.name]

    def _seen(self, handle: Handle, rows: Rows) -> Rows:
        """The layout of the events that a model reads."""
        return rows.view(handle.view) if isinstance(handle, Given) else rows

    def _cut(self, rows: Rows, *, whole_groups: bool = False) -> list[Tensor]:
        return micro_batches(rows, self.micro_rows, self.micro_tokens, whole_groups=whole_groups)

    def _counts(self, views: Mapping[str, View]) -> dict[int, float]:
        """Each term's denominator over the optimiser batch of all processes."""
        terms = self.recipe.objective.terms
        streams = [views.get(t.on or "") for t in terms]
        local = [t.count(v.rows) if v and len(v.rows) else 0.0 for t, v in zip(terms, streams, strict=True)]
        total = self.reduce(torch.tensor(local, dtype=torch.float64, device=self.device)).tolist()
        return {id(t): max(c, 1e-12) for t, c in zip(terms, total, strict=True)}

    def _finish(self, views: Mapping[str, View], counts: dict[int, float], log: Tally, step: Step) -> None:
        totals = log.totals()
        # The same keys on every process, also on one that had no row.
        kinds = ("loss", "support_violations", "divergence", "events", "sequences")
        keys = ["entropy", "events", *(f"{kind}/{name}" for name in self.names.values() for kind in kinds)]
        keys += [f"aligned/{name}{of}" for name in self.alignments for of in ("", "/of")]
        local = torch.tensor([totals.get(k, 0.0) for k in keys], dtype=torch.float64, device=self.device)
        packed = self.reduce(local).tolist()
        sums = dict(zip(keys, packed, strict=True))
        loss = 0.0
        rows = float(self.reduce(torch.tensor(float(sum(len(v.rows) for v in views.values())), device=self.device)))
        for term in self.recipe.objective.terms:
            name, count = self.names[id(term)], counts[id(term)]
            value = sums.get(f"loss/{name}", 0.0) / count
            step.metrics[f"loss/{name}"] = value
            fixed = step.metrics.get(f"coefficient/{name}", term.coefficient)
            loss += value * float(fixed) * self.raised.get(name, 1.0)  # type: ignore[arg-type]
            events = sums.get(f"events/{name}", 0.0)
            if events:
                mean = sums[f"divergence/{name}"] / events
                step.metrics[f"divergence/{name}"] = mean
                sequences = sums[f"sequences/{name}"]
                step.own[term] = {
                    "divergence": mean,
                    "divergence_per_sequence": sums[f"divergence/{name}"] / max(sequences, 1),
                    "sequences": sequences,
                }
            violations = sums.get(f"support_violations/{name}", 0.0)
            if violations:
                step.metrics[f"support_violations/{name}"] = violations
        step.metrics["loss"] = loss
        if sums.get("events", 0):
            step.metrics["entropy"] = sums["entropy"] / sums["events"]
        for name in self.alignments:
            if sums.get(f"aligned/{name}/of", 0):
                step.metrics[f"aligned/{name}"] = sums[f"aligned/{name}"] / sums[f"aligned/{name}/of"]
        step.metrics["tokens"] = sums.get("events", 0.0)
        step.metrics["rows"] = rows


def _events_of(rows: Rows, index: Tensor) -> Tensor:
    keep = torch.zeros(len(rows), dtype=torch.bool, device=rows.tokens.device)
    keep[index] = True
    return keep[rows.row]


def _replay(cotangents: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda values, index: (finite(values) * cotangents[:, index]).sum(dim=0)
