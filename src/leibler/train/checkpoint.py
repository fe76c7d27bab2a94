"""Checkpoints: everything a run needs to go on as if it had never stopped.

Randomness is derived from (seed, purpose, step, row), so no generator is stored. A checkpoint is written aside,
flushed, renamed into place, and carries the hash of each of its files: one that is torn or altered is never loaded.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from leibler import durable
from leibler.errors import RunError
from leibler.train import sharding

MANIFEST = "manifest.json"
VERSION = 3
TENSOR = "tensor:"
"""Where a state holds a tensor, its JSON holds this and the tensor's name in ``state.safetensors``."""


def save(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int = 2,
    main: bool = True,
) -> Path:
    """Write ``folder/step-N`` atomically.

    Afterwards older checkpoints beyond ``keep`` are removed, and so are newer ones: a run that went back to step N
    does those steps again, and what it passed over must not push out what is whole.

    Args:
        folder: ``checkpoints`` in the run directory.
        step: optimiser steps done.
        modules: weights by name.
        optimizer: its state goes along.
        state: JSON values and tensors, nested as it pleases.
        keep: how many stay.
        main: False in all but the first of several processes. Each must call, since sharded weights are gathered from
            all; one writes, and what it writes does not show how many they were.
    """
    path = named(folder, step)
    weights = {name: sharding.weights(module, keep=main) for name, module in modules.items()}
    tensors = _flatten(optimizer, keep=main)
    if not main:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    durable.sweep(folder)
    durable.flush(folder.parent)
    with durable.folder(path) as aside:
        for name, whole in weights.items():
            save_file(whole, str(aside / f"{name}.safetensors"))
        save_file(tensors, str(aside / "optimizer.safetensors"))
        held: dict[str, torch.Tensor] = {}
        plain = _without_tensors({**state, "step": step}, held, "")
        save_file(held, str(aside / "state.safetensors"))
        (aside / "state.json").write_text(json.dumps(plain, sort_keys=True))
        hashes = {p.name: _hash(p) for p in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps({"version": VERSION, "step": step, "files": hashes}, indent=1))
    tidy(folder, step, keep)
    return path


def tidy(folder: Path, step: int, keep: int) -> None:
    """Remove what killed saves left, all but the newest ``keep`` checkpoints up to a step, and those of later steps."""
    durable.sweep(folder)
    found = _found(folder)
    older = [p for p in found if p.name <= named(folder, step).name]
    for other in (*older[:-keep], *found[len(older) :]):
        durable.remove(other)


def named(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return folder / f"step-{step:08d}"


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are whole, and a sentence about each newer one that is not.

    Raises:
        RunError: for a whole checkpoint that another version of this package wrote.
    """
    complaints = []
    for path in reversed(_found(folder)):
        fault = _fault(path)
        if fault is None:
            return path, complaints
        complaints.append(f"the checkpoint {path} {fault} and was passed over")
    return None, complaints


def load(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's weights and optimizer state in place; returns the rest of the state.

    The optimizer's settings stay: a run that goes on with others goes on with those.
    """
    plain = json.loads((path / "state.json").read_text())
    state = _with_tensors(plain, load_file(str(path / "state.safetensors")))
    for name, module in modules.items():
        file = path / f"{name}.safetensors"
        if not file.exists():
            raise RunError(f"the checkpoint {path} has no weights for {name!r}; resume with the recipe it was made by.")
        missing = sharding.put_weights(module, load_file(str(file)))
        if missing:
            raise RunError(
                f"the checkpoint {path} does not fit {name!r} (it lacks {missing[0]} in its shape); resume with the "
                "models it was made by."
            )
    _unflatten(optimizer, load_file(str(path / "optimizer.safetensors")))
    return state


def _without_tensors(value: Any, held: dict[str, torch.Tensor], name: str) -> Any:
    """The value with each tensor replaced by its name; the tensors are put into ``held``."""
    if isinstance(value, torch.Tensor):
        held[name] = value.detach().cpu().clone()  # two names of one tensor cannot be written
        return TENSOR + name
    if isinstance(value, Mapping):
        if not all(isinstance(k, str) for k in value):
            raise RunError(f"the state {name or 'of the run'} has keys that are not text; JSON would change them.")
        return {k: _without_tensors(v, held, f"{name}/{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_tensors(v, held, f"{name}/{i}") for i, v in enumerate(value)]
    return value


def _with_tensors(value: Any, held: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, str) and value.startswith(TENSOR):
        # Text that looks like the name of a tensor, but is none, was text.
        return held.get(value[len(TENSOR) :], value)
    if isinstance(value, dict):
        return {k: _with_tensors(v, held) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_tensors(v, held) for v in value]
    return value


def _flatten(optimizer: torch.optim.Optimizer, *, keep: bool = True) -> dict[str, torch.Tensor]:
    """What the optimizer holds of each parameter, whole; every process must call, and one may not ``keep`` it."""
    tensors = {}
    for index, slots in optimizer.state_dict()["state"].items():
        for key, value in slots.items():
            whole = sharding.full(value)
            if keep:
                tensors[f"{index}.{key}"] = whole.cpu().contiguous()
    return tensors


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor]) -> None:
    slots: dict[int, dict[str, torch.Tensor]] = {}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        parameter = parameters[int(index)]
        if sharding.is_share(parameter) and tensor.shape == parameter.shape:
            slot = torch.zeros_like(parameter, requires_grad=False)
            sharding.put(tensor, slot)
            tensor = slot
        slots.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": slots, "param_groups": optimizer.state_dict()["param_groups"]})


def _found(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.exists() else []


def _fault(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, version = dict(manifest["files"]), int(manifest["version"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "has no readable manifest"
    if version != VERSION:
        raise RunError(
            f"the checkpoint {path} has the format {version}, and this version of leibler reads {VERSION}; go on with "
            "the version that run.yaml names, or begin the run again in another directory."
        )
    if not {"state.json", "state.safetensors", "optimizer.safetensors"} <= files.keys():
        return "has a manifest that names too few files"
    for name, expected in files.items():
        file = path / name
        if Path(name).name != name or not file.is_file():
            return f"lacks {name}"
        if _hash(file) != expected:
            return f"has an altered {name}"
    return None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
