"""The published losses once more: dense float64 logits, padded tables, plain loops, automatic differentiation.

Nothing here uses the library's terms, signals, divergences or estimators. ``p`` is the policy, ``q`` the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leibler.objective import Rows
from leibler.policy import CausalLM
from train.conformance import STEP, TEMPERATURE, Case, Prepared, records


@dataclass
class Table:
    """A batch as padded tables, all ``[batch, time]``, and the dense laws of any model."""

    made: Prepared
    rows: Rows

    @property
    def mask(self) -> Tensor:
        return self.rows.mask.double()

    @property
    def length(self) -> Tensor:
        return self.mask.sum(1)

    @property
    def events(self) -> float:
        return float(self.mask.sum())

    def law(self, model: CausalLM) -> Tensor:
        """Log-probabilities ``[batch, time, vocab]`` at the sampling temperature, over the real entries."""
        logits = model.network(input_ids=self.rows.tokens, attention_mask=self.rows.attention.long()).logits
        return (logits[:, :-1, : model.vocab_size] / TEMPERATURE).log_softmax(-1)

    def taken(self, law: Tensor) -> Tensor:
        """Log-probability of the token that came next; 0 where nothing is predicted."""
        value = law.gather(-1, self.rows.tokens[:, 1:, None])[..., 0]
        return torch.where(self.rows.mask, value, torch.zeros_like(value))

    def logp(self, name: str) -> Tensor:
        if name == "policy":
            return self.taken(self.law(self.made.policy))
        with torch.no_grad():
            return self.taken(self.law(self.made.old if name == "old" else self.made.models[name]))

    def groups(self) -> list[list[int]]:
        numbers = self.rows.group.tolist()
        return [[i for i, g in enumerate(numbers) if g == wanted] for wanted in dict.fromkeys(numbers)]

    def mean(self, value: Tensor) -> Tensor:
        """Over all events of the batch."""
        return (value * self.mask).sum() / self.events


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a.exp() * (a - b)).sum(-1)


def mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    """``log(share * exp(a) + (1 - share) * exp(b))``."""
    return torch.log(share * a.exp() + (1 - share) * b.exp())


def group_normalised(table: Table) -> Tensor:
    """One advantage per row: reward less the group's mean, over its standard deviation (n - 1)."""
    out = torch.zeros(len(table.rows), dtype=torch.float64)
    reward = table.rows.columns["reward"].double()
    for members in table.groups():
        values = [float(reward[i]) for i in members]
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(len(values) - 1, 1))
        for i, v in zip(members, values, strict=True):
            out[i] = 0.0 if max(values) == min(values) else (v - mean) / (spread + 1e-6)
    return out


def clipped(ratio: Tensor, advantage: Tensor, width: float = 0.2) -> Tensor:
    return torch.maximum(-ratio * advantage, -ratio.clamp(1 - width, 1 + width) * advantage)


def whitened(value: Tensor, mask: Tensor) -> Tensor:
    inside = value[mask > 0]
    return (value - inside.mean()) / (inside.std(unbiased=False) + 1e-8) * mask


# ---- the recipes -------------------------------------------------------------------------------------------------


def sft(t: dict[str, Table], **_: Any) -> Tensor:
    main = t["main"]
    return -main.mean(main.logp("policy"))


def kd(t: dict[str, Table], imitate: float = 0.0) -> Tensor:
    main = t["main"]
    p, q = main.law(main.made.policy), main.law(main.made.models["teacher"]).detach()
    return main.mean(kl(q, p)) - imitate * main.mean(main.taken(p))


def gkd(t: dict[str, Table]) -> Tensor:
    main = t["main"]
    p, q = main.law(main.made.policy), main.law(main.made.models["teacher"]).detach()
    m = mixture(q, p, 0.5)
    return main.mean(0.5 * kl(q, m) + 0.5 * kl(p, m))


def akl(t: dict[str, Table], head_mass: float = 0.5) -> Tensor:
    main = t["main"]
    p, q = main.law(main.made.policy), main.law(main.made.models["teacher"]).detach()
    share = torch.zeros(p.shape[:2], dtype=torch.float64)
    for i, k in main.rows.mask.nonzero().tolist():
        order = sorted(range(q.shape[-1]), key=lambda v: -float(q[i, k, v]))
        head, mass = 0.0, 0.0
        gaps = (p[i, k].exp() - q[i, k].exp()).abs().detach()
        for place, v in enumerate(order):
            mass += float(q[i, k, v].exp())
            if mass > head_mass and place > 0:
                break
            head += float(gaps[v])
        share[i, k] = head / float(gaps.sum())
    return main.mean(share * kl(q, p) + (1 - share) * kl(p, q))


