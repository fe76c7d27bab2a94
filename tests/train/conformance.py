"""One harness for every recipe: tiny double-precision models, one drawn batch, the gradient under any cut and plan.

A `Case` is a recipe with its parameters; `prepare` makes the models, draws one batch with rewards that are arbitrary
but fixed, annotates it, and (where the recipe uses a draw more than once) moves the policy away from what it was.
`gradient` then runs `Engine.accumulate` under a chosen cut and plan.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from environment.made import Sums
from leibler import recipes
from leibler.data import Dataset, Record
from leibler.objective import Behaviour, Rows, View
from leibler.policy import CausalLM, MaskedLM, character_tokenizer, tiny_masked
from leibler.policy.randomness import derived_seed
from leibler.train import Context, Episodes, Fixed, Mixture, Recipe, Score, WinRate, recipes_of
from leibler.train.engine import Engine
from leibler.train.masking import reads_masked
from leibler.train.models import measured, resolve
from leibler.train.setup import paired
from leibler.train.sources import Source, Staged
from leibler.train.tally import Step

TOKENIZER = character_tokenizer("0123456789+=")
MASKED_TOKENIZER = tiny_masked(TOKENIZER, hidden=16, layers=1, heads=2).tokenizer
TEMPERATURE = 0.8
STEP = 3


def tiny(
    seed: int,
    *,
    padding: int = 0,
    loud: float = 12.0,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    tokenizer: Any = TOKENIZER,
) -> CausalLM:
    """A Llama of one layer whose laws are far from uniform; ``padding`` rows of its head stand for no token."""
    config = LlamaConfig(
        vocab_size=len(tokenizer) + padding,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        attention_dropout=dropout,
        tie_word_embeddings=seed % 2 == 0,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(loud)
    return CausalLM(network.to(dtype), tokenizer).eval()


def tiny_filling(seed: int, *, padding: int = 0) -> MaskedLM:
    """A model of the same size that fills in masked positions, in double precision."""
    config = BertConfig(
        vocab_size=len(MASKED_TOKENIZER) + padding,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=MASKED_TOKENIZER.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BertForMaskedLM(config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(12.0)
    return MaskedLM(network.double(), MASKED_TOKENIZER).eval()


def reward(records: Sequence[Record], texts: Sequence[str]) -> list[float]:
    """Arbitrary, fixed, in {0, 0.4, 1}; equal for every response to the first and the last prompt."""
    numbers = [derived_seed(7, f"{r.prompt}|{t}") % 5 for r, t in zip(records, texts, strict=True)]
    return [
        0.4 if r.prompt in ("9=", "8+1=") else (0.0, 0.4, 1.0, 1.0, 0.0)[n]
        for r, n in zip(records, numbers, strict=True)
    ]


def judge(record: Record, a: str, b: str) -> float:
    first, second = (derived_seed(8, f"{record.prompt}|{t}") % 7 for t in (a, b))
    return 0.5 if a == b or first == second else float(first > second)


def records() -> list[Record]:
    made = []
    for i, prompt in enumerate(["9=", "1+2=", "12+34=", "5+5+5=", "7=", "8+1="]):
        given: dict[str, Any] = {"pass_rate": i / 5, "label_logp": [-(1 + k % 3) / 2 for k in range(i + 2)]}
        laws = [[(7 * i + 3 * m + k) % 12 + 4 for k in range(1 + i % 3)] for m in range(1 + (i + 1) % 4)]
        weights = [[1.0 + (i + m + 2 * k) % 5 for k in range(len(law))] for m, law in enumerate(laws)]
        given["latents"] = {"token": laws, "weight": weights}
        texts = {"completion": "123456789"[: 1 + i], "chosen": "98765"[: 2 + i % 3], "rejected": "13579"[: 1 + i % 4]}
        made.append(Record(prompt, **texts, extra=given))
    return made


@dataclass(frozen=True)
class Case:
    """A published recipe with some of its parameters; ``name`` keys the dense reference too."""

    slug: str
    params: tuple[tuple[str, Any], ...] = ()
    fresh_rows: bool = False
    """Start an adaptive source where it draws from the policy."""
    stage: str = ""
    """Of a method in several stages: which."""

    @property
    def id(self) -> str:
        shown = ",".join(f"{k}={v}" for k, v in self.params) + (",rollouts" if self.fresh_rows else "")
        return self.key + (f"[{shown.strip(',')}]" if shown else "")

    @property
    def key(self) -> str:
        """The name of the recipe: of the method, and of its stage."""
        return f"{self.slug}/{self.stage}" if self.stage else self.slug

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.params)

    def recipe(self) -> Recipe:
        made = recipes_of(recipes.get(self.slug, **self.options))[self.stage]
        return replace(made, source=scored(made.source))


def case(slug: str, fresh_rows: bool = False, stage: str = "", **params: Any) -> Case:
    return Case(slug, tuple(params.items()), fresh_rows, stage)


def scored(source: Source) -> Source:
    """The source with its checkers replaced by fixed arbitrary rewards, and its environments by one of digits."""
    if isinstance(source, Staged):
        stage: Any = source.stage
        if isinstance(stage, Score):
            stage = Score(reward)
        elif isinstance(stage, WinRate):
            stage = WinRate(judge)
        return Staged(scored(source.source), stage)
    if isinstance(source, Mixture):
        return Mixture(tuple((name, scored(inner)) for name, inner in source.sources))
    if isinstance(source, Fixed):
        return replace(source, source=scored(source.source))
    if isinstance(source, Episodes):
        return replace(source, environment=Sums())
    return source


@dataclass
class Prepared:
    """A recipe with everything that its next optimiser step needs."""

    recipe: Recipe
    policy: CausalLM
    old: CausalLM
    models: Mapping[str, CausalLM]
    modules: Mapping[str, nn.Module]
    states: Mapping[Hashable, Any]
    views: Mapping[str, View]
    rows: Mapping[str, Rows] = field(default_factory=dict)

    def engine(self, micro_rows: int | None = None, plan: str | None = None) -> Engine:
        engine = Engine(
            self.recipe, self.policy, self.models, self.modules, temperature=TEMPERATURE, micro_rows=micro_rows
        )
        if plan is not None:
            engine.plans = {name: replace(p, kind=plan) for name, p in engine.plans.items()}
        return engine

    def parameters(self) -> dict[str, nn.Parameter]:
        named = {f"policy.{n}": p for n, p in self.policy.named_parameters()}
        for module, parts in self.modules.items():
            named.update({f"{module}.{n}": p for n, p in parts.named_parameters()})
        return named


@lru_cache(maxsize=8)
def prepare(chosen: Case) -> Prepared:
    """Draw and annotate a batch of the case's recipe."""
    return ready(chosen.recipe(), fresh_rows=chosen.fresh_rows)


