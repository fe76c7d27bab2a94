"""What the distillation recipes claim that compare with more than the teacher's own law, over tables of logits."""

from __future__ import annotations

import torch
from torch import Tensor

from leibler.claims.distillation import GIVEN, STUDENT, TEACHER
from leibler.claims.framework import claim
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
    visits,
)
from leibler.divergence import ReverseKL
from leibler.estimate import K2
from leibler.objective import CHOSEN, REJECTED, GroupNormalised, Match, Objective, PolicyGradient, Reward, Rows, Teacher
from leibler.train import Answer, OnPolicy, Recipe, Schedule, Score

# ---- rlad ----------------------------------------------------------------------------------------------------------


_ARMS = shuffled(2, 1, 4, seed=1)


def _pairs_of_arms() -> Rows:
    """Every pair of draws in two contexts of four arms, of which one is right."""
    prompt, response, group = every_pair(_ARMS)
    return rewarded(listed(prompt, response, group), lambda x, y: float(y[0] == x))


def _pull(recipe: Recipe, teacher: Table) -> Tensor:
    """The recipe's gradient on the arms' logits."""
    models = {"policy": fractions(_ARMS), "teacher": teacher, "reference": fractions(_ARMS)}
    return Bench(recipe, models).gradient(_pairs_of_arms())[0][:, 0]


@claim(
    "rlad",
    "The teacher gates each token at the first step already: a good one passes only where (old/teacher)^(1-alpha) is "
    "at most 1 + clip, a bad one only where it is at least 1 - clip, and the ratio scales what passes",
    "gradient equal to the gated sum written out over every pair of draws: relative difference below 1e-5, with both "
    "gates shut somewhere and open somewhere",
)
def rlad_gates_by_the_teacher(build: Build = of("rlad")) -> tuple[str, bool]:
    teacher = Table(normal(2, 1, 4, seed=2, scale=1.5))
    rows = _pairs_of_arms()
    prompt, arm = rows.tokens.t()
    reward = rows.columns["reward"].reshape(-1, 2).to(F64)
    advantage = ((reward - reward.mean(1, keepdim=True)).sign() / 2**0.5).flatten()  # of two draws
    old, law = fractions(_ARMS).log_laws(), teacher.log_laws()
    ratio = (0.5 * (old - law)).exp()[prompt, arm]
    good, bad = advantage > 0, advantage < 0
    passes = (good & (ratio <= 1.2)) | (bad & (ratio >= 0.8))
    score = torch.nn.functional.one_hot(arm, 4) - old.exp()[prompt]
    expected = torch.zeros(2, 4, dtype=F64).index_add_(0, prompt, -(passes * ratio * advantage)[:, None] * score)
    gap = off(_pull(build(epochs=1), teacher), expected / len(prompt))
    both = all(bool(passes[side].any()) and not bool(passes[side].all()) for side in (good, bad))
    return f"relative difference {gap:.1e}; {float(passes[good | bad].double().mean()):.0%} of tokens pass", (
        gap < 1e-5 and both
    )


@claim(
    "rlad",
    "With alpha = 1 the teacher is gone and the method is GRPO, bit for bit; with the default it is not",
    "gradients equal at alpha = 1, different by over 10% at 0.5",
)
def rlad_contains_grpo(build: Build = of("rlad")) -> tuple[str, bool]:
    teacher = Table(normal(2, 1, 4, seed=2, scale=1.5))
    grpo = _pull(of("grpo")(coefficient=0.0), teacher)
    same, other = _pull(build(alpha=1.0, epochs=1), teacher), _pull(build(epochs=1), teacher)
    gap = off(other, grpo)
    return f"equal: {bool(torch.equal(same, grpo))}; off by {gap:.0%} at 0.5", bool(
        torch.equal(same, grpo)
    ) and gap > 0.1


