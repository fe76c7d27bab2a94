"""Terms of several rows over the vocabulary in the engine: any cut, chosen sites, two processes, what is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from leibler import recipes
from leibler.divergence import ForwardKL
from leibler.errors import RecipeError
from leibler.objective import (
    Arithmetic,
    Imitate,
    Linear,
    LogLinear,
    Match,
    Model,
    Objective,
    Old,
    Reference,
    Sinkhorn,
    SpanProduct,
    Teacher,
    Tempered,
    Transport,
)
from leibler.policy import character_tokenizer
from leibler.train import Data, OnPolicy, Recipe, Schedule
from leibler.train.aligned import alignments
from leibler.train.engine import Engine
from leibler.train.plan import describe
from leibler.train.stored import check as check_stored
from train.conformance import STEP, TEMPERATURE, Prepared, distance, gradient, ready, size, tiny
from train.naive import Table


def dense(made: Prepared, term: Any, *, stream: str = "main") -> Tensor:
    """The term over all of its units, from dense laws, with plain automatic differentiation."""
    table = Table(made, made.views[stream].rows)
    p = table.law(made.policy)[table.rows.mask]
    names = {h.name: table.law(made.models[h.name]).detach()[table.rows.mask] for h in term.law.handles}
    q = (
        names["teacher"]
        if term.law == Teacher()
        else term.law.sampled(lambda h: names[h.name].flatten()).reshape(p.shape)
    )
    p, q = ((x / term.temperature).log_softmax(-1) for x in (p, q))
    units = term.units(table.rows)
    return term.coefficient * term.value(p[units], q[units]).mean()


def judged(made: Prepared, loss: Tensor) -> dict[str, Tensor]:
    named = made.parameters()
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), grads, strict=True)}


CLOSE = 3e-7
"""Coefficients over counts are float32 numbers."""
PLAN = Sinkhorn(0.2, 7)
TERMS = {
    "transport": Transport(PLAN, Teacher(), coefficient=0.7),
    "debiased": Transport(PLAN, Teacher(), debiased=True, temperature=2.0),
    "mixture": Transport(PLAN, Arithmetic({Teacher(): 0.6, Reference(): 0.4})),
    "product": Transport(PLAN, LogLinear({Teacher(): 1.5, Model("base"): -0.5})),
    "tempered": Transport(PLAN, Tempered(Teacher(), 3.0)),
    "span": SpanProduct(Teacher(), spans=3, coefficient=4.0),
    "span normalised": SpanProduct(Teacher(), spans=2, norm=2, normalised=True, temperature=1.5),
}


@pytest.mark.parametrize("name", TERMS)
def test_the_gradient_is_that_of_the_dense_loss_however_it_is_cut(name: str):
    term = TERMS[name]
    made = ready(Recipe(Data(), Objective(term)))
    loss = dense(made, term)
    expected = judged(made, loss)
    assert size(expected) > 1e-3
    whole, step = gradient(made)
    assert distance(whole, expected) < CLOSE
    assert step.metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)
    for micro_rows in (1, 3):
        found, after = gradient(made, micro_rows=micro_rows)
        # Equal contexts give equal rows, up to rounding that depends on the cut; between those |p - p'| has its kink.
        assert distance(found, whole) < (1e-6 if name == "debiased" else 1e-9)
        assert after.metrics["loss"] == pytest.approx(loss.item(), rel=1e-9)


def test_beside_other_terms_in_every_plan():
    terms = (Imitate(), Match(ForwardKL(), to=Teacher()), TERMS["transport"], TERMS["span"])
    made = ready(Recipe(Data(), Objective(*terms)))
    single = [gradient(ready(Recipe(Data(), Objective(t))))[0] for t in terms]
    whole, step = gradient(made)
    assert distance(whole, {n: sum(g[n] for g in single) for n in whole}) < CLOSE
    for plan in ("one pass", "two-pass head", "survey and replay"):
        for micro_rows in (None, 2):
            found, after = gradient(made, plan=plan, micro_rows=micro_rows)
            assert distance(found, whole) < 1e-9
            assert after.metrics.keys() == step.metrics.keys()
            assert after.metrics["loss/transport"] == pytest.approx(step.metrics["loss/transport"], rel=1e-9)


@pytest.mark.parametrize("term", [replace(TERMS["transport"], sites=7), replace(TERMS["span"], sites=7)], ids=str)
def test_chosen_sites_do_not_depend_on_the_cut_and_change_with_step_and_seed(term: Any):
    made = ready(Recipe(Data(), Objective(term)))
    rows = made.views["main"].rows
    assert term.count(rows) == 7 // term.size < len(term.units(rows))
    whole, before = gradient(made)
    for micro_rows in (1, 2, 5):
        cut, after = gradient(made, micro_rows=micro_rows)
        assert distance(cut, whole) < 1e-9
        assert after.metrics["loss"] == pytest.approx(before.metrics["loss"], rel=1e-9)
    later = {n: v.at(STEP + 1, made.states) for n, v in made.views.items()}
    engine = made.engine()
    assert engine.accumulate(later).metrics["loss"] != pytest.approx(before.metrics["loss"], rel=1e-6)
    other = Engine(made.recipe, made.policy, made.models, {}, temperature=TEMPERATURE, seed=1)
    now = {n: v.at(STEP, made.states) for n, v in made.views.items()}
    assert other.accumulate(now).metrics["loss"] != pytest.approx(before.metrics["loss"], rel=1e-6)


def test_chosen_sites_are_fair():
    """Over many steps every event is chosen equally often, and the term's mean is that over all units."""
    term = replace(TERMS["span"], sites=8)
    made = ready(Recipe(Data(), Objective(term)))
    rows = made.views["main"].rows
    units = len(term.units(rows))
    found = torch.zeros(len(rows.row))
    every = torch.bincount(term.units(rows).reshape(-1), minlength=len(rows.row))
    for seed in range(400):
        picked = term.chosen(rows, torch.Generator().manual_seed(seed))
        assert len(picked) == len(picked.unique(dim=0)) == 4
        found += torch.bincount(picked.reshape(-1), minlength=len(rows.row))
    expected = every * (400 * 4 / units)
    assert ((found - expected).abs() <= 5 * expected.clamp(min=1).sqrt()).all()