def distillm(t: dict[str, Table], text: str | None = None, lam: float = 0.1) -> Tensor:
    main = t["main"]
    p, q = main.law(main.made.policy), main.law(main.made.models["teacher"]).detach()
    loss = main.mean(kl(q, mixture(q, p, lam)))
    return loss if text is None else loss + sft({"main": t["text"]})


def minillm(
    t: dict[str, Table],
    text: str | None = None,
    start: int = 1,
    teacher_share: float = 0.2,
    epochs: int = 4,
    minibatches: int = 1,
    clip: float = 0.2,
) -> Tensor:
    roll = t["main"]
    law, teacher = roll.law(roll.made.policy), roll.law(roll.made.models["teacher"]).detach()
    logp = roll.taken(law)
    with torch.no_grad():
        mixed = roll.taken(mixture(teacher, roll.law(roll.made.old), teacher_share))
        step = roll.taken(teacher) - roll.logp("old")
        future = torch.zeros_like(step)
        for i in range(len(roll.rows)):
            places = roll.rows.mask[i].nonzero()[:, 0].tolist()
            for k, place in enumerate(places):
                rest = [float(step[i, at]) for at in places[k + start :]]
                future[i, place] = sum(rest) / len(rest) if rest else 0.0
        advantage = whitened(future, roll.mask)
    ratio = (logp - mixed).exp()
    long = roll.mean(clipped(ratio, advantage, clip))
    single = roll.mean(ratio.detach().clamp(max=5.0) * kl(law, teacher))
    loss = long + single
    return loss if text is None else loss + sft({"main": t["text"]})


def grpo(
    t: dict[str, Table], to: str = "reference", group_size: int = 4, clip: float = 0.2, coefficient: float = 0.04,
    minibatches: int = 1, epochs: int = 1, weight: Callable[[Table], Tensor] | None = None,
) -> Tensor:  # fmt: skip
    main = t["main"]
    fresh = minibatches * epochs == 1
    logp = main.logp("policy")
    old = logp.detach() if fresh else main.logp("old")
    loss = main.mean(clipped((logp - old).exp(), group_normalised(main)[:, None], clip))
    if coefficient == 0:
        return loss
    k2 = (logp - old).exp().detach() * 0.5 * (logp - main.logp(to)) ** 2
    if weight is not None:
        k2 = k2 * weight(main)[:, None]
    return loss + coefficient * main.mean(k2)


def kdrl(t: dict[str, Table], group_size: int = 4, guided: bool = False) -> Tensor:
    def nobody_right(table: Table) -> Tensor:
        out = torch.zeros(len(table.rows), dtype=torch.float64)
        for members in table.groups():
            hit = any(float(table.rows.columns["reward"][i]) > 0 for i in members)
            out[members] = 0.0 if hit else 1.0
        return out

    coefficient = 5e-3 + (1e-3 - 5e-3) * STEP / 200
    return grpo(t, to="teacher", coefficient=coefficient, weight=nobody_right if guided else None)


def g_opd(t: dict[str, Table], scale: float = 1.25, clip: float | None = 10.0) -> Tensor:
    main = t["main"]
    logp, teacher, base = main.logp("policy"), main.logp("teacher"), main.logp("base")
    away = base - teacher if clip is None else (base - teacher).clamp(-clip, clip)
    advantage = (teacher + (1 - scale) * away - logp).detach()
    return -main.mean((logp - logp.detach()).exp() * advantage)


def rlad(t: dict[str, Table], group_size: int = 4, alpha: float = 0.5, epochs: int = 4) -> Tensor:
    main = t["main"]
    logp = main.logp("policy")
    old = logp.detach() if epochs == 1 else main.logp("old")
    ratio = (logp - alpha * old - (1 - alpha) * main.logp("teacher")).exp()
    return main.mean(clipped(ratio, group_normalised(main)[:, None]))


