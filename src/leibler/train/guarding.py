"""The guards of one run at work: what they have seen, and what they write and say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from leibler.errors import RunError
from leibler.train.guards import Guards, State, diagnosis, not_finite, write_batch

if TYPE_CHECKING:
    from leibler.data import Record
    from leibler.objective.rows import Rows, View
    from leibler.train.journal import Journal
    from leibler.train.tally import Step

FOLDER = "guards"
EMPTY_DRAWS = 20
"""Draws in a row that may leave no row to learn from before the run stops with a diagnosis."""


class Guarding:
    """Holds the guards' state and acts on what they find; the same in every process.

    Args:
        guards: what is guarded against.
        out: the run directory.
        journal: takes warnings and responses that are set aside.
        say: shows a sentence to the person who watches.
        rank: this process; each writes its own share of a batch.
        gather: what each process gave, in order.
    """

    def __init__(
        self,
        guards: Guards,
        out: Path,
        journal: Journal,
        say: Callable[[str], None],
        rank: int,
        gather: Callable[[Any], list[Any]],
    ) -> None:
        self.guards, self.out, self.journal, self.say = guards, out, journal, say
        self.rank, self.gather = rank, gather
        self.state: State = guards.init()
        self.failures: list[dict[str, Any]] = []

    # ---- rewards -------------------------------------------------------------------------------------------------

    def failed(self, record: Record, text: str, reason: str) -> None:
        """A stage sets a response aside."""
        self.failures.append({"source": record.source, "reason": reason, "prompt": record.prompt, "response": text})

    def after_draw(self, draw: int, drawn: Mapping[str, Rows]) -> bool:
        """Write down what the stages of a draw set aside, in all processes; ``drawn`` is left in this one.

        Returns True if a row to learn from is left in some process.

        Raises:
            RunError: the reward has failed for every response, or no row was left, for too long.
        """
        # Rows of a stream without rewards say nothing about the reward.
        scored = [rows for rows in drawn.values() if "reward" in rows.columns] or drawn.values()
        shares = self.gather((sum(map(len, drawn.values())), sum(map(len, scored)), self.failures))
        self.failures = []
        failures = [f for *_, share in shares for f in share]
        guard, before = self.guards.rewards, self.state["rewards"]
        last = failures[-1]["reason"] if failures else before["last"]
        left, rewarded = (sum(share[i] for share in shares) for i in (0, 1))
        state = guard.observe(before, len(failures), rewarded, last)
        empty = 0 if left else self.state["empty"] + 1
        self.state = {**self.state, "rewards": state, "empty": empty}
        for failure in failures:
            self.journal.set_aside(draw=draw, **failure)
        if failures and not before["failed"]:
            where = failures[0]["source"] or "a response"
            self.say(f"{where}: its reward {failures[0]['reason']}; set aside, like others to come, in {self.aside}")
        if state["in_a_row"] >= guard.most:
            raise RunError(
                f"the reward failed for every response of {state['in_a_row']} draws in a row: it {last}; mend it (the "
                f"responses are in {self.aside}) and go on with: leibler train --resume {self.out}."
            )

        if empty >= EMPTY_DRAWS:
            raise RunError(
                f"{empty} draws in a row left no row to learn from; the stages drop every group: check the reward or "
                "the judge on samples.jsonl."
            )
        return left > 0

    @property
    def aside(self) -> Path:
        return self.journal.aside.path

    # ---- steps -----------------------------------------------------------------------------------------------------

    def broken(self, metrics: Mapping[str, float], *, scaled: bool = False) -> bool:
        """True if a step must not be taken: its loss, or the norm of its gradient, is no number.

        Where losses are ``scaled`` (fp16), gradients overflow now and then by design; only the loss counts.
        """
        broken = self.guards.non_finite.broken(metrics["loss"], *([] if scaled else [metrics["grad_norm"]]))
        state = self.guards.non_finite.observe(self.state["non_finite"], broken)
        self.state = {**self.state, "non_finite": state}
        return broken

    def skipped(
        self, step: int, seed: int, batch: Mapping[str, View], result: Step, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        """Write the batch of a skipped step aside."""
        seen = diagnosis(self.gather(not_finite(parameters)), result.metrics)
        about = {"seed": seed, "seen": seen, **result.metrics}
        guard, state = self.guards.non_finite, self.state["non_finite"]
        message, kept = f"step {step} was skipped ({seen})", {}
        if state["skipped"] <= guard.kept:
            folder = self.out / FOLDER if self.rank == 0 else self.out / FOLDER / f"process-{self.rank}"
            path = write_batch(folder, step, {s: v.rows for s, v in batch.items()}, about)
            kept = {"batch": str(path.relative_to(self.out))}
        self._warn(step, "non_finite", message, **kept)
        self.state = {**self.state, "seen": seen}

    def after_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Warnings about where the metrics go.

        Raises:
            RunError: too many steps in a row were skipped.
        """
        self.state, warnings = self.guards.drifted(self.state, metrics)
        for warning in warnings:
            self._warn(step, "drift", warning)
        in_a_row = self.state["non_finite"]["in_a_row"]
        if in_a_row >= self.guards.non_finite.most:
            raise RunError(
                f"{in_a_row} steps in a row were skipped, the last being step {step} ({self.state['seen']}); the "
                f"weights are those after step {step - in_a_row}: lower learning_rate, or look at the batches in "
                f"{self.out / FOLDER}."
            )

    def tripped(self, step: int, metrics: Mapping[str, float], saved: bool) -> bool:
        """True if the run must go back to its last checkpoint, with the coefficients in ``raised``.

        Args:
            step: optimiser steps done.
            metrics: of the step.
            saved: whether there is a checkpoint to go back to.

        Raises:
            RunError: a divergence is beyond the bound, and the run is to stop or cannot go back.
        """
        wire, state = self.guards.tripwire, self.state["tripwire"]
        found = wire.tripped(metrics)
        if not found:
            return False
        seen = ", ".join(f"{term} is {value:.4g}" for term, value in found.items())
        told = f"at step {step} the divergence {seen} nats, beyond max_divergence={wire.bound:g}"
        if wire.action == "stop":
            raise RunError(f"{told}; lower learning_rate or raise the coefficient, or set on_divergence=rollback.")
        if not saved:
            raise RunError(f"{told}, and there is no checkpoint to go back to yet; lower save_every.")
        if state["times"] >= wire.most:
            raise RunError(f"{told}, after going back {state['times']} times; lower learning_rate.")
        state = wire.observe(state, sorted(found))
        self.state = {**self.state, "tripwire": state}
        raised = ", ".join(f"{term} x {factor:g}" for term, factor in state["raised"].items())
        self._warn(step, "tripwire", f"{told}; going back to the last checkpoint with the coefficient of {raised}")
        return True

    def forgive(self) -> None:
        """Forget what ended the run: whoever goes on with it has mended something."""
        fresh = self.guards.init()
        kept = {k: {**self.state[k], "in_a_row": fresh[k]["in_a_row"]} for k in ("non_finite", "rewards")}
        self.state = {**self.state, **kept, "empty": 0}

    def put(self, state: State, *, undone: bool = False) -> None:
        """Take over the state of a checkpoint; where the run itself went back, not what the tripwire saw since."""
        self.state = {**state, "tripwire": self.state["tripwire"]} if undone else dict(state)

    @property
    def raised(self) -> dict[str, float]:
        """The factor on each term's coefficient."""
        return self.state["tripwire"]["raised"]

    def _warn(self, step: int, guard: str, message: str, **more: str) -> None:
        self.journal.warning(step=step, guard=guard, message=message, **more)
        self.say(message + "".join(f"; its {what} is in {self.out / path}" for what, path in more.items()))
