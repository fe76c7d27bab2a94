"""What the distillation recipes claim, run on the recipes themselves over tables of logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
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
    visits,
)
from leibler.data import Record
from leibler.divergence import JensenShannon
from leibler.objective import Rows, Validation
from leibler.train import Adaptive, Context, Mixture, Recipe
from leibler.train.buffer import pack
from leibler.train.sources import Source

STUDENT, TEACHER, GIVEN = shuffled(2, 4, 3, seed=1), shuffled(2, 4, 3, seed=2), shuffled(2, 4, 3, seed=3)
"""Laws over two prompts and two symbols out of three, in sixths."""


def _models() -> dict[str, Table]:
    return {"policy": fractions(STUDENT, 2), "teacher": fractions(TEACHER, 2), "data": fractions(GIVEN, 2)}


def _rows(bench: Bench) -> tuple[Rows, Tensor]:
    """Every response as often as the recipe's own source yields it, and the share of each context."""
    counts = (bench.law().softmax(-1) * 6).round().long().reshape(STUDENT.shape)
    prompt, response = every(counts, 2)
    return listed(prompt, response), visits(prompt, response, 3)


def _at_contexts(value: Any, share: Tensor, logits: Tensor) -> Tensor:
    """The gradient of ``value(log p)`` per context, each weighted by its share of the symbols."""
    return slope(lambda z: (share * value(z.log_softmax(-1))).sum(), logits)


# ---- sft -----------------------------------------------------------------------------------------------------------


@claim(
    "sft",
    "The likelihood of given completions is greatest at the law that they came from",
    "probabilities within 1e-6 of the data's after descending the recipe's loss",
)
def sft_finds_the_law_of_the_data(build: Build = of("sft")) -> tuple[str, bool]:
    bench = Bench(build(), {**_models(), "policy": Table(torch.zeros(2, 4, 3), 2)})
    found = bench.settle(_rows(bench)[0]).exp()
    gap = float((found - bench.models["data"].log_laws().exp()).abs().max())
    return f"largest difference {gap:.1e}", gap < 1e-6


# ---- kd ------------------------------------------------------------------------------------------------------------


@claim(
    "kd",
    "At every token of given completions the gradient on the logits is student minus teacher",
    "relative difference below 1e-6",
)
def kd_descends_student_minus_teacher(build: Build = of("kd")) -> tuple[str, bool]:
    bench = Bench(build(), _models())
    rows, _ = _rows(bench)
    law = {name: bench.models[name].log_laws().exp().reshape(2, 4, 3) for name in ("policy", "teacher")}
    given = visits(*every(GIVEN, 2), 3)[..., None]
    gap = off(bench.gradient(rows)[0], given * (law["policy"] - law["teacher"]))
    return f"relative difference {gap:.1e}", gap < 1e-6


@claim(
    "kd",
    "At high temperature, distilling is regressing the teacher's centred logits: gradient x vocabulary x T^2",
    "relative difference below 1% at T = 1000",
)
def kd_matches_logits_when_hot(build: Build = of("kd"), temperature: float = 1000.0) -> tuple[str, bool]:
    student, teacher = normal(1, 1, 8, seed=1), normal(1, 1, 8, seed=2)
    bench = Bench(build(), {"policy": Table(student), "teacher": Table(teacher)}, temperature=temperature)
    rows = listed(torch.zeros(8, dtype=torch.long), torch.arange(8)[:, None])
    centred = (student - student.mean()) - (teacher - teacher.mean())
    gap = off(bench.gradient(rows)[0] * 8 * temperature**2, centred)
    return f"relative difference {gap:.1e}", gap < 0.01


# ---- gkd -----------------------------------------------------------------------------------------------------------


