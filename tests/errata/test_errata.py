"""Errata, first part: estimators and policy-gradient losses. The pages of docs/errata.md point here."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from estimate.enumerated import World
from leibler.divergence import ForwardKL, ReverseKL, TotalVariation
from leibler.errors import RecipeError
from leibler.estimate import K1, K2, K3, AbsLogRatio, AsReward, LowVarKL, ScoreFunction, check, value


def mean_gradient(w: World, per_token: Tensor, law: Tensor) -> Tensor:
    return w.gradient((law * per_token).sum())


# --- the estimator table ----------------------------------------------------------------------------------------------


def test_k1_in_the_loss_pulls_nowhere():
    w = World(0)
    gradient = mean_gradient(w, w.p - w.q, w.law("model"))  # autograd of log p/q on fresh samples
    assert gradient.abs().max() < 1e-12
    assert w.gradient(w.exact(ReverseKL())).abs().max() > 0.1
    with pytest.raises(RecipeError, match="descends nothing"):
        check(ReverseKL(), K1(), "model")


def test_k3_in_the_loss_descends_the_forward_kl():
    w = World(0)
    k3 = (w.q - w.p).exp() - 1 - (w.q - w.p)
    assert (w.law("model") * k3).sum().item() == pytest.approx(w.exact(ReverseKL()).item(), abs=1e-12)
    gradient = mean_gradient(w, k3, w.law("model"))
    assert torch.allclose(gradient, w.gradient(w.exact(ForwardKL())), atol=1e-12)
    assert not torch.allclose(gradient, w.gradient(w.exact(ReverseKL())), atol=0.05)


def test_the_default_kl_of_group_relative_trainers_is_not_the_one_they_report():
    """The number on the dashboard is ReverseKL; the force on the weights is ForwardKL's, and biased when stale."""
    w = World(1)
    loss = LowVarKL(clamp=1e9).loss(ForwardKL(), w.p, w.q, "model")
    assert (w.law("model") * loss).sum().item() == pytest.approx(w.exact(ReverseKL()).item())
    assert torch.allclose(mean_gradient(w, loss, w.law("model")), w.gradient(w.exact(ForwardKL())), atol=1e-12)
    gap = []
    for mix in (0.0, 0.3, 1.0):  # behaviours further and further from the model
        s = torch.logsumexp(torch.stack([w.p.detach() + math.log(1 - mix) if mix < 1 else w.p.detach() - 99, w.s
                                         + (math.log(mix) if mix > 0 else -99)]), 0)  # fmt: skip
        got = mean_gradient(w, LowVarKL(clamp=1e9).loss(ForwardKL(), w.p, w.q, "behaviour", s), s.exp())
        gap.append((got - w.gradient(w.exact(ForwardKL()))).norm().item())
    assert gap[0] < 1e-12
    assert 0.05 < gap[1] < gap[2]


