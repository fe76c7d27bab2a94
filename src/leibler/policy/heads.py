"""Small heads on a policy's hidden states."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class ValueHead(nn.Module):
    """One number per position from the hidden state there: the value function of an actor-critic method.

    It starts at 0 everywhere, so an untrained critic neither helps nor hurts the advantages.

    Args:
        hidden_size: the policy's ``hidden_size``.
        outputs: how many values per position (the last dimension is dropped when it is 1).

    Examples:
        >>> import torch
        >>> ValueHead(8)(torch.ones(2, 3, 8))
        tensor([[0., 0., 0.],
                [0., 0., 0.]], grad_fn=<SqueezeBackward1>)
    """

    def __init__(self, hidden_size: int, outputs: int = 1) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, outputs)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Float[Tensor, "*batch hidden"]) -> Float[Tensor, "*batch_outputs"]:
        values = self.linear(hidden.to(self.linear.weight.dtype))
        return values.squeeze(-1) if values.shape[-1] == 1 else values
