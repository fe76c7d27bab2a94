"""Published ways to choose the data that a student learns from, by what models make of it."""

from __future__ import annotations

from collections.abc import Mapping

from leibler.data.records import Dataset
from leibler.data.selection import (
    Columns,
    Difference,
    Rule,
    Scorer,
    Selection,
    SureAndUnsure,
    TopShare,
    select,
    sure_and_unsure,
)
from leibler.measure.scores import read
from leibler.policy import CausalLM
from leibler.policy.reading import Progress, part


def miniplm(
    dataset: Dataset,
    teacher: CausalLM,
    reference: CausalLM,
    share: float = 0.5,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Selection:
    """Difference sampling: keep the texts that the teacher reads best, *compared with a small reference model*.

    The score is ``(log q(x) - log p_ref(x)) / tokens``. Easy text (both read it well) and noise (neither does) score
    near 0; what is hard and can be learnt scores high. Ranking by the teacher alone keeps the easy text. The
    tokenizers of the two may differ, each text's mean is over its own model's tokens; the student's plays no part.
    Train on what is kept by plain likelihood. Source: MiniPLM: Knowledge Distillation for Pre-Training Language
    Models (2024).

    Args:
        dataset: texts (in ``completion``).
        teacher, reference: models; the reference must not have been trained on these texts.
        share: of the texts to keep. The published value could not be checked.
        batch_size: texts read at a time; changes nothing but memory and rounding.
        progress: is told how far it is.

    Examples:
        >>> from leibler.data import Record
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> tokenizer = character_tokenizer("ab")
        >>> models = [tiny_llama(tokenizer, hidden=16, layers=1, heads=2, seed=s) for s in (0, 1)]
        >>> texts = Dataset(tuple(Record("", completion=t) for t in ("aa", "bb", "ab", "ba")), "texts")
        >>> len(miniplm(texts, *models).kept)
        2
    """
    models = {"teacher": teacher, "reference": reference}
    return _select(dataset, Difference(), TopShare("difference", share), models, batch_size, progress)


def llkd(
    dataset: Dataset,
    teacher: CausalLM,
    student: CausalLM,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Selection:
    """Keep what the teacher is sure of and the student is not: labels that are right, and not yet known.

    Confidence is the geometric mean of the teacher's probabilities of its own label (the completion); uncertainty the
    student's mean entropy over the uniform law's. Both must reach their mean over the data. By the student's
    uncertainty alone, wrong labels would be chosen; by the teacher's confidence alone, what is known already. The
    threshold is an assumption (the paper gives no rule that could be checked), and the choice is made once, with the
    student as it is. Source: Learning with Less: Knowledge Distillation from Large Language Models via Unlabeled
    Data (2024).

    Args:
        dataset: prompts with the teacher's labels (in ``completion``).
        teacher, student: the models.
        batch_size: texts read at a time; changes nothing but memory and rounding.
        progress: is told how far it is.

    Examples:
        >>> from leibler.data import Record
        >>> from leibler.policy import character_tokenizer, tiny_llama
        >>> tokenizer = character_tokenizer("ab")
        >>> models = [tiny_llama(tokenizer, hidden=16, layers=1, heads=2, seed=s) for s in (0, 5)]
        >>> labelled = Dataset(tuple(Record(p, completion="a") for p in ("aa", "bb", "ab", "ba")), "labelled")
        >>> 1 <= len(llkd(labelled, *models).kept) <= 3
        True
    """
    models = {"teacher": teacher, "policy": student}
    return _select(dataset, SureAndUnsure(), sure_and_unsure(), models, batch_size, progress)


def _select(
    dataset: Dataset,
    by: Scorer,
    rule: Rule,
    models: Mapping[str, CausalLM],
    batch_size: int,
    progress: Progress | None,
) -> Selection:
    def scored(name: str) -> Columns:
        return read(models[name], dataset.records, batch_size, progress=part(progress, by.models, name))

    return select(dataset, by(scored), rule)