def test_the_same_units_are_dropped_when_the_pass_is_repeated():
    """With dropout the rows that are read first are the rows that are replayed: the losses are equal, bit for bit."""
    term = TERMS["transport"]
    made = ready(Recipe(Data(), Objective(term)))
    policy = tiny(0, dropout=0.4).requires_grad_(True)
    engine = Engine(made.recipe, policy, {**made.models, "policy": policy}, {}, temperature=TEMPERATURE, micro_rows=2)
    read, replayed = [], []
    from leibler.train import coupled

    class Watched(coupled._Part):
        def rows(self, at: Tensor, model: Any) -> Tensor:
            out = super().rows(at, model)
            (replayed if torch.is_grad_enabled() else read).append(out.detach().clone())
            return out

    original = coupled._Part
    coupled._Part = Watched  # type: ignore[misc]
    try:
        engine.accumulate({n: v.at(STEP, made.states) for n, v in made.views.items()})
    finally:
        coupled._Part = original  # type: ignore[misc]
    assert len(read) == len(replayed) > 2
    assert all(torch.equal(a, b) for a, b in zip(read, replayed, strict=True))
    plain = tiny(0)
    assert not torch.equal(read[0], plain.linear(torch.zeros(1, 16, dtype=torch.float64)).hidden)


def test_muted_rows_take_no_part_but_count():
    made = ready(Recipe(Data(), Objective(TERMS["span"])))
    whole, _ = gradient(made)
    parts = []
    for half in (0, 1):
        view = made.views["main"]
        muted = view.rows.group_index % 2 == half
        parts.append(gradient(made, views={"main": replace(view, rows=replace(view.rows, muted=muted))})[0])
    assert distance({n: parts[0][n] + parts[1][n] for n in whole}, whole) < 1e-9
    made = ready(Recipe(Data(), Objective(TERMS["transport"])))
    view = made.views["main"]
    muted = view.rows.group_index > 2
    rows = replace(view.rows, muted=muted)
    found, _ = gradient(made, views={"main": replace(view, rows=rows)})
    alone, _ = gradient(made, views={"main": view.select((~muted).nonzero()[:, 0])})
    share = float((~muted)[rows.row].sum()) / len(rows.row)
    assert distance(found, {n: share * g for n, g in alone.items()}) < CLOSE


def test_where_and_a_schedule():
    term = Transport(PLAN, Teacher(), where="odd", coefficient=Linear(1.0, 3.0, steps=4))
    made = ready(Recipe(Data(), Objective(replace(term, where=None))))
    view = made.views["main"]
    odd = torch.zeros(view.rows.mask.shape)
    odd[:, 1::2] = 1
    rows = view.rows.with_columns(odd=odd)
    made = ready(Recipe(Data(), Objective(term)))
    found, step = gradient(made, views={"main": replace(view, rows=rows)}, micro_rows=2)
    now = 1.0 + 2.0 * STEP / 4
    assert step.metrics["coefficient/transport"] == pytest.approx(now)
    kept = replace(rows, mask=rows.mask & odd.bool())
    expected, _ = gradient(
        ready(Recipe(Data(), Objective(replace(TERMS["transport"], coefficient=now)))),
        views={"main": replace(view, rows=kept)},
    )
    assert distance(found, expected) < CLOSE


