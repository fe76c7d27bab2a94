"""Low-rank adapters on the output head: as products of their own, never merged into the head's weight."""

from __future__ import annotations

from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn

from leibler.errors import ModelError
from leibler.fused import LowRank


def has_low_rank(head: nn.Module) -> bool:
    """Whether PEFT put a low-rank adapter on this layer."""
    return isinstance(getattr(head, "lora_A", None), nn.ModuleDict)


def low_rank(head: nn.Module, hidden: Float[Tensor, "*batch hidden"]) -> tuple[LowRank, ...]:
    """What the active adapters of a PEFT layer add to its output, for hidden states that are flat over tokens.

    Empty for a plain layer, and while its adapters are switched off or merged.

    Raises:
        ModelError: an adapter of another kind than ``W + s B A``.

    Examples:
        >>> import torch
        >>> low_rank(torch.nn.Linear(4, 10), torch.zeros(3, 4))
        ()
    """
    layer = cast(Any, head)
    if not has_low_rank(head) or layer.disable_adapters or layer.merged:
        return ()
    pairs = []
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in getattr(layer, "lora_variant", {}) or layer.lora_B[name].bias is not None:
            raise ModelError(
                f"The adapter {name!r} on the output head is not plain LoRA (a variant, or one with a bias): "
                "merge it into the checkpoint first."
            )
        down, up = layer.lora_A[name], layer.lora_B[name]
        inner = down(layer.lora_dropout[name](hidden.to(down.weight.dtype)))
        pairs.append(LowRank(inner * layer.scaling[name], up.weight))
    return tuple(pairs)


def adapts_tied_head(causal: nn.Module) -> bool:
    """Whether the head carries a low-rank adapter and shares its weight with the embedding."""
    model = cast(Any, causal)
    head = model.get_output_embeddings()
    return has_low_rank(head) and head.weight is model.get_input_embeddings().weight


def untie(causal: nn.Module) -> None:
    """Give an adapted head that shares its weight with the embedding a weight of its own, to be merged into."""
    model = cast(Any, causal)
    if adapts_tied_head(causal):
        head = model.get_output_embeddings()
        head.base_layer.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config(decoder=True)):
            config.tie_word_embeddings = False
