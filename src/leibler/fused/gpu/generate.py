"""The source of the two kernels of a set of functionals, and the modules made of it.

Both kernels run one program per row. ``values`` reads the row of the model and of each target twice: once for the
normalisers and every log-sum-exp (lanes of a tile keep their own running maximum, so that tiles need no exchange), once
for the sums. ``gradient`` reads them once more and writes the gradient in place of the model's logits.
"""

from __future__ import annotations

import itertools
import linecache
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leibler.divergence.rows import LN2, OUTSIDE, Functional
from leibler.fused.gpu.forms import Entry, Facts, Form, form
from leibler.fused.gpu.library import SOURCE as LIBRARY
from leibler.fused.gpu.trace import NotElementwise, statements

BLOCK = 2048
"""Entries per tile: eight to a thread, one 16-byte access in half precision."""
WARPS = 8
BOTTOM = -3e38
"""Below every logit and every FLOOR, yet finite."""
_serial = itertools.count()


@dataclass(frozen=True)
class Layout:
    """What a kernel is made for: the functionals with the target that each reads, and which heads have a bias."""

    wants: tuple[tuple[Functional, int | None], ...]
    biased: tuple[bool, ...]
    """The model, then each target."""
    token: bool

    @property
    def targets(self) -> int:
        return len(self.biased) - 1


@dataclass(frozen=True, eq=False)
class Program:
    """The forms of a layout, where their rows lie in the buffers between the kernels, and the generated module.

    ``stats`` holds for the model (maximum, log2 of the rest), for each target (maximum, log2 of the rest, difference of
    the normalisers, least and largest difference of the logits), then each want's powers. A difference beyond any real
    logit says that one side lacks support.
    """

    layout: Layout
    forms: tuple[Form, ...]
    powers: tuple[int, ...]
    """First row of each want's powers in ``stats``."""
    sums: tuple[range, ...]
    numbers: tuple[range, ...]
    stats: int
    source: str

    @property
    def kernels(self) -> ModuleType:
        return _load(self.source)


def program(layout: Layout) -> Program | None:
    """The kernels of a layout; None where a functional has no form that a kernel can compute."""
    try:
        hash(layout)
    except TypeError:
        return None  # a functional that may change has no kernel that could be kept
    return _program(layout)


@lru_cache(maxsize=64)
def _program(layout: Layout) -> Program | None:
    forms = [form(functional) for functional, _ in layout.wants]
    if any(f is None for f in forms):
        return None
    try:
        return _Writer(layout, tuple(f for f in forms if f is not None)).program()
    except NotElementwise:
        return None


@lru_cache(maxsize=64)
def _load(source: str) -> ModuleType:
    """A module of the generated source. Triton reads a kernel's source back by its file name, hence the entry there."""
    name = f"<leibler kernels {next(_serial)}>"
    module = ModuleType(name)
    module.__file__ = name
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec"), module.__dict__)
    return module


def stat(target: int, which: str) -> int:
    """The row of ``stats`` where a number of a target stands."""
    return 2 + 5 * target + ("maximum", "log", "shift", "least", "most").index(which)


class _Kept(NamedTuple):
    """A log-sum-exp that the first reading keeps."""

    name: str
    expression: str
    alone: dict[str, float]
    """Sums of powers of the same terms, which have the same maximum."""


