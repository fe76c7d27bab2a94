"""What a step measured: sums over micro-batches and chunks, and the metrics made of them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from leibler.fused import Merged, TargetRows
from leibler.fused.coarse import OtherVocabulary
from leibler.objective.needs import TokenEntropy
from leibler.objective.rows import View
from leibler.objective.terms import Term
from leibler.train.plan import StreamPlan


@dataclass
class Step:
    """What a step measured: metrics by name, and what each owner of a controller is to hear."""

    metrics: dict[str, float]
    own: dict[Hashable, dict[str, float]]


def finite(value: Tensor) -> Tensor:
    """Infinite values as 0: they are exact, and counted. NaN is no value; it stays, for the guard to see."""
    return torch.where(value.isinf(), torch.zeros_like(value), value)


def metric_names(terms: tuple[Term, ...]) -> dict[int, str]:
    """A metric name for each term; equal names get their stream, then a number."""
    out: dict[int, str] = {}
    for term in terms:
        name = term.name
        if sum(t.name == name for t in terms) > 1 and len({t.on for t in terms if t.name == name}) > 1:
            name = f"{name}@{term.on}"
        base, number = name, 2
        while name in out.values():
            name, number = f"{base}#{number}", number + 1
        out[id(term)] = name
    return out


class Tally:
    """Sums for the metrics, added up over micro-batches and chunks."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self.names = names
        self.sums: dict[str, Tensor] = {}

    def put(self, key: str, value: Tensor) -> None:
        value = value.detach().double()
        self.sums[key] = self.sums[key] + value if key in self.sums else value

    def add(self, term: Term, value: Tensor, weight: Tensor, contribution: Tensor) -> None:
        name = self.names[id(term)]
        self.put(f"loss/{name}", contribution.sum())
        violated = value.isinf() if term.where is None else value.isinf() & (weight != 0)
        self.put(f"support_violations/{name}", violated.sum())

    def values(self, plan: StreamPlan, view: View) -> None:
        """Measures of whole micro-batches."""
        entropy = view.get(TokenEntropy())
        self.put("entropy", entropy.sum())
        self.put("events", torch.tensor(float(entropy.shape[0])))
        for term in plan.terms:
            for key, value in term.measures(view).items():
                name = self.names[id(term)]
                rows = len(view.rows)
                if term.where is not None:
                    inside = view.inside(term.where)
                    value, rows = value[inside], len(view.row[inside].unique())
                self.put(f"{key}/{name}", finite(value).sum())
                self.put(f"events/{name}", torch.tensor(float(value.shape[0])))
                self.put(f"sequences/{name}", torch.tensor(float(rows)))

    def aligned(self, plan: StreamPlan, targets: list[TargetRows | OtherVocabulary]) -> None:
        """How many positions a model of another tokenizer shares with the policy, and of how many."""
        shared = {
            t.handles[0].name: m.present for t, m in zip(plan.targets, targets, strict=True) if isinstance(m, Merged)
        }
        for name, present in shared.items():
            if present is not None:
                self.put(f"aligned/{name}", present.sum())
                self.put(f"aligned/{name}/of", torch.tensor(float(len(present))))

    def totals(self) -> dict[str, float]:
        return {k: float(v) for k, v in self.sums.items()}
