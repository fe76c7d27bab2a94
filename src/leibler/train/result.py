"""What a run leaves behind."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from leibler.train import setup
from leibler.train.log import last_line
from leibler.train.options import Options

if TYPE_CHECKING:
    from leibler.policy import CausalLM


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        out: its directory.
        policy: the trained model.
        metrics: the last step's.
        validation: the last validation's, if there was one.
    """

    out: Path
    policy: CausalLM
    metrics: Mapping[str, float]
    validation: Mapping[str, float]


def finished(out: Path, options: Options, quiet: bool) -> Run:
    """A run that ended and left no checkpoint: there is nothing to go on with, and nothing is overwritten."""
    if not quiet:
        print(f"the run in {out} is finished; its model is in {out / 'final'}", file=sys.stderr, flush=True)
    policy = setup.load_model(out / "final", replace(options, adapter_rank=None), trained=False, key="final")
    return Run(out, policy, last_line(out / "metrics.jsonl"), last_line(out / "validation.jsonl"))
