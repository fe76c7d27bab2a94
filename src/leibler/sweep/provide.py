"""Makes once what the methods of a sweep ask for: models, data, columns and pairs, kept in its directory."""

from __future__ import annotations

import json
import math
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leibler import durable
from leibler.errors import DataError, RunError
from leibler.sweep.needs import Offered
from leibler.sweep.settings import SETUP, Settings, Setup

if TYPE_CHECKING:
    from leibler.data import Dataset, Record

TASK = "task:brackets:depth=5,length=12,kinds=2,detours=1"
"""Its demonstrations differ, so the teacher has a law worth matching and not one answer only."""
TEXT = "corpus:stdlib:length=64,seed=0"
LEARNT = "train"
"""What recipes call the data of the task."""
TEXTS = ("text", "general")
"""What recipes call general text beside the task."""
EMBEDDED: Mapping[str, Any] = {
    "batch_size": 64, "learning_rate": 1e-3, "warmup": 20, "max_new_tokens": 14, "steps": 260,
}  # fmt: skip
SHAPES = {"teacher": (128, 3), "student": (64, 2), "small": (32, 1)}
"""Hidden size and layers."""
STEPS = {"teacher_base": 120, "teacher": 240, "student": 100, "small": 60}
"""Optimiser steps of each model of the embedded set-up."""
CALLED = {"teacher_base": "teacher_base", "base": "teacher_base", "reference_small": "small", "reference": "student"}
"""What recipes call the teacher before it learnt the task, a smaller model than the student, and the student itself."""
Say = Callable[[str], None]


def offered(settings: Settings) -> Offered:
    """What the methods of a sweep can be given."""
    if settings.embedded:
        models = {"teacher", *CALLED}
        return Offered(frozenset(models), frozenset({LEARNT, *TEXTS}), frozenset(COLUMNS), answers=True)
    from leibler.data import load

    models = {*settings.models, "reference", *(["teacher"] if settings.teacher else [])}
    answers = load(settings.data[LEARNT], limit=8).check is not None
    columns = {name for name in COLUMNS if answers or name != "pass_rate"}
    return Offered(frozenset(models), frozenset(settings.data), frozenset(columns), answers)


def prepare(out: Path, settings: Settings, say: Say) -> Setup:
    """The set-up of a sweep; what an interrupted sweep made of it is kept."""
    if (out / SETUP / "setup.json").exists():
        return Setup.read(out)
    (out / SETUP).mkdir(parents=True, exist_ok=True)
    setup = _embedded(out / SETUP, settings, say) if settings.embedded else _own(out / SETUP, settings)
    setup.write(out)
    return setup


# ---- the embedded set-up ---------------------------------------------------------------------------------------------


def _embedded(folder: Path, settings: Settings, say: Say) -> Setup:
    few = min(settings.scale, 1.0)
    n = max(int(3000 * few), 64)
    data = {LEARNT: f"{TASK},n={n},seed=0,part=train"}
    data |= {name: f"{TEXT},limit={max(int(2000 * few), 64)},part=train" for name in TEXTS}
    begun: dict[str, str | None] = {"teacher_base": None, "student": None, "small": None, "teacher": "teacher_base"}
    for number, (name, start) in enumerate(begun.items(), 1):
        if not (folder / name / "final" / "config.json").exists():
            say(f"set-up {number}/{len(begun)}: the {name.replace('_', ' ')} learns the task and the text")
            _learn(folder / name, folder / start / "final" if start else name, data, settings)
    models = {name: str(folder / name / "final") for name in begun}
    steps = max(int((settings.options.get("steps") or EMBEDDED["steps"]) * settings.scale), 2)
    return _measured_out(
        Setup(
            student=models["student"],
            models={"teacher": models["teacher"], **{name: models[of] for name, of in CALLED.items()}},
            data=data,
            held_out=f"{TASK},n={settings.limit},seed=1,part=heldout",
            tuning=f"{TASK},n={settings.limit},seed=2,part=heldout",
            text=f"{TEXT},limit=64,part=heldout",
            tokens=settings.options.get("tokens") or 0,
            steps=steps,
            title="brackets and the standard library's text, models made on the spot",
        ),
        settings,
    )


