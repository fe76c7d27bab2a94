"""Who samples the policy's responses in a run: the sampler here, or another engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leibler.errors import RunError
from leibler.objective.targets import Old, Policy
from leibler.train.options import Options
from leibler.train.recipe import Recipe

if TYPE_CHECKING:
    from leibler.policy.vllm import VllmRollouts

FOLDER = "rollouts"
"""Below the run directory: the weights that the engine reads."""


def arrange(
    recipe: Recipe, options: Options, student: Any, out: Path, world: int
) -> tuple[Recipe, VllmRollouts | None]:
    """The recipe as ``options.rollouts`` makes it, and the engine, which has answered once; None for sampling here.

    Raises:
        RunError: the recipe samples nothing from the policy, or the engine cannot be used.
        RecipeError: a term of the recipe cannot take another engine's samples.
    """
    if options.rollouts == "here":
        return recipe, None
    from leibler.policy import CausalLM
    from leibler.policy.vllm import open_rollouts

    if not {Old(), Policy()} & set(recipe.source.handles()):
        raise RunError(f"rollouts={options.rollouts} has nothing to do: the recipe samples no responses of the policy.")
    if world > 1:
        raise RunError(f"rollouts={options.rollouts} serves runs of one process, not {world}; leave it out.")
    recipe = replace(recipe, elsewhere=True)
    folder = out / FOLDER
    if isinstance(student, CausalLM):
        student.save(folder / "initial")
        student = folder / "initial"
    rollouts = open_rollouts(options.rollouts, str(student), folder)
    rollouts.engine.check(options.temperature, None)
    return recipe, rollouts
