"""The files that a run writes line by line: metrics, timings, samples, validations, and what its guards report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from leibler import durable
from leibler.train.log import Lines

if TYPE_CHECKING:
    from leibler.objective.rows import View
    from leibler.train.options import Options

SAMPLES = 4
"""Responses written down of each stream, at the steps where samples are."""
TOLD = ("turns", "overflow")
"""Columns of episodes whose means are metrics, beside the reward."""


class Journal:
    """What a run writes while it goes on.

    Args:
        out: the run directory.
        options: the run's; ``sample_every`` is read.
        reduce: the sum of a tensor over all processes.
        main: True for the one process that writes.
    """

    def __init__(self, out: Path, options: Options, reduce: Callable[[Tensor], Tensor], main: bool) -> None:
        self.options, self.reduce, self.main = options, reduce, main
        names = ("metrics", "timings", "samples", "validation")
        self.metrics, self.timings, self.samples, self.validations = (Lines(out / f"{name}.jsonl") for name in names)
        self.warnings, self.aside = Lines(out / "warnings.jsonl"), Lines(out / "set_aside" / "responses.jsonl")
        self.files = (self.metrics, self.timings, self.samples, self.validations, self.warnings, self.aside)
        if main:
            for file in (self.metrics, self.timings, self.samples, self.validations):
                file.open()
            # A file whose name is not on the disk is lost with all its flushed lines.
            durable.flush(out)

    def step(
        self, step: int, measured: Mapping[str, float], batch: Mapping[str, View], seconds: float
    ) -> dict[str, float]:
        """Write one optimiser step down; returns its metrics, with the batch's rewards and lengths."""
        metrics = dict(measured)
        for stream, view in batch.items():
            suffix = f"/{stream}" if len(batch) > 1 else ""
            if "reward" in view.rows.columns:
                reward = self._mean(view.rows.columns["reward"])
                metrics["reward" + suffix] = reward
                metrics.setdefault("reward", reward)
            metrics["length" + suffix] = self._mean(view.rows.length.float())
            for name in TOLD:
                if name in view.rows.columns:
                    metrics[name + suffix] = self._mean(view.rows.columns[name])
        if self.main:
            self.metrics.write(step=step, **metrics)
            self.timings.write(step=step, seconds=seconds, tokens_per_second=speed(metrics, seconds))
            if self.options.sample_every and (step - 1) % self.options.sample_every == 0:
                self._samples(step, batch)
        return metrics

    def _samples(self, step: int, batch: Mapping[str, View]) -> None:
        for stream, view in batch.items():
            rows = view.rows
            for i in range(min(SAMPLES, len(rows.records))):
                extra = {"reward": float(rows.columns["reward"][i])} if "reward" in rows.columns else {}
                self.samples.write(
                    step=step, stream=stream, prompt=rows.records[i].prompt, completion=rows.texts[i], **extra
                )

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.main:
            self.validations.write(step=step, **metrics)

    def warning(self, **what: Any) -> None:
        """What a guard saw."""
        if self.main:
            self.warnings.write(**what)

    def set_aside(self, **what: Any) -> None:
        """A response that is not learnt from."""
        if self.main:
            self.aside.write(**what)

    def _mean(self, x: Tensor) -> float:
        pair = torch.stack([x.double().sum(), torch.tensor(float(x.numel()), dtype=torch.float64, device=x.device)])
        total, count = self.reduce(pair).tolist()
        return total / max(count, 1.0)

    def sync(self) -> dict[str, int]:
        """Flush to disk; each file's length in bytes."""
        return {file.path.name: file.sync() for file in self.files}

    def cut(self, lengths: Mapping[str, int], *, warnings: bool = True) -> list[str]:
        """Drop the lines of steps that are done again, and those of warnings too unless told otherwise.

        A file without a recorded length is emptied. Returns a sentence about each file that is too short.
        """
        if not self.main:
            return []
        cut = [f for f in self.files if warnings or f is not self.warnings]
        short = [f.path for f in cut if not f.cut(lengths.get(f.path.name, 0))]
        return [f"{path} lacks lines that were written before the checkpoint" for path in short]

    def close(self) -> None:
        for file in self.files:
            file.close()


def speed(metrics: Mapping[str, float], seconds: float) -> float:
    """Tokens per second."""
    return metrics["tokens"] / max(seconds, 1e-9)
