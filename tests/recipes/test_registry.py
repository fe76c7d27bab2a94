"""The table of methods and how a recipe is asked for."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

from leibler import recipes
from leibler.errors import RecipeError
from leibler.recipes.registry import FAMILIES, METHODS

EXPECTED = {
    "sft": ("distillation", 2022),
    "kd": ("distillation", 2015),
    "gkd": ("distillation", 2023),
    "minillm": ("distillation", 2023),
    "distillm": ("distillation", 2024),
    "akl": ("distillation", 2024),
    "kdrl": ("distillation", 2025),
    "g-opd": ("distillation", 2026),
    "ppo": ("policy", 2017),
    "grpo": ("policy", 2024),
    "disco": ("policy", 2025),
    "dpo": ("preference", 2023),
    "f-dpo": ("preference", 2023),
    "inpo": ("preference", 2024),
}


def test_the_table_holds_the_methods_with_family_and_year():
    assert {slug: (m.family, m.year) for slug, m in METHODS.items() if slug in EXPECTED} == EXPECTED


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())
def test_a_row_is_complete(method):
    assert METHODS[method.slug] is method
    assert method.family in FAMILIES
    assert method.kind in ("recipe", "measurement")
    assert method.title
    assert method.summary.endswith(".")
    assert "\n" not in method.summary
    assert len(method.summary) < 110, "one line of a table"
    module, _, function = method.where.partition(":")
    if method.kind != "measurement":
        assert function == method.slug.replace("-", "_")
    module = f"leibler.recipes.{module}" if method.kind == "recipe" else module
    assert getattr(importlib.import_module(module), function).__doc__
    # What a recipe may have beside `leibler train`, a measurement must have.
    assert method.command.startswith("leibler ") or (method.kind == "recipe" and not method.command)


def test_names_are_the_slugs_of_what_is_trained():
    assert recipes.names() == [slug for slug, method in METHODS.items() if method.kind == "recipe"]
    with pytest.raises(RecipeError, match=r"kd-fidelity is a measurement and not .* use `leibler measure agreement`"):
        recipes.get("kd-fidelity")


def test_listing_methods_imports_no_tensor_library():
    code = (
        "import sys; from leibler import recipes; recipes.names(); recipes.find('dpo'); print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("asked", "suggested"), [("minilm", "minillm"), ("F_DPO", "f-dpo"), ("GRPO", "grpo"), ("kdlr", "kdrl")]
)
def test_an_unknown_slug_suggests_the_nearest(asked, suggested):
    with pytest.raises(RecipeError, match=rf"'{asked}' is not a known method \(did you mean .*{suggested}"):
        recipes.get(asked)


def test_a_slug_like_nothing_suggests_nothing():
    with pytest.raises(RecipeError, match="'qqqqqq' is not a known method; see `leibler methods`"):
        recipes.get("qqqqqq")


def test_a_wrong_parameter_names_the_known_ones(monkeypatch):
    def build(*, beta: float = 0.1, group_size: int = 8):
        return beta, group_size

    monkeypatch.setattr(recipes, "function", lambda slug: build)
    assert recipes.get("grpo", beta=0.5) == (0.5, 8)
    with pytest.raises(
        RecipeError, match=r"grpo has no parameter bta \(did you mean beta\?\); it has beta, group_size"
    ):
        recipes.get("grpo", bta=0.5)


def test_a_missing_parameter_is_named(monkeypatch):
    def build(*, lam: float, beta: float = 0.1):
        return lam, beta

    monkeypatch.setattr(recipes, "function", lambda slug: build)
    with pytest.raises(RecipeError, match="g-opd needs lam"):
        recipes.get("g-opd", beta=0.5)


def test_the_package_leads_to_the_registry():
    assert importlib.import_module("leibler.recipes").METHODS is METHODS
