"""How distillation behaves over tables where chance plays a part: many draws, held against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from leibler.claims.framework import claim
from leibler.claims.simplex import target_table
from leibler.claims.tables import F64, Bench, Build, Table, listed, normal, of
from leibler.divergence import ReverseKL
from leibler.objective import Column, Imitate, Match, Objective
from leibler.theory import (
    full_soft_labels,
    hard_labels,
    partial_soft_labels,
    risk,
    surviving_diversity,
    weighted_likelihood,
)
from leibler.train import Data, Recipe


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _match(recipe: Recipe) -> Match:
    (term,) = (t for t in recipe.objective.terms if isinstance(t, Match))
    return term


# ---- akl -----------------------------------------------------------------------------------------------------------


def _head(teacher: Tensor, mass: float = 0.5) -> Tensor:
    """1 for the most likely symbols that hold the mass together, and for the first one in any case."""
    ranked, order = teacher.sort(dim=-1, descending=True)
    inside = ranked.cumsum(-1) <= mass
    inside[:, 0] = True
    return torch.zeros_like(teacher).scatter(-1, order, inside.to(teacher.dtype))


@claim(
    "akl",
    "Near the uniform law the reverse KL pulls at the teacher's tail with a larger part of its force than the forward "
    "KL, at every one of 200 teachers; the mixture, weighted by the gaps, stands between",
    "share of the absolute gradient in the tail, for teachers of spread 3 over 50 symbols: reverse above forward in "
    "all, by over 0.15 on average; akl's mean between theirs",
)
def akl_stands_between_head_and_tail(build: Build = of("akl")) -> tuple[str, bool]:
    count, vocab = 200, 50
    teacher, student = normal(count, 1, vocab, seed=6, scale=3.0), normal(count, 1, vocab, seed=7, scale=0.1)
    tail = 1 - _head(teacher[:, 0].softmax(-1))
    rows = listed(torch.arange(count), torch.zeros(count, 1, dtype=torch.long))
    share = {}
    for name, recipe in {
        "akl": build(),
        "forward": of("kd")(),
        "reverse": of("kd")(divergence=ReverseKL()),
    }.items():
        bench = Bench(recipe, {"policy": Table(student), "teacher": Table(teacher)})
        # Down is the way to the teacher: a pull that goes up moves no gap.
        force = -bench.gradient(rows)[0][:, 0]
        towards = (teacher[:, 0].softmax(-1) - student[:, 0].softmax(-1)).sign()
        helps = float((force * towards).sum()) > 0
        share[name] = (force.abs() * tail).sum(-1) / force.abs().sum(-1) * (1.0 if helps else -1.0)
    mean = {name: float(x.mean()) for name, x in share.items()}
    always = float((share["reverse"] > share["forward"]).double().mean())
    shown = ", ".join(f"{name} {x:.2f}" for name, x in mean.items()) + f"; reverse above forward in {always:.0%}"
    between = mean["forward"] + 0.02 < mean["akl"] < mean["reverse"] - 0.02
    return shown, always == 1.0 and mean["reverse"] > mean["forward"] + 0.15 and between


@claim(
    "akl",
    "Where the student can express the teacher, forward, reverse and adaptive KL end at the same law: they differ in "
    "the path only",
    "20 teachers over 50 symbols, 1,000 steps of gradient descent at rate 2: all end with less than 1% of the initial "
    "sum of absolute gaps, in the head and in the tail",
    full=True,
)
def akl_ends_where_both_end(build: Build = of("akl")) -> tuple[str, bool]:
    count, vocab = 20, 50
    teacher, start = normal(count, 1, vocab, seed=4, scale=3.0), normal(count, 1, vocab, seed=5, scale=0.1)
    q = teacher[:, 0].softmax(-1)
    head = _head(q)
    left = {}
    for name, recipe in {
        "akl": build(),
        "forward": of("kd")(),
        "reverse": of("kd")(divergence=ReverseKL()),
    }.items():
        bench = Bench(recipe, {"policy": Table(start), "teacher": Table(teacher)})
        views = bench.annotate(listed(torch.arange(count), torch.zeros(count, 1, dtype=torch.long)))
        parts = (head, 1 - head)
        before = [((bench.policy.log_laws().exp() - q).abs() * part).sum(-1) for part in parts]
        for _ in range(1000):
            bench.descend(views, rate=2.0 * count)
        after = [((bench.policy.log_laws().exp() - q).abs() * part).sum(-1) for part in parts]
        left[name] = [float((a / b).mean()) for a, b in zip(after, before, strict=True)]
    shown = ", ".join(f"{name} {h:.4f}/{t:.4f}" for name, (h, t) in left.items())
    return f"left in head/tail: {shown}", max(x for pair in left.values() for x in pair) < 0.01


# ---- distillm ------------------------------------------------------------------------------------------------------


@claim(
    "distillm",
    "From the frequencies of n samples the skewed KL can be told at all: finite, with a small spread, where the plain "
    "KL is infinite as soon as one symbol was not drawn",
    "50 symbols, 500 estimates from n = 20, 100, 500 samples of the teacher's own law, two teachers: all finite, with "
    "a standard deviation below 0.2 and falling with n; of the plain KLs over 90% infinite at n = 20",
)
def distillm_can_be_estimated(build: Build = of("distillm")) -> tuple[str, bool]:
    divergence, plain = _match(build()).divergence, _match(of("kd")()).divergence
    spread: list[list[float]] = []
    finite, infinite = True, 1.0
    for seed in (0, 1):
        law = normal(50, seed=seed, scale=1.0).log_softmax(-1)
        spread.append([])
        for n in (20, 100, 500):
            counts = _counted(law.exp().expand(500, -1), n, _generator(10 + seed))
            seen = (counts / n).log()
            values = divergence(seen, law.expand_as(seen))  # type: ignore[operator]
            finite &= bool(values.isfinite().all())
            spread[-1].append(float(values.std()))
            if n == 20:
                against = plain(seen, law.expand_as(seen))  # type: ignore[operator]
                infinite = min(infinite, float(against.isinf().double().mean()))
    shown = "; ".join("/".join(f"{s:.3f}" for s in row) for row in spread)
    falls = all(a > b > c for a, b, c in spread)
    holds = finite and infinite > 0.9 and falls and max(max(row) for row in spread) < 0.2
    return f"standard deviations {shown}; plain KL infinite in {infinite:.0%}", holds


@claim(
    "distillm",
    "No sample can pull with more than (1 - lam) / lam: the weight of a symbol's score is bounded however unlikely the "
    "student holds it, where the plain KL's is the density ratio itself",
    "largest weight over ratios from e^-60 to e^60: within 1e-6 of 9 and never above; over 1e20 for the plain KL",
)
def distillm_bounds_each_pull(build: Build = of("distillm")) -> tuple[str, bool]:
    ratios = torch.linspace(-60, 60, 1201, dtype=F64)  # of student to teacher, logarithms
    # D = E_teacher[f(u)] has the gradient E_student[f'(u) score]: f' is each sample's weight.
    bound, plain = (float(_match(recipe).divergence.f_prime(ratios).abs().max()) for recipe in (build(), of("kd")()))
    return f"{bound:.6f}, plain {plain:.1e}", 9 - 1e-6 < bound <= 9 + 1e-9 and plain > 1e20


def _counted(law: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """How often each symbol came up in so many draws from each row: ``[rows vocab]``."""
    drawn = torch.multinomial(law, samples, replacement=True, generator=generator)
    return torch.zeros_like(law).scatter_add_(1, drawn, torch.ones_like(drawn, dtype=law.dtype))


# ---- recursive-meta-distillation -----------------------------------------------------------------------------------


LINES = 10_000


def _sampled_generations(build: Build, law: Tensor, n: int, looks: tuple[int, ...], **params: Any) -> list[Tensor]:
    """The laws of many lines of students at some generations: frequencies of ``n`` draws from the recipe's target."""
    target = _match(build(**params)).to
    student, g = law.expand(LINES, -1), _generator(0)
    teacher, seen = law.log().expand_as(student), []
    for number in range(1, max(looks) + 1):
        scores = target_table(target, {"previous": student.log(), "teacher": teacher})
        student = _counted(scores.softmax(-1), n, g) / n
        if number in looks:
            seen.append(student)
    return seen


