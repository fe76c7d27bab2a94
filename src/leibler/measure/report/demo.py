"""The page of several runs: who is nearest in which sense, what rewards changed, and then each run."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from leibler.errors import LeiblerError, RunError
from leibler.measure.report import figures, run, views
from leibler.measure.report.collect import as_number, mapping, read_run
from leibler.measure.report.measured import Reliability, load_pair, look
from leibler.measure.report.words import duration, number, percent, spell, unit

SHARES = ("accuracy", "ece", "pass@")
ORDER = ("accuracy", "pass@1", "pass@8", "ForwardKL", "ReverseKL", "JensenShannon", "TotalVariation", "entropy", "ece")
DIVERGENCES = ("ForwardKL", "ReverseKL", "JensenShannon", "TotalVariation")
SHORT = {"accuracy": "Accuracy", "ece": "ECE", "TotalVariation": "Total variation", "entropy": "Entropy"}


FULL = 0.25
"""How much farther than the nearest a student must be for the darkest shade, at the least."""


def sections(folder: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template shows, from ``demo.json`` and the runs that it names."""
    models = [model for model in content["models"] if isinstance(model, dict)]
    trained = [str(name) for name in content.get("divergences") or ()]
    runs, broken = _runs(folder, models, mapping(content.get("rl")))
    text, text_missing = _text(folder, mapping(content.get("text")))
    curves = [found for model in models if (found := _reliability(model)) is not None]
    seconds = as_number(content.get("seconds"))
    task = str(content.get("task") or "")
    status = [task, f"{len(models)} models", f"made in {duration(seconds)}" if seconds else ""]
    return {
        "title": str(content.get("title") or "Several runs"),
        "runs": runs,
        "demo": {
            "status": " · ".join(filter(None, status)),
            "findings": [str(finding) for finding in content.get("findings") or ()],
            "table": _table(models),
            "matrix": _matrix(models, trained),
            "rl": _rl(mapping(content.get("rl"))),
            "reliability": [views.reliability_chart([one], one.name, tall=False) for one in curves],
            "text": text,
            "text_title": _text_title(models, mapping(content.get("text"))),
            "text_missing": text_missing,
            "broken": broken,
        },
    }


def _value(model: Mapping[str, Any], name: str) -> float | None:
    value = as_number(mapping(model.get("metrics")).get(name))
    return None if value is None or math.isnan(value) else value


def _name(model: Mapping[str, Any]) -> str:
    name = str(model.get("name") or "unnamed")
    return re.sub(rf"\b({'|'.join(DIVERGENCES)})\b", lambda found: spell(found[0]), name)


def _show(name: str, value: float | None) -> str:
    return percent(value) if name.startswith(SHARES) else number(value)


def _label(name: str) -> str:
    return SHORT.get(name) or spell(name)


