"""What the measurements of distillation claim, on answers and models whose truth is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from leibler.claims.framework import claim
from leibler.measure.fidelity import Fidelity, fidelity
from leibler.measure.memorisation import Excerpt, Inheritance, inheritance, recited
from leibler.policy import character_tokenizer, sample, tiny_llama


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
