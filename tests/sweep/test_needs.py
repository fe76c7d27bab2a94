"""What a method asks for is read off its recipe."""

from __future__ import annotations

from dataclasses import replace

import pytest

from leibler import recipes
from leibler.divergence import ForwardKL
from leibler.objective import Imitate, Match, Model, Objective, Teacher
from leibler.sweep import Settings
from leibler.sweep.needs import Asked, Offered, asked, lacking
from leibler.sweep.provide import offered
from leibler.train import EMA, Answer, Data, Frozen, Mixture, OnPolicy, Pipeline, Recipe, Score, TrainingStage

EVERYTHING = Offered(frozenset({"teacher"}), frozenset({"train", "text"}), frozenset({"pass_rate"}), answers=True)
MATCH = Objective(Match(ForwardKL(), to=Teacher()))


@pytest.mark.parametrize(
    ("slug", "expected"),
    [
        ("sft", Asked(data={"train": "labels"})),
        ("gkd", Asked(models=frozenset({"teacher"}), data={"train": "prompts"})),
        ("kdrl", Asked(models=frozenset({"teacher"}), data={"train": "prompts"}, answers=True)),
        ("distillm", Asked(models=frozenset({"teacher"}), data={"train": "both"}, validation=True)),
        ("delta-kd", Asked(models=frozenset({"teacher", "teacher_base"}), data={"train": "labels"})),
        ("dpo", Asked(data={"train": "labels"}, pairs=frozenset({"train"}))),
        ("transfer-limits", Asked(data={"train": "labels"}, columns={"train": ("label_logp",)})),
    ],
)
def test_what_published_methods_ask_for(slug, expected):
    assert asked(recipes.get(slug)) == expected


def test_a_model_that_starts_as_the_student_is_not_asked_for_and_one_under_another_name_is_by_its_source():
    moving = Recipe(Data(), Objective(Match(ForwardKL(), to=Model("slow"))), models={"slow": EMA(0.1)})
    assert asked(moving).models == frozenset()
    renamed = Recipe(
        Data(), Objective(Match(ForwardKL(), to=Model("old_teacher"))), models={"old_teacher": Frozen("teacher")}
    )
    assert asked(renamed).models == {"teacher"}


def test_needs_are_found_inside_mixtures_and_stages_of_sources():
    source = Mixture(own=OnPolicy(prompts="tasks") >> Score(Answer("tasks")), gold=Data("gold", columns=("pass_rate",)))
    found = asked(Recipe(source, Objective(Imitate(on="own"), Imitate(on="gold", where="chosen"))))
    assert found.data == {"tasks": "prompts", "gold": "labels"}
    assert found.columns == {"gold": ("pass_rate",)}
    assert found.pairs == {"gold"}
    assert found.answers


def test_a_pipeline_asks_for_what_no_stage_of_it_makes():
    first = TrainingStage(Recipe(Data("text"), Objective(Imitate())))
    second = TrainingStage(Recipe(Data(), MATCH), models={"teacher": "first"})
    assert asked(Pipeline({"first": first, "second": second})) == Asked(data={"text": "labels", "train": "labels"})
    renamed = Objective(Match(ForwardKL(), to=Model("other")))
    by_source = Recipe(Data(), renamed, models={"other": Frozen("teacher")})
    made = TrainingStage(by_source, models={"teacher": "first"})
    assert asked(Pipeline({"first": first, "second": made})).models == frozenset()
    third = replace(second, models={})
    assert asked(Pipeline({"first": first, "second": third})).models == {"teacher"}


def test_what_is_lacking_is_told_by_name():
    assert lacking(asked(recipes.get("kd")), EVERYTHING) == ""
    assert lacking(asked(recipes.get("g-opd")), EVERYTHING) == "the model base"
    assert lacking(asked(recipes.get("transfer-limits")), EVERYTHING) == "the column label_logp"
    assert lacking(asked(recipes.get("kdrl")), replace(EVERYTHING, answers=False)) == "a checker of answers"
    assert lacking(asked(recipes.get("vocabulary-expansion")), EVERYTHING).startswith("a teacher of a smaller")
    assert lacking(asked(recipes.get("tcod")), EVERYTHING) == "the column environment"
    assert lacking(asked(recipes.get("llada")), EVERYTHING) == "a student that fills in masked positions"


def test_the_embedded_set_up_leaves_out_only_what_is_of_another_kind():
    family = [slug for slug in recipes.names() if recipes.find(slug).family == "distillation"]
    there = offered(Settings())
    out = {slug: reason for slug in family if (reason := lacking(asked(recipes.get(slug)), there))}
    kinds = ("the column environment", "the column latents", "a student that fills in masked positions")
    for slug, reason in out.items():
        assert reason in (*kinds, "a teacher of a smaller vocabulary than the student's"), slug
    assert len(family) - len(out) >= 20
