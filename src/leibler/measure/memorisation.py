"""What models can recite of their training texts, what a distilled one inherits of it, and what foretells it."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from leibler.data.records import Record
from leibler.divergence import ForwardKL, SampledLogProb
from leibler.errors import DataError
from leibler.fused import TargetRows, Want, functionals
from leibler.measure.models import _linear, _padded, greedy
from leibler.policy import CausalLM, same_tokenizer
from leibler.policy.model import evaluating
from leibler.policy.reading import by_length, row_means


@dataclass(frozen=True)
class Excerpt:
    """A place in a training text: what a model is shown, and what it would have to recite, as token ids.

    Token ids and not text: cutting text anew would change where a token begins.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    text: str = ""
    """The suffix as text."""


def excerpts(model: CausalLM, records: Iterable[Record], prefix: int = 50, suffix: int = 50) -> list[Excerpt]:
    """The beginning of each record, as a model that is trained on it sees it: prompt, then completion.

    Args:
        model: whose tokenizer cuts the texts.
        records: what the models were trained on; those of less than ``prefix + suffix`` tokens are left out.
        prefix, suffix: numbers of tokens (the begin token of an empty prompt counts). 50 and 50 are the field's habit.

    Raises:
        DataError: a number below 1, or no record is long enough.

    Examples:
        >>> from leibler.data import Record
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> model = tiny_llama(character_tokenizer("ab"), hidden=16, layers=1, heads=2)
        >>> [e.text for e in excerpts(model, [Record("ab", completion="bab"), Record("a")], prefix=2, suffix=3)]
        ['bab']
    """
    if prefix < 1 or suffix < 1:
        raise DataError(f"an excerpt of {prefix} and {suffix} tokens is none; give at least 1 and 1.")
    found = []
    for record in records:
        ids = model.encode_prompt(record.prompt) + model.encode_completion(record.completion or "")[:-1]
        if len(ids) >= prefix + suffix:
            here = tuple(ids[prefix : prefix + suffix])
            found.append(Excerpt(tuple(ids[:prefix]), here, model.decode(list(here))))
    if not found:
        raise DataError(f"no text has {prefix + suffix} tokens; give longer texts, or a shorter prefix and suffix.")
    return found


def recited(model: CausalLM, places: Sequence[Excerpt], batch_size: int = 64) -> list[int]:
    """How many tokens of each suffix the model recites from the prefix, greedily, before the first that differs.

    A text counts as *memorised* where that is the whole suffix.

    Examples:
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> model = tiny_llama(character_tokenizer("ab"), hidden=16, layers=1, heads=2)
        >>> 0 <= recited(model, [Excerpt((4, 5), (5, 4, 5))])[0] <= 3
        True
    """
    longest = max(len(place.suffix) for place in places)
    answers = greedy(model, [p.prefix for p in places], longest, batch_size)
    out = []
    for place, ids in zip(places, answers, strict=True):
        same = 0
        for wanted, given in zip(place.suffix, ids):
            if wanted != given:
                break
            same += 1
        out.append(same)
    return out


@dataclass(frozen=True)
class Inheritance:
    """The texts that a distilled student recites, by who else does: the four cells are a partition.

    Args:
        student, teacher, baseline: how many texts each recites; the baseline is a student of the same size that was
            trained on the texts themselves.
        easy: recited by all three.
        inherited: by student and teacher, not by the baseline.
        own: by student and baseline, not by the teacher.
        new: by the student alone.
    """

    student: int
    teacher: int
    baseline: int
    easy: int
    inherited: int
    own: int
    new: int

    @property
    def of_baseline(self) -> float:
        """How much the student recites, over the baseline; NaN where that recites nothing."""
        return self.student / self.baseline if self.baseline else float("nan")


