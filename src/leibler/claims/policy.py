"""What the recipes that learn from rewards claim, run on the recipes themselves over tables of logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leibler.claims.framework import claim
from leibler.claims.simplex import contexts, enumerate_sequences
from leibler.claims.tables import (
    F64,
    Bench,
    Build,
    Table,
    every,
    every_pair,
    fractions,
    kl,
    listed,
    normal,
    of,
    off,
    rewarded,
    sequence_laws,
    shuffled,
    slope,
)
from leibler.objective import Rows, StepEnd
from leibler.policy import ValueHead
from leibler.train import Recipe, Trained

RIGHT = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]], dtype=F64)
"""The right answers to two prompts, out of four."""
OLD = shuffled(2, 1, 4, seed=1)


def _pairs() -> Rows:
    prompt, response, group = every_pair(OLD)
    return rewarded(listed(prompt, response, group), lambda x, y: float(RIGHT[x, y[0]]))


# ---- grpo ----------------------------------------------------------------------------------------------------------


@claim(
    "grpo",
    "The expected gradient is the reward's, scaled by the group's spread, plus the exact reverse KL's to the reference",
    "groups of two by enumeration: grad(-E[r]/sqrt 2 + 0.04 KL(p||reference)); what the reference adds within 0.1%, "
    "the whole within 1e-5",
)
def grpo_climbs_and_is_held(build: Build = of("grpo")) -> tuple[str, bool]:
    reference = Table(normal(2, 1, 4, seed=2, scale=1.5))
    bench = Bench(build(), {"policy": fractions(OLD), "reference": reference})
    q, logits = reference.log_laws(), bench.policy.logits
    rewards = slope(lambda z: -(z[:, 0].softmax(-1) * RIGHT).sum(-1).mean() / math.sqrt(2), logits)
    pull = slope(lambda z: 0.04 * kl(z[:, 0].log_softmax(-1), q).mean(), logits)
    found = bench.gradient(_pairs())[0]
    whole, held = off(found, rewards + pull), off(found - rewards, pull)
    return f"off by {whole:.1e}, the reference's part by {held:.1e}", whole < 1e-5 and held < 1e-3


@claim(
    "grpo",
    "With no difference in reward only the KL acts; it stays the reverse KL's on a stale batch, where k3 in the loss, "
    "as widely published, descends the forward KL",
    "policy moved since the draw: gradient within 1e-5 of the reverse KL's, over 5% from the forward KL's",
)
def grpo_stays_exact_when_stale(build: Build = of("grpo")) -> tuple[str, bool]:
    reference = Table(normal(2, 1, 4, seed=2, scale=1.5))
    bench = Bench(build(minibatches=2), {"policy": fractions(OLD), "reference": reference})
    now, q = bench.policy.logits.detach() + normal(2, 1, 4, seed=3, scale=0.5), reference.log_laws()
    prompt, response = every(OLD)
    found = bench.gradient(rewarded(listed(prompt, response), lambda x, y: 1.0), now=now)[0] / 0.04
    reverse = slope(lambda z: kl(z[:, 0].log_softmax(-1), q).mean(), now)
    forward = slope(lambda z: kl(q, z[:, 0].log_softmax(-1)).mean(), now)
    gaps = off(found, reverse), off(found, forward)
    return f"{gaps[0]:.1e} from reverse, {gaps[1]:.0%} from forward", gaps[0] < 1e-5 and gaps[1] > 0.05


# ---- ppo -----------------------------------------------------------------------------------------------------------


REFERENCE, BOTH = normal(2, 4, 3, seed=5), shuffled(2, 4, 3, seed=1)
ANSWERS = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0, 1, 1, 1]], dtype=F64)
"""Which of the nine responses of two symbols are right, for two prompts."""


def _actor(recipe: Recipe) -> Bench:
    models = {"policy": fractions(BOTH, 2), "reference": Table(REFERENCE, 2)}
    critics = {n: ValueHead(2 * 4).double() for n, rule in recipe.models.items() if isinstance(rule, Trained)}
    return Bench(recipe, models, critics)


def _answered() -> Rows:
    return rewarded(listed(*every(BOTH, 2)), lambda x, y: float(ANSWERS[x, 3 * y[0] + y[1]]))


@dataclass(frozen=True)
class _Returns:
    """What is paid from each symbol of each response on, with coefficient 0.1 on the KL: by enumeration."""

    at: Tensor
    symbols: Tensor
    weight: Tensor
    value: Tensor

    @property
    def whitened(self) -> Tensor:
        mean = (self.weight[..., None] * self.value).sum() / 2
        return (self.value - mean) / self.spread

    @property
    def spread(self) -> Tensor:
        mean = (self.weight[..., None] * self.value).sum() / 2
        return ((self.weight[..., None] * (self.value - mean) ** 2).sum() / 2).sqrt()


def _returns(logits: Tensor) -> _Returns:
    symbols, _ = enumerate_sequences(3, 2)
    at = contexts(symbols, 3)
    ratio = (logits.detach().log_softmax(-1) - REFERENCE.log_softmax(-1))[:, at, symbols]
    paid = -0.1 * ratio
    paid[..., 1] += ANSWERS
    value = torch.stack([paid.sum(-1), paid[..., 1]], -1)
    return _Returns(at, symbols, sequence_laws(logits.detach(), 2).exp() / 2, value)


@claim(
    "ppo",
    "With undiscounted returns the first step's expected gradient is that of E[r] - 0.1 KL(p||reference) of whole "
    "responses, over the advantages' spread",
    "equal by enumeration, relative difference below 1e-5",
)
def ppo_climbs_the_penalised_reward(build: Build = of("ppo")) -> tuple[str, bool]:
    bench = _actor(build(decay=1.0))
    reference, logits = sequence_laws(REFERENCE, 2), bench.policy.logits.detach()

    def loss(z: Tensor) -> Tensor:
        p = sequence_laws(z, 2)
        return (0.1 * kl(p, reference) - (p.exp() * ANSWERS).sum(-1)).mean() / 2  # two symbols

    gap = off(bench.gradient(_answered())[0] * _returns(logits).spread, slope(loss, logits))
    return f"relative difference {gap:.1e}", gap < 1e-5


@claim(
    "ppo",
    "Away from the old policy, events whose ratio has left the clip region push no further",
    "gradient equal to -min(ratio A, clip(ratio, 0.8, 1.2) A) by enumeration, relative difference below 1e-5, with at "
    "least a fifth of the events outside",
)
def ppo_clips(build: Build = of("ppo")) -> tuple[str, bool]:
    bench = _actor(build(decay=1.0))
    known = _returns(bench.policy.logits)
    old = bench.policy.logits.detach().log_softmax(-1)
    now = bench.policy.logits.detach() + normal(2, 4, 3, seed=6, scale=0.4)
    advantage = known.whitened
    outside = torch.zeros(())

    def loss(z: Tensor) -> Tensor:
        nonlocal outside
        ratio = (z.log_softmax(-1) - old)[:, known.at, known.symbols].exp()
        clipped = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)
        outside = ((clipped > -ratio * advantage).double() * known.weight[..., None]).sum() / 2
        return (known.weight[..., None] * clipped).sum() / 2

    expected = slope(loss, now)
    gap = off(bench.gradient(_answered(), now=now)[0], expected)
    return f"relative difference {gap:.1e}, {outside:.0%} outside", gap < 1e-5 and bool(outside > 0.2)


@claim(
    "ppo",
    "The critic is drawn to the penalised reward still to come, with coefficient 1/2",
    "gradient at a critic of 0 within 1e-5 of -1/2 E[return; context]",
)
def ppo_fits_its_critic(build: Build = of("ppo")) -> tuple[str, bool]:
    bench = _actor(build(decay=1.0))
    known = _returns(bench.policy.logits)
    bench.gradient(_answered())
    expected = torch.zeros(2, 4, dtype=F64)
    for t in range(2):
        expected.index_add_(1, known.at[:, t], -0.5 * known.weight * known.value[..., t] / 2)
    critic: Any = bench.modules.get("critic")
    found = None if critic is None else critic.linear.weight.grad
    gap = off(torch.zeros(8, dtype=F64) if found is None else found.flatten(), expected.flatten())
    return f"relative difference {gap:.1e}", gap < 1e-5


@claim(
    "ppo",
    "The KL coefficient grows while responses are further from the reference than the target, and shrinks below",
    "x (1 + 0.2 n/horizon) from 1.2 targets up, x (1 - 0.2 n/horizon) from 0.8 down, unchanged at the target",
)
def ppo_steers_its_coefficient(build: Build = of("ppo")) -> tuple[str, bool]:
    recipe = build(target=6.0, initial=0.1, horizon=1000.0)
    controllers = {s for s, _ in recipe.objective.walk() if s.init() is not None}
    factors = []
    for measured in (60.0, 6.6, 6.0, 0.0):
        for signal in controllers:
            state: Any = signal.init()
            heard = {"divergence_per_sequence": measured, "sequences": 100.0}
            factors.append(signal.observe(state, StepEnd(1, {}, heard))["coefficient"] / 0.1)
    expected = (1.02, 1.01, 1.0, 0.98)
    holds = len(factors) == 4 and all(abs(f - e) < 1e-9 for f, e in zip(factors, expected, strict=True))
    return "factors " + ", ".join(f"{f:.3f}" for f in factors), holds


# ---- disco ---------------------------------------------------------------------------------------------------------


@claim(
    "disco",
    "Every prompt weighs the same, however hard; GRPO weighs one that is right 5% of the time less than half as much "
    "as one at 50%",
    "sizes of the gradient for 1 of 20 and 10 of 20 right: ratio 1 here, sqrt(p(1-p)) / sqrt(q(1-q)) = 0.436 for "
    "GRPO; within 1e-6 (1e-4); a prompt without a wrong answer gives nothing but is counted",
)
def disco_has_no_difficulty_bias(build: Build = of("disco")) -> tuple[str, bool]:
    counts = torch.tensor([[[1, 19]], [[10, 10]], [[10, 10]]])
    prompt, response = every(counts)
    size = {}
    for name, recipe in (("disco", build(tau=1e4)), ("grpo", of("grpo")(coefficient=0.0))):
        table = fractions(counts)
        bench = Bench(recipe, {"policy": table, "reference": table.copy()})
        rows = bench.staged(listed(prompt, response), lambda x, y: 1.0 if x == 2 else float(y[0] == 0))
        size[name] = -bench.gradient(rows)[0][:, 0, 0]
    ratio = {name: float(x[0] / x[1]) for name, x in size.items()}
    gap = off(size["disco"], torch.tensor([1 / 3, 1 / 3, 0.0], dtype=F64))
    holds = gap < 1e-6 and abs(ratio["grpo"] - 0.4359) < 1e-4
    return f"ratio {ratio['disco']:.4f}, for GRPO {ratio['grpo']:.4f}; sizes off by {gap:.1e}", holds


@claim(
    "disco",
    "The temperature of the contrast goes from the mean of the wrong answers to the hardest of them alone",
    "gradient of s+ - tau log mean exp(s-/tau) by enumeration, relative difference below 1e-6 at tau = 0.001, 0.5, "
    "1e4; within 1e-3 of the hardest and of the mean at the ends",
)
def disco_looks_at_the_hardest(build: Build = of("disco")) -> tuple[str, bool]:
    counts = torch.tensor([[[2, 1, 4, 3]], [[3, 1, 2, 4]]])
    prompt, response = every(counts)
    copies = counts[:, 0, 1:].double()  # the first answer is the right one
    logits = fractions(counts).logits.detach()

    def loss(z: Tensor, tau: float | str) -> Tensor:
        s = z[:, 0].log_softmax(-1)
        wrong, share = s[:, 1:], copies / copies.sum(-1, keepdim=True)
        if tau == "mean":
            return ((share * wrong).sum(-1) - s[:, 0]).mean()
        if tau == "hardest":
            return (wrong.amax(-1) - s[:, 0]).mean()
        return (float(tau) * (share.log() + wrong / float(tau)).logsumexp(-1) - s[:, 0]).mean()

    found = {}
    for tau in (1e-3, 0.5, 1e4):
        bench = Bench(build(tau=tau), {"policy": fractions(counts)})
        rows = bench.staged(listed(prompt, response), lambda x, y: float(y[0] == 0))
        found[tau] = bench.gradient(rows)[0]
    exact = max(off(found[tau], slope(lambda z, tau=tau: loss(z, tau), logits)) for tau in found)
    sides = {1e-3: "hardest", 1e4: "mean"}
    ends = max(off(found[tau], slope(lambda z, end=end: loss(z, end), logits)) for tau, end in sides.items())
    return f"off by {exact:.1e}; by {ends:.1e} at the ends", exact < 1e-6 and ends < 1e-3


@claim(
    "disco",
    "Inside the bound the constraint is silent; beyond it, it descends a squared hinge of KL(old||p)",
    "slope (K - bound)+ grad K by enumeration: what the constraint adds is below 1e-9 inside, within 1e-5 beyond",
)
def disco_keeps_its_distance(build: Build = of("disco")) -> tuple[str, bool]:
    prompt, response = every(OLD)
    old = fractions(OLD).log_laws()
    bench = Bench(build(bound=1e-2), {"policy": fractions(OLD)})
    rows = bench.staged(listed(prompt, response), lambda x, y: float(RIGHT[x, y[0]]))
    start = bench.policy.logits.detach()
    gaps = {}
    for scale in (0.05, 1.0):
        now = start + normal(2, 1, 4, seed=3, scale=scale)
        distance = kl(old, now[:, 0].log_softmax(-1)).mean()

        def hinge(z: Tensor) -> Tensor:
            return 500.0 * (kl(old, z[:, 0].log_softmax(-1)).mean() - 1e-2).clamp_min(0) ** 2

        # Where it is silent, a slack bound changes nothing; beyond, the difference is the hinge's gradient.
        slack = Bench(build(bound=1e6), {"policy": fractions(OLD)})
        added = bench.gradient(rows, now=now)[0] - slack.gradient(rows, now=now)[0]
        beyond = bool(distance > 1e-2)
        gaps[beyond] = off(added, slope(hinge, now)) if beyond else float(added.abs().max())
    holds = gaps.keys() == {True, False} and gaps[False] < 1e-9 and gaps[True] < 1e-5
    return f"inside {gaps.get(False, math.nan):.1e}, beyond off by {gaps.get(True, math.nan):.1e}", holds
