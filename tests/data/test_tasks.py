from __future__ import annotations

import random
from fractions import Fraction
from itertools import permutations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leibler.data import TASKS, Addition, Brackets, Countdown, Record, load, matches_answer, normalised, tasks
from leibler.data.arithmetic import MAX_LENGTH, NotAnExpression, evaluate
from leibler.data.tasks import held_out
from leibler.errors import DataError

MANY = [
    Addition(1),
    Addition(3),
    Addition(4, reversed=True),
    Countdown(),
    Countdown(numbers=5, largest=25, target=500, use_all=True),
    Brackets(),
    Brackets(depth=1, length=1, kinds=4),
    Brackets(depth=12, length=40, kinds=4),
]


@pytest.mark.parametrize("task", MANY, ids=str)
def test_demonstrations_are_right_short_and_within_the_alphabet(task):
    records = task.sample(300, seed=5)
    for record in records:
        assert task.check(record, record.completion) == 1.0
        assert task.check(record, f" {record.completion}\n") == 1.0
        assert task.check(record, "") == 0.0
        text = record.prompt + record.completion
        assert text.isascii()
        assert text.isprintable()
        assert len(text) <= 100
        assert set(text) <= set(task.alphabet)
        assert record.answer == record.completion
    assert {r.source for r in records} == {f"{task.spec(seed=5)}:{i}" for i in range(1, 301)}


@pytest.mark.parametrize("task", MANY, ids=str)
def test_a_sample_is_its_seed_and_begins_with_the_shorter_one(task):
    assert task.sample(40, seed=1) == task.sample(60, seed=1)[:40]
    assert [r.prompt for r in task.sample(40, seed=1)] != [r.prompt for r in task.sample(40, seed=2)]
    random.seed(0)
    state = random.getstate()
    task.sample(5, seed=1)
    assert random.getstate() == state


@given(seed=st.integers(0, 10**9), other=st.integers(0, 10**9))
def test_no_seed_brings_a_held_out_prompt_into_training(seed, other):
    for task in (Addition(2), Countdown(), Brackets()):
        train, heldout = task.sample(100, seed, "train"), task.sample(20, other, "heldout")
        assert not {r.prompt for r in train} & {r.prompt for r in heldout}
        assert len({r.prompt for r in heldout}) == 20


def test_the_held_out_share_is_one_in_five():
    share = sum(held_out(f"{a}+{b}=") for a in range(100) for b in range(100)) / 10_000
    assert abs(share - 0.2) < 0.02


def test_a_split_has_the_sizes_and_the_checker():
    train, heldout = Addition(3).split(50, 10, seed=2)
    assert (len(train), len(heldout)) == (50, 10)
    assert train.name == "task:addition:digits=3,n=50,seed=2,part=train"
    assert train.check is not None
    assert [r.prompt for r in load(train.name)] == [r.prompt for r in train]


def test_a_small_task_says_when_it_is_used_up():
    with pytest.raises(DataError, match="task:brackets:depth=1,length=1 has too few different prompts for 50 records"):
        Brackets(depth=1, length=1).sample(50, part="heldout")
    assert len(Addition(1).sample(500, part="train")) == 500  # training may repeat


def test_addition_adds():
    for record in Addition(5).sample(50, seed=1):
        a, b = record.prompt[:-1].split("+")
        assert len(a) == len(b) == 5
        assert int(record.completion) == int(a) + int(b)
    backwards = Addition(5, reversed=True).sample(50, seed=1)
    assert [r.completion[::-1] for r in backwards] == [r.completion for r in Addition(5).sample(50, seed=1)]
    check = Addition(2).check
    for wrong in ("081", "81 ", "8 2", "82.", "+82", "８２", "82=", "37+45"):
        assert check(Record("37+45="), wrong) == 0.0


