"""Checkpoints: everything a run needs to go on as if it had never stopped.

Randomness is derived from (seed, purpose, step, row), so no generator is stored. A checkpoint is written aside,
flushed, renamed into place, and carries the hash of each of its files: one that is torn or altered is never loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from leibler.errors import RunError

MANIFEST = "manifest.json"
VERSION = 1


def save(
    folder: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write ``folder/step-N`` atomically; older checkpoints beyond ``keep`` are removed afterwards."""
    folder.mkdir(parents=True, exist_ok=True)
    final, aside = folder / f"step-{step:08d}", folder / f".writing-{step:08d}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for name, module in modules.items():
        save_model(module, str(aside / f"{name}.safetensors"))
    tensors, groups = _flatten(optimizer)
    save_file(tensors, str(aside / "optimizer.safetensors"))
    (aside / "state.json").write_text(json.dumps({**state, "step": step, "optimizer_groups": groups}, sort_keys=True))
    hashes = {p.name: _hash(p) for p in sorted(aside.iterdir())}
    (aside / MANIFEST).write_text(json.dumps({"version": VERSION, "step": step, "files": hashes}, indent=1))
    for path in aside.iterdir():
        _flush(path)
    _flush(aside)
    shutil.rmtree(final, ignore_errors=True)
    aside.rename(final)
    _flush(folder)
    for old in _found(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose files are whole, and a sentence about each newer one that is not."""
    complaints = []
    for path in reversed(_found(folder)):
        fault = _fault(path)
        if fault is None:
            return path, complaints
        complaints.append(f"the checkpoint {path} {fault} and was passed over")
    return None, complaints


def load(path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put a checkpoint's weights and optimizer state in place; returns the rest of the state."""
    state = json.loads((path / "state.json").read_text())
    for name, module in modules.items():
        file = path / f"{name}.safetensors"
        if not file.exists():
            raise RunError(f"the checkpoint {path} has no weights for {name!r}; resume with the recipe it was made by.")
        load_model(module, str(file))
    _unflatten(optimizer, load_file(str(path / "optimizer.safetensors")), state["optimizer_groups"])
    return state


def _flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    whole = optimizer.state_dict()
    tensors = {f"{i}.{k}": v.contiguous() for i, slots in whole["state"].items() for k, v in slots.items()}
    groups = [{k: list(v) if isinstance(v, tuple) else v for k, v in g.items()} for g in whole["param_groups"]]
    return tensors, groups


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], groups: list[Any]) -> None:
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        index, key = name.split(".", 1)
        slots.setdefault(int(index), {})[key] = tensor
    groups = [{k: tuple(v) if k == "betas" else v for k, v in g.items()} for g in groups]
    optimizer.load_state_dict({"state": slots, "param_groups": groups})


def _found(folder: Path) -> list[Path]:
    return sorted(p for p in folder.glob("step-*") if p.is_dir()) if folder.exists() else []


def _fault(path: Path) -> str | None:
    try:
        files = json.loads((path / MANIFEST).read_text())["files"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "has no readable manifest"
    for name, expected in files:
        file = path / name
        if not file.exists():
            return f"lacks {name}"
        if _hash(file) != expected:
            return f"has an altered {name}"
    return None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
