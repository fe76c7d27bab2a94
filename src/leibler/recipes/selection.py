"""Methods that choose what is learnt from: whole texts before the run, or rows of each batch."""

from __future__ import annotations

from leibler.data.selection import Difference, SureAndUnsure, TopShare, sure_and_unsure
from leibler.objective import Imitate, Objective
from leibler.train import Data, Filtered, Recipe, Selected


def miniplm(share: float = 0.5) -> Recipe:
    """MiniPLM: Knowledge Distillation for Pre-Training Language Models (2024): likelihood of the texts that the teacher
    reads best, compared with a small model.

    All texts are scored once at the beginning; `leibler select difference` does so alone and writes down why. The
    models may have other tokenizers than the student (``align=text``), and are not needed after the choice.

    Args:
        share: of the texts to keep. The published value could not be checked.
    """
    chosen = Selected(Data(), Difference("teacher", "reference_small"), TopShare("difference", share))
    return Recipe(chosen, Objective(Imitate()))


def llkd(confidence: float | None = None, uncertainty: float | None = None) -> Recipe:
    """Learning with Less: Knowledge Distillation from Large Language Models via Unlabeled Data (2024): learn, of each
    batch, the labels that the teacher is sure of and the student, as it is then, is not.

    Labels are the completions. Reconstructed from the abstract: the rule of the thresholds is an assumption.

    Args:
        confidence: the least geometric mean of the teacher's probabilities of a label; None: the batch's mean.
        uncertainty: the least mean entropy of the student, over that of the uniform law; None: the batch's mean. Both
            0: plain pseudo-labelling.
    """
    chosen = Filtered(Data(), SureAndUnsure(), sure_and_unsure(confidence, uncertainty))
    return Recipe(chosen, Objective(Imitate()))
