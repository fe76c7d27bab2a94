"""What the measurements of distillation claim, on answers and models whose truth is known."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from leibler.claims.framework import claim
from leibler.claims.tables import Build, of
from leibler.data import Dataset, Record
from leibler.measure.fidelity import Fidelity, fidelity
from leibler.measure.memorisation import (
    Excerpt,
    Inheritance,
    excerpts,
    foretold,
    inheritance,
    predictors,
    recited,
)
from leibler.measure.models import compare
from leibler.policy import CausalLM, character_tokenizer, sample, tiny_llama
from leibler.policy.randomness import generator, uniforms
from leibler.train import Recipe, fit


def _answers(seed: int, questions: int = 2000) -> dict[str, list[int]]:
    """Ten possible answers. The student copies the teacher in 60% of cases, the base guesses by itself."""
    g = torch.Generator().manual_seed(seed)

    def guess() -> torch.Tensor:
        return torch.randint(10, (questions,), generator=g)

    def mixed(share: float, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.where(torch.rand(questions, generator=g) < share, one, other)

    gold = guess()
    teacher, base = mixed(0.7, gold, guess()), mixed(0.4, gold, guess())
    answers = {"student": mixed(0.6, teacher, base), "base": base, "teacher": teacher, "gold": gold}
    return {name: given.tolist() for name, given in answers.items()}


@claim(
    "kd-fidelity",
    "Agreement rises with accuracy by itself; what was copied shows where the teacher is wrong",
    "a student that copies 60% of the teacher's answers: error inheritance 0.56 to 0.7, of one as accurate that copies "
    "none below 0.2, although both agree in over 40% of all answers and no less than accuracies force",
)
def fidelity_tells_copied_errors(measure: Callable[..., Fidelity] = fidelity) -> tuple[str, bool]:
    answers = _answers(0)
    found = measure(**answers)
    # As accurate, but with errors of its own.
    g = torch.Generator().manual_seed(1)
    gold = torch.tensor(answers["gold"])
    wrong = (gold + torch.randint(1, 10, gold.shape, generator=g)) % 10
    own = torch.where(torch.rand(len(gold), generator=g) < found.accuracy, gold, wrong)
    alone = measure(**{**answers, "student": own.tolist()})
    forced = all(f.agreement >= f.accuracy + f.teacher_accuracy - 1 - 1e-9 for f in (found, alone))
    holds = (
        0.56 < found.error_inheritance < 0.7
        and alone.error_inheritance < 0.2
        and min(found.agreement, alone.agreement) > 0.4
        and abs(found.gain - (found.accuracy - found.base_accuracy)) < 1e-12
        and forced
    )
    shown = f"copied {found.error_inheritance:.2f}, alone {alone.error_inheritance:.2f}"
    return f"{shown}; agreement {found.agreement:.2f} and {alone.agreement:.2f}", holds


def _model_and_text() -> tuple[Any, list[int], list[int]]:
    """A model, a prefix, and the model's own greedy continuation of it."""
    model = tiny_llama(character_tokenizer("abcdefgh"), hidden=32, layers=1, heads=2, seed=4)
    prefix = model.encode_prompt("abcabfgh")
    none = torch.zeros((1, 8), dtype=torch.float64)
    return model, prefix, sample(model, [prefix], uniforms=none, temperature=0.0).completions()[0]


