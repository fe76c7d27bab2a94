"""What the demo's numbers say, in sentences that can come out either way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def findings(rows: Sequence[Row], before: Row, after: Row, divergences: Sequence[str]) -> list[str]:
    """Whether each student is nearest to the teacher in its own divergence, and what the rewards changed."""
    students = {r["name"]: r["metrics"] for r in rows if r["name"] in divergences}
    out = [_nearest(name, students) for name in divergences]
    a, b = before["metrics"]["accuracy"], after["metrics"]["accuracy"]
    moves = (
        f"rises from {a:.1%} to {b:.1%}"
        if b > a
        else f"falls from {a:.1%} to {b:.1%}"
        if b < a
        else f"stays at {a:.1%}"
    )
    out.append(
        f"With rewards the accuracy of the {before['name']} student {moves} on held-out problems (greedy answers)."
    )
    one, eight = (f"from {before['metrics'][k]:.1%} to {after['metrics'][k]:.1%}" for k in ("pass@1", "pass@8"))
    out.append(f"Its pass@1 goes {one} and its pass@8 {eight}.")
    return out


def _nearest(name: str, students: Mapping[str, Mapping[str, float]]) -> str:
    own = students[name][name]
    others = {other: metrics[name] for other, metrics in students.items() if other != name}
    rival = min(others, key=lambda other: others[other])
    if own <= others[rival]:
        return (
            f"{name}: the student trained on it is the nearest in it ({own:.4f}; next, {rival}, {others[rival]:.4f})."
        )
    excess = own / others[rival] - 1
    return (
        f"{name}: the student trained on it is NOT the nearest in it ({own:.4f}); the one trained on {rival} is, with "
        f"{others[rival]:.4f}, so it is {excess:.1%} farther."
    )
