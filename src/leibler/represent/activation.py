"""Bands of activations: what a model's hidden states were, up to how far a unit may move."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from leibler.errors import DataError


def margin_violation(
    hidden: Float[Tensor, "events hidden"],
    stored: Float[Tensor, "events hidden"],
    low: Float[Tensor, " hidden"],
    high: Float[Tensor, " hidden"],
) -> Float[Tensor, "events hidden"]:
    """How far each activation has left the class that it was of: above the band, below it, or in between.

    ``relu(high - h)`` where it was at least ``high``, ``relu(h - low)`` where it was at most ``low``, and
    ``relu(h - high) + relu(low - h)`` elsewhere: 0 for ``hidden = stored``. Differentiable in ``hidden``. Source:
    Towards Efficient Anti-Forgetting in Continual Learning of LLM via General Samples Replay (2025).

    Examples:
        >>> low, high = torch.tensor([-1.0]), torch.tensor([1.0])
        >>> margin_violation(torch.tensor([[0.5], [0.5], [1.5]]), torch.tensor([[2.0], [-2.0], [0.0]]), low, high)
        tensor([[0.5000],
                [1.5000],
                [0.5000]])
    """
    above, below = stored >= high, stored <= low
    outside = (hidden - high).relu() + (low - hidden).relu()
    return torch.where(above, (high - hidden).relu(), torch.where(below, (hidden - low).relu(), outside))


class ActivationBand(nn.Module):
    """``mean - sigmas * std`` to ``mean + sigmas * std`` of each unit of the last hidden states.

    Called with a model's hidden states and those that it once had, both ``[events, hidden]``, it gives ``[2, events]``:
    the mean violation of an event's units (see `margin_violation`) and the share of them that violate. It has no
    trained parameters.

    Examples:
        >>> band = ActivationBand(torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0]))
        >>> band(torch.tensor([[0.0, 3.0]]), torch.tensor([[2.0, 0.0]]))
        tensor([[1.5000],
                [1.0000]])
    """

    low: Tensor
    high: Tensor

    def __init__(self, low: Float[Tensor, " hidden"], high: Float[Tensor, " hidden"]) -> None:
        super().__init__()
        self.register_buffer("low", low)
        self.register_buffer("high", high)

    @classmethod
    def of(cls, batches: Iterable[Float[Tensor, "events hidden"]], sigmas: float = 1.0) -> ActivationBand:
        """The band of all events of some batches.

        Means and squared deviations are merged batch by batch in double precision: the mean of squares less the square
        of the mean would cancel where a unit hardly varies.

        Raises:
            DataError: there is no event.
        """
        count, mean, squares = 0, torch.zeros(()), torch.zeros(())
        for batch in batches:
            part = batch.detach().double()
            if not len(part):
                continue
            here = part.mean(0)
            step = here - mean if count else here
            both = count + len(part)
            squares = squares + ((part - here) ** 2).sum(0) + (step**2 * (count * len(part) / both) if count else 0.0)
            mean = mean + step * (len(part) / both) if count else here
            count = both
        if not count:
            raise DataError("a band of activations needs at least one token of text; the data has none.")
        reach = sigmas * (squares / count).sqrt()
        return cls((mean - reach).float(), (mean + reach).float())

    def forward(
        self, hidden: Float[Tensor, "events hidden"], stored: Float[Tensor, "events hidden"]
    ) -> Float[Tensor, "2 events"]:
        low, high = self.low.to(hidden), self.high.to(hidden)
        violation = margin_violation(hidden, stored.to(hidden), low, high)
        return torch.stack([violation.mean(-1), (violation > 0).to(hidden.dtype).mean(-1)])
