"""The sweep itself: which runs there are, which are done, one process after the other, and what came of them."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leibler import durable
from leibler.errors import RunError
from leibler.safety import printable
from leibler.sweep.needs import Asked, asked, lacking
from leibler.sweep.provide import offered
from leibler.sweep.settings import INTERRUPTED, LOGS, RESULTS, RUNS, Settings, Setup, read_json
from leibler.sweep.table import run_name, summary

BASELINES = (("student", "student, before"), ("teacher", "teacher"))
SWEEP = "sweep.json"


@dataclass(frozen=True)
class Job:
    """One process: a model that is measured, or a method that is trained and measured."""

    name: str
    kind: str
    slug: str
    seed: int = 0
    model: str = ""
    learning_rate: float | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def run_sweep(
    slugs: Sequence[str], out: str | Path, settings: Settings = Settings(), seeds: int = 1, *, quiet: bool = False
) -> dict[str, Any]:
    """Train each method with the same student, data and number of tokens, and measure what comes of it.

    What is finished in the directory is kept; a run that was interrupted goes on from its last checkpoint. A method
    that fails does not stop the others. ``sweep.json`` holds all numbers after each run.

    Args:
        slugs: the methods.
        out: the directory.
        settings: what all share.
        seeds: runs of each method, of seeds 0, 1, ...
        quiet: show nothing.

    Returns:
        What ``sweep.json`` holds.

    Raises:
        RunError: the directory holds something else, or another sweep is at work in it.
        KeyboardInterrupt: after the run at work was saved.
    """
    from leibler.cli.building import recipe_from

    out = Path(out).resolve()
    if seeds < 1:
        raise RunError(f"--seeds={seeds} must be at least 1.")
    needs = {slug: asked(recipe_from(slug, dict(settings.overrides.get(slug, {})))) for slug in dict.fromkeys(slugs)}
    there = offered(settings)
    left_out = {slug: reason for slug, need in needs.items() if (reason := lacking(need, there))}
    taking_part = [slug for slug in needs if slug not in left_out]
    settings.claim(out)
    with _alone(out):
        say = _quiet if quiet else _say
        _prepare(out, [needs[slug] for slug in taking_part], say)
        jobs = [Job(f"baseline-{model}", "measure", "", model=model) for model, _ in BASELINES]
        jobs += [
            Job(run_name(slug, seed, rate), "train", slug, seed, learning_rate=rate)
            for seed in range(seeds)
            for slug in taking_part
            for rate in settings.learning_rates or (None,)
        ]
        failed = _work(out, settings, jobs, quiet, lambda failed: _write(out, settings, needs, left_out, seeds, failed))
        return _write(out, settings, needs, left_out, seeds, failed)


def _write(
    out: Path, settings: Settings, needs: dict[str, Asked], left_out: dict[str, str], seeds: int, failed: dict[str, str]
) -> dict[str, Any]:
    results = [read_json(path) for path in sorted((out / RESULTS).glob("*.json"))]
    content = summary(Setup.read(out), settings, list(needs), left_out, seeds, results, failed)
    durable.write_text(out / SWEEP, json.dumps(content, indent=1) + "\n")
    return content


def _prepare(out: Path, needs: Sequence[Asked], say: Callable[[str], None]) -> None:
    wanted = {
        (name, tuple(sorted(need.columns.get(name, ()))), name in need.pairs) for need in needs for name in need.data
    }
    data = sorted((name, list(columns), pairs) for name, columns, pairs in wanted if columns or pairs)
    (out / LOGS).mkdir(exist_ok=True)
    job = json.dumps({"kind": "prepare", "data": data})
    status = _process(out, job, out / LOGS / "prepare.log", echo=say)
    if status:
        raise RunError(f"the set-up could not be made: {_last_line(out / LOGS / 'prepare.log')}")


# ---- one process after the other -------------------------------------------------------------------------------------


def _work(
    out: Path, settings: Settings, jobs: Sequence[Job], quiet: bool, record: Callable[[dict[str, str]], object]
) -> dict[str, str]:
    """Do what is not done; returns why each job that failed did."""
    from leibler.train.log import Progress

    budget = Setup.read(out).tokens
    left = [job for job in jobs if not (out / RESULTS / f"{job.name}.json").exists()]
    trained = [job for job in left if job.kind == "train"]
    done = {job.name: 0 for job in trained}
    progress = Progress(max(budget * len(trained), 1), label="sweep", quiet=quiet)
    if len(left) < len(jobs):
        progress.say(f"{len(jobs) - len(left)} of {len(jobs)} are done and kept")
    failed: dict[str, str] = {}
    try:
        for number, job in enumerate(left, 1):
            which = f", seed {job.seed}" if job.seed else ""
            which += f", learning rate {job.learning_rate:g}" if job.learning_rate else ""
            progress.say(f"[{number}/{len(left)}] {job.slug or job.model}{which}")
            log = out / LOGS / f"{job.name}.log"

            def look(job: Job = job) -> None:
                tokens = min(_trained(out / RUNS / job.name), budget) if job.name in done else 0
                if tokens > done.get(job.name, 0):
                    done[job.name] = tokens
                    progress.update(sum(done.values()), {}, None)

            status = _process(out, job.to_json(), log, look=look)
            if job.name in done:
                done[job.name] = budget
            if status:
                failed[job.name] = _last_line(log) or f"the process ended with status {status}"
                progress.say(f"{job.slug or job.model} failed: {failed[job.name]}")
            record(failed)
    finally:
        progress.close()
    return failed


def _process(
    out: Path,
    job: str,
    log: Path,
    look: Callable[[], None] = lambda: None,
    echo: Callable[[str], None] | None = None,
) -> int:
    """Run a worker to its end; an interruption is passed on to it once, so that it saves."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "leibler.sweep.worker", str(out), job]
    interrupted = False
    with log.open("wb") as file, log.open("rb") as read:
        # In a session of its own: a terminal's Ctrl-C would reach it twice, and the second one stops without saving.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=environment, start_new_session=True
        )
        try:
            while True:
                try:
                    ended = process.poll() is not None
                    for line in read.read().decode(errors="replace").splitlines() if echo else ():
                        echo(line)  # type: ignore[misc]
                    look()
                    if ended:
                        break
                    time.sleep(0.2)
                except KeyboardInterrupt:
                    process.send_signal(signal.SIGINT)
                    interrupted = True
        except BaseException:
            process.kill()
            raise
        finally:
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
    if interrupted or process.returncode == INTERRUPTED:
        raise KeyboardInterrupt
    return process.returncode


def _trained(folder: Path) -> int:
    """Tokens that a run has trained on so far."""
    found = 0
    for path in folder.rglob("metrics.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found += int(json.loads(line)["tokens"])
            except (ValueError, KeyError):
                continue  # the line that is being written
    return found


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip() if lines else ""


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One sweep at a time in a directory; the lock is gone with the process that held it."""
    with (out / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another sweep is at work in {out}; wait for it, or give another directory.") from None
        yield


def _say(sentence: str) -> None:
    print(printable(sentence), file=sys.stderr, flush=True)


def _quiet(sentence: str) -> None:
    del sentence
