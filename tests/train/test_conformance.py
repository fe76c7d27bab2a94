"""Every recipe: the gradient does not depend on how the batch is cut or on the plan, and is the published one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from leibler import recipes
from leibler.divergence import ForwardKL
from leibler.objective import Comparison, Coupled, Objective, Output, Rows, SoftTokens, Transport, View
from leibler.objective.terms import Term
from leibler.train import MuteEqual, Recipe, recipes_of
from train import naive
from train.conformance import Case, Prepared, case, distance, gradient, prepare, ready, scored, size

VARIANTS = [
    case("kd", imitate=0.5),
    case("akl", head_mass=0.8),
    case("minillm"),
    case("llkd", uncertainty=0.0),
    case("miniplm", share=1.0),
    case("minillm", text="text", start=0),
    case("minillm", epochs=1),
    case("distillm"),
    case("distillm", fresh_rows=True, text="text"),
    case("kdrl", group_size=4, guided=True),
    case("g-opd", scale=0.7, clip=0.3),
    case("rlad", group_size=4, alpha=0.3, epochs=1),
    case("delta-kd", alpha=2.0, imitate=0.2),
    case("adpa", weight=3.0, clip=None),
    case("adpa", weight=3.0, clip=0.7),
    case("adpa", variant="dckd", distil=0.3),
    case("adpa", variant="adpa+", stage="dckd"),
    case("adpa", variant="adpa+", stage="adpa"),
    case("erpd", stage="extreme", group_size=3, low=0.01, high=0.02, epochs=3),
    case("erpd", stage="negative", group_size=3, teacher="negative"),
    case("erpd", stage="distil", group_size=3, teacher="negative", agree=False, bound=0.6, dead_zone=0.3),
    case("erpd", stage="distil", group_size=3, teacher="contrast", coefficient=0.5),
    case("dpkd", beta=3.0, share=0.9),
    case("paced", a=2.0, b=0.5, turn=1),
    case("paced", turn=10**6),
    case("sinkd", eps=0.3, transport=5.0),
    case("sinkd", batch_wise=False),
    case("scrg-dac-kl", lower=0.6, upper=0.8, least_mass=0.4, tail="bucket", imitate=0.5),
    case("scrg-dac-kl", fresh_rows=True, spans=2),
    case("recursive-meta-distillation", anchor=0.3, geometric=True),
    case("gere", margin=None, rows=4),
    case("gere", margin=0.0, sigmas=2.0),
    case("tcod", curriculum="b2f", scale=0.5),
    case("tcod", curriculum="none"),
    case("latent-sft", open="+", close="=", answer=0.3, latent=2.0),
    case("tad", delta=2, temperature=2.0),
    case("tad", delta=0, commit=2),
    case("grpo", group_size=4, minibatches=2, epochs=2),
    case("grpo", group_size=4, coefficient=0.0),
    case("ppo", minibatches=1, epochs=1),
    case("dpo", smoothing=0.1),
    case("f-dpo", divergence=ForwardKL()),
    case("disco", group_size=4, tau=0.3, bound=1e-3, slope=10.0),
    case("inpo", group_size=4, eta=0.5, tau=0.5),
]
GROUPED = ("kdrl", "rlad", "grpo", "disco", "inpo")
NEEDED: dict[str, dict[str, Any]] = {
    "llada": {"length": 8},
    "erpd": {"group_size": 3},
    "llkd": {"confidence": 0.0},  # of the drawn batch something must be left
    **{slug: {"group_size": 4} for slug in GROUPED},
}
NEEDED["latent-sft"] = {"open": "+", "close": "="}
PLAIN = [
    case(slug, stage=stage, **NEEDED.get(slug, {}))
    for slug in recipes.names()
    for stage in recipes_of(recipes.get(slug, **NEEDED.get(slug, {})))
]
CASES = [*PLAIN, *(v for v in VARIANTS if v not in PLAIN)]
every_case = pytest.mark.parametrize("chosen", CASES, ids=lambda c: c.id)


def test_every_recipe_is_here_and_has_a_reference():
    assert {c.slug for c in CASES} == set(recipes.names())
    assert {c.key for c in CASES} <= set(naive.LOSSES)


@every_case
def test_the_gradient_is_that_of_the_published_loss(chosen: Case):
    made = prepare(chosen)
    found, step = gradient(made)
    expected, loss = naive.reference(chosen, made)
    assert size(expected) > 1e-4
    # Rewards and the sampler's log-probs are float32 columns, coefficients float32 numbers.
    assert distance(found, expected) < 3e-6
    value = step.metrics["loss"]
    if chosen.slug not in ("disco",):  # its value is the multiplier times the divergence, not the squared hinge
        assert value == pytest.approx(loss, rel=1e-5, abs=1e-6)


@every_case
@pytest.mark.parametrize("micro_rows", [1, 3])
def test_no_split_into_micro_batches_changes_the_gradient(chosen: Case, micro_rows: int):
    made = prepare(chosen)
    whole, before = gradient(made)
    cut, after = gradient(made, micro_rows=micro_rows)
    assert distance(cut, whole) < 1e-9
    assert before.metrics.keys() == after.metrics.keys()
    for name, value in before.metrics.items():
        assert after.metrics[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name


@every_case
def test_the_three_plans_agree(chosen: Case):
    made = prepare(chosen)
    whole, before = gradient(made)
    kinds = {p.kind for p in made.engine().plans.values()}
    for plan in ("one pass", "two-pass head", "survey and replay"):
        if plan == "one pass" and kinds != {"one pass"}:
            continue
        for micro_rows in (None, 2):
            other, after = gradient(made, plan=plan, micro_rows=micro_rows)
            assert distance(other, whole) < 1e-9, plan
            assert after.metrics["loss"] == pytest.approx(before.metrics["loss"], rel=1e-6, abs=1e-9)


@every_case
def test_annotation_does_not_depend_on_the_cut(chosen: Case):
    made = ready(chosen.recipe(), fresh_rows=chosen.fresh_rows, moved=0.0)
    again = made.engine(micro_rows=1).annotate(made.rows, 3, made.states)
    for stream, view in made.views.items():
        assert view.values.keys() == again[stream].values.keys()
        assert view.signals.keys() == again[stream].signals.keys()
        for need, value in view.values.items():
            torch.testing.assert_close(again[stream].values[need], value, rtol=1e-9, atol=1e-9)
        for signal, value in view.signals.items():
            torch.testing.assert_close(again[stream].signals[signal], value, rtol=1e-7, atol=1e-7)


def spoilt_soft(soft: SoftTokens, attention: Tensor) -> SoftTokens:
    """With laws where there is no token."""
    wide = soft.padded(attention.shape[1], soft.index.shape[-1])
    return SoftTokens(wide.index, torch.where(attention[..., None], wide.weight, 0.5))


@every_case
def test_garbage_in_padding_changes_nothing(chosen: Case):
    made = prepare(chosen)
    before, _ = gradient(made)

    def spoilt(rows: Rows) -> Rows:
        wider = torch.nn.functional.pad
        attention = wider(rows.attention, (0, 3))
        noise = torch.randint(3, 16, attention.shape, generator=torch.Generator().manual_seed(1))
        columns = {}
        for name, value in rows.columns.items():
            if value.ndim == 2:
                value = wider(torch.where(rows.mask, value, torch.nan), (0, 3), value=torch.nan)
            columns[name] = value
        return replace(
            rows,
            tokens=torch.where(attention, wider(rows.tokens, (0, 3)), noise),
            attention=attention,
            mask=wider(rows.mask, (0, 3)),
            columns=columns,
            labels=None if rows.labels is None else wider(torch.where(rows.mask, rows.labels, 5), (0, 3), value=4),
            views={name: spoilt(view) for name, view in rows.views.items()},
            soft=None if rows.soft is None else spoilt_soft(rows.soft, attention),
        )

    drawn = {name: spoilt(rows) for name, rows in made.rows.items()}
    clean = ready(made.recipe, fresh_rows=chosen.fresh_rows, moved=0.0)
    clean.views = clean.engine().annotate(drawn, 3, clean.states)
    with torch.no_grad():
        for theirs, ours in zip(clean.policy.parameters(), made.policy.parameters(), strict=True):
            theirs.copy_(ours)
    after, step = gradient(clean)
    assert distance(after, before) < 1e-9
    assert all(torch.isfinite(torch.tensor(v)) for v in step.metrics.values())


def numbers(made: Prepared) -> dict[str, View]:
    """The streams' views with every number that terms and signals may read, as at the step."""
    engine = made.engine()
    out = {}
    for name, view in made.views.items():
        plan = engine.plans[name]
        index = torch.arange(len(view.rows))
        view = engine._survey(plan, view, [index]) if plan.wants else view
        named = dict(view.values)
        for need in plan.outputs:
            named[need] = torch.linspace(-1, 1, view.rows.row.shape[0], dtype=torch.float64)
        out[name] = view.with_values(named)
    return out


