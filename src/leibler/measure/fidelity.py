"""How a distilled student stands to its teacher: what it gained, how often they agree, which errors it took over."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from leibler.data.checkers import normalised
from leibler.data.records import Dataset
from leibler.errors import DataError
from leibler.measure.models import greedy
from leibler.policy import CausalLM


@dataclass(frozen=True)
class Fidelity:
    """Shares of questions.

    Args:
        accuracy, base_accuracy, teacher_accuracy: of the distilled student, of the same student before (or without
            distillation), and of the teacher.
        agreement: student and teacher give the same answer.
        kappa: agreement beyond chance, ``(agreement - e) / (1 - e)`` with ``e`` that of independent answers with the
            same frequencies (Cohen's); NaN where both always give one answer.
        agreement_when_right: where the teacher is right; NaN where it never is.
        error_inheritance: where the teacher is wrong: the same wrong answer; NaN where it never is.
    """

    accuracy: float
    base_accuracy: float
    teacher_accuracy: float
    agreement: float
    kappa: float
    agreement_when_right: float
    error_inheritance: float

    @property
    def gain(self) -> float:
        """Accuracy gained by distillation."""
        return self.accuracy - self.base_accuracy

    @property
    def gap_closed(self) -> float:
        """The gain over the teacher's lead; NaN where the teacher has none."""
        lead = self.teacher_accuracy - self.base_accuracy
        return self.gain / lead if lead > 0 else float("nan")


def fidelity(
    student: Sequence[Hashable], base: Sequence[Hashable], teacher: Sequence[Hashable], gold: Sequence[Hashable]
) -> Fidelity:
    """Compare the answers of a distilled student, its base and its teacher.

    Agreement rises with accuracy by itself (it is at least ``accuracy + teacher_accuracy - 1``): what distillation
    passed on shows in the errors. Source: On the Generalization vs Fidelity Paradox in Knowledge Distillation
    (2025); the forms are the field's usual ones, the paper's own score could not be checked.

    Raises:
        DataError: the answers are not as many, or there is none.

    Examples:
        >>> found = fidelity(student="abba", base="aaaa", teacher="abbb", gold="abab")
        >>> found.accuracy, found.gain, found.agreement, found.error_inheritance
        (0.5, 0.0, 0.75, 1.0)
    """
    lengths = {len(student), len(base), len(teacher), len(gold)}
    if lengths == {0} or len(lengths) > 1:
        raise DataError(
            f"{len(student)}, {len(base)} and {len(teacher)} answers to {len(gold)} questions cannot be compared; give "
            "one each, to at least one question."
        )
    n = len(gold)
    same = [s == t for s, t in zip(student, teacher)]
    right = [t == g for t, g in zip(teacher, gold)]
    chance = sum(student.count(answer) / n * (teacher.count(answer) / n) for answer in set(student) & set(teacher))
    agreement = sum(same) / n
    return Fidelity(
        accuracy=_share([s == g for s, g in zip(student, gold)]),
        base_accuracy=_share([b == g for b, g in zip(base, gold)]),
        teacher_accuracy=_share(right),
        agreement=agreement,
        kappa=(agreement - chance) / (1 - chance) if chance < 1 else float("nan"),
        agreement_when_right=_share([x for x, r in zip(same, right) if r]),
        error_inheritance=_share([x for x, r in zip(same, right) if not r]),
    )


def of_models(
    student: CausalLM, base: CausalLM, teacher: CausalLM, dataset: Dataset, max_new_tokens: int = 64
) -> Fidelity:
    """`fidelity` of the models' greedy answers to questions with an exact answer.

    Answers are compared up to blanks, case and the way a number is written; one that the checker accepts counts as the
    right one, however it is spelt.

    Raises:
        DataError: the data set has no checker.

    Examples:
        >>> from leibler.data import Addition
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> task = Addition(digits=1)
        >>> tokenizer = character_tokenizer(task.alphabet)
        >>> models = [tiny_llama(tokenizer, hidden=16, layers=1, heads=2, seed=s) for s in (0, 1)]
        >>> found = of_models(models[0], models[1], models[0], task.dataset(5), max_new_tokens=3)
        >>> found.agreement, found.gain == found.accuracy - found.base_accuracy
        (1.0, True)
    """
    check = dataset.checker()
    right = "(right)"
    answers = []
    for model in (student, base, teacher):
        prompts = [model.encode_prompt(record.prompt) for record in dataset]
        texts = [model.decode(ids) for ids in greedy(model, prompts, max_new_tokens, 64)]
        answers.append([right if check(r, t) >= 1.0 else normalised(t) for r, t in zip(dataset, texts, strict=True)])
    own, before, taught = answers
    return fidelity(own, before, taught, [right] * len(dataset))


def _share(of: Sequence[bool]) -> float:
    return sum(of) / len(of) if of else float("nan")