def tcod(t: dict[str, Table], curriculum: str = "f2b", every: int = 5, start: int = 1, scale: float = 1.0) -> Tensor:
    main = t["main"]
    # Every turn's tokens and no other: the environment writes digits and "=", the policy's turns end with an end.
    logp = main.logp("policy")
    old = logp.detach()
    return -main.mean((logp - old).exp() * scale * (main.logp("teacher") - old))


def delta_kd(t: dict[str, Table], alpha: float = 1.0, imitate: float = 0.5) -> Tensor:
    main = t["main"]
    p = main.law(main.made.policy)
    own, teacher, base = (main.law(main.made.models[n]).detach() for n in ("reference", "teacher", "teacher_base"))
    target = (own + alpha * (teacher - base)).log_softmax(-1)
    return (1 - imitate) * main.mean(kl(target, p)) - imitate * main.mean(main.taken(p))


def dpkd(t: dict[str, Table], beta: float = 1.0, share: float = 0.5) -> Tensor:
    main = t["main"]
    p, q = main.law(main.made.policy), main.law(main.made.models["teacher"]).detach()
    first, second = q.argmax(-1, keepdim=True), p.argmax(-1, keepdim=True)
    h = (p.gather(-1, first) - p.gather(-1, second) - q.gather(-1, first) + q.gather(-1, second))[..., 0]
    preferred = -(beta * h).sigmoid().log()
    return share * main.mean(preferred) - (1 - share) * main.mean(main.taken(p))


def paced(t: dict[str, Table], a: float = 1.0, b: float = 1.0, turn: int | None = None) -> Tensor:
    main = t["main"]
    p, q = main.law(main.made.policy), main.law(main.made.models["teacher"]).detach()
    rate = main.rows.columns["pass_rate"].double()[:, None]
    even = math.gamma(a + 1) * math.gamma(b + 1) / math.gamma(a + b + 2)
    late = turn is not None and turn <= STEP
    return main.mean(rate**a * (1 - rate) ** b / even * (kl(p, q) if late else kl(q, p)))


def recursive_meta_distillation(t: dict[str, Table], anchor: float = 0.5, geometric: bool = False) -> Tensor:
    main = t["main"]
    p = main.law(main.made.policy)
    teacher, previous = (main.law(main.made.models[n]).detach() for n in ("teacher", "previous"))
    mixed = anchor * teacher + (1 - anchor) * previous
    return main.mean(kl(mixed.log_softmax(-1) if geometric else mixture(teacher, previous, anchor), p))


def transfer_limits(t: dict[str, Table]) -> Tensor:
    main = t["main"]
    return main.mean(0.5 * (main.logp("policy") - main.rows.columns["label_logp"].double()) ** 2)


def ppo(
    t: dict[str, Table], clip: float = 0.2, decay: float = 0.95, initial: float = 0.1, value_coefficient: float = 0.5,
    minibatches: int = 4, epochs: int = 4,
) -> Tensor:  # fmt: skip
    main = t["main"]
    made = main.made
    critic = made.modules["critic"]
    with torch.no_grad():
        hidden = made.old(main.rows.tokens, main.rows.attention)[:, :-1]
        values, old, reference = critic(hidden), main.logp("old"), main.logp("reference")
        advantage = torch.zeros_like(values)
        for i in range(len(main.rows)):
            places = main.rows.mask[i].nonzero()[:, 0].tolist()
            running, following = 0.0, 0.0
            for place in reversed(places):
                paid = float(main.rows.columns["reward"][i]) if place == places[-1] else 0.0
                paid -= initial * float(old[i, place] - reference[i, place])
                delta = paid + following - float(values[i, place])
                running = delta + decay * running
                advantage[i, place] = running
                following = float(values[i, place])
        goal = advantage + values
        policy_hidden = made.policy(main.rows.tokens, main.rows.attention)[:, :-1]
    ratio = (main.logp("policy") - old).exp()
    loss = main.mean(clipped(ratio, whitened(advantage, main.mask), clip))
    return loss + value_coefficient * main.mean(0.5 * (critic(policy_hidden) - goal) ** 2)


