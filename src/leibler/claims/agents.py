"""What the method for agents claims: on a chain with states that the teacher never learned, and in the text world."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from leibler.claims.framework import claim
from leibler.claims.tables import (
    F64,
    Bench,
    Build,
    Table,
    every,
    fractions,
    kl,
    listed,
    of,
    off,
    shuffled,
    slope,
    visits,
)
from leibler.data import Dataset, Record
from leibler.data.tasks import Part
from leibler.environment import Environment, Outcome, Session, TextWorld, check_environment, replay
from leibler.objective import SAMPLE, Rows
from leibler.policy import CausalLM, character_tokenizer, tiny_llama
from leibler.policy.randomness import generator
from leibler.train import Context, Episodes, Recipe

DEPTH, ACTIONS = 20, 4


# ---- the chain -----------------------------------------------------------------------------------------------------


class ByState(Table):
    """A policy whose row of logits depends on the last token alone, which is a state; ``row`` says which."""

    row: Tensor

    def __init__(self, logits: Float[Tensor, "rows actions"], row: Int[Tensor, " states"]) -> None:
        nn.Module.__init__(self)  # the table of a policy over prefixes would have one row for each of them
        self.logits = nn.Parameter(logits.detach().to(F64)[None].clone())
        self.length, self.vocab_size = 1, logits.shape[1]
        self.register_buffer("row", row)

    def forward(self, tokens: Int[Tensor, "batch positions"], attention: Tensor) -> Tensor:
        return nn.functional.one_hot(self.row[tokens], self.logits.shape[1]).to(F64)

    def copy(self) -> ByState:
        return ByState(self.logits[0], self.row).requires_grad_(False)

    def laws(self) -> Float[Tensor, "states actions"]:
        """Log-probabilities of the actions in every state."""
        return self.logits.detach()[0].log_softmax(-1)[self.row]


def _peaked(right: Int[Tensor, " states"], probability: float) -> Tensor:
    """Logits with this probability of the right action, the others equal."""
    rest = (1 - probability) / (ACTIONS - 1)
    hit = nn.functional.one_hot(right, ACTIONS).to(F64)
    return torch.log(hit * probability + (1 - hit) * rest)


@dataclass(frozen=True)
class Chain:
    """``DEPTH`` states in a row, each with one right action; any other leads beside the path, for good.

    Tokens: the actions come first, then the states on the path, then those beside it (one for each depth).
    """

    path: int = ACTIONS
    beside: int = ACTIONS + DEPTH

    @property
    def right(self) -> Tensor:
        return torch.arange(DEPTH) % ACTIONS

    def policy(self, on: float, off: float, blind: bool = False) -> ByState:
        """Right with probability ``on`` on the path; beside it, that action's probability is ``off``.

        A ``blind`` one cannot tell whether it is on the path: it has one row for each depth.
        """
        states = [torch.zeros(ACTIONS, ACTIONS, dtype=F64), _peaked(self.right, on), _peaked(self.right, off)]
        row = torch.arange(ACTIONS + 2 * DEPTH)
        return ByState(torch.cat(states), torch.where(row >= self.beside, row - DEPTH, row) if blind else row)

    def play(self, policy: ByState, rows: int, turns: int, draw: torch.Generator) -> Rows:
        """Episodes of so many turns: state, action, state, action, ..."""
        laws, right = policy.laws().exp(), self.right
        state = torch.full((rows,), self.path)
        tokens = []
        for turn in range(turns):
            action = torch.multinomial(laws[state], 1, generator=draw)[:, 0]
            tokens += [state, action]
            stays = (state < self.beside) & (action == right[turn])
            state = torch.where(stays, self.path, self.beside) + turn + 1
        found = torch.stack(tokens, 1)
        mask = (torch.arange(2 * turns - 1) % 2 == 0).expand(rows, -1)
        number = torch.arange(rows)
        return Rows(
            found, torch.ones_like(found, dtype=torch.bool), mask, number, torch.full_like(number, SAMPLE),
            records=[Record(str(i)) for i in range(rows)],
        )  # fmt: skip

    def success(self, policy: ByState) -> float:
        """The chance to stay on the path to its end."""
        laws = policy.laws()[self.path : self.beside]
        return float(laws[torch.arange(DEPTH), self.right].sum().exp())


@dataclass(frozen=True)
class Learnt:
    """A run on the chain.

    Args:
        divergence: mean KL(student, teacher) over the states trained on, for each step.
        by_depth: the same at the first step, for each depth.
        success: the exact chance of success before each step, and at the end.
    """

    divergence: list[float]
    by_depth: list[float]
    success: list[float]

    def first(self, threshold: float) -> int:
        """Updates until the chance of success has reached a threshold; their number and one if it has not."""
        return next((n for n, s in enumerate(self.success) if s >= threshold), len(self.success))


def _on_chain(recipe: Recipe, seed: int, steps: int, blind: bool, rate: float, rows: int = 64) -> Learnt:
    """The recipe's own schedule and objective, by plain gradient descent."""
    chain = Chain()
    teacher, student = chain.policy(0.995, 1 / ACTIONS), chain.policy(0.85, 0.85, blind)
    bench = Bench(recipe, {"policy": student, "teacher": teacher})
    source = recipe.source
    assert isinstance(source, Episodes)
    draw = generator(seed, "chain")
    divergence, success, by_depth = [], [chain.success(student)], []
    for step in range(steps):
        turns = DEPTH if source.max_turns is None else min(source.turns_at(step) or DEPTH, DEPTH)
        played = chain.play(student, rows, turns, draw)
        gap = kl(student.laws(), teacher.laws())
        visited = gap[played.tokens[:, :-1][played.mask]].view(rows, turns)
        divergence.append(float(visited.mean()))
        by_depth = by_depth or visited.mean(0).tolist()
        bench.descend(bench.annotate(played, step), rate)
        success.append(chain.success(student))
    return Learnt(divergence, by_depth, success)


