"""The main job from end to end on what every machine has: see `run_demo`."""

from leibler.demo.pipeline import Size, run_demo

__all__ = ["Size", "run_demo"]
