"""Distillation recipes against closed forms: weights by competence, anchored generations, what labels can teach."""

from __future__ import annotations

import torch
from torch import Tensor

from leibler.claims.framework import claim
from leibler.claims.tables import F64, Bench, Build, Table, kl, listed, normal, of, off
from leibler.objective import Rows
from leibler.theory import anchored, contraction_bound, partial_soft_labels, risk, weighted_likelihood

# ---- paced ---------------------------------------------------------------------------------------------------------

RATES = (0.0, 0.25, 0.5, 0.75, 1.0)


def _problems() -> tuple[dict[str, Table], Rows]:
    """One context for each pass rate, one symbol each."""
    count = len(RATES)
    models = {"policy": Table(normal(count, 1, 6, seed=1)), "teacher": Table(normal(count, 1, 6, seed=2))}
    rows = listed(torch.arange(count), torch.zeros(count, 1, dtype=torch.long), pass_rate=torch.tensor(RATES))
    return models, rows


def _paced(build: Build, step: int = 0, **params: float) -> Tensor:
    models, rows = _problems()
    return Bench(build(**params), models).gradient(rows, step=step)[0][:, 0]


@claim(
    "paced",
    "Problems that are always or never solved teach nothing, and one solved half the time counts 1.5 times; with both "
    "exponents 0 it is plain distillation, bit for bit",
    "gradient of each problem over kd's: 6 p (1 - p), to 1e-6; equal to kd's at a = b = 0",
)
def paced_weighs_by_competence(build: Build = of("paced")) -> tuple[str, bool]:
    plain, found = _paced(of("kd")), _paced(build)
    ratios = (found * plain).sum(-1) / (plain * plain).sum(-1)
    expected = torch.tensor([6 * p * (1 - p) for p in RATES], dtype=F64)
    gap = max(float((ratios - expected).abs().max()), off(found, expected[:, None] * plain))
    same = torch.equal(_paced(build, a=0.0, b=0.0), plain)
    return f"weights {', '.join(f'{r:.4f}' for r in ratios)}; plain at 0: {same}", gap < 1e-6 and same


@claim(
    "paced",
    "Before the turn the forward KL is descended, from there on the reverse one, with the same weights",
    "gradients at the steps before and at the turn equal to those written out: relative difference below 1e-6",
)
def paced_turns_from_forward_to_reverse(build: Build = of("paced")) -> tuple[str, bool]:
    models, _ = _problems()
    p, q = models["policy"].log_laws(), models["teacher"].log_laws()
    weight = torch.tensor([6 * r * (1 - r) for r in RATES], dtype=F64)[:, None] / len(RATES)
    forward = weight * (p.exp() - q.exp())
    reverse = weight * p.exp() * (p - q - kl(p, q)[:, None])
    gaps = [off(_paced(build, step=s, turn=10), g) for s, g in ((9, forward), (10, reverse))]
    return f"relative differences {gaps[0]:.1e} and {gaps[1]:.1e}", max(gaps) < 1e-6


# ---- recursive-meta-distillation -----------------------------------------------------------------------------------


def _generations(recipe_of: Build, count: int, **params: object) -> tuple[list[Tensor], Tensor, Tensor]:
    """The student's law after each generation, fitted to the end; the teacher's; and the first student's."""
    teacher, start = Table(normal(3, 1, 5, seed=1, scale=2.0)), Table(normal(3, 1, 5, seed=2, scale=2.0))
    first = start.log_laws()
    bench = Bench(recipe_of(**params), {"policy": start, "teacher": teacher, "previous": start.copy()})
    rows = listed(torch.arange(3), torch.zeros(3, 1, dtype=torch.long))
    laws = []
    for _ in range(count):
        laws.append(bench.settle(rows, tolerance=1e-11))
        bench.turn()
    return laws, teacher.log_laws(), first


@claim(
    "recursive-meta-distillation",
    "Generation k of a student that can fit its target is (1 - w)^k of the first student and the rest of the teacher",
    "laws after each of four generations within 1e-4 of that, for w = 0.5 and 0.2",
)
def generations_are_drawn_to_the_teacher(build: Build = of("recursive-meta-distillation")) -> tuple[str, bool]:
    gaps = []
    for weight in (0.5, 0.2):
        laws, teacher, first = _generations(build, 4, anchor=weight)
        for k, law in enumerate(laws, start=1):
            kept = (1 - weight) ** k
            gaps.append(float((law.exp() - kept * first.exp() - (1 - kept) * teacher.exp()).abs().max()))
    return f"largest difference {max(gaps):.1e}", max(gaps) < 1e-4