def disco(
    t: dict[str, Table], group_size: int = 4, tau: float = 10.0, bound: float = 1e-4, slope: float = 1e3,
    minibatches: int = 2,
) -> Tensor:  # fmt: skip
    main = t["main"]
    logp, old = main.logp("policy"), main.logp("old")
    score = (logp * main.mask).sum(1) / main.length
    reward = main.rows.columns["reward"]
    gain, heard = torch.zeros(()), torch.zeros(len(main.rows), dtype=torch.float64)
    for members in main.groups():
        values = [float(reward[i]) for i in members]
        heard[members] = 0.0 if max(values) == min(values) else 1.0
        right, wrong = [i for i in members if reward[i] > 0.5], [i for i in members if reward[i] <= 0.5]
        if right and wrong:
            hardest = tau * torch.log(torch.exp(score[wrong] / tau).mean())
            gain = gain + (score[right] - hardest).mean()
    drift = ((old - logp) * main.mask * heard[:, None]).sum() / main.events
    return -gain / len(main.groups()) + 0.5 * slope * (drift - bound).clamp(min=0) ** 2


def _pairs(main: Table, reference: Tensor) -> list[Tensor]:
    """``log u(chosen)`` and ``log u(rejected)`` of each pair."""
    ratio = ((main.logp("policy") - reference) * main.mask).sum(1)
    found = []
    for members in main.groups():
        (chosen,) = [i for i in members if main.rows.role[i] == 1]
        (rejected,) = [i for i in members if main.rows.role[i] == 2]
        found.append(torch.stack([ratio[chosen], ratio[rejected]]))
    return found


def dpo(t: dict[str, Table], beta: float = 0.1, smoothing: float = 0.0) -> Tensor:
    losses = []
    for up, down in _pairs(t["main"], t["main"].logp("reference")):
        z = beta * (up - down)
        losses.append(-(1 - smoothing) * torch.log(torch.sigmoid(z)) - smoothing * torch.log(torch.sigmoid(-z)))
    return torch.stack(losses).mean()


def heated(law: Tensor, temperature: float) -> Tensor:
    return (law / temperature).log_softmax(-1)


def sinkd(
    t: dict[str, Table], transport: float = 0.5, eps: float = 0.1, debiased: bool = False, batch_wise: bool = True,
    kl_weight: float = 1.0, iterations: int = 20, temperature: float = 2.0,
) -> Tensor:  # fmt: skip
    """Scaling rows and columns of the kernel itself in turn, as in the released code, but of mass 1."""
    main = t["main"]
    law, teacher = main.law(main.made.policy), main.law(main.made.models["teacher"]).detach()
    p, q = heated(law, temperature), heated(teacher, temperature)
    loss = -main.mean(main.taken(law)) + kl_weight * temperature**2 * main.mean(kl(q, p))
    if not batch_wise:
        return loss + transport * main.mean((p.exp() - q.exp()).abs().sum(-1))

    def cost(a: Tensor, b: Tensor) -> Tensor:
        distance = (a[:, None] - b[None]).abs().sum(-1)
        plan = torch.exp(-distance / eps)
        for _ in range(iterations):
            plan = plan / plan.sum(1, keepdim=True)
            plan = plan / plan.sum(0, keepdim=True)
        return (plan * distance).sum() / len(a)

    a, b = p.exp()[main.rows.mask], q.exp()[main.rows.mask]
    value = cost(a, b) - (cost(a, a) + cost(b, b)) / 2 if debiased else cost(a, b)
    return loss + transport * value


def scrg_dac_kl(
    t: dict[str, Table], lower: float = 0.9, upper: float = 1.0, least_mass: float = 0.9, tail: str = "renormalise",
    span: float = 1.0, spans: int = 4, imitate: float = 0.0,
) -> Tensor:  # fmt: skip
    main = t["main"]
    p, q = main.law(main.made.policy), main.law(main.made.models["teacher"]).detach()
    total, products, pairs = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64), 0
    for i in range(len(main.rows)):
        places = main.rows.mask[i].nonzero()[:, 0].tolist()
        for k, place in enumerate(places):
            law, target = p[i, place], q[i, place]
            rising = sorted(target.tolist())
            last = len(rising) - 1
            low, high = rising[math.floor(lower * last)], rising[math.ceil(upper * last)]
            label = int(main.rows.tokens[i, place + 1])
            kept = {v for v, x in enumerate(target.tolist()) if low <= x <= high} | {label}
            for v in sorted(range(len(rising)), key=lambda v: -float(target[v])):
                if sum(float(target[u].exp()) for u in kept) >= least_mass:
                    break
                kept.add(v)
            inside = torch.tensor(sorted(kept))
            a, b = law[inside], target[inside]
            if tail == "bucket":
                rest = torch.tensor([v not in kept for v in range(len(rising))])
                a, b = (torch.cat([x[inside], x[rest].logsumexp(-1, keepdim=True)]) for x in (law, target))
            a, b = a.log_softmax(-1), b.log_softmax(-1)
            total = total + torch.where(b > -math.inf, b.exp() * (b - a).nan_to_num(0.0), 0.0).sum()
            if k and k // spans == (k - 1) // spans:
                before = (p[i, place - 1] + law).exp() - (q[i, place - 1] + target).exp()
                products, pairs = products + before.abs().sum(), pairs + 1
    loss = total / main.events + span * products / max(pairs, 1)
    return loss if imitate == 0 else loss + imitate * sft({"main": t["data"]})


