"""Optimal transport between the rows of a batch and those of its target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.errors import RecipeError
from leibler.objective.coupled import Coupled
from leibler.objective.rows import Rows
from leibler.objective.targets import Target


@dataclass(frozen=True)
class Sinkhorn:
    """Entropic transport of equal masses: the plan of a fixed number of Sinkhorn iterations, in log space.

    From ``K = exp(-C / eps)`` rows and columns are scaled in turn to sum to ``1 / n``, columns last. Small eps tends
    to the cheapest assignment (and takes more iterations), large eps to the mean cost; gradients go through the
    iterations, so their number is part of the loss. Computed by POT (``pip install leibler[transport]``). Source:
    M. Cuturi, "Sinkhorn Distances: Lightspeed Computation of Optimal Transport" (2013).

    Args:
        eps: the weight of the entropy, in units of the cost.
        iterations: how many.

    Raises:
        RecipeError: eps is not positive, no iteration, or POT is not installed.

    Examples:
        >>> import torch
        >>> cost = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        >>> Sinkhorn(eps=0.5)(cost).round(decimals=3)
        tensor([[0.4400, 0.0600],
                [0.0600, 0.4400]])
    """

    eps: float = 0.1
    iterations: int = 20

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise RecipeError(f"Sinkhorn(eps={self.eps}) must have a positive eps.")
        if self.iterations < 1:
            raise RecipeError(f"Sinkhorn(iterations={self.iterations}) must make at least one iteration.")

    def __call__(self, cost: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
        """The plan, of mass 1."""
        sinkhorn = _sinkhorn()
        if not len(cost):
            return cost
        mass = cost.new_full((len(cost),), 1 / len(cost))
        # POT's iterations end with the first marginal; a threshold of 0 is never reached, so all of them are made.
        return sinkhorn(mass, mass, cost.T, self.eps, numItermax=self.iterations, stopThr=0.0, warn=False).T


@dataclass(frozen=True)
class Transport(Coupled):
    """The cost of carrying the batch of the model's rows to the batch of the target's: ``<plan, C>``.

    ``C_ij = sum_v |p_iv - q_jv|`` (twice the total variation) for n chosen events i, j of the optimiser batch, and a
    plan of mass 1. Blind to which row is whose: any permutation of the model's rows costs the same, so it stands beside
    a loss of each row, never alone. Not 0 at ``p = q`` (the entropy spreads the plan) unless ``debiased``:
    ``S(p, q) - S(p, p) / 2 - S(q, q) / 2``. With one site it is twice the total variation. Where no two rows share
    support, every cost is 2 and nothing pulls. The cost matrix takes ``n^2 vocab`` operations; each process transports
    among its own rows. Source: "Sinkhorn Distance Minimization for Knowledge Distillation" (2024), whose plan has mass
    n, not 1.

    Args:
        plan: how the plan is found.
        to: the target.
        debiased: subtract half the cost within each batch.

    Examples:
        >>> import torch
        >>> from leibler.objective import Sinkhorn, Teacher, Transport
        >>> p, q = torch.tensor([[[0.5, 0.5]]]).log(), torch.tensor([[[0.1, 0.9]]]).log()
        >>> Transport(Sinkhorn(), Teacher()).value(p, q)
        tensor([0.8000])
    """

    plan: Sinkhorn
    to: Target
    debiased: bool = False

    @property
    def name(self) -> str:
        return "transport"

    @property
    def law(self) -> Target:
        return self.to

    def units(self, rows: Rows) -> Int[Tensor, "units size"]:
        return self._events(rows)[:, None]

    def value(
        self, logp: Float[Tensor, "units size vocab"], logq: Float[Tensor, "units size vocab"]
    ) -> Float[Tensor, " units"]:
        """Each row's share, times n: their mean is the loss."""
        p, q = logp[:, 0].exp(), logq[:, 0].exp()
        cost = self._cost(p, q)
        return cost - (self._cost(p, p) + self._cost(q, q)) / 2 if self.debiased else cost

    def _cost(self, p: Float[Tensor, "n vocab"], q: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
        cost = torch.cdist(p, q, p=1.0)
        return (self.plan(cost) * cost).sum(dim=1) * len(cost)

    def check(self) -> None:
        _sinkhorn()


def _sinkhorn() -> Callable[..., Tensor]:
    """POT's iterations; imported when they are first wanted, because that takes a second."""
    try:
        from ot.bregman import sinkhorn_log
    except ImportError as error:
        raise RecipeError("Sinkhorn needs POT, which is not installed: pip install leibler[transport].") from error
    return cast(Any, sinkhorn_log)