@claim(
    "recursive-meta-distillation",
    "When each generation learns from n samples of its target, no anchor means collapse: diversity falls by 1 - 1/n a "
    "generation. With the arithmetic anchor errors do not add up but stay at a level that falls with the anchor; with "
    "the geometric one what is lost stays lost, and symbols go on being lost",
    "n = 50, 5 symbols, 10,000 lines. No anchor, 40 generations: 1 - sum p^2 within 3% of (1 - 1/n)^40 of the first. "
    "Arithmetic anchors 0.1, 0.3, 0.6: variance within 3% of p(1-p) / (n - (n-1)(1-w)^2). Anchor 0.1, from generation "
    "40 to 80: share of symbols missing steady to 0.01 with the arithmetic mean, up by 0.05 with the geometric one",
    full=True,
)
def generations_from_samples(build: Build = of("recursive-meta-distillation")) -> tuple[str, bool]:
    law = torch.tensor([0.4, 0.25, 0.2, 0.1, 0.05], dtype=F64)
    n, first = 50, float(1 - law.square().sum())
    (alone,) = _sampled_generations(build, law, n, (40,), anchor=0.0)
    decay = float((1 - alone.square().sum(-1)).mean()) / (surviving_diversity(n, 40) * first) - 1
    gaps = []
    for anchor in (0.1, 0.3, 0.6):
        (found,) = _sampled_generations(build, law, n, (60,), anchor=anchor)
        expected = (law * (1 - law)).sum() / (n - (n - 1) * (1 - anchor) ** 2)
        gaps.append(float((found - law).square().mean(0).sum() / expected) - 1)
    missing = {}
    for mean in ("arithmetic", "geometric"):
        laws = _sampled_generations(build, law, n, (40, 80), anchor=0.1, geometric=mean == "geometric")
        missing[mean] = [float((x == 0).double().mean()) for x in laws]
    shown = f"diversity off by {decay:+.1%}, variance by {', '.join(f'{x:+.1%}' for x in gaps)}; symbols missing "
    shown += ", ".join(f"{a:.1%} then {b:.1%} ({mean})" for mean, (a, b) in missing.items())
    steady, lost = (late - early for early, late in missing.values())
    holds = abs(decay) < 0.03 and max(map(abs, gaps)) < 0.03
    return shown, holds and abs(steady) < 0.01 and lost > 0.05