@claim(
    "tcod",
    "A student that cannot tell whether it is still on the path unlearns the deep states where the teacher knows "
    "nothing: without a curriculum its success falls first, with one it does not, and is high sooner",
    "mean KL per state at the deepest five states at least 1.5 times that at the first five; without a curriculum "
    "success falls below a fifth of what it was, from front to back never below it; KL of the trained states lower in "
    "80% of the steps (not in every one: towards the end both are small), success of 0.5 in fewer updates; two seeds",
    full=True,
)
def tcod_spares_what_was_known(build: Build = of("tcod")) -> tuple[str, bool]:
    shown, holds = [], True
    for seed in (0, 1):
        cut = _on_chain(build(curriculum="f2b", every=2), seed, 150, blind=True, rate=20.0)
        whole = _on_chain(build(curriculum="none"), seed, 150, blind=True, rate=20.0)
        deep, shallow = sum(whole.by_depth[-5:]) / 5, sum(whole.by_depth[:5]) / 5
        lower = sum(a < b for a, b in zip(cut.divergence, whole.divergence, strict=True)) / 150
        before = whole.success[0]
        found = (cut.first(0.5), whole.first(0.5))
        shown.append(
            f"KL {shallow:.2f} at first, {deep:.2f} deep; lower in {lower:.0%} of the steps; success {before:.3f}, "
            f"then at least {min(cut.success):.3f} and {min(whole.success):.4f}; "
            f"updates to 0.5: {found[0]} and {found[1]}"
        )
        holds &= deep > 1.5 * shallow and min(whole.success) < before / 5 and min(cut.success) >= before - 1e-9
        holds &= lower >= 0.8 and found[0] < found[1] <= 150
    return "; ".join(shown), holds


@claim(
    "tcod",
    "Where each state has logits of its own, nothing is unlearned and the curriculum only waits: the divergence per "
    "state still rises with depth at first, but whole episodes reach success sooner (the paper's order is not seen)",
    "mean KL per state at the deepest five states at least 1.5 times that at the first five; success of 0.5 after "
    "fewer updates without a curriculum than from front to back; two seeds",
    full=True,
)
def tcod_waits_where_nothing_is_shared(build: Build = of("tcod")) -> tuple[str, bool]:
    shown, holds = [], True
    for seed in (0, 1):
        cut = _on_chain(build(curriculum="f2b", every=2), seed, 100, blind=False, rate=20.0)
        whole = _on_chain(build(curriculum="none"), seed, 100, blind=False, rate=20.0)
        deep, shallow = sum(whole.by_depth[-5:]) / 5, sum(whole.by_depth[:5]) / 5
        found = (cut.first(0.5), whole.first(0.5))
        shown.append(f"KL {shallow:.2f} at first, {deep:.2f} deep; updates to 0.5: {found[0]} and {found[1]}")
        holds &= deep > 1.5 * shallow and found[1] < found[0] <= 100
    return "; ".join(shown), holds


# ---- the curriculum and the loss -----------------------------------------------------------------------------------


class _Climb(Session):
    def __init__(self, rungs: int) -> None:
        self.rungs = rungs

    def reset(self, task: str) -> str:
        self.at = 0
        return task

    def step(self, action: str) -> Outcome:
        self.at += 1
        return Outcome(str(self.at % 10), float(self.at == self.rungs), self.at == self.rungs)


