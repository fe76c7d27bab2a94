"""Seconds of an on-policy training step: ``leibler.train.fit`` beside TRL's trainers.

    python benchmarks/training.py [--threads 1] [--repeats 1] [--wall]

The same tiny Llama from one checkpoint, tokenizer, prompts, rows in a batch, group size, new tokens, precision
(float32), optimiser (AdamW), clipping of gradients and learning rate on both sides. A step samples the responses,
scores them (GRPO) or asks the teacher (distillation), and takes one optimiser step:

- **GRPO**: 4 prompts x 8 responses, a reward from the text, advantages relative to the group, a KL to the reference
  (TRL: k3 in the loss, `beta=0.04`; here: k2), clip 0.2, one use of each draw. TRL's `GRPOTrainer`.
- **Distillation**: 32 prompts, one response each, Jensen-Shannon divergence (1/2) to a teacher of the same size over
  the whole vocabulary. TRL's `DistillationTrainer`, and its older `GKDTrainer` with `lmbda=1`, which additionally
  tokenizes a reference response that on-policy training does not use.

What differs beside the point is left as each side has it by default, except: gradient checkpointing, bfloat16,
reports and logging of TRL are off; here metrics are written at every step, as always. The time of a step is that
between the ends of two steps, the first is left out, the fastest of the others counts; the sides take turns.
``limit`` is what the step would take if there were nothing but the matrix products with weights that no step avoids
that samples and then reads what it sampled; what lies above ``TRL / limit`` no implementation of it reaches.
"""

from __future__ import annotations

import logging
import random
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import _clock as shared
import rollouts
from leibler import recipes
from leibler.divergence import JensenShannon
from leibler.policy import CausalLM, character_tokenizer, tiny_llama
from leibler.train import OnPolicy, Recipe, Score, fit

ROWS, GROUP = 32, 8
SIZES = [(4096, 64, 2), (16384, 128, 2), (4096, 256, 4)]
"""Vocabulary, hidden, layers."""


@dataclass(frozen=True)
class Ticks:
    """A stage that changes nothing but writes down when it is reached: once per step."""

    clock: Callable[[], float]
    seen: list[float]

    def __call__(self, rows: Any, context: Any) -> Any:
        self.seen.append(self.clock())
        return rows


def reward(texts: list[str]) -> list[float]:
    """Something that varies within a group: how many different characters there are."""
    return [len(set(text)) / 32 for text in texts]


def ours(method: str, case: Case, clock: Callable[[], float]) -> list[float]:
    seen: list[float] = []
    if method == "grpo":
        recipe = recipes.get("grpo")
        source = OnPolicy(GROUP) >> Score(lambda records, responses: reward(responses)) >> Ticks(clock, seen)
    else:
        recipe = recipes.get("gkd", divergence=JensenShannon(0.5))
        source = OnPolicy() >> Ticks(clock, seen)
    recipe = Recipe(source, recipe.objective, recipe.schedule, recipe.models)
    with tempfile.TemporaryDirectory() as out:
        fit(
            recipe,
            student=case.student,
            teacher=case.teacher if method != "grpo" else None,
            data=[{"prompt": prompt} for prompt in case.prompts],
            out=Path(out) / "run",
            steps=case.steps,
            batch_size=ROWS,
            max_new_tokens=case.new,
            learning_rate=1e-5,
            quiet=True,
        )
    return seen


