"""Guards: what goes wrong in the middle of a run, and what becomes of it.

Each is a frozen value that knows no method; what it has seen is JSON in the run's state, so that a resumed run is
guarded as an unbroken one. They read numbers that the step yields anyway.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors.torch import load_file, save
from torch import Tensor, nn

from leibler import durable
from leibler.errors import RunError
from leibler.objective.rows import TENSORS, Rows
from leibler.train.sharding import local

if TYPE_CHECKING:
    from leibler.train.options import Options
    from leibler.train.recipe import Recipe

State = dict[str, Any]


@dataclass(frozen=True)
class NonFinite:
    """A step whose loss or gradient norm is NaN or infinite is skipped; too many in a row end the run.

    Attributes:
        most: steps in a row that end it.
        kept: batches of skipped steps that are written aside at most, so that a sick run does not fill the disk.
    """

    most: int = 5
    kept: int = 20

    def init(self) -> State:
        return {"in_a_row": 0, "skipped": 0}

    def broken(self, *numbers: float) -> bool:
        return not all(map(math.isfinite, numbers))

    def observe(self, state: State, broken: bool) -> State:
        if not broken:
            return {**state, "in_a_row": 0}
        return {"in_a_row": state["in_a_row"] + 1, "skipped": state["skipped"] + 1}


@dataclass(frozen=True)
class Tripwire:
    """When a measured divergence exceeds a bound: stop, or go back to the last checkpoint with a larger coefficient.

    Attributes:
        bound: in nats, on each metric ``divergence/TERM``; None: no wire.
        action: what happens; to go back, the term's coefficient is multiplied by ``factor`` from there on.
        factor: of the coefficient, once more each time.
        most: times that the run goes back before it stops.
    """

    bound: float | None = None
    action: Literal["stop", "rollback"] = "stop"
    factor: float = 2.0
    most: int = 5

    def init(self) -> State:
        return {"times": 0, "raised": {}}

    def tripped(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """The terms beyond the bound, with their divergences."""
        if self.bound is None:
            return {}
        prefix = "divergence/"
        return {k[len(prefix) :]: v for k, v in metrics.items() if k.startswith(prefix) and v > self.bound}

    def observe(self, state: State, terms: Sequence[str]) -> State:
        raised = {**state["raised"], **{t: state["raised"].get(t, 1.0) * self.factor for t in terms}}
        return {"times": state["times"] + 1, "raised": raised}


@dataclass(frozen=True)
class Drift:
    """Warns, once, when a metric's running mean has left ``factor`` times its mean over the first steps.

    Attributes:
        metric: its name.
        factor: below 1, a fall below that share of the beginning is told; above 1, a rise above that multiple.
        what: the sentence's subject.
        window: steps that make the beginning, and the length of the running mean.
    """

    metric: str
    factor: float
    what: str
    window: int = 10

    def init(self) -> State:
        return {"seen": 0, "first": 0.0, "now": 0.0, "told": False}

    def observe(self, state: State, metrics: Mapping[str, float]) -> tuple[State, str | None]:
        value = metrics.get(self.metric, math.nan)
        if state["told"] or not math.isfinite(value):
            return state, None
        seen, first, now = state["seen"] + 1, state["first"], state["now"]
        if seen <= self.window:
            first += (value - first) / seen
            return {"seen": seen, "first": first, "now": first, "told": False}, None
        now += (value - now) / self.window
        told = now < self.factor * first if self.factor < 1 else now > self.factor * first
        message = (
            f"{self.what}: the mean {self.metric} is {now:.4g}, and was {first:.4g} in the first {self.window} steps"
            if told
            else None
        )
        return {"seen": seen, "first": first, "now": now, "told": told}, message


@dataclass(frozen=True)
class FailedRewards:
    """Responses without a reward are set aside; ``most`` draws in a row without any reward end the run."""

    most: int = 3

    def init(self) -> State:
        return {"in_a_row": 0, "failed": 0, "last": ""}

    def observe(self, state: State, failed: int, rows: int, last: str) -> State:
        """``failed`` responses of a draw were set aside and ``rows`` are left."""
        if not failed:
            return {**state, "in_a_row": 0} if rows else state
        in_a_row = 0 if rows else state["in_a_row"] + 1
        return {"in_a_row": in_a_row, "failed": state["failed"] + failed, "last": last}


@dataclass(frozen=True)
class Guards:
    """Every guard of a run."""

    non_finite: NonFinite
    tripwire: Tripwire
    rewards: FailedRewards
    drifts: tuple[Drift, ...]

    @staticmethod
    def of(options: Options, recipe: Recipe) -> Guards:
        # Whoever imitates data may well end with no entropy; only where the policy writes is it a loss of variety.
        streams = recipe.source.streams()
        sampled = [name for name, origin in streams.items() if origin.law is not None]
        lengths = [f"length/{name}" for name in sampled] if len(streams) > 1 else ["length"]
        watched = (
            Drift("entropy", 0.05, "the entropy has collapsed"),
            *(Drift(metric, 3.0, "the responses grow without bound") for metric in lengths),
        )
        return Guards(
            NonFinite(options.guard_steps),
            Tripwire(options.max_divergence, options.on_divergence),
            FailedRewards(options.guard_draws),
            watched if sampled else (),
        )

    def init(self) -> State:
        return {
            "non_finite": self.non_finite.init(),
            "tripwire": self.tripwire.init(),
            "rewards": self.rewards.init(),
            "drifts": [d.init() for d in self.drifts],
            "empty": 0,
        }

    def drifted(self, state: State, metrics: Mapping[str, float]) -> tuple[State, list[str]]:
        """Every warning that this step's metrics give rise to."""
        seen = [d.observe(s, metrics) for d, s in zip(self.drifts, state["drifts"], strict=True)]
        return {**state, "drifts": [s for s, _ in seen]}, [m for _, m in seen if m]


