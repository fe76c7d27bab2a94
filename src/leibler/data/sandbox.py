"""Rewards that run generated programs, each in a process of its own that can do nothing but compute and print.

A program is started as ``python -I -S`` in an empty folder, with an empty environment and no open file but its
standard streams. Limits of the system bound its time and memory, Landlock the files it may read (none may be written),
seccomp every call that reaches other processes or the network; see ``sandboxed.py``. Expected outputs never enter
that process: a program cannot find out what it should have printed, nor write its own verdict.
"""

from __future__ import annotations

import json
import math
import os
import re
import selectors
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from leibler.data.records import Record
from leibler.data.sandboxed import UNCONFINED
from leibler.errors import DataError

_CHILD = Path(__file__).with_name("sandboxed.py")
_FENCE = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)
_ERRORS_KEPT = 4096

Status = Literal["ok", "error", "time", "output"]


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: wall-clock time; processor time is limited to the next whole second.
        memory: bytes of address space, the interpreter's own (some 20 MB) included.
        output: bytes that it may print.
    """

    seconds: float = 4.0
    memory: int = 256 * 2**20
    output: int = 2**16

    def __post_init__(self) -> None:
        if not 0 < self.seconds <= 3600:
            raise DataError(f"a program cannot be given seconds={self.seconds}; give more than 0 and at most 3600.")
        for name, least in (("memory", 32 * 2**20), ("output", 1)):
            if not least <= getattr(self, name) <= 2**40:
                raise DataError(f"a program cannot be given {name}={getattr(self, name)} bytes; give at least {least}.")


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: ``ok`` (status 0), ``error`` (an exception, another status or a signal), ``time`` or ``output`` (it was
            stopped at that limit).
        stdout: what it printed; undecodable bytes are replaced.
        reason: in words, why it is not ``ok``; empty if it is.
    """

    status: Status
    stdout: str
    reason: str = ""


@cache
def confinement() -> str:
    """Why programs cannot be confined on this machine; empty if they can."""
    outcome, status = _run("", "", Limits(seconds=30), require=True)
    if status == 0:
        return ""
    return outcome.reason if status == UNCONFINED else f"the sandbox does not start ({outcome.reason})"


def run_program(program: str, given: str = "", limits: Limits = Limits(), *, weaker: bool = False) -> Outcome:
    """Run a Python program that is not trusted.

    Args:
        program: its text.
        given: what it reads from standard input.
        limits: what it may use.
        weaker: run it although the machine cannot confine it (not Linux 6.2 or newer, or without Landlock or seccomp):
            then only time, memory, output and the environment are limited, and it may read what you may read.

    Raises:
        DataError: the machine cannot confine programs and ``weaker`` is not set.

    Examples:
        >>> run_program("print(int(input()) * 2)", "21").stdout
        '42\\n'
        >>> run_program("import os; os.fork()").reason
        'PermissionError: [Errno 1] Operation not permitted'
    """
    if not weaker and (why := confinement()):
        raise DataError(
            f"programs are not run here because they cannot be confined: {why}; train on Linux 6.2 or newer, or "
            "accept programs that can read your files with weaker=True."
        )
    return _run(program, given, limits, require=not weaker)[0]


def _run(program: str, given: str, limits: Limits, *, require: bool) -> tuple[Outcome, int]:
    settings = {"cpu": math.ceil(limits.seconds) + 1, "memory": limits.memory, "require": require}
    text = program.encode("utf-8", "replace")
    with tempfile.TemporaryDirectory(prefix="program-") as folder, tempfile.TemporaryFile() as stdin:
        stdin.write(struct.pack(">Q", len(text)) + text + given.encode("utf-8", "replace"))
        stdin.seek(0)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_CHILD), json.dumps(settings)],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env={},
            close_fds=True,
            start_new_session=True,
        )
        try:
            stdout, stderr, stopped = _read(process, limits)
        finally:
            # The whole group: without seccomp it might have had children. It is not reaped yet, so the number is its.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            status = process.wait()
            for pipe in (process.stdout, process.stderr):
                assert pipe is not None
                pipe.close()
    shown = stdout.decode("utf-8", "replace")
    if stopped == "output":
        return Outcome("output", shown, f"printed more than {limits.output} bytes"), status
    if stopped == "time" or status == -signal.SIGXCPU:
        return Outcome("time", shown, f"ran longer than {limits.seconds:g} seconds"), status
    if status:
        return Outcome("error", shown, _reason(status, stderr.decode("utf-8", "replace"))), status
    return Outcome("ok", shown), status