@every_case
def test_a_token_coupled_loss_may_be_sliced_anywhere(chosen: Case):
    made = prepare(chosen)
    seen = 0
    for name, view in numbers(made).items():
        for term in made.recipe.objective.terms:
            if term.on != name or term.couples != "token":
                continue
            seen += 1
            whole = [x.expand(view.row.shape[0]) for x in term.loss(view)]
            order = torch.randperm(view.row.shape[0], generator=torch.Generator().manual_seed(2))
            for part in order.split(5):
                for got, expected in zip(term.loss(view.slice(part)), whole, strict=True):
                    torch.testing.assert_close(got.expand(len(part)), expected[part], rtol=0, atol=0)
    assert seen or chosen.slug in ("dpo", "f-dpo", "inpo")


@every_case
def test_no_signal_returns_a_graph(chosen: Case):
    made = prepare(chosen)
    for name, view in numbers(made).items():
        view = view.with_values({n: v.clone().requires_grad_() for n, v in view.values.items()})
        for term in made.recipe.objective.terms:
            if term.on != name or isinstance(term, Coupled):  # whose rows no view holds
                continue
            for signal in term.signals():
                if type(signal).__name__ != "Hinge":
                    assert not view.signal(signal).requires_grad
                    assert not replace(view, signals={})._signal(signal).requires_grad
            loss, weight = term.loss(view)
            assert loss.requires_grad
            assert not weight.requires_grad


