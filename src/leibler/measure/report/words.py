"""Names, units and numbers as a reader expects them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

_NATS = ("KL", "Jeffreys", "JensenShannon", "Renyi", "CauchySchwarz", "Skew", "Entropy")
SHARES = ("accuracy", "token_accuracy", "pass@", "calibration_error", "ece")
"""How the names of metrics begin that are shown in per cent."""
# the name, what it is measured to, and the stream of rows it is measured on: name(target)@stream or name/stream
_PARTS = re.compile(r"(pass@[^(/]*|[^(@/]*)(?:\(([^()]*)\))?(?:[@/](.*)|.*)", re.DOTALL)
_SPELT = {
    "ForwardKL": "Forward KL",
    "ReverseKL": "Reverse KL",
    "JensenShannon": "Jensen–Shannon",
    "TotalVariation": "Total variation",
    "SkewForwardKL": "Skewed forward KL",
    "SkewReverseKL": "Skewed reverse KL",
    "AdaptiveKL": "Adaptive KL",
    "BandKL": "Forward KL on a band",
    "transport": "Transport between batches",
    "span_product": "Products of neighbours",
    "ChiSquared": "Chi-squared",
    "ReverseChiSquared": "Reverse chi-squared",
    "CauchySchwarz": "Cauchy–Schwarz",
    "Renyi": "Rényi",
    "nll": "Negative log-likelihood",
    "ece": "Calibration error",
    "policy_gradient": "Policy gradient",
    "divergence_per_sequence/InReward": "Divergence inside the reward",
}
_UNITS = {
    "nll": "nats per token",
    "divergence_per_sequence": "nats per response",
    "entropy": "nats per token",
    "length": "tokens per response",
    "tokens": "tokens per step",
    "tokens_per_second": "tokens per second",
    "accuracy": "share right",
    "reward": "mean per response",
    "grad_norm": "before clipping",
    "learning_rate": "",
    "ece": "",
    "loss": "",
    "TotalVariation": "0 to 1",
    "transport": "0 to 2",
    "Hellinger": "0 to 2",
}


def spell(name: str) -> str:
    """A metric's or divergence's name for people.

    Examples:
        >>> spell("ReverseKL(reference)"), spell("ForwardKL(teacher)@task"), spell("grad_norm"), spell("pass@8")
        ('Reverse KL to reference', 'Forward KL to teacher, task', 'Grad norm', 'Pass@8')
    """
    if name in _SPELT:
        return _SPELT[name]
    base, inside, stream = _PARTS.fullmatch(name).groups()  # type: ignore[union-attr]  # it matches every text
    spelt = _SPELT.get(base)
    if spelt is None:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", base).replace("_", " ").split(" ")
        spelt = " ".join(word if word.isupper() else word.lower() for word in words)
        spelt = spelt[:1].upper() + spelt[1:]
    return spelt + (f" to {inside}" if inside else "") + (f", {stream}" if stream else "")


def unit(name: str) -> str:
    """The unit of a metric or of a divergence, empty where it has none (or none is known)."""
    base = re.split(r"[(/]", name, maxsplit=1)[0]
    if base in _UNITS:
        return _UNITS[base]
    return "nats per token" if any(part in base for part in _NATS) else ""


def number(value: float | int | None, digits: int = 3) -> str:
    """A number with so many significant digits, in the form that is shortest to read.

    Examples:
        >>> [number(x) for x in (0, 0.12345, 12345.6, 1e-5, float("inf"), None, -0.5)]
        ['0', '0.123', '12,346', '1.00e−5', '∞', '–', '−0.500']
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-3:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa}e{int(exponent)}"
    elif size >= 10 ** (digits - 1):
        text = f"{value:,.0f}"
    elif isinstance(value, int):
        text = str(value)
    else:
        decimals = digits - 1 - math.floor(math.log10(size))
        text = f"{value:.{max(decimals, 0)}f}"
    return text.replace("-", "−")


def percent(value: float | None) -> str:
    """A share as a percentage with one decimal.

    Examples:
        >>> percent(0.8749), percent(1.0), percent(0.00001), percent(None)
        ('87.5 %', '100 %', '<0.1 %', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if 0 < value < 0.0005:
        return "<0.1 %"
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def duration(seconds: float) -> str:
    """Seconds for people.

    Examples:
        >>> duration(3.21), duration(75), duration(7384)
        ('3.2 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    if seconds < 3570:
        return f"{int(seconds + 0.5) // 60} min {int(seconds + 0.5) % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def plural(count: int, noun: str) -> str:
    """A count with its noun.

    Examples:
        >>> plural(1, "row"), plural(2000, "row")
        ('1 row', '2,000 rows')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def ends(values: Sequence[float]) -> tuple[float | None, float | None, int]:
    """Mean of the first and of the last steps, and of how many: a tenth of the steps, at most 20; None without any."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return None, None, 0
    k = max(1, min(20, len(finite) // 10))
    return sum(finite[:k]) / k, sum(finite[-k:]) / k, k