SLOPES: dict[str, Callable[[Tensor], Tensor]] = {
    # f'(u) of each generator, from its formula.
    "JensenShannon": lambda u: 0.5 * torch.log(2 * u / (1 + u)),
    "ForwardKL": lambda u: -1 / u,
    "ReverseKL": lambda u: torch.log(u) + 1,
}


def f_dpo(t: dict[str, Table], beta: float = 0.1, clip: float = 20.0, divergence: Any = None) -> Tensor:
    slope = SLOPES["JensenShannon" if divergence is None else type(divergence).__name__]
    losses = []
    for pair in _pairs(t["main"], t["main"].logp("reference")):
        up, down = slope(pair.clamp(-clip, clip).exp())
        losses.append(-torch.log(torch.sigmoid(beta * (up - down))))
    return torch.stack(losses).mean()


def inpo(t: dict[str, Table], eta: float = 0.0075, tau: float = 0.0025, group_size: int = 4) -> Tensor:
    main = t["main"]
    law = tau / eta * main.logp("reference") + (1 - tau / eta) * main.logp("previous")
    return torch.stack([(up - down - 1 / (2 * eta)) ** 2 for up, down in _pairs(main, law)]).mean()


def gere(
    t: dict[str, Table], rows: int = 2, margin: float | None = 100.0, share: float = 0.5, sigmas: float = 1.0
) -> Tensor:
    """The activation margin loss by loops over tokens and units, with bands from unpadded passes over every text."""
    general = t["general"]
    nll = sft({"main": t["task"]}) + sft({"main": general})
    if margin == 0:
        return share * nll
    made = general.made

    def states(model: CausalLM, row: int) -> Tensor:
        tokens, mask = general.rows.tokens[row : row + 1], general.rows.mask[row]
        attention = general.rows.attention[row : row + 1].long()
        return model.network.model(input_ids=tokens, attention_mask=attention).last_hidden_state[0, :-1][mask]

    with torch.no_grad():
        seen = []
        for record in records():
            ids = made.old.encode_prompt(record.prompt), made.old.encode_completion(str(record.completion))
            whole = made.old.network.model(input_ids=torch.tensor([ids[0] + ids[1]])).last_hidden_state[0]
            seen.append(whole[len(ids[0]) - 1 : -1])
        every = torch.cat(seen)
        mean, reach = every.mean(0), sigmas * every.std(0, unbiased=False)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(len(general.rows)):
        with torch.no_grad():
            stored = states(made.models["reference"], row)
        for here, there in zip(states(made.policy, row), stored, strict=True):
            for h, was, low, high in zip(here, there, mean - reach, mean + reach, strict=True):
                if was >= high:
                    lost = (high - h).clamp_min(0)
                elif was <= low:
                    lost = (h - low).clamp_min(0)
                else:
                    lost = (h - high).clamp_min(0) + (low - h).clamp_min(0)
                total, count = total + lost, count + int(lost > 0)
    return share * nll + (1.0 if margin is None else margin) * total / max(count, 1)


def masked_law(model: Any, rows: Rows, temperature: float = TEMPERATURE) -> Tensor:
    """Log-probabilities ``[batch, time, vocab]`` of what stands at the next position, seen from both sides."""
    logits = model.network(input_ids=rows.tokens, attention_mask=rows.attention.long()).logits / temperature
    logits[..., model.tokenizer.mask_token_id] = -math.inf
    return logits[:, 1:, : model.vocab_size].log_softmax(-1)