def several_terms() -> list[Any]:
    found = [c for c in CASES if len(c.recipe().objective.terms) > 1]
    return [pytest.param(c, i, id=f"{c.id}-{i}") for c in found for i in range(len(c.recipe().objective.terms))]


@pytest.mark.parametrize(("chosen", "number"), several_terms())
def test_a_coefficient_of_zero_is_the_term_removed(chosen: Case, number: int):
    recipe = chosen.recipe()
    terms = recipe.objective.terms
    rest = Objective(*(t for i, t in enumerate(terms) if i != number))

    def rebuilt(objective: Objective) -> Recipe:
        return Recipe(recipe.source, objective, recipe.schedule, given)

    named = {h.name for t in rest.terms for n in recipe_needs(recipe, t) for h in n}
    given = {n: r for n, r in recipe.models.items() if n in named or n in sampled(recipe)}
    zero = rebuilt(Objective(*(replace(t, coefficient=0.0) if i == number else t for i, t in enumerate(terms))))
    without = rebuilt(rest)
    assert zero.needs() == without.needs()
    assert set(zero.models) == set(without.models) == set(given)
    a, b = (ready(r, fresh_rows=chosen.fresh_rows) for r in (zero, without))
    assert distance(gradient(a)[0], gradient(b)[0]) == 0


def sampled(recipe: Recipe) -> set[str]:
    return {h.name for h in recipe.source.handles()}


