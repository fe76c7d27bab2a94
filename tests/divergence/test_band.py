"""The KL on a band of the target: brute force, the least mass, the bucket, hostile rows, the label, other targets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from divergence.test_hostile import ROWS
from leibler.divergence import BandKL, ForwardKL, get
from leibler.errors import RecipeError
from leibler.fused import Coarse, Linear, TargetRows, TopK, Want, functionals

INF = math.inf


def chosen(divergence: BandKL, model: Tensor, target: Tensor, label: int | None = None) -> list[int]:
    """M, entry by entry."""
    entries = [v for v in range(len(target)) if target[v] > -INF or model[v] > -INF]
    rising = sorted(entries, key=lambda v: float(target[v]))
    last = len(entries) - 1
    low = float(target[rising[math.floor(divergence.lower * last)]])
    high = float(target[rising[math.ceil(divergence.upper * last)]])
    kept = {v for v in entries if low <= float(target[v]) <= high} | ({label} if label is not None else set())
    q = target.softmax(-1)
    for value in sorted({float(target[v]) for v in entries if v not in kept}, reverse=True):
        if sum(float(q[v]) for v in kept) >= divergence.least_mass:
            break
        kept |= {v for v in entries if float(target[v]) == value}
    return sorted(kept)


def brute(divergence: BandKL, model: Tensor, target: Tensor, label: int | None = None) -> Tensor:
    model, target = model.double(), target.double()
    inside = torch.tensor(chosen(divergence, model.detach(), target, label))
    logp, logq = model.log_softmax(-1), target.log_softmax(-1)
    if divergence.tail == "bucket":
        rest = torch.ones(len(model), dtype=torch.bool)
        rest[inside] = False
        logp, logq = (torch.cat([x[inside], x[rest].logsumexp(-1, keepdim=True)]) for x in (logp, logq))
    else:
        logp, logq = (x[inside].log_softmax(-1).nan_to_num(nan=-INF, neginf=-INF) for x in (logp, logq))
    q = logq.exp()
    return torch.where(q > 0, q * (torch.where(q > 0, logq, 0.0) - torch.where(q > 0, logp, 0.0)), 0.0).sum()


def random(seed: int, vocab: int = 12, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    model, target = scale * torch.randn(2, vocab, generator=g, dtype=torch.float64)
    return model, target


bands = st.builds(
    lambda ends, mass, tail: BandKL(min(ends), max(ends), mass, tail),
    st.tuples(st.floats(0, 1), st.floats(0, 1)),
    st.sampled_from([1e-9, 0.3, 0.77, 0.9]),
    st.sampled_from(["renormalise", "bucket"]),
)


@settings(max_examples=60)
@given(bands, st.integers(0, 10_000), st.integers(2, 30))
def test_value_and_gradient_are_those_of_the_definition(divergence: BandKL, seed: int, vocab: int):
    model, target = random(seed, vocab)
    model.requires_grad_()
    found, expected = divergence(model, target), brute(divergence, model, target)
    assert found.item() == pytest.approx(expected.item(), rel=1e-9, abs=1e-12)
    one, two = (torch.autograd.grad(x, model)[0] for x in (found, expected))
    torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


@settings(max_examples=30)
@given(bands, st.integers(0, 10_000))
def test_equal_entries_go_together_and_their_order_does_not_matter(divergence: BandKL, seed: int):
    model, target = random(seed)
    target = target.round()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    assert divergence(model, target).item() == pytest.approx(
        brute(divergence, model, target).item(), rel=1e-9, abs=1e-12
    )
    assert divergence(model[order], target[order]).item() == pytest.approx(divergence(model, target).item(), abs=1e-12)


@settings(max_examples=40)
@given(bands, st.integers(0, 10_000))
def test_a_bucket_sees_at_most_what_the_forward_kl_sees(divergence: BandKL, seed: int):
    model, target = random(seed)
    bucket = BandKL(divergence.lower, divergence.upper, divergence.least_mass, "bucket")
    whole = ForwardKL()(model, target).item()
    assert -1e-12 <= bucket(model, target).item() <= whole + 1e-12
    inside = torch.zeros(12, dtype=torch.bool)
    inside[chosen(bucket, model, target)] = True
    (p, other_p), (q, other_q) = ((x.softmax(-1)[inside].sum(), x.softmax(-1)[~inside].sum()) for x in (model, target))
    masses = q * (q / p).log() + (other_q * (other_q / other_p).log() if other_q > 0 else 0.0)
    # The chain rule: the inner law, and the mass that is left.
    parts = q * BandKL(bucket.lower, bucket.upper, bucket.least_mass)(model, target) + masses
    assert bucket(model, target).item() == pytest.approx(parts.item(), rel=1e-6, abs=1e-9)


def test_the_whole_vocabulary_is_the_forward_kl():
    for seed in range(20):
        model, target = random(seed, 50)
        model.requires_grad_()
        for tail in ("renormalise", "bucket"):
            ours, theirs = BandKL(0.0, 1.0, 0.5, tail)(model, target), ForwardKL()(model, target)
            assert abs(ours.item() - theirs.item()) < 1e-12
            (one,), (two,) = (torch.autograd.grad(x, model) for x in (ours, theirs))
            torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    model, target = (x.float() for x in random(3))
    target[:2] = -INF  # entries that only the model has are in M too
    assert BandKL(0.0, 1.0)(model, target).item() == pytest.approx(ForwardKL()(model, target).item(), rel=1e-6)


def test_a_band_of_one_entry_is_always_0_and_the_least_mass_forbids_it():
    for seed in range(10):
        model, target = random(seed, scale=1.0)
        model.requires_grad_()
        alone = BandKL(1.0, 1.0, least_mass=1e-9)(model, target)
        alone.backward()
        assert abs(alone.item()) < 1e-15
        assert model.grad.abs().max() < 1e-15
        assert BandKL(1.0, 1.0, least_mass=0.9)(model, target).item() > 1e-3


def test_renormalising_leaves_the_tail_alone_and_a_bucket_does_not():
    model, target = random(5, 40)
    outside = torch.ones(40, dtype=torch.bool)
    outside[chosen(BandKL(), model, target)] = False
    grown = model + 5.0 * outside  # more mass in the tail
    for tail, sees in (("renormalise", False), ("bucket", True)):
        leaf = grown.clone().requires_grad_()
        value = BandKL(tail=tail)(leaf, target)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert (gradient[outside].abs().max().item() > 1e-3) == sees
        assert (abs(value.item() - BandKL(tail=tail)(model, target).item()) > 1e-3) == sees


@pytest.mark.parametrize(
    "divergence", [BandKL(), BandKL(0.2, 0.8, 0.5), BandKL(tail="bucket"), BandKL(0.5, 0.6, 0.3, "bucket")]
)
def test_hostile_rows(divergence: BandKL):
    for name, (model, target) in ROWS.items():
        leaf = model.clone().requires_grad_()
        value = divergence(leaf, target)
        (gradient,) = torch.autograd.grad(value, leaf)
        wanted = brute(divergence, model, target).item()
        assert gradient.isfinite().all(), name
        if math.isinf(wanted):
            assert value.item() == INF, name
            assert not gradient.any(), name
            continue
        largest = max(row[row > -INF].abs().max().item() for row in (model, target))
        assert value.item() == pytest.approx(wanted, rel=1e-4, abs=1e-6 * largest + 1e-6), name
    together = [torch.stack([pair[side].float() for pair in ROWS.values()]) for side in (0, 1)]
    alone = torch.stack([divergence(a, b) for a, b in zip(*together)])
    torch.testing.assert_close(divergence(*together), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_broken_rows_give_nan_wherever_the_break_is(tail: str):
    model, target = (x.float() for x in random(1, 40))
    for side, what in ((model, torch.nan), (target, torch.nan), (model, INF)):
        for place in (int(target.argmax()), int(target.argmin())):
            broken = side.clone()
            broken[place] = what
            args = (broken, target) if side is model else (model, broken)
            assert BandKL(tail=tail)(*args).isnan()


def test_padding_is_not_counted_among_the_entries():
    model, target = random(2, 30)
    divergence = BandKL(0.5, 0.9, 0.2)
    padded = [torch.nn.functional.pad(x, (3, 20), value=-INF) for x in (model, target)]
    mixed = [
        torch.stack([padded[i], torch.nn.functional.pad(x, (0, 23), value=1.0)]) for i, x in enumerate((model, target))
    ]
    assert divergence(*padded).item() == pytest.approx(divergence(model, target).item(), rel=1e-12)
    assert divergence(*mixed)[0].item() == pytest.approx(divergence(model, target).item(), rel=1e-12)


@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_the_label_is_kept_in_the_fused_pass(tail: str):
    g = torch.Generator().manual_seed(0)
    hidden, weight, other, head = (
        torch.randn(*s, generator=g, dtype=torch.float64) for s in ((9, 5), (40, 5), (9, 4), (40, 4))
    )
    hidden.requires_grad_(), weight.requires_grad_()
    z, y = hidden @ weight.T, other @ head.T
    divergence = BandKL(0.9, 1.0, 0.2, tail)
    token = y.argmin(-1)  # the least likely entry: in no band
    (found,) = functionals(
        Linear(hidden, weight), [Want(divergence, 0)], [TargetRows((Linear(other, head),))], token=token
    )
    expected = torch.stack([brute(divergence, z[i], y[i], int(token[i])) for i in range(9)])
    without = torch.stack([brute(divergence, z[i], y[i]) for i in range(9)])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert (found - without).abs().min() > 1e-6
    for one, two in zip(
        *(torch.autograd.grad(x.square().sum(), (hidden, weight)) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-11)


def test_a_stored_part_of_the_target_is_a_band_of_its_cells():
    model, target = random(4, 20)
    logp, index = target.log_softmax(-1).topk(6)
    rest = (1 - logp.exp().sum()).log()
    head = Linear(torch.ones(1, 1, dtype=torch.float64), model[:, None])
    stored = Coarse(index[None], TopK(logp[None], rest[None]))
    (found,) = functionals(head, [Want(BandKL(0.5, 1.0, 0.5), 0)], [stored], token=torch.tensor([0]))
    others = torch.ones(20, dtype=torch.bool)
    others[index] = False
    cells = [torch.cat([x[index], x[others].logsumexp(-1, keepdim=True)]) for x in (model, target)]
    assert found.item() == pytest.approx(BandKL(0.5, 1.0, 0.5)(*cells).item(), rel=1e-9)


def test_names_and_mistakes():
    assert get("band_kl", lower=0.5, tail="bucket") == BandKL(0.5, tail="bucket")
    for call, says in (
        (lambda: BandKL(0.5, 0.4), "lower <= upper"),
        (lambda: BandKL(-0.1), "0 <= lower"),
        (lambda: BandKL(math.nan), "band of quantiles"),
        (lambda: BandKL(least_mass=0.0), "0 < least_mass"),
        (lambda: BandKL(tail="drop"), "bucket"),  # type: ignore[arg-type]
        (lambda: BandKL().swapped(), "exchanged"),
    ):
        with pytest.raises(RecipeError, match=says):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tail", ["renormalise", "bucket"])
def test_flat_targets_need_many_entries_for_their_mass(dtype: torch.dtype, tail: str):
    g = torch.Generator().manual_seed(3)
    model, target = torch.randn(2, 6, 700, generator=g, dtype=torch.float64)
    target[1], target[2] = target[1].round(), 0.0  # ties, and all equal
    target[3, :5] += 12.0  # one peaked row among them
    divergence = BandKL(0.999, 1.0, 0.8, tail)  # type: ignore[arg-type]
    found = divergence(model.to(dtype), target.to(dtype))
    expected = torch.stack([brute(divergence, m, t) for m, t in zip(model, target)])
    torch.testing.assert_close(found.double(), expected, rtol=1e-9 if dtype == torch.float64 else 1e-3, atol=1e-6)
    assert len(chosen(divergence, model[0], target[0])) > 64 > len(chosen(divergence, model[3], target[3]))
