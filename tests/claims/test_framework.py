"""Claims: found, selected, run, and refuted."""

from __future__ import annotations

import sys
import types

import pytest

from leibler import claims
from leibler.claims import framework
from leibler.claims.framework import Claim, claim, declared, select
from leibler.errors import RecipeError


def make(slug: str, holds: bool = True, full: bool = False) -> Claim:
    return Claim(slug, f"about {slug}", "as expected", full, lambda: ("seen", holds))


def test_a_claim_that_holds_is_reported_in_full():
    result = make("kd").run()
    assert list(result) == ["slug", "claim", "observed", "expected", "holds", "seconds"]
    assert result["holds"] is True
    assert (result["slug"], result["observed"], result["expected"]) == ("kd", "seen", "as expected")
    assert result["seconds"] >= 0


def test_a_claim_that_does_not_hold():
    assert make("kd", holds=False).run()["holds"] is False


def test_a_claim_that_raises_does_not_hold_and_says_why():
    def broken():
        raise ZeroDivisionError("by nothing")

    result = Claim("kd", "c", "e", False, broken).run()
    assert result["holds"] is False
    assert result["observed"] == "ZeroDivisionError: by nothing"


def test_a_tensor_verdict_becomes_plain_data():
    import json

    import torch

    result = Claim("kd", "c", "e", False, lambda: (torch.tensor(1.0), torch.tensor(True))).run()
    assert json.loads(json.dumps(result))["holds"] is True


def test_seconds_are_measured():
    import time

    result = Claim("kd", "c", "e", False, lambda: (time.sleep(0.05), True)).run()
    assert 0.04 < result["seconds"] < 5


def test_ctrl_c_is_not_a_refutation():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Claim("kd", "c", "e", False, interrupted).run()


def test_one_function_may_claim_twice():
    @claim("kd", "first", "e")
    @claim("gkd", "second", "e", full=True)
    def experiment():
        return "seen", True

    assert [(c.slug, c.text, c.full) for c in declared(experiment)] == [("kd", "first", False), ("gkd", "second", True)]
    assert experiment() == ("seen", True), "a claim is still an ordinary function"


ALL = [make("kd"), make("kd", full=True), make("dpo"), make("grpo", full=True), make("divergence")]


def test_selection_by_slug_family_and_length():
    def names(chosen):
        return [(c.slug, c.full) for c in chosen]

    assert names(select(ALL)) == [("kd", False), ("dpo", False), ("divergence", False)]
    assert len(select(ALL, full=True)) == 5
    assert names(select(ALL, ["kd"], full=True)) == [("kd", False), ("kd", True)]
    assert names(select(ALL, family="preference")) == [("dpo", False)]
    assert names(select(ALL, ["divergence", "dpo"])) == [("dpo", False), ("divergence", False)]
    assert select(ALL, ["kd"], family="preference") == []


def test_an_unknown_slug_or_family_is_a_mistake():
    with pytest.raises(RecipeError, match=r"'dpoo' has no claim \(did you mean dpo or grpo\?\)"):
        select(ALL, ["dpoo"])
    with pytest.raises(RecipeError, match="families with claims: distillation, preference, policy"):
        select(ALL, family="nothing")


def test_discovery_finds_what_a_module_declares_once(monkeypatch):
    module = types.ModuleType("leibler.claims.invented")
    exec(
        "from leibler.claims import claim\n"
        "@claim('dpo', 'second', 'e')\n"
        "def b(): return 'seen', True\n"
        "@claim('kd', 'first', 'e')\n"
        "def a(): return 'seen', False\n",
        vars(module),
    )
    other = types.ModuleType("leibler.claims.reader")
    other.a = module.a  # type: ignore[attr-defined]  # imported from its neighbour: not claimed again
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, other.__name__, other)
    infos = [types.SimpleNamespace(name=n) for n in ("reader", "invented", "simplex", "framework", "_private")]
    monkeypatch.setattr(framework.pkgutil, "iter_modules", lambda path: infos)
    assert [(c.slug, c.text) for c in claims.claims()] == [("kd", "first"), ("dpo", "second")]

    assert [r["holds"] for r in claims.run()] == [False, True]
    assert [c.text for c in claims.chosen()] == ["first", "second"]


def test_every_claim_of_the_library_is_well_formed():
    from leibler.recipes.registry import METHODS

    found = claims.claims()
    assert len({(c.slug, c.text) for c in found}) == len(found), "two claims say the same"
    for c in found:
        assert c.text, c.slug
        assert c.expected, c.slug
        assert c.slug in METHODS or c.family is None