def _read(process: subprocess.Popen[bytes], limits: Limits) -> tuple[bytes, bytes, Status | None]:
    """Both streams up to their limits, and the limit at which the program has to be stopped, if any.

    Of errors the end is kept: it names the exception.
    """
    assert process.stdout is not None
    assert process.stderr is not None
    deadline = time.monotonic() + limits.seconds
    stdout, stderr = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        for pipe, kept in ((process.stdout, stdout), (process.stderr, stderr)):
            selector.register(pipe, selectors.EVENT_READ, kept)
        while selector.get_map():
            left = deadline - time.monotonic()
            if left <= 0:
                return bytes(stdout), bytes(stderr), "time"
            for key, _ in selector.select(left):
                chunk = os.read(key.fd, 2**16)
                if not chunk:
                    selector.unregister(key.fileobj)
                key.data.extend(chunk)
            if len(stdout) > limits.output:
                return bytes(stdout[: limits.output]), bytes(stderr), "output"
            del stderr[:-_ERRORS_KEPT]
    # Both streams may be closed by a program that goes on.
    try:
        process.wait(max(deadline - time.monotonic(), 0.001))
    except subprocess.TimeoutExpired:
        return bytes(stdout), bytes(stderr), "time"
    return bytes(stdout), bytes(stderr), None


def _reason(status: int, errors: str) -> str:
    if status < 0:
        with suppress(ValueError):
            return f"stopped by {signal.Signals(-status).name}"
        return f"stopped by signal {-status}"
    lines = errors.strip().splitlines()
    return lines[-1][:200] if lines else f"exit status {status}"


def extract_program(response: str) -> str:
    """The last fenced block of a response, or the whole response if there is none.

    Examples:
        >>> extract_program("Here it is:\\n```python\\nprint(1)\\n```\\nDone.")
        'print(1)\\n'
    """
    blocks = _FENCE.findall(response)
    return blocks[-1] if blocks else response


@dataclass(frozen=True)
class PassesTests:
    """A reward for programs: 1 if a response passes every test of its record, else 0.

    A record's column ``tests`` is a list of objects with an ``output`` and either an ``input`` (the program reads it
    and must print the output; blanks at the ends do not count) or a ``call``, an expression over what the program
    defines (the representation of its value must be the output): ``{"call": "add(2, 3)", "output": "5"}``.

    Attributes:
        limits: of each test; see `Limits`.
        partial: the share of tests that are passed instead of all or nothing.
        column: the column that holds the tests.
        workers: programs that run at the same time.
        weaker: see `run_program`.

    Raises:
        DataError: when called, for a record without well-formed tests, or on a machine that cannot confine programs.

    Examples:
        >>> record = Record("# adds", extra={"tests": [{"call": "add(2, 3)", "output": "5"}]})
        >>> PassesTests()([record] * 3, ["def add(a, b): return a + b", "def add(a, b): return a * b", "1/0"])
        [1.0, 0.0, 0.0]
    """

    limits: Limits = field(default_factory=Limits)
    partial: bool = False
    column: str = "tests"
    workers: int = 2
    weaker: bool = False

    def __call__(self, records: Sequence[Record], texts: Sequence[str]) -> list[float]:
        for record in records:
            self._tests(record)  # every complaint before the first program
        with ThreadPoolExecutor(max(self.workers, 1)) as pool:
            return list(pool.map(self.check, records, texts))

    def check(self, record: Record, text: str) -> float:
        """The reward of one response: what `Dataset.check` asks for."""
        verdicts = [not reason for reason in self.verdicts(record, text, stop=not self.partial)]
        return sum(verdicts) / len(verdicts) if self.partial else float(all(verdicts))

    def verdicts(self, record: Record, text: str, *, stop: bool = False) -> list[str]:
        """For each test, why it failed; empty for one that passed. ``stop``: at the first that fails."""
        program, reasons = extract_program(text), []
        for test in self._tests(record):
            reasons.append(self._verdict(program, test))
            if stop and reasons[-1]:
                break
        return reasons

    def _verdict(self, program: str, test: Mapping[str, str]) -> str:
        call = test.get("call")
        if call is not None:
            program = f"{program}\nprint()\nprint(repr({call}))\n"
        outcome = run_program(program, test.get("input") or "", self.limits, weaker=self.weaker)
        if outcome.status != "ok":
            return outcome.reason
        printed = outcome.stdout.strip().split("\n")[-1] if call is not None else _trimmed(outcome.stdout)
        wanted = test["output"].strip() if call is not None else _trimmed(test["output"])
        return "" if printed == wanted else f"printed {printed[:80]!r}, not {wanted[:80]!r}"

    def _tests(self, record: Record) -> list[Mapping[str, str]]:
        tests: Any = record.extra.get(self.column)
        well_formed = isinstance(tests, (list, tuple)) and tests and all(map(_is_test, tests))
        if not well_formed:
            raise DataError(
                f"{record.source or repr(record.prompt[:60])} has no tests in the column {self.column!r}; give a list "
                "of objects with an 'output' and an 'input' or a 'call', each of them text."
            )
        return list(tests)


def _is_test(test: Any) -> bool:
    if not isinstance(test, Mapping) or not isinstance(test.get("output"), str):
        return False
    # Tables fill the columns that a row does not have with None.
    asked = [test[name] for name in ("input", "call") if test.get(name) is not None]
    return len(asked) == 1 and isinstance(asked[0], str)


def _trimmed(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.strip().splitlines())