@claim(
    "memorization-dynamics",
    "A text is memorised where greedy decoding recites all of it, and the texts that a student recites fall into four "
    "cells by who else does",
    "a model's own continuation is recited to the end, one with the third token changed to the second; cells add up, "
    "and each holds what its name says",
)
def memorisation_counts_what_is_recited(
    measure: Callable[..., list[int]] = recited, cells: Callable[..., Inheritance] = inheritance
) -> tuple[str, bool]:
    model, prefix, ids = _model_and_text()
    other = next(i for i in model.encode_completion("abc")[:-1] if i != ids[2])
    changed = [*ids[:2], other, *ids[3:]]
    places = [Excerpt(tuple(prefix), tuple(suffix)) for suffix in (ids, changed)]
    counts = measure(model, places)
    # Every combination of (student, teacher, baseline), the k-th of them k + 1 times.
    rows = [tuple(bool(k >> i & 1) for i in range(3)) for k in range(8) for _ in range(k + 1)]
    found = cells(*([row[i] for row in rows] for i in range(3)))
    named = (found.easy, found.inherited, found.own, found.new)
    expected = tuple(sum(row == (True, t, b) for row in rows) for t, b in ((1, 1), (1, 0), (0, 1), (0, 0)))
    whole = len(ids) == 8 and counts == [8, 2]
    return f"recited {counts} of {len(ids)}; cells {named}", whole and named == expected and sum(named) == found.student


# ---- what a distilled student recites, on a corpus with repeated canaries --------------------------------------------

LETTERS = "abcdefghijkl"
PREFIX, SUFFIX = 8, 16
SEEDS = (0, 1)
STEPS, LONGER, TEACHER_STEPS = 200, 320, 300


@dataclass(frozen=True)
class _Corpus:
    lines: tuple[Record, ...]
    canaries: tuple[Record, ...]
    held_out: tuple[Record, ...]


@lru_cache(maxsize=1)
def _corpus() -> _Corpus:
    """2000 lines of a Markov chain once each, among them 50 others that come 4 to 64 times.

    A canary repeats a random motif of 2 to 24 letters: some can be gone on with by copying, some by heart only.
    """
    g, n, length = generator(0, "corpus"), len(LETTERS), PREFIX + SUFFIX
    law = (2.5 * torch.randn(n, n, generator=g)).softmax(-1)

    def lines(count: int) -> list[Record]:
        letters = [torch.randint(n, (count,), generator=g)]
        while len(letters) < length:
            letters.append(torch.multinomial(law[letters[-1]], 1, generator=g)[:, 0])
        return [record(line) for line in torch.stack(letters, 1).tolist()]

    def record(line: list[int]) -> Record:
        text = "".join(LETTERS[i] for i in line)
        return Record(text[:PREFIX], completion=text[PREFIX:])

    kinds = [(period, times) for period in (2, 4, 8, 16, 24) for times in (4, 8, 16, 32, 64) for _ in range(2)]
    motifs = [torch.randint(n, (period,), generator=g).tolist() for period, _ in kinds]
    canaries = [record(list(itertools.islice(itertools.cycle(motif), length))) for motif in motifs]
    repeated = [canary for canary, (_, times) in zip(canaries, kinds, strict=True) for _ in range(times)]
    return _Corpus((*lines(2000), *repeated), tuple(canaries), tuple(lines(300)))


