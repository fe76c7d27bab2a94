"""Tasks with exact checkers and a knob for their difficulty, made here and not downloaded.

Every string is short printable ASCII, so that a character-level tokenizer and a model of about a million parameters
can learn a task in a minute. Every record carries a correct completion, so the same task serves imitation,
distillation and reinforcement.

Prompts are divided once and for all by a hash of their text: one in five belongs to the held-out part, whatever the
seed and the number of records. Training and held-out data therefore never share a prompt, even when they are made by
two runs that know nothing of each other.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from leibler.data.arithmetic import NotAnExpression, evaluate
from leibler.data.hashing import digest, generator
from leibler.data.knobs import Named
from leibler.data.records import Dataset, Record
from leibler.errors import DataError

Part = Literal["all", "train", "heldout"]
PARTS: tuple[Part, ...] = ("all", "train", "heldout")
HELDOUT_ONE_IN = 5
MOST = 10_000_000
"""Records of one data set, which are all made before the first step: some gigabytes."""
_ATTEMPTS = 200
"""Draws for one record before the task counts as exhausted."""


def held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out part.

    Examples:
        >>> held_out("37+45=") == held_out("37+45=")
        True
    """
    return digest("heldout", prompt) % HELDOUT_ONE_IN == 0


@dataclass(frozen=True)
class Task(Named, ABC):
    """A generator of problems with solutions, and the checker of an answer.

    A task is its knobs. A subclass says how one problem is drawn (``problem``), which answers are right (``correct``)
    and which characters occur (``alphabet``).
    """

    family: ClassVar[str] = "task"

    @property
    @abstractmethod
    def alphabet(self) -> str:
        """Every character that a prompt or a right answer may hold."""

    @abstractmethod
    def problem(self, draw: random.Random) -> tuple[str, str]:
        """(prompt, a right completion) from a generator."""

    @abstractmethod
    def correct(self, prompt: str, answer: str) -> bool:
        """Whether an answer without surrounding blanks solves the problem that the prompt states.

        Raises:
            ValueError: the prompt is not one of this task.
        """

    def check(self, record: Record, text: str) -> float:
        """1.0 if the response solves the record's problem, else 0.0. Blanks around the response do not count.

        Raises:
            DataError: the record's prompt is not one of this task.
        """
        try:
            return float(self.correct(record.prompt, text.strip()))
        except ValueError as error:
            raise DataError(
                f"{record.source or 'the record'} has the prompt {record.prompt[:60]!r}, which task:{self.name} does "
                "not make; score it with the checker of its own task."
            ) from error

    def sample(self, n: int, seed: int = 0, part: Part = "all") -> list[Record]:
        """``n`` records derived from the seed; a longer sample begins with the shorter one.

        Training records may repeat, as problems of a small task must; held-out records are all different, so that an
        accuracy over them is one over problems.

        Args:
            n: how many.
            seed: which ones.
            part: ``train`` and ``heldout`` never share a prompt, for any two seeds; ``all`` draws from both.

        Raises:
            DataError: ``n`` is not positive, the part is unknown, or the task has too few different prompts.

        Examples:
            >>> Addition(digits=2).sample(3, seed=0) == Addition(digits=2).sample(5, seed=0)[:3]
            True
        """
        if n < 1:
            raise DataError(f"task:{self.name} was asked for n={n} records; ask for at least 1.")
        if n > MOST:
            raise DataError(f"task:{self.name} was asked for n={n} records; ask for at most {MOST:,}.")
        if part not in PARTS:
            raise DataError(f"task:{self.name} has no part {part!r}; choose one of {', '.join(PARTS)}.")
        records: list[Record] = []
        seen: set[str] = set()
        source = self.spec(seed=seed)
        for row in range(n):
            for attempt in range(_ATTEMPTS):
                prompt, completion = self.problem(generator(self.name, seed, row, attempt))
                wanted = part == "all" or held_out(prompt) == (part == "heldout")
                if wanted and not (part == "heldout" and prompt in seen):
                    break
            else:
                raise DataError(
                    f"{self.spec()} has too few different prompts for {n} records (part {part}); "
                    "ask for fewer or make the task harder."
                )
            seen.add(prompt)
            records.append(Record(prompt, completion=completion, answer=completion, source=f"{source}:{row + 1}"))
        return records

    def dataset(self, n: int, seed: int = 0, part: Part = "all") -> Dataset:
        """``sample`` as a data set with this task's checker."""
        more = {"n": n, "seed": seed} | ({} if part == "all" else {"part": part})
        return Dataset(tuple(self.sample(n, seed, part)), name=self.spec(**more), check=self.check)

    def split(self, train: int, heldout: int, seed: int = 0) -> tuple[Dataset, Dataset]:
        """A training and a held-out data set that share no prompt.

        Examples:
            >>> train, heldout = Brackets().split(20, 5, seed=1)
            >>> {r.prompt for r in train} & {r.prompt for r in heldout}
            set()
        """
        return self.dataset(train, seed, "train"), self.dataset(heldout, seed, "heldout")


