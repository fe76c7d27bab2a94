"""Dialogues as rows: which tokens are events, what is replayed, where episodes are cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from environment.made import Sums
from leibler.cache import write
from leibler.data import Dataset, Record, load
from leibler.environment import Outcome, TextWorld
from leibler.errors import DataError, ModelError, RecipeError, RunError
from leibler.measure import evaluate
from leibler.objective import Linear, Rows, Staircase
from leibler.policy import character_tokenizer, logprobs, sample, tiny_llama
from leibler.policy.randomness import uniforms
from leibler.train import Answer, Context, Data, Demonstrated, Episodes, fit
from leibler.train.validation import validate
from train.conformance import TEMPERATURE, tiny
from train.running import StopAt, Stopped, written

TASKS = Dataset(tuple(Record(str(i), source=f"tasks:{i}") for i in range(7)), "tasks")


@pytest.fixture(scope="module")
def policy() -> Any:
    return tiny(0)


def context(policy: Any, data: Dataset = TASKS, **changes: Any) -> Context:
    given: dict[str, Any] = {
        "models": {"policy": policy}, "data": {"train": data}, "seed": 3, "draw": 0, "step": 0, "steps": 10, "rows": 6,
        "max_new_tokens": 5, "max_length": 64, "temperature": TEMPERATURE,
    }  # fmt: skip
    return Context(**{**given, **changes})


def drawn(source: Any, at: Context, state: Any = None) -> Rows:
    return source.draw(at, {} if state is None else state)[0]["main"]


def turns_of(policy: Any, rows: Rows, row: int) -> list[tuple[int, list[int]]]:
    """Each turn's number and its tokens, from the rows' columns alone."""
    number = rows.columns["turn"][row][rows.mask[row]].tolist()
    tokens = rows.tokens[row, 1:][rows.mask[row]].tolist()
    return [(int(n), [t for t, m in zip(tokens, number, strict=True) if m == n]) for n in sorted(set(number))]


# ---- rows --------------------------------------------------------------------------------------------------------


def test_a_row_is_the_dialogue_and_its_events_are_the_players_tokens(policy):
    rows = drawn(Episodes(Sums()), context(policy))
    assert len(rows) == 6
    for i, record in enumerate(rows.records):
        turns = turns_of(policy, rows, i)
        assert [n for n, _ in turns] == [0, 1, 2]
        # The dialogue once more, from what was said and nothing else.
        game, whole, mask = Sums().session(), policy.encode_prompt(game_opening(record)), []
        game.reset(record.prompt)
        mask = [0] * len(whole)
        text, reward = "", 0.0
        for n, tokens in turns:
            said = policy.decode(tokens)
            outcome = game.step(said.strip())
            reward += outcome.reward
            reply = outcome.observation + "=" if n < 2 else ""
            between = policy.tokenizer.encode(reply, add_special_tokens=False)
            whole, mask, text = (
                whole + tokens + between,
                mask + [1] * len(tokens) + [0] * len(between),
                text + said + reply,
            )
        length = int(rows.attention[i].sum())
        assert rows.tokens[i, :length].tolist() == whole
        assert rows.mask[i, : length - 1].int().tolist() == mask[1:]
        assert not rows.mask[i, length - 1 :].any()
        assert rows.texts[i] == text
        assert float(rows.columns["reward"][i]) == reward
    assert rows.columns["turns"].tolist() == [3.0] * 6
    assert rows.columns["finished"].tolist() == [1.0] * 6
    assert rows.columns["overflow"].tolist() == [0.0] * 6


def game_opening(record: Record) -> str:
    return record.prompt + "="


def test_what_the_sampler_reports_is_the_log_probability_in_the_whole_dialogue(policy):
    rows = drawn(Episodes(Sums(), group_size=2), context(policy))
    logp = logprobs(policy, rows.tokens, rows.attention, rows.mask, temperature=TEMPERATURE)
    torch.testing.assert_close(rows.columns["behaviour_logp"][rows.mask].double(), logp, rtol=1e-5, atol=1e-5)
    assert not rows.columns["behaviour_logp"][~rows.mask].any()
    assert rows.group.tolist() == [0, 0, 1, 1, 2, 2]


@dataclass(frozen=True)
class Paying(Sums):
    """Pays at every turn."""

    def advance(self, sessions, actions):
        return [replace(outcome, reward=0.25) for outcome in super().advance(sessions, actions)]


def test_the_reward_of_an_episode_is_the_sum_over_its_turns(policy):
    assert drawn(Episodes(Paying(4)), context(policy)).columns["reward"].tolist() == [1.0] * 6
    assert drawn(Episodes(Paying(4), max_turns=3), context(policy)).columns["reward"].tolist() == [0.75] * 6
    # What the replayed beginning earned belongs to the episode too.
    back = Episodes(Paying(4), prefix=Demonstrated(1))
    assert drawn(back, context(policy)).columns["reward"].tolist() == [1.0] * 6


def test_the_end_token_of_a_turn_is_the_players(policy):
    rows = drawn(Episodes(Sums()), context(policy, max_new_tokens=15))
    eos = policy.tokenizer.eos_token_id
    for i in range(len(rows)):
        for _, tokens in turns_of(policy, rows, i):
            assert (tokens[-1] == eos) == (len(tokens) < 15)
            assert eos not in tokens[:-1]


# ---- derived randomness ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [1, 2])
def test_processes_share_a_draw_and_change_nothing(policy, group_size):
    source = Episodes(Sums(), group_size=group_size)
    whole = drawn(source, context(policy, draw=4))
    parts = [drawn(source, context(policy, draw=4, rank=r, world=2)) for r in range(2)]
    texts = {}
    for part in parts:
        for record, text, reward in zip(part.records, part.texts, part.columns["reward"].tolist(), strict=True):
            texts.setdefault(record.prompt, []).append((text, reward))
    for record, text, reward in zip(whole.records, whole.texts, whole.columns["reward"].tolist(), strict=True):
        assert (text, reward) == texts[record.prompt].pop(0)
    assert not any(texts.values())
    assert len(drawn(source, context(policy, rows=1, rank=1, world=2))) == 0


def test_turns_draws_and_rows_have_their_own_randomness(policy):
    one = Dataset((Record("5"),), "one")
    rows = drawn(Episodes(Sums(4), group_size=6), context(policy, one))
    other = drawn(Episodes(Sums(4), group_size=6), context(policy, one, draw=1))
    assert len(set(rows.texts)) > 1
    assert rows.texts != other.texts
    table = [uniforms(3, f"episodes/{t}", 0, 6, 5) for t in range(2)]
    assert not torch.equal(*table)
    first = sample(policy, [policy.encode_prompt("5=")] * 6, uniforms=table[0], temperature=TEMPERATURE).completions()
    assert [turns_of(policy, rows, i)[0][1] for i in range(6)] == first


def test_the_order_of_tasks_is_that_of_data(policy):
    source, state, seen = Episodes(Sums()), {}, []
    for draw in range(7):
        found, state = source.draw(context(policy, draw=draw), state)
        seen += [r.prompt for r in found["main"].records]
    assert state == {"position": 42}
    assert all(sorted(seen[i : i + 7]) == [str(n) for n in range(7)] for i in range(0, 42, 7))


# ---- the curriculum ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "turns"), [(0, 1), (4, 1), (5, 2), (14, 3), (15, 4), (10**6, 6)])
def test_from_front_to_back_the_turns_are_those_of_the_stairs(policy, step, turns):
    rows = drawn(Episodes(Sums(6), max_turns=Staircase(1, 5)), context(policy, step=step))
    assert rows.columns["turns"].tolist() == [turns] * 6
    assert rows.columns["finished"].tolist() == [float(turns == 6)] * 6
    assert [len(turns_of(policy, rows, i)) for i in range(6)] == [turns] * 6
    # What comes after a cut is not there: the row ends with the last action.
    assert all(bool(rows.mask[i, int(rows.attention[i].sum()) - 2]) for i in range(6))


@pytest.mark.parametrize(("step", "replayed"), [(0, 5), (4, 5), (5, 4), (24, 1), (25, 0), (10**6, 0)])
def test_from_back_to_front_the_script_is_replayed_without_loss(policy, step, replayed):
    game = Sums(6)
    rows = drawn(Episodes(game, prefix=Demonstrated(Staircase(1, 5))), context(policy, step=step))
    assert rows.columns["turns"].tolist() == [6 - replayed] * 6
    assert rows.columns["finished"].tolist() == [1.0] * 6
    for i, record in enumerate(rows.records):
        assert [n for n, _ in turns_of(policy, rows, i)] == list(range(replayed, 6))
        opening = policy.encode_prompt(record.prompt + "=")
        said = game.script(record.prompt)[:replayed]
        session = game.session()
        session.reset(record.prompt)
        for action in said:
            reply = session.step(action).observation + "="
            opening += policy.encode_completion(action) + policy.tokenizer.encode(reply, add_special_tokens=False)
        assert rows.tokens[i, : len(opening)].tolist() == opening
        assert not rows.mask[i, : len(opening) - 1].any()
        assert bool(rows.mask[i, len(opening) - 1])


def test_a_demonstration_in_the_record_goes_before_the_script(policy):
    later = [["1=", "2"], ["3=", "4"], ["5=", "6"]]
    data = Dataset((Record("5", completion="9", extra={"turns": later}),), "told")
    rows = drawn(Episodes(Sums(6), prefix=Demonstrated(2)), context(policy, data))
    # Replayed: 9 and 2, answered by the environment and not by what the record holds.
    assert rows.texts[0].startswith("9" + "4=" + "2" + "6=")
    assert rows.columns["turns"].tolist() == [4.0] * 6


def test_replayed_turns_count_against_the_limit(policy):
    rows = drawn(Episodes(Sums(6), max_turns=5, prefix=Demonstrated(3)), context(policy))
    assert rows.columns["turns"].tolist() == [2.0] * 6
    assert set(rows.columns["turn"][rows.mask].tolist()) == {3.0, 4.0}


def test_any_schedule_of_the_step_will_do(policy):
    source = Episodes(Sums(6), max_turns=Linear(1, 5, steps=8))
    assert [int(drawn(source, context(policy, step=s)).columns["turns"][0]) for s in (0, 3, 8, 99)] == [1, 2, 5, 5]


# ---- limits and mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [7, 14, 16, 20, 28])
def test_a_full_context_ends_an_episode_and_is_counted(policy, length):
    rows = drawn(Episodes(Sums(9)), context(policy, max_length=length))
    assert rows.tokens.shape[1] <= length
    overflow = rows.columns["overflow"]
    assert overflow.tolist() == [1.0] * 6
    assert rows.columns["finished"].sum() == 0
    if length == 7:
        assert rows.columns["turns"].tolist() == [1.0] * 6
    # Where it ended, no environment's text stands that nobody answered.
    assert all(bool(rows.mask[i, int(rows.attention[i].sum()) - 2]) for i in range(6))


def test_a_task_that_does_not_fit_at_all_is_a_row_without_events(policy):
    data = Dataset((Record("1" * 10), Record("2")), "two")
    rows = drawn(Episodes(Sums()), context(policy, data, rows=2, max_length=15))
    long = [r.prompt for r in rows.records].index("1" * 10)
    assert rows.columns["turns"][long] == 0
    assert rows.columns["overflow"][long] == 1
    assert int(rows.length[long]) == 0 < int(rows.length[1 - long])


@dataclass(frozen=True)
class Short(Sums):
    """Over when 9 is said."""

    def advance(self, sessions, actions):
        found = super().advance(sessions, actions)
        return [Outcome(o.observation, o.reward, True) if a == "9" else o for o, a in zip(found, actions, strict=True)]


@dataclass(frozen=True)
class Mute(Sums):
    def script(self, task: str):
        return None


@dataclass(frozen=True)
class Loud(Sums):
    def reply(self, observation: str) -> str:
        return "!" + observation


@dataclass(frozen=True)
class Broken(Sums):
    def advance(self, sessions, actions):
        raise OSError("the server is gone")


@pytest.mark.parametrize(
    ("source", "kind", "complaint"),
    [
        (Episodes(Mute(), prefix=Demonstrated(1)), DataError, "tasks:.* has no demonstration: env:sums has no script"),
        (Episodes(), DataError, "names no task of an environment; take env:NAME"),
        (Episodes(Loud()), ModelError, "no token for '!', which env:sums writes"),
        (Episodes(Broken()), RunError, "env:sums failed at one of the actions .*OSError: the server is gone"),
    ],
    ids=["no-script", "no-task", "unknown-character", "failing"],
)
def test_mistakes_are_told(policy, source, kind, complaint):
    with pytest.raises(kind, match=complaint):
        drawn(source, context(policy))


def test_a_demonstration_that_ends_too_early_is_refused(policy):
    data = Dataset((Record("5", completion="9", extra={"turns": [["1=", "2"], ["3=", "4"]]}),), "told")
    with pytest.raises(DataError, match="to be replayed for 2 turns, but env:sums:length=6 ends it after 1"):
        drawn(Episodes(Short(6), prefix=Demonstrated(1)), context(policy, data))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Episodes(max_turns=0),
        lambda: Episodes(group_size=0),
        lambda: Demonstrated(0),
        lambda: Staircase(1, every=0),
        lambda: Staircase(3, every=1, stop=2),
    ],
)
def test_settings_without_a_turn_are_refused(make):
    with pytest.raises(RecipeError):
        make()


def test_another_engine_may_sample_each_turn(policy):
    class Engine:
        followed, asked = 0, []

        def follow(self, model, step):
            Engine.followed += 1

        def sample(self, model, prompts, *, seeds, max_new_tokens, temperature, group_size):
            assert group_size == 1
            Engine.asked.append((len(prompts), tuple(seeds)))
            return sample(model, prompts, uniforms=uniforms(seeds[0], "x", 0, len(prompts), max_new_tokens))

    rows = drawn(Episodes(Sums()), context(policy, rollouts=Engine()))
    assert rows.columns["turns"].tolist() == [3.0] * 6
    assert Engine.followed == 1
    assert [n for n, _ in Engine.asked] == [6, 6, 6]
    assert len({s for _, seeds in Engine.asked for s in seeds}) == 18


# ---- demonstrations as data, and whole runs ----------------------------------------------------------------------


def test_a_demonstration_is_learnt_as_one_dialogue(policy):
    later = [["1=", "22"], ["3=", "4"]]
    data = Dataset((Record("5=", completion="9", extra={"turns": later}),), "told")
    rows = drawn(Data(), context(policy, data, rows=1))
    eos = policy.tokenizer.eos_token_id
    encode = lambda text: policy.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    whole = [*encode("5="), *encode("9"), eos, *encode("1="), *encode("22"), eos, *encode("3="), *encode("4"), eos]
    assert rows.tokens[0].tolist() == whole
    assert rows.mask[0].int().tolist() == [0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 1]


def test_validation_and_teacher_caches_read_the_whole_dialogue(policy, tmp_path):
    """And count the player's own tokens only."""
    data = Dataset(
        (Record("5=", completion="9", extra={"turns": [["1=", "22"], ["3=", "4"]]}), Record("7=", completion="01")),
        "told",
    )
    rows = drawn(Data(), context(policy, data, rows=2))
    expected = -logprobs(policy, rows.tokens, rows.attention, rows.mask).double().mean()
    found = validate({"policy": policy}, data, temperature=1.0, max_new_tokens=2)
    assert found["nll"] == pytest.approx(float(expected.detach()), rel=1e-6)
    cache = write(policy, data, tmp_path / "cache", top_k=3)
    cache.check_data(data, policy)
    own = logprobs(policy, rows.tokens, rows.attention, rows.mask).detach()
    assert torch.allclose(cache.logp(rows).to(own.dtype), own, atol=1e-5)