def test_k1_on_a_stale_batch_flees_the_sampler_and_ignores_the_target():
    w = World(2)
    law = w.s.exp()
    gradient = mean_gradient(w, w.p - w.q, law)
    trust = -(law * (w.p - w.s)).sum()  # KL(behaviour || model)
    assert torch.allclose(gradient, -w.gradient(trust), atol=1e-12)
    w.y = torch.randn(7, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    assert torch.allclose(mean_gradient(w, w.p - w.q, law), gradient, atol=1e-12)


def test_k3_in_the_reward_does_not_hold_the_model_at_the_target():
    """ReverseKL and ForwardKL have the same second derivative at the target, so their difference has none."""
    force = {}
    for step in (1e-2, 1e-3):
        w = World(3)
        w.y = w.z.detach() + step * torch.randn(7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for kind in ("k1", "k3"):
            loss = AsReward(kind).loss(ReverseKL(), w.p, w.q, "model")
            force[kind, step] = mean_gradient(w, loss, w.law("model")).norm().item()
    assert force["k1", 1e-2] / force["k1", 1e-3] == pytest.approx(10, rel=0.05)  # first order: a spring
    assert force["k3", 1e-2] / force["k3", 1e-3] == pytest.approx(100, rel=0.05)  # second order: no spring
    assert force["k3", 1e-3] < 0.01 * force["k1", 1e-3]


@pytest.mark.parametrize("kind", ["k2", "abs"])
def test_a_sign_blind_penalty_in_the_reward_can_push_away_from_the_target(kind):
    """A token that is too rare is penalised as much as one that is too frequent."""
    q = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    z = torch.tensor([0.05, 0.35, 0.6], dtype=torch.float64).log().requires_grad_()
    p = z.log_softmax(0)

    def force(k: str) -> Tensor:
        return torch.autograd.grad((p.exp().detach() * AsReward(k).loss(ReverseKL(), p, q, "model")).sum(), z,
                                   retain_graph=True)[0]  # fmt: skip

    assert -force("k1")[0] > 0.05  # the right pull on the symbol that is ten times too rare is up
    assert -force(kind)[0] < -0.01  # here it is down


def test_the_absolute_log_ratio_is_a_pull_towards_total_variation():
    w = World(4)
    gradient = mean_gradient(w, (w.p - w.q).abs(), w.law("model"))
    assert torch.allclose(gradient, 2 * w.gradient(w.exact(TotalVariation())), atol=1e-9)
    # It does not weaken near the target, so it rattles there.
    w.y = w.z.detach() + 1e-4 * torch.tensor([1, -1, 1, -1, 1, -1, 1.0], dtype=torch.float64)
    near = mean_gradient(w, AbsLogRatio().loss(ReverseKL(), w.p, w.q, "model"), w.law("model"))
    assert near.norm() > 1e3 * w.gradient(w.exact(ReverseKL())).norm()


def test_the_absolute_ratio_to_the_old_policy_does_nothing_in_the_first_step():
    p = torch.tensor([-1.0, -2.0], requires_grad=True)
    for penalty in ((p - p.detach()).abs(), AbsLogRatio().loss(ForwardKL(), p, p.detach(), "target")):
        (gradient,) = torch.autograd.grad(penalty.sum(), p)
        assert gradient.tolist() == [0.0, 0.0]


def test_differentiating_the_weight_of_k2_spoils_it():
    w = World(5)
    want = w.gradient(w.exact(ReverseKL()))
    weight, k1 = (w.p - w.s).exp(), w.p - w.q
    law = w.s.exp()
    assert torch.allclose(mean_gradient(w, weight.detach() * k1**2 / 2, law), want, atol=1e-12)
    assert torch.allclose(mean_gradient(w, weight * ((-k1).exp() - 1 + k1), law), want, atol=1e-12)
    assert not torch.allclose(mean_gradient(w, weight * k1**2 / 2, law), want, atol=0.05)


def test_a_length_normalised_sequence_ratio_does_not_correct_a_stale_batch():
    """Two steps: k3 times (prod w)^(1/2), differentiated, against the same with the ratio of each token."""
    w = World(6, size=3)
    pairs = list(itertools.product(range(3), repeat=2))
    p = torch.stack([w.p[list(t)] for t in pairs])
    q = torch.stack([w.q[list(t)] for t in pairs])
    s = torch.stack([w.s[list(t)] for t in pairs])
    law = s.sum(-1).exp()
    k3 = (q - p).exp() - 1 - (q - p)
    want = 2 * w.gradient(w.exact(ReverseKL()))

    def gradient(weight: Tensor) -> Tensor:
        return w.gradient((law * (weight * k3).sum(-1)).sum())

    assert torch.allclose(gradient((p - s).exp()), want, atol=1e-12)
    assert not torch.allclose(gradient((p - s).mean(-1, keepdim=True).exp()), want, atol=0.02)


def test_differentiating_an_unbiased_value_of_the_forward_kl_is_not_its_gradient():
    """rho log rho - rho + 1 averages to KL(q || p) over the model's samples; its autograd descends
    E_target[(log p/q)^2]/2."""
    w = World(7)
    rho = (w.q - w.p).exp()
    loss = rho * rho.log() - rho + 1
    assert (w.law("model") * loss).sum().item() == pytest.approx(w.exact(ForwardKL()).item(), abs=1e-12)
    gradient = mean_gradient(w, loss, w.law("model"))
    assert torch.allclose(gradient, w.gradient((w.law("target") * (w.p - w.q) ** 2).sum() / 2), atol=1e-12)
    assert not torch.allclose(gradient, w.gradient(w.exact(ForwardKL())), atol=0.05)


def test_an_unnormalised_target_leaves_k2_alone_and_reweights_k3():
    """Extrapolated targets (c log a + (1 - c) log b) have a normaliser Z != 1."""
    w = World(8)
    log_z = 0.6
    shifted = w.q + log_z
    k2 = mean_gradient(w, K2().loss(ReverseKL(), w.p, shifted, "model"), w.law("model"))
    assert torch.allclose(k2, w.gradient(w.exact(ReverseKL())), atol=1e-12)
    k3 = mean_gradient(w, K3().loss(ForwardKL(), w.p, shifted, "model"), w.law("model"))
    assert torch.allclose(k3, math.exp(log_z) * w.gradient(w.exact(ForwardKL())), atol=1e-12)
    mean = (w.law("model") * value(w.p, shifted, ReverseKL(), "k1", reduction="none")).sum()
    assert mean.item() == pytest.approx(w.exact(ReverseKL()).item() - log_z)


def test_a_sampled_entropy_bonus_pulls_nowhere():
    w = World(9)
    entropy = -(w.p.exp() * w.p).sum()
    naive = mean_gradient(w, -w.p, w.law("model"))  # autograd of -mean log p on the model's own samples
    assert naive.abs().max() < 1e-12
    right = mean_gradient(w, -w.p.detach() * (w.p - w.p.detach()), w.law("model"))
    assert torch.allclose(right, w.gradient(entropy), atol=1e-12)


def test_the_spurious_one_of_the_reverse_kl_reward_is_noise_only():
    w = World(10)
    w.y = w.z.detach() + 0.05 * torch.linspace(-1, 1, 7, dtype=torch.float64)
    spread = {}
    for baseline in (0.0, None):
        leaf = w.p.detach().requires_grad_()
        ScoreFunction(baseline=baseline).loss(ReverseKL(), leaf, w.q, "model").sum().backward()
        spread[baseline] = (w.law("model") * leaf.grad**2).sum().item()
    assert spread[0.0] > 500 * spread[None]


def test_k3_in_float32_is_noise_near_the_target():
    p = torch.full((1000,), -2.0) - torch.rand(1000, generator=torch.Generator().manual_seed(0))
    q = p - 3e-4 * torch.rand(1000, generator=torch.Generator().manual_seed(1))
    x = q.double() - p.double()
    exact = x.expm1() - x
    naive = torch.exp(q - p) - (q - p) - 1
    assert (naive == 0.0).double().mean() > 0.7  # quantised to multiples of 6e-8, most tokens count as equal
    assert (naive - exact).abs().mean() > 0.8 * exact.mean()  # off by about the quantity itself
    assert torch.allclose(value(p, q, ReverseKL(), "k3", reduction="none").double(), exact, rtol=1e-6, atol=1e-15)


def test_samples_from_a_truncated_or_cooled_policy_are_not_samples_of_the_model():
    """Nucleus or temperature sampling with full-vocabulary log-probs at temperature 1: a mean score is not 0."""
    w = World(11)
    p = w.p.detach()
    keep = p.exp() >= p.exp().sort(descending=True).values[3]
    truncated = torch.where(keep, p.exp(), 0.0) / p.exp()[keep].sum()
    cooled = (w.z.detach() / 0.6).softmax(0)
    for law in (truncated, cooled):
        assert mean_gradient(w, w.p, law).norm() > 0.05
        k2 = mean_gradient(w, K2().loss(ReverseKL(), w.p, w.q, "model"), law)
        assert (k2 - w.gradient(w.exact(ReverseKL()))).norm() > 0.05
    weighted = mean_gradient(w, K2().loss(ReverseKL(), w.p, w.q, "behaviour", cooled.log()), cooled)
    assert torch.allclose(weighted, w.gradient(w.exact(ReverseKL())), atol=1e-12)


# --- sequences --------------------------------------------------------------------------------------------------------


class TwoSteps:
    """Four symbols, two steps, contexts that matter; every response enumerated."""

    def __init__(self, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        self.z = torch.randn(5, 4, generator=g, dtype=torch.float64, requires_grad=True)  # row 0: first step
        self.y = torch.randn(5, 4, generator=g, dtype=torch.float64)
        self.words = list(itertools.product(range(4), repeat=2))

    def logp(self, logits: Tensor) -> Tensor:
        rows = logits.log_softmax(-1)
        return torch.stack([torch.stack([rows[0, a], rows[1 + a, b]]) for a, b in self.words])

    def gradient(self, scalar: Tensor) -> Tensor:
        return torch.autograd.grad(scalar, self.z, retain_graph=True)[0]

    @property
    def sequence_kl(self) -> Tensor:
        p, q = self.logp(self.z).sum(-1), self.logp(self.y).sum(-1)
        return (p.exp() * (p - q)).sum()

    def single_step(self) -> Tensor:
        """Exact per-context ReverseKL at the visited contexts, their law held."""
        rows = ReverseKL()(self.z, self.y)
        first = self.z[0].softmax(-1).detach()
        return rows[0] + (first * rows[1:]).sum()

    def reinforced(self, coefficient: Tensor) -> Tensor:
        p = self.logp(self.z)
        return (p.detach().sum(-1).exp() * (coefficient.detach() * p).sum(-1)).sum()


def test_a_per_token_kl_is_not_the_kl_of_responses():
    w = TwoSteps(0)
    p, q = w.logp(w.z), w.logp(w.y)
    token = w.gradient((p.detach().sum(-1).exp() * ((p - q) ** 2 / 2).sum(-1)).sum())
    assert torch.allclose(token, w.gradient(w.single_step()), atol=1e-12)
    whole = w.gradient(w.sequence_kl)
    assert (token - whole).norm() > 0.05 * whole.norm()
    summed = w.gradient((p.detach().sum(-1).exp() * (p - q).sum(-1) ** 2 / 2).sum())  # k2 of the whole response
    assert torch.allclose(summed, whole, atol=1e-12)


def test_a_reward_to_go_that_includes_the_present_counts_the_single_step_twice():
    """MiniLLM: exact single-step KL plus sum_{t' > t} of log-ratios is the gradient; starting the sum at t is not."""
    w = TwoSteps(1)
    log_ratio = w.logp(w.z) - w.logp(w.y)
    later = torch.stack([log_ratio[:, 1], torch.zeros(16, dtype=torch.float64)], -1)
    inclusive = torch.stack([log_ratio.sum(-1), log_ratio[:, 1]], -1)
    whole, single = w.gradient(w.sequence_kl), w.gradient(w.single_step())
    assert torch.allclose(w.gradient(w.single_step() + w.reinforced(later)), whole, atol=1e-12)
    assert torch.allclose(w.gradient(w.single_step() + w.reinforced(inclusive)), whole + single, atol=1e-12)
    assert single.norm() > 0.1 * whole.norm()


def test_the_ratio_of_a_token_does_not_correct_the_law_of_its_context():
    """MiniLLM: p(y_t) / mixture(y_t) averages to 1 in every context, so the exact term at t is only made noisier."""
    w = TwoSteps(1)
    p, q = w.logp(w.z).detach(), w.logp(w.y)
    mixture = torch.logaddexp(p + math.log(0.8), q + math.log(0.2))  # token by token, as it is sampled
    law, ratio = mixture.sum(-1).exp(), (p - mixture).exp()
    exact = torch.stack([ReverseKL()(w.z[1 + a], w.y[1 + a]) for a, _ in w.words])  # at the second token of each word

    def mean(weight: Tensor) -> Tensor:
        return w.gradient((law * weight * exact).sum())

    plain, published, right = mean(torch.ones_like(law)), mean(ratio[:, 1]), mean(ratio[:, 0])
    assert torch.allclose(published, plain, atol=1e-12)
    assert (law * (ratio[:, 1] - 1) ** 2).sum() > 0.01  # the noise it adds
    on_policy = w.gradient((p.sum(-1).exp() * exact).sum())
    assert torch.allclose(right, on_policy, atol=1e-12)
    assert (plain - on_policy).norm() > 0.02 * on_policy.norm()


def test_a_geometric_mixture_normalised_per_token_is_another_law_of_responses():
    """Self-play margins need sum_t of unnormalised log-scores: only then does the normaliser cancel in a pair."""
    w = TwoSteps(2)
    a, b = w.logp(w.z).detach(), w.logp(w.y)
    sequence = (0.3 * a + 0.7 * b).sum(-1)  # up to a constant per prompt
    rows = (0.3 * w.z.detach().log_softmax(-1) + 0.7 * w.y.log_softmax(-1)).log_softmax(-1)
    token = torch.stack([rows[0, i] + rows[1 + i, j] for i, j in w.words])
    margin = sequence[:, None] - sequence[None]
    wrong = token[:, None] - token[None]
    assert (margin - wrong).abs().max() > 0.1
    same_context = torch.tensor([[u[0] == v[0] for v in w.words] for u in w.words])
    assert torch.allclose(margin[same_context], wrong[same_context], atol=1e-12)  # one token apart: no difference


def test_a_teacher_anchored_ratio_is_no_importance_weight():
    """(pi/old)^a (pi/teacher)^(1-a) averages to exp(-(1-a) Renyi_a) under the old policy at pi = old, not to 1."""
    w = World(12)
    a = 0.7
    old, teacher = w.p.detach(), w.q
    ratio = ((1 - a) * (old - teacher)).exp()
    assert abs((old.exp() * ratio).sum().item() - 1.0) > 0.05
    mass = (a * old + (1 - a) * teacher).exp().sum()
    renyi = torch.log((old.exp() ** a * teacher.exp() ** (1 - a)).sum()) / (a - 1)
    assert mass.item() == pytest.approx(torch.exp(-(1 - a) * renyi).item())
    assert mass.item() < 0.98