def _half_wrong_teacher(recipe: Recipe, rounds: tuple[int, ...], seeds: int = 4) -> list[tuple[float, float]]:
    """Chance of the right arm of six where the teacher is right (70% of contexts) and where it is wrong, at rounds."""
    contexts, arms = 10 * seeds, 6
    right = torch.arange(contexts) % arms
    sure = torch.where(torch.arange(contexts) % 10 < 7, right, (right + 1) % arms)
    law = torch.full((contexts, arms), 0.3 / (arms - 1), dtype=F64).scatter_(1, sure[:, None], 0.7)
    start = normal(contexts, 1, arms, seed=6, scale=0.3)
    bench = Bench(recipe, {"policy": Table(start), "teacher": Table(law.log()[:, None])})
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD([bench.policy.logits], lr=0.5 * contexts)
    seen = []
    for number in range(1, max(rounds) + 1):
        rows = bench.draw(torch.arange(contexts), generator, check=lambda x, y: float(y[0] == int(right[x])))
        bench.use(rows, optimiser, generator)
        if number in rounds:
            chance = bench.policy.log_laws().exp()[torch.arange(contexts), right]
            agrees = sure == right
            seen.append((float(chance[agrees].mean()), float(chance[~agrees].mean())))
    return seen


@claim(
    "rlad",
    "Where the teacher is right, the gated ratio learns faster than rewards alone; where it is confidently wrong, it "
    "is hurt less than by a KL to the teacher, but it is hurt",
    "ten contexts of six arms, teacher wrong on three, 8 steps a round. After 6 rounds, where the teacher is right: "
    "0.08 ahead of rewards alone. After 20, where it is wrong: 0.1 ahead of rewards plus KL, 0.15 behind rewards alone",
    full=True,
)
def rlad_imitates_selectively(build: Build = of("rlad")) -> tuple[str, bool]:
    schedule, source = Schedule(epochs=8), OnPolicy(8) >> Score(Answer())
    plain = of("grpo")(coefficient=0.0)
    gradient = PolicyGradient(Reward() >> GroupNormalised(), plain.objective.terms[0].surrogate)  # type: ignore[attr-defined]
    pull = Match(ReverseKL(), to=Teacher(), estimator=K2(), coefficient=0.5)
    recipes = {
        "rewards": Recipe(source, Objective(gradient), schedule),
        "with KL": Recipe(source, Objective(gradient, pull), schedule),
        "rlad": build(alpha=0.7, epochs=8),
    }
    seen = {name: _half_wrong_teacher(recipe, (6, 20)) for name, recipe in recipes.items()}
    shown = ", ".join(
        f"{name} {x[0][0]:.2f}/{x[0][1]:.2f} then {x[1][0]:.2f}/{x[1][1]:.2f}" for name, x in seen.items()
    )
    faster = seen["rlad"][0][0] > seen["rewards"][0][0] + 0.08
    wrong = {name: late[1] for name, (_, late) in seen.items()}
    spared = wrong["with KL"] + 0.1 < wrong["rlad"] < wrong["rewards"] - 0.15
    return f"teacher right/wrong: {shown}", faster and spared


# ---- delta-kd ------------------------------------------------------------------------------------------------------


def _shifted(recipe: Recipe, reference: Table, teacher: Table, teacher_base: Table) -> tuple[Tensor, Tensor, Bench]:
    """The recipe's gradient, the share of each context, and the bench."""
    models = {
        "policy": fractions(STUDENT, 2), "reference": reference, "teacher": teacher, "teacher_base": teacher_base,
        "data": fractions(GIVEN, 2),
    }  # fmt: skip
    bench = Bench(recipe, models)
    prompt, response = every(GIVEN, 2)
    return bench.gradient(listed(prompt, response))[0], visits(prompt, response, 3), bench


def _pull_to(target: Tensor, share: Tensor, bench: Bench) -> Tensor:
    """The gradient of ``KL(target || p)`` at the listed contexts."""
    return share[..., None] * (bench.policy.log_laws().exp().reshape(2, 4, 3) - target)


