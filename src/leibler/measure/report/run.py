"""The sections of one run, as plain text and drawings for the template."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from leibler.measure.report import figures
from leibler.measure.report.collect import Recorded, mapping
from leibler.measure.report.figures import Axis, Series
from leibler.measure.report.measured import IN_MEMORY, Measured, Reliability, Text
from leibler.measure.report.words import duration, ends, number, percent, plural, spell, unit
from leibler.measure.summaries import frontier

SHOWN = 4
"""Samples shown of each of the chosen steps."""
MOST_TEXT = 500
"""Characters of a sample that are shown."""
FRONTIER_POINTS = 40
SHARES = ("accuracy", "token_accuracy", "pass@", "calibration_error", "ece")


def section(recorded: Recorded, measured: Measured | None, key: str = "run", name: str = "") -> dict[str, Any]:
    """Everything the template shows of one run.

    Args:
        recorded: the run.
        measured: what its models told; None leaves these sections out without a word (several runs on one page).
        key: tells its anchors from those of another run on the page.
        name: the heading, if not the recipe's name.
    """
    slug = str(recorded.run.get("recipe"))
    curve, point_note = reward_against_divergence(recorded)
    return {
        "key": key,
        "title": name or slug,
        "slug": slug,
        "paper": _paper(slug),
        "status": _status(recorded),
        "headline": _headline(recorded),
        "groups": _groups(recorded),
        "frontier": curve,
        "frontier_note": point_note,
        "text": text_section(measured.texts, measured.target) if measured else None,
        "text_missing": measured.missing.get("text", "") if measured else "",
        "measured": _measured(measured) if measured else None,
        "samples": _samples(recorded),
        "recipe": _recipe(recorded),
        "commands": _commands(recorded),
        "set_aside": _set_aside(recorded),
        "versions": [(str(k), str(v)) for k, v in mapping(recorded.run.get("versions")).items()],
        "hashes": [(str(k), str(v)) for k, v in mapping(recorded.run.get("data_hashes")).items()],
        "timings": _timings(recorded),
        "unreadable": recorded.unreadable,
    }


# -- the top ---------------------------------------------------------------------------------------------------------


def _paper(slug: str) -> str:
    from leibler.recipes.registry import METHODS

    method = METHODS.get(slug)
    return f"{method.title} ({method.year})" if method else ""


def _status(recorded: Recorded) -> str:
    wanted = recorded.options.get("steps")
    steps = f"{recorded.steps:,}" + (f" of {wanted:,}" if isinstance(wanted, int) else "") + " steps"
    parts = [steps, "finished" if recorded.final else "not finished"]
    seconds = _seconds(recorded)
    if seconds:
        parts.append(duration(seconds))
    if "seed" in recorded.options:
        parts.append(f"seed {recorded.options['seed']}")
    return " · ".join(parts)


def _seconds(recorded: Recorded) -> float:
    return sum(v for v in recorded.timings.columns.get("seconds", ()) if math.isfinite(v))


def _headline(recorded: Recorded) -> list[dict[str, str]]:
    """Up to four numbers, from the beginning to the end of the run."""
    cards: list[dict[str, str]] = []
    validation, metrics = recorded.validation, recorded.metrics

    def add(label: str, values: Sequence[float], what: str, share: bool = False, held_out: bool = False) -> None:
        finite = [v for v in values if math.isfinite(v)]
        if not finite:
            return
        first, last, k = (finite[0], finite[-1], 1) if held_out else ends(values)
        show = percent if share else number
        when = "held out" if held_out else f"mean of the first and last {k} steps" if k > 1 else "first and last step"
        before = "" if len(finite) == 1 else show(first)
        cards.append({"label": label, "before": before, "after": show(last), "what": what, "when": when})

    if "accuracy" in validation.columns:
        add("Accuracy", validation.columns["accuracy"], "share right", share=True, held_out=True)
    if "reward" in metrics.columns:
        add("Reward", metrics.columns["reward"], "mean per response")
    for name, values in list(metrics.named("divergence/").items())[:2]:
        add(spell(name), values, unit(name))
    if "nll" in validation.columns:
        add(spell("nll"), validation.columns["nll"], unit("nll"), held_out=True)
    if "entropy" in metrics.columns:
        add("Entropy", metrics.columns["entropy"], unit("entropy"))
    if "loss" in metrics.columns:
        add("Loss", metrics.columns["loss"], "")
    return cards[:4]


# -- curves ----------------------------------------------------------------------------------------------------------


def _groups(recorded: Recorded) -> list[tuple[str, list[Markup]]]:
    """Learning curves. Every column finds a place, also one that this version does not know."""
    steps, columns = recorded.metrics.steps, dict(recorded.metrics.columns)
    drawn: list[Markup] = []

    def take(names: Sequence[str], colour: int, drop: str = "", title: str = "") -> None:
        for name in names:
            values = columns.pop(name, None)
            if values is not None:
                short = name.removeprefix(drop)
                noisy = name != "learning_rate"
                drawn.append(figures.curve(title + spell(short), unit(short), steps, values, colour, noisy))

    def begin(prefix: str) -> list[str]:
        return [name for name in columns if name == prefix or name.startswith(prefix + "/")]

    terms = [name for name in columns if name.startswith("loss/")]
    if len(terms) == 1 and _same(columns[terms[0]], columns.get("loss", ())):
        columns.pop(terms[0])  # the only term is the loss
        terms = []
    take(begin("reward"), 3)
    take([name for name in columns if name.startswith("divergence/")], 2, "divergence/")
    take(["loss"], 1)
    take(terms, 1, "loss/", "Loss term: ")
    take([*begin("entropy"), *begin("length")], 4)
    take(["grad_norm", "learning_rate"], 5)
    take([name for name in columns if name not in ("tokens", "rows")], 6)
    groups = [("During training", drawn)]
    if recorded.validation.columns:
        groups.append(("On held-out data", _validation(recorded)))
    return groups


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in zip(a, b))


def _validation(recorded: Recorded) -> list[Markup]:
    out = []
    for name, values in recorded.validation.columns.items():
        share = name.startswith(SHARES)
        axis = Axis(0.0, 1.0) if share and max(values) > 0.4 else None
        series = [Series("held out", recorded.validation.steps, values, colour=3)]
        out.append(
            figures.chart(spell(name), unit(name), series, y_axis=axis, legend=False, share=share,
                          x_axis=Axis(0.0, max(recorded.steps, 1)))
        )
    return out


def reward_against_divergence(recorded: Recorded) -> tuple[Markup | None, str]:
    """What each step earned against how far it had gone, with the points that no other beats; or why not."""
    metrics, validation = recorded.metrics, recorded.validation
    divergences = list(metrics.named("divergence/"))
    if "reward" in metrics.columns and divergences:
        name = next((d for d in divergences if "reference" in d), divergences[0])
        steps, x, y = metrics.steps, metrics.columns[f"divergence/{name}"], metrics.columns["reward"]
        gain, gain_unit, where = "Reward", "mean per response", ""
    else:
        names = [n for n in validation.columns if "(" in n]
        if "accuracy" not in validation.columns or not names:
            lacks = (
                "the run records no divergence (no term of its recipe measures one)"
                if "reward" in metrics.columns
                else "the run records neither a reward nor an accuracy on held-out data"
            )
            return None, f"Left out: {lacks}."
        name = next((n for n in names if n.startswith("Reverse")), names[0])
        steps, x, y = validation.steps, validation.columns[name], validation.columns["accuracy"]
        gain, gain_unit, where = "Accuracy", "share right", " on held-out data"
    points = _windows(steps, x, y)
    if len(points) < 2:
        return None, "Left out: there are fewer than two points with finite numbers."
    labels = [f"steps {a:g}–{b:g}" if a != b else f"step {a:g}" for a, b, _, _ in points]
    best = frontier((p[2], p[3]) for p in points)
    series = [
        Series("no other point has more for less", [p.kl for p in best], [p.reward for p in best], "stairs", 0),
        Series("pale: early, dark: late", [p[2] for p in points], [p[3] for p in points], "dots", 2, labels),
    ]
    drawn = figures.chart(f"{gain} against divergence{where}", gain_unit, series,
                          x_title=f"{spell(name)}{f', {unit(name)}' if unit(name) else ''}", tall=True)
    size = max(1, round(len(steps) / len(points)))
    each = f"Each dot is the mean of {size} steps." if size > 1 else "Each dot is one step at which both were measured."
    return drawn, each


def _windows(steps: Sequence[float], x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float, float, float]]:
    """(first step, last step, mean x, mean y) over neighbouring steps where both are finite."""
    rows = [(s, a, b) for s, a, b in zip(steps, x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    size = max(1, -(-len(rows) // FRONTIER_POINTS))
    out = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        out.append((part[0][0], part[-1][0], sum(r[1] for r in part) / len(part), sum(r[2] for r in part) / len(part)))
    return out


# -- what the models told ----------------------------------------------------------------------------------------------


def text_section(texts: Sequence[Text], target: str) -> dict[str, Any] | None:
    """Texts with the shade of each token, and what the page's script shows about a token."""
    values = sorted(max(v.reverse_kl, 0.0) for text in texts for v in text.tokens if math.isfinite(v.reverse_kl))
    if not texts:
        return None
    # The largest value but for the topmost twentieth: one odd token must not make all others look alike.
    top = max(values[min(len(values) - 1, int(0.95 * len(values)))] if values else 0.0, 1e-6)
    shown, detail = [], []
    for text in texts:
        tokens = []
        for v in text.tokens:
            heat = math.sqrt(min(max(v.reverse_kl, 0.0) / top, 1.0)) if math.isfinite(v.reverse_kl) else 1.0
            differ = bool(v.model_top and v.target_top and v.model_top[0][0] != v.target_top[0][0])
            p, q = math.exp(min(v.model_logp, 0.0)), math.exp(min(v.target_logp, 0.0))
            tokens.append(
                {
                    "text": _visible(v.text),
                    "breaks": v.text.count("\n"),
                    "shade": f"{0.68 * heat:.3f}",
                    "differ": differ,
                    "number": len(detail),
                    "said": f"{_visible(v.text)}: divergence {number(v.reverse_kl)} nats, probability "
                    f"{percent(p)} for the model, {percent(q)} for {target}",
                }
            )
            detail.append(
                [
                    _visible(v.text), number(v.reverse_kl), number(v.forward_kl), percent(p), percent(q),
                    [[_visible(t), percent(w), round(w, 4)] for t, w in v.model_top],
                    [[_visible(t), percent(w), round(w, 4)] for t, w in v.target_top],
                ]
            )  # fmt: skip
        shown.append({"prompt": text.prompt, "tokens": tokens, "cut": text.cut})
    largest = max((v for v in values), default=0.0)
    return {
        "texts": shown,
        "short": len(shown) > 1 and all(len(s["tokens"]) <= 40 for s in shown),
        "target": target,
        "scale": number(top),
        "more": largest > top * 1.001,
        "detail": {"target": target, "tokens": detail},
        "mean": number(sum(values) / len(values)) if values else "–",
        "largest": number(largest),
    }


