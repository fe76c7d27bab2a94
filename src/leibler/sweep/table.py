"""The table of a sweep: rows with mean and spread, and findings that can come out either way."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leibler.measure.report.words import number, percent

if TYPE_CHECKING:
    from leibler.sweep.settings import Settings, Setup

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One number of the table.

    Attributes:
        key: in ``sweep.json``.
        head, unit: above the column.
        better: 1 if more is better, -1 if less is, 0 if neither is.
        shown: a number in that unit as text.
        per: the unit, in that of ``sweep.json``.
    """

    key: str
    head: str
    unit: str
    better: int
    shown: Callable[[float | None], str] = number
    per: float = 1.0

    def show(self, value: float | None) -> str:
        """The number as text; a dash where there is none."""
        return self.shown(None if value is None else value / self.per)


def _tenths(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.1f}"


def _whole(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:,.0f}"


def _rate(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:g}"


COLUMNS = (
    Column("forward_kl", "forward KL", "demonstrations", -1),
    Column("reverse_kl", "reverse KL", "demonstrations", -1),
    Column("own_reverse_kl", "reverse KL", "own answers", -1),
    Column("accuracy", "accuracy", "greedy, %", 1, _tenths, 0.01),
    Column("pass@1", "pass@1", "%", 1, _tenths, 0.01),
    Column("pass@8", "pass@8", "%", 1, _tenths, 0.01),
    Column("distinct", "distinct", "answers of 8", 0),
    Column("distinct_right", "right ones", "distinct, of 8", 1),
    Column("ece", "ECE", "%", -1, _tenths, 0.01),
    Column("text_nll", "text", "nats a token", -1),
    Column("learning_rate", "learning rate", "best of those tried", 0, _rate),
    Column("steps", "steps", "of the optimiser", 0, _whole),
    Column("tokens_per_second", "tokens/s", "trained", 1, _whole),
    Column("memory", "memory", "peak, MB", -1, _tenths, 2.0**20),
)


def run_name(slug: str, seed: int, learning_rate: float | None = None) -> str:
    """What a run is called in the directory of its sweep."""
    return f"{slug}-{seed}" if learning_rate is None else f"{slug}-{seed}-{learning_rate:g}"


def summary(
    setup: Setup,
    settings: Settings,
    slugs: Sequence[str],
    left_out: Mapping[str, str],
    seeds: int,
    results: Sequence[Row],
    failed: Mapping[str, str],
) -> dict[str, Any]:
    """Everything that a sweep found, as ``sweep.json`` holds it.

    Args:
        setup, settings: of the sweep.
        slugs: the methods that were asked for.
        left_out: why a method cannot take part.
        seeds: runs of each.
        results: what each process wrote.
        failed: why a run failed, by its name.
    """
    from dataclasses import asdict
    from importlib.metadata import version

    from leibler import __version__, recipes
    from leibler.sweep.provide import run_options

    by_name = {result["name"]: result for result in results}
    rates, wanted = tuple(settings.learning_rates) or (None,), []
    rows = [
        {"name": shown, "slug": "", "errors": [], **_over([by_name[f"baseline-{model}"]])}
        for model, shown in (("student", "student, before"), ("teacher", "teacher"))
        if f"baseline-{model}" in by_name
    ]
    for slug in slugs:
        if slug in left_out:
            continue
        tried = {rate: [run_name(slug, seed, rate) for seed in range(seeds)] for rate in rates}
        wanted += [name for names in tried.values() for name in names]
        errors = [failed[name] for names in tried.values() for name in names if name in failed]
        method = recipes.find(slug)
        about = {"name": slug, "slug": slug, "title": method.title, "year": method.year, "errors": errors}
        each = [_over([by_name[name] for name in names if name in by_name]) for names in tried.values()]
        # Chosen by problems that are not compared on; of equals, the first.
        best = max(each, key=_tuned)
        rows.append({**about, **best, "tried": [o["metrics"] for o in each if o["metrics"]] if len(each) > 1 else []})
    missing = [name for name in wanted if name not in by_name]
    return {
        "setup": asdict(setup),
        "options": run_options(settings),
        "settings": {**asdict(settings), "learning_rates": list(settings.learning_rates)},
        "seeds": seeds,
        "complete": not missing,
        "missing": [name for name in missing if name not in failed],
        "failed": dict(failed),
        "left_out": dict(left_out),
        "rows": rows,
        "findings": findings(rows),
        "made_with": {
            "leibler": __version__,
            "torch": version("torch"),
            "python": platform.python_version(),
            "machine": platform.machine(),
            "threads": settings.threads,
        },
    }


def _over(results: Sequence[Row]) -> dict[str, Any]:
    """Mean and standard deviation over seeds of each number."""
    keys = dict.fromkeys(key for result in results for key in result["metrics"])
    found = {key: [float(r["metrics"][key]) for r in results if key in r["metrics"]] for key in keys}
    return {
        "seeds": [result["seed"] for result in results],
        "parameters": results[0]["parameters"] if results else None,
        "metrics": {key: statistics.fmean(values) for key, values in found.items()},
        "spread": {key: _spread(values) for key, values in found.items() if len(values) > 1},
        "values": found,
    }