@claim(
    "delta-kd",
    "The target is the student's own initial law times (teacher / its base)^alpha, normalised at each context",
    "gradient equal to forward KL's to it, written out, at alpha = 0.5, 1 and 2: relative difference below 1e-6",
)
def delta_kd_shifts_the_students_own_law(build: Build = of("delta-kd")) -> tuple[str, bool]:
    reference, base, teacher = (Table(normal(2, 4, 3, seed=s), 2) for s in (7, 8, 9))
    gaps = []
    for alpha in (0.5, 1.0, 2.0):
        found, share, bench = _shifted(build(alpha=alpha, imitate=0.0), reference, teacher, base)
        scores = reference.log_laws() + alpha * (teacher.log_laws() - base.log_laws())
        gaps.append(off(found, _pull_to(scores.softmax(-1).reshape(2, 4, 3), share, bench)))
    return f"largest relative difference {max(gaps):.1e}", max(gaps) < 1e-6


@claim(
    "delta-kd",
    "If student and teacher began as one model it is plain distillation; if the teacher never moved, the student is "
    "held to its own initial law",
    "gradients equal to 1e-6 to those of kd with the teacher, and with the initial law, as target",
)
def delta_kd_at_its_limits(build: Build = of("delta-kd")) -> tuple[str, bool]:
    base, teacher = Table(normal(2, 4, 3, seed=8), 2), fractions(TEACHER, 2)
    plain, share, bench = _shifted(build(imitate=0.0), base, teacher, base)
    held, _, _ = _shifted(build(imitate=0.0), base, teacher, teacher)
    gaps = [
        off(found, _pull_to(target.log_laws().exp().reshape(2, 4, 3), share, bench))
        for found, target in ((plain, teacher), (held, base))
    ]
    return f"relative differences {gaps[0]:.1e} and {gaps[1]:.1e}", max(gaps) < 1e-6


# ---- dpkd ----------------------------------------------------------------------------------------------------------


def _contexts_of_dpkd(recipe: Recipe, count: int = 40, vocab: int = 6) -> tuple[Bench, Tensor]:
    """One symbol after each of many prompts; the gradient of the recipe on the logits."""
    student, teacher = normal(count, 1, vocab, seed=1), normal(count, 1, vocab, seed=2)
    bench = Bench(recipe, {"policy": Table(student), "teacher": Table(teacher)})
    rows = listed(torch.arange(count), torch.zeros(count, 1, dtype=torch.long))
    return bench, bench.gradient(rows)[0][:, 0]


@claim(
    "dpkd",
    "Where both put the same token first, nothing pulls; elsewhere only the two first choices are moved, by "
    "beta sigmoid(-beta h)",
    "gradient exactly 0 in the first case, equal to that formula in the second: relative difference below 1e-6",
)
def dpkd_moves_first_choices_only(build: Build = of("dpkd")) -> tuple[str, bool]:
    beta = 0.7
    bench, found = _contexts_of_dpkd(build(beta=beta, share=1.0))
    z, y = bench.policy.logits.detach()[:, 0], bench.models["teacher"].logits.detach()[:, 0]
    a, b = y.argmax(-1, keepdim=True), z.argmax(-1, keepdim=True)
    h = (z.gather(1, a) - z.gather(1, b)) - (y.gather(1, a) - y.gather(1, b))
    pull = beta * torch.sigmoid(-beta * h) / len(z)
    expected = torch.zeros_like(z).scatter_add_(1, a, -pull).scatter_add_(1, b, pull)
    agree = (a == b)[:, 0]
    gap, idle = off(found[~agree], expected[~agree]), bool((found[agree] == 0).all())
    return f"relative difference {gap:.1e}; {int(agree.sum())} of {len(z)} agree, gradient 0 there: {idle}", (
        gap < 1e-6 and idle and 0 < int(agree.sum()) < len(z)
    )


