"""Episodes played by a language model: many side by side, one call of the sampler for each turn of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from leibler.data.records import Record
from leibler.environment.base import Environment, Session, advance, begin
from leibler.environment.dialogue import encode_text
from leibler.errors import DataError, ModelError

if TYPE_CHECKING:
    from leibler.policy import CausalLM


@dataclass(frozen=True)
class Start:
    """Where an episode begins.

    Args:
        environment, task: what is played.
        prefix: actions that are replayed before the player's first one.
        turns: the most turns of the episode, the replayed ones among them.
    """

    environment: Environment
    task: str
    prefix: tuple[str, ...] = ()
    turns: int | None = None


@dataclass(eq=False)
class Episode:
    """An episode under way or over.

    Attributes:
        start: where it began.
        tokens: the whole dialogue as the model reads it.
        spans: the player's own tokens, ``(begin, end)`` for each of its turns.
        logp: the log-probability of each of these tokens (nats) under the law they were sampled from.
        text: the dialogue after the opening text.
        reward: so far.
        done: the environment ended it.
        overflow: it ended because the model's context was full.
    """

    start: Start
    session: Session
    tokens: list[int]
    spans: list[tuple[int, int]] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    text: str = ""
    reward: float = 0.0
    done: bool = False
    overflow: bool = False

    @property
    def turns(self) -> int:
        """All turns, replayed ones among them."""
        return len(self.start.prefix) + len(self.spans)

    @property
    def opening(self) -> int:
        """Where the player's first token stands; the length of the dialogue if there is none."""
        return self.spans[0][0] if self.spans else len(self.tokens)


Act = Callable[[Sequence[list[int]], int, Sequence[int]], Sequence[tuple[list[int], list[float]]]]
"""``act(dialogues, turn, numbers)``: for each dialogue the tokens of the next action and their log-probabilities.
``turn`` counts the player's turns from 0, ``numbers`` say which of the starts these are."""


def play(
    model: CausalLM,
    starts: Sequence[Start],
    act: Act,
    *,
    max_new_tokens: int,
    max_length: int,
    after: Callable[[int, int], None] | None = None,
) -> list[Episode]:
    """Play every start to its end.

    A dialogue is plain text in the model's tokens: the opening text, an action with the stop token that ended it, the
    environment's reply, an action, ... An episode ends when the environment says so, after its ``turns``, or
    (``overflow``) when another action and the reply before it might not fit into ``max_length`` tokens.

    Args:
        model: encodes and decodes.
        starts: the episodes.
        act: samples one turn of all episodes that are not over.
        max_new_tokens: the longest action.
        max_length: the longest dialogue.
        after: called with the number of turns played and of episodes that are over, for progress.

    Raises:
        DataError: a prefix is longer than its episode.
        ModelError: the tokenizer has no token for a character of the environment's.
        RunError: an environment fails.
    """
    episodes: list[Episode] = []
    try:
        for start in starts:
            episodes.append(_begun(model, start, max_new_tokens, max_length))
        live = [n for n, e in enumerate(episodes) if not e.overflow]
        turn = 0
        while live:
            played = act([episodes[n].tokens for n in live], turn, live)
            texts = []
            for n, (tokens, logp) in zip(live, played, strict=True):
                episode = episodes[n]
                episode.spans.append((len(episode.tokens), len(episode.tokens) + len(tokens)))
                episode.tokens = episode.tokens + list(tokens)
                episode.logp += logp
                texts.append(model.decode(tokens))
                episode.text += texts[-1]
            _advance([episodes[n] for n in live], texts, model, max_new_tokens, max_length)
            turn += 1
            live = [n for n in live if not (episodes[n].done or episodes[n].overflow or _spent(episodes[n]))]
            if after is not None:
                after(turn, len(episodes) - len(live))
        return episodes
    finally:
        for episode in episodes:
            episode.session.close()


def _spent(episode: Episode) -> bool:
    most = episode.start.environment.turns
    return episode.turns >= (most if episode.start.turns is None else min(episode.start.turns, most))


