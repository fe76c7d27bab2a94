"""Learning something new without forgetting: general texts are replayed, and hidden states kept where they were."""

from __future__ import annotations

from leibler.objective import Balance, Imitate, MatchHidden, Objective, Reference, Signal
from leibler.train import Data, Measured, Mixture, Recipe


def gere(
    general: str = "general",
    rows: int = 2,
    margin: Signal | float | None = 100.0,
    share: float = 0.5,
    sigmas: float = 1.0,
) -> Recipe:
    """Towards Efficient Anti-Forgetting in Continual Learning of LLM via General Samples Replay (2025): a few general
    texts stand beside each batch of the task, and there the last hidden states are kept in the bands that the initial
    model's were in.

    The published method stores the initial model's hidden states; here its trunk runs once more on the few general
    rows, which gives the same numbers.

    Args:
        general: the name of the data set of general texts.
        rows: of them in each optimiser batch.
        margin: coefficient of the activation margin loss; 0 replays only; None makes it as large as the likelihoods.
        share: coefficient of either likelihood.
        sigmas: half-width of the bands, in standard deviations of each unit over the general texts.
    """
    if margin is None:
        margin = Balance(("loss/nll@task", "loss/nll@general"), "loss/hidden(reference)")
    return Recipe(
        Mixture(task=Data("train"), general=Data(general, rows=rows)),
        Objective(
            Imitate(on="task", coefficient=share),
            Imitate(on="general", coefficient=share),
            MatchHidden(Reference(), on="general", coefficient=margin),
        ),
        models={"band": Measured(general, sigmas=sigmas)} if margin else {},
    )
