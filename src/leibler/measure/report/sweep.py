"""The page and the picture of a sweep: many methods in one table, one row of dots for each number."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from leibler import durable
from leibler.measure.report import figures, page
from leibler.measure.report.figures import Axis, Series, axis_of
from leibler.measure.report.words import plural
from leibler.sweep.table import COLUMNS, Column, ordered, shown

Row = Mapping[str, Any]
PANELS = ("accuracy", "own_reverse_kl", "forward_kl", "pass@8", "distinct", "ece", "tokens_per_second", "memory")
"""The numbers that are drawn, from left to right."""
NAMES, PANEL, GAP, LINE, TOP, BELOW = 190, 99, 19, 21, 62, 34
"""Pixels of the picture: names, a panel and the gap beside it, a row, what stands above and below the rows."""
LIGHT = {"ink": "#1b1d21", "soft": "#5a6069", "grid": "#e9ebed", "dot": "#1666a8", "base": "#c4501b", "card": "#ffffff"}
DARK = {"ink": "#e8e9eb", "soft": "#a2a9b3", "grid": "#2c3138", "dot": "#62aee8", "base": "#ee8450", "card": "#191c20"}


def write_pages(out: Path, content: Row) -> list[Path]:
    """Write ``report.html`` and ``figure.svg`` into the directory of a sweep; returns where they are."""
    found = [out / "report.html", out / "figure.svg"]
    for path, text in zip(found, (report(content), figure(content)), strict=True):
        durable.write_text(path, text)
    return found


def report(content: Row) -> str:
    """The page: what was seen, the table, both pictures, what was left out, and how to repeat it."""
    columns, rows = shown(content)
    slugs = {row["slug"]: row for row in content["rows"]}
    titles = [(name, f"{slugs[name]['title']} ({slugs[name]['year']})" if name in slugs else "") for name, _ in rows]
    made_with, options = content["made_with"], content["options"]
    told = [("task", content["setup"]["title"]), ("tokens trained on", f"{content['setup']['tokens']:,} each")]
    told += [(k.replace("_", " "), f"{v:g}" if isinstance(v, float) else str(v)) for k, v in options.items()]
    told += [(name, str(value)) for name, value in made_with.items() if value is not None]
    parts = {
        "title": "Distillation methods at equal tokens" if _distils(content) else "Methods at equal tokens",
        "status": " · ".join(
            [
                plural(len([r for r in content["rows"] if r["slug"]]), "method"),
                f"{content['setup']['tokens']:,} tokens each",
                plural(content["seeds"], "seed"),
            ]
        ),
        "findings": content["findings"],
        "heads": [(c.head, c.unit) for c in columns],
        "rows": [(name, title, cells) for (name, cells), (_, title) in zip(rows, titles, strict=True)],
        "scatter": scatter(content),
        "figure": Markup(figure(content, alone=False)),
        "failed": list(content["failed"].items()),
        "missing": content["missing"],
        "left_out": list(content["left_out"].items()),
        "facts": told,
    }
    return page.render(parts, "sweep.html.j2")


def _distils(content: Row) -> bool:
    from leibler import recipes

    return all(recipes.find(r["slug"]).family == "distillation" for r in content["rows"] if r["slug"])


def scatter(content: Row) -> Markup:
    """Accuracy against reverse KL on own answers, or nothing where answers have no checker."""
    points = [
        (row["name"], row["metrics"]["own_reverse_kl"], row["metrics"]["accuracy"], bool(row["slug"]))
        for row in content["rows"]
        if "accuracy" in row["metrics"] and math.isfinite(row["metrics"].get("own_reverse_kl", math.nan))
    ]
    if len(points) < 2:
        return Markup("")
    near, accuracy = [p[1] for p in points], [p[2] for p in points]

    def series(name: str, trained: bool, colour: int) -> Series:
        mine = [p for p in points if p[3] == trained]
        return Series(
            name, [p[1] for p in mine], [p[2] for p in mine], "dots", colour, [p[0] for p in mine], fade=False
        )

    return figures.chart(
        "Accuracy",
        "greedy, held-out problems",
        [series("methods", True, 1), series("teacher, and student before", False, 2)],
        x_title="reverse KL to the teacher on own answers, nats per token",
        x_axis=axis_of(near, pad=0.04),
        y_axis=axis_of(accuracy, zero=False),
        tall=True,
        share=True,
    )


# ---- the picture -----------------------------------------------------------------------------------------------------


def figure(content: Row, alone: bool = True) -> str:
    """One line for each method, one panel for each number; a dot is the mean over seeds, a bar its standard deviation.

    Args:
        content: of ``sweep.json``.
        alone: a file by itself, with a background; otherwise a part of a page that has colours of its own.
    """
    rows = [row for row in ordered(content["rows"]) if row["metrics"]]
    by_key = {column.key: column for column in COLUMNS}
    panels = [by_key[k] for k in PANELS if sum(math.isfinite(row["metrics"].get(k, math.nan)) for row in rows) > 1]
    width = NAMES + len(panels) * (PANEL + GAP) + GAP
    height = TOP + LINE * len(rows) + BELOW
    marks = [_names(rows, width)]
    for number, column in enumerate(panels):
        marks.append(_panel(column, rows, NAMES + GAP + number * (PANEL + GAP)))
    said = f"{plural(len(rows), 'model')} compared in {', '.join(c.head for c in panels)}"
    back = f'<rect width="{width}" height="{height}" class="card"/>' if alone else ""
    style = _style(LIGHT) + "@media(prefers-color-scheme:dark){" + _style(DARK) + "}" if not alone else _style(LIGHT)
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{html.escape(said)}" class="sweep">'
        f"<style>{style}</style>{back}{''.join(marks)}</svg>\n"
    )


def _style(colours: Mapping[str, str]) -> str:
    c = colours
    return (
        '.sweep text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif;'
        f"fill:{c['ink']}}}.sweep .soft{{fill:{c['soft']};font-size:10.5px}}.sweep .head{{font-weight:600}}"
        f".sweep .grid{{stroke:{c['grid']}}}.sweep .zebra{{fill:{c['grid']};opacity:.55}}"
        f".sweep .card{{fill:{c['card']}}}"
        f".sweep .dot{{fill:{c['dot']}}}.sweep .bar{{stroke:{c['dot']};stroke-width:2}}"
        f".sweep .base{{fill:{c['base']}}}.sweep .rule{{stroke:{c['base']};stroke-dasharray:3 3;opacity:.75}}"
    )


def _names(rows: Sequence[Row], width: int) -> str:
    out = []
    for number, row in enumerate(rows):
        y = TOP + LINE * number
        if number % 2 == 0:
            out.append(f'<rect x="0" y="{y}" width="{width}" height="{LINE}" class="zebra"/>')
        kind = "" if row["slug"] else ' class="soft"'
        out.append(f'<text x="{NAMES}" y="{y + 15}" text-anchor="end"{kind}>{html.escape(row["name"])}</text>')
    return "".join(out)


def _panel(column: Column, rows: Sequence[Row], left: float) -> str:
    values = [row["metrics"].get(column.key, math.nan) / column.per for row in rows]
    found = [value for value in values if math.isfinite(value)]
    positive = [value for value in found if value > 0]
    # A share of what is right ends at 100%, where one that is small must not push the others together.
    log = "%" not in column.unit or column.better < 0
    log &= min(found) >= 0 and bool(positive) and max(positive) / min(positive) > 20
    if log:  # the teacher's divergence from itself has no place there
        values, found = [value if value > 0 else math.nan for value in values], positive
    scale = axis_of(found, log, zero=False)
    bottom = TOP + LINE * len(rows)

    def x(value: float) -> float:
        return round(left + PANEL * min(max(scale.place(value), 0.0), 1.0), 1)

    arrow = {1: " →", -1: " ←", 0: ""}[column.better]
    out = [
        f'<text x="{left}" y="22" class="head">{html.escape(column.head + arrow)}</text>',
        f'<text x="{left}" y="38" class="soft">{html.escape(column.unit + (", log" if log else ""))}</text>',
    ]
    for value in _ticks(scale):
        out.append(f'<path d="M{x(value)} {TOP - 6}V{bottom}" class="grid"/>')
        label = f'<text x="{x(value)}" y="{bottom + 16}" text-anchor="middle" class="soft">'
        out.append(f"{label}{figures.tick(value)}</text>")
    for row, value in zip(rows, values, strict=True):  # what the methods began with, and what they learnt from
        if not row["slug"] and math.isfinite(value):
            out.append(f'<path d="M{x(value)} {TOP}V{bottom}" class="rule"/>')
    for number, (row, value) in enumerate(zip(rows, values, strict=True)):
        if not math.isfinite(value):
            continue
        y = TOP + LINE * number + LINE / 2
        spread = row["spread"].get(column.key, 0.0) / column.per
        if spread and not (log and value <= spread):
            out.append(f'<path d="M{x(value - spread)} {y}H{x(value + spread)}" class="bar"/>')
        text = f"{row['name']}: {column.head} {column.shown(value)}"
        kind = "dot" if row["slug"] else "base"
        dot = f'<circle cx="{x(value)}" cy="{y}" r="4.5" class="{kind}">'
        out.append(f"{dot}<title>{html.escape(text)}</title></circle>")
    return "".join(out)


def _ticks(scale: Axis) -> list[float]:
    """At most three, so that their labels do not touch."""
    ticks = scale.ticks(3)
    return ticks if len(ticks) <= 3 else ticks[:: math.ceil(len(ticks) / 3)]
