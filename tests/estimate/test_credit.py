"""Credit over sequences, against the enumeration of three symbols in three steps."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from leibler.divergence import ChiSquared, ForwardKL, JensenShannon, ReverseKL
from leibler.errors import RecipeError
from leibler.estimate import K2, K3, credit

SYMBOLS, STEPS = 3, 3


class Sequences:
    """All 27 responses of a model whose next-token law depends on the whole prefix, with target and behaviour."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        prefixes = [p for t in range(STEPS) for p in itertools.product(range(SYMBOLS), repeat=t)]
        at = {p: i for i, p in enumerate(prefixes)}
        self.z, self.y, self.x = (
            torch.randn(len(prefixes), SYMBOLS, generator=g, dtype=torch.float64) for _ in range(3)
        )
        self.z.requires_grad_()
        words = list(itertools.product(range(SYMBOLS), repeat=STEPS))
        self.context = torch.tensor([[at[w[:t]] for t in range(STEPS)] for w in words])
        self.token = torch.tensor(words)

    def logp(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.log_softmax(-1)[self.context, self.token]

    @property
    def tokens(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.logp(self.z), self.logp(self.y), self.logp(self.x)

    def sequence_divergence(self, divergence) -> torch.Tensor:
        p, q, _ = self.tokens
        return (q.sum(-1).exp() * divergence.f((p - q).sum(-1))).sum()

    def visited(self, divergence, held: bool) -> torch.Tensor:
        """sum_t E_{c_t}[D(p(.|c_t), q(.|c_t))], with the law of the contexts held or not."""
        p, _, _ = self.tokens
        law = p.sum(-1).exp()
        if held:
            law = law.detach()
        rows = divergence(self.z, self.y)
        return (law[:, None] * rows[self.context]).sum()

    def gradient(self, scalar: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(scalar, self.z, retain_graph=True)[0]

    def descended(self, divergence, kind, stale: bool = False, **options) -> torch.Tensor:
        p, q, s = self.tokens
        law = (s if stale else p.detach()).sum(-1).exp()
        per_token = credit.loss(divergence, p, q, kind, behaviour_logp=s if stale else None, **options)
        return self.gradient((law[:, None] * per_token).sum())


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("kind", ["to_go", "sequence"])
def test_to_go_and_sequence_descend_the_reverse_kl_of_sequences(kind, stale):
    w = Sequences(0)
    want = w.gradient(w.sequence_divergence(ReverseKL()))
    assert torch.allclose(w.descended(ReverseKL(), kind, stale), want, atol=1e-10)


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(), ChiSquared()], ids=repr)
def test_sequence_descends_any_f_divergence_of_sequences(divergence, stale):
    w = Sequences(1)
    want = w.gradient(w.sequence_divergence(divergence))
    assert torch.allclose(w.descended(divergence, "sequence", stale), want, atol=1e-10)


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
@pytest.mark.parametrize("divergence", [ReverseKL(), ForwardKL(), JensenShannon()], ids=repr)
def test_to_go_descends_the_sum_over_visited_contexts(divergence, stale):
    w = Sequences(2)
    want = w.gradient(w.visited(divergence, held=False))
    assert torch.allclose(w.descended(divergence, "to_go", stale), want, atol=1e-10)


@pytest.mark.parametrize("stale", [False, True], ids=["fresh", "stale"])
def test_to_go_takes_exact_values_of_the_later_contexts(stale):
    w = Sequences(2)
    values = JensenShannon()(w.z, w.y).detach()[w.context]
    want = w.gradient(w.visited(JensenShannon(), held=False))
    assert torch.allclose(w.descended(JensenShannon(), "to_go", stale, values=values), want, atol=1e-10)


@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon()], ids=repr)
def test_token_credit_is_myopic(divergence):
    w = Sequences(3)
    got = w.descended(divergence, "token")
    assert torch.allclose(got, w.gradient(w.visited(divergence, held=True)), atol=1e-10)
    whole = w.gradient(w.visited(divergence, held=False))
    assert (got - whole).norm() > 0.1 * whole.norm()