def _visible(text: str) -> str:
    """A token whose blanks can be seen."""
    return text.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥") or "␀"


def _measured(measured: Measured) -> dict[str, Any]:
    numbers = measured.numbers
    rows = []
    labels = {
        "divergence/forward_kl": ("Forward KL, target from model", "nats per token"),
        "divergence/reverse_kl": ("Reverse KL, model from target", "nats per token"),
        "divergence/jensen_shannon": ("Jensen–Shannon", "nats per token"),
        "divergence/total_variation": ("Total variation", "0 to 1"),
        "calibration_error": ("Calibration error (ECE)", "of the next token"),
        "token_accuracy": ("Next token right", "share of tokens"),
        "accuracy": ("Answer right, greedy", "share of questions"),
    }
    for name in dict.fromkeys([*numbers.get("model", {}), *numbers.get("target", {})]):
        label, what = labels.get(name, (spell(name), "share of questions" if name.startswith("pass@") else unit(name)))
        show = percent if name.startswith(SHARES) else number
        cells = [show(numbers.get(side, {}).get(name)) for side in ("model", "target")]
        rows.append((label, what, *cells))
    return {
        "target": measured.target,
        "data": measured.data,
        "held_out": measured.held_out,
        "rows": rows,
        "has_target": bool(numbers.get("target")),
        "reliability": reliability_chart(measured.reliability) if measured.reliability else None,
        "missing": measured.missing,
    }