def _trained(
    recipe: Recipe, seed: int, lines: Sequence[Record], steps: int, teacher: CausalLM | None = None, hidden: int = 32
) -> CausalLM:
    student = tiny_llama(character_tokenizer(LETTERS), hidden=hidden, layers=2, heads=4, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        return fit(
            recipe, student=student, teacher=teacher, data=Dataset(tuple(lines), "lines"), out=folder, steps=steps,
            batch_size=64, learning_rate=5e-3, decay="cosine", seed=seed, quiet=True,
        ).policy  # fmt: skip


@lru_cache(maxsize=1)
def _teacher() -> CausalLM:
    return _trained(of("sft")(), 100, _corpus().lines, TEACHER_STEPS, hidden=64)


@lru_cache(maxsize=len(SEEDS))
def _others(seed: int) -> tuple[CausalLM, CausalLM, CausalLM]:
    """A baseline trained as long as the student, one trained longer, and one trained on the teacher's samples."""
    lines, teacher = _corpus().lines, _teacher()
    numbers = uniforms(seed, "text", 0, rows=len(lines), n=SUFFIX)
    prompts = [teacher.encode_prompt(line.prompt) for line in lines]
    written = sample(teacher, prompts, uniforms=numbers, max_batch=1024).completions()
    made = [Record(r.prompt, completion=teacher.decode(ids)) for r, ids in zip(lines, written, strict=True)]
    sft = of("sft")()
    short, longer = (_trained(sft, seed, lines, steps) for steps in (STEPS, LONGER))
    return short, longer, _trained(sft, seed, made, STEPS)


@lru_cache(maxsize=len(SEEDS))
def _student(build: Build, seed: int) -> CausalLM:
    return _trained(build(), seed, _corpus().lines, STEPS, _teacher())


def _loss(model: CausalLM) -> float:
    return compare(model, model, _corpus().held_out, ())["model/nll"]


@claim(
    "memorization-dynamics",
    "Who is memorised can be told before: of repeated canaries a distilled student recites none that its teacher does "
    "not, and compression with perplexities foretells which. That a student of soft labels recites less than half of "
    "what one trained on the text does, and that the teacher's text hands on more than its laws do, is not seen at "
    "this size: soft labels hand on more canaries, both at equal tokens and by inheritance",
    "50 canaries among 2000 lines, means of two seeds: cells add up; area above 0.8 each time; at most 1 in 20 recited "
    "that the teacher does not know; soft labels recite no fewer than the baseline at equal tokens and above 0.8 times "
    "it at equal validation loss (published: below half), and inherit more than sampled text (published: 2.7 times "
    "less)",
    full=True,
)
def students_recite_what_their_teacher_does(
    build: Build = of("kd"),
    measure: Callable[..., list[int]] = recited,
    cells: Callable[..., Inheritance] = inheritance,
    tell: Callable[..., tuple[float, Any]] = foretold,
) -> tuple[str, bool]:
    teacher = _teacher()
    places = excerpts(teacher, _corpus().canaries, PREFIX, SUFFIX)

    def known(model: CausalLM) -> list[bool]:
        return [count == SUFFIX for count in measure(model, places)]

    by_teacher = known(teacher)
    soft, hard, matched, areas = [], [], [], []
    for seed in SEEDS:
        (short, longer, taught), student = _others(seed), _student(build, seed)
        baseline, own = known(short), known(student)
        soft.append(cells(own, by_teacher, baseline))
        hard.append(cells(known(taught), by_teacher, baseline))
        # What a baseline recites by the time that it predicts held-out lines as well as the student does.
        losses, counts = [_loss(longer), _loss(short)], [sum(known(longer)), sum(baseline)]
        matched.append(float(np.interp(_loss(student), losses, counts)))
        before = predictors(teacher, short, places)
        plain = {name: column for name, column in before.items() if name != "forward_kl"}
        areas += [tell(columns, own)[0] for columns in (plain, before)]
    both = [*soft, *hard]
    partition = all(x.student == x.easy + x.inherited + x.own + x.new for x in both)
    total = sum(x.student for x in soft)
    given, taken = (sum(x.inherited for x in some) for some in (soft, hard))
    holds = (
        partition
        and sum(x.own + x.new for x in both) <= 0.05 * sum(x.student for x in both)
        and total >= sum(x.baseline for x in soft)
        and total > 0.8 * sum(matched)
        and given > taken
        and min(areas) > 0.8
    )
    numbers = [
        f"teacher {sum(by_teacher)}",
        *(f"{name} {sum(counts) / len(SEEDS):.1f}" for name, counts in (
            ("baseline", [x.baseline for x in soft]), ("at equal loss", matched),
            ("soft", [x.student for x in soft]), ("hard", [x.student for x in hard]),
        )),
    ]  # fmt: skip
    shown = f"recited of 50: {', '.join(numbers)}; inherited {given} by soft and {taken} by hard labels"
    return f"{shown}; area {min(areas):.2f} to {max(areas):.2f}", holds