def test_per_token_estimators_give_the_myopic_gradient_and_k3_not_even_the_forward_one():
    w = Sequences(4)
    p, q, _ = w.tokens
    law = p.detach().sum(-1).exp()[:, None]
    k2 = w.gradient((law * K2().loss(ReverseKL(), p, q, "model")).sum())
    assert torch.allclose(k2, w.gradient(w.visited(ReverseKL(), held=True)), atol=1e-10)
    k3 = w.gradient((law * K3().loss(ForwardKL(), p, q, "model")).sum())
    assert torch.allclose(k3, w.gradient(w.visited(ForwardKL(), held=True)), atol=1e-10)
    assert (k3 - w.gradient(w.sequence_divergence(ForwardKL()))).norm() > 0.1 * k3.norm()


def test_target_samples_need_no_credit_for_the_forward_kl_of_sequences():
    """Chain rule with the law of the contexts fixed: the token form is the sequence form."""
    w = Sequences(4)
    p, q, _ = w.tokens
    got = w.gradient((q.sum(-1).exp()[:, None] * K3().loss(ForwardKL(), p, q, "target")).sum())
    assert torch.allclose(got, w.gradient(w.sequence_divergence(ForwardKL())), atol=1e-10)


def test_a_baseline_changes_nothing_on_average_even_on_stale_samples():
    w = Sequences(5)
    baseline = torch.tensor(1.7, dtype=torch.float64)
    for kind in ("token", "to_go", "sequence"):
        for stale in (False, True):
            got = w.descended(ReverseKL(), kind, stale, baseline=baseline)
            if kind == "token" and stale:
                continue  # token credit keeps the behaviour's contexts; see the next test
            assert torch.allclose(got, w.descended(ReverseKL(), kind, stale), atol=1e-10)


def test_stale_token_credit_holds_the_contexts_of_the_behaviour():
    w = Sequences(5)
    _, _, s = w.tokens
    rows = ReverseKL()(w.z, w.y)
    want = w.gradient((s.sum(-1).exp()[:, None] * rows[w.context]).sum())
    assert torch.allclose(w.descended(ReverseKL(), "token", stale=True), want, atol=1e-10)
    with_baseline = w.descended(ReverseKL(), "token", stale=True, baseline=torch.tensor(1.7, dtype=torch.float64))
    assert torch.allclose(with_baseline, want, atol=1e-10)


def test_leaving_out_the_weights_on_a_stale_sample_is_biased():
    w = Sequences(6)
    p, q, s = w.tokens
    law = s.sum(-1).exp()[:, None]
    biased = w.gradient((law * credit.loss(ReverseKL(), p, q, "to_go")).sum())
    exact = w.gradient(w.sequence_divergence(ReverseKL()))
    assert (biased - exact).norm() > 0.1 * exact.norm()


def test_a_missing_normaliser_of_the_target_does_not_move_the_reverse_kl():
    w = Sequences(7)
    p, q, _ = w.tokens
    law = p.detach().sum(-1).exp()[:, None]
    want = w.gradient(w.sequence_divergence(ReverseKL()))
    for kind in ("to_go", "sequence"):
        got = w.gradient((law * credit.loss(ReverseKL(), p, q + 0.9, kind)).sum())
        assert torch.allclose(got, want, atol=1e-10)


