"""What latent reasoning claims: thoughts are superpositions of tokens, learnt where they are predicted."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from leibler.claims.framework import claim
from leibler.claims.tables import Build, of
from leibler.data import Dataset, Record
from leibler.divergence import SampledLogProb
from leibler.fused import Want, functionals
from leibler.measure.latent import effective_paths
from leibler.objective import Rows, SoftTokens
from leibler.policy import CausalLM, character_tokenizer, right_pad, tiny_llama
from leibler.policy.latent import decode_latent, embedding_rows
from leibler.policy.randomness import generator
from leibler.train import Context, Recipe, fit
from leibler.train.engine import Engine
from leibler.train.latents import to_column

OPEN, CLOSE = "[", "]"
MARKS = {"open": OPEN, "close": CLOSE}


def _model(seed: int, letters: str = "0123456789+=[]") -> CausalLM:
    """Double precision, with laws far from uniform."""
    model = tiny_llama(character_tokenizer(letters), hidden=16, layers=2, heads=2, tie=False, seed=seed).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6.0 if parameter.ndim > 1 else 1.0)
    return model.requires_grad_(True)


def _drawn(recipe: Recipe, model: CausalLM, records: list[Record]) -> Rows:
    context = Context(
        {"policy": model}, {"train": Dataset(tuple(records), "made")}, seed=0, draw=0, step=0, steps=1,
        rows=len(records), max_new_tokens=8, max_length=256, temperature=1.0,
    )  # fmt: skip
    return recipe.source.draw(context, recipe.source.init())[0]["main"]


def _loss(recipe: Recipe, model: CausalLM, rows: Rows) -> float:
    """The recipe's loss on a batch; the gradient is left in the model."""
    engine = Engine(recipe, model, {"policy": model}, {})
    model.zero_grad()
    return engine.accumulate(engine.annotate({"main": rows}, 0, {})).metrics["loss"]


def _thoughts(model: CausalLM, laws: list[list[tuple[int, float]]]) -> dict[str, Any]:
    return {"token": [[t for t, _ in law] for law in laws], "weight": [[w for _, w in law] for law in laws]}


@claim(
    "latent-sft",
    "Thoughts that are sure of one token are that token: the divergence is its negative log-likelihood after the "
    "ordinary text, and so is the gradient",
    "loss within 1e-7 of the ordinary text's, and gradients of all weights but the embedding within a relative 1e-7",
)
def certain_thoughts_are_tokens(build: Build = of("latent-sft")) -> tuple[str, bool]:
    model = _model(0)
    ids = model.tokenizer.get_vocab()
    texts = [("1+2=", "12", "3"), ("7=", "7", "49"), ("12+3=", "908", "5")]
    made = [
        Record(p, completion=a, extra={"latents": _thoughts(model, [[(ids[t], 1.0)] for t in thought])})
        for p, thought, a in texts
    ]
    recipe = build(**MARKS)
    loss = _loss(recipe, model, _drawn(recipe, model, made))
    mine = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None and "embed" not in n}
    model.zero_grad()
    # The same as text, likelihoods by hand: answers are one mean over tokens, thoughts one over rows of their means.
    pairs = [(model.encode_prompt(p + OPEN), model.encode_completion(t + CLOSE + a)) for p, t, a in texts]
    tokens, attention, mask = right_pad(pairs)
    logp = functionals(
        model.linear(model(tokens, attention)[:, :-1][mask]), [Want(SampledLogProb())],
        token=tokens[:, 1:][mask], vocab=model.vocab_size,
    )[0]  # fmt: skip
    rows = logp.split(mask.sum(1).tolist())
    thought = sum(-row[: len(t)].mean() for row, (_, t, _) in zip(rows, texts, strict=True)) / len(texts)
    answer = -torch.cat([row[len(t) :] for row, (_, t, _) in zip(rows, texts, strict=True)]).mean()
    (thought + answer).backward()
    gap = abs(loss - float((thought + answer).detach()))
    grads = {n: p.grad for n, p in model.named_parameters() if n in mine and p.grad is not None}
    scale = max(float(g.abs().max()) for g in grads.values())
    off = max(float((mine[n] - g).abs().max()) for n, g in grads.items()) / scale
    return f"loss off by {gap:.1e}, gradients by {off:.1e}", gap < 1e-7 and off < 1e-7