@given(seed=st.integers(0, 10**6))
def test_countdown_problems_are_proper(seed):
    task = Countdown(numbers=4, largest=12, target=80)
    (record,) = task.sample(1, seed)
    left, right = record.prompt[:-1].split("=")
    given_numbers, target = [int(x) for x in left.split(",")], int(right)
    value, used = evaluate(record.completion)
    assert value == target == eval(record.completion)
    assert sorted(used) == given_numbers
    assert 1 <= target <= 80
    assert target not in given_numbers
    assert max(given_numbers) <= 12


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("3*7+5", 1),
        ("5 + 7 * 3", 1),
        ("((7)*3)+5", 1),
        ("7*3+5=26", 0),
        ("26", 0),
        ("3*7+3+5-3", 0),  # 3 is given once
        ("3*8+2", 0),
        ("7*3+5*1", 0),
        ("", 0),
        ("(", 0),
        ("3*", 0),
        ("-7", 0),
        ("3**7", 0),
        ("3//7", 0),
        ("3/(5-5)", 0),
        ("3 7", 0),
        ("0x7", 0),
        ("7*3+5.", 0),
        ("7*3+٥", 0),
        ("(" * 100_000, 0),
        ("9" * 100_000, 0),
        ("__import__('os').system('true')", 0),
    ],
)
def test_countdown_answers(answer, right):
    assert Countdown().check(Record("3,5,7=26:"), answer) == right


def test_countdown_may_ask_for_every_number():
    record = Record("1,3,5,7=26:")
    assert Countdown().check(record, "3*7+5") == 1.0
    assert Countdown(use_all=True).check(record, "3*7+5") == 0.0
    assert Countdown(use_all=True).check(record, "(3*7+5)/1") == 1.0
    assert Countdown().check(Record("2,4,8=1:"), "2/4*8/4") == 0.0
    assert Countdown().check(Record("2,4,8=4:"), "2/4*8") == 1.0  # halves on the way are allowed


expressions = st.recursive(
    st.integers(0, 30).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map("".join) | inner.map("({})".format),
    max_leaves=8,
)


@given(text=expressions)
def test_the_parser_agrees_with_python(text):
    wrapped = "".join(f"Fraction({token})" if token.isdigit() else token for token in split_numbers(text))
    try:
        expected = eval(wrapped, {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(NotAnExpression, match="division by zero"):
            evaluate(text)
        return
    assert evaluate(text)[0] == expected


def split_numbers(text):
    current = ""
    for character in text:
        if character.isdigit():
            current += character
            continue
        if current:
            yield current
        current = ""
        yield character
    if current:
        yield current


@given(text=st.text(alphabet="0123456789+-*/() .a", max_size=MAX_LENGTH + 5))
def test_the_parser_refuses_or_answers(text):
    try:
        value, numbers = evaluate(text)
    except NotAnExpression:
        return
    assert isinstance(value, Fraction)
    assert numbers


def test_the_brackets_checker_agrees_with_rewriting():
    task = Brackets(depth=4, length=6, kinds=2)

    def balanced(text: str) -> bool:
        while (shorter := text.replace("()", "").replace("[]", "")) != text:
            text = shorter
        return not text

    for prompt in ("(", "[(", "([]"):
        for n in range(1, 5):
            for letters in product("()[]", repeat=n):
                answer = "".join(letters)
                assert task.check(Record(prompt), answer) == balanced(prompt + answer)
    assert task.check(Record("("), "{})") == 0.0
    assert task.check(Record("("), "a)") == 0.0


def test_brackets_respect_their_knobs():
    for record in Brackets(depth=3, length=12, kinds=3).sample(200):
        depth = deepest = 0
        for character in record.prompt:
            depth += 1 if character in "([{" else -1
            deepest = max(deepest, depth)
        assert 1 <= deepest <= 3
        assert depth == len(record.completion)
        # A walk that ends balanced goes on until a bracket is open: one more character.
        assert len(record.prompt) <= 13


def test_detours_make_the_demonstrations_of_a_prompt_differ_and_change_no_prompt():
    plain, task = Brackets(length=2), Brackets(length=2, detours=2)
    shortest, found = plain.sample(300), task.sample(300)
    assert [r.prompt for r in found] == [r.prompt for r in shortest]
    assert all(task.check(r, r.completion or "") == 1.0 for r in found)
    extra = {len(a.completion or "") - len(b.completion or "") for a, b in zip(found, shortest, strict=True)}
    assert extra == {0, 2, 4}
    answers = {r.completion for r in found if r.prompt == "("}
    assert {")", ")()", ")[]", "())", "[])"} < answers


def test_a_record_of_another_task_is_refused():
    for task, prompt in product(
        [task() for task in TASKS.values()], ["37+45=", "3,5,7=26:", "([", "hello", "", "1+2+3=", "a+b="]
    ):
        made_by = {"37+45=": "addition", "3,5,7=26:": "countdown", "([": "brackets"}.get(prompt)
        if made_by == task.name:
            task.check(Record(prompt), "x")
        elif not (prompt == "" and task.name == "brackets"):
            with pytest.raises(DataError, match=f"task:{task.name} does not make"):
                task.check(Record(prompt), "x")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("task:adition", r"no task 'adition' .*did you mean 'addition'.*the tasks are addition, countdown, brackets"),
        ("task:", "the tasks are addition, countdown, brackets"),
        (
            "task:addition:digit=3",
            r"no knob 'digit' \(did you mean 'digits'\?\); the knobs are digits, reversed, n, seed",
        ),
        ("task:addition:digits", "'digits' .* is not of the form key=value"),
        ("task:addition:digits=three", "digits=three .* is not a whole number"),
        ("task:addition:digits=2.5", "digits=2.5 .* is not a whole number"),
        ("task:addition:digits=0", "cannot take digits=0; give a whole number from 1 to 50"),
        ("task:addition:digits=3,digits=4", "gives 'digits' twice"),
        ("task:addition:reversed=maybe", "neither true nor false"),
        ("task:addition:n=0", "was asked for n=0 records"),
        ("task:addition:part=test", "no part 'test'; choose one of all, train, heldout"),
        ("task:brackets:kinds=9", "give a whole number from 1 to 4"),
        ("task:countdown:numbers=1", "give a whole number from 2 to 8"),
        ("corpus:wikipedia", "no corpus 'wikipedia' .*the corpora are stdlib"),
        ("corpus:stdlib:lenght=3", "did you mean 'length'"),
        ("corpus:stdlib:prompt=x", "prompt=x .* is not a number"),
    ],
)
def test_a_specification_that_is_not_understood_lists_what_is(spec, message):
    with pytest.raises(DataError, match=message) as caught:
        load(spec)
    assert "\n" not in str(caught.value)


