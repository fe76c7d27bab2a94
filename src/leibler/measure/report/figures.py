"""Charts as small pieces of HTML and SVG that stretch with the page.

The curves are stretched to the width of the page while text, line widths and dots keep their size: paths live in a
``viewBox`` of 1000 x 1000 with ``preserveAspectRatio="none"`` and strokes that do not scale; dots are lines of no
length with round ends; tick labels are HTML, placed in per cent. So one drawing serves a telephone and a wide screen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup

from leibler.measure.report.words import number, plural

MOST_POINTS = 320
"""Points of a curve in the page; longer ones are averaged over neighbouring steps."""

Kind = Literal["line", "raw", "dots", "marks", "dash", "stairs"]


@dataclass(frozen=True)
class Series:
    """Points of one colour.

    Args:
        name: in the legend and on hover.
        x, y: coordinates; a y that is not finite breaks the line.
        kind: how it is drawn; ``raw`` is a thin line behind others, ``dots`` fade in from the first to the last,
            ``marks`` do not.
        colour: 1 to 6, or 0 for grey.
        labels: what hovering says about each point, instead of its x.
        fade: whether ``dots`` do so.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    kind: Kind = "line"
    colour: int = 1
    labels: Sequence[str] = ()
    fade: bool = True


@dataclass(frozen=True)
class Axis:
    """A range, where its labels stand, and how it maps to 0..1.

    Args:
        low, high: ends.
        log: logarithmic.
    """

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return (value - low) / (high - low)

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers inside the range, at most about ``most``."""
        if self.log:
            low, high = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            stride = -(-(high - low) // most)
            steps = (1, 2, 5) if high - low <= 2 else (1,)
            found = [m * 10.0**e for e in range(low, high + 1, max(stride, 1)) for m in steps]
            return [v for v in found if self.low * 0.999 <= v <= self.high * 1.001]
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        stride = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
        first = math.ceil(self.low / stride - 1e-9)
        last = math.floor(self.high / stride + 1e-9)
        return [k * stride for k in range(first, last + 1)]


def axis_of(values: Sequence[float], log: bool = False, zero: bool = True, pad: float = 0.06) -> Axis:
    """The range that shows all finite values, with a little air, from zero where zero is near."""
    finite = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not finite:
        return Axis(0.1, 1.0, True) if log else Axis(0.0, 1.0)
    low, high = min(finite), max(finite)
    if log:
        return Axis(low / 1.15, high * 1.15, True)
    if low == high:
        space = abs(low) * 0.5 or 0.5
        return Axis(0.0 if low >= 0 and zero else low - space, high + space)
    from_zero = zero and 0 <= low < 0.7 * high
    to_zero = zero and 0.7 * low < high <= 0
    space = pad * (high - low)
    return Axis(0.0 if from_zero else low - space, 0.0 if to_zero else high + space)


def wide_range(values: Sequence[float]) -> bool:
    """Whether only a logarithmic axis shows all of these: positive, over more than two powers of ten."""
    finite = [v for v in values if math.isfinite(v)]
    return len(finite) > 4 and min(finite) > 0 and max(finite) / min(finite) > 200


def condense(x: Sequence[float], y: Sequence[float]) -> tuple[list[float], list[float]]:
    """Means over neighbours where there are more than ``MOST_POINTS``; of finite values, or one that is not."""
    size = -(-len(x) // MOST_POINTS)
    if size <= 1:
        return list(x), list(y)
    found_x, found_y = [], []
    for start in range(0, len(x), size):
        here = [v for v in y[start : start + size] if math.isfinite(v)]
        found_x.append(sum(x[start : start + size]) / len(x[start : start + size]))
        found_y.append(sum(here) / len(here) if here else math.nan)
    return found_x, found_y


def smooth(y: Sequence[float], window: int) -> list[float]:
    """Means over ``window`` neighbours, fewer towards the ends; what is not finite does not count."""
    half = window // 2
    out = []
    for i in range(len(y)):
        here = [v for v in y[max(i - half, 0) : i + half + 1] if math.isfinite(v)]
        out.append(sum(here) / len(here) if here else math.nan)
    return out


def curve(
    title: str, unit: str, steps: Sequence[float], values: Sequence[float], colour: int = 1, noisy: bool = True
) -> Markup:
    """One number over the steps of training: what was measured, thin, and its moving mean."""
    broken = sum(not math.isfinite(v) for v in values)
    log = noisy and wide_range(values)
    x, y = condense(steps, values)
    merged = -(-len(steps) // MOST_POINTS)
    window = max(len(x) // 16, 1) | 1 if noisy and len(x) >= 24 else 1
    name = f"mean of {merged} steps" if merged > 1 else "value"
    spans = [steps[i : i + merged] for i in range(0, len(steps), merged)]
    labels = [f"step {s[0]:,.0f}" if len(s) == 1 else f"steps {s[0]:,.0f} to {s[-1]:,.0f}" for s in spans]
    series = [Series(name, x, y, "line" if window == 1 else "raw", colour, labels)]
    if window > 1:
        around = f"mean of {merged * window} steps"
        series.append(Series(around, x, smooth(y, window), "line", colour, labels))
    note = f"{plural(broken, 'step')} without a finite value" if broken else ""
    return chart(title, unit, series, log=log, note=note, legend=False)


def chart(
    title: str,
    unit: str,
    series: Sequence[Series],
    *,
    x_title: str = "step",
    x_axis: Axis | None = None,
    y_axis: Axis | None = None,
    log: bool = False,
    note: str = "",
    legend: bool = True,
    tall: bool = False,
    share: bool = False,
) -> Markup:
    """A chart with axes, legend and values on hover.

    Args:
        title, unit: the caption; the unit belongs to the vertical axis.
        series: from back to front.
        x_title: of the horizontal axis.
        x_axis, y_axis: ranges, when not those of the data.
        log: a logarithmic vertical axis.
        note: a sentence under the caption.
        legend: show the names of the series.
        tall: for figures that are looked at one by one.
        share: the vertical axis is shown in per cent.
    """
    every_x = [v for s in series for v in s.x]
    # A curve over steps begins at the left edge; a scatter needs room around its dots.
    ordered = x_title == "step"
    if x_axis is None:
        x_axis = axis_of(every_x, zero=False, pad=0.0) if ordered else axis_of(every_x, pad=0.04)
    if y_axis is None:
        y_axis = axis_of([v for s in series for v in s.y], log)
    drawn = Markup("").join(_drawn(s, x_axis, y_axis) for s in series)
    show = _tick_percent if share else tick
    unit = f"{unit}, logarithmic" if unit and y_axis.log else unit or ("logarithmic" if y_axis.log else "")
    grid, labels = Markup(""), Markup("")
    for value in y_axis.ticks(5 if tall else 4):
        at = y_axis.place(value)
        grid += Markup('<path d="M0 {0}H1000"/>').format(_px(1 - at))
        labels += Markup('<span class="ty" style="bottom:{}%">{}</span>').format(round(100 * at, 2), show(value))
    for value in x_axis.ticks(4):
        at = x_axis.place(value)
        labels += Markup('<span class="tx" style="left:{}%">{}</span>').format(round(100 * at, 2), tick(value))
    keys = Markup("").join(
        Markup('<li><i class="k {} c{}"></i>{}</li>').format(s.kind, s.colour, s.name) for s in series if s.name
    )
    return Markup(
        '<figure class="chart{tall}"><figcaption><b>{title}</b>{unit}{note}</figcaption>'
        '<div class="plot" tabindex="0" role="img" aria-label="{said}">'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" aria-hidden="true">'
        '<g class="grid">{grid}</g>{drawn}</svg>{labels}'
        '<script type="application/json">{points}</script></div>'
        '<div class="xt">{x_title}</div>{legend}</figure>'
    ).format(
        tall=" tall" if tall else "",
        title=title,
        unit=Markup(" <span>{}</span>").format(unit) if unit else "",
        note=Markup(' <em class="warn">{}</em>').format(note) if note else "",
        said=_said(title, unit, series, x_title, share),
        points=htmlsafe_json_dumps(_points(title, series, x_axis, y_axis, x_title, share), separators=(",", ":")),
        grid=grid,
        drawn=drawn,
        labels=labels,
        x_title=x_title,
        legend=Markup('<ul class="legend">{}</ul>').format(keys) if legend and keys else "",
    )


def _drawn(series: Series, x_axis: Axis, y_axis: Axis) -> Markup:
    places = [
        (x_axis.place(x), 1 - y_axis.place(y)) if math.isfinite(y) and (y > 0 or not y_axis.log) else None
        for x, y in zip(series.x, series.y, strict=True)
    ]
    if series.kind in ("dots", "marks"):
        last = max(len(places) - 1, 1) if series.kind == "dots" and series.fade else 0
        return Markup("").join(
            Markup('<path class="dot c{}" stroke-opacity="{}" d="M{} {}h.01"/>').format(
                series.colour, round(0.25 + 0.75 * i / last, 2) if last else 1, _px(place[0]), _px(place[1])
            )
            for i, place in enumerate(places)
            if place is not None
        )
    path, lonely, before = "", "", None
    for i, place in enumerate(places):
        if place is None:
            before = None
            continue
        x, y = _px(place[0]), _px(place[1])
        if before is None and (i + 1 == len(places) or places[i + 1] is None):
            lonely += f"M{x} {y}h.01"  # a point without neighbours would not show as a line
        elif before is None:
            path += f"M{x} {y}"
        else:
            path += f"H{x}V{y}" if series.kind == "stairs" else f"L{x} {y}"
        before = place
    found = Markup("")
    if path:
        found += Markup('<path class="{} c{}" d="{}"/>').format(series.kind, series.colour, path)
    if lonely:
        found += Markup('<path class="dot c{}" d="{}"/>').format(series.colour, lonely)
    return found


def _points(
    title: str, series: Sequence[Series], x_axis: Axis, y_axis: Axis, x_title: str, share: bool
) -> dict[str, object]:
    """What hovering needs: places in thousandths and texts, ready to be shown."""

    def text(value: float) -> str:
        return f"{100 * value:.1f} %" if share else number(value, 4)

    named = [s for s in series if s.name]
    scatter = any(s.kind == "dots" for s in named)
    points = []
    for index, s in enumerate(named):
        for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)):
            if math.isfinite(y) and not (scatter and s.kind != "dots"):
                label = s.labels[i] if s.labels else f"{x_title} {tick(round(x, 6))}"
                shown = y if y > 0 or not y_axis.log else y_axis.low
                said = text(y)
                if s.kind == "dots":  # a scatter has two numbers to read
                    said = f"{title} {said}, {x_title.split(',')[0]} {number(x)}"
                points.append(
                    [round(1000 * x_axis.place(x)), round(1000 - 1000 * y_axis.place(shown)), label, index, said]
                )
    return {"near": "xy" if scatter else "x", "names": [[s.name, s.colour] for s in named], "points": points}


def _said(title: str, unit: str, series: Sequence[Series], x_title: str, share: bool) -> str:
    """The chart in words."""
    text = f"{title}{f' ({unit})' if unit else ''}"
    for s in series:
        pairs = [(x, y) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y)]
        if pairs and s.name and s.kind != "raw":
            (x0, y0), (x1, y1) = pairs[0], pairs[-1]
            show = (lambda v: f"{100 * v:.1f} %") if share else number
            text += f"; {s.name}: {show(y0)} at {x_title} {tick(x0)}, {show(y1)} at {x_title} {tick(x1)}"
    return text + "."


def bars(rows: Sequence[tuple[str, float | None, str]], *, most: float = 1.0, colour: int = 1) -> Markup:
    """Horizontal bars with their values, of (name, value, text of the value)."""
    cells = Markup("").join(
        Markup(
            '<li><span class="name">{}</span><span class="bar"><i class="c{}" style="width:{}%"></i></span>'
            '<span class="value">{}</span></li>'
        ).format(
            name,
            colour,
            round(100 * min(max(value / most, 0.0), 1.0), 2) if value is not None and math.isfinite(value) else 0,
            text,
        )
        for name, value, text in rows
    )
    return Markup('<ul class="bars">{}</ul>').format(cells)


def _px(share: float) -> str:
    return f"{1000 * share:.1f}".removesuffix(".0")


def tick(value: float) -> str:
    """A tick's label: no digits that say nothing."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        mantissa, exponent = f"{value:.1e}".split("e")
        text = f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    else:
        text = f"{value:,.6g}" if abs(value) >= 1000 else f"{value:.4g}"
    return text.replace("-", "−")


def _tick_percent(value: float) -> str:
    return f"{100 * value:.4g} %"