def recipe_needs(recipe: Recipe, term: Term) -> list[tuple[Any, ...]]:
    """The handles (or side modules) of each number that a term or its signals read."""
    alone = replace(recipe, objective=Objective(term))
    out: list[tuple[Any, ...]] = []
    for need in alone.needs():
        if isinstance(need, Output):
            out.append((type("Named", (), {"name": need.module}),))
        elif isinstance(need, Comparison):
            out.append((type("Named", (), {"name": need.module}), need.to))
        elif hasattr(need, "to"):
            out.append(need.to.handles)
        elif hasattr(need, "of"):
            out.append((need.of,))
    return out


@every_case
def test_muted_rows_stay_in_the_denominators(chosen: Case):
    """The gradient is a sum over groups divided by a fixed number: muting one half and then the other adds up."""
    made = prepare(chosen)
    if chosen.slug == "disco":
        pytest.skip("the squared hinge is not linear in the rows; disco mutes rows by itself")
    if any(isinstance(t, Transport) for t in made.recipe.objective.terms):
        pytest.skip("rows are carried to each other: the cost of all is not that of two halves")
    whole, _ = gradient(made)
    parts = []
    for half in (0, 1):
        views = {}
        for name, view in made.views.items():
            muted = view.rows.group_index % 2 == half
            views[name] = replace(view, rows=replace(view.rows, muted=muted))
        parts.append(gradient(made, views=views)[0])
        assert distance(parts[-1], gradient(made, views=views, micro_rows=1)[0]) < 1e-9
    assert min(map(size, parts)) > 1e-5
    assert distance({n: parts[0][n] + parts[1][n] for n in whole}, whole) < 1e-9


@pytest.mark.parametrize("chosen", [c for c in CASES if not c.recipe().schedule.single_use], ids=lambda c: c.id)
def test_optimiser_batches_of_a_stale_draw(chosen: Case):
    """Half of the groups, of a policy that has moved: cut or not, and by the published loss of those rows alone."""
    made = prepare(chosen)
    halves = {}
    for name, view in made.views.items():
        halves[name] = view.select((view.rows.group_index % 2 == 0).nonzero()[:, 0])
    whole, _ = gradient(made, views=halves)
    assert distance(gradient(made, views=halves, micro_rows=1)[0], whole) < 1e-9
    # Statistics of the draw (whitening, group means) are those of the whole draw, not of the half.
    for name, view in halves.items():
        for signal, value in view.signals.items():
            full = made.views[name].signals[signal]
            keep = made.views[name].rows.group_index % 2 == 0
            expected = (
                full if full.ndim == 0 else full[keep[made.views[name].rows.row] if signal.reach == "token" else keep]
            )
            assert torch.equal(value, expected)


@every_case
def test_a_process_without_rows_takes_part(chosen: Case):
    """Stages may leave one process nothing: it computes the same sums, of nothing."""
    made = prepare(chosen)
    none = torch.tensor([], dtype=torch.long)
    drawn = {name: rows.select(none) for name, rows in made.rows.items()}
    views = made.engine().annotate(drawn, 3, made.states)
    for name, view in views.items():
        assert view.signals.keys() == made.views[name].signals.keys()
    found, step = gradient(made, views=views)
    assert size(found) == 0
    assert step.metrics["tokens"] == step.metrics["loss"] == 0


def test_a_muting_stage_is_at_work_in_disco():
    made = prepare(case("disco", group_size=4))
    rows = made.views["main"].rows
    assert rows.muted is not None
    assert 0 < int(rows.muted.sum()) < len(rows)
    assert not torch.equal(MuteEqual()(replace(rows, muted=None), None).muted, torch.zeros(len(rows), dtype=torch.bool))  # type: ignore[arg-type]


def test_scored_replaces_every_checker():
    assert "Answer" not in repr(scored(recipes.get("inpo").source)) + repr(scored(recipes.get("ppo").source))