def inheritance(student: Sequence[bool], teacher: Sequence[bool], baseline: Sequence[bool]) -> Inheritance:
    """Count the texts that a student recites by whether teacher and baseline do.

    Source: Memorization Dynamics in Knowledge Distillation for Language Models (2026), whose sets are reconstructed
    from its findings.

    Examples:
        >>> found = inheritance([True, True, False], [True, False, True], [True, False, True])
        >>> found.easy, found.new, found.of_baseline
        (1, 1, 1.0)
    """
    if not len(student) == len(teacher) == len(baseline):
        raise DataError(f"{len(student)}, {len(teacher)} and {len(baseline)} texts cannot be compared; give the same.")
    cells = {(t, b): 0 for t in (True, False) for b in (True, False)}
    for s, t, b in zip(student, teacher, baseline):
        if s:
            cells[bool(t), bool(b)] += 1
    return Inheritance(
        sum(map(bool, student)),
        sum(map(bool, teacher)),
        sum(map(bool, baseline)),
        easy=cells[True, True],
        inherited=cells[True, False],
        own=cells[False, True],
        new=cells[False, False],
    )


def predictors(
    teacher: CausalLM, baseline: CausalLM, places: Sequence[Excerpt], batch_size: int = 16
) -> dict[str, list[float]]:
    """What can be known of each excerpt before a student is distilled.

    Returns:
        ``zlib`` (bytes of the compressed suffix), ``teacher_nll`` and ``baseline_nll`` (nats per token) and
        ``forward_kl`` (KL(teacher || baseline), nats per token), a list each.

    Raises:
        ModelError: the tokenizers differ.
    """
    same_tokenizer(teacher, baseline, ("teacher", "baseline"))
    out = {"zlib": [float(len(zlib.compress(place.text.encode(), 9))) for place in places]}
    pairs = [(list(place.prefix), list(place.suffix)) for place in places]
    means = {
        name: torch.zeros(len(places), dtype=torch.float64) for name in ("teacher_nll", "baseline_nll", "forward_kl")
    }
    with torch.no_grad(), evaluating(teacher, baseline):
        for part in by_length(pairs, batch_size):
            rows = _padded(teacher, [pairs[i] for i in part])
            token = rows[0][:, 1:][rows[2]]
            there, here = _linear(teacher, *rows), _linear(baseline, *rows)
            vocab = teacher.vocab_size
            (first,) = functionals(there, [Want(SampledLogProb())], token=token, vocab=vocab)
            second, kl = functionals(
                here, [Want(SampledLogProb()), Want(ForwardKL(), 0)], [TargetRows((there,))], token=token, vocab=vocab
            )
            for mean, values in zip(means.values(), (-first, -second, kl), strict=True):
                mean[part] = row_means(values, rows[2])
    return {**out, **{name: mean.tolist() for name, mean in means.items()}}


def foretold(
    columns: Mapping[str, Sequence[float]], memorised: Sequence[bool], folds: int = 5
) -> tuple[float, Float[np.ndarray, " n"]]:
    """How well a logistic regression on some columns tells which texts are memorised.

    Args:
        columns: numbers for each text, as `predictors` gives them; each is standardised.
        memorised: what is to be told.
        folds: every text is judged by a regression that was fitted without its fold.

    Returns:
        The area under the ROC curve (0.5: no better than chance), and each text's probability.

    Raises:
        DataError: fewer texts of a kind than folds.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    y = np.asarray(memorised, dtype=int)
    rarest = min(int(y.sum()), len(y) - int(y.sum()))
    if rarest < folds:
        raise DataError(f"{rarest} texts of the rarer kind are too few for {folds} folds; give more texts.")
    x = np.stack([np.asarray(values, dtype=float) for values in columns.values()], axis=1)
    # Shuffled by a fixed seed: texts of a kind often stand together.
    cut = StratifiedKFold(folds, shuffle=True, random_state=0)
    regression = make_pipeline(StandardScaler(), LogisticRegression())
    both = np.asarray(cross_val_predict(regression, x, y, cv=cut, method="predict_proba"))
    return float(roc_auc_score(y, both[:, 1])), both[:, 1]
