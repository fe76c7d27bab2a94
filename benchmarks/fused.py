"""What the fused pass costs beyond the matrix products that it cannot avoid, side by side in one run.

    python benchmarks/fused.py [--threads 2] [--repeats 3]        # both sizes; --quick for a minute
    python benchmarks/fused.py --threads 1                        # processor time: for a busy machine
    python benchmarks/fused.py --tokens 512 --hidden 512 --target-hidden 1024 --vocab 32000 --only reverse_kl

The products alone (model and target heads forward, two products backward, into buffers made once) are timed at every
chunk size, and the *fastest* is what every row is divided by. Forward and backward pass together, with the gradients of
hidden states and head; each time is the least of the repeats, whose order is drawn anew, so that neither a busy moment
nor a place in the order meets one side alone. "Limit" is the head's gradient in float32 (of a frozen head none, of an
adapter its own) plus one chunk of both logits; peak is the resident memory beyond what was held before.
Rows of less work than the products say what they are to be compared with.
"""

from __future__ import annotations

import ctypes
import gc
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import _clock as shared
from leibler import divergence
from leibler.divergence import Entropy, JensenShannon, ReverseKL, RowFunction, SampledLogProb, SumForm
from leibler.fused import Linear, LowRank, TargetRows, Want, functionals, linear_divergence, one_pass
from leibler.fused.blocks import CHUNKS, chunk_tokens

SIZES = ((1024, 512, 1024, 32768), (256, 896, 3584, 151936))
QUICK = ((512, 256, 512, 16384),)
RANK = 16
LONGER = "reverse_kl, 4 times the tokens (4.0)"
FROZEN = "reverse_kl, head frozen"
ADAPTED = f"{FROZEN}, adapter of rank {RANK}"


@dataclass(frozen=True)
class Problem:
    model: Linear
    target: Linear

    @classmethod
    def make(
        cls, tokens: int, hidden: int, target_hidden: int, vocab: int, dtype: torch.dtype, device: str = "cpu"
    ) -> Problem:
        g = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g, device=device) * scale).to(dtype)

        model = Linear(
            normal(tokens, hidden).requires_grad_(), normal(vocab, hidden, scale=hidden**-0.5).requires_grad_()
        )
        return cls(
            model, Linear(normal(tokens, target_hidden), normal(vocab, target_hidden, scale=target_hidden**-0.5))
        )


def products(problem: Problem, chunk: int) -> Callable[[], None]:
    """The four products and nothing else, into buffers made once."""
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


def fused(problem: Problem, d: divergence.Divergence, **options: Any) -> Callable[[], None]:
    def run() -> None:
        m, t = problem.model, problem.target
        m.hidden.grad = m.weight.grad = None
        linear_divergence(m.hidden, m.weight, t.hidden, t.weight, d, **options).backward()

    return run


def own_function(logp: Tensor, logq: Tensor) -> Tensor:
    """A reverse KL as a user would write it; differentiated by autograd."""
    return (logp.exp() * (logp - logq)).sum(-1)


