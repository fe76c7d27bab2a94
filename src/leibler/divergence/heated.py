"""A divergence of both laws at another temperature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from leibler.divergence.base import Divergence
from leibler.divergence.rows import Row
from leibler.errors import RecipeError


@dataclass(frozen=True, eq=False)
class Heated(Divergence):
    """``D(p^(1/T), q^(1/T))``, both powers normalised: logits divided by T, on top of any temperature of the run.

    The gradient falls as 1/T, and with the ratios on top as 1/T^2 for large T: multiply the coefficient by T^2 to keep
    it at the size of the labels' gradient. Source: G. Hinton et al., "Distilling the Knowledge in a Neural Network"
    (2015).

    Raises:
        RecipeError: the temperature is not positive.

    Examples:
        >>> import torch
        >>> from leibler.divergence import ForwardKL
        >>> model, target = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
        >>> Heated(ForwardKL(), 2.0)(model, target) == ForwardKL()(model / 2, target / 2)
        tensor(True)
    """

    divergence: Divergence
    temperature: float

    def __post_init__(self) -> None:
        if not 0 < self.temperature < 1e6:
            raise RecipeError(f"Heated(temperature={self.temperature}) must be positive, and below a million.")

    @property
    def ceiling(self) -> float:
        return self.divergence.ceiling

    def _value(self, model: Row, target: Row) -> tuple[Float[Tensor, " rows"], Any]:
        return self._at(model, target, None)

    def _at(self, model: Row, target: Row, token: Int[Tensor, " rows"] | None) -> tuple[Float[Tensor, " rows"], Any]:
        hot, wanted = (Row(row.logits / self.temperature) for row in (model, target))
        # Whoever drops what was kept of the pair drops it of these too.
        hot.pairs = model.pairs
        values, saved = self.divergence._at(hot, wanted, token)
        return values, (hot, wanted, saved)

    def _add_gradient(
        self, grad: Tensor, coefficient: Float[Tensor, "rows 1"], model: Row, target: Row, saved: Any
    ) -> None:
        hot, wanted, inner = saved
        self.divergence._add_gradient(grad, coefficient / self.temperature, hot, wanted, inner)

    def swapped(self) -> Divergence:
        return Heated(self.divergence.swapped(), self.temperature)