def _begun(model: CausalLM, start: Start, max_new_tokens: int, max_length: int) -> Episode:
    """An episode after its prefix."""
    session = start.environment.session()
    try:
        return _replayed(model, start, session, max_new_tokens, max_length)
    except BaseException:
        session.close()
        raise


def _replayed(model: CausalLM, start: Start, session: Session, max_new_tokens: int, max_length: int) -> Episode:
    opening = start.environment.opening(begin(start.environment, session, start.task))
    episode = Episode(start, session, _encoded(model, opening, start.environment, first=True))
    for number, action in enumerate(start.prefix):
        (outcome,) = advance(start.environment, [session], [action])
        if outcome.done:
            raise DataError(
                f"a demonstration of {start.task!r:.60} was to be replayed for {len(start.prefix)} turns, but "
                f"{start.environment.spec()} ends it after {number + 1}; record it again."
            )
        reply = start.environment.reply(outcome.observation)
        episode.tokens += model.encode_completion(action) + _encoded(model, reply, start.environment)
        episode.text += action + reply
        episode.reward += outcome.reward
    episode.overflow = len(episode.tokens) + max_new_tokens > max_length
    return episode


def _advance(
    episodes: Sequence[Episode], texts: Sequence[str], model: CausalLM, max_new_tokens: int, max_length: int
) -> None:
    """The environments' answers to one turn."""
    for environment in dict.fromkeys(e.start.environment for e in episodes):
        mine = [
            (e, text.strip()) for e, text in zip(episodes, texts, strict=True) if e.start.environment == environment
        ]
        outcomes = advance(environment, [e.session for e, _ in mine], [text for _, text in mine])
        for (episode, _), outcome in zip(mine, outcomes, strict=True):
            episode.reward += outcome.reward
            episode.done = outcome.done
            if episode.done or _spent(episode):
                continue
            reply = environment.reply(outcome.observation)
            tokens = _encoded(model, reply, environment)
            if len(episode.tokens) + len(tokens) + max_new_tokens > max_length:
                episode.overflow = True
                continue
            episode.tokens = episode.tokens + tokens
            episode.text += reply


def _encoded(model: CausalLM, text: str, environment: Environment, *, first: bool = False) -> list[int]:
    """The environment's text in tokens, none of them unknown."""
    tokens = model.encode_prompt(text) if first else encode_text(model, text)
    unknown = model.tokenizer.unk_token_id
    if unknown is not None and unknown in tokens:
        lost = next((c for c in text if unknown in encode_text(model, c)), text)
        raise ModelError(
            f"the tokenizer has no token for {lost!r:.20}, which {environment.spec()} writes; take a tokenizer that "
            "knows the environment's alphabet."
        )
    return tokens


def environment_of(record: Record, given: Environment | None = None) -> tuple[Environment, str]:
    """The environment and the task that a record names.

    Args:
        record: with the columns ``environment`` and ``task``.
        given: is played whatever the record says; the prompt is the task of a record without one.

    Raises:
        DataError: the record names no task or no environment.
    """
    from leibler.environment.registry import get

    task, named = record.extra.get("task"), record.extra.get("environment")
    where = record.source or "a record"
    if given is not None:
        return given, task if isinstance(task, str) else record.prompt
    if not isinstance(task, str):
        raise DataError(f"{where} names no task of an environment; take env:NAME, or give the column 'task'.")
    if not isinstance(named, str):
        raise DataError(f"{where} names no environment; give the column 'environment', such as env:textworld.")
    return get(named), task


def sampled_turn(
    models: Any, dialogues: Sequence[list[int]], uniforms: Any, temperature: float
) -> list[tuple[list[int], list[float]]]:
    """One turn by the library's sampler: each action with its log-probabilities."""
    from leibler.policy import sample

    out = sample(models, dialogues, uniforms=uniforms, temperature=temperature)
    return [
        (tokens[mask].tolist(), logp[mask].tolist())
        for tokens, mask, logp in zip(out.tokens, out.mask, out.logp, strict=True)
    ]