def test_a_specification_gives_the_task_it_names():
    data = load("task:addition:digits=3,n=20,seed=1,reversed=true")
    assert list(data) == Addition(3, reversed=True).sample(20, seed=1)
    assert data.name == "task:addition:digits=3,reversed=true,n=20,seed=1"
    assert data.check(data[0], data[0].completion) == 1.0
    assert len(load("task:addition")) == 1000
    assert len(load("task:addition", limit=3)) == 3
    assert len(load("task:addition:n=5", limit=9)) == 5
    assert list(load("task:countdown:part=heldout,n=7")) == Countdown().sample(7, part="heldout")
    with pytest.raises(DataError, match="5 of 5 were set aside for: 'chosen' is missing"):
        load("task:addition:n=5", needs=("prompt", "chosen"))
    assert set(tasks()) == set(TASKS)


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("Paris", "paris.", 1),
        ("the  sea", "The sea", 1),
        ("1200", "1,200", 1),
        ("1200", "1,20,0", 0),
        ("4", "4.0", 1),
        ("4", "+4", 1),
        ("0", "-0.0", 1),
        ("0.5", "0.50", 1),
        ("100", "1", 0),
        ("0.1", "0.10000000000000000000000001", 0),
        ("e\u0301", "\u00e9", 1),
        ("x2", "x\u00b2", 0),
        ("Paris", "Paris or Rome", 0),
        ("Paris", "", 0),
    ],
)
def test_answers_match_up_to_what_makes_no_difference(answer, text, right):
    assert matches_answer(Record("q", answer=answer), text) == right


def test_a_record_without_an_answer_cannot_be_checked():
    with pytest.raises(DataError, match=r"d\.jsonl:3 has no 'answer'"):
        matches_answer(Record("q", source="d.jsonl:3"), "x")


@given(st.text(max_size=20))
def test_normalising_twice_changes_nothing_more(text):
    assert normalised(normalised(text)) == normalised(text)


def test_every_order_of_the_same_numbers_is_one_prompt():
    assert all(
        Countdown().check(Record("3,5,7=26:"), "*".join(p[:2]) + "+" + p[2]) == (p[2] == "5")
        for p in permutations("357")
    )
