"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

TOUCHED = """
import resource, sys
import torch
from leibler import memory
if "keep" in sys.argv:
    assert memory.keep()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 * 2**20)  # 64 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc's")
def test_a_second_large_tensor_takes_the_memory_of_the_first():
    found = []
    for argument in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", TOUCHED, argument], capture_output=True, text=True, check=True, timeout=120
        )
        found.append(int(done.stdout))
    kept, left = found
    assert kept < 200 < left