@dataclass(frozen=True)
class Ladder(Environment):
    """So many turns, whatever is said; observations of one character, after a task of two."""

    name: ClassVar[str] = "ladder"
    cue: ClassVar[str] = "="
    rungs: int = 8

    @property
    def turns(self) -> int:
        return self.rungs

    def session(self) -> Session:
        return _Climb(self.rungs)

    def tasks(self, n: int, seed: int = 0, part: Part = "all") -> list[str]:
        return [str(10 + (seed + i) % 90) for i in range(n)]

    def script(self, task: str) -> Sequence[str]:
        return ["0"] * self.rungs

    def reply(self, observation: str) -> str:
        return observation + self.cue


def _turns_at(recipe: Recipe, model: CausalLM, step: int, rungs: int) -> tuple[set[int], list[int]]:
    """Turns of the student, and the places of the events of the first row, when actions are one token long."""
    assert isinstance(recipe.source, Episodes)
    source = replace(recipe.source, environment=Ladder(rungs=rungs))
    data = Dataset(tuple(Record(task) for task in Ladder().tasks(4)), "ladders")
    context = Context(
        models={"policy": model}, data={"train": data}, seed=0, draw=0, step=step, steps=100, rows=4, max_new_tokens=1,
        max_length=64, temperature=1.0,
    )  # fmt: skip
    rows = source.draw(context, {})[0]["main"]
    return {int(t) for t in rows.columns["turns"]}, rows.mask[0].nonzero()[:, 0].tolist()


@claim(
    "tcod",
    "The stairs begin and end where they are said to: from front to back 1 + floor(n / every) turns up to all of them, "
    "from back to front all but as many actions replayed; only the student's own tokens are events",
    "exact turns and exact places of the events at steps 0, 4, 5, 14, 35 and 1000 of episodes of 8 turns, every=5",
)
def tcod_climbs_its_stairs(build: Build = of("tcod"), rungs: int = 8) -> tuple[str, bool]:
    wrong, model = [], tiny_llama(character_tokenizer("0123456789="), hidden=16, layers=1, heads=2, max_length=64)
    for step in (0, 4, 5, 14, 35, 1000):
        reached = min(1 + step // 5, rungs)
        for curriculum in ("f2b", "b2f", "none"):
            own = rungs if curriculum == "none" else reached
            replayed = rungs - own if curriculum == "b2f" else 0
            # The opening has 3 tokens; a replayed turn has its action, its end and a reply of 2; an own turn 1 and 2.
            places = [2 + 4 * replayed + 3 * turn for turn in range(own)]
            found = _turns_at(build(curriculum=curriculum, every=5), model, step, rungs)
            if found != ({own}, places):
                wrong.append(f"{curriculum} at step {step}: {found} instead of {own} turns at {places}")
    return "; ".join(wrong[:2]) or "all as stated", not wrong


STUDENT, TEACHER = shuffled(2, 4, 3, seed=1), shuffled(2, 4, 3, seed=2)
"""Laws over two prompts and two symbols out of three, in sixths."""


@claim(
    "tcod",
    "What is descended is the reverse KL, token by token, in the mean over the tokens that the student plays",
    "gradient equal to that by enumeration at scales 1 and 0.5, relative difference below 1e-6",
)
def tcod_descends_the_reverse_kl(build: Build = of("tcod")) -> tuple[str, bool]:
    gaps, share = [], visits(*every(STUDENT, 2), 3)
    q = fractions(TEACHER, 2).log_laws().reshape(2, 4, 3)
    for scale in (1.0, 0.5):
        bench = Bench(build(scale=scale), {"policy": fractions(STUDENT, 2), "teacher": fractions(TEACHER, 2)})
        wanted = slope(lambda z: (share * kl(z.log_softmax(-1), q)).sum(), bench.policy.logits)
        gaps.append(off(bench.gradient(listed(*every(STUDENT, 2)))[0], scale * wanted))
    return f"relative difference {max(gaps):.1e}", max(gaps) < 1e-6


@claim(
    "tcod",
    "The scripted teacher solves every text world, and the same actions lead to the same texts in a copy of it",
    "reward 1 within the turns of 150 worlds of three sizes; every promise of `check_environment` kept",
)
def tcod_has_a_teacher_that_solves(kind: type[TextWorld] = TextWorld) -> tuple[str, bool]:
    sizes = (kind(), kind(rooms=3, depth=2), kind(rooms=12, depth=6, doors=3, objects=4, holes=3))
    solved = 0
    for world in sizes:
        check_environment(world, n=4)
        for task in world.tasks(50):
            actions = world.script(task)
            solved += replay(world, task, actions).reward == 1.0 and len(actions) <= world.turns
    return f"{solved} of 150", solved == 150