# ---- transfer-limits -----------------------------------------------------------------------------------------------

INPUTS, LABELS = 20, 10


def _labels(teacher: Tensor, samples: int, seed: int) -> Tensor:
    """How often each label of each input was drawn, inputs uniform: ``[inputs labels]`` counts."""
    cells = (teacher / INPUTS).flatten()[None]
    return _counted(cells, samples, _generator(seed))[0].reshape(INPUTS, LABELS).long()


Rule = Callable[[Tensor, Tensor], Tensor]
RULES: dict[str, Rule] = {
    "hard": lambda counts, teacher: hard_labels(counts),
    "weighted": weighted_likelihood,
    "partial": partial_soft_labels,
    "full": full_soft_labels,
}
"""What a student learns from labels, from labels weighted by their probabilities, from both, and from whole laws."""


@claim(
    "transfer-limits",
    "Hard labels teach at the rate of 1/sqrt(n); their probabilities, and whole laws, much faster; weighting the "
    "likelihood by the probabilities stops at the squared teacher",
    "20 inputs, 10 labels, 40 repeats for each of two teachers, mean total variation at n = 100, 1,600, 25,600: slope "
    "of hard labels -0.45 to -0.55 (logarithms); with probabilities below 0.01 at 1,600 and 1e-4 at 25,600, whole laws "
    "below 1e-4 at 1,600; weighted within 0.005 of the squared teacher's distance at 25,600",
)
def transfer_rates(rules: Mapping[str, Rule] = RULES) -> tuple[str, bool]:
    sizes, holds, shown = (100, 1600, 25_600), True, []
    for seed in (0, 1):
        teacher = normal(INPUTS, LABELS, seed=seed, scale=1.5).softmax(-1)
        found = {name: [0.0] * 3 for name in rules}
        for i, n in enumerate(sizes):
            for repeat in range(40):
                counts = _labels(teacher, n, 1000 * seed + repeat)
                for name, rule in rules.items():
                    found[name][i] += risk(rule(counts, teacher), teacher) / 40
        squared = risk(teacher.square() / teacher.square().sum(-1, keepdim=True), teacher)
        first, _, last = (max(x, 1e-12) for x in found["hard"])
        slope = math.log(last / first) / math.log(sizes[2] / sizes[0])
        holds &= -0.55 < slope < -0.45 and abs(found["weighted"][2] - squared) < 0.005
        holds &= found["partial"][1] < 0.01 and found["partial"][2] < 1e-4 and found["full"][1] < 1e-4
        risks = "; ".join(f"{name} " + "/".join(f"{x:.3f}" for x in values) for name, values in found.items())
        shown.append(f"{risks} (slope {slope:.2f}, squared teacher {squared:.3f})")
    return " | ".join(shown), holds


@claim(
    "transfer-limits",
    "Gradient training of each loss ends at its closed form: likelihood at the frequencies, weighted likelihood at the "
    "frequencies times the teacher, the squared error of log-probabilities at the teacher on all labels seen, and the "
    "forward KL at the teacher",
    "20 inputs, 10 labels, 1,600 samples of each of two teachers: probabilities within 0.002 of the closed forms",
    full=True,
)
def transfer_by_gradients(build: Build = of("transfer-limits")) -> tuple[str, bool]:
    recipes = {
        "hard": of("sft")(),
        "weighted": Recipe(Data(columns=("label_p",)), Objective(Imitate(weight=Column("label_p", reach="token")))),
        "partial": build(),
        "full": of("kd")(),
    }
    gap = dict.fromkeys(recipes, 0.0)
    for seed in (0, 1):
        teacher = normal(INPUTS, LABELS, seed=seed, scale=1.5).softmax(-1)
        counts = _labels(teacher, 1600, 7 + seed)
        for name, recipe in recipes.items():
            found = _settled(recipe, counts, teacher) - RULES[name](counts, teacher)
            gap[name] = max(gap[name], float(found.abs().max()))
    return ", ".join(f"{name} {x:.1e}" for name, x in gap.items()), max(gap.values()) < 2e-3


def _settled(recipe: Recipe, counts: Tensor, teacher: Tensor) -> Tensor:
    """The student's law after the recipe was descended to the end on the labels that were drawn."""
    s, a = (index.repeat_interleave(counts[counts > 0]) for index in counts.nonzero(as_tuple=True))
    p = teacher[s, a][:, None]
    rows = listed(s, a[:, None], label_p=p, label_logp=p.log())
    models = {"policy": Table(torch.zeros(INPUTS, 1, LABELS, dtype=F64)), "teacher": Table(teacher.log()[:, None])}
    return Bench(recipe, models).settle(rows, iterations=400, tolerance=1e-10).exp()