def _learn(out: Path, start: Path | str, data: Mapping[str, str], settings: Settings) -> None:
    """A model of the embedded set-up: likelihood of the task and of text side by side, as in pre-training."""
    import shutil

    from leibler.objective import Imitate, Objective
    from leibler.policy import CausalLM, character_tokenizer, tiny_llama
    from leibler.train import Data, Mixture, Recipe, fit

    if isinstance(start, Path):
        model = CausalLM.load(start).requires_grad_(True)
    else:
        hidden, layers = SHAPES[start.removesuffix("_base")]
        tokenizer = character_tokenizer([string.printable[:95] + "\n"])
        model = tiny_llama(tokenizer, hidden=hidden, layers=layers, heads=4)
    if out.exists():
        shutil.rmtree(out)  # interrupted; it is short, and starts again
    recipe = Recipe(
        Mixture(task=Data(LEARNT), text=Data(TEXTS[0], rows=16)), Objective(Imitate(on="task"), Imitate(on="text"))
    )
    steps = max(int(STEPS[out.name] * settings.scale), 2)
    fit(
        recipe, student=model, data={n: data[n] for n in (LEARNT, TEXTS[0])}, out=out, quiet=True, steps=steps,
        batch_size=96, learning_rate=3e-3, warmup=min(20, steps // 4), decay="cosine", sample_every=0,
    )  # fmt: skip


# ---- a set-up of the user's own --------------------------------------------------------------------------------------


def _own(folder: Path, settings: Settings) -> Setup:
    from leibler.data import load
    from leibler.data.spec import is_made
    from leibler.train.run_file import absolute

    if settings.teacher is None or LEARNT not in settings.data:
        raise RunError("a sweep with a student of your own needs teacher=DIR and data=FILE as well; add them.")
    data = {name: absolute(spec) for name, spec in settings.data.items()}
    rest = load(data[LEARNT], needs=("prompt", "completion"))
    made = is_made(data[LEARNT])  # its checker knows more than the answers that a file could hold
    held_out = settings.validation and absolute(settings.validation)
    if not held_out and made:
        raise RunError(f"{data[LEARNT]} is made and not split; give what is measured on too: validation=task:...")
    if made and settings.learning_rates:
        raise RunError(
            f"learning rates are chosen on problems that no run is trained on, and {data[LEARNT]} is made and not "
            "split; give the data as a file, or one learning_rate=."
        )
    if not held_out:
        rest, kept = rest.split(0.1, seed=0)
        held_out = str(folder / "held_out.jsonl")
        write_records(Path(held_out), kept)
    rest, tuning = rest.split(0.05, seed=1)
    write_records(folder / "tuning.jsonl", tuning)
    if not made:
        data[LEARNT] = str(folder / "train.jsonl")
        write_records(folder / "train.jsonl", rest)
    assert settings.student is not None
    models = {"reference": settings.student, "teacher": settings.teacher, **settings.models}
    return _measured_out(
        Setup(
            student=absolute(settings.student),
            models={name: absolute(model) for name, model in models.items()},
            data=data,
            held_out=held_out,
            tuning=str(folder / "tuning.jsonl"),
            text=None,
            tokens=settings.options.get("tokens") or 0,
            steps=int(settings.options.get("steps") or 200),
            title=f"{settings.data[LEARNT]}: {settings.student} learns from {settings.teacher}",
        ),
        settings,
    )


def _measured_out(setup: Setup, settings: Settings) -> Setup:
    """The budget: the tokens of so many batches of the task's own completions, or the steps for so many tokens."""
    from leibler.data import load
    from leibler.policy import CausalLM

    student = CausalLM.load(setup.student)
    records = load(setup.data[LEARNT]).records[:1000]
    mean = sum(len(student.encode_completion(r.completion or "")) for r in records) / len(records)
    each = mean * run_options(settings)["batch_size"]
    if setup.tokens:
        return replace(setup, steps=max(math.ceil(setup.tokens / each), 1))
    return replace(setup, tokens=math.ceil(setup.steps * each))


def run_options(settings: Settings) -> dict[str, Any]:
    """The options of every run, but for its length."""
    from leibler.train import Options

    mine = {**(EMBEDDED if settings.embedded else {"batch_size": Options.batch_size}), **settings.options}
    return {name: value for name, value in mine.items() if name not in ("steps", "tokens", "seed")}


# ---- columns and pairs -----------------------------------------------------------------------------------------------


def _pass_rate(setup: Setup, dataset: Dataset, settings: Settings) -> list[Any]:
    from leibler.measure.scores import pass_rates
    from leibler.policy import CausalLM

    student = CausalLM.load(setup.student)
    new = run_options(settings).get("max_new_tokens", 64)
    return pass_rates(student, dataset, settings.samples, max_new_tokens=new, batch_size=512)


def _label_logp(setup: Setup, dataset: Dataset, settings: Settings) -> list[Any]:
    from leibler.measure.scores import label_logps
    from leibler.policy import CausalLM

    return label_logps(CausalLM.load(setup.models["teacher"]), dataset.records, batch_size=64)


COLUMNS: Mapping[str, Callable[[Setup, Dataset, Settings], list[Any]]] = {
    "pass_rate": _pass_rate,
    "label_logp": _label_logp,
}
"""What the columns that recipes read are made by: how often the student, as it starts, solves a problem; the teacher's
log-probability of each token of a completion."""


def provide(
    out: Path, settings: Settings, setup: Setup, name: str, columns: Iterable[str], pairs: bool, say: Say
) -> str:
    """The specification of a data set with the columns or pairs that a method asks for; made at the first asking."""
    from leibler.data import load

    columns = sorted(columns)
    if not columns and not pairs:
        return setup.data[name]
    path = out / SETUP / "data" / ("+".join([name, *columns, *(["pairs"] if pairs else [])]) + ".jsonl")
    if path.exists():
        return str(path)
    say(f"set-up: {' and '.join([*columns, *(['pairs'] if pairs else [])])} of the data {name}")
    path.parent.mkdir(exist_ok=True)
    dataset = load(setup.data[name], needs=("prompt", "completion"))
    if pairs:
        dataset = replace(dataset, records=tuple(_pairs(dataset, setup, settings)))
    made = {column: COLUMNS[column](setup, dataset, settings) for column in columns}
    rows = [
        replace(r, extra={**r.extra, **{c: values[i] for c, values in made.items()}}) for i, r in enumerate(dataset)
    ]
    write_records(path, rows)
    return str(path)


def _pairs(dataset: Dataset, setup: Setup, settings: Settings) -> list[Record]:
    """Each completion with an answer of the student, as it starts, that is wrong (or, without a checker, another)."""
    from leibler.policy import CausalLM, sample, uniforms

    student, new = CausalLM.load(setup.student), run_options(settings).get("max_new_tokens", 64)
    group, each, found = 4, 128, []
    numbers = uniforms(0, "pairs", 0, rows=len(dataset) * group, n=new)
    for start in range(0, len(dataset), each):
        records = dataset.records[start : start + each]
        rows = numbers[start * group : (start + len(records)) * group]
        prompts = [student.encode_prompt(r.prompt) for r in records]
        answers = [student.decode(c) for c in sample(student, prompts, uniforms=rows, group_size=group).completions()]
        for i, record in enumerate(records):
            wrong = [a for a in answers[i * group : (i + 1) * group] if _differs(record, a, dataset)]
            if wrong:
                found.append(replace(record, chosen=record.completion, rejected=wrong[0]))
    if not found:
        raise DataError(f"no answer of the student to {dataset.name} is wrong; there are no pairs to learn from.")
    return found


def _differs(record: Record, answer: str, dataset: Dataset) -> bool:
    if dataset.check is not None:
        return dataset.check(record, answer) < 1.0
    return answer.strip() != (record.completion or "").strip()


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Records as JSON lines, whole or not at all."""
    names = ("prompt", "completion", "chosen", "rejected", "answer", "id")

    def row(record: Record) -> dict[str, Any]:
        said = {name: getattr(record, name) for name in names if getattr(record, name) is not None}
        return {**record.extra, **said}

    durable.write_text(path, "".join(json.dumps(row(record)) + "\n" for record in records))