@pytest.mark.parametrize("kind", ["token", "to_go", "sequence"])
@pytest.mark.parametrize("divergence", [ReverseKL(), JensenShannon()], ids=repr)
def test_flat_interleaved_tokens_are_the_padded_ones(divergence, kind):
    g = torch.Generator().manual_seed(0)
    p, q, s = (-torch.rand(4, 5, generator=g, dtype=torch.float64) for _ in range(3))
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4])[:, None]
    padded = credit.loss(divergence, p, q, kind, mask, behaviour_logp=s)
    rows, columns = mask.nonzero(as_tuple=True)
    time_major = torch.argsort(columns, stable=True)  # sequences interleaved, each in order
    rows, columns = rows[time_major], columns[time_major]
    flat_p = p[rows, columns].requires_grad_()
    flat = credit.loss(divergence, flat_p, q[rows, columns], kind, sequence=7 - rows, behaviour_logp=s[rows, columns])
    assert torch.allclose(flat, padded[rows, columns])
    grid = p.clone().requires_grad_()
    credit.loss(divergence, grid, q, kind, mask, behaviour_logp=s).sum().backward()
    flat.sum().backward()
    assert torch.allclose(flat_p.grad, grid.grad[rows, columns])
    assert (grid.grad[~mask] == 0).all()


def test_masked_garbage_changes_nothing():
    p = torch.tensor([[-1.0, -0.5, math.nan]], requires_grad=True)
    q = torch.tensor([[-2.0, -0.7, math.nan]])
    mask = torch.tensor([[True, True, False]])
    for kind in ("token", "to_go", "sequence"):
        loss = credit.loss(ReverseKL(), p, q, kind, mask, behaviour_logp=p.detach())
        (grad,) = torch.autograd.grad(loss.sum(), p)
        kept = p[:, :2].detach().requires_grad_()
        credit.loss(ReverseKL(), kept, q[:, :2], kind, behaviour_logp=kept.detach()).sum().backward()
        assert grad[0, :2].tolist() == pytest.approx(kept.grad[0].tolist())
        assert grad[0, 2] == 0.0
        assert loss[0, 2] == 0.0


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=5), min_size=1, max_size=4))
def test_sums_over_sequences(rows):
    flat = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    sequence = torch.tensor([i for i, row in enumerate(rows) for _ in row])
    later = [sum(row[t:]) for row in rows for t in range(len(row))]
    before = [sum(row[: t + 1]) for row in rows for t in range(len(row))]
    assert credit.to_go(flat, sequence=sequence).tolist() == pytest.approx(later, abs=1e-9)
    assert credit.so_far(flat, sequence=sequence).tolist() == pytest.approx(before, abs=1e-9)
    whole = [sum(row) for row in rows for _ in row]
    assert credit.sequence_sum(flat, sequence=sequence).tolist() == pytest.approx(whole, abs=1e-9)
    after = credit.to_go(flat, sequence=sequence, inclusive=False) + flat
    assert after.tolist() == pytest.approx(later, abs=1e-9)


def test_a_long_sequence_that_overflows_a_ratio_stays_finite():
    p, q = torch.full((1, 400), -1.0, requires_grad=True), torch.full((1, 400), -9.0)
    for kind in ("token", "to_go", "sequence"):
        for sign in (1, -1):
            loss = credit.loss(ChiSquared(), p if sign == 1 else p - 8, q if sign == 1 else q + 8, kind)
            (grad,) = torch.autograd.grad(loss.sum(), p)
            assert grad.isfinite().all()
            assert not loss.isnan().any()


def test_an_unknown_credit_is_refused():
    with pytest.raises(RecipeError, match="credit must be one of token, to_go, sequence, not 'tokens'"):
        credit.coefficients(ReverseKL(), torch.zeros(1, 2), "tokens")  # type: ignore[arg-type]


def test_an_exact_value_is_weighted_by_the_tokens_before_it_only():
    """Its own token has no part in it; weighting by that too would be as unbiased and noisier."""
    p, q, s = (torch.tensor([[a, b]], dtype=torch.float64) for a, b in ((-1.0, -2.0), (-1.5, -1.0), (-0.5, -0.2)))
    values = torch.tensor([[0.3, 0.7]], dtype=torch.float64)
    got = credit.coefficients(ReverseKL(), p - q, "to_go", log_weight=p - s, values=values)
    w = (p - s)[0].exp()
    assert got[0].tolist() == pytest.approx([float(w[0] * 0.5 + w[0] * 0.7), float(w[0] * w[1] * -1.0)])
