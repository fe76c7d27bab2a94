"""Reasoning without words: thoughts are laws over the vocabulary."""

from __future__ import annotations

from leibler.divergence import ForwardKL
from leibler.objective import Imitate, Match, Objective, SequenceMean, Soft
from leibler.policy.latent import CLOSE, OPEN
from leibler.train import Recipe
from leibler.train.latents import Latents


def latent_sft(answer: float = 1.0, latent: float = 1.0, open: str = OPEN, close: str = CLOSE) -> Recipe:
    """Latent Reasoning in LLMs as a Vocabulary-Space Superposition (2025), the second stage: a model learns to think in
    laws over its vocabulary, each read as the mean of its entries' embeddings, and to answer after them.

    ``answer * mean -log p(answer) + latent * mean_rows (1/m) sum_j KL(w_j || p_j)``, where ``p_j`` is the model's law
    at the position in front of thought j. The thoughts are in the data's column ``latents``, which the first stage
    writes: ``leibler represent latent``. Inputs are the thoughts given, so the model never sees its own while it
    learns; in use it reads them (`leibler.policy.latent.decode_latent`). The closing marker counts as part of the
    answer. The divergence is taken at the run's temperature; the released code's own temperature there is 1.

    Args:
        answer: coefficient of the answer's likelihood.
        latent: coefficient of the thoughts' divergence.
        open, close: markers around the thoughts, each one token of the student's.
    """
    return Recipe(
        Latents(open=open, close=close),
        Objective(
            Imitate(where="answer", coefficient=answer),
            Match(ForwardKL(), to=Soft("latents"), where="latent", coefficient=latent, reduce=SequenceMean()),
        ),
    )