@claim(
    "gkd",
    "The generalised Jensen-Shannon divergence is descended at the contexts that the student itself visits",
    "gradient equal to that by enumeration, relative difference below 1e-6",
)
def gkd_trains_where_the_student_goes(build: Build = of("gkd")) -> tuple[str, bool]:
    bench = Bench(build(), _models())
    rows, _ = _rows(bench)
    own = visits(*every(STUDENT, 2), 3)
    q = bench.models["teacher"].log_laws().reshape(2, 4, 3)

    def divergence(p: Tensor) -> Tensor:
        m = ((p.exp() + q.exp()) / 2).log()
        return (kl(q, m) + kl(p, m)) / 2

    gap = off(bench.gradient(rows)[0], _at_contexts(divergence, own, bench.policy.logits))
    return f"relative difference {gap:.1e}", gap < 1e-6


@claim(
    "gkd",
    "Scaled by its weight, the divergence becomes the forward KL as beta goes to 0 and the reverse KL at 1",
    "gradients within 1% of the KLs' at beta = 0.001 and 0.999",
)
def gkd_lies_between_both_kls(build: Build = of("gkd"), beta: float = 1e-3) -> tuple[str, bool]:
    gaps = []
    for here in (beta, 1 - beta):
        bench = Bench(build(divergence=JensenShannon(here)), _models())
        rows, share = _rows(bench)
        q = bench.models["teacher"].log_laws().reshape(2, 4, 3)
        limit = (lambda p, q=q: kl(q, p)) if here < 0.5 else (lambda p, q=q: kl(p, q))
        gaps.append(off(bench.gradient(rows)[0] / beta, _at_contexts(limit, share, bench.policy.logits)))
    return f"relative differences {gaps[0]:.1e} (forward), {gaps[1]:.1e} (reverse)", max(gaps) < 0.01


# ---- minillm -------------------------------------------------------------------------------------------------------


@claim(
    "minillm",
    "Exact single step plus log-ratios still to come is the gradient of the reverse KL of whole responses",
    "equal by enumeration, once the whitening's known scale is put back: relative difference below 1e-6",
)
def minillm_splits_the_sequence_gradient(build: Build = of("minillm")) -> tuple[str, bool]:
    bench = Bench(build(teacher_share=0.0), _models())
    rows, share = _rows(bench)
    teacher = sequence_laws(bench.models["teacher"].logits, 2)
    logits = bench.policy.logits.detach()
    whole = slope(lambda z: kl(sequence_laws(z, 2), teacher).sum() / 4, logits)  # a mean over 2 prompts, 2 symbols
    q = bench.models["teacher"].log_laws().reshape(2, 4, 3)
    single = _at_contexts(lambda p: kl(p, q), share, logits)
    # Whitening divides what is still to come by its spread over all symbols: r_2 at the first, nothing at the second.
    sequences, _ = enumerate_sequences(3, 2)
    at, second = contexts(sequences, 3)[:, 1], sequences[:, 1]
    p = logits.log_softmax(-1)
    ahead = (q - p)[:, at, second]
    weight = sequence_laws(logits, 2).exp() / 4
    mean = (weight * ahead).sum()
    spread = ((weight * (ahead - mean) ** 2).sum() + mean**2 / 2).sqrt()
    found = bench.gradient(rows)[0]
    gap = off(single + (found - single) * spread, whole)
    return f"relative difference {gap:.1e}, the part still to come being {off(single, whole):.0%} of it", gap < 1e-6


@claim(
    "minillm",
    "Responses come from 80% student and 20% teacher, and the ratio that is clipped is to that mixture",
    "gradient equal to the published loss by enumeration, relative difference below 1e-5",
)
def minillm_clips_against_the_mixture(build: Build = of("minillm")) -> tuple[str, bool]:
    student, teacher = torch.tensor([[[1, 3], [1, 3], [3, 1]]]), torch.tensor([[[3, 1], [3, 1], [1, 3]]])
    bench = Bench(build(), {"policy": fractions(student, 2), "teacher": fractions(teacher, 2)})
    counts = (bench.law().softmax(-1) * 20).round().long()[None]
    found, _ = bench.gradient(listed(*every(counts, 2)))
    p0, q = (bench.models[n].log_laws() for n in ("policy", "teacher"))
    mix = (0.8 * p0.exp() + 0.2 * q.exp()).log()
    symbols, _ = enumerate_sequences(2, 2)
    at = contexts(symbols, 2)
    weight = mix[at, symbols].sum(-1).exp()[:, None]
    ahead = torch.stack([(q - p0)[at, symbols][:, 1], torch.zeros(4, dtype=F64)], -1)
    centred = ahead - (weight * ahead).sum() / 2
    advantage = centred / ((weight * centred**2).sum() / 2).sqrt()

    def loss(z: Tensor) -> Tensor:
        p = z[0].log_softmax(-1)
        ratio = (p - mix)[at, symbols].exp()
        clipped = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage)
        return (weight * (clipped + ratio.detach().clamp(max=5) * kl(p, q)[at])).sum() / 2

    gap = off(found, slope(loss, bench.policy.logits))
    return f"relative difference {gap:.1e}", gap < 1e-5


