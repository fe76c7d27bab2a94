"""Laws on rows that no well-behaved model writes: huge, excluded, masked, garbage; in batches of any raggedness."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from divergence.brute import EVERY
from leibler.divergence import Divergence

INF = math.inf
few = settings(max_examples=15)  # times some thirty divergences
each = pytest.mark.parametrize("divergence", EVERY, ids=str)
LOGITS = (-INF, -1e4, -300.0, -1.0, 0.0, 1e-7, 2.5, 88.0, 300.0, 1e4)
SIDES = ("model", "target", "both")
GARBAGE = (math.nan, INF, -INF, 1e38, -1e38)


@st.composite
def batches(draw: st.DrawFn, logits: tuple[float, ...] = LOGITS) -> tuple[Tensor, Tensor]:
    """[rows, vocab] of the model and the target; every row has an entry that is not excluded."""
    rows, vocab = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    shape = (2, rows, vocab)
    values = draw(st.lists(st.sampled_from(logits), min_size=math.prod(shape), max_size=math.prod(shape)))
    made = torch.tensor(values, dtype=torch.float32).reshape(shape)
    made[:, :, 0] = torch.where(made.isneginf().all(-1), 0.0, made[:, :, 0])
    return made[0], made[1]


def graded(divergence: Divergence, model: Tensor, target: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    leaf = model.clone().requires_grad_()
    value = divergence(leaf, target, mask=mask)
    finite = torch.where(value.isfinite(), value, 0.0)
    return value.detach(), torch.autograd.grad(finite.sum(), leaf)[0]


def rounding(*tensors: Tensor) -> float:
    """What single precision may cost: it grows with the largest logit, of which differences are taken."""
    return 1e-6 + 4e-7 * max(float(t[t.isfinite()].abs().max()) for t in tensors)


def near(a: Tensor, b: Tensor, rows: tuple[Tensor, Tensor], size: Tensor | float = 0.0) -> None:
    """Equal but for rounding; ``size``: of the values whose gradients these are, powers of ratios that lose digits."""
    scale = 1.0 + torch.as_tensor(size).nan_to_num(posinf=0.0)
    torch.testing.assert_close(a / scale, b / scale, rtol=1e-5 + 2 * rounding(*rows), atol=2 * rounding(*rows))


@each
@few
@given(rows=batches())
def test_hostile_rows_have_a_value_and_a_finite_gradient(divergence: Divergence, rows: tuple[Tensor, Tensor]) -> None:
    value, gradient = graded(divergence, *rows)
    assert not value.isnan().any()
    assert (value >= 0).all()
    assert gradient.isfinite().all()
    # Of the model's own softmax: what every entry gains, others lose.
    assert (gradient.sum(-1).abs() <= rounding(*rows) * (1.0 + gradient.abs().sum(-1))).all()
    assert (gradient[rows[0].isneginf()] == 0).all(), "an excluded entry cannot move"


@each
@few
@given(rows=batches())
def test_a_batch_is_its_rows_one_by_one(divergence: Divergence, rows: tuple[Tensor, Tensor]) -> None:
    value, gradient = graded(divergence, *rows)
    for n in range(len(value)):
        alone, slope = graded(divergence, rows[0][n : n + 1], rows[1][n : n + 1])
        near(value[n : n + 1], alone, rows)
        near(gradient[n : n + 1], slope, rows, alone[:, None])


@each
@few
@given(
    rows=batches(), garbage=st.sampled_from(GARBAGE), side=st.sampled_from(["model", "target", "both"]), data=st.data()
)
def test_a_masked_row_is_exactly_zero_whatever_it_holds(
    divergence: Divergence, rows: tuple[Tensor, Tensor], garbage: float, side: str, data: st.DataObject
) -> None:
    model, target = (x.clone() for x in rows)
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(model), max_size=len(model))))
    value, gradient = graded(divergence, model, target, keep)
    for name, held in (("model", model), ("target", target)):
        if side in (name, "both"):
            held[~keep] = garbage
    again, slope = graded(divergence, model, target, keep)
    assert (again[~keep] == 0).all()
    assert (slope[~keep] == 0).all()
    assert torch.equal(again[keep], value[keep])
    assert torch.equal(slope[keep], gradient[keep])


@each
@few
@given(rows=batches(), padding=st.integers(1, 3))
def test_entries_excluded_in_both_are_as_if_absent(
    divergence: Divergence, rows: tuple[Tensor, Tensor], padding: int
) -> None:
    model, target = rows
    pad = torch.full((len(model), padding), -INF)
    value, gradient = graded(divergence, model, target)
    wide, slope = graded(divergence, torch.cat([model, pad], -1), torch.cat([target, pad], -1))
    near(wide, value, rows)
    near(slope[:, : model.shape[1]], gradient, rows, value[:, None])
    assert (slope[:, model.shape[1] :] == 0).all()
