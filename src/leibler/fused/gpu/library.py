"""Source of the device functions that generated kernels call, and of the kernel that sums a gradient over its rows.

As text, so that nothing in the package imports Triton. The functions are series because Triton's interpreter knows no
library functions; the series are as accurate as float32.
"""

from __future__ import annotations

SOURCE = """
import triton
import triton.language as tl


@triton.jit
def expm1(x):
    near = tl.minimum(tl.maximum(x, -0.5), 0.5)
    series = near * (1.0 / 9.0) + 1.0
    series = series * near * (1.0 / 8.0) + 1.0
    series = series * near * (1.0 / 7.0) + 1.0
    series = series * near * (1.0 / 6.0) + 1.0
    series = series * near * (1.0 / 5.0) + 1.0
    series = series * near * (1.0 / 4.0) + 1.0
    series = series * near * (1.0 / 3.0) + 1.0
    series = series * near * 0.5 + 1.0
    return tl.where(tl.abs(x) < 0.5, series * near, tl.exp2(x * 1.4426950408889634) - 1.0)


@triton.jit
def log1p(y):
    # log(1 + y) = 2 artanh(y / (2 + y))
    near = tl.minimum(tl.maximum(y, -0.5), 0.5)
    z = near / (near + 2.0)
    square = z * z
    series = square * (1.0 / 13.0) + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    series = series * square + 1.0
    return tl.where(tl.abs(y) <= 0.5, 2.0 * z * series, tl.log2(y + 1.0) * 0.6931471805599453)


@triton.jit
def tanh(x):
    grown = expm1(2.0 * tl.minimum(tl.maximum(x, -15.0), 15.0))
    return grown / (grown + 2.0)


@triton.jit
def sign(x):
    return tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))


@triton.jit
def add_column_sums(out, gradient, factor, rows, vocab, stride, BLOCK: tl.constexpr):
    # out[v] += sum_r factor[r] * gradient[r, v]: one program per tile of the vocabulary, rows in order
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < vocab
    total = tl.zeros((BLOCK,), tl.float32)
    for row in range(rows):
        scale = tl.load(factor + row)
        part = tl.load(gradient + tl.cast(row, tl.int64) * stride + i, mask=valid, other=0.0)
        total += tl.where(scale == 0.0, 0.0, part.to(tl.float32) * scale)
    tl.store(out + i, tl.load(out + i, mask=valid, other=0.0) + total, mask=valid)
"""