def ready(recipe: Recipe, *, fresh_rows: bool = False, moved: float | None = None) -> Prepared:
    """Draw and annotate a batch; ``moved`` is how far the policy goes from there (default: a little, if used again)."""
    make: Any = tiny_filling if reads_masked(recipe.source) else tiny
    policy = make(0).requires_grad_(True)
    given = {"teacher": make(1, padding=5), "base": make(2), "reference": make(3, padding=2), "previous": make(4)}
    given.update(teacher_base=make(5), extreme=make(6), negative=make(7), reference_small=make(8))
    models, modules = resolve(recipe.models, policy, given)
    data = Dataset(tuple(records()), "made")
    text = Dataset(tuple(Record(r.prompt, completion=r.completion) for r in records()), "text")
    plain = Dataset(tuple(replace(r, chosen=None, rejected=None) for r in records()), "plain")
    modules |= measured(recipe.models, policy, models, {"general": text})
    for number, module in enumerate(modules.values()):
        module.double()
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(100 + number)
            for parameter in module.parameters():
                parameter.normal_(std=0.5)
    models["policy"] = policy
    pairs = "train" in paired(recipe)
    context = Context(
        models=models,
        data={"train": data if pairs else plain, "text": text, "general": text},
        seed=5,
        draw=0,
        step=STEP,
        steps=10,
        rows=12,
        max_new_tokens=6,
        max_length=64,
        temperature=TEMPERATURE,
    )
    state = recipe.source.init()
    if fresh_rows:
        adaptive = state if "phi" in state else state["main"]
        adaptive["phi"] = {"phi": 1.0, "raised_at": None}
        context = replace(context, step=0)
    drawn, _ = recipe.source.draw(context, state)
    states = {s: s.init() for s, _ in recipe.objective.walk() if s.init() is not None}
    made = Prepared(recipe, policy, policy.copy(), models, modules, states, {}, drawn)
    made.views = made.engine().annotate(drawn, STEP, states)
    if moved is None:
        stale = any(origin.law == Behaviour() for origin in recipe.source.streams().values())
        moved = 0.03 if stale or not recipe.schedule.single_use else 0.0
    if moved:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(9)
            for parameter in policy.parameters():
                parameter.add_(moved * torch.randn_like(parameter))
    return made


def gradient(
    made: Prepared,
    *,
    micro_rows: int | None = None,
    plan: str | None = None,
    views: Mapping[str, View] | None = None,
) -> tuple[dict[str, Tensor], Step]:
    """The gradient that one optimiser batch leaves in the parameters, and what the step measured."""
    named = made.parameters()
    for parameter in named.values():
        parameter.grad = None
    batch = {n: v.at(STEP, made.states) for n, v in (views or made.views).items()}
    step = made.engine(micro_rows, plan).accumulate(batch)
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in named.items()}, step


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The largest difference over the largest number."""
    assert a.keys() == b.keys()
    scale = max(float(x.abs().max()) for x in b.values())
    return max(float((a[n] - b[n]).abs().max()) for n in b) / max(scale, 1e-12)


def size(a: Mapping[str, Tensor]) -> float:
    return max(float(x.abs().max()) for x in a.values())