def not_finite(parameters: Mapping[str, nn.Parameter]) -> dict[str, list[str]]:
    """The names of what is not finite in this process, or in its share of it."""
    weights = [n for n, p in parameters.items() if not local(p.detach()).isfinite().all()]
    gradients = [n for n, p in parameters.items() if p.grad is not None and not local(p.grad).isfinite().all()]
    return {"weights": weights, "gradients": gradients}


def diagnosis(everywhere: Sequence[Mapping[str, Sequence[str]]], metrics: Mapping[str, float]) -> str:
    """What is not finite in a step, in words; ``everywhere`` is what each process found (`not_finite`)."""
    found = [f"{n} {v}" for n, v in metrics.items() if n in ("loss", "grad_norm") or not math.isfinite(v)]
    for what in ("weights", "gradients"):
        names = list(dict.fromkeys(name for share in everywhere for name in share[what]))
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            found.append(f"{what} not finite in {names[0]}{more}")
    return ", ".join(found)


def write_batch(folder: Path, step: int, batch: Mapping[str, Rows], about: Mapping[str, Any]) -> Path:
    """Write a batch aside: ``step-N.safetensors`` with tokens, masks and columns, ``step-N.json`` with the texts."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}.safetensors"
    tensors: dict[str, Tensor] = {}
    for stream, rows in batch.items():
        tensors.update({f"{stream}/{n}": v.detach().cpu().clone() for n, v in _held(rows).items()})
    durable.write(path, lambda file: file.write(save(tensors)))
    texts = {
        stream: [
            {"prompt": record.prompt, "response": text, "source": record.source}
            for record, text in zip(rows.records, rows.texts, strict=True)
        ]
        for stream, rows in batch.items()
    }
    plain = {k: v if not isinstance(v, float) or math.isfinite(v) else str(v) for k, v in about.items()}
    durable.write_text(path.with_suffix(".json"), json.dumps({**plain, "step": step, "streams": texts}, indent=1))
    return path


def _held(rows: Rows) -> dict[str, Tensor]:
    held = {n: getattr(rows, n) for n in TENSORS if getattr(rows, n) is not None}
    held.update({f"columns/{n}": v for n, v in rows.columns.items()})
    for name, view in rows.views.items():
        held.update({f"views/{name}/{n}": v for n, v in _held(view).items()})
    return held


def read_batch(path: str | Path) -> dict[str, Rows]:
    """The streams of a batch that a guard wrote aside, as the step saw them (without their records)."""
    path = Path(path)
    if not path.exists():
        raise RunError(f"{path} does not exist; give a file that a guard wrote, RUN/guards/step-N.safetensors.")
    streams: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(str(path)).items():
        stream, _, part = name.partition("/")
        streams.setdefault(stream, {})[part] = tensor
    return {stream: _rows(held) for stream, held in sorted(streams.items())}


def _rows(held: Mapping[str, Tensor]) -> Rows:
    plain = {name: value for name, value in held.items() if "/" not in name}
    columns = {name.removeprefix("columns/"): v for name, v in held.items() if name.startswith("columns/")}
    views: dict[str, dict[str, Tensor]] = {}
    for name, value in held.items():
        if name.startswith("views/"):
            _, view, part = name.split("/", 2)
            views.setdefault(view, {})[part] = value
    return Rows(**plain, columns=columns, views={name: _rows(of) for name, of in views.items()})  # type: ignore[arg-type]
