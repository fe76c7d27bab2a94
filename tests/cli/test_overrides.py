"""``key=value``: split, typed, and put where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from leibler.cli import overrides
from leibler.cli.expressions import ExpressionError, evaluate
from leibler.cli.overrides import convert, parameters, paths, replace, split
from leibler.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL
from leibler.errors import RecipeError
from leibler.objective import (
    Clip,
    GroupNormalised,
    Imitate,
    Linear,
    Match,
    Objective,
    PolicyGradient,
    Reward,
    Signal,
    Teacher,
)

# ---- splitting -----------------------------------------------------------------------------------------------------


def test_split_keeps_later_equals_signs():
    assert split(["data=task:addition:digits=2", "steps=5", "out="]) == {
        "data": "task:addition:digits=2",
        "steps": "5",
        "out": "",
    }


@pytest.mark.parametrize("argument", ["steps", "=5", ""])
def test_an_argument_without_a_key_is_a_mistake(argument):
    with pytest.raises(RecipeError, match="write it as key=value"):
        split([argument])


def test_a_key_given_twice_is_a_mistake():
    with pytest.raises(RecipeError, match="steps is given twice, as '5' and as '6'"):
        split(["steps=5", "steps=6"])


# ---- one value -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("200", int, 200),
        ("1_000", int, 1000),
        ("1e4", int, 10_000),
        ("-3", int, -3),
        ("5e-6", float, 5e-6),
        ("1", float, 1.0),
        ("inf", float, float("inf")),
        ("true", bool, True),
        ("No", bool, False),
        ("0", bool, False),
        ("3", str, "3"),
        ("runs/a", Path, Path("runs/a")),
        ("none", int | None, None),
        ("7", int | None, 7),
        ("null", str | None, None),
        ("1", int | float, 1),
        ("1.5", int | float, 1.5),
        ("1", bool | float, 1.0),
        ("true", bool | float, True),
        ("batch", Literal["group", "batch"] | None, "batch"),
        ("none", Literal["group", "batch"] | None, None),
        ("2", Literal[1, 2], 2),
        ("1,2,3", tuple[int, ...], (1, 2, 3)),
        ("[1, 2]", list[float], [1.0, 2.0]),
        ("", tuple[int, ...], ()),
        ("3,a", tuple[int, str], (3, "a")),
        ("{a: 1}", Mapping[str, int], {"a": 1}),
        ("bfloat16", torch.dtype, torch.bfloat16),
        ("cpu", torch.device, torch.device("cpu")),
        ("ReverseKL()", Divergence, ReverseKL()),
        ("ReverseKL", Divergence, ReverseKL()),
        ("JensenShannon(beta=0.1)", Divergence, JensenShannon(beta=0.1)),
        ("Linear(5e-3, 1e-3, steps=200)", Signal | float, Linear(5e-3, 1e-3, steps=200)),
        ("0.25", Signal | float, 0.25),
        ("data/task.jsonl", str | Divergence, "data/task.jsonl"),
        ("ReverseKL()", str | Divergence, "ReverseKL()"),
        ("Linear(1, 0, 2), Linear(2, 0, 3)", tuple[Signal, ...], (Linear(1, 0, 2), Linear(2, 0, 3))),
    ],
)
def test_text_is_read_as_the_type_that_is_wanted(text, annotation, value):
    found = convert(text, annotation)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation", "expected"),
    [
        ("many", int, "a whole number"),
        ("1.5", int, "a whole number"),
        ("inf", int, "a whole number"),
        ("fast", float, "a number"),
        ("nan", float, "a number"),
        ("2", bool, "true or false"),
        ("x", int | None, "a whole number or none"),
        ("x", Literal["a", "b"], "one of a, b"),
        ("1,b", tuple[int, ...], "a comma-separated list of a whole number"),
        ("1", tuple[int, str], "a comma-separated list"),
        ("float99", torch.dtype, "dtype"),
        ("0.5", Divergence, "a part such as Divergence"),
        ("Clip(0.2)", Divergence, "a part such as Divergence"),
        ("{a", Mapping[str, int], "a mapping"),
        ("[a", Mapping[str, int], "a mapping"),
    ],
)
def test_another_type_names_key_value_and_what_was_expected(text, annotation, expected):
    with pytest.raises(RecipeError) as caught:
        convert(text, annotation, "recipe.key")
    assert str(caught.value).startswith(f"recipe.key={text}: expected ")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=50)
@given(st.one_of(st.integers(-(10**12), 10**12), st.floats(allow_nan=False), st.booleans(), st.none()))
def test_what_is_printed_is_read_back(value):
    assert convert(str(value), type(value)) == value


@settings(max_examples=100)
@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_in_one_sentence(text):
    for annotation in (int, float, bool, Divergence, Signal | float, Literal["a"], tuple[int, ...], overrides.UNKNOWN):
        try:
            convert(text, annotation)
        except RecipeError as error:
            assert str(error)  # noqa: PT017


# ---- expressions ---------------------------------------------------------------------------------------------------


def test_parts_compose_in_text_as_they_do_in_python():
    assert evaluate("Reward() >> GroupNormalised(std=None)") == (Reward() >> GroupNormalised(std=None))
    assert evaluate("jensen_shannon(beta=0.25)") == JensenShannon(beta=0.25)
    assert evaluate("-1.5") == -1.5


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "open('/etc/passwd')",
        "().__class__",
        "[x for x in (1, 2)]",
        "lambda: 1",
        "Linear.__init__",
        "(ReverseKL)()()",
        "Linear(*[1, 2, 3])",
        "Linear(**{'start': 1})",
        "f'{1}'",
        "2 ** 99",
    ],
)
def test_nothing_but_parts_is_evaluated(text):
    with pytest.raises(ExpressionError):
        evaluate(text)


def test_an_unknown_part_suggests_the_nearest():
    with pytest.raises(
        RecipeError, match=r"key=ReversKL\(\): ReversKL is not a part of the library \(did you mean Rev"
    ):
        convert("ReversKL()", Divergence, "key")


def test_a_part_with_wrong_arguments_says_which():
    with pytest.raises(RecipeError, match=r"key=Linear\(1\): Linear: missing 2 required positional arguments"):
        convert("Linear(1)", Signal | float, "key")


def test_a_part_that_refuses_its_arguments_is_heard():
    with pytest.raises(RecipeError, match=r"beta.*7"):
        convert("JensenShannon(beta=7)", Divergence, "key")


# ---- parameters of functions ---------------------------------------------------------------------------------------


def test_parameters_know_their_types_from_annotations_or_defaults():
    def function(recipe, data: str | None = None, *, steps: int = 5, rate=0.1, mystery=None, **rest): ...

    found = parameters(function, leave_out=["recipe"])
    assert found == {"data": str | None, "steps": int, "rate": float, "mystery": overrides.UNKNOWN}


# ---- nested frozen values ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inner:
    size: int = 3
    rate: float | None = None
    names: tuple[str, ...] = ("a", "b")


@dataclass(frozen=True)
class Outer:
    inner: Inner = field(default_factory=Inner)
    several: tuple[Inner, ...] = (Inner(1), Inner(2))
    table: Mapping[str, Inner] = field(default_factory=lambda: {"x": Inner(7)})
    anything: object = 1

    def __post_init__(self) -> None:
        if self.inner.size + self.several[0].size > 10:
            raise RecipeError("too large together.")


def test_changes_reach_any_depth_and_leave_the_original_alone():
    value = Outer()
    changed = replace(
        value, {"inner.size": "4", "several.1.rate": "0.5", "table.x.names": "u,v", "several.0.size": "2"}
    )
    assert changed == Outer(Inner(4), (Inner(2), Inner(2, 0.5)), {"x": Inner(7, names=("u", "v"))})
    assert value == Outer()


def test_changes_are_checked_together():
    # Each alone would be too large beside the other's old value.
    value = Outer(Inner(9), (Inner(1),))
    assert replace(value, {"inner.size": "1", "several.0.size": "9"}).several[0].size == 9
    with pytest.raises(RecipeError, match="too large together"):
        replace(value, {"several.0.size": "9"})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("iner.size", r"p\.iner\.size is not a known key \(did you mean p\.inner\.size"),
        (
            "inner.siz",
            r"p\.inner\.siz is not a known key \(did you mean p\.inner\.size\?\); known under p\.inner: size",
        ),
        ("several.2.size", r"p\.several\.2\.size is not a known key \(did you mean p\.several\.[01]\.size"),
        ("size", r"p\.size is not a known key \(did you mean p\.inner\.size or p\.several\.0\.size"),
        ("inner.size.deeper", r"p\.inner\.size\.deeper is not a known key: p\.inner\.size is 3, which has no parts"),
        ("table.y.size", r"did you mean p\.table\.x\.size"),
    ],
)
def test_an_unknown_place_suggests_the_nearest_and_lists_the_known(path, message):
    with pytest.raises(RecipeError, match=message):
        replace(Outer(), {path: "1"}, "p.")


def test_a_wrong_type_in_depth_names_the_whole_key():
    with pytest.raises(RecipeError, match=r"recipe\.several\.0\.size=big: expected a whole number\."):
        replace(Outer(), {"several.0.size": "big"}, "recipe.")


def test_paths_list_parents_before_children():
    found = paths(Outer())
    assert found.index("inner") < found.index("inner.size")
    assert "table.x.names.1" in found


OBJECTIVE = Objective(
    PolicyGradient(Reward() >> GroupNormalised(), Clip(0.2)),
    Match(ForwardKL(), to=Teacher(), coefficient=0.5),
)


def test_an_objective_takes_numbers_schedules_and_parts():
    changed = replace(
        OBJECTIVE,
        {
            "terms.0.surrogate.low": "0.1",
            "terms.0.advantage.then.std": "none",
            "terms.1.coefficient": "Linear(1.0, 0.1, steps=9)",
            "terms.1.divergence": "jensen_shannon",
            "terms.1.divergence.beta": "0.3",
        },
    )
    assert changed.terms[0].surrogate.low == 0.1
    assert changed.terms[0].advantage == (Reward() >> GroupNormalised(std=None))
    assert changed.terms[1].coefficient == Linear(1.0, 0.1, steps=9)
    assert changed.terms[1].divergence == JensenShannon(beta=0.3)
    assert OBJECTIVE.terms[1].divergence == ForwardKL()


def test_a_coefficient_of_zero_removes_the_term_and_no_other_change_slips():
    changed = replace(OBJECTIVE, {"terms.0.coefficient": "0", "terms.1.coefficient": "0.25"})
    assert [t.coefficient for t in changed.terms] == [0.25]
    assert replace(Objective(Imitate()), {"terms.0.coefficient": "0"}).terms == ()


def test_a_class_with_its_own_constructor_is_copied_and_checked_again():
    @dataclass(frozen=True)
    class Odd:
        parts: tuple[int, ...]

        def __init__(self, *given: int) -> None:
            object.__setattr__(self, "parts", given)
            self.__post_init__()

        def __post_init__(self) -> None:
            if self.total > 9:
                raise RecipeError("more than nine.")

        @cached_property
        def total(self) -> int:
            return sum(self.parts)

    before = Odd(1, 2)
    assert before.total == 3
    after = replace(before, {"parts.0": "5"})
    assert after == Odd(5, 2)
    assert after.total == 7, "what was computed from the old parts is computed anew"
    with pytest.raises(RecipeError, match="more than nine"):
        replace(before, {"parts.0": "8"})
