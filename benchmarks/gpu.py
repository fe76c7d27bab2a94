"""The fused pass on a GPU: every divergence beside the matrix products, beside Liger, and against float64.

    python benchmarks/gpu.py                                   # the size of Liger's published benchmark, bfloat16
    python benchmarks/gpu.py --tokens 2048 --only forward_kl jensen_shannon

Forward and backward, 8,192 tokens, vocabulary 128,256, hidden 2,048 and a target of 4,096. The products that cannot be
avoided (two heads forward, two products backward) run alone at every chunk size, and the fastest is what everything is
compared with. Liger computes the Jensen-Shannon divergence only (and the labels' cross-entropy with it), so it stands
beside that row alone. Sides take turns, and the least time of the repeats counts. ``--device cpu`` runs the same code
with PyTorch in place of the kernels, at a size to choose, only to see that the script works.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

from fused import Problem, products
from leibler import divergence
from leibler.divergence import Divergence
from leibler.fused import linear_divergence
from leibler.fused.gpu.kernels import CHUNKS, usable

CHECKED = 32
"""Tokens that are compared with float64."""
LIGER = "liger, chunked JSD"


def multiplications(problem: Problem) -> int:
    """Of the four products, counted as two operations each."""
    n, vocab = problem.model.tokens, problem.model.vocab
    return 2 * n * vocab * (3 * problem.model.hidden.shape[1] + problem.target.hidden.shape[1])


def ours(problem: Problem, d: Divergence) -> Callable[[], None]:
    def run() -> None:
        m, t = problem.model, problem.target
        m.hidden.grad = m.weight.grad = None
        linear_divergence(m.hidden, m.weight, t.hidden, t.weight, d).backward()

    return run


def liger(problem: Problem) -> Callable[[], None] | None:
    """Liger's chunked Jensen-Shannon divergence, or None where it is not installed."""
    if find_spec("liger_kernel") is None:
        return None
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # type: ignore[import-not-found]

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0)
    label = torch.zeros(problem.model.tokens, dtype=torch.long, device=problem.model.hidden.device)

    def run() -> None:
        m, t = problem.model, problem.target
        m.hidden.grad = m.weight.grad = None
        loss(m.hidden, m.weight, t.hidden, t.weight, label, None, None).backward()

    return run


def errors(problem: Problem, d: Divergence) -> tuple[float, float]:
    """Largest relative error of the values, and of the gradient by the hidden states over its largest entry.

    The judge starts from the logits as the products round them: what remains is the kernels' own.
    """
    m, t = problem.model, problem.target
    hidden = m.hidden.detach()[:CHECKED].requires_grad_()
    values = linear_divergence(hidden, m.weight.detach(), t.hidden[:CHECKED], t.weight, d, reduction="none")
    (got,) = torch.autograd.grad(values.sum(), hidden)
    logits = (hidden.detach() @ m.weight.detach().T).double().requires_grad_()
    other = (t.hidden[:CHECKED] @ t.weight.T).double()
    judge = d(logits, other)
    (slope,) = torch.autograd.grad(judge.sum(), logits)
    expected = slope @ m.weight.detach().double()
    value = ((values.detach() - judge.detach()).abs() / judge.detach().abs()).max()
    return value.item(), ((got.double() - expected).abs().max() / expected.abs().max()).item()


@dataclass(frozen=True)
class Watch:
    """Times and memory on one device."""

    device: str

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, run: Callable[[], None]) -> float:
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def megabytes(self, problem: Problem, run: Callable[[], None]) -> float | None:
        """The most memory that ``run`` held beyond what was held before."""
        if self.device != "cuda":
            return None
        self.wait()
        # Those of the run before would count as held, and this one begins by dropping them.
        problem.model.hidden.grad = problem.model.weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def least(runs: dict[str, Callable[[], None]], repeats: int, watch: Watch) -> dict[str, float]:
    """The least time of each, taking turns, after one run that compiles."""
    best = dict.fromkeys(runs, float("inf"))
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            best[name] = min(best[name], watch.seconds(run))
    return best


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--target-hidden", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=128256)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--only", nargs="*", choices=divergence.names(), help="names of divergences (default: all)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    args = parser.parse_args(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU was at hand: PyTorch sees no CUDA device, so nothing was timed.")
        return
    watch = Watch(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else "processor"
    path = "Triton kernels" if usable(torch.device(args.device)) else "PyTorch, no kernels"
    print(f"{datetime.date.today()}, {name}, {installed('torch')}, {installed('triton')}, {installed('liger-kernel')}")
    print(
        f"{args.tokens} tokens, vocabulary {args.vocab}, hidden {args.hidden}, target {args.target_hidden}, "
        f"{args.dtype}; {path}"
    )
    dtype = getattr(torch, args.dtype)
    problem = Problem.make(args.tokens, args.hidden, args.target_hidden, args.vocab, dtype, args.device)
    sizes = [c for c in CHUNKS if c <= args.tokens] or [args.tokens]
    alone = {f"products, chunks of {c}": products(problem, c) for c in sizes}
    chosen = list(args.only or divergence.names())
    passes = {name: ours(problem, divergence.get(name)) for name in chosen}
    other = liger(problem)
    rival = {} if other is None else {LIGER: other}
    best = least(alone | rival | passes, args.repeats, watch)
    limit = min(best[name] for name in alone)
    reference = best.get("forward_kl")
    rate = multiplications(problem) / limit / 1e12
    print(f"products alone: {rate:.1f} TFLOP/s")
    print(f"{'':26}{'ms':>9}{'rate':>7}{'x Liger':>9}{'x forward':>11}{'peak MB':>9}{'value':>9}{'gradient':>10}")
    for name, seconds in best.items():
        line = f"{name:26}{1e3 * seconds:9.2f}{limit / seconds:7.0%}"
        if name not in alone:
            gain = f"{best[LIGER] / seconds:.2f}" if rival and name in ("jensen_shannon", LIGER) else "-"
            ratio = f"{seconds / reference:.2f}" if reference else "-"
            peak = watch.megabytes(problem, (passes | rival)[name])
            line += f"{gain:>9}{ratio:>11}{'-' if peak is None else f'{peak:.0f}':>9}"
        if name in passes:
            value, gradient = errors(problem, divergence.get(name))
            line += f"{value:9.1e}{gradient:10.1e}"
        print(line, flush=True)
    print(
        "rate: of the products' own; x forward: time over that of forward_kl; x Liger: how many times faster than its"
    )
    print("Jensen-Shannon divergence, which also computes the labels' cross-entropy;")
    print(f"value, gradient: errors against float64 from the same rounded logits, {min(CHECKED, args.tokens)} tokens.")
    if not rival:
        print("liger-kernel is not installed: `pip install liger-kernel` adds its side of the table.")


if __name__ == "__main__":
    sys.exit(main())
