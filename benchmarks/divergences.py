"""A divergence between two language-model heads, four ways: seconds and memory of forward and backward pass.

    python benchmarks/divergences.py [--threads 2] [--repeats 3]     # both sizes; --quick for a minute
    python benchmarks/divergences.py --threads 1                     # processor time: for a busy machine

From the last hidden states and the heads of student and teacher, to the gradients of the student's hidden states and
head, averaged over tokens:

- **plain**: the logits of all tokens, log-softmax, the formula, autograd;
- **TRL**: the logits of all tokens, then ``generalized_jsd_loss`` of its GKD trainer (Jensen-Shannon only);
- **Liger**: its chunked ``LigerFusedLinearJSDLoss``, with no weight on labels (Jensen-Shannon only; it also computes
  their cross-entropy);
- **Leibler**: ``leibler.fused.linear_divergence``.

Each time is the least of the repeats, in an order drawn anew; the fastest matrix products alone (two heads forward, two
products backward) say what none of them can go below. Peak is resident memory beyond what was held before. The values
of all sides are compared first, so that nothing else is timed than the same number.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import _clock as shared
from fused import QUICK, SIZES, Problem, least, peak_megabytes, products
from leibler.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL
from leibler.fused import linear_divergence
from leibler.fused.blocks import CHUNKS

Side = Callable[[Problem], Tensor]
"""The mean divergence over the tokens, with its graph."""


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def jensen_shannon(logp: Tensor, logq: Tensor) -> Tensor:
    middle = torch.stack([logp, logq]).logsumexp(0) - torch.log(torch.tensor(2.0))
    return (kl(logp, middle) + kl(logq, middle)) / 2


FORMULAS: dict[str, tuple[Divergence, Callable[[Tensor, Tensor], Tensor]]] = {
    "jensen_shannon": (JensenShannon(), jensen_shannon),
    "forward_kl": (ForwardKL(), lambda logp, logq: kl(logq, logp)),
    "reverse_kl": (ReverseKL(), kl),
}


def logits(problem: Problem) -> tuple[Tensor, Tensor]:
    m, t = problem.model, problem.target
    return m.hidden @ m.weight.T, t.hidden @ t.weight.T


def plain(formula: Callable[[Tensor, Tensor], Tensor]) -> Side:
    def side(problem: Problem) -> Tensor:
        student, teacher = logits(problem)
        return formula(student.log_softmax(-1), teacher.log_softmax(-1)).mean()

    return side


def leibler(divergence: Divergence) -> Side:
    def side(problem: Problem) -> Tensor:
        m, t = problem.model, problem.target
        return linear_divergence(m.hidden, m.weight, t.hidden, t.weight, divergence)

    return side


def trl() -> Side:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.gkd import GKDTrainer

    def side(problem: Problem) -> Tensor:
        student, teacher = logits(problem)
        # It divides by the first dimension: one batch row for each token makes that the mean over tokens.
        return GKDTrainer.generalized_jsd_loss(student[:, None], teacher[:, None], beta=0.5)

    return side


def liger() -> Side:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    # Compiling takes longer than all repeats on a processor, and there is nothing to fuse into.
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5, compiled=False)

    def side(problem: Problem) -> Tensor:
        m, t = problem.model, problem.target
        labels = torch.zeros(m.tokens, dtype=torch.long)
        return loss(m.hidden, m.weight, t.hidden, t.weight, labels)

    return side


def peers() -> dict[str, Side]:
    """TRL and Liger, or one line for each that is not there."""
    found: dict[str, Side] = {}
    for name, package, make in (("TRL", "trl", trl), ("Liger", "liger-kernel", liger)):
        try:
            found[name] = make()
        except ImportError as error:
            print(f"{name} is left out ({error}): pip install 'leibler[bench]' installs {package}")
    return found


def backward(problem: Problem, side: Side) -> Callable[[], None]:
    def run() -> None:
        problem.model.hidden.grad = problem.model.weight.grad = None
        side(problem).backward()

    return run


def table(problem: Problem, others: dict[str, Side], repeats: int, clock: Callable[[], float]) -> None:
    model, target = problem.model, problem.target
    print(
        f"\n{model.tokens} tokens, hidden {model.hidden.shape[1]} (target {target.hidden.shape[1]}), vocabulary "
        f"{model.vocab}, {model.weight.dtype}"
    )
    chunks = [c for c in CHUNKS if c <= model.tokens] or [model.tokens]
    alone = least({str(c): products(problem, c) for c in chunks}, repeats, clock)
    limit = min(alone.values())
    print(f"{'':16}{'':10}{'value':>10}{'seconds':>9}{'/ products':>11}{'peak MB':>9}")
    print(f"{'products alone':36}{limit:9.3f}{1.0:11.2f}")
    for name, (divergence, formula) in FORMULAS.items():
        sides = {
            "plain": plain(formula),
            **(others if name == "jensen_shannon" else {}),
            "Leibler": leibler(divergence),
        }
        values = {who: float(side(problem).detach()) for who, side in sides.items()}
        best = least({who: backward(problem, side) for who, side in sides.items()}, repeats, clock)
        for who, side in sides.items():
            peak = peak_megabytes(backward(problem, side))
            memory = "" if peak is None else f"{peak:9.0f}"
            print(f"{name:16}{who:10}{values[who]:10.5f}{best[who]:9.3f}{best[who] / limit:11.2f}{memory}", flush=True)
        if max(values.values()) - min(values.values()) > 1e-3 * max(values.values()):
            raise SystemExit(f"the sides do not compute the same {name}: {values}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = shared.options(__doc__, repeats=3)
    parser.set_defaults(threads=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="one small size, in under a minute")
    args = parser.parse_args(argv)
    clock = shared.started(args, "trl", "liger-kernel")
    others = peers()
    for size in QUICK if args.quick else SIZES:
        table(Problem.make(*size, torch.float32), others, args.repeats, clock)


if __name__ == "__main__":
    sys.exit(main())
