"""Seconds until a command line answers: ``leibler``, an empty Python, and TRL's.

    python benchmarks/startup.py [--repeats 7]

Elapsed time of whole processes, the fastest of the repeats, the commands in turn. ``leibler`` is started by its own
script and by ``python -m leibler``. Target: ``leibler --help`` in less than 0.25 s.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import _clock as shared

TARGET = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="the fastest counts (default 7)")
    arguments = parser.parse_args()
    shared.started(argparse.Namespace(threads=1, wall=True), "trl", keep=False)
    scripts = Path(sys.executable).parent
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "leibler --help": [str(scripts / "leibler"), "--help"],
        "python -m leibler --help": [sys.executable, "-m", "leibler", "--help"],
        "leibler methods": [str(scripts / "leibler"), "methods"],
        "leibler show gkd": [str(scripts / "leibler"), "show", "gkd"],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
        "trl --help": [str(scripts / "trl"), "--help"],
    }
    present = {name: command for name, command in commands.items() if Path(command[0]).exists()}
    best = dict.fromkeys(present, float("inf"))
    cost = dict.fromkeys(present, float("inf"))
    for _ in range(arguments.repeats):
        for name, command in present.items():
            before, start = os.times(), time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            elapsed, after = time.perf_counter() - start, os.times()
            best[name] = min(best[name], elapsed)
            spent = after.children_user + after.children_system - before.children_user - before.children_system
            cost[name] = min(cost[name], spent)
    print(f"{'command':<28}{'elapsed':>9}{'processor':>11}{'over python':>13}")
    for name, seconds in best.items():
        over = seconds - best["python -c pass"]
        print(f"{name:<28}{seconds:>9.3f}{cost[name]:>11.3f}{over:>13.3f}")
    for name in commands.keys() - present.keys():
        print(f"{name:<28} not installed")
    ours = best["leibler --help"]
    print(f"leibler --help: {ours:.3f} s, target {TARGET} s, {'met' if ours < TARGET else 'missed'}")


if __name__ == "__main__":
    main()