def test_two_processes_are_the_mean_over_their_own_sites():
    """Each transports among its own rows; together they descend the mean over all rows."""
    term = replace(TERMS["transport"], sites=5)
    made = ready(Recipe(Data(), Objective(term)))
    view = made.views["main"]
    halves = [view.select((view.rows.group_index % 2 == i).nonzero()[:, 0]) for i in (0, 1)]
    alone = [gradient(made, views={"main": h}) for h in halves]
    counts = [term.count(h.rows) for h in halves]
    expected = {n: sum(c * g[n] for c, (g, _) in zip(counts, alone, strict=True)) / sum(counts) for n in alone[0][0]}
    together = []
    for half in halves:
        engine = made.engine(2)
        engine.reduce = lambda x: torch.full_like(x, sum(counts)) if x.numel() == 1 else x
        for p in made.parameters().values():
            p.grad = None
        engine.accumulate({"main": half.at(STEP, made.states)})
        together.append(
            {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in made.parameters().items()}
        )
    assert distance({n: together[0][n] + together[1][n] for n in expected}, expected) < 1e-9


def test_without_rows_and_without_units():
    made = ready(Recipe(Data(), Objective(TERMS["span"], TERMS["transport"])))
    view = made.views["main"]
    found, step = gradient(made, views={"main": view.select(torch.tensor([], dtype=torch.long))})
    assert size(found) == step.metrics["loss"] == 0
    single = replace(view.rows, mask=view.rows.mask & (view.rows.mask.cumsum(1) == 1))
    for micro_rows in (None, 2):
        found, step = gradient(made, views={"main": replace(view, rows=single)}, micro_rows=micro_rows)
        assert step.metrics["loss/span_product"] == 0
        assert step.metrics["loss/transport"] > 0
        assert size(found) > 0


def test_a_stale_draw_and_the_policys_own_rows():
    """Rows that the policy itself wrote, in two epochs."""
    recipe = Recipe(OnPolicy(), Objective(TERMS["transport"]), Schedule(epochs=2))
    made = ready(recipe)
    expected = judged(made, dense(made, TERMS["transport"]))
    for micro_rows in (None, 2):
        assert distance(gradient(made, micro_rows=micro_rows)[0], expected) < CLOSE


def test_what_cannot_be_served_is_refused_in_a_sentence():
    recipe = Recipe(Data(), Objective(TERMS["transport"]))
    made = ready(recipe)

    class Cache:
        def check_model(self, *_: Any) -> None: ...
        def check_temperature(self, *_: Any) -> None: ...

    calls = [
        (lambda: Engine(recipe, made.policy, made.models, {}, lockstep=True), "without sharded weights"),
        (lambda: check_stored(recipe, {"teacher": Cache()}, made.policy, {}, 1.0), "top k entries only"),  # type: ignore[dict-item]
        (lambda: Recipe(Data(), Objective(Transport(PLAN, Old()))), "needs its weights"),
        (lambda: Transport(PLAN, Teacher(), sites=0), "at least 1"),
        (lambda: SpanProduct(Teacher(), sites=1), "at least 2"),
        (lambda: Transport(PLAN, Teacher(), temperature=0.0), "positive"),
        (lambda: Transport(PLAN, Teacher(), weight=0.5), "coefficient"),
        (lambda: SpanProduct(Teacher(), norm=3), "1 and 2"),
        (lambda: SpanProduct(Teacher(), spans=1), "at least 2"),
        (lambda: Sinkhorn(0.0), "positive eps"),
        (lambda: Sinkhorn(iterations=0), "at least one"),
    ]
    for call, says in calls:
        with pytest.raises(RecipeError, match=says) as caught:
            call()
        assert str(caught.value).endswith(".")


def test_a_model_of_another_tokenizer_is_refused():
    recipe = Recipe(Data(), Objective(TERMS["transport"]))
    other = tiny(1, tokenizer=character_tokenizer("0123456789+=abc"))
    with pytest.raises(RecipeError, match="whole rows of 'teacher', whose tokenizer"):
        alignments(recipe, tiny(0), {"teacher": other})


def test_without_pot_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch):
    recipe = Recipe(Data(), Objective(TERMS["transport"]))  # building and showing it needs nothing
    made = ready(Recipe(Data(), Objective(TERMS["span"])))
    monkeypatch.setitem(sys.modules, "ot.bregman", None)
    with pytest.raises(RecipeError, match=r"pip install leibler\[transport\]"):
        Engine(recipe, made.policy, made.models, {})
    Engine(made.recipe, made.policy, made.models, {})


def test_the_plan_says_what_is_kept():
    text = describe(recipes.get("sinkd", sites=33))
    assert "transport: whole rows at 33 events" in text
