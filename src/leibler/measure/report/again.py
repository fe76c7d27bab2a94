"""What the run was and how to run it again: samples, recipe, commands, rows set aside, speed."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping
from typing import Any

from leibler.cache import PREFIX
from leibler.measure.report import figures
from leibler.measure.report.collect import Recorded, as_number, mapping
from leibler.measure.report.measured import IN_MEMORY
from leibler.measure.report.words import duration, number, plural

SHOWN = 4
"""Samples shown of each of the chosen steps."""
MOST_TEXT = 500
"""Characters of a sample that are shown."""


def samples(recorded: Recorded) -> list[dict[str, Any]]:
    """Samples of the first, a middle and the last step at which some were written down."""
    steps = sorted({row["step"] for row in recorded.samples})
    if not steps:
        return []
    chosen = list(dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]]))
    out = []
    for step in chosen:
        here = [row for row in recorded.samples if row["step"] == step]
        rows = []
        for row in here[:SHOWN]:
            reward = as_number(row.get("reward"))
            rows.append(
                {
                    "prompt": _cut(row.get("prompt"), keep_end=True),
                    "completion": _cut(row.get("completion")),
                    "reward": "" if reward is None else f"{reward:.3g}".replace("-", "−"),
                    "right": reward is not None and reward > 0,
                    "stream": str(row.get("stream", "")) if len({str(r.get("stream")) for r in here}) > 1 else "",
                }
            )
        out.append({"step": f"{step:,}", "rows": rows})
    return out


def _cut(text: Any, keep_end: bool = False) -> str:
    text = "" if text is None else str(text)
    if len(text) <= MOST_TEXT:
        return text
    more = f"[{len(text) - MOST_TEXT:,} more characters]"
    return f"{more} {text[-MOST_TEXT:]}" if keep_end else f"{text[:MOST_TEXT]} {more}"


def recipe_section(recorded: Recorded) -> dict[str, Any]:
    """The recipe in words, what it was given, and the options, those that were changed apart."""
    run = recorded.run
    what = [(key, run[key]) for key in ("student", "teacher", "data", "validation") if run.get(key)]
    flat: list[tuple[str, str]] = []
    for key, value in [*what, *((f"models.{k}", v) for k, v in mapping(run.get("models")).items())]:
        if isinstance(value, Mapping):
            flat += [(f"{key}.{k}", str(v)) for k, v in value.items()]
        else:
            flat.append((key, str(value)))
    flat += [(str(k), str(v)) for k, v in mapping(run.get("overrides")).items()]
    changed = _changed(recorded)
    names = {name for name, _ in changed}
    others = [(str(k), _plain(v)) for k, v in recorded.options.items() if k not in names]
    return {
        "description": str(run.get("description", "")),
        "inputs": flat,
        "changed": [(k, _plain(v)) for k, v in changed],
        "others": others,
    }


def commands(recorded: Recorded) -> dict[str, Any]:
    """How the run was started, how to repeat it and how to go on with it."""
    run, folder = recorded.run, recorded.path.resolve()
    given = [run.get("student"), run.get("teacher"), run.get("validation"), run.get("data")]
    given = [*given, *mapping(run.get("models")).values(), *mapping(run.get("data")).values()]
    in_memory = run.get("recipe") == "custom" or any(isinstance(v, str) and v.endswith(IN_MEMORY) for v in given)
    finished = recorded.final is not None
    if in_memory:
        again = f"{folder}-repeat"
        return {
            "relative": False,
            "original": "",
            "repeat": _call(recorded, again, False),
            "resume": "" if finished else _call(recorded, str(folder), True),
            "python": True,
        }
    quoted = shlex.quote(str(folder))
    given = [v for v in given if isinstance(v, str) and not v.startswith(("task:", "corpus:", PREFIX))]
    return {
        "relative": any(v.startswith(".") or (v.count("/") > 1 and not v.startswith(("/", "~"))) for v in given),
        "original": str(run.get("command") or ""),
        "repeat": f"leibler train {shlex.quote(str(folder / 'run.yaml'))} out={shlex.quote(f'{folder}-repeat')}",
        "resume": "" if finished else f"leibler train --resume {quoted}",
        "python": False,
    }


def _call(recorded: Recorded, out: str, resume: bool) -> str:
    """The Python call that repeats a run of things that only Python can give; those are left for the reader."""
    run = recorded.run
    recipe = run.get("recipe")

    def shown(value: Any) -> str:
        return "..." if not isinstance(value, str) or value.endswith(IN_MEMORY) else repr(value)

    lines = ["..." if recipe == "custom" else repr(recipe)]
    inputs = ("student", "teacher", "models", "data", "validation")
    lines += [f"{key}={shown(run[key])}" for key in inputs if run.get(key)]
    lines.append(f"out={out!r}")
    lines += [f"{key}={value!r}" for key, value in _changed(recorded)]
    if resume:
        lines.append("resume=True")
    inner = ",\n    ".join(lines)
    return f"from leibler.train import fit\n\nfit(\n    {inner},\n)"


def _changed(recorded: Recorded) -> list[tuple[str, Any]]:
    """The options that are not at their defaults."""
    from leibler.train import Options

    normal = dataclasses.asdict(Options())
    return [(str(k), v) for k, v in recorded.options.items() if normal.get(k, object()) != v]


def _plain(value: Any) -> str:
    return "none" if value is None else str(value)


def set_aside(recorded: Recorded) -> list[dict[str, Any]]:
    """For each data set with unusable rows: how many for which reason, and the first of each."""
    out = []
    for part in recorded.set_aside:
        rows = []
        for reason, count, first in part.reasons:
            where = str(first.get("file", "")) + (f", line {first['line']}" if "line" in first else "")
            raw = str(first.get("raw", ""))
            rows.append(
                {
                    "reason": reason,
                    "count": f"{count:,}",
                    "where": where,
                    "raw": _cut(raw)[:200],
                    "detail": str(first.get("detail") or ""),
                }
            )
        out.append({"name": part.name, "count": plural(part.count, "row"), "path": str(part.path), "rows": rows})
    return out


def timings(recorded: Recorded) -> dict[str, Any] | None:
    """The speed of the steps; None if the run did not record it."""
    timings = recorded.timings
    rates = sorted(v for v in timings.columns.get("tokens_per_second", ()) if math.isfinite(v))
    if not rates:
        return None
    seconds = sorted(v for v in timings.columns.get("seconds", ()) if math.isfinite(v))
    tokens = sum(v for v in recorded.metrics.columns.get("tokens", ()) if math.isfinite(v))
    facts = [("Tokens per second", f"{number(rates[len(rates) // 2])} (median of the steps)")]
    if seconds:
        facts += [
            ("Seconds per step", f"{number(seconds[len(seconds) // 2])} (median)"),
            ("Time in steps", duration(sum(seconds))),
        ]
    if tokens:
        facts.append(("Tokens trained on", f"{tokens:,.0f}"))
    drawn = figures.curve("Speed", "tokens per second", timings.steps, timings.columns["tokens_per_second"], 4)
    return {"facts": facts, "chart": drawn}