def _table(models: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One row per model, one column per measurement that any of them has."""
    known = {name for model in models for name in mapping(model.get("metrics"))}
    names = [name for name in ORDER if name in known] + sorted(known - set(ORDER))
    names = [name for name in names if any(_value(model, name) is not None for model in models)]
    rows = []
    for model in models:
        parameters = as_number(model.get("parameters"))
        size = "" if parameters is None else f"{parameters:,.0f}"
        rows.append({"name": _name(model), "size": size, "cells": [_show(n, _value(model, n)) for n in names]})
    heads = [(_label(name), "share" if name.startswith(SHARES) else unit(name)) for name in names]
    return {"heads": heads, "rows": rows}


def _matrix(models: Sequence[Mapping[str, Any]], trained: Sequence[str]) -> dict[str, Any] | None:
    """Trained on (rows) against measured in (columns). The least of each column is the nearest in that sense."""
    rows = [model for name in trained for model in models if model.get("name") == name]
    columns = [name for name in trained if any(_value(model, name) is not None for model in rows)]
    if len(rows) < 2 or not columns:
        return None
    least = {}
    most = {}
    for name in columns:
        finite = [v for model in rows if (v := _value(model, name)) is not None and math.isfinite(v)]
        least[name], most[name] = (min(finite), max(finite)) if finite else (math.nan, math.nan)
    out = []
    for model in rows:
        cells = []
        for name in columns:
            value = _value(model, name)
            nearest = value is not None and value == least[name]
            spread = max(most[name] - least[name], FULL * least[name])  # small differences look small
            above = (value - least[name]) / spread if value is not None and math.isfinite(value) and spread > 0 else 0.0
            if value is not None and math.isinf(value):
                above = 1.0
            ratio = value / least[name] - 1 if value is not None and least[name] > 0 else math.nan
            more = "" if nearest or not math.isfinite(ratio) else f"+{100 * ratio:.3g} %"
            cells.append(
                {
                    "text": number(value),
                    "more": more,
                    "nearest": nearest,
                    "own": model.get("name") == name,
                    "shade": f"{0.08 + 0.52 * above:.2f}" if value is not None else "0",
                }
            )
        out.append({"name": _name(model), "cells": cells})
    return {"columns": [(_label(name), unit(name)) for name in columns], "rows": out}


def _rl(content: Mapping[str, Any]) -> dict[str, Any] | None:
    before, after = mapping(content.get("before")), mapping(content.get("after"))
    groups: list[tuple[str, Markup]] = []
    others: list[tuple[str, str, str, str]] = []
    known = {*before, *after}
    for name in [n for n in ORDER if n in known] + sorted(known - set(ORDER)):
        pair = [as_number(side.get(name)) for side in (before, after)]
        if all(value is None or math.isnan(value) for value in pair):
            continue
        if name == "accuracy" or name.startswith("pass@"):
            rows = [(when, value, percent(value)) for when, value in zip(("before", "after"), pair)]
            groups.append((_label(name), figures.bars(rows)))
        else:
            others.append((_label(name), unit(name), _show(name, pair[0]), _show(name, pair[1])))
    return {"bars": groups, "others": others} if groups or others else None


def _reliability(model: Mapping[str, Any]) -> Reliability | None:
    given = mapping(model.get("calibration"))
    columns = [given.get(key) for key in ("confidence", "accuracy", "count")]
    if not all(isinstance(column, list) for column in columns):
        return None
    rows = [
        (confidence, accuracy, int(count))
        for row in zip(*columns)  # type: ignore[arg-type]
        if None not in (values := [as_number(value) for value in row])
        for confidence, accuracy, count in [values]
        if confidence is not None and accuracy is not None and count and math.isfinite(confidence + accuracy + count)
    ]
    if not rows:
        return None
    confidence, accuracy, count = zip(*sorted(rows))
    total = sum(count)
    error = sum(n * abs(a - c) for c, a, n in rows) / total if total else 0.0
    shown = _value(model, "ece")
    return Reliability(_name(model), confidence, accuracy, count, error if shown is None else shown)


def _text_title(models: Sequence[Mapping[str, Any]], content: Mapping[str, Any]) -> str:
    names = {model.get("checkpoint"): _name(model) for model in models}
    pair = [names.get(content.get(key)) for key in ("model", "target")]
    return "A text under two models" + ("" if None in pair else f": {pair[0]} against {pair[1]}")


def _text(folder: Path, content: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    if not content:
        return None, "Left out: the demonstration names no text."
    try:
        from leibler.data import Record

        model, target = (folder / str(content.get(key, "")) for key in ("model", "target"))
        pair = load_pair(model, target)
        record = Record(str(content.get("prompt") or ""), completion=str(content.get("text") or ""))
        return views.text_section(look(*pair, [record]), "the target"), ""
    except LeiblerError as error:
        return None, f"Left out: {error}"


def _runs(
    folder: Path, models: Sequence[Mapping[str, Any]], rl: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    named: dict[str, str] = {}
    for model in models:
        if isinstance(model.get("run"), str):
            named.setdefault(model["run"], _name(model))
    if isinstance(rl.get("run"), str):
        named.setdefault(rl["run"], "Learning from rewards")
    found, broken = [], []
    for number_, (place, name) in enumerate(named.items(), 1):
        try:
            section = run.section(read_run(folder / place), None, f"run-{number_}", name)
            if section["commands"]["python"]:  # made by the demonstration's own program
                again = f"leibler demo --out {shlex.quote(f'{folder.resolve()}-repeat')}"
                section["commands"] = {
                    "original": "",
                    "repeat": again,
                    "resume": "",
                    "python": False,
                    "relative": False,
                }
            found.append(section)
        except RunError as error:
            broken.append(f"{name}: {error}")
    return found, broken