@claim(
    "recursive-meta-distillation",
    "The forward KL to the teacher shrinks by at least 1 - w a generation with either mean; without an anchor nothing "
    "moves. For the reverse KL that rate is false with the geometric mean",
    "four generations within the bound; 10,000 random pairs: no violation of the forward rate, and the reverse one "
    "violated only with the geometric mean, in over a tenth of them",
)
def generations_contract(build: Build = of("recursive-meta-distillation")) -> tuple[str, bool]:
    within = True
    for geometric in (False, True):
        laws, teacher, first = _generations(build, 4, anchor=0.4, geometric=geometric)
        start = float(kl(teacher, first).max())
        kls = [float(kl(teacher, law).max()) for law in laws]
        within &= all(x <= contraction_bound(start, 0.4, k) + 1e-5 for k, x in enumerate(kls, start=1))
        within &= kls[-1] < kls[0] < start
    still, _, first = _generations(build, 2, anchor=0.0)
    idle = float((still[-1].exp() - first.exp()).abs().max()) < 1e-5
    g = torch.Generator().manual_seed(0)
    p, q = (torch.randn(10_000, 8, generator=g, dtype=F64).mul(3).log_softmax(-1) for _ in range(2))
    violated = {}
    for mean in ("arithmetic", "geometric"):
        m = anchored(p, q, 0.5, mean)
        violated[mean] = [
            float((after > 0.5 * before + 1e-12).double().mean())
            for after, before in ((kl(q, m), kl(q, p)), (kl(m, q), kl(p, q)))
        ]
    false_rate = violated["geometric"][1]
    rates = violated["arithmetic"] == [0.0, 0.0] and violated["geometric"][0] == 0.0 and false_rate > 0.1
    shown = f"within the bound: {within}; no anchor, no move: {idle}; reverse rate false in {false_rate:.0%}"
    return shown, within and idle and rates


# ---- transfer-limits -----------------------------------------------------------------------------------------------

INPUTS, LABELS = 20, 10


def _teacher() -> Tensor:
    return normal(INPUTS, LABELS, seed=3, scale=1.5).softmax(-1)


def _counts(teacher: Tensor, samples: int) -> Tensor:
    """How often each label of each input was drawn."""
    g = torch.Generator().manual_seed(samples)
    s = torch.randint(INPUTS, (samples,), generator=g)
    a = torch.multinomial(teacher[s], 1, generator=g)[:, 0]
    return torch.zeros(INPUTS, LABELS, dtype=torch.long).index_put_((s, a), torch.tensor(1), accumulate=True)


def _fitted(build: Build, counts: Tensor, teacher: Tensor) -> Tensor:
    """The student's law after the recipe has been descended to the end on the labels that were drawn."""
    s, a = counts.nonzero(as_tuple=True)  # how often does not matter where the least loss is 0
    rows = listed(s, a[:, None], label_logp=teacher[s, a].log()[:, None])
    bench = Bench(build(), {"policy": Table(torch.zeros(INPUTS, 1, LABELS, dtype=F64))})
    return bench.settle(rows, iterations=200, tolerance=1e-9).exp()


@claim(
    "transfer-limits",
    "Trained to the end, the student holds exactly the teacher's probability of every label that it was shown",
    "1,600 labels over 20 inputs and 10 labels: within 0.005 of the closed form on the labels that were seen",
)
def transfer_copies_what_it_was_shown(build: Build = of("transfer-limits")) -> tuple[str, bool]:
    teacher = _teacher()
    counts = _counts(teacher, 1600)
    seen = counts > 0
    gap = float((_fitted(build, counts, teacher) - partial_soft_labels(counts, teacher))[seen].abs().max())
    return f"largest difference {gap:.1e}, {int((~seen).sum())} of {INPUTS * LABELS} labels unseen", gap < 5e-3


@claim(
    "transfer-limits",
    "With the probabilities of its labels the student beats the best that labels alone allow; weighting the likelihood "
    "by them ends at the squared teacher, however many there are",
    "mean total variation at 25,600 labels: below 0.005, against 0.01 to 0.05 for labels alone and within 0.01 of the "
    "squared teacher's for the weighted likelihood",
)
def transfer_is_faster_with_probabilities(build: Build = of("transfer-limits")) -> tuple[str, bool]:
    teacher = _teacher()
    counts = _counts(teacher, 25_600)
    squared = teacher.square() / teacher.square().sum(-1, keepdim=True)
    found, plain = risk(_fitted(build, counts, teacher), teacher), risk(counts / counts.sum(-1, keepdim=True), teacher)
    weighted, limit = risk(weighted_likelihood(counts, teacher), teacher), risk(squared, teacher)
    holds = found < 0.005 and 0.01 < plain < 0.05 and abs(weighted - limit) < 0.01
    return f"{found:.4f}; labels alone {plain:.4f}, weighted {weighted:.4f} (squared teacher {limit:.4f})", holds