class _Writer:
    def __init__(self, layout: Layout, forms: tuple[Form, ...]) -> None:
        self.layout, self.forms = layout, forms
        self.sides = ["m", *(f"t{k}" for k in range(layout.targets))]
        starts = list(itertools.accumulate((len(f.powers) for f in forms), initial=stat(layout.targets, "maximum")))
        self.powers, self.stats = tuple(starts[:-1]), starts[-1]

    def program(self) -> Program:
        sums = [self._traced(k, f.sums, self._power_names(k), f"s{k}_") for k, f in enumerate(self.forms)]
        counts = [len(names) for _, names in sums]
        numbers = [self._count_numbers(f, n) for f, n in zip(self.forms, counts)]
        gradients = [
            self._traced(k, _one(f.gradient), [f"n{k}_{j}" for j in range(n)], f"g{k}_")
            for k, (f, n) in enumerate(zip(self.forms, numbers))
        ]
        values, gradient = self._values(sums), self._gradient(gradients, numbers)
        source = "\n".join([LIBRARY, "", *values, "", "", *gradient, ""])
        return Program(self.layout, self.forms, self.powers, _ranges(counts), _ranges(numbers), self.stats, source)

    # --- what each functional contributes -----------------------------------------------------------------------------
    def _power_names(self, k: int) -> list[str]:
        return [f"w{k}_{j}" for j in range(len(self.forms[k].powers))]

    def _traced(
        self, k: int, function: Callable[..., tuple[Tensor, ...]], rows: Sequence[str], prefix: str
    ) -> tuple[list[str], list[str]]:
        target = self.layout.wants[k][1]
        # A functional of the model alone sees the model in place of a target, and must not read it.
        t = "m" if target is None else f"t{target}"
        entry = [("p_m", "entry"), (f"p_{t}", "entry"), ("lp_m", "entry"), (f"lp_{t}", "entry")]
        entry += [("zero" if target is None else f"ratio_{t}", "entry"), ("hit", "flag"), ("in_m", "flag")]
        width = len(Entry._fields)

        def flat(*args: Tensor) -> tuple[Tensor, ...]:
            return function(Entry(*args[:width]), args[width:])

        return statements(flat, [*entry, *((name, "row") for name in rows)], prefix)

    @staticmethod
    def _count_numbers(f: Form, sums: int) -> int:
        one, no = torch.ones(1), torch.zeros(1, dtype=torch.bool)
        return len(f.finish(Facts(tuple(one for _ in f.powers), no, no), tuple(one for _ in range(sums)))[1])

    # --- pieces that both kernels share -------------------------------------------------------------------------------
    def _arguments(self) -> str:
        parts = ["model", "bias_m", "stride_m", "scale_m"]
        for k in range(self.layout.targets):
            parts += [f"target{k}", f"bias_t{k}", f"stride_t{k}", f"scale_t{k}"]
        return ", ".join([*parts, "token"])

    def _start(self) -> list[str]:
        lines = [
            "row = tl.program_id(0).to(tl.int64)",
            "lane = tl.arange(0, BLOCK)",
            "at_m = model + row * stride_m",
            *(f"at_t{k} = target{k} + row * stride_t{k}" for k in range(self.layout.targets)),
        ]
        return [*lines, "chosen = tl.load(token + row)" if self.layout.token else "chosen = -1"]

    def _tile(self) -> list[str]:
        """Base-2 logits of a tile and which of them count."""
        lines = ["i = start + lane", "valid = i < vocab"]
        for side, biased in zip(self.sides, self.layout.biased):
            lines.append(f"x_{side} = tl.load(at_{side} + i, mask=valid, other=0.0).to(tl.float32) * scale_{side}")
            if biased:
                lines.append(f"x_{side} += tl.load(bias_{side} + i, mask=valid, other=0.0)")
            # Written so that NaN counts as inside and is seen.
            lines.append(f"in_{side} = valid & ((x_{side} < {OUTSIDE!r}) == 0)")
        return lines

    def _entries(self) -> list[str]:
        """The parts of an entry, from base-2 logits and the numbers of the row."""
        lines = ["hit = i == chosen", "zero = tl.zeros((BLOCK,), tl.float32)"]
        for side in self.sides:
            lines.append(f"lb_{side} = (x_{side} - max_{side}) - log_{side}")
            lines.append(f"p_{side} = tl.exp2(lb_{side})")
            lines.append(f"lp_{side} = lb_{side} * {LN2!r}")
        for t in self.sides[1:]:
            # Outside both supports two floors need not be equal, and any ratio has no meaning.
            lines.append(f"ratio_{t} = tl.where(in_m | in_{t}, (x_m - x_{t} - shift_{t}) * {LN2!r}, 0.0)")
        return lines

    # --- the first kernel ---------------------------------------------------------------------------------------------
    def _values(self, traced: list[tuple[list[str], list[str]]]) -> list[str]:
        keep = self._kept()
        lines = [*self._start()]
        for t in self.sides[1:]:
            lines += [f"{name}_{t} = tl.zeros((BLOCK,), tl.float32)" for name in ("high", "low")]
        for kept in keep:
            lines.append(f"top_{kept.name} = tl.full((BLOCK,), {BOTTOM!r}, tl.float32)")
            lines += [f"sum_{name} = tl.zeros((BLOCK,), tl.float32)" for name in (kept.name, *kept.alone)]
        lines.append("for start in range(0, vocab, BLOCK):")
        lines += _indent([*self._tile(), *self._first_reading(keep)])
        lines += self._after_first(keep)
        for k, (_, names) in enumerate(traced):
            lines += [f"total{k}_{j} = tl.zeros((BLOCK,), tl.float32)" for j in range(len(names))]
        lines.append("for start in range(0, vocab, BLOCK):")
        body = [*self._tile(), *self._entries()]
        for k, (text, names) in enumerate(traced):
            body += text
            body += [f"total{k}_{j} += tl.where(valid, {name}, 0.0)" for j, name in enumerate(names)]
        lines += _indent(body)
        order = itertools.count()
        for k, (_, names) in enumerate(traced):
            lines += [f"tl.store(sums + {next(order)} * rows + row, tl.sum(total{k}_{j}))" for j in range(len(names))]
        return ["@triton.jit", f"def values({self._arguments()}, stats, sums, rows, vocab, BLOCK: tl.constexpr):",
                *_indent(lines)]  # fmt: skip

    def _kept(self) -> list[_Kept]:
        """The log-sum-exps of the first reading. A power of one row alone shares that row's maximum."""
        keep = {side: _Kept(side, f"x_{side}", {}) for side in self.sides}
        for k, f in enumerate(self.forms):
            t = f"t{self.layout.wants[k][1]}"
            for name, (a, b) in zip(self._power_names(k), f.powers):
                if b == 0.0 < a:
                    keep["m"].alone[name] = a
                elif a == 0.0 < b:
                    keep[t].alone[name] = b
                else:
                    keep[name] = _Kept(name, f"x_m * {a!r} + x_{t} * {b!r}", {})
        return list(keep.values())

    def _first_reading(self, keep: list[_Kept]) -> list[str]:
        lines = []
        for t in self.sides[1:]:
            lines.append(f"away = tl.where(in_m | in_{t}, x_m - x_{t}, 0.0)")
            lines += [f"high_{t} = tl.maximum(high_{t}, away)", f"low_{t} = tl.minimum(low_{t}, away)"]
        for name, expression, alone in keep:
            # One exponential either way: of the new value below the maximum, or of the old maximum below the new value.
            lines.append(f"new = tl.where(valid, {expression}, {BOTTOM!r})")
            lines.append(f"below = -tl.abs(new - top_{name})")
            lines.append(f"rises = new > top_{name}")
            for power, a in (alone | {name: 1.0}).items():
                lines.append(f"e = tl.exp2(below * {a!r})")
                lines.append(f"sum_{power} = tl.where(rises, sum_{power} * e + 1.0, sum_{power} + e)")
            lines.append(f"top_{name} = tl.maximum(top_{name}, new)")
        return lines

    def _after_first(self, keep: list[_Kept]) -> list[str]:
        lines, stores = [], itertools.count()

        def store(value: str) -> str:
            return f"tl.store(stats + {next(stores)} * rows + row, {value})"

        for name, _, alone in keep:
            lines.append(f"max_{name} = tl.max(top_{name})")
            for power, a in alone.items():
                lines.append(f"part = tl.exp2((top_{name} - max_{name}) * {a!r})")
                lines += [f"max_{power} = max_{name} * {a!r}", f"log_{power} = tl.log2(tl.sum(sum_{power} * part))"]
            lines.append(f"part = tl.exp2(top_{name} - max_{name})")
            lines.append(f"log_{name} = tl.log2(tl.sum(sum_{name} * part))")
        lines += [store("max_m"), store("log_m")]
        for t in self.sides[1:]:
            lines.append(f"shift_{t} = (max_m - max_{t}) + (log_m - log_{t})")
            lines += [store(f"max_{t}"), store(f"log_{t}"), store(f"shift_{t}")]
            lines += [store(f"tl.min(low_{t})"), store(f"tl.max(high_{t})")]
        for k, f in enumerate(self.forms):
            t = f"t{self.layout.wants[k][1]}"
            for name, (a, b) in zip(self._power_names(k), f.powers):
                top = f"(max_{name} - {a!r} * max_m - {b!r} * max_{t})"
                rest = f"(log_{name} - {a!r} * log_m - {b!r} * log_{t})"
                lines += [f"{name} = ({top} + {rest}) * {LN2!r}", store(name)]
        return lines

    # --- the second kernel --------------------------------------------------------------------------------------------
    def _gradient(self, traced: list[tuple[list[str], list[str]]], numbers: list[int]) -> list[str]:
        lines = [*self._start(), "live = 0.0"]
        for k in range(len(self.forms)):
            lines.append(f"unit{k} = tl.load(units + {k} * rows + row)")
            lines.append(f"live += tl.abs(unit{k})")
        lines.append("max_m = tl.load(stats + row)")
        lines.append("log_m = tl.load(stats + rows + row)")
        for k, t in enumerate(self.sides[1:]):
            for name in ("max", "log", "shift"):
                at = stat(k, {"max": "maximum"}.get(name, name))
                lines.append(f"{name}_{t} = tl.load(stats + {at} * rows + row)")
        order = itertools.count()
        for k, count in enumerate(numbers):
            lines += [f"n{k}_{j} = tl.load(numbers + {next(order)} * rows + row)" for j in range(count)]
        body = [*self._tile(), *self._entries(), "total = tl.zeros((BLOCK,), tl.float32)"]
        for k, (text, (name,)) in enumerate(traced):
            body += text
            # An infinite row has a coefficient of 0, and may have any gradient.
            body.append(f"total += tl.where(unit{k} == 0.0, 0.0, unit{k} * {name})")
        body.append("tl.store(at_m + i, tl.where(in_m, total, 0.0).to(model.dtype.element_ty), mask=valid)")
        # A row that nobody asks for is set to 0 unread.
        silent = "tl.store(at_m + start + lane, nothing, mask=start + lane < vocab)"
        tiles = "    for start in range(0, vocab, BLOCK):"
        lines.append("nothing = tl.zeros((BLOCK,), model.dtype.element_ty)")
        lines += ["if live == 0.0:", tiles, f"        {silent}", "else:", tiles, *_indent(_indent(body))]
        return ["@triton.jit",
                f"def gradient({self._arguments()}, stats, numbers, units, rows, vocab, BLOCK: tl.constexpr):",
                *_indent(lines)]  # fmt: skip


def _one(function: Callable[..., Tensor]) -> Callable[..., Any]:
    return lambda *args: (function(*args),)


def _ranges(counts: Sequence[int]) -> tuple[range, ...]:
    ends = list(itertools.accumulate(counts, initial=0))
    return tuple(range(a, b) for a, b in itertools.pairwise(ends))


def _indent(lines: Sequence[str]) -> list[str]:
    return [f"    {line}" for line in lines]