# ---- distillm ------------------------------------------------------------------------------------------------------


def _two(recipe: Recipe, student: Tensor, teacher: Tensor) -> Bench:
    return Bench(recipe, {"policy": Table(student.log()[None, None]), "teacher": Table(teacher.log()[None, None])})


def _one_row() -> Rows:
    return listed(torch.zeros(1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long))


@claim(
    "distillm",
    "The skewed KL is at most -log lam however wrong the student, with the published gradient",
    "loss log 10 = 2.3026 where the plain KL is 30; gradient within 1e-6 of -(1 - lam) p (q/m - <p, q/m>)",
)
def distillm_is_bounded(build: Build = of("distillm")) -> tuple[str, bool]:
    far = math.exp(-30)
    wrong, right = torch.tensor([far, 1 - far], dtype=F64), torch.tensor([1 - far, far], dtype=F64)
    bounded = _two(build(), wrong, right).gradient(_one_row())[1].metrics["loss"]
    p, q = (normal(6, seed=s, scale=2.0).softmax(-1) for s in (1, 2))
    density = q / (0.1 * q + 0.9 * p)
    formula = -0.9 * p * (density - (p * density).sum())
    gap = off(_two(build(), p, q).gradient(_one_row())[0].flatten(), formula)
    holds = abs(bounded - math.log(10)) < 1e-6 and gap < 1e-6
    return f"loss {bounded:.4f}; gradient's relative difference {gap:.1e}", holds


@claim(
    "distillm",
    "The price of the bound: the gradient vanishes where the student has lost a mode of the teacher",
    "about 9 e for laws (e, 1 - e) and (1 - e, e), within 1% at e = 1e-4 and 1e-6, where forward KL's is 1",
)
def distillm_forgives_lost_modes(build: Build = of("distillm")) -> tuple[str, bool]:
    seen = []
    for e in (1e-4, 1e-6):
        student, teacher = torch.tensor([e, 1 - e], dtype=F64), torch.tensor([1 - e, e], dtype=F64)
        # Descending raises the lost mode: the gradient on its logit is negative.
        seen.append(-float(_two(build(), student, teacher).gradient(_one_row())[0].flatten()[0]) / e)
    return f"{seen[0]:.3f} e and {seen[1]:.3f} e", all(abs(s - 9) < 0.09 for s in seen)


@claim(
    "distillm",
    "As the student's share in the mixture goes to 0, the forward KL comes back",
    "gradient off by about lam, at 1e-3 and 1e-5: less than 10 lam of it",
)
def distillm_becomes_forward_kl(build: Build = of("distillm")) -> tuple[str, bool]:
    gaps = []
    for lam in (1e-3, 1e-5):
        bench = Bench(build(lam=lam), _models())
        rows, share = _rows_of_data()
        law = {name: bench.models[name].log_laws().exp().reshape(2, 4, 3) for name in ("policy", "teacher")}
        gaps.append(off(bench.gradient(rows)[0], share[..., None] * (law["policy"] - law["teacher"])) / lam)
    return f"{gaps[0]:.2f} lam and {gaps[1]:.2f} lam", max(gaps) < 10


def _rows_of_data() -> tuple[Rows, Tensor]:
    prompt, response = every(GIVEN, 2)
    return listed(prompt, response), visits(prompt, response, 3)