@dataclass(frozen=True)
class Addition(Task):
    """Adds two numbers of ``digits`` digits: ``37+45=`` is answered by ``82``.

    Args:
        digits: the length of both summands; the difficulty.
        reversed: write the sum with its last digit first, ``28``. A digit of the sum then depends only on two digits
            of the summands and a carry that is already decided, whereas the first digit written the usual way depends
            on every carry: small models learn the reversed form from far fewer examples (Lee et al., "Teaching
            Arithmetic to Small Transformers", 2023).

    Examples:
        >>> task = Addition(digits=2)
        >>> task.check(Record("37+45="), "82"), task.check(Record("37+45="), "28")
        (1.0, 0.0)
        >>> Addition(digits=2, reversed=True).check(Record("37+45="), "28")
        1.0
    """

    name: ClassVar[str] = "addition"
    digits: int = 2
    reversed: bool = False

    def __post_init__(self) -> None:
        self._require("digits", 1, 50)

    @property
    def alphabet(self) -> str:
        return "0123456789+="

    def problem(self, draw: random.Random) -> tuple[str, str]:
        low = 10 ** (self.digits - 1) if self.digits > 1 else 0
        a, b = (draw.randrange(low, 10**self.digits) for _ in range(2))
        return f"{a}+{b}=", self._written(a + b)

    def correct(self, prompt: str, answer: str) -> bool:
        a, b = prompt.removesuffix("=").split("+")
        return answer == self._written(int(a) + int(b))

    def _written(self, total: int) -> str:
        return str(total)[::-1] if self.reversed else str(total)


