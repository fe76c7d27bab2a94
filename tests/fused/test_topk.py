from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch

from fused.helpers import assert_close, dense_logp, heads
from fused.test_coarse import direct
from leibler.divergence import ReverseKL
from leibler.errors import ModelError
from leibler.fused import Linear, TopK, Want, functionals, top_k
from leibler.fused import sweep as sweep_module
from leibler.fused.gpu.generate import Layout, program
from leibler.fused.topk import _Largest


@pytest.mark.parametrize("k", [1, 4, 13])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_top_k_equals_sorting_dense_rows(
    k: int, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "chunk_tokens", lambda *a, **k: 7)
    monkeypatch.setattr(sweep_module, "block_rows", lambda *a, **k: 3)
    model, _, label = heads(dtype=dtype, vocab=17)
    lp = dense_logp(model, 13)
    label = label % 13
    kept, logp = top_k(model, k, token=label, vocab=13)
    assert isinstance(kept.law, TopK)
    assert kept.token.dtype == torch.int32
    token = kept.token.long()
    ordered = lp.sort(dim=-1, descending=True).values
    assert_close(kept.law.logp, ordered[:, :k], tolerance)
    assert_close(kept.law.logp, lp.gather(1, token), tolerance)
    if k == 13:
        assert bool((kept.law.rest == -math.inf).all())
    else:
        assert_close(kept.law.rest, ordered[:, k:].logsumexp(-1), tolerance)
    assert logp is not None
    assert_close(logp, lp.gather(1, label[:, None])[:, 0], tolerance)
    assert kept.law.temperature == model.temperature


def test_the_rest_of_a_peaked_row_keeps_its_digits() -> None:
    logits = torch.zeros(1, 6)
    logits[0, 2] = 80.0
    kept, _ = top_k(direct(logits), 1)
    assert isinstance(kept.law, TopK)
    assert torch.allclose(kept.law.rest, torch.tensor([math.log(5) - 80]), rtol=1e-6)


def test_entries_outside_the_support_are_kept_last_and_weigh_nothing() -> None:
    model, _, _ = heads()
    assert model.bias is not None
    with torch.no_grad():
        model.bias[[2, 7, 8]] = -math.inf
    kept, _ = top_k(model, 11)
    assert isinstance(kept.law, TopK)
    assert bool((kept.law.logp[:, 10] == -math.inf).all())
    assert bool((kept.law.rest == -math.inf).all())
    assert bool(torch.isfinite(kept.law.logp[:, :10]).all())
    (kl,) = functionals(model, [Want(ReverseKL(), 0)], [kept])
    assert kl.abs().max() < 1e-12


def test_no_rows_and_k_out_of_range() -> None:
    model, _, _ = heads(n=4)
    empty = Linear(model.hidden[:0], model.weight, model.bias, model.temperature)
    kept, logp = top_k(empty, 3)
    assert list(kept.token.shape) == [0, 3]
    assert logp is None
    for k in (0, 14):
        with pytest.raises(ModelError, match="between 1 and 13"):
            top_k(model, k)


def test_no_cache_of_kernels_keeps_the_rows_alive() -> None:
    found = _Largest(1)
    found.logp.append(torch.zeros(3))
    row = weakref.ref(found.logp[0])
    assert program(Layout(((found, None),), (False,), token=False)) is None
    del found
    gc.collect()
    assert row() is None
