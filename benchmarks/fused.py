"""What the fused pass costs beyond the matrix products that it cannot avoid, side by side in one run.

    python benchmarks/fused.py                                        # small
    python benchmarks/fused.py --tokens 1024 --hidden 512 --target-hidden 1024 --vocab 32768
    python benchmarks/fused.py --tokens 256 --hidden 896 --target-hidden 3584 --vocab 151936 --repeats 2

The products alone (model and target heads forward, two products backward, into buffers made once) are timed at every
chunk size, and the *fastest* is what every divergence is compared with. Each time is the least of the repeats, and the
sides take turns, so that a busy moment of the machine meets both.
"""

from __future__ import annotations

import argparse
import ctypes
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from leibler import divergence
from leibler.divergence import Entropy, JensenShannon, ReverseKL, SampledLogProb
from leibler.fused import Linear, TargetRows, Want, functionals, linear_divergence, one_pass
from leibler.fused.blocks import CHUNKS


@dataclass(frozen=True)
class Problem:
    model: Linear
    target: Linear

    @classmethod
    def make(cls, tokens: int, hidden: int, target_hidden: int, vocab: int, dtype: torch.dtype) -> Problem:
        g = torch.Generator().manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g) * scale).to(dtype)

        model = Linear(
            normal(tokens, hidden).requires_grad_(), normal(vocab, hidden, scale=hidden**-0.5).requires_grad_()
        )
        return cls(
            model, Linear(normal(tokens, target_hidden), normal(vocab, target_hidden, scale=target_hidden**-0.5))
        )


def products(problem: Problem, chunk: int) -> Callable[[], None]:
    """The four products and nothing else."""
    x, w = problem.model.hidden.detach(), problem.model.weight.detach()
    y, u = problem.target.hidden, problem.target.weight
    n, vocab = x.shape[0], w.shape[0]
    one, two = w.new_empty(chunk, vocab), w.new_empty(chunk, vocab)
    gh, gw = torch.empty_like(x), torch.zeros_like(w)

    def run() -> None:
        gw.zero_()
        for a in range(0, n, chunk):
            b = min(a + chunk, n)
            torch.mm(x[a:b], w.T, out=one[: b - a])
            torch.mm(y[a:b], u.T, out=two[: b - a])
            torch.mm(two[: b - a], w, out=gh[a:b])
            gw.addmm_(one[: b - a].T, x[a:b])

    return run


def fused(problem: Problem, d: divergence.Divergence) -> Callable[[], None]:
    def run() -> None:
        m, t = problem.model, problem.target
        m.hidden.grad = m.weight.grad = None
        linear_divergence(m.hidden, m.weight, t.hidden, t.weight, d).backward()

    return run


def four_terms(problem: Problem, coupled: bool) -> Callable[[], None]:
    """A PPO-clip surrogate, an entropy bonus and two divergences, in one pass or as a coupled loss."""
    n, vocab = problem.model.tokens, problem.model.vocab
    token = torch.arange(n) % vocab
    advantage = torch.linspace(-1, 1, n)
    wants = [Want(SampledLogProb()), Want(Entropy()), Want(ReverseKL(), 0), Want(JensenShannon(), 0)]
    target = TargetRows((problem.target,))

    def loss(values: Tensor, index: Tensor) -> Tensor:
        lp, h, kl, js = values
        ratio = (lp - lp.detach()).exp()
        a = advantage[index]
        return (-torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a) - 0.01 * h + 0.1 * kl + 0.1 * js) / n

    def run() -> None:
        problem.model.hidden.grad = problem.model.weight.grad = None
        if coupled:
            values = functionals(problem.model, wants, [target], token=token)
            loss(values, torch.arange(n)).sum().backward()
        else:
            one_pass(problem.model, wants, [target], loss, token=token)[0].backward()

    return run


def least(runs: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float]) -> dict[str, float]:
    """The least time of each, taking turns."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = clock()
            run()
            best[name] = min(best[name], clock() - start)
    return best


def peak_megabytes(run: Callable[[], None]) -> float | None:
    """Resident memory at its highest during ``run``, less what was resident before (Linux only)."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(field: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else memory freed by an earlier run hides what this one takes
        before = read("VmRSS")
        clear.write_text("5")  # resets the high-water mark
        run()
        return read("VmHWM") - before
    except OSError:
        return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--target-hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=16384)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: as many as torch likes")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu, with --threads 1: a busy machine"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", nargs="*", help="names of divergences (default: all)")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    problem = Problem.make(args.tokens, args.hidden, args.target_hidden, args.vocab, getattr(torch, args.dtype))
    print(
        f"{args.tokens} tokens, hidden {args.hidden} (target {args.target_hidden}), vocabulary {args.vocab}, "
        f"{args.dtype}, {torch.get_num_threads()} threads, {args.clock} time, torch {torch.__version__}"
    )
    sizes = [c for c in CHUNKS if c <= args.tokens] or [args.tokens]
    alone = {f"products, chunks of {c}": products(problem, c) for c in sizes}
    chosen = args.only or divergence.names()
    ours = {name: fused(problem, divergence.get(name)) for name in chosen}
    if not args.only:
        ours["4 functionals, one pass"] = four_terms(problem, coupled=False)
        ours["4 functionals, coupled"] = four_terms(problem, coupled=True)
    for run in (*alone.values(), *ours.values()):
        run()
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    best = least(alone | ours, args.repeats, clock)
    limit = min(best[name] for name in alone)
    print(f"{'':32}{'seconds':>10}{'ratio':>8}{'peak MB':>10}")
    for name in best:
        peak = peak_megabytes(ours[name]) if name in ours else None
        print(f"{name:32}{best[name]:10.4f}{best[name] / limit:8.2f}{'' if peak is None else f'{peak:10.0f}'}")
    gradient = args.vocab * args.hidden * 4 / 2**20
    print(f"the head's gradient alone is {gradient:.0f} MB; all logits of both sides would be "
          f"{2 * args.tokens * args.vocab * 4 / 2**20:.0f} MB")  # fmt: skip
    print(f"highest resident memory of the process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    sys.exit(main())