@dataclass(frozen=True)
class _Fake(Source):
    """Stands for a source in `Adaptive`; says what was drawn."""

    drawn: list[str] = field(default_factory=list, hash=False, compare=False)
    name: str = ""

    def draw(self, context: Context, state: dict[str, Any]) -> tuple[dict[str, Rows], dict[str, Any]]:
        self.drawn.append(self.name)
        return {"main": replace(_one_row(), records=[Record("0")])}, state


@claim(
    "distillm",
    "Student samples come in as validation worsens: shares 1 - phi data, phi (1 - s) fresh, phi s replayed",
    "phi 0.2 after two of four validations worsened by 0.1; shares within 0.03 of it in 4000 draws at s = 1/4",
)
def distillm_adapts_its_source(build: Build = of("distillm")) -> tuple[str, bool]:
    source: Any = build().source
    adaptive: Any = dict(source.sources)["main"] if isinstance(source, Mixture) else source
    if not isinstance(adaptive, Adaptive):
        return f"the source is {type(adaptive).__name__}", False
    drawn: list[str] = []
    fake = replace(adaptive, data=_Fake(drawn, "data"), rollouts=_Fake(drawn, "fresh"))
    state = fake.init()
    for step, nll in enumerate((2.0, 2.15, 2.2, 2.0, 2.26)):  # each is compared with the value at the last raise
        state = fake.observe(state, Validation(step, {"nll": nll}))
    phi = state["phi"]["phi"]
    state = {**state, "buffer": pack(replace(_one_row(), records=[Record("0")]))}
    count = {"data": 0, "fresh": 0, "replayed": 0}
    for draw in range(4000):
        del drawn[:]
        fake.draw(_context(draw), state)
        count[drawn[0] if drawn else "replayed"] += 1
    share = {name: n / 4000 for name, n in count.items()}
    expected = {"data": 0.8, "fresh": 0.2 * 0.75, "replayed": 0.2 * 0.25}
    holds = abs(phi - 0.2) < 1e-9 and all(abs(share[n] - expected[n]) < 0.03 for n in share)
    return f"phi {phi:.1f}; " + ", ".join(f"{n} {s:.3f}" for n, s in share.items()), holds


class _Encoder:
    """The little that a replayed row needs of a model."""

    def decode(self, tokens: Any) -> str:
        return ""


def _context(draw: int) -> Context:
    models: Any = {"policy": _Encoder()}
    return Context(
        models=models, data={}, seed=0, draw=draw, step=25, steps=100, rows=1, max_new_tokens=1, max_length=9,
        temperature=1.0,
    )  # fmt: skip


# ---- akl -----------------------------------------------------------------------------------------------------------


@claim(
    "akl",
    "The gradient is forward KL's and reverse KL's, weighted by the gaps in the teacher's head and tail",
    "w (p - q) + (1 - w) p (log(p/q) - KL(p||q)) with w from a plain loop: relative difference below 1e-6",
)
def akl_weighs_head_and_tail(build: Build = of("akl")) -> tuple[str, bool]:
    student, teacher = normal(20, 1, 12, seed=1), normal(20, 1, 12, seed=2, scale=1.5)
    bench = Bench(build(), {"policy": Table(student), "teacher": Table(teacher)})
    rows = listed(torch.arange(20), torch.zeros(20, 1, dtype=torch.long))
    log_p, log_q = student[:, 0].log_softmax(-1), teacher[:, 0].log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    expected = torch.zeros_like(p)
    for i in range(20):
        order, mass, head = q[i].argsort(descending=True).tolist(), 0.0, 0.0
        for place, v in enumerate(order):
            mass += float(q[i, v])
            if place and mass > 0.5:
                break
            head += float((p[i, v] - q[i, v]).abs())
        w = head / float((p[i] - q[i]).abs().sum())
        reverse = p[i] * (log_p[i] - log_q[i] - kl(log_p[i], log_q[i]))
        expected[i] = w * (p[i] - q[i]) + (1 - w) * reverse
    gap = off(bench.gradient(rows)[0][:, 0], expected / 20)
    return f"relative difference {gap:.1e}", gap < 1e-6