def reliability_chart(models: Sequence[Reliability]) -> Markup:
    """How often each model is right against how sure it is; on the diagonal the two agree."""
    series = [Series("", [0.0, 1.0], [0.0, 1.0], "dash", 0)]
    for index, model in enumerate(models):
        labels = [f"sure {100 * c:.1f} %, {plural(n, 'token')}" for c, n in zip(model.confidence, model.count)]
        name = f"{model.name}, ECE {percent(model.error)}"
        colour = 1 + index % 6
        series.append(Series(name, model.confidence, model.accuracy, "line", colour, labels))
        series.append(Series("", model.confidence, model.accuracy, "marks", colour))
    return figures.chart("Reliability of the most likely next token", "share right", series,
                         x_title="probability given to the most likely token", x_axis=Axis(0.0, 1.0),
                         y_axis=Axis(0.0, 1.0), tall=True, share=True)


# -- samples, recipe, how to run it again --------------------------------------------------------------------------------


def _samples(recorded: Recorded) -> list[dict[str, Any]]:
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
            reward = row.get("reward")
            good = isinstance(reward, (int, float)) and not isinstance(reward, bool)
            rows.append(
                {
                    "prompt": _cut(row.get("prompt"), keep_end=True),
                    "completion": _cut(row.get("completion")),
                    "reward": number(float(reward)) if good else "",
                    "right": bool(good and reward > 0),
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


def _recipe(recorded: Recorded) -> dict[str, Any]:
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
    return {"description": str(run.get("description", "")), "inputs": flat, "changed": [(k, _plain(v)) for k, v in changed],
            "others": others}


def _commands(recorded: Recorded) -> dict[str, Any]:
    """How the run was started, how to repeat it and how to go on with it."""
    run, folder = recorded.run, recorded.path.resolve()
    given = [run.get("student"), run.get("teacher"), run.get("validation"), run.get("data")]
    given = [*given, *mapping(run.get("models")).values(), *mapping(run.get("data")).values()]
    in_memory = run.get("recipe") == "custom" or any(isinstance(v, str) and v.endswith(IN_MEMORY) for v in given)
    finished = recorded.final is not None
    if in_memory:
        again = f"{folder}-repeat"
        return {
            "original": "",
            "repeat": _call(recorded, again, False),
            "resume": "" if finished else _call(recorded, str(folder), True),
            "python": True,
        }
    quoted = shlex.quote(str(folder))
    return {
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
    lines += [f"{key}={shown(run[key])}" for key in ("student", "teacher", "models", "data", "validation") if run.get(key)]
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


def _set_aside(recorded: Recorded) -> list[dict[str, Any]]:
    out = []
    for part in recorded.set_aside:
        rows = []
        for reason, count, first in part.reasons:
            where = str(first.get("file", "")) + (f", line {first['line']}" if "line" in first else "")
            raw = str(first.get("raw", ""))
            rows.append({"reason": reason, "count": f"{count:,}", "where": where, "raw": _cut(raw)[:200],
                         "detail": str(first.get("detail") or "")})
        out.append({"name": part.name, "count": plural(part.count, "row"), "path": str(part.path), "rows": rows})
    return out


def _timings(recorded: Recorded) -> dict[str, Any] | None:
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