def llada(t: dict[str, Table], length: int) -> Tensor:
    rows = t["main"].rows
    law = masked_law(t["main"].made.policy, rows)
    total = law.new_zeros(())
    for i in range(len(rows)):
        at = [k for k in range(law.shape[1]) if rows.tokens[i, k + 1] == t["main"].made.policy.tokenizer.mask_token_id]
        bound = sum((law[i, k, rows.labels[i, k]] for k in at), law.new_zeros(()))
        total = total - bound * length / len(at)
    return total / len(rows)


def tad(t: dict[str, Table], delta: int = 8, commit: int = 1, temperature: float = 1.0) -> Tensor:
    made, rows = t["main"].made, t["main"].rows
    mask_id, other = made.policy.tokenizer.mask_token_id, rows.views["privileged"]
    hot = TEMPERATURE * temperature
    p, hot_p = masked_law(made.policy, rows), masked_law(made.policy, rows, hot)
    q = masked_law(made.models["initial"], other, hot).detach()
    parts: dict[str, list[Tensor]] = {"near": [], "distant": []}
    for i in range(len(rows)):
        here = [k for k in range(p.shape[1]) if rows.tokens[i, k + 1] == mask_id]
        there = [k for k in range(q.shape[1]) if other.tokens[i, k + 1] == mask_id]
        for k, j in zip(here, there, strict=True):
            if rows.columns["near"][i, k]:
                parts["near"].append(-p[i, k, rows.labels[i, k]])
            if rows.columns["distant"][i, k]:
                support = [v for v in range(p.shape[2]) if v != mask_id]
                parts["distant"].append(temperature**2 * (q[i, j].exp() * (q[i, j] - hot_p[i, k]))[support].sum())
    assert delta < 6 or not parts["distant"]
    return sum((sum(part) / len(part) for part in parts.values() if part), p.new_zeros(()))


def _rows_of(table: Table, role: int, value: Tensor, per_row: bool) -> Tensor:
    """The mean of a number per event over the rows of a role: over their events, or over rows of each one's mean."""
    chosen = [i for i in range(len(table.rows)) if int(table.rows.role[i]) == role]
    held = (value * table.mask)[chosen]
    return (held.sum(1) / table.length[chosen]).mean() if per_row else held.sum() / table.mask[chosen].sum()


def dckd(t: dict[str, Table], distil: float = 1.0, **_: Any) -> Tensor:
    main = t["main"]
    p, q = main.law(main.made.policy), main.law(main.made.models["teacher"]).detach()
    forward = sum((_rows_of(main, role, kl(q, p), True) for role in (1, 2)), torch.zeros(()))
    return -_rows_of(main, 1, main.taken(p), False) + distil * forward


def advantage_guided(t: dict[str, Table], weight: float = 1.0, clip: float | None = 10.0, **_: Any) -> Tensor:
    pairs, own = t["pairs"], t["own"]
    p = own.law(own.made.policy)
    teacher, base = (own.law(own.made.models[n]).detach() for n in ("teacher", "teacher_base"))
    score = teacher - base if clip is None else (teacher - base).clamp(-clip, clip)
    gain = (p.exp() * score).sum(-1)
    # The value is told to the law that the scores make, whose normaliser has no gradient.
    shift = score.logsumexp(-1)
    guided = _rows_of(own, 0, shift - gain, True)
    return -_rows_of(pairs, 1, pairs.logp("policy"), False) + weight * guided


def adpa(t: dict[str, Table], variant: str = "adpa", **options: Any) -> Tensor:
    return dckd(t, **options) if variant == "dckd" else advantage_guided(t, **options)


def erpd_extreme(t: dict[str, Table], low: float = 0.2, high: float = 5.0, sign: float = 1.0, **_: Any) -> Tensor:
    main = t["main"]
    ratio = (main.logp("policy") - main.rows.columns["behaviour_logp"].double() * main.mask).exp()
    advantage = sign * group_normalised(main)[:, None]
    kept = torch.where(advantage > 0, ratio.clamp(max=1 + high), ratio.clamp(min=1 - low))
    return -main.mean(kept * advantage)