@claim(
    "latent-sft",
    "Each thought is learnt at the position that predicts it: a model's own thoughts, given back to it as data, have a "
    "divergence of 0",
    "divergence below 1e-6 nats a thought, and the other model's thoughts above 0.1",
)
def own_thoughts_cost_nothing(build: Build = of("latent-sft")) -> tuple[str, bool]:
    recipe, divergences = build(**MARKS, answer=0.0), []
    thinker = _model(3)
    prompts = ["1+2=", "7=", "12+3="]
    out = decode_latent(
        thinker,
        [thinker.encode_prompt(p) for p in prompts],
        max_latent=3,
        keep=thinker.vocab_size,
        open=OPEN,
        close=CLOSE,
    )
    made = []
    for row, prompt in enumerate(prompts):
        count = int(out.steps[row])
        column = to_column(out.laws.index[row, :count], out.laws.weight[row, :count], thinker)
        made.append(Record(prompt, completion="1", extra={"latents": column}))
    made = [r for r in made if r.extra["latents"]["token"]]
    for model in (thinker, _model(4)):
        divergences.append(_loss(recipe, model, _drawn(recipe, model, made)))
    own, other = divergences
    return f"{own:.1e} for the thinker, {other:.3g} for another", len(made) > 1 and abs(own) < 1e-6 and other > 0.1


def _read(model: CausalLM, soft: SoftTokens) -> Tensor:
    return model.embed(torch.zeros(soft.index.shape[:2], dtype=torch.long), soft)


@claim(
    "latent-sft",
    "What a model reads as a thought lies in the convex hull of its embedding's rows",
    "over 2000 directions, no thought reaches beyond the furthest row (tolerance 1e-9), and the one-hot ones reach it",
)
def thoughts_lie_in_the_hull(read: Callable[[CausalLM, SoftTokens], Tensor] = _read) -> tuple[str, bool]:
    model = _model(0)
    matrix, source = embedding_rows(model).detach(), generator(0, "hull")
    noise = torch.randn(1, 200, model.vocab_size, generator=source, dtype=torch.float64)
    weights = torch.cat([(4 * noise).softmax(-1), torch.eye(model.vocab_size, dtype=torch.float64)[None]], dim=1)
    index = torch.arange(model.vocab_size).expand(weights.shape)
    thoughts = read(model, SoftTokens(index, weights)).detach()[0]
    directions = torch.randn(2000, matrix.shape[1], generator=source, dtype=torch.float64)
    furthest = (directions @ matrix.t()).amax(-1)
    beyond = float((directions @ thoughts.t() - furthest[:, None]).max())
    reached = float(((directions @ thoughts[200:].t()).amax(-1) - furthest).abs().max())
    return f"at most {beyond:.1e} beyond; one-hot within {reached:.1e}", beyond < 1e-9 and reached < 1e-9


@claim(
    "latent-sft",
    "The effective number of paths lies between 1 and their number, and is that number where all are alike",
    "1 <= N <= M for 500 draws of scores, M within 1e-9 at equal scores, and 1 within 1e-9 where one is 99 nats ahead",
)
def paths_are_counted(count: Callable[[Tensor], float] = effective_paths) -> tuple[str, bool]:
    source, inside, ends = generator(0, "paths"), True, 0.0
    for draw in range(500):
        m = 1 + draw % 9
        scores = 30 * torch.randn(m, generator=source, dtype=torch.float64)
        inside &= 1 - 1e-9 <= count(scores) <= m + 1e-9
        equal = count(torch.full((m,), float(scores[0]), dtype=torch.float64))
        alone = count(torch.cat([scores[:1] * 0, torch.full((m - 1,), -99.0, dtype=torch.float64)]))
        ends = max(ends, abs(equal - m), abs(alone - 1))
    return f"{'inside' if inside else 'outside'}, ends off by {ends:.1e}", inside and ends < 1e-9


# ---- behaviour -------------------------------------------------------------------------------------------------------

MODULUS, MOVES = 5, 3
SEEDS = (0, 1)
WALKS = "01234ab[]"


