"""What every test runs under: one thread per worker, no network, the same random numbers in any order of tests."""

from __future__ import annotations

import os

# Before torch is imported: workers side by side, each with all the cores, would be slower than one thread each.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(name, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that reached for the network would be a mistake
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported; 0 runs the kernels on a GPU

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

# Timing belongs to benchmarks: on a shared machine a deadline only makes tests flicker.
settings.register_profile("leibler", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
settings.load_profile("leibler")


@pytest.fixture(autouse=True)
def _same_start():
    """Every test starts from the same random state and must leave the default dtype as it was."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    yield
    assert torch.get_default_dtype() == before, "the default dtype was changed"