def theirs(method: str, case: Case, clock: Callable[[], float]) -> list[float]:
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

    seen: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            seen.append(clock())

    common: dict[str, Any] = {
        "per_device_train_batch_size": ROWS,
        "gradient_accumulation_steps": 1,
        "max_steps": case.steps,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": False,
        "bf16": False,
        "use_cpu": True,
        "report_to": [],
        "logging_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "temperature": 1.0,
    }
    tokenizer = AutoTokenizer.from_pretrained(case.student)
    load = {"dtype": "float32"}
    with tempfile.TemporaryDirectory() as out:
        records = [{"prompt": prompt} for prompt in case.prompts]
        if method == "grpo":
            made = trl.GRPOTrainer(
                model=case.student,
                args=trl.GRPOConfig(
                    out,
                    **common,
                    num_generations=GROUP,
                    max_completion_length=case.new,
                    beta=0.04,
                    loss_type="grpo",
                    top_k=0,
                    top_p=1.0,
                    model_init_kwargs=load,
                ),
                reward_funcs=lambda completions, **_: reward(completions),
                train_dataset=Dataset.from_list(records),
                processing_class=tokenizer,
                callbacks=[Clock()],
            )
        elif method == "distillation":
            made = trl.DistillationTrainer(
                model=case.student,
                teacher_model=case.teacher,
                args=trl.DistillationConfig(
                    out,
                    **common,
                    max_completion_length=case.new,
                    beta=0.5,
                    top_k=0,
                    top_p=1.0,
                    model_init_kwargs=load,
                    teacher_model_init_kwargs=load,
                ),
                train_dataset=Dataset.from_list(records),
                processing_class=tokenizer,
                callbacks=[Clock()],
            )
        else:
            from trl.experimental.gkd import GKDConfig, GKDTrainer

            chat = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
            tokenizer.chat_template = chat
            messages = [
                {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": p[:1]}]}
                for p in case.prompts
            ]
            made = GKDTrainer(
                model=AutoModelForCausalLM.from_pretrained(case.student, **load),
                teacher_model=AutoModelForCausalLM.from_pretrained(case.teacher, **load),
                args=GKDConfig(out, **common, max_new_tokens=case.new, lmbda=1.0, beta=0.5, max_length=128),
                train_dataset=Dataset.from_list(messages),
                processing_class=tokenizer,
                callbacks=[Clock()],
            )
        made.remove_callback(PrinterCallback)
        made.train()
    return seen


def products(method: str, case: Case) -> rollouts.Products:
    """The products with weights of a step that samples and then reads what it sampled.

    Those of sampling; then for the policy one forward and two backward, for the other model one forward. Each prompt is
    counted once for its group, the last new tokens not at all (nothing is asked after them), and in the last layer
    only keys and values of the prompt tokens before the last.
    """
    model = CausalLM.load(case.student)
    prompts = [model.encode_prompt(p) for p in case.prompts[: ROWS // GROUP if method == "grpo" else ROWS]]
    read = ROWS * (case.new - 1)
    answered = len(prompts) + read
    once = [*rollouts.reading(model, sum(map(len, prompts)) + read, answered), (model.head()[0], answered)]
    return rollouts.sampling(model, prompts, ROWS, case.new) + once * 4


@dataclass(frozen=True)
class Case:
    name: str
    student: str
    teacher: str
    prompts: list[str]
    steps: int
    new: int


def cases(folder: Path, sizes: list[tuple[int, int, int]], steps: int, new: int) -> list[Case]:
    found = []
    for vocabulary, hidden, layers in sizes:
        letters = "".join(chr(0x4E00 + number) for number in range(vocabulary - 4))
        name = f"h{hidden} L{layers} V{vocabulary}"
        for seed, kind in enumerate(("student", "teacher")):
            model = tiny_llama(character_tokenizer(letters), hidden=hidden, layers=layers, heads=4, seed=seed)
            model.save(folder / name / kind)
        draw = random.Random(0)
        prompts = ["".join(draw.choices(letters, k=draw.randint(8, 16))) for _ in range(256)]
        paths = (str(folder / name / kind) for kind in ("student", "teacher"))
        found.append(Case(name, *paths, prompts, steps, new))
    return found


def main() -> None:
    parser = shared.options(__doc__, repeats=1)
    parser.add_argument("--steps", type=int, default=5, help="of each run (default 5; the first does not count)")
    parser.add_argument("--new", type=int, default=32, help="new tokens of each response (default 32)")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    clock = shared.started(arguments, "trl")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print(f"{ROWS} rows a step, {arguments.new} new tokens; seconds per optimiser step")
    print(f"{'model':<18}{'method':<16}{'TRL trainer':<22}{'TRL':>8}{'leibler':>9}{'ratio':>8}{'limit':>8}{'ratio':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(Path(folder), SIZES, arguments.steps, arguments.new):
            for method, trainer in (("grpo", "GRPO"), ("distillation", "Distillation"), ("gkd", "experimental GKD")):
                seconds = {}
                for _ in range(arguments.repeats):
                    for side in (theirs, ours):
                        times = [b - a for a, b in pairwise(side(method, case, clock)[1:])]
                        seconds[side] = min([*times, seconds.get(side, float("inf"))])
                (limit,) = shared.fastest([rollouts.alone(products(method, case))], 3, clock)
                their, our = seconds[theirs], seconds[ours]
                row = f"{their:>8.3f}{our:>9.3f}{their / our:>8.2f}{limit:>8.3f}{their / limit:>8.2f}"
                print(f"{case.name:<18}{method:<16}{trainer:<22}{row}", flush=True)


if __name__ == "__main__":
    main()