# ---- kdrl ----------------------------------------------------------------------------------------------------------


@claim(
    "kdrl",
    "The expected gradient is GRPO's plus the annealed coefficient times the exact reverse KL's to the teacher",
    "groups of two by enumeration: grad(-E[r]/sqrt 2 + c KL(p||teacher)) with c = 0.005, 0.003, 0.001, 0.001 at steps "
    "0, 100, 200, 300; what the teacher adds within 0.1%",
)
def kdrl_joins_rewards_and_teacher(build: Build = of("kdrl")) -> tuple[str, bool]:
    student, teacher = shuffled(2, 1, 4, seed=1), Table(normal(2, 1, 4, seed=2, scale=2.0))
    right = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]], dtype=F64)
    prompt, response, group = every_pair(student)
    rows = rewarded(listed(prompt, response, group), lambda x, y: float(right[x, y[0]]))
    bench = Bench(build(), {"policy": fractions(student), "teacher": teacher, "reference": fractions(student)})
    q = teacher.log_laws()
    gaps = []
    for step, c in ((0, 0.005), (100, 0.003), (200, 0.001), (300, 0.001)):

        def objective(z: Tensor, c: float = c) -> Tensor:
            p = z[:, 0].log_softmax(-1)
            return (c * kl(p, q) - (p.exp() * right).sum(-1) / math.sqrt(2)).mean()

        # The coefficient is small: compare what the teacher adds, not the whole.
        logits = bench.policy.logits
        rewards = slope(lambda z: objective(z, 0.0), logits)
        found = bench.gradient(rows, step=step)[0] - rewards
        gaps.append(off(found, slope(objective, logits) - rewards))
    return f"largest relative difference of the teacher's part {max(gaps):.1e}", max(gaps) < 1e-3


# ---- g-opd ---------------------------------------------------------------------------------------------------------


def _opd(recipe: Recipe, base: Table) -> tuple[Bench, Rows, Tensor]:
    bench = Bench(recipe, {**_models(), "base": base})
    return bench, *_rows(bench)


@claim(
    "g-opd",
    "The expected gradient is that of the reverse KL to teacher^1.25 base^-0.25, normalised at each context",
    "equal by enumeration, relative difference below 1e-6",
)
def g_opd_descends_to_the_extrapolation(build: Build = of("g-opd")) -> tuple[str, bool]:
    base = Table(normal(2, 4, 3, seed=7), 2)
    bench, rows, share = _opd(build(), base)
    target = (1.25 * bench.models["teacher"].log_laws() - 0.25 * base.log_laws()).reshape(2, 4, 3).log_softmax(-1)
    gap = off(bench.gradient(rows)[0], _at_contexts(lambda p: kl(p, target), share, bench.policy.logits))
    return f"relative difference {gap:.1e}", gap < 1e-6


@claim(
    "g-opd",
    "With scale 1 it is plain on-policy distillation whatever the base; with another scale it is not",
    "two bases: gradients equal to 1e-9 at scale 1, different by over 1% at 1.25",
)
def g_opd_at_scale_one_forgets_the_base(build: Build = of("g-opd")) -> tuple[str, bool]:
    bases = [Table(normal(2, 4, 3, seed=s), 2) for s in (7, 8)]
    gap = {}
    for scale in (1.0, 1.25):
        one, two = (bench.gradient(rows)[0] for bench, rows, _ in (_opd(build(scale=scale), b) for b in bases))
        gap[scale] = off(one, two)
    plain, rows, share = _opd(build(scale=1.0), bases[0])
    q = plain.models["teacher"].log_laws().reshape(2, 4, 3)
    exact = off(plain.gradient(rows)[0], _at_contexts(lambda p: kl(p, q), share, plain.policy.logits))
    holds = gap[1.0] < 1e-9 and gap[1.25] > 0.01 and exact < 1e-6
    return f"{gap[1.0]:.1e} at 1, {gap[1.25]:.0%} at 1.25; off reverse KL's by {exact:.1e}", holds
