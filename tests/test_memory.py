"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest

RESIDENT = """
import sys
import torch
from leibler import memory
if "keep" in sys.argv:
    assert memory.keep()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4 // 1024
before = resident()
held = torch.ones(64 * 2**20)  # 256 MB
del held
print(resident() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc's")
def test_what_a_large_tensor_took_is_kept_when_it_is_freed():
    found = []
    for argument in ("keep", "leave"):
        done = subprocess.run(
            [sys.executable, "-c", RESIDENT, argument], capture_output=True, text=True, check=True, timeout=120
        )
        found.append(int(done.stdout))
    kept, left = found
    assert kept > 200
    assert left < 50
