"""What the models told, for the template: texts token by token, reliability, measurements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from leibler.measure.models import TokenView
from leibler.measure.report import figures
from leibler.measure.report.figures import Axis, Series
from leibler.measure.report.measured import Measured, Reliability, Text
from leibler.measure.report.words import SHARES, number, percent, plural, spell, unit

LEAST_SCALE = 0.25
"""Nats that the darkest shade stands for at least: two models that agree everywhere must not look far apart."""
MOST_MARKED = 0.5
"""The share of tokens with different first choices up to which each is marked; more marks than that say nothing."""


def text_section(texts: Sequence[Text], target: str) -> dict[str, Any] | None:
    """Texts with the shade of each token, and what the page's script shows about a token; None without a text."""
    if not texts:
        return None
    values = sorted(max(v.reverse_kl, 0.0) for text in texts for v in text.tokens if math.isfinite(v.reverse_kl))
    # The largest value but for the topmost twentieth: one odd token must not make all others look alike.
    top = max(values[min(len(values) - 1, int(0.95 * len(values)))] if values else 0.0, LEAST_SCALE)
    every = [v for text in texts for v in text.tokens]
    differing = sum(map(_differ, every)) / len(every)
    mark = differing <= MOST_MARKED
    shown, detail = [], []
    for text in texts:
        tokens = []
        for v in text.tokens:
            heat = math.sqrt(min(max(v.reverse_kl, 0.0) / top, 1.0)) if math.isfinite(v.reverse_kl) else 1.0
            p, q = math.exp(min(v.model_logp, 0.0)), math.exp(min(v.target_logp, 0.0))
            tokens.append(
                {
                    "text": _visible(v.text).replace("↵", "↵\n"),
                    "shade": f"{0.68 * heat:.3f}",
                    "differ": mark and _differ(v),
                    "number": len(detail),
                    "said": f"{_visible(v.text)}: divergence {number(v.reverse_kl)} nats, probability "
                    f"{percent(p)} for the model, {percent(q)} for {target}",
                }
            )
            detail.append(
                [
                    _spelt(v.text), number(v.reverse_kl), number(v.forward_kl), percent(p), percent(q),
                    [[_spelt(t), percent(w), round(w, 4)] for t, w in v.model_top],
                    [[_spelt(t), percent(w), round(w, 4)] for t, w in v.target_top],
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
        "marked": mark and differing > 0,
        "differing": percent(differing),
        "mean": number(sum(values) / len(values)) if values else "–",
        "largest": number(largest),
    }


def _differ(view: TokenView) -> bool:
    """Whether the two models would have put different tokens there."""
    return bool(view.model_top and view.target_top and view.model_top[0][0] != view.target_top[0][0])


def _visible(text: str) -> str:
    """A token whose blanks can be seen."""
    return text.replace("\r", "␍").replace("\n", "↵").replace("\t", "⇥") or "␀"


def _spelt(text: str) -> str:
    """A token by itself, where spaces would not be seen either."""
    return _visible(text).replace(" ", "␣")


def measured_section(measured: Measured) -> dict[str, Any]:
    numbers = measured.numbers
    rows, apart = [], []
    labels = {
        "divergence/forward_kl": ("KL(target ‖ model), forward", "nats per token"),
        "divergence/reverse_kl": ("KL(model ‖ target), reverse", "nats per token"),
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
        if name.startswith("divergence/"):
            apart.append((label, what, cells[0], ""))
        else:
            rows.append((label, what, *cells))
    return {
        "target": measured.target,
        "data": measured.data,
        "held_out": measured.held_out,
        "apart": apart,
        "rows": rows,
        "has_target": bool(numbers.get("target")),
        "reliability": reliability_chart(measured.reliability) if measured.reliability else None,
        "missing": {"calibration": "", "numbers": "", **measured.missing},
    }


def reliability_chart(
    models: Sequence[Reliability], title: str = "Reliability of the most likely next token", tall: bool = True
) -> Markup:
    """How often each model is right against how sure it is; on the diagonal the two agree."""
    series = [Series("", [0.0, 1.0], [0.0, 1.0], "dash", 0)]
    for index, model in enumerate(models):
        labels = [f"sure {100 * c:.1f} %, {plural(n, 'token')}" for c, n in zip(model.confidence, model.count)]
        name = f"{model.name}, ECE {percent(model.error)}"
        colour = 1 + index % 6
        series.append(Series(name, model.confidence, model.accuracy, "line", colour, labels))
        series.append(Series("", model.confidence, model.accuracy, "marks", colour))
    one = Axis(0.0, 1.0)
    what = "share right" if tall else f"share right; ECE {percent(models[0].error)}"
    return figures.chart(
        title,
        what,
        series,
        x_title="probability given to the most likely token",
        x_axis=one,
        y_axis=one,
        tall=tall,
        share=True,
        legend=tall,
    )
