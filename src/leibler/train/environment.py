"""What two halves of a run must share for their numbers to be equal bit for bit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from leibler.train.options import Options
from leibler.train.run_file import hardware

if TYPE_CHECKING:
    from leibler.policy import CausalLM
    from leibler.train.recipe import Recipe

IDLE = frozenset(
    {"save_every", "keep", "sample_every", "guard_steps", "guard_draws", "tensorboard", "trust_remote_code"}
)
"""Options that change no number."""


def environment(options: Options, recipe: Recipe, policy: CausalLM, processes: int) -> dict[str, Any]:
    """Everything known to change the rounding, or the numbers themselves, as JSON values.

    The number of threads splits long sums, the processor's vector width and the library's version choose kernels.
    """
    from leibler.train.plan import describe

    parameter = next(policy.parameters())
    here = hardware(parameter.device, processes)
    return {
        "torch": torch.__version__,
        **{k: here[k] for k in ("cpu_capability", "threads", "processes", "device", "gpu") if k in here},
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "attention": str(getattr(policy.pretrained.config, "_attn_implementation", None)),
        # A part that is no dataclass shows its address, which is another one each time.
        "recipe": re.sub(r" at 0x[0-9a-f]+", "", describe(recipe)),
        **{f"option {k}": v for k, v in asdict(options).items() if k not in IDLE},
    }


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """One sentence about why a resumed run cannot be bit-exact; None if nothing known speaks against it.

    Examples:
        >>> difference({"threads": 2, "torch": "2.13"}, {"threads": 1, "torch": "2.13"})
        'not bit-exact with an unbroken run, because threads was 2 and is 1'
    """
    changed = []
    for name in (*now, *(n for n in before if n not in now)):
        was, is_ = before.get(name), now.get(name)
        if was != is_:
            short = name.removeprefix("option ")
            changed.append("the recipe is another one" if name == "recipe" else f"{short} was {was} and is {is_}")
    return f"not bit-exact with an unbroken run, because {', '.join(changed)}" if changed else None
