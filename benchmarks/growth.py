"""How a distillation step on own responses grows with the vocabulary, the new tokens and the group size.

    python benchmarks/growth.py [--threads 1] [--repeats 1] [--wall]

Beside each other: ``leibler.train.fit`` with the recipe ``gkd`` (Jensen-Shannon divergence to a teacher over the whole
vocabulary), and the same step as it is usually written: ``generate``, the logits of all positions of both models, their
log-softmax, the divergence by autograd, AdamW. Each row gives the seconds of a step and the most memory it took beyond
what was held at its beginning, and under each sweep stand the fitted exponents: the slope of the logarithm against that
of the size, so 1 is proportional and 0 is constant. Memory is measured in runs of its own, in which the allocator gives
every large tensor back at once: it then tells what is needed and not what is kept for later.
"""

from __future__ import annotations

import ctypes
import gc
import math
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import _clock as shared
from leibler import recipes
from leibler.policy import CausalLM, character_tokenizer, tiny_llama
from leibler.train import OnPolicy, Recipe, fit


@dataclass(frozen=True)
class Size:
    vocabulary: int = 4096
    new: int = 32
    group: int = 4
    prompts: int = 4


SWEEPS: dict[str, tuple[str, tuple[int, ...]]] = {
    "vocabulary": ("vocabulary", (2048, 4096, 8192, 16384)),
    "new tokens": ("new", (16, 32, 64, 128)),
    "group size": ("group", (2, 4, 8, 16)),
}


MMAP_THRESHOLD = -3
"""Of glibc's mallopt: blocks above it are returned to the system when they are freed."""


class Steps:
    """Seconds and memory between the marks of two steps, the least of all but the first."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.found: list[tuple[float, float]] = []
        self.start: tuple[float, int] | None = None

    def mark(self) -> None:
        if self.start is not None:
            self.found.append((self.clock() - self.start[0], memory("VmHWM") - self.start[1]))
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed would otherwise hide what is taken next
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.start = self.clock(), memory("VmRSS")

    @property
    def least(self) -> tuple[float, float]:
        seconds, peaks = zip(*self.found[1:], strict=True)
        return min(seconds), min(peaks)


def memory(which: str) -> int:
    """Bytes resident now (``VmRSS``) or at most (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024


def model_of(size: Size, seed: int) -> CausalLM:
    letters = "".join(chr(0x4E00 + number) for number in range(size.vocabulary - 4))
    return tiny_llama(character_tokenizer(letters), hidden=64, layers=2, heads=4, seed=seed)


def prompts_of(size: Size, count: int) -> list[str]:
    draw = random.Random(0)
    return ["".join(chr(0x4E00 + draw.randrange(size.vocabulary - 4)) for _ in range(12)) for _ in range(count)]


def ours(size: Size, steps: int, clock: Callable[[], float]) -> tuple[float, float]:
    seen = Steps(clock)

    def mark(rows: Any, context: Any) -> Any:
        seen.mark()
        return rows

    plain = recipes.get("gkd")
    recipe = Recipe(OnPolicy(size.group) >> mark, plain.objective, plain.schedule, plain.models)
    with tempfile.TemporaryDirectory() as out:
        fit(
            recipe, student=model_of(size, 0), teacher=model_of(size, 1), out=Path(out) / "run", quiet=True,
            data=[{"prompt": prompt} for prompt in prompts_of(size, 64)], steps=steps, max_new_tokens=size.new,
            batch_size=size.prompts * size.group,
        )  # fmt: skip
    return seen.least


def usual(size: Size, steps: int, clock: Callable[[], float]) -> tuple[float, float]:
    student, teacher = model_of(size, 0), model_of(size, 1)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5)
    prompts = [student.encode_prompt(prompt) for prompt in prompts_of(size, 64)]
    seen = Steps(clock)
    for step in range(steps):
        chosen = [prompts[(step * size.prompts + number) % 64] for number in range(size.prompts)]
        given = torch.tensor([prompt for prompt in chosen for _ in range(size.group)])
        seen.mark()
        with torch.no_grad():
            whole = student.causal.generate(
                input_ids=given, attention_mask=torch.ones_like(given), do_sample=True, top_k=0, top_p=1.0,
                max_new_tokens=size.new, pad_token_id=student.pad_id,
            )  # fmt: skip
            theirs = teacher.causal(input_ids=whole).logits[:, given.shape[1] - 1 : -1].log_softmax(-1)
        own = student.causal(input_ids=whole).logits[:, given.shape[1] - 1 : -1].log_softmax(-1)
        middle = torch.logaddexp(own, theirs) - math.log(2.0)
        kls = [F.kl_div(middle, part, reduction="none", log_target=True).sum(-1) for part in (own, theirs)]
        ((kls[0] + kls[1]) / 2).mean().backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        del whole, theirs, own, middle, kls  # or the next step would count them as held before it began
    return seen.least


def slope(sizes: tuple[int, ...], values: list[float]) -> float:
    """Least squares of log value on log size."""
    x = [math.log(size) for size in sizes]
    y = [math.log(value) for value in values]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def main() -> None:
    parser = shared.options(__doc__, repeats=1)
    parser.add_argument("--steps", type=int, default=4, help="of each run (default 4; the first does not count)")
    arguments = parser.parse_args()
    clock = shared.started(arguments, keep=False)
    base = Size()
    print(
        f"Llama, hidden 64, 2 layers, prompts of 12 tokens; unless swept: vocabulary {base.vocabulary}, {base.new} new "
        f"tokens, {base.prompts} prompts x {base.group}"
    )
    usual(base, 3, clock), ours(base, 3, clock)  # what is made once in a process belongs to no size
    sides = (usual, ours)
    points = [(n, i, replace(base, **{attribute: i})) for n, (attribute, sizes) in SWEEPS.items() for i in sizes]
    seconds = {
        (name, number): [min(s(size, arguments.steps, clock)[0] for _ in range(arguments.repeats)) for s in sides]
        for name, number, size in points
    }
    ctypes.CDLL(None).mallopt(MMAP_THRESHOLD, 2**18)
    megabytes = {(n, i): [s(size, 3, clock)[1] / 2**20 for s in sides] for n, i, size in points}
    print(
        f"{'':<14}{'size':>8}{'usual s':>10}{'leibler s':>11}{'ratio':>8}{'usual MB':>10}{'leibler MB':>12}{'ratio':>8}"
    )
    for name, (_, sizes) in SWEEPS.items():
        for number in sizes:
            (a, b), (c, d) = seconds[name, number], megabytes[name, number]
            print(f"{name:<14}{number:>8}{a:>10.3f}{b:>11.3f}{a / b:>8.2f}{c:>10.1f}{d:>12.1f}{c / d:>8.2f}")
        fit_ = [slope(sizes, [t[name, n][k] for n in sizes]) for t in (seconds, megabytes) for k in (0, 1)]
        print(f"{name:<14}{'exponent':>8}{fit_[0]:>10.2f}{fit_[1]:>11.2f}{'':>8}{fit_[2]:>10.2f}{fit_[3]:>12.2f}")


if __name__ == "__main__":
    main()
