"""The two kernels of a pass, launched for one chunk of tokens at a time."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from leibler.divergence.rows import LOG2E, OUTSIDE
from leibler.fused.blocks import Side, product_dtype
from leibler.fused.operands import Linear, TargetRows, Want

if TYPE_CHECKING:
    from leibler.fused.gpu.generate import Program

CHUNKS = (4096, 2048, 1024, 512, 256)


def usable(device: torch.device) -> bool:
    """Whether kernels can run there: a GPU, and Triton installed.

    Examples:
        >>> usable(torch.device("cpu"))
        False
    """
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def program_for(model: Linear, wants: Sequence[Want], targets: Sequence[Any], token: bool) -> Program | None:
    """The kernels of a pass, or None where PyTorch has to do it.

    That is: no GPU, no Triton, float64 operands, a functional without a form (one that sorts its row, or a function of
    the whole row), a target that is an expression over several rows or lives in another vocabulary.
    """
    device = model.weight.device
    if not usable(device):
        return None
    if not all(isinstance(t, TargetRows) and t.combine is None for t in targets):
        return None
    heads = [model, *(t.leaves[0] for t in targets)]
    if any(t.dtype == torch.float64 for head in heads for t in (head.hidden, head.weight)):
        return None
    # Imported here: the tracer behind it takes a second that nobody without a GPU should pay.
    from leibler.fused.gpu.generate import Layout, program

    biased = tuple(head.bias is not None for head in heads)
    return program(Layout(tuple((w.functional, w.target) for w in wants), biased, token))


def kernel_chunk(model: Linear, heads: int) -> int:
    """Tokens per matrix product on a GPU: the largest whose logits fit 1 GB, or what the head's gradient takes anyway.

    A GPU wants larger products than a processor, and every chunk reads and writes the head's gradient once more.

    Examples:
        >>> kernel_chunk(Linear(torch.zeros(1, 2), torch.zeros(1000, 2)), heads=2)
        4096
    """
    budget = max(2**30, 4 * model.weight.numel())
    row = heads * model.vocab * product_dtype(model.weight).itemsize
    return next((chunk for chunk in CHUNKS if chunk * row <= budget), CHUNKS[-1])


class Kernels:
    """Buffers of numbers between the kernels, for chunks of at most ``chunk`` tokens.

    Args:
        program: what to run.
        sides: the model's side, then that of each target.
        vocab: entries to read.
        token: the sampled tokens of the whole pass, if any functional reads them.
    """

    def __init__(
        self, program: Program, sides: Sequence[Side], vocab: int, chunk: int, token: Int[Tensor, " n"] | None
    ) -> None:
        self.program, self.sides, self.vocab, self.token = program, tuple(sides), vocab, token
        logits = sides[0].logits
        self.stats = logits.new_empty(program.stats, chunk, dtype=torch.float32)
        self.sums = logits.new_empty(program.sums[-1].stop, chunk, dtype=torch.float32)
        self.numbers = logits.new_zeros(max(1, program.numbers[-1].stop), chunk, dtype=torch.float32)
        self.units = logits.new_empty(len(program.forms), chunk, dtype=torch.float32)
        self.chunk = chunk

    def values(self, start: int, stop: int) -> Float[Tensor, "wants m"]:
        """Values of tokens ``start`` to ``stop``, whose logits are in the sides' buffers."""
        program, count = self.program, stop - start
        self._launch(program.kernels.values, start, count, self.stats, self.sums)
        out = []
        for k, form in enumerate(program.forms):
            sums = tuple(self.sums[j, :count] for j in program.sums[k])
            value, numbers = form.finish(self._facts(k, count), sums)
            for j, number in zip(program.numbers[k], numbers, strict=True):
                self.numbers[j, :count] = number
            out.append(value.masked_fill(value >= form.ceiling, torch.inf))
        return torch.stack(out)

    def gradient(self, start: int, unit: Float[Tensor, "wants m"]) -> None:
        """The sum over the wants of ``unit`` times their gradients, in place of the model's logits."""
        count = unit.shape[1]
        self.units[:, :count] = unit
        self._launch(self.program.kernels.gradient, start, count, self.stats, self.numbers, self.units)

    def add_column_sums(self, out: Float[Tensor, " vocab"], factor: Float[Tensor, " m"]) -> None:
        """Add the sums of the gradient's columns, each row times its factor, to ``out``."""
        from leibler.fused.gpu.generate import BLOCK

        kernel: Any = self.program.kernels.add_column_sums
        logits, tiles = self.sides[0].logits, -(-self.vocab // BLOCK)
        with self._device():
            kernel[(tiles,)](out, logits, factor, factor.shape[0], self.vocab, logits.stride(0), BLOCK=BLOCK)

    def _facts(self, k: int, count: int) -> Any:
        from leibler.fused.gpu.forms import Facts
        from leibler.fused.gpu.generate import stat

        first, form = self.program.powers[k], self.program.forms[k]
        powers = tuple(self.stats[first + j, :count] for j in range(len(form.powers)))
        target = self.program.layout.wants[k][1]
        if target is None:
            never = torch.zeros(count, dtype=torch.bool, device=self.stats.device)
            return Facts(powers, never, never)
        least, most = (self.stats[stat(target, which), :count] for which in ("least", "most"))
        return Facts(powers, model_lacks=least < OUTSIDE, target_lacks=most > -OUTSIDE)

    def _launch(self, kernel: Any, start: int, count: int, *buffers: Tensor) -> None:
        from leibler.fused.gpu.generate import BLOCK, WARPS

        operands: list[Any] = []
        for side in self.sides:
            # Products in float32 carry base 2 and temperature already; others are scaled as they are read.
            scale = 1.0 if side.wide is None else LOG2E / side.temperature
            bias = side.logits if side.bias is None else side.bias
            operands += [side.logits, bias, side.logits.stride(0), scale]
        token = buffers[0] if self.token is None else self.token[start:]
        with self._device():
            kernel[(count,)](*operands, token, *buffers, self.chunk, self.vocab, BLOCK=BLOCK, num_warps=WARPS)

    def _device(self) -> contextlib.AbstractContextManager[Any]:
        device = self.stats.device
        return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
