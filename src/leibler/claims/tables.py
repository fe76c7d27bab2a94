"""Recipes on tables: the engine itself, run on policies that are tables of logits.

A `Table` stands where a language model would, so that a claim runs the recipe and nothing else: its source's law,
group size and stages, its signals, its terms, its schedule. Where the laws are fractions with one denominator, every
response can be listed as often as it is probable (`every`), and the gradient of a batch is an expectation without
noise. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from leibler.claims.simplex import contexts, enumerate_sequences, prefixes, target_table
from leibler.data import Dataset, Record
from leibler.fused import Linear
from leibler.objective import SAMPLE, Handle, LogProb, Rows, StepEnd, View
from leibler.train import Context, Fixed, Mixture, Recipe, WinRate, recipes_of
from leibler.train.engine import Engine
from leibler.train.models import Trained
from leibler.train.sources import Source, Staged
from leibler.train.tally import Step

Check = Callable[[int, tuple[int, ...]], float]
"""``check(prompt, response)``: the reward of a response."""
F64 = torch.float64


class Table(nn.Module):
    """A policy over responses of a fixed length: one row of logits for each prompt and prefix.

    With ``by_position`` the row depends on the position alone: a student that can only express product laws.
    """

    own: Tensor

    def __init__(
        self, logits: Float[Tensor, "prompts rows vocab"], length: int = 1, *, by_position: bool = False
    ) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.detach().to(F64).clone())
        self.length, self.by_position = length, by_position
        self.vocab_size = logits.shape[-1]
        levels = [t for t in range(length) for _ in range(self.vocab_size**t)]
        total = prefixes(self.vocab_size, length)
        self.register_buffer("own", torch.tensor(levels) if by_position else torch.arange(total))
        if logits.shape[1] != (length if by_position else total):
            raise ValueError(f"{logits.shape[1]} rows for each prompt do not fit responses of {length} symbols")

    @property
    def device(self) -> torch.device:
        return self.logits.device

    def head(self) -> tuple[Tensor, None]:
        return self.logits.reshape(-1, self.vocab_size).t(), None

    def linear(self, hidden: Float[Tensor, "n hidden"], temperature: float = 1.0) -> Linear:
        return Linear(hidden, *self.head(), temperature)

    def forward(self, tokens: Int[Tensor, "batch positions"], attention: Tensor) -> Tensor:
        """The row of the table at each position, one-hot: ``[batch positions hidden]``."""
        prefix = torch.zeros_like(tokens)
        for t in range(1, tokens.shape[1]):
            prefix[:, t] = prefix[:, t - 1] * self.vocab_size + 1 + tokens[:, t]
        rows = self.logits.shape[1]
        at = tokens[:, :1] * rows + self.own[prefix.clamp(max=len(self.own) - 1)]
        return nn.functional.one_hot(at, self.logits.shape[0] * rows).to(F64)

    def log_laws(self) -> Float[Tensor, "contexts vocab"]:
        """Log-probabilities for every prompt and prefix, prompts first."""
        return self.logits.detach()[:, self.own].reshape(-1, self.vocab_size).log_softmax(-1)

    def copy(self) -> Table:
        return Table(self.logits, self.length, by_position=self.by_position).requires_grad_(False)


def fractions(counts: Int[Tensor, "prompts rows vocab"], length: int = 1) -> Table:
    """The table whose laws are ``counts`` over their sum."""
    return Table(counts.to(F64).log(), length)


def every(counts: Int[Tensor, "prompts rows vocab"], length: int = 1) -> tuple[Tensor, Tensor]:
    """Each prompt's responses, as often as laws proportional to ``counts`` make them probable: prompts, responses."""
    vocab = counts.shape[-1]
    sequences, _ = enumerate_sequences(vocab, length)
    at = contexts(sequences, vocab)
    times = torch.stack([c[at, sequences].prod(-1) for c in counts])
    prompt = torch.arange(len(counts)).repeat_interleave(times.sum(-1))
    return prompt, sequences.repeat(len(counts), 1).repeat_interleave(times.flatten(), dim=0)