def test_what_is_played_has_no_answers_to_check(policy):
    data = load("env:textworld:n=3")
    for call in (lambda: evaluate(policy, data), lambda: Answer().bind(context(policy, data))):
        with pytest.raises(DataError, match=r"env:textworld.* is played in turns .*`leibler measure success`"):
            call()


class Refusing(Sums):
    """Fails at the second task, and counts what was opened and closed."""

    opened = closed = 0

    def session(self) -> Any:
        Refusing.opened += 1
        session = super().session()

        def reset(task: str) -> str:
            if task == "1":
                raise ValueError("no such task")
            return type(session).reset(session, task)

        def close() -> None:
            Refusing.closed += 1

        session.reset, session.close = reset, close
        return session


def test_every_session_is_closed_when_one_fails(policy):
    with pytest.raises(RunError, match="no such task"):
        drawn(Episodes(Refusing()), context(policy))
    assert Refusing.opened == Refusing.closed > 0


@pytest.mark.parametrize("turns", ["1=", [["1="]], [[1, 2]], [["1=", "2", "3"]]])
def test_turns_that_are_none_are_told(policy, turns):
    data = Dataset((Record("5=", completion="9", source="file:3", extra={"turns": turns}),), "told")
    with pytest.raises(DataError, match=r"'turns' of file:3 .* give a list of pairs"):
        drawn(Data(), context(policy, data, rows=1))


