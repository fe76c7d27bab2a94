"""Weights cut into shares, one for each process (FSDP2), and put together again where the whole is needed.

A sharded model's parameters are distributed tensors. Each layer is gathered while it runs; what stands outside the
layers (embedding, final norm, output head) is one unit that stays gathered from the forward pass to the end of the
backward pass, so that losses over the vocabulary read the whole head once per pass and its gradient flows back through
autograd like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leibler.errors import RunError

if TYPE_CHECKING:
    from leibler.policy import CausalLM


@dataclass(frozen=True)
class Sharding:
    """How models are cut.

    Attributes:
        layers: names of the classes that are gathered one at a time; by default those that Transformers names.
        reshard_after_forward: free a layer after its forward pass and gather it again for the backward pass (less
            memory); otherwise keep it.
        recompute: recompute activations in the backward pass.
    """

    layers: tuple[str, ...] = ()
    reshard_after_forward: bool = True
    recompute: bool = False

    def shard(self, model: CausalLM, device: torch.device) -> None:
        """Cut a model in place; it must have been whole, and the same, in every process.

        Raises:
            RunError: no layer is of a class in ``layers``.
        """
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        if self.recompute and any(p.requires_grad for p in model.parameters()):
            model.checkpoint_gradients()
        kind = type(model.pretrained).__name__
        names = set(self.layers or getattr(model.pretrained, "_no_split_modules", None) or ())
        layers = [m for m in model.modules() if type(m).__name__ in names]
        if self.layers and not layers:
            raise RunError(
                f"fsdp_transformer_layer_cls_to_wrap names {', '.join(self.layers)}, but {kind} "
                "has no such layer; leave it out to take the model's own."
            )
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for layer in layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        # The first call fixes which module is the root; samplers would call the base model first.
        one = torch.ones(1, 1, dtype=torch.long, device=device)
        with torch.no_grad():
            model(one, one.bool())
        reshard(model)

    @contextmanager
    def whole(self, *models: nn.Module) -> Iterator[None]:
        """Inside the block every process has all of the weights, so each may call the models as often as it likes."""
        roots = [m for m in models if _is_sharded(m)]
        for root in roots:
            for unit in _units(root):
                unit.unshard()
                unit.set_reshard_after_forward(False, recurse=False)
        try:
            yield
        finally:
            reshard(*roots)
            for root in roots:
                for unit in _units(root):
                    unit.set_reshard_after_forward(unit is not root and self.reshard_after_forward, recurse=False)


def reshard(*models: nn.Module) -> None:
    """Leave only shares: after a pass without gradient the parameters outside the layers are still whole."""
    for model in models:
        for unit in _units(model):
            unit.reshard()


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _units(root: nn.Module) -> list[Any]:
    return [m for m in root.modules() if _is_sharded(m)]


def is_share(tensor: Tensor) -> bool:
    """True if this process holds only its share of the tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def full(tensor: Tensor) -> Tensor:
    """The whole tensor. Every process must ask for the same one."""
    return tensor.full_tensor() if is_share(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor; the tensor itself where it is whole."""
    return tensor.to_local() if is_share(tensor) else tensor  # type: ignore[attr-defined]


def put(whole: Tensor, into: Tensor) -> None:
    """Copy a whole tensor into another, or this process's rows of it into its share."""
    with torch.no_grad():
        if not is_share(into):
            into.copy_(whole)
            return
        mine: Tensor = into.to_local()  # type: ignore[attr-defined]
        mesh = into.device_mesh  # type: ignore[attr-defined]
        rows = -(-whole.shape[0] // mesh.size())
        start = min(mesh.get_local_rank() * rows, whole.shape[0])
        mine.copy_(whole[start : start + mine.shape[0]])


def blank(model: CausalLM) -> CausalLM:
    """The model without its parameters: to be filled with those of its sharded self, which cannot be copied."""
    memo: dict[int, Any] = {id(model.tokenizer): model.tokenizer}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
    return copy.deepcopy(model, memo)


def fill(empty: CausalLM, model: CausalLM) -> CausalLM:
    """An ordinary model on the CPU with the weights of a sharded one, in the first process; its share in the others.

    Every process must call it.
    """
    import torch.distributed as dist

    here = dist.get_rank() == 0
    found = weights(model, keep=here)
    if not here:
        return model
    groups = [names for names, _ in _tensors(model)]
    empty.load_state_dict({name: found[names[0]] for names in groups for name in names}, assign=True)
    for first, *others in groups:
        for other in others:  # tied: one parameter again
            owner, _, leaf = other.rpartition(".")
            setattr(empty.get_submodule(owner), leaf, empty.get_parameter(first))
    return empty


def weights(module: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """A module's tensors by name, whole and on the CPU; tied ones once.

    Every process must call it. Where ``keep`` is False it only takes part, and gets nothing.
    """
    out = {}
    for names, tensor in _tensors(module):
        value = full(tensor.detach())
        if keep:
            out[names[0]] = value.cpu().contiguous()
    return out


def put_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> list[str]:
    """Copy whole tensors into a module, sharded or not; returns the names of those that were not given."""
    missing = []
    for names, tensor in _tensors(module):
        name = next((n for n in names if n in tensors), None)
        if name is None or tensors[name].shape != tensor.shape:
            missing.append(names[0])
        else:
            put(tensors[name], tensor)
    return missing


def _tensors(module: nn.Module) -> list[tuple[list[str], Tensor]]:
    """Each tensor of a module once, with all the names that it goes by."""
    by_id: dict[int, tuple[list[str], Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        by_id.setdefault(id(tensor), ([], tensor))[0].append(name)
    return list(by_id.values())