def every_pair(counts: Int[Tensor, "prompts rows vocab"]) -> tuple[Tensor, Tensor, Tensor]:
    """Every pair of one-symbol responses, as often as two independent draws make it: prompts, responses, groups."""
    prompt, response = every(counts)
    first, second = torch.cartesian_prod(torch.arange(len(prompt)), torch.arange(len(prompt))).t()
    same = prompt[first] == prompt[second]
    index = torch.stack([first[same], second[same]], 1).flatten()
    return prompt[index], response[index], torch.arange(len(index) // 2).repeat_interleave(2)


def listed(
    prompt: Int[Tensor, " rows"],
    response: Int[Tensor, "rows time"],
    group: Tensor | None = None,
    role: Tensor | None = None,
    **columns: Tensor,
) -> Rows:
    """Rows of the engine; every symbol of the response is an event."""
    tokens = torch.cat([prompt[:, None], response], dim=1)
    return Rows(
        tokens, torch.ones_like(tokens, dtype=torch.bool), torch.ones_like(response, dtype=torch.bool),
        prompt if group is None else group, torch.full_like(prompt, SAMPLE) if role is None else role, columns,
        records=[Record(str(p)) for p in prompt.tolist()],
        texts=[" ".join(map(str, r)) for r in response.tolist()],
    )  # fmt: skip


def rewarded(rows: Rows, check: Check) -> Rows:
    """With the column ``reward``."""
    found = [check(int(r.prompt), _symbols(t)) for r, t in zip(rows.records, rows.texts, strict=True)]
    return rows.with_columns(reward=torch.tensor(found))


def _symbols(text: str) -> tuple[int, ...]:
    return tuple(int(s) for s in text.split())


class Bench:
    """A recipe with tables for its models.

    Args:
        recipe: what is run.
        models: tables by name, ``policy`` among them; ``data`` is the law of given completions.
        modules: trained side modules by name.
    """

    def __init__(
        self,
        recipe: Recipe,
        models: Mapping[str, Table],
        modules: Mapping[str, nn.Module] | None = None,
        temperature: float = 1.0,
    ) -> None:
        self.recipe, self.policy = recipe, models["policy"]
        self.models = dict(models)
        self.modules = dict(modules or {})
        tables: Any = self.models  # a table offers what the engine asks of a language model
        self.engine = Engine(recipe, self.policy, tables, self.modules, temperature=temperature)
        self.owners: dict[Any, Hashable] = {
            signal: owner for signal, owner in recipe.objective.walk() if signal.init() is not None
        }
        self.states: dict[Hashable, Any] = {signal: signal.init() for signal in self.owners}
        self.stream, self.source, self.stages = _source(recipe)
        self.step = 0

    # ---- one optimiser batch ---------------------------------------------------------------------------------------

    def annotate(self, rows: Rows, step: int = 0) -> dict[str, View]:
        """As when the rows are drawn: the policy's table is the old policy now."""
        if "behaviour_logp" not in rows.columns and LogProb(Handle("behaviour")) in self.recipe.needs():
            rows = rows.with_columns(behaviour_logp=self._behaviour(rows))
        return self.engine.annotate({self.stream: rows}, step, self.states)

    def _behaviour(self, rows: Rows) -> Tensor:
        """Log-probability of each symbol under the law that the source samples from."""
        law = self.law()
        prefix = contexts(rows.tokens[:, 1:], self.policy.vocab_size)
        at = rows.tokens[:, :1] * prefixes(self.policy.vocab_size, self.policy.length) + prefix
        return law.log_softmax(-1)[at, rows.tokens[:, 1:]]

    def law(self) -> Float[Tensor, "contexts vocab"]:
        """Log-scores of the law that the source samples from, for every prompt and prefix."""
        origin = self.recipe.source.streams()[self.stream].law
        tables = {name: model.log_laws() for name, model in self.models.items()}
        tables["old"] = tables["behaviour"] = tables["policy"]  # as it stands when rows are drawn
        return target_table(Handle("data") if origin is None else origin, tables)

    def gradient(self, rows: Rows, now: Tensor | None = None, step: int = 0) -> tuple[Tensor, Step]:
        """The gradient that the recipe leaves on the policy's logits, and what the step measured.

        Args:
            rows: drawn by the policy's table as it stands.
            now: the policy's logits when the step is taken, if it has moved since.
        """
        views = self.annotate(rows, step)
        before = self.policy.logits.detach().clone()
        if now is not None:
            self._set(now)
        result = self._accumulate(views, step)
        found = self.policy.logits.grad
        self._set(before)
        return torch.zeros_like(before) if found is None else found.clone(), result

    def _set(self, logits: Tensor) -> None:
        with torch.no_grad():
            self.policy.logits.copy_(logits)

    def _accumulate(self, views: Mapping[str, View], step: int) -> Step:
        for parameter in (*self.policy.parameters(), *(p for m in self.modules.values() for p in m.parameters())):
            parameter.grad = None
        return self.engine.accumulate({n: v.at(step, self.states) for n, v in views.items()})

    def descend(self, views: Mapping[str, View], rate: float) -> Step:
        """One step of plain gradient descent on annotated rows."""
        result = self._accumulate(views, self.step)
        with torch.no_grad():
            self.policy.logits -= rate * self.policy.logits.grad  # type: ignore[operator]
        self.step += 1
        return result

    def settle(self, rows: Rows, iterations: int = 60, tolerance: float = 1e-8) -> Float[Tensor, "contexts vocab"]:
        """Descend the loss of these rows to its minimum (L-BFGS); the policy's log-probabilities there."""
        views = self.annotate(rows)
        optimiser = torch.optim.LBFGS(
            [self.policy.logits], max_iter=iterations, tolerance_grad=tolerance, tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )  # fmt: skip
        # L-BFGS wants a tensor to compare; the gradient is the engine's.
        optimiser.step(lambda: torch.tensor(self._accumulate(views, 0).metrics["loss"], dtype=F64))
        return self.policy.log_laws()

    # ---- sampled runs ----------------------------------------------------------------------------------------------

    def draw(
        self,
        prompts: Int[Tensor, " groups"],
        generator: torch.Generator,
        *,
        check: Check | None = None,
        judge: Any = None,
    ) -> Rows:
        """What the recipe's source would yield: its law, its group size, its stages.

        Args:
            prompts: one group each.
            check: stands for the data set's checker of answers.
            judge: stands for the recipe's judge of two responses.
        """
        size = getattr(self.source, "group_size", 1)
        prompt = prompts.repeat_interleave(size)
        group = torch.arange(len(prompts)).repeat_interleave(size)
        vocab, length = self.policy.vocab_size, self.policy.length
        law = self.law().softmax(-1)
        response = torch.zeros(len(prompt), length, dtype=torch.long)
        for t in range(length):
            at = prompt * prefixes(vocab, length) + contexts(response, vocab)[:, t]
            response[:, t] = torch.multinomial(law[at], 1, generator=generator)[:, 0]
        rows = listed(prompt, response, group)
        rows = rows.with_columns(behaviour_logp=self._behaviour(rows))
        return self.staged(rows, check, judge)

    def staged(self, rows: Rows, check: Check | None = None, judge: Any = None) -> Rows:
        """After the stages of the recipe's source."""
        for stage in self.stages:
            chosen: Any = WinRate(judge) if judge is not None and isinstance(stage, WinRate) else stage
            rows = chosen(rows, _context(check))
        return rows

    def use(self, rows: Rows, optimiser: torch.optim.Optimizer, generator: torch.Generator) -> list[Step]:
        """The optimiser steps that the recipe's schedule takes on one draw."""
        views = self.annotate(rows, self.step)
        heard = self.engine.measured(views).own
        schedule, out = self.recipe.schedule, []
        view = views[self.stream]
        for _ in range(schedule.epochs):
            order = torch.randperm(view.rows.groups, generator=generator)
            for number in range(schedule.minibatches):
                chosen = torch.isin(view.rows.group_index, order[number :: schedule.minibatches]).nonzero()[:, 0]
                batch = {self.stream: view if len(chosen) == len(view.rows) else view.select(chosen)}
                result = self._accumulate(batch, self.step)
                optimiser.step()
                self.step += 1
                for signal, owner in self.owners.items():
                    own = {**heard, **result.own}.get(owner, {})
                    self.states[signal] = signal.observe(self.states[signal], StepEnd(self.step, result.metrics, own))
                heard = {}
                out.append(result)
        return out

    def turn(self) -> None:
        """The end of a round: models that follow rounds take the policy's weights."""
        for name, rule in self.recipe.models.items():
            if not isinstance(rule, Trained) and rule.due(1, 1):
                rule.refresh(self.models[name], self.policy)


def _source(recipe: Recipe) -> tuple[str, Source, list[Any]]:
    """The first stream of a recipe: its name, what yields it, and the stages after that."""
    stream = next(iter(recipe.source.streams()))
    source = dict(recipe.source.sources)[stream] if isinstance(recipe.source, Mixture) else recipe.source
    stages: list[Any] = []
    while isinstance(source, (Staged, Fixed)):
        if isinstance(source, Staged):
            stages.insert(0, source.stage)
        source = source.source
    return stream, source, stages


def _context(check: Check | None) -> Context:
    def checked(record: Record, text: str) -> float:
        assert check is not None
        return check(int(record.prompt), _symbols(text))

    data = {"train": Dataset((Record("0"),), "table", check=None if check is None else checked)}
    return Context(
        models={}, data=data, seed=0, draw=0, step=0, steps=1, rows=1, max_new_tokens=1, max_length=2, temperature=1.0
    )


# ---- numbers about tables ------------------------------------------------------------------------------------------


def sequence_laws(logits: Float[Tensor, "prompts rows vocab"], length: int = 1) -> Float[Tensor, "prompts sequences"]:
    """Log-probability of every whole response to each prompt, in the order of `enumerate_sequences`; differentiable."""
    vocab = logits.shape[-1]
    sequences, _ = enumerate_sequences(vocab, length)
    return logits.log_softmax(-1)[:, contexts(sequences, vocab), sequences].sum(-1)


def slope(value: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of a number by a tensor."""
    x = at.detach().clone().requires_grad_(True)
    return torch.autograd.grad(value(x), x)[0]


def kl(a: Tensor, b: Tensor) -> Tensor:
    """``KL(a || b)`` in nats, from log-probabilities over the last dimension."""
    return (a.exp() * (a - b)).sum(-1)


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, over the largest number expected."""
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


# ---- what claims are made of ---------------------------------------------------------------------------------------

Build = Callable[..., Recipe]
"""Builds the recipe that a claim is about; a test hands the claim a broken one."""


def of(slug: str, stage: str = "") -> Build:
    """The published recipe (of one stage, where the method has several), with the method's parameters."""

    def build(**params: Any) -> Recipe:
        from leibler import recipes

        return recipes_of(recipes.get(slug, **params))[stage]

    return build


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal numbers, float64, the same at every call."""
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def shuffled(prompts: int, rows: int, vocab: int, seed: int = 0) -> Int[Tensor, "prompts rows vocab"]:
    """Counts 1 to ``vocab`` in another order in each row, for laws that are fractions with one denominator."""
    keys = torch.rand(prompts, rows, vocab, generator=torch.Generator().manual_seed(seed))
    return keys.argsort(-1) + 1


def visits(prompt: Tensor, response: Tensor, vocab: int) -> Float[Tensor, "prompts rows"]:
    """How often the listed responses pass each context, as a share of all their symbols."""
    total = prefixes(vocab, response.shape[1])
    at = prompt[:, None] * total + contexts(response, vocab)
    count = at.flatten().bincount(minlength=(int(prompt.max()) + 1) * total)
    return (count.to(F64) / count.sum()).reshape(-1, total)
