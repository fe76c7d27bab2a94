"""Teacher, students under four divergences, reinforcement, measurements, report: the whole library in minutes."""

from __future__ import annotations

import json
import shutil
import string
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leibler.demo.findings import findings
from leibler.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL, TotalVariation
from leibler.objective import Imitate, Match, Objective, Teacher
from leibler.train import Data, Mixture, OnPolicy, Pipeline, Recipe, fit

if TYPE_CHECKING:
    from leibler.data import Dataset, Record
    from leibler.policy import CausalLM

DIVERGENCES: tuple[Divergence, ...] = (ForwardKL(), ReverseKL(), JensenShannon(0.5), TotalVariation())


@dataclass(frozen=True)
class Size:
    """How much of everything; the defaults take a few minutes on two cores.

    Attributes:
        teacher, student: hidden size and layers.
        teacher_steps, student_steps, distil_steps, grpo_steps: optimiser steps of each stage.
    """

    teacher: tuple[int, int] = (128, 3)
    student: tuple[int, int] = (64, 2)
    teacher_steps: int = 400
    student_steps: int = 120
    distil_steps: int = 80
    grpo_steps: int = 100
    questions: int = 256
    batch_size: int = 128
    text_rows: int = 16

    def scaled(self, factor: float) -> Size:
        """The same with every number of steps multiplied."""

        def n(steps: int) -> int:
            return max(int(steps * factor), 2)

        return Size(
            self.teacher,
            self.student,
            n(self.teacher_steps),
            n(self.student_steps),
            n(self.distil_steps),
            n(self.grpo_steps),
            max(int(self.questions * min(factor, 1.0)), 8),
            self.batch_size,
            self.text_rows,
        )


@dataclass(frozen=True)
class _Inputs:
    """The data of the demo: a task and a text corpus, each with a held-out part."""

    task: Dataset
    task_held_out: Dataset
    text: Dataset
    text_held_out: Dataset
    passage: Record


TASK = "brackets:depth=5,length=12,kinds=2"
NEW_TOKENS = 8
TEXT_TOKENS = 24
STAGES = 2 + len(DIVERGENCES) + 1


def run_demo(out: str | Path, size: Size = Size(), *, quiet: bool = False) -> Path:
    """Run the demo in a directory and write its report; finished stages of an earlier run there are kept.

    Returns:
        The report, one HTML file.

    Raises:
        RunError: the directory holds something else.
    """
    from leibler.errors import RunError
    from leibler.measure.report import write_report

    out = Path(out)
    if out.exists() and any(out.iterdir()) and not (out / "teacher").exists():
        raise RunError(f"{out} is not empty and holds no demo; give another directory with --out.")
    out.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    stage = _Stages(out, quiet)
    inputs = _inputs(size)
    mixed = {"task": inputs.task, "text": inputs.text}
    imitate = Recipe(
        Mixture(task=Data("task"), text=Data("text", rows=size.text_rows)),
        Objective(Imitate(on="task"), Imitate(on="text")),
    )
    common = {"batch_size": size.batch_size, "max_new_tokens": NEW_TOKENS, "decay": "cosine", "warmup": 20}

    teacher = stage(
        "teacher",
        f"a teacher learns {TASK} and the standard library's text",
        imitate,
        _model(size.teacher),
        mixed,
        steps=size.teacher_steps,
        learning_rate=3e-3,
        **common,
    )
    start = stage(
        "student",
        "a smaller student gets a first idea of both",
        imitate,
        _model(size.student),
        mixed,
        steps=size.student_steps,
        learning_rate=3e-3,
        **common,
    )
    models = {"teacher": teacher, "student (start)": start}
    for divergence in DIVERGENCES:
        name = type(divergence).__name__
        on_policy = Recipe(
            Mixture(
                task=OnPolicy(prompts="task"),
                text=OnPolicy(prompts="text", rows=size.text_rows, max_new_tokens=TEXT_TOKENS),
            ),
            Objective(Match(divergence, to=Teacher(), on="task"), Match(divergence, to=Teacher(), on="text")),
        )
        models[name] = stage(
            name,
            f"the student is distilled on its own samples under {name}",
            on_policy,
            start,
            mixed,
            teacher=teacher,
            steps=size.distil_steps,
            learning_rate=2e-3,
            **common,
        )
    stage.say("measuring every student on held-out tasks and text")
    rows = [_measure(n, m, teacher, inputs, size, out) for n, m in models.items()]
    students = [r for r in rows if r["name"] in {type(d).__name__ for d in DIVERGENCES}]
    best = max(students, key=lambda r: (r["metrics"]["accuracy"], -r["metrics"]["ReverseKL"]))["name"]

    from leibler import recipes

    reinforced = stage(
        "grpo",
        f"the best student ({best}) is trained further with rewards, under a KL to itself",
        recipes.get("grpo", group_size=8, coefficient=0.05),
        models[best],
        {"train": inputs.task},
        steps=size.grpo_steps,
        batch_size=512,
        max_new_tokens=NEW_TOKENS,
        learning_rate=4e-4,
        warmup=5,
        decay="linear",
    )
    after = _measure(f"{best} + GRPO", reinforced, teacher, inputs, size, out)
    before = next(r for r in rows if r["name"] == best)
    summary = {
        "title": "Leibler demo",
        "task": TASK,
        "seconds": stage.seconds() if stage.fresh else None,
        "wall_seconds": time.monotonic() - started,
        "divergences": [type(d).__name__ for d in DIVERGENCES],
        "models": [*rows, after],
        "rl": {"before": before["metrics"], "after": after["metrics"], "run": "grpo", "student": best},
        "findings": findings(rows, before, after, [type(d).__name__ for d in DIVERGENCES]),
        "text": {
            "model": f"{best}/final",
            "target": "teacher/final",
            "prompt": inputs.passage.prompt,
            "text": inputs.passage.completion,
        },
    }
    (out / "demo.json").write_text(json.dumps(summary, indent=1))
    page = write_report(out)
    if not quiet:
        print_table(summary)
        print(f"report: {page}")
    return page