class OwnSums(SumForm):
    """The same, stated as a sum and its derivative."""

    def summands(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        return (logp.exp() * (logp - logq),)

    def derivatives(self, logp: Tensor, logq: Tensor, prelude: Any) -> tuple[Tensor, ...]:
        return (logp.exp() * (logp - logq + 1),)

    def combine(self, sums: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
        return sums[0], (torch.ones_like(sums[0]),)


def variations(problem: Problem) -> dict[str, Callable[[], None]]:
    """ReverseKL with weights, a temperature, a mask, a frozen head, an adapter on the head, more tokens."""
    d, n = ReverseKL(), problem.model.tokens
    model = problem.model
    frozen = replace(problem, model=replace(model, weight=model.weight.detach()))
    g = torch.Generator().manual_seed(1)
    factors = (torch.randn(n, RANK, generator=g), torch.randn(model.vocab, RANK, generator=g) * 0.01)
    adapted = replace(frozen.model, low_rank=(LowRank(*(f.to(model.hidden.dtype).requires_grad_() for f in factors)),))
    target = TargetRows((problem.target,))

    def adapter() -> None:
        model.hidden.grad = None
        for pair in adapted.low_rank:
            pair.hidden.grad = pair.weight.grad = None
        one_pass(adapted, [Want(d, 0)], [target], lambda values, index: values[0] / n)[0].backward()

    longer = Problem(
        replace(model, hidden=model.hidden.detach().repeat(4, 1).requires_grad_()),
        replace(problem.target, hidden=problem.target.hidden.repeat(4, 1)),
    )
    return {
        "reverse_kl, token weights, temperature 0.7": fused(
            problem, d, temperature=0.7, weight=torch.rand(n, generator=g) + 0.5
        ),
        "reverse_kl, 1/2 of the tokens masked (0.5)": fused(problem, d, weight=torch.arange(n) % 2 == 0),
        FROZEN: fused(frozen, d),
        ADAPTED: adapter,
        LONGER: fused(longer, d),
    }


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
    """The least time of each, after one run to warm up, in an order drawn anew for each repeat."""
    for run in runs.values():
        run()
    best, order, draw = dict.fromkeys(runs, float("inf")), list(runs), random.Random(0)
    for _ in range(repeats):
        draw.shuffle(order)
        for name in order:
            start = clock()
            runs[name]()
            best[name] = min(best[name], clock() - start)
    return best


def peak_megabytes(run: Callable[[], None]) -> float | None:
    """Resident memory at its highest during ``run``, less what was resident before (Linux only)."""
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(field: str) -> float:
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) / 1024

    # What an earlier run left, gradients above all, would hide what this one takes.
    for held in gc.get_objects():
        if issubclass(type(held), Tensor) and held.is_leaf:  # isinstance would ask lazy modules for their class
            held.grad = None
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        before = read("VmRSS")
        clear.write_text("5")  # resets the high-water mark
        run()
        return read("VmHWM") - before
    except OSError:
        return None


def memory_limit(problem: Problem, name: str = "") -> tuple[float, float, int]:
    """MB of the head's gradient in a row of the table and of one chunk of both logits, and the tokens of a chunk."""
    model = problem.model
    vocab, hidden = model.vocab, model.hidden.shape[1]
    chunk = min(model.tokens * (4 if name == LONGER else 1), chunk_tokens(vocab, hidden, 2))
    width = {FROZEN: 0, ADAPTED: RANK}.get(name, hidden)
    # Gradients are summed over chunks in float32, whatever the logits are in.
    return 4 * width * vocab / 2**20, 2 * chunk * vocab * model.weight.dtype.itemsize / 2**20, chunk


def table(problem: Problem, only: Sequence[str], repeats: int, clock: Callable[[], float]) -> None:
    """Every row at one size."""
    model, target = problem.model, problem.target
    tokens, vocab, hidden = model.tokens, model.vocab, model.hidden.shape[1]
    dtype = model.weight.dtype
    print(f"\n{tokens} tokens, hidden {hidden} (target {target.hidden.shape[1]}), vocabulary {vocab}, {dtype}")
    alone = {f"products, chunks of {c}": products(problem, c) for c in ([c for c in CHUNKS if c <= tokens] or [tokens])}
    ours = {name: fused(problem, divergence.get(name)) for name in only or divergence.names()}
    if not only:
        ours |= {
            "own function of a row, by autograd": fused(problem, RowFunction(own_function)),
            "own sums and derivatives": fused(problem, OwnSums()),
            "4 functionals, one pass": four_terms(problem, coupled=False),
            "4 functionals, coupled": four_terms(problem, coupled=True),
            **variations(problem),
        }
    best = least(alone | ours, repeats, clock)
    limit = min(best[name] for name in alone)

    print(f"{'':46}{'seconds':>9}{'ratio':>7}{'peak MB':>9}{'/ limit':>9}")
    for name, seconds in best.items():
        line = f"{name:46}{seconds:9.3f}{seconds / limit:7.2f}"
        if name in ours and (peak := peak_megabytes(ours[name])) is not None:
            gradient, chunks, _ = memory_limit(problem, name)
            line += f"{peak:9.0f}{peak / (gradient + chunks):9.2f}"
        print(line, flush=True)
    gradient, chunks, chunk = memory_limit(problem)
    whole = 2 * tokens * vocab * dtype.itemsize / 2**20
    print(
        f"limit of memory: {gradient:.0f} MB (gradient of the head) + {chunks:.0f} MB (logits of {chunk} tokens, both "
        f"sides); the logits of all tokens are {whole:.0f} MB"
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = shared.options(__doc__, repeats=3)
    parser.set_defaults(threads=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one small size, in under a minute")
    for name in ("tokens", "hidden", "target-hidden", "vocab"):
        parser.add_argument(f"--{name}", type=int, help="a size of your own: give all four")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--only", nargs="*", default=(), help="names of divergences (default: all, and more rows)")
    args = parser.parse_args(argv)
    own = (args.tokens, args.hidden, args.target_hidden, args.vocab)
    if any(own) and not all(own):
        parser.error("--tokens, --hidden, --target-hidden and --vocab belong together: give all four")
    unknown = sorted(set(args.only) - set(divergence.names()))
    if unknown:
        parser.error(f"no divergence is called {unknown[0]!r}: choose from {', '.join(divergence.names())}")
    clock = shared.started(args)
    for size in [own] if all(own) else QUICK if args.quick else SIZES:
        table(Problem.make(*size, getattr(torch, args.dtype)), args.only, args.repeats, clock)


if __name__ == "__main__":
    sys.exit(main())