def erpd_distil(
    t: dict[str, Table], teacher: str = "extreme", bound: float = 5.0, dead_zone: float = 0.01, agree: bool = True,
    coefficient: float = 2.0, **_: Any,
) -> Tensor:  # fmt: skip
    main = t["main"]
    above, below = {"extreme": ("extreme", "reference"), "negative": ("reference", "negative")}.get(
        teacher, ("extreme", "negative")
    )
    signal = (main.logp(above) - main.logp(below)).clamp(-bound, bound)
    signal[signal.abs() < dead_zone] = 0.0
    if agree:
        outcome = group_normalised(main)
        for i in range(len(main.rows)):
            signal[i][signal[i].sign() != outcome[i].sign()] = 0.0
    p, q = main.law(main.made.policy), main.law(main.made.models["reference"]).detach()
    logp = main.taken(p)
    return main.mean(coefficient * kl(p, q) - (logp - logp.detach()).exp() * signal)


def latent_sft(t: dict[str, Table], open: str, close: str, answer: float = 1.0, latent: float = 1.0) -> Tensor:
    """Row by row from the records: no batch, no padding, every law spread over the whole vocabulary."""
    model = t["main"].made.policy
    matrix = model.network.get_input_embeddings().weight
    ids = model.tokenizer.get_vocab()
    likelihoods, divergences = [], []
    for record in t["main"].rows.records:
        given, laws = record.extra["latents"], []
        for tokens, weights in zip(given["token"], given["weight"], strict=True):
            law = torch.zeros(model.vocab_size, dtype=torch.float64)
            for token, weight in zip(tokens, weights, strict=True):
                law[token] = weight / sum(weights)
            laws.append(law)
        before = [*model.encode_prompt(record.prompt), ids[open]]
        after = [ids[close], *model.encode_completion(record.completion)]
        thoughts = torch.stack(laws) @ matrix[: model.vocab_size].detach()
        read = torch.cat([matrix[torch.tensor(before)], thoughts, matrix[torch.tensor(after)]])
        logits = model.network(inputs_embeds=read[None]).logits[0, :, : model.vocab_size] / TEMPERATURE
        logp, s = logits.log_softmax(-1), len(before)
        # The logits at s - 1 ... s + m - 2 predict the thoughts at s ... s + m - 1.
        of_row = [(torch.special.xlogy(w, w) - w * logp[s - 1 + j]).sum() for j, w in enumerate(laws)]
        divergences.append(sum(of_row, logp.new_zeros(())) / len(laws))
        likelihoods += [logp[s + len(laws) - 1 + i, token] for i, token in enumerate(after)]
    mean = sum(likelihoods, matrix.new_zeros(())) / len(likelihoods)
    return latent * sum(divergences, matrix.new_zeros(())) / len(divergences) - answer * mean


def chosen(t: dict[str, Table], **_: Any) -> Tensor:
    """The likelihood of what was kept: which rows those are is judged with the sources."""
    return sft(t)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "miniplm": chosen, "llkd": chosen,
    "adpa": adpa, "adpa/dckd": dckd, "adpa/adpa": advantage_guided,
    "erpd/extreme": erpd_extreme, "erpd/distil": erpd_distil,
    "erpd/negative": lambda t, **options: erpd_extreme(t, sign=-1.0, **options),
    "sft": sft, "kd": kd, "gkd": gkd, "akl": akl, "distillm": distillm, "minillm": minillm, "grpo": grpo,
    "kdrl": kdrl, "g-opd": g_opd,
    "rlad": rlad,
    "delta-kd": delta_kd,
    "tcod": tcod,
    "dpkd": dpkd,
    "paced": paced,
    "sinkd": sinkd,
    "scrg-dac-kl": scrg_dac_kl,
    "recursive-meta-distillation": recursive_meta_distillation,
    "transfer-limits": transfer_limits,
    "latent-sft": latent_sft,
    "llada": llada,
    "tad": tad,
    "vocabulary-expansion": kd, "gere": gere, "ppo": ppo, "disco": disco, "dpo": dpo, "f-dpo": f_dpo, "inpo": inpo,
}  # fmt: skip


def reference(chosen: Case, made: Prepared) -> tuple[dict[str, Tensor], float]:
    """The gradient and the value of the published loss."""
    tables = {name: Table(made, view.rows) for name, view in made.views.items()}
    loss = LOSSES[chosen.key](tables, **chosen.options)
    named = made.parameters()
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found = zip(named.items(), grads, strict=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in found}, float(loss.detach())