def _tuned(over: Row) -> float:
    """What a learning rate is chosen by; one that diverged is never the best."""
    found = over["metrics"].get("tuning", -math.inf)
    return -math.inf if math.isnan(found) else found


def _spread(values: Sequence[float]) -> float:
    """The standard deviation; NaN where a run diverged, of which `statistics` knows none."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


# ---- as text ---------------------------------------------------------------------------------------------------------


def shown(content: Row) -> tuple[list[Column], list[tuple[str, list[str]]]]:
    """The columns that any row has, and each row's name with its cells; a failed run's reason stands elsewhere."""
    columns = [c for c in COLUMNS if any(c.key in row["metrics"] for row in content["rows"])]
    rows = []
    for row in ordered(content["rows"]):
        cells = []
        for column in columns:
            text = column.show(row["metrics"].get(column.key))
            spread = row["spread"].get(column.key)
            cells.append(text if spread is None else f"{text} ± {column.show(spread)}")
        rows.append((row["name"], cells))
    return columns, rows


def ordered(rows: Sequence[Row]) -> list[Row]:
    """The baselines, then the methods from the most accurate to the least (or the nearest to the farthest)."""

    def rank(row: Row) -> tuple[int, float, float]:
        found = row["metrics"]
        if not row["slug"]:
            return (0, 0.0, 0.0)
        return (1 if found else 2, -found.get("accuracy", 0.0), found.get("reverse_kl", math.inf))

    return sorted(rows, key=rank)


def as_text(content: Row) -> str:
    """The table for a terminal, with what failed, what was left out, and the findings."""
    columns, rows = shown(content)
    cells = [["", *(c.head for c in columns)], ["", *(c.unit for c in columns)], *([name, *c] for name, c in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in cells
    ]
    lines += ["", f"{content['setup']['tokens']:,} tokens each; {_count(content['seeds'], 'seed')}"]
    lines += [f"{name} failed: {reason}" for name, reason in content["failed"].items()]
    lines += [f"{slug} was left out; it needs {reason}" for slug, reason in content["left_out"].items()]
    return "\n".join([*lines, *(f"- {finding}" for finding in content["findings"])])


def as_markdown(content: Row) -> str:
    """The same for a page of documentation."""
    columns, rows = shown(content)
    slugs = {row["slug"] for row in content["rows"]}
    lines = ["| | " + " | ".join(f"{c.head}<br>{c.unit}" for c in columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += ["| " + " | ".join([f"`{name}`" if name in slugs else name, *cells]) + " |" for name, cells in rows]
    return "\n".join(lines)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


# ---- what the numbers say --------------------------------------------------------------------------------------------


def findings(rows: Sequence[Row]) -> list[str]:
    """What the numbers say; each sentence says which way it came out, and where the noise of the seeds hides it."""
    trained = [row for row in rows if row["slug"] and row["metrics"]]
    base = {row["name"]: row["metrics"] for row in rows if not row["slug"]}
    if len(trained) < 2:
        return []
    out: list[str] = []
    for key, what, better in (
        ("accuracy", "is the most accurate (greedy)", 1),
        ("forward_kl", "is the nearest to the teacher by forward KL", -1),
        ("own_reverse_kl", "is the nearest to the teacher by reverse KL on its own answers", -1),
        ("ece", "is the best calibrated", -1),
    ):
        out += _first(trained, key, what, better)
    out += _beyond(trained, base)
    out += _related(trained)
    out += _diversity(trained, base)
    out += _cost(trained)
    out += _edges(trained)
    if not any(len(values) > 1 for row in trained for values in row["values"].values()):
        out.append("Each ran with one seed, so how much of any difference is chance is not known.")
    return out


def _ranked(rows: Sequence[Row], key: str, better: int) -> list[Row]:
    return sorted(
        (r for r in rows if math.isfinite(r["metrics"].get(key, math.nan))), key=lambda r: -better * r["metrics"][key]
    )


def _shown(key: str, value: float) -> str:
    column = next(c for c in COLUMNS if c.key == key)
    return column.show(value) + (" %" if "%" in column.unit else "")


def _first(rows: Sequence[Row], key: str, what: str, better: int) -> list[str]:
    ranked = _ranked(rows, key, better)
    if len(ranked) < 2:
        return []
    first, second = ranked[:2]
    a, b = first["metrics"][key], second["metrics"][key]
    if a == b:
        same = [r["name"] for r in ranked if r["metrics"][key] == a]
        return [f"None {what} alone: {', '.join(same)} share {_shown(key, a)}."]
    noise = max(first["spread"].get(key, 0.0), second["spread"].get(key, 0.0))
    tail = ""
    if len(first["values"][key]) > 1 and abs(a - b) <= noise:
        tail = "; their difference is within the spread of the seeds, so neither has won"
    return [f"{first['name']} {what} ({_shown(key, a)}; next, {second['name']}, {_shown(key, b)}){tail}."]


def _beyond(rows: Sequence[Row], base: Mapping[str, Row]) -> list[str]:
    out = []
    teacher, before = (base.get(name, {}).get("accuracy") for name in ("teacher", "student, before"))
    if teacher is not None:
        over = [r["name"] for r in rows if r["metrics"].get("accuracy", 0.0) > teacher]
        out.append(
            f"More accurate than the teacher ({percent(teacher)}): {', '.join(over)}."
            if over
            else f"None is more accurate than the teacher ({percent(teacher)})."
        )
    if before is not None:
        under = [r["name"] for r in rows if r["metrics"].get("accuracy", 1.0) < before]
        out.append(
            f"Less accurate than the student was before ({percent(before)}): {', '.join(under)}."
            if under
            else f"All are more accurate than the student was before ({percent(before)}), or as accurate."
        )
    return out


def _related(rows: Sequence[Row]) -> list[str]:
    """Whether nearness to the teacher tells who answers best, by the correlation of ranks."""
    pairs = [
        (r["metrics"]["own_reverse_kl"], r["metrics"]["accuracy"])
        for r in rows
        if math.isfinite(r["metrics"].get("own_reverse_kl", math.nan)) and "accuracy" in r["metrics"]
    ]
    if len(pairs) < 5:
        return []
    near, right = zip(*pairs, strict=True)
    if len(set(near)) < 2 or len(set(right)) < 2:
        return []
    from scipy.stats import spearmanr

    rho = float(spearmanr(near, right)[0])  # type: ignore[arg-type]
    said = "so the nearer to the teacher, the more accurate" if rho < -0.6 else "so nearness alone does not tell"
    if rho > 0.6:
        said = "so the FARTHER from the teacher, the more accurate"
    ranks = f"Over {len(pairs)} methods the ranks in reverse KL on own answers and in accuracy"
    return [f"{ranks} correlate at {number(rho, 2)}, {said}."]


def _diversity(rows: Sequence[Row], base: Mapping[str, Row]) -> list[str]:
    ranked = _ranked(rows, "distinct", 1)
    if len(ranked) < 2:
        return []
    most, least = ranked[0], ranked[-1]
    teacher = base.get("teacher", {}).get("distinct")
    told = "" if teacher is None else f"; the teacher gives {number(teacher)}"
    out = [
        f"{most['name']} gives the most different answers to a problem ({number(most['metrics']['distinct'])} of 8), "
        f"{least['name']} the fewest ({number(least['metrics']['distinct'])}){told}."
    ]
    gain = [(r["metrics"]["pass@8"] - r["metrics"]["pass@1"], r["name"]) for r in rows if "pass@8" in r["metrics"]]
    if len(gain) > 1:
        (small, one), (large, other) = min(gain), max(gain)
        out.append(
            f"Seven more answers help {other} most (pass@8 is {100 * large:.1f} points above pass@1) and {one} least "
            f"({100 * small:.1f} points)."
        )
    return out


def _edges(rows: Sequence[Row]) -> list[str]:
    """Whose best learning rate is the smallest or the largest of those tried, so that the best may lie beyond."""
    out = []
    for which, end in (("smallest", min), ("largest", max)):
        names = []
        for row in rows:
            tried = {m["learning_rate"] for m in row.get("tried", ()) if "learning_rate" in m}
            if len(tried) > 1 and row["metrics"].get("learning_rate") == end(tried):
                names.append(row["name"])
        if names:
            out.append(
                f"Best at the {which} learning rate tried, so perhaps better still beyond it: {', '.join(names)}."
            )
    return out


def _cost(rows: Sequence[Row]) -> list[str]:
    out = []
    steps = _ranked(rows, "steps", 1)
    most, fewest = (steps[i]["metrics"]["steps"] if steps else 0.0 for i in (0, -1))
    if most > 2 * fewest:
        out.append(
            f"Equal tokens are not equal steps: {steps[0]['name']} takes {_shown('steps', most)} of the optimiser, "
            f"{steps[-1]['name']} {_shown('steps', fewest)}."
        )
    for key, better, what in (("tokens_per_second", 1, "trains fastest"), ("memory", -1, "takes the least memory")):
        ranked = _ranked(rows, key, better)
        if len(ranked) < 2:
            continue
        a, b = (r["metrics"][key] for r in (ranked[0], ranked[-1]))
        factor = max(a, b) / max(min(a, b), 1e-9)
        unit = "tokens a second" if better > 0 else "MB"
        out.append(
            f"{ranked[0]['name']} {what} ({_shown(key, a)} {unit}), {ranked[-1]['name']} the "
            f"{'slowest' if better > 0 else 'most'} ({_shown(key, b)}): a factor of {factor:.1f}."
        )
    return out
