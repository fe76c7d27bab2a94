"""The sections of one run, as plain text and drawings for the template."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from leibler.measure.report import again, figures, views
from leibler.measure.report.collect import Recorded, Table, mapping
from leibler.measure.report.figures import Axis, Series
from leibler.measure.report.measured import Measured
from leibler.measure.report.words import SHARES, duration, ends, number, percent, spell, unit
from leibler.measure.summaries import Point, frontier

FRONTIER_POINTS = 40


def section(recorded: Recorded, measured: Measured | None, key: str = "run", name: str = "") -> dict[str, Any]:
    """Everything the template shows of one run.

    Args:
        recorded: the run.
        measured: what its models told; None leaves these sections out without a word (several runs on one page).
        key: tells its anchors from those of another run on the page.
        name: the heading, if not the recipe's name.
    """
    slug = str(recorded.run.get("recipe"))
    return {
        "key": key,
        "title": name or ("A recipe of its own" if slug == "custom" else slug),
        "slug": "a recipe of its own" if slug == "custom" else slug,
        "paper": _paper(slug),
        "status": _status(recorded),
        "headline": _headline(recorded),
        "groups": _groups(recorded),
        "frontier": reward_against_divergence(recorded),
        "text": views.text_section(measured.texts, measured.target) if measured else None,
        "text_missing": measured.missing.get("text", "") if measured else "",
        "measured": views.measured_section(measured) if measured else None,
        "samples": again.samples(recorded),
        "recipe": again.recipe_section(recorded),
        "commands": again.commands(recorded),
        "set_aside": again.set_aside(recorded),
        "versions": [(str(k), str(v)) for k, v in mapping(recorded.run.get("versions")).items()],
        "hashes": [(str(k), str(v)) for k, v in mapping(recorded.run.get("data_hashes")).items()],
        "timings": again.timings(recorded),
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
        when = f"mean of the first and last {k} steps" if k > 1 else "first and last step"
        if held_out:
            at = [f"{step:,.0f}" for step, v in zip(validation.steps, values, strict=True) if math.isfinite(v)]
            when = f"held out, after step {at[0]}" + (f" and step {at[-1]}" if len(at) > 1 else "")
        before = "" if len(finite) == 1 else show(first)
        cards.append({"label": label, "before": before, "after": show(last), "what": what, "when": when})

    if "accuracy" in validation.columns:
        add("Accuracy", validation.columns["accuracy"], "share right", share=True, held_out=True)
    if "reward" in metrics.columns:
        add("Reward", metrics.columns["reward"], "mean per response")
    for name, column in list(_divergences(metrics).items())[:2]:
        add(spell(name), metrics.columns[column], unit(name))
    if "nll" in validation.columns:
        add(spell("nll"), validation.columns["nll"], unit("nll"), held_out=True)
    if "entropy" in metrics.columns:
        add("Entropy", metrics.columns["entropy"], unit("entropy"))
    if "loss" in metrics.columns:
        add("Loss", metrics.columns["loss"], "")
    return cards[:4]


def _divergences(metrics: Table) -> dict[str, str]:
    """The columns of measured divergences, by the names to be shown: per token, then per response."""
    short = {name.removeprefix("divergence/"): name for name in metrics.columns if name.startswith("divergence/")}
    return short | {name: name for name in metrics.columns if name.startswith("divergence_per_sequence/")}


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
    for name in terms:
        # With one term the loss is that term; and the value of a matched divergence is drawn as a divergence.
        twins = (columns.get("divergence/" + name[5:]), columns.get("loss") if len(terms) == 1 else None)
        if any(_same(columns[name], twin) for twin in twins if twin is not None):
            columns.pop(name)
    take(begin("reward"), 3)
    take(list(_divergences(recorded.metrics).values()), 2, "divergence/")
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
    return all(math.isclose(x, y, rel_tol=1e-3, abs_tol=1e-9) or (x != x and y != y) for x, y in zip(a, b, strict=True))


def _validation(recorded: Recorded) -> list[Markup]:
    out = []
    for name, values in recorded.validation.columns.items():
        share = name.startswith(SHARES)
        axis = Axis(0.0, 1.0) if share and max(values) > 0.4 else None
        series = [Series("held out", recorded.validation.steps, values, colour=3)]
        out.append(
            figures.chart(
                spell(name),
                unit(name),
                series,
                y_axis=axis,
                legend=False,
                share=share,
                x_axis=Axis(0.0, max(recorded.steps, 1)),
            )
        )
    return out


def reward_against_divergence(recorded: Recorded) -> dict[str, Any]:
    """What the model earned against how far it had gone, with the points that no other beats; or why not."""
    metrics, validation = recorded.metrics, recorded.validation
    divergences = _divergences(metrics)
    if "reward" in metrics.columns and divergences:
        name = next((d for d in divergences if "reference" in d), next(iter(divergences)))
        steps, x, y = metrics.steps, metrics.columns[divergences[name]], metrics.columns["reward"]
        gain, gain_unit, share = "Reward", "mean per response", False
    else:
        names = [n for n in validation.columns if "(" in n]
        if "accuracy" not in validation.columns or not names:
            lacks = (
                "the run records no divergence (no term of its recipe measures one)"
                if "reward" in metrics.columns
                else "the run records neither a reward nor an accuracy beside a divergence on held-out data"
            )
            return {"title": "Reward against divergence", "missing": f"Left out: {lacks}."}
        name = next((n for n in names if n.startswith("Reverse")), names[0])
        steps, x, y = validation.steps, validation.columns[name], validation.columns["accuracy"]
        gain, gain_unit, share = "Accuracy", "share right, held out", True
    title = f"{gain} against divergence"
    points = _windows(steps, x, y)
    if len(points) < 2:
        return {"title": title, "missing": "Left out: there are fewer than two points with finite numbers."}
    labels = [f"steps {a:g}–{b:g}" if a != b else f"step {a:g}" for a, b, _, _ in points]
    best = frontier(Point(p[2], p[3], label) for p, label in zip(points, labels, strict=True))
    series = [
        Series("no other dot has more for less", [p.kl for p in best], [p.reward for p in best], "stairs", 0),
        Series("pale: early, dark: late", [p[2] for p in points], [p[3] for p in points], "dots", 2, labels),
    ]
    distance = spell(name)
    x_title = f"{distance}{f', {unit(name)}' if unit(name) else ''}"
    size = -(-len(steps) // FRONTIER_POINTS)
    show = percent if share else number
    return {
        "title": title,
        "chart": figures.chart(gain, gain_unit, series, x_title=x_title, tall=True, share=share),
        "note": f"Each dot is the mean of {size} steps." if size > 1 else "Each dot is one measurement.",
        "head": ("The front", distance, gain),
        "front": [(p.label, "", number(p.kl), show(p.reward)) for p in best[-12:]],
    }


def _windows(steps: Sequence[float], x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float, float, float]]:
    """(first step, last step, mean x, mean y) over neighbouring steps where both are finite."""
    rows = [(s, a, b) for s, a, b in zip(steps, x, y, strict=True) if math.isfinite(a) and math.isfinite(b)]
    size = max(1, -(-len(rows) // FRONTIER_POINTS))
    out = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        out.append((part[0][0], part[-1][0], sum(r[1] for r in part) / len(part), sum(r[2] for r in part) / len(part)))
    return out