@claim(
    "dpkd",
    "Descended to the end it copies the teacher's first choices and not its law; forward KL copies both",
    "200 steps at rate 1: all first choices agree, with a forward KL above 0.1 nats; below 0.01 for forward KL",
)
def dpkd_copies_first_choices_not_laws(build: Build = of("dpkd")) -> tuple[str, bool]:
    reached = []
    for recipe in (build(share=1.0), of("kd")()):
        bench, _ = _contexts_of_dpkd(recipe)
        count = len(bench.policy.logits)
        views = bench.annotate(listed(torch.arange(count), torch.zeros(count, 1, dtype=torch.long)))
        for _ in range(200):
            bench.descend(views, rate=float(count))
        p, q = bench.policy.log_laws(), bench.models["teacher"].log_laws()
        reached.append((float((p.argmax(-1) == q.argmax(-1)).double().mean()), float(kl(q, p).mean())))
    (agree, far), (_, near) = reached
    shown = f"agreement {agree:.0%} with KL {far:.3f}; forward KL ends at {near:.4f}"
    return shown, agree == 1.0 and far > 0.1 and near < 0.01


@claim(
    "dpkd",
    "Between whole responses it is the published loss: -log sigmoid(beta x the difference of mean log-ratios to the "
    "teacher), for a response of the teacher against one of the student",
    "gradient over every pair of two-symbol responses equal to that written out: relative difference below 1e-6",
)
def dpkd_prefers_the_teachers_response(build: Build = of("dpkd")) -> tuple[str, bool]:
    beta = 3.0
    student, teacher = fractions(STUDENT[:1], 2), fractions(TEACHER[:1], 2)
    symbols = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    chosen, rejected = torch.cartesian_prod(torch.arange(9), torch.arange(9)).t()
    response = torch.stack([symbols[chosen], symbols[rejected]], 1).flatten(0, 1)
    count = len(chosen)
    role = torch.tensor([CHOSEN, REJECTED]).repeat(count)
    rows = listed(torch.zeros(2 * count, dtype=torch.long), response, torch.arange(count).repeat_interleave(2), role)
    bench = Bench(build(beta=beta, share=1.0, level="sequence"), {"policy": student, "teacher": teacher})
    theirs = sequence_laws(teacher.logits.detach(), 2)[0]

    def loss(z: Tensor) -> Tensor:
        ratio = (sequence_laws(z, 2)[0] - theirs) / 2
        return -torch.nn.functional.logsigmoid(beta * (ratio[chosen] - ratio[rejected])).mean()

    gap = off(bench.gradient(rows)[0], slope(loss, student.logits))
    return f"relative difference {gap:.1e}", gap < 1e-6


# ---- g-opd ---------------------------------------------------------------------------------------------------------


@claim(
    "g-opd",
    "With one reference for the reward and another for the student, the student is drawn to its own base times "
    "(teacher / the teacher's base)^1.25",
    "expected gradient equal to that of the reverse KL to it, by enumeration: relative difference below 1e-6; over 10% "
    "off with either base in both places",
)
def g_opd_keeps_two_references(build: Build = of("g-opd")) -> tuple[str, bool]:
    models = {name: Table(normal(2, 4, 3, seed=s), 2) for name, s in (("theirs", 7), ("own", 8))}
    models |= {"policy": fractions(STUDENT, 2), "teacher": fractions(TEACHER, 2)}
    own, theirs, teacher = (models[n].log_laws().reshape(2, 4, 3) for n in ("own", "theirs", "teacher"))
    target = (own + 1.25 * (teacher - theirs)).log_softmax(-1)
    prompt, response = every(STUDENT, 2)
    share = visits(prompt, response, 3)
    logits = models["policy"].logits
    expected = slope(lambda z: (share * kl(z.log_softmax(-1), target)).sum(), logits)
    gaps = {}
    for name, given in (
        ("two", {"reference": "theirs", "anchor": "own"}),
        ("theirs", {"reference": "theirs"}),
        ("own", {"reference": "own"}),
    ):
        gaps[name] = off(Bench(build(**given), models).gradient(listed(prompt, response))[0], expected)
    shown = ", ".join(f"{name} {x:.1e}" for name, x in gaps.items())
    return f"relative differences {shown}", gaps["two"] < 1e-6 and min(gaps["theirs"], gaps["own"]) > 0.1
