"""What the recipes that learn from preferences claim, run on the recipes themselves over tables of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from leibler.claims.framework import claim
from leibler.claims.simplex import f_optimum, tilt
from leibler.claims.tables import F64, Bench, Build, Table, listed, normal, of, off
from leibler.divergence import Alpha, ForwardKL, JensenShannon, ReverseKL
from leibler.objective import CHOSEN, REJECTED, Rows

STRENGTH = torch.tensor([1, 2, 3, 6])
"""Bradley-Terry: answer i beats answer j with probability ``STRENGTH[i] / (STRENGTH[i] + STRENGTH[j])``."""


def _pairs(strength: Tensor = STRENGTH) -> Rows:
    """Every pair of answers, labelled as often as its Bradley-Terry probability says."""
    answers = range(len(strength))
    return _compared([(i, j) for i in answers for j in answers if i != j for _ in range(int(strength[i]))])


def _compared(pairs: list[tuple[int, int]]) -> Rows:
    """Pairs of answers to one prompt, the better one first."""
    response = torch.tensor(pairs).flatten()[:, None]
    group = torch.arange(len(pairs)).repeat_interleave(2)
    role = torch.tensor([CHOSEN, REJECTED]).repeat(len(pairs))
    return listed(torch.zeros(2 * len(pairs), dtype=torch.long), response, group, role)


def _bench(build: Build, reference: Tensor, **params: object) -> Bench:
    table = Table(reference[None, None])
    return Bench(build(**params), {"policy": table, "reference": table.copy()})


# ---- dpo -----------------------------------------------------------------------------------------------------------


@claim(
    "dpo",
    "Descending the loss on preferences ends where E[r] - beta KL(p||reference) is greatest",
    "log-probabilities within 1e-5 of reference exp(r / beta), normalised, for Bradley-Terry labels of r",
)
def dpo_finds_the_tilted_reference(build: Build = of("dpo")) -> tuple[str, bool]:
    reference = normal(4, seed=1)
    found = _bench(build, reference, beta=0.5).settle(_pairs())[0]
    gap = float((found - tilt(reference.log_softmax(-1), STRENGTH.double().log(), 0.5)).abs().max())
    return f"largest difference {gap:.1e} nats", gap < 1e-5


@claim(
    "dpo",
    "Each pair pulls with weight beta sigmoid(-margin): the more, the more wrongly it is ranked",
    "gradient -beta sigmoid(-z) (grad log p(chosen) - grad log p(rejected)), relative difference below 1e-6",
)
def dpo_weighs_pairs_by_their_error(build: Build = of("dpo")) -> tuple[str, bool]:
    reference, now = normal(4, seed=1), normal(1, 1, 4, seed=2, scale=3.0)
    pairs = [(0, 1), (2, 3), (3, 0)]
    ratio = now[0, 0].log_softmax(-1) - reference.log_softmax(-1)
    expected = torch.zeros(4, dtype=F64)
    for better, worse in pairs:
        weight = 0.1 * torch.sigmoid(-0.1 * (ratio[better] - ratio[worse])) / len(pairs)
        expected[better] -= weight  # the laws' parts of the two scores cancel
        expected[worse] += weight
    gap = off(_bench(build, reference).gradient(_compared(pairs), now=now)[0].flatten(), expected)
    return f"relative difference {gap:.1e}", gap < 1e-6


# ---- f-dpo ---------------------------------------------------------------------------------------------------------


@claim(
    "f-dpo",
    "Descending the loss ends where E[r] - beta D_f(p||reference) is greatest, for each divergence",
    "log-probabilities within 1e-4 of the optimum found by inverting f': Jensen-Shannon (the default), alpha, forward "
    "and reverse KL",
)
def f_dpo_finds_the_optimum(build: Build = of("f-dpo")) -> tuple[str, bool]:
    reference, reward = normal(4, seed=1, scale=0.5), STRENGTH.double().log()
    gaps = {}
    for divergence in (None, Alpha(0.5), ForwardKL(), ReverseKL()):
        params = {} if divergence is None else {"divergence": divergence}
        found = _bench(build, reference, beta=1.0, **params).settle(_pairs())[0]
        meant = divergence or JensenShannon(0.5)
        best = f_optimum(reference.log_softmax(-1), reward, 1.0, meant)
        gaps[type(meant).__name__] = float((found - best).abs().max())
    return ", ".join(f"{n} {g:.1e}" for n, g in gaps.items()), max(gaps.values()) < 1e-4


@claim(
    "f-dpo",
    "Tail law: the log-probability of a worse and worse answer falls in step with its reward under reverse KL and "
    "Jensen-Shannon, but only like the logarithm of it under forward KL",
    "beaten 100 times to 1 instead of 10, beta = 1: log 10 = 2.303 nats lower (to 0.01) under reverse KL, more than "
    "1.5 times that under Jensen-Shannon (in the limit twice: this one is half the paper's), under 1 nat under "
    "forward KL",
)
def f_dpo_tails(build: Build = of("f-dpo")) -> tuple[str, bool]:
    falls = {}
    for divergence in (ReverseKL(), JensenShannon(0.5), ForwardKL()):
        last = []
        for times in (10, 100):
            pairs = [(0, 1)] * times + [(1, 0)]
            found = _bench(build, torch.zeros(2), divergence=divergence, beta=1.0).settle(_compared(pairs))[0]
            last.append(float(found[1] - found[0]))
        falls[type(divergence).__name__] = last[0] - last[1]
    decade = math.log(10)
    holds = abs(falls["ReverseKL"] - decade) < 0.01 and 1.5 * decade < falls["JensenShannon"] <= 2 * decade + 0.01
    return ", ".join(f"{n} {f:.3f} nats" for n, f in falls.items()), holds and 0 < falls["ForwardKL"] < 1


# ---- inpo ----------------------------------------------------------------------------------------------------------

WINS = torch.tensor([[2, 3, 1, 3], [1, 2, 4, 2], [3, 0, 2, 1], [1, 2, 3, 2]])
"""Quarters: how often answer i is preferred to answer j; 0 beats 1 beats 2 beats 0, so no reward explains it."""
PREVIOUS = torch.tensor([1, 2, 2, 1])


def _judged() -> Rows:
    """Every pair of two draws of the previous policy, labelled both ways as often as the judge does."""
    pairs = []
    for i in range(4):
        for j in range(i + 1, 4):
            times = int(PREVIOUS[i] * PREVIOUS[j])
            pairs += [(i, j)] * (times * int(WINS[i, j])) + [(j, i)] * (times * int(WINS[j, i]))
    return _compared(pairs)


def _next(reference: Tensor, previous: Tensor, eta: float, tau: float) -> Tensor:
    """``exp(P(y > previous) / eta) reference^(tau/eta) previous^(1 - tau/eta)``, normalised: log-probabilities."""
    wins = (WINS.double() / 4) @ previous.exp()
    return (wins / eta + tau / eta * reference + (1 - tau / eta) * previous).log_softmax(-1)


@claim(
    "inpo",
    "A round's loss is least at the closed form of mirror descent on the preference game",
    "descending it from the previous policy ends within 1e-5 of exp(P(y > previous)/eta) reference^(tau/eta) "
    "previous^(1-tau/eta), where the gradient is below 1e-9",
)
def inpo_takes_the_mirror_step(build: Build = of("inpo"), eta: float = 1.5, tau: float = 0.5) -> tuple[str, bool]:
    reference, previous = normal(4, seed=1).log_softmax(-1), PREVIOUS.double().log().log_softmax(-1)

    def bench() -> Bench:
        models = {"policy": Table(previous[None, None]), "previous": Table(previous[None, None])}
        return Bench(build(eta=eta, tau=tau), {**models, "reference": Table(reference[None, None])})

    best = _next(reference, previous, eta, tau)
    flat = float(bench().gradient(_judged(), now=best[None, None])[0].abs().max())
    gap = float((bench().settle(_judged())[0] - best).abs().max())
    return f"gradient there {flat:.1e}; largest difference {gap:.1e} nats", flat < 1e-9 and gap < 1e-5
