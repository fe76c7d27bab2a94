"""``leibler select``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leibler.cli.output import Working

if TYPE_CHECKING:
    from leibler.data import Dataset
    from leibler.data.selection import Selection


def difference_command(data: str, teacher: str, reference: str, share: float, out: Path, limit: int | None) -> None:
    """Keep the texts with the largest difference of log-likelihoods."""
    _free(out)
    from leibler.measure.selecting import miniplm
    from leibler.policy import CausalLM

    records = _load(data, ("prompt", "completion"), limit)
    with Working("score") as progress:
        found = miniplm(records, CausalLM.load(teacher), CausalLM.load(reference), share, progress=progress)
    _write(found, out)


def confident_command(data: str, teacher: str, student: str, out: Path, limit: int | None) -> None:
    """Keep what the teacher is sure of and the student is not."""
    _free(out)
    from leibler.measure.selecting import llkd
    from leibler.policy import CausalLM

    records = _load(data, ("prompt", "completion"), limit)
    with Working("score") as progress:
        found = llkd(records, CausalLM.load(teacher), CausalLM.load(student), progress=progress)
    _write(found, out)


def pass_rate_command(
    data: str,
    model: str,
    samples: int,
    least: float,
    most: float,
    out: Path,
    limit: int | None,
    sampling: dict[str, Any],
) -> None:
    """Add the column ``pass_rate``, and keep the records inside a range of it."""
    _free(out)
    from leibler.data.selection import Between, select
    from leibler.measure.scores import pass_rates
    from leibler.policy import CausalLM

    records = _load(data, ("prompt",), limit)
    with Working("sample") as progress:
        rates = pass_rates(CausalLM.load(model), records, samples, progress=progress, **sampling)
    _write(select(records, {"pass_rate": rates}, Between("pass_rate", least, most)), out)


def _free(out: Path) -> None:
    """Refuse before the models are loaded, not after an hour of scoring."""
    from leibler.data.selection import free

    free(out)


def _load(data: str, needs: tuple[str, ...], limit: int | None) -> Dataset:
    from leibler.data import load

    found = load(data, needs=needs, limit=limit)
    if found.set_aside_count:
        print(found.set_aside_report(), file=sys.stderr)
    return found


def _write(found: Selection, out: Path) -> None:
    reasons = found.write(out)
    print(f"{found.summary()}\n{out}: the kept records\n{reasons}: why each was kept or left out")