def test_demonstrations_longer_than_the_context_are_set_aside(tmp_path):
    tokenizer = character_tokenizer(TextWorld().alphabet)
    student = tiny_llama(tokenizer, hidden=16, layers=1, heads=2, max_length=400)
    data = load("env:textworld:n=40")
    lengths = [len(r.prompt + r.completion + "".join(t + a for t, a in r.extra["turns"])) + 1 for r in data]
    ends = [1 + len(r.extra["turns"]) for r in data]
    fit("sft", student=student, data=data, out=tmp_path / "run", steps=1, batch_size=2, quiet=True)
    aside = (tmp_path / "run" / "set_aside" / "train.jsonl").read_text().splitlines()
    assert len(aside) == sum(n - 1 + e > 400 for n, e in zip(lengths, ends, strict=True))
    assert 0 < len(aside) < 40


def whole_run(out: Any, stop: int | None = None, resume: bool = False, **params: Any) -> Any:
    from leibler import recipes

    made = recipes.get("tcod", every=2, **params)
    source = replace(made.source, environment=Sums(4))
    made = replace(made, source=source if stop is None else source >> StopAt(stop))
    data = [{"prompt": str(i)} for i in range(9)]
    return fit(
        made, student=tiny(0, dropout=0.2, dtype=torch.float32, loud=6.0), teacher=tiny(1, dtype=torch.float32),
        data=data, out=out, steps=6, batch_size=8, learning_rate=0.01, max_new_tokens=4, save_every=2, sample_every=2,
        quiet=True,
        resume=resume,
    )  # fmt: skip


@pytest.mark.parametrize("curriculum", ["f2b", "b2f"])
def test_a_resumed_run_is_the_run(tmp_path, curriculum):
    whole_run(tmp_path / "whole", curriculum=curriculum)
    with pytest.raises(Stopped):
        whole_run(tmp_path / "cut", stop=3, curriculum=curriculum)
    whole_run(tmp_path / "cut", resume=True, curriculum=curriculum)
    assert written(tmp_path / "whole") == written(tmp_path / "cut")
    import json

    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["turns"] for line in lines] == [1, 1, 2, 2, 3, 3]
    assert all(line["overflow"] == 0 for line in lines)
