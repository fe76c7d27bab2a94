"""Agents: methods whose responses are dialogues with an environment."""

from __future__ import annotations

from typing import Literal

from leibler.errors import RecipeError
from leibler.objective import LogRatio, Objective, Old, PolicyGradient, Ratio, Staircase, Teacher
from leibler.train import Demonstrated, Episodes, Recipe


def tcod(
    curriculum: Literal["f2b", "b2f", "none"] = "f2b", every: int = 5, start: int = 1, scale: float = 1.0
) -> Recipe:
    """TCOD: Exploring Temporal Curriculum in On-Policy Distillation for Multi-turn Autonomous Agents (2026): on-policy
    distillation on dialogues whose depth grows while the student learns.

    The student plays; each token of its turns is reinforced by ``scale * (log teacher - log old)``. The loss is the
    mean over these tokens, so it does not grow with the depth. The paper writes the divergence with the teacher
    first; the released code descends the reverse KL, token by token, and so does this.

    Args:
        curriculum: ``f2b``: episodes are cut after ``start + floor(step / every)`` turns; the end of a task, with its
            reward, is seen late. ``b2f``: all but the last ``start + floor(step / every)`` actions of a demonstration
            are replayed, then the student plays to the end. ``none``: whole episodes from the first step.
        every: optimiser steps for one more turn.
        start: turns at the first step.
        scale: of the advantage.
    """
    stairs = Staircase(start, every)
    sources = {"f2b": Episodes(max_turns=stairs), "b2f": Episodes(prefix=Demonstrated(stairs)), "none": Episodes()}
    if curriculum not in sources:
        raise RecipeError(f"curriculum={curriculum!r} is unknown; choose one of {', '.join(sources)}.")
    advantage = scale * LogRatio(Teacher(), Old())
    return Recipe(sources[curriculum], Objective(PolicyGradient(advantage, Ratio())))
