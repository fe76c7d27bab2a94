"""Targets over another vocabulary: both laws pushed forward to common cells, judged by brute force in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from leibler import divergence as divergences
from leibler.divergence import ForwardKL, JensenShannon, ReverseKL
from leibler.errors import ModelError, RecipeError
from leibler.fused import Linear, Merged, TargetRows, VocabularyMap, Want, functionals, one_pass
from leibler.fused import sweep as sweep_module

N, HIDDEN, MODEL, TARGET, CELLS = 7, 5, 13, 17, 6
DTYPE = torch.float64


@pytest.fixture(autouse=True, params=[(1024, 1024), (5, 2)], ids=["whole", "cut"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk, rows = request.param
    monkeypatch.setattr(sweep_module, "chunk_tokens", lambda *a, **k: chunk)
    monkeypatch.setattr(sweep_module, "block_rows", lambda *a, **k: rows)


def normal(*shape: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, dtype=DTYPE, generator=torch.Generator().manual_seed(seed)) * scale


def maps(seed: int, *, left_out: bool = False) -> tuple[VocabularyMap, VocabularyMap]:
    """Random maps in which every cell has an entry on both sides."""
    source = torch.Generator().manual_seed(seed)
    out = []
    for vocab in (MODEL, TARGET):
        more = torch.randint(-1 if left_out else 0, CELLS, (vocab - CELLS,), generator=source)
        cell = torch.cat([torch.arange(CELLS), more])[torch.randperm(vocab, generator=source)]
        out.append(VocabularyMap(cell, CELLS))
    return out[0], out[1]


def brute(logits: torch.Tensor, map: VocabularyMap) -> torch.Tensor:
    """Log-probabilities of the cells, one at a time."""
    kept = logits.masked_fill(map.cell < 0, -torch.inf).log_softmax(-1)
    cells = [kept[:, map.cell == c].logsumexp(-1) for c in range(map.cells)]
    return torch.stack(cells, dim=-1)


def operands(seed: int = 0, scale: float = 1.0) -> tuple[Linear, Linear]:
    model = Linear(
        normal(N, HIDDEN, seed=seed, scale=scale).requires_grad_(),
        normal(MODEL, HIDDEN, seed=seed + 1).requires_grad_(),
        normal(MODEL, seed=seed + 2).requires_grad_(),
    )
    return model, Linear(normal(N, 3, seed=seed + 3, scale=scale), normal(TARGET, 3, seed=seed + 4))


def logits(head: Linear) -> torch.Tensor:
    return torch.nn.functional.linear(head.hidden, head.weight, head.bias)


@pytest.mark.parametrize("name", divergences.names())
@pytest.mark.parametrize("left_out", [False, True])
def test_values_and_gradients_are_those_of_the_pushed_laws(name: str, left_out: bool) -> None:
    divergence = divergences.get(name)
    model, teacher = operands()
    mine, theirs = maps(3, left_out=left_out)
    weight = normal(N, seed=9)
    (values,) = functionals(model, [Want(divergence, 0)], [Merged(mine, TargetRows((teacher,)), theirs)])
    given = (model.hidden, model.weight, model.bias)
    found = torch.autograd.grad(values @ weight, given)
    expected = divergence(brute(logits(model), mine), brute(logits(teacher), theirs))
    judge = torch.autograd.grad(expected @ weight, given)
    torch.testing.assert_close(values, expected, rtol=1e-9, atol=1e-11)
    for here, there in zip(found, judge, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-10)
    if left_out:
        out = mine.cell < 0
        assert bool(out.any())
        assert not found[1][out].any()
        assert not found[2][out].any()


def test_the_single_pass_and_the_two_passes_agree() -> None:
    model, teacher = operands()
    mine, theirs = maps(4)
    target, want = Merged(mine, TargetRows((teacher,)), theirs), [Want(JensenShannon(), 0)]
    total, _ = one_pass(model, want, [target], lambda v, i: v[0] ** 2)
    first = torch.autograd.grad(total, (model.hidden, model.weight))
    second = torch.autograd.grad((functionals(model, want, [target])[0] ** 2).sum(), (model.hidden, model.weight))
    for here, there in zip(first, second, strict=True):
        torch.testing.assert_close(here, there)


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon()])
def test_a_target_with_other_numbers_for_the_same_entries_changes_nothing(divergence) -> None:
    model = Linear(normal(N, HIDDEN, seed=0).float().requires_grad_(), normal(MODEL, HIDDEN, seed=1).float())
    hidden, weight = normal(N, 3, seed=2).float(), normal(MODEL, 3, seed=3).float()
    order = torch.randperm(MODEL, generator=torch.Generator().manual_seed(4))
    plain = functionals(model, [Want(divergence, 0)], [TargetRows((Linear(hidden, weight),))])[0]
    same = VocabularyMap(torch.arange(MODEL), MODEL)
    other = Merged(same, TargetRows((Linear(hidden, weight[order]),)), VocabularyMap(order, MODEL))
    merged = functionals(model, [Want(divergence, 0)], [other])[0]
    torch.testing.assert_close(merged, plain, rtol=1e-6, atol=1e-6)
    one, two = (torch.autograd.grad(v.sum(), model.hidden)[0] for v in (plain, merged))
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def test_padding_rows_of_both_heads_stay_out_and_get_no_gradient() -> None:
    model, teacher = operands()
    mine, theirs = maps(5)
    target = TargetRows((teacher,))
    plain = functionals(model, [Want(ForwardKL(), 0)], [Merged(mine, target, theirs)])[0]
    # Rows that would take all the mass if they counted.
    pad, bias = (
        torch.cat([model.weight.detach(), normal(2, HIDDEN, seed=7)]),
        torch.cat([model.bias, torch.ones(2) * 1e3]),
    )
    wide = Linear(model.hidden.detach(), pad.requires_grad_(), bias.detach().requires_grad_())
    more = torch.cat([teacher.weight, normal(3, 3, seed=8, scale=1e3)])
    padded = Merged(mine, TargetRows((Linear(teacher.hidden, more),)), theirs)
    value = functionals(wide, [Want(ForwardKL(), 0)], [padded], vocab=MODEL)[0]
    torch.testing.assert_close(value, plain)
    by_weight, by_bias = torch.autograd.grad(value.sum(), (wide.weight, wide.bias))
    assert not by_weight[MODEL:].any()
    assert not by_bias[MODEL:].any()
    assert bool(by_weight[:MODEL].any())


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon()])
def test_where_the_target_is_absent_nothing_is_asked(divergence) -> None:
    model, teacher = operands()
    mine, theirs = maps(6)
    present = torch.tensor([True, False, True, True, False, False, True])
    garbage = teacher.hidden.clone()
    garbage[~present] = torch.nan
    target = Merged(mine, TargetRows((Linear(garbage, teacher.weight),)), theirs, present)
    value = functionals(model, [Want(divergence, 0)], [target])[0]
    whole = functionals(model, [Want(divergence, 0)], [Merged(mine, TargetRows((teacher,)), theirs)])[0]
    assert not value[~present].any()
    torch.testing.assert_close(value[present], whole[present])
    gradient = torch.autograd.grad(value.sum(), model.hidden)[0]
    assert not gradient[~present].any()
    torch.testing.assert_close(gradient[present], torch.autograd.grad(whole[present].sum(), model.hidden)[0][present])


def test_a_rare_cell_keeps_its_digits() -> None:
    """Both entries of a cell are e^-200 in their row: far below what a float32 probability holds."""
    z = torch.tensor([[0.0, -200.0, -201.0]])
    cells = VocabularyMap(torch.tensor([0, 1, 1]), 2)
    exact = z.double().log_softmax(-1)[:, 1:].logsumexp(-1)
    assert float(cells(z)[0, 1]) == pytest.approx(float(exact), rel=1e-6)
    beside = torch.cat([z, torch.zeros(1, 1)], dim=1)  # the large one is in a cell of several too
    both = VocabularyMap(torch.tensor([0, 1, 1, 0]), 2)
    exact_beside = beside.double().log_softmax(-1)[:, 1:3].logsumexp(-1)
    pushed = both(beside).log_softmax(-1)
    assert float(pushed[0, 1]) == pytest.approx(float(exact_beside), rel=1e-6)
    model = Linear(torch.ones(1, 1), z.T.clone().requires_grad_())
    even = TargetRows((Linear(torch.ones(1, 1), torch.zeros(2, 1)),))
    kl = functionals(model, [Want(ForwardKL(), 0)], [Merged(cells, even, VocabularyMap(torch.arange(2), 2))])[0]
    expected = float(-torch.log(torch.tensor(2.0)) - exact / 2)
    assert float(kl[0].detach()) == pytest.approx(expected, rel=1e-5)
    kl.sum().backward()
    assert model.weight.grad is not None
    share = torch.softmax(torch.tensor([0.0, -1.0]), 0)
    torch.testing.assert_close(model.weight.grad[1:, 0], -0.5 * share, rtol=1e-4, atol=1e-6)


def test_a_cell_outside_the_model_is_infinite_where_the_mathematics_says_so() -> None:
    model = Linear(torch.ones(1, 1), torch.zeros(3, 1, requires_grad=True), torch.tensor([0.0, -torch.inf, -torch.inf]))
    mine = VocabularyMap(torch.tensor([0, 1, 1]), 2)
    law, theirs = TargetRows((Linear(torch.ones(1, 1), torch.zeros(2, 1)),)), VocabularyMap(torch.arange(2), 2)
    values = functionals(model, [Want(ForwardKL(), 0), Want(ReverseKL(), 0)], [Merged(mine, law, theirs)])
    assert values[0, 0] == torch.inf
    assert float(values[1, 0]) == pytest.approx(float(torch.log(torch.tensor(2.0))), rel=1e-6)
    gradient = torch.autograd.grad(values[1, 0], model.weight)[0]
    assert bool(torch.isfinite(gradient).all())


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10_000), st.sampled_from(["forward_kl", "reverse_kl", "jensen_shannon", "total_variation"]))
def test_merging_never_raises_an_f_divergence(seed: int, name: str) -> None:
    divergence = divergences.get(name)
    z, w = normal(4, MODEL, seed=seed, scale=3.0), normal(4, MODEL, seed=seed + 1, scale=3.0)
    cells = maps(seed)[0]
    assert bool((divergence(cells(z), cells(w)) <= divergence(z, w) * (1 + 1e-9) + 1e-9).all())


def test_maps_that_cannot_be_meant() -> None:
    with pytest.raises(RecipeError, match="nothing in common"):
        VocabularyMap(torch.tensor([-1, -1]), 2)
    with pytest.raises(RecipeError, match="must lie in -1 to 1"):
        VocabularyMap(torch.tensor([0, 2]), 2)
    model, teacher = operands()
    mine, theirs = maps(0)
    with pytest.raises(RecipeError, match="6 cells and the target's 7"):
        Merged(mine, TargetRows((teacher,)), VocabularyMap(theirs.cell, 7))
    few = Merged(VocabularyMap(mine.cell[:-1], CELLS), TargetRows((teacher,)), theirs)
    with pytest.raises(ModelError, match="map of the model's vocabulary has 12 entries, its head 13"):
        functionals(model, [Want(ForwardKL(), 0)], [few])
    late = Merged(mine, TargetRows((teacher,)), theirs, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ModelError, match="one boolean per hidden state"):
        functionals(model, [Want(ForwardKL(), 0)], [late])