def _walks(seed: int, ambiguous: bool) -> tuple[list[Record], list[Record]]:
    """Where two places on a circle of 5 are after three moves by 0 or 1; the question ends with which is asked for.

    The thought after each move gives 0.7 to the first place and 0.3 to the second, or all to the first: its argmax.
    """
    ids, made = character_tokenizer(WALKS).get_vocab(), []
    pairs, moved = itertools.permutations(range(MODULUS), 2), itertools.product(range(2), repeat=MOVES)
    for pair, moves, asked in itertools.product(pairs, moved, (0, 1)):
        now = pair
        tokens, weights = [], []
        for move in moves:
            now = tuple((place + move) % MODULUS for place in now)
            tokens.append([ids[str(place)] for place in now][: 2 if ambiguous else 1])
            weights.append([0.7, 0.3] if ambiguous else [1.0])
        question = "".join(map(str, (*pair, *moves))) + "ab"[asked]
        made.append(
            Record(question, completion=str(now[asked]), extra={"latents": {"token": tokens, "weight": weights}})
        )
    order = torch.randperm(len(made), generator=generator(seed, "walks")).tolist()
    cut = int(0.7 * len(made))
    return [made[i] for i in order[:cut]], [made[i] for i in order[cut:]]


def _thinker(recipe: Recipe, seed: int, ambiguous: bool) -> tuple[dict[str, float], float]:
    """How many held-out questions are answered after own thoughts, by the place asked for, and the thoughts each."""
    records, held_out = _walks(seed, ambiguous)
    student = tiny_llama(character_tokenizer(WALKS), hidden=48, layers=1, heads=4, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        trained = fit(
            recipe, student=student, data=Dataset(tuple(records), "walks"), out=folder, steps=400, batch_size=128,
            learning_rate=1e-2, decay="cosine", seed=seed, quiet=True,
        ).policy  # fmt: skip
    prompts = [trained.encode_prompt(record.prompt) for record in held_out]
    found = decode_latent(trained, prompts, max_latent=2 * MOVES, max_new_tokens=2, open=OPEN, close=CLOSE)
    right: dict[str, list[bool]] = {"a": [], "b": []}
    for record, answer in zip(held_out, found.answers.completions(), strict=True):
        right[record.prompt[-1]].append(trained.decode(answer) == record.completion)
    return {which: sum(x) / len(x) for which, x in right.items()}, float(found.steps.double().mean())


@lru_cache(maxsize=len(SEEDS))
def _argmax(seed: int) -> tuple[dict[str, float], float]:
    return _thinker(of("latent-sft")(**MARKS), seed, ambiguous=False)


@claim(
    "latent-sft",
    "Thoughts that keep both of two possible places answer more new questions than their argmax, at as many thoughts "
    "and steps of training. What they win is the place that the argmax leaves out, whose answers a model of one layer "
    "learns by heart; about the place that both keep they are not better, and the gain varies much between seeds",
    "two places on a circle of 5 moved three times together, means of two seeds over held-out questions: with laws the "
    "second place right in 0.7 or more and 0.1 more often than with argmax, the first at most 0.1 less often, all "
    "questions together more often; thoughts within 0.1 of three",
    full=True,
)
def laws_answer_what_their_argmax_cannot(build: Build = of("latent-sft")) -> tuple[str, bool]:
    runs = {"laws": [_thinker(build(**MARKS), s, True) for s in SEEDS], "argmax": [_argmax(s) for s in SEEDS]}
    mean = {name: [sum(found[q] for found, _ in some) / len(SEEDS) for q in "ab"] for name, some in runs.items()}
    steps = [count for some in runs.values() for _, count in some]
    laws, top = mean["laws"], mean["argmax"]
    holds = (
        laws[1] >= 0.7
        and laws[1] > top[1] + 0.1
        and laws[0] > top[0] - 0.1
        and sum(laws) > sum(top)
        and max(abs(count - MOVES) for count in steps) < 0.1
    )
    shown = "; ".join(f"{name}: first {a:.3f}, second {b:.3f}" for name, (a, b) in mean.items())
    return f"{shown}; thoughts {min(steps):.2f} to {max(steps):.2f}", holds
