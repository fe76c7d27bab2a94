"""Masked-diffusion language models: what the weighted loss bounds, how TAD parts masked positions, and what that is
worth when several tokens are revealed at once."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from leibler.claims.framework import claim
from leibler.claims.tables import Build, of
from leibler.data import Dataset, Record
from leibler.objective import Rows
from leibler.policy import MaskedLM, character_tokenizer, decode_masked, tiny_masked
from leibler.policy.randomness import generator
from leibler.train import Context, Recipe, fit
from leibler.train.engine import Engine
from leibler.train.models import resolve

RECORDS = tuple(
    Record(p, completion=c) for p, c in (("1+2=", "3"), ("9=", "9"), ("12+34=", "46"), ("7=", "07"), ("5+5=", "10"))
)
HINT = "{answer}={prompt}"


def _model(seed: int = 0) -> MaskedLM:
    """A model whose laws are far from uniform."""
    model = tiny_masked(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2, max_length=64, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20.0)
    return model


def _step(
    recipe: Recipe, rows: int, length: int, records: tuple[Record, ...] = RECORDS
) -> tuple[Mapping[str, float], Rows, Mapping[str, MaskedLM]]:
    """The metrics of a first optimiser step, the rows that it drew, and the models."""
    policy: Any = _model()
    models: Any = resolve(recipe.models, policy, {})[0] | {"policy": policy}
    context = Context(
        models=models,
        data={"train": Dataset(records, "made")},
        seed=1,
        draw=0,
        step=0,
        steps=1,
        rows=rows,
        max_new_tokens=length,
        max_length=64,
        temperature=1.0,
    )
    drawn, _ = recipe.source.draw(context, recipe.source.init())
    engine = Engine(recipe, policy, models, {})
    return engine.accumulate(engine.annotate(drawn, 0, {})).metrics, drawn["main"], models


@torch.no_grad()
def _law(model: MaskedLM, tokens: Tensor, attention: Tensor | None = None) -> Tensor:
    """Log-probabilities ``[batch, length, vocab]`` by Transformers; the mask token has none."""
    logits = model.pretrained(input_ids=tokens, attention_mask=attention).logits[..., : model.vocab_size].double()
    logits[..., model.mask_id] = -torch.inf
    return logits.log_softmax(-1)


@claim(
    "llada",
    "The loss is the negative log-likelihood of a completion, in the mean over all orders in which its tokens could be "
    "revealed; so it is no less than that of the completion",
    "the mean over 2048 random masks within 4% of the mean over the 6 orders of three tokens",
)
def llada_averages_over_orders(build: Build = of("llada")) -> tuple[str, bool]:
    record = RECORDS[2]
    found = _step(build(length=3), 2048, 3, (record,))[0]["loss"]
    model, orders = _model(), list(itertools.permutations(range(3)))
    prompt, answer = model.encode_prompt(record.prompt), model.encode_completion(str(record.completion))
    expected = 0.0
    for order in orders:
        row = [model.mask_id] * 3
        for k in order:
            law = _law(model, torch.tensor([prompt + row]))
            expected -= float(law[0, len(prompt) + k, answer[k]]) / len(orders)
            row[k] = answer[k]
    return f"{found:.3f} nats, over orders {expected:.3f}", abs(found - expected) < 0.04 * expected


@claim(
    "tad",
    "Masked positions are parted in near and distant ones: no position is both or neither; without steps ahead only "
    "the privileged KL is left, with as many as the trajectory has only the likelihood of its tokens",
    "the loss within 1e-5 of dense logits at delta 0, 1, 2, 4 and 9 of 4 passes; the parts empty as said",
)
def tad_parts_the_masked_positions(build: Build = of("tad")) -> tuple[str, bool]:
    shown, holds = [], True
    for delta in (0, 1, 2, 4, 9):
        metrics, rows, models = _step(build(delta=delta, hint=HINT), 24, 4)
        near, distant = rows.columns["near"].bool(), rows.columns["distant"].bool()
        masked = rows.tokens[:, 1:] == models["policy"].mask_id
        # One token a pass: as many near ones as passes ahead, or all that are masked.
        counts = torch.equal(near.sum(1), masked.sum(1).clamp(max=delta))
        holds &= counts and not bool((near & distant).any()) and torch.equal(near | distant, masked)
        view = rows.views["privileged"]
        p = _law(models["policy"], rows.tokens, rows.attention)[:, 1:]
        q = _law(models["initial"], view.tokens, view.attention)[:, 1:][view.tokens[:, 1:] == models["policy"].mask_id]
        target = torch.zeros_like(p)
        target[masked] = q
        assert rows.labels is not None
        nll = -p.gather(-1, rows.labels[..., None])[..., 0]
        kl = torch.where(target.isinf(), 0.0, target.exp() * (target - p)).sum(-1)
        expected = sum(float(x[part].mean()) for x, part in ((nll, near), (kl, distant)) if part.any())
        holds &= abs(metrics["loss"] - expected) < 1e-5 * max(expected, 1.0)
        shown.append(f"delta {delta}: {int(near.sum())} near, {int(distant.sum())} distant, loss {metrics['loss']:.4f}")
    return "; ".join(shown), holds


@claim(
    "tad",
    "What distant positions learn is the answer in the teacher's prompt: at the start the law to match differs from "
    "the student's own by that alone",
    "at delta 0 a first loss above 0.01 nats per token",
)
def tad_needs_the_hint(build: Build = of("tad")) -> tuple[str, bool]:
    loss = _step(build(delta=0, hint=HINT), 24, 4)[0]["loss"]
    return f"{loss:.3g} nats per token", loss > 0.01


# ---- behaviour: a digit five times over, any of four -----------------------------------------------------------------

LETTERS, DIGITS, TIMES, CHOICES = "abcdefgh", 10, 5, 4
LENGTH = TIMES + 1
PER_FORWARD = (1, 2, 3, 6)
SEEDS = (0, 1)
PROMPTS = tuple(f"{a}{b}>" for a in LETTERS for b in LETTERS)


def _digits(prompt: str) -> list[int]:
    """The digits that may be repeated after a prompt: its first letter says which."""
    return [(LETTERS.index(prompt[0]) + i) % DIGITS for i in range(CHOICES)]


@lru_cache(maxsize=1)
def _examples() -> list[dict[str, str]]:
    randomness = generator(0, "coupled")
    picks = torch.randint(len(PROMPTS), (2000,), generator=randomness).tolist()
    choices = torch.randint(CHOICES, (2000,), generator=randomness).tolist()
    return [
        {"prompt": PROMPTS[i], "completion": str(_digits(PROMPTS[i])[k]) * TIMES}
        for i, k in zip(picks, choices, strict=True)
    ]


def _trained(recipe: Recipe, model: MaskedLM, data: Any, **options: Any) -> MaskedLM:
    student = model.copy().requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        options = {"batch_size": 64, "max_new_tokens": LENGTH, "quiet": True, **options}
        trained: Any = fit(recipe, student=student, data=data, out=folder, **options).policy
    return trained


_LLADA = of("llada")


@lru_cache(maxsize=2)
def _start(seed: int, build: Build) -> MaskedLM:
    """A model that has read the examples, with the answer in the prompt and without."""
    model = tiny_masked(character_tokenizer("0123456789=>" + LETTERS), hidden=32, layers=2, heads=4, seed=seed)
    hinted = [
        {**r, "prompt": HINT.replace("{answer}", r["completion"]).replace("{prompt}", r["prompt"])} for r in _examples()
    ]
    recipe, options = build(), {"steps": 300, "learning_rate": 3e-3, "decay": "cosine"}
    return _trained(recipe, model, _examples() + hinted, seed=seed, **options)


def _right(model: MaskedLM) -> dict[int, float]:
    """The share of prompts answered by one of their digits five times, by tokens per forward pass."""
    out = {}
    for commit in PER_FORWARD:
        ids = [model.encode_prompt(prompt) for prompt in PROMPTS]
        texts = [model.decode(c) for c in decode_masked(model, ids, length=LENGTH, commit=commit).completions()]
        right = [t in [str(d) * TIMES for d in _digits(p)] for p, t in zip(PROMPTS, texts, strict=True)]
        out[commit] = sum(right) / len(right)
    return out


def _area(right: Mapping[int, float]) -> float:
    """Under accuracy against tokens per forward pass, a mean over the latter."""
    at = sorted(right)
    return sum((right[a] + right[b]) / 2 * (b - a) for a, b in itertools.pairwise(at)) / (at[-1] - at[0])


def _further(seed: int, recipe: Recipe) -> MaskedLM:
    """After 100 further steps."""
    return _trained(recipe, _start(seed, _LLADA), _examples(), seed=seed, steps=100, learning_rate=1e-3, decay="linear")


def _mean(made: Callable[[int], MaskedLM]) -> dict[int, float]:
    runs = [_right(made(seed)) for seed in SEEDS]
    return {commit: sum(run[commit] for run in runs) / len(runs) for commit in PER_FORWARD}


def _told(right: Mapping[int, float]) -> str:
    return ", ".join(f"{k}: {v:.2f}" for k, v in right.items()) + f" (area {_area(right):.3f})"


@claim(
    "llada",
    "A masked language model learns an answer that prompts leave open and gives it consistently when tokens are "
    "revealed one by one, but not when all are revealed at once",
    "right answers above 0.85 at one token per forward pass, fewer by 0.25 at six; means of two seeds",
    full=True,
)
def llada_needs_several_passes(build: Build = _LLADA) -> tuple[str, bool]:
    right = _mean(lambda seed: _start(seed, build))
    return f"by tokens per forward {_told(right)}", right[1] > 0.85 and right[6] < right[1] - 0.25


@claim(
    "tad",
    "On trajectories of the model's own (hinted=False), TAD keeps coupled tokens consistent when several are revealed "
    "in a forward pass. On those that the gold answer decides, as published, labels that the prompt leaves open stay "
    "open, and no gain over as many further steps of llada is seen",
    "hinted=False, delta 3: right answers at 3 and 6 tokens per forward above the start's, area under accuracy against "
    "tokens per forward above it by 0.08; published: area at most 0.05 above that of llada; means of two seeds",
    full=True,
)
def tad_keeps_coupled_tokens_together(build: Build = of("tad")) -> tuple[str, bool]:
    before, further = _mean(lambda seed: _start(seed, _LLADA)), _mean(lambda seed: _further(seed, _LLADA()))
    own = _mean(lambda seed: _further(seed, build(delta=3, hint=HINT, hinted=False)))
    published = _mean(lambda seed: _further(seed, build(delta=3, hint=HINT)))
    holds = own[3] > before[3] and own[6] > before[6] and _area(own) > _area(before) + 0.08
    return (
        f"before {_told(before)}; own trajectories {_told(own)}; published {_told(published)}; "
        f"as many further steps of llada {_told(further)}",
        holds and _area(published) <= _area(further) + 0.05,
    )