class _Stages:
    """Runs stages one after another, or takes over the result of an earlier run."""

    def __init__(self, out: Path, quiet: bool) -> None:
        self.out, self.quiet, self.number = out, quiet, 0
        self.fresh = True
        self.began = time.monotonic()

    def __call__(
        self,
        name: str,
        what: str,
        recipe: Recipe | Pipeline,
        model: CausalLM,
        data: Mapping[str, Dataset],
        **options: Any,
    ) -> CausalLM:
        from leibler.policy import CausalLM

        self.number += 1
        folder = self.out / name
        if (folder / "final" / "config.json").exists():
            self.fresh = False
            self.say(f"[{self.number}/{STAGES}] {name}: kept from an earlier run")
            return CausalLM.load(folder / "final")
        if folder.exists():
            shutil.rmtree(folder)  # a stage of this demo that was interrupted; it is short, and starts again
        self.say(f"[{self.number}/{STAGES}] {name}: {what}")
        student = model.copy().requires_grad_(True)
        return fit(recipe, student=student, data=data, out=folder, quiet=self.quiet, **options).policy

    def seconds(self) -> float:
        return time.monotonic() - self.began

    def say(self, message: str) -> None:
        if not self.quiet:
            print(message, file=sys.stderr, flush=True)


def _inputs(size: Size) -> _Inputs:
    from leibler.data import load

    separator = "," if ":" in TASK else ":"
    return _Inputs(
        load(f"task:{TASK}{separator}n=6000,seed=0,part=train"),
        load(f"task:{TASK}{separator}n={size.questions},seed=1,part=heldout"),
        load("corpus:stdlib:length=64,limit=3000,seed=0,part=train"),
        load(f"corpus:stdlib:length=64,limit={size.questions},seed=0,part=heldout"),
        load("corpus:stdlib:what=docstring,length=220,limit=1,seed=2,part=heldout")[0],
    )


def _model(shape: tuple[int, int]) -> CausalLM:
    from leibler.policy import character_tokenizer, tiny_llama

    tokenizer = character_tokenizer([string.printable[:95] + "\n"])
    return tiny_llama(tokenizer, hidden=shape[0], layers=shape[1], heads=4)


def _measure(name: str, model: CausalLM, teacher: CausalLM, inputs: _Inputs, size: Size, out: Path) -> dict[str, Any]:
    """One row of the table: closeness to the teacher, answers, entropy and calibration, all held out."""
    from leibler.measure.models import compare, evaluate

    held_out = [*inputs.task_held_out, *inputs.text_held_out]
    near = compare(model, teacher, held_out, {type(d).__name__: d for d in DIVERGENCES}, batch_size=32)
    answers = evaluate(model, inputs.task_held_out, n_samples=8, max_new_tokens=NEW_TOKENS, batch_size=512)
    bins = [b for b in near["model/reliability"] if b["count"]]
    folder = name if name not in ("student (start)",) else "student"
    folder = "grpo" if name.endswith("+ GRPO") else folder
    return {
        "name": name,
        "run": folder,
        "checkpoint": f"{folder}/final",
        "parameters": sum(p.numel() for p in model.parameters()),
        "metrics": {
            **{type(d).__name__: near[f"divergence/{type(d).__name__}"] for d in DIVERGENCES},
            "accuracy": answers["accuracy"],
            "pass@1": answers["pass@1"],
            "pass@8": answers["pass@8"],
            "entropy": near["model/entropy"],
            "ece": near["model/calibration_error"],
        },
        "calibration": {
            "confidence": [b["confidence"] for b in bins],
            "accuracy": [b["accuracy"] for b in bins],
            "count": [b["count"] for b in bins],
        },
    }


def print_table(summary: Mapping[str, Any]) -> None:
    """The comparison as text, then what was found."""
    columns: Sequence[str] = [*summary["divergences"], "accuracy", "pass@1", "pass@8", "entropy", "ece"]
    width = max(len(r["name"]) for r in summary["models"])
    print(f"{'model':<{width}} {'params':>8} " + " ".join(f"{c[:14]:>14}" for c in columns))
    for row in summary["models"]:
        cells = " ".join(f"{row['metrics'][c]:>14.4f}" for c in columns)
        print(f"{row['name']:<{width}} {row['parameters']:>8} {cells}")
    for sentence in summary["findings"]:
        print(f"- {sentence}")