@dataclass(frozen=True)
class Countdown(Task):
    """Reaches a target with the given numbers, each used at most once: ``3,5,7=26:`` is answered by ``3*7+5``.

    A problem is made from a random expression whose intermediate results are positive whole numbers, so it always has
    a solution. Any other expression that reaches the target is right as well; answers are parsed, never evaluated.

    Args:
        numbers: how many numbers are given; the difficulty.
        largest: the largest number given.
        target: the largest target.
        use_all: count an answer only if it uses every number.

    Examples:
        >>> task = Countdown()
        >>> [task.check(Record("3,5,7=26:"), text) for text in ("3*7+5", "(5+3*7)", "7*7-23", "26", "__import__('os')")]
        [1.0, 1.0, 0.0, 0.0, 0.0]
    """

    name: ClassVar[str] = "countdown"
    numbers: int = 3
    largest: int = 9
    target: int = 99
    use_all: bool = False

    def __post_init__(self) -> None:
        self._require("numbers", 2, 8)
        self._require("largest", 2, 100)
        self._require("target", 10, 100_000)

    @property
    def alphabet(self) -> str:
        return "0123456789+-*/()=,:"

    def problem(self, draw: random.Random) -> tuple[str, str]:
        while True:
            given = [draw.randint(1, self.largest) for _ in range(self.numbers)]
            text, value = self._expression(given, draw)
            # A target that is among the numbers would be reached without any arithmetic.
            if value <= self.target and value not in given:
                return f"{','.join(map(str, sorted(given)))}={value}:", text

    def correct(self, prompt: str, answer: str) -> bool:
        left, right = prompt.removesuffix(":").split("=")
        available, target = [int(number) for number in left.split(",")], int(right)
        try:
            value, used = evaluate(answer)
        except NotAnExpression:
            return False
        for number in used:
            if number not in available:
                return False
            available.remove(number)
        return value == target and not (self.use_all and available)

    @staticmethod
    def _expression(given: list[int], draw: random.Random) -> tuple[str, int]:
        """Joins two random parts by a random operation until one is left; (text, value)."""
        # Each part: its value, its text, and how tightly its last operation binds (number 2, product 1, sum 0).
        parts = [(number, str(number), 2) for number in given]
        while len(parts) > 1:
            a, b = (parts.pop(draw.randrange(len(parts))) for _ in range(2))
            operations = ["+", "*"]
            if a[0] > b[0]:
                operations.append("-")
            if b[0] > 1 and a[0] % b[0] == 0:
                operations.append("/")
            operation = draw.choice(operations)
            results = {"+": a[0] + b[0], "-": a[0] - b[0], "*": a[0] * b[0], "/": a[0] // b[0]}
            binds = 1 if operation in "*/" else 0
            left = a[1] if a[2] >= binds else f"({a[1]})"
            # To the right of - and / an operation of the same rank needs brackets too.
            right = b[1] if b[2] >= binds + (operation in "-/") else f"({b[1]})"
            parts.append((results[operation], left + operation + right, binds))
        return parts[0][1], parts[0][0]


_PAIRS = ("()", "[]", "{}", "<>")


@dataclass(frozen=True)
class Brackets(Task):
    """Completes a prefix to a balanced sequence: ``([]{`` is answered by ``})``.

    The shortest completion is the demonstration, and every balanced one is right (``}[])`` closes it as well), so
    policies of the same accuracy can differ in their diversity.

    Args:
        depth: the deepest nesting in a prompt; the difficulty.
        length: the longest prompt.
        kinds: how many kinds of brackets, in the order ``() [] {} <>``.
        detours: how many pairs a demonstration opens and closes again, at most, before it is done; with some of them
            the demonstrations of one prompt differ, as people's do, and a policy that imitates them all is not sure.

    Examples:
        >>> task = Brackets()
        >>> [task.check(Record("([]"), text) for text in (")", "[])", "", "]", ")(")]
        [1.0, 1.0, 0.0, 0.0, 0.0]
        >>> [record.completion for record in Brackets(length=1, kinds=1, detours=1).sample(4)]
        [')', ')', '())', '())']
    """

    name: ClassVar[str] = "brackets"
    depth: int = 4
    length: int = 10
    kinds: int = 2
    detours: int = 0

    def __post_init__(self) -> None:
        self._require("depth", 1, 64)
        self._require("length", 1, 200)
        self._require("kinds", 1, len(_PAIRS))
        self._require("detours", 0, 64)

    @property
    def alphabet(self) -> str:
        return "".join(_PAIRS[: self.kinds])

    def problem(self, draw: random.Random) -> tuple[str, str]:
        # A walk that ends with every bracket closed gains a last opening one: a prompt always leaves work to do.
        length = draw.randint(1, self.length)
        text, open_kinds = "", []
        while len(text) < length or not open_kinds:
            can_open = len(open_kinds) < self.depth
            if not open_kinds or (can_open and draw.random() < 0.6):
                open_kinds.append(draw.randrange(self.kinds))
                text += _PAIRS[open_kinds[-1]][0]
            else:
                text += _PAIRS[open_kinds.pop()][1]
        answer = "".join(_PAIRS[kind][1] for kind in reversed(open_kinds))
        for _ in range(draw.randint(0, self.detours) if self.detours else 0):
            at = draw.randint(0, len(answer))
            answer = answer[:at] + _PAIRS[draw.randrange(self.kinds)] + answer[at:]
        return text, answer

    def correct(self, prompt: str, answer: str) -> bool:
        if self._waiting(prompt) is None:
            raise ValueError("not a prefix of a balanced sequence")
        return bool(answer) and self._waiting(prompt + answer) == []

    def _waiting(self, text: str) -> list[str] | None:
        """The closing brackets that are still missing, innermost last; None if the text is no longer a prefix."""
        closing = {pair[0]: pair[1] for pair in _PAIRS[: self.kinds]}
        waiting: list[str] = []
        for character in text:
            if character in closing:
                waiting.append(closing[character])
            elif not waiting or waiting.pop() != character:
                return None
        return waiting


TASKS: dict[str, Callable[..., Task]] = {task.name: task for task in (Addition, Countdown, Brackets)}


def tasks() -> tuple[str, ...]:
    """The names of the tasks.

    Examples:
        >>> tasks()
        ('addition', 'countdown', 'brackets')
    """
    return tuple(TASKS)
