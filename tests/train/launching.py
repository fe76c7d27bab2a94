"""Processes of one run, started side by side as a launcher would, and never left behind."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

TESTS = Path(__file__).parents[1]
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What ``accelerate launch`` passes on from a configuration with FSDP2, as far as it matters."""
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    fixed = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "HF_HUB_OFFLINE": "1"}
    return {**os.environ, **fixed, **more}


class Started:
    """A process with what it says."""

    def __init__(self, command: Sequence[str], said: Path, env: Mapping[str, str]) -> None:
        self.said = said
        with said.open("w") as file:
            self.process = subprocess.Popen(
                command, env=dict(env), stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def text(self) -> str:
        return self.said.read_text(errors="replace")

    def wait(self, timeout: float = 240) -> int:
        return self.process.wait(timeout)

    def end(self) -> None:
        """Kill it with all its children."""
        try:
            family = [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]
        except psutil.NoSuchProcess:
            return
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        self.process.wait()


@contextlib.contextmanager
def started(command: Sequence[str], folder: Path, **env: str) -> Iterator[Started]:
    """One process, such as a launcher."""
    one = Started(command, folder / "said.txt", environment(**env))
    try:
        yield one
    finally:
        one.end()


@contextlib.contextmanager
def workers(command: Sequence[str], folder: Path, count: int = 2, **env: str) -> Iterator[list[Started]]:
    """``count`` processes that find each other, without a launcher between."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    meeting["LOCAL_WORLD_SIZE"] = str(count)
    all_of_them: list[Started] = []
    try:
        for rank in range(count):
            own = environment(**meeting, RANK=str(rank), LOCAL_RANK=str(rank), **env)
            all_of_them.append(Started(command, folder / f"said-{rank}.txt", own))
        yield all_of_them
    finally:
        for one in all_of_them:
            one.end()


def finish(processes: Sequence[Started], timeout: float = 240) -> list[int]:
    """Wait for all; their exit statuses."""
    return [one.wait(timeout) for one in processes]
