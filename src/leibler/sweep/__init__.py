"""Many methods on one task at an equal number of trained tokens, in one table: see `run_sweep`."""

from leibler.sweep.run import run_sweep
from leibler.sweep.settings import Settings

__all__ = ["Settings", "run_sweep"]
