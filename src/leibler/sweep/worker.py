"""One process of a sweep: prepares, or trains one method and measures it, so that its memory and speed are its own.

``python -m leibler.sweep.worker DIR JOB`` reads the settings in DIR; the job is JSON. It ends when its standard input
does: a sweep that is killed leaves no run behind that goes on alone.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leibler import durable
from leibler.errors import LeiblerError
from leibler.safety import printable
from leibler.sweep.settings import INTERRUPTED, RESULTS, RUNS, Settings, Setup

if TYPE_CHECKING:
    from leibler.policy import CausalLM

SAVES = 4
"""Checkpoints in the course of a run, which an interrupted one goes on from."""


def main(arguments: list[str]) -> int:
    """Do one job in a process made for it."""
    import torch

    from leibler import memory

    threading.Thread(target=_end_with_parent, daemon=True).start()
    memory.keep()
    threads = Settings.read(Path(arguments[0])).threads
    if threads:
        torch.set_num_threads(threads)
    return work(Path(arguments[0]), json.loads(arguments[1]))


def work(out: Path, job: Mapping[str, Any]) -> int:
    """Do one job: 0, 130 after an interruption, or 1 with what was wrong as the last line of standard error."""
    try:
        JOBS[job["kind"]](out, Settings.read(out), job)
    except KeyboardInterrupt:
        return INTERRUPTED
    except LeiblerError as error:
        print(printable(str(error)), file=sys.stderr)
        return 1
    except Exception as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


def _end_with_parent() -> None:
    while os.read(0, 1):  # no buffered reader: one that waits would hold its lock when the interpreter ends
        pass
    os._exit(INTERRUPTED)


# ---- the jobs --------------------------------------------------------------------------------------------------------


def _prepare(out: Path, settings: Settings, job: Mapping[str, Any]) -> None:
    """The set-up, then every data set with columns or pairs that a method of the sweep asks for."""
    from leibler.sweep.provide import prepare, provide

    setup = prepare(out, settings, _say)
    for name, columns, pairs in job["data"]:
        provide(out, settings, setup, name, columns, pairs, _say)


def _say(sentence: str) -> None:
    print(printable(sentence), file=sys.stderr, flush=True)


def _measure(out: Path, settings: Settings, job: Mapping[str, Any]) -> None:
    """A model as it is: the student before, or the teacher."""
    from leibler.policy import CausalLM

    setup = Setup.read(out)
    path = setup.student if job["model"] == "student" else setup.models[job["model"]]
    model = CausalLM.load(path)
    _write(out, job, {"metrics": numbers(model, setup, settings), "parameters": _size(model)})


def _train(out: Path, settings: Settings, job: Mapping[str, Any]) -> None:
    """A run of one method, or what is left of it, and what its model is worth."""
    from leibler.cli.building import recipe_from
    from leibler.policy import CausalLM
    from leibler.sweep.needs import asked
    from leibler.sweep.provide import provide, run_options
    from leibler.train import Options, fit

    setup = Setup.read(out)
    slug, folder = job["slug"], out / RUNS / job["name"]
    overrides = dict(settings.overrides.get(slug, {}))
    method = recipe_from(slug, overrides)
    needs = asked(method)
    data = {
        name: provide(out, settings, setup, name, needs.columns.get(name, ()), name in needs.pairs, _say)
        for name in needs.data
    }
    chosen: dict[str, Any] = {"keep": 1, "save_every": max(setup.steps // SAVES, 1), **run_options(settings)}
    if job["learning_rate"]:
        chosen["learning_rate"] = job["learning_rate"]
    options = Options(**chosen, tokens=setup.tokens, steps=setup.steps, seed=job["seed"])
    CausalLM.load(setup.student)  # so that what is imported for it is not counted as the method's
    before = _begin_peak()
    models = {name: setup.models[name] for name in needs.models - {"teacher"}}
    run = fit(
        method,
        student=setup.student,
        teacher=setup.models["teacher"] if "teacher" in needs.models else None,
        models=models,
        data=data,
        validation=setup.tuning if needs.validation else None,
        out=folder,
        options=options,
        resume=(folder / "run.yaml").exists(),
        quiet=True,
        origin={"recipe": slug, "overrides": overrides},
    )
    peak = _peak() - before
    model = CausalLM.load(run.out / "final")
    found = {**numbers(model, setup, settings), **costs(folder), "memory": peak}
    if job["learning_rate"]:
        found |= {"learning_rate": options.learning_rate, "tuning": tuning(model, setup, settings)}
    _write(out, job, {"metrics": found, "parameters": _size(model)})
    for left in folder.rglob("checkpoints"):
        shutil.rmtree(left)  # the run is over, and there will be many


JOBS: Mapping[str, Callable[[Path, Settings, Mapping[str, Any]], None]] = {
    "prepare": _prepare,
    "measure": _measure,
    "train": _train,
}


def _write(out: Path, job: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    clean = {k: v if math.isfinite(v) else str(v) for k, v in found["metrics"].items() if v is not None}
    text = json.dumps({**job, **found, "metrics": clean}, indent=1)
    (out / RESULTS).mkdir(exist_ok=True)
    durable.write_text(out / RESULTS / f"{job['name']}.json", text + "\n")


# ---- numbers ---------------------------------------------------------------------------------------------------------


def numbers(model: CausalLM, setup: Setup, settings: Settings) -> dict[str, float]:
    """What is compared, on what no run has seen.

    ``forward_kl`` and ``reverse_kl`` are to the teacher, in nats per token of the held-out completions;
    ``own_reverse_kl`` is the reverse one along the model's own sampled answers, ``ece`` the calibration error of its
    next token in those completions, ``text_nll`` the nats per token of general text.
    """
    from leibler.data import load
    from leibler.measure.models import compare, evaluate
    from leibler.policy import CausalLM, sample, uniforms
    from leibler.sweep.provide import run_options

    teacher = CausalLM.load(setup.models["teacher"])
    held_out = load(setup.held_out, limit=settings.limit)
    new = run_options(settings).get("max_new_tokens", 64)
    near = compare(model, teacher, held_out, batch_size=32)
    found = {
        "forward_kl": near["divergence/forward_kl"],
        "reverse_kl": near["divergence/reverse_kl"],
        "ece": near["model/calibration_error"],
    }
    prompts = [model.encode_prompt(record.prompt) for record in held_out]
    drawn = sample(model, prompts, uniforms=uniforms(0, "sweep", 0, rows=len(prompts), n=new), max_batch=256)
    answers = [model.decode(ids) for ids in drawn.completions()]
    own = [replace(r, completion=a) for r, a in zip(held_out, answers, strict=True)]
    found["own_reverse_kl"] = compare(model, teacher, own, batch_size=32)["divergence/reverse_kl"]
    if held_out.check is not None:
        told = evaluate(model, held_out, settings.samples, max_new_tokens=new, batch_size=512)
        most = max((k for k in told if k.startswith("pass@")), key=lambda k: int(k[5:]))
        found |= {"accuracy": told["accuracy"], "pass@1": told["pass@1"], most: told[most]}
        found |= {k: told[k] for k in ("distinct", "distinct_right", "entropy", "length")}
    if setup.text is not None:
        found["text_nll"] = compare(model, model, load(setup.text), [], batch_size=32)["model/nll"]
    return found


def tuning(model: CausalLM, setup: Setup, settings: Settings) -> float:
    """What a learning rate is chosen by: greedy accuracy, or less the reverse KL where nothing checks answers, on
    problems that are neither trained nor compared on."""
    from leibler.data import load
    from leibler.measure.models import compare, evaluate
    from leibler.policy import CausalLM
    from leibler.sweep.provide import run_options

    compared = {record.prompt for record in load(setup.held_out, limit=settings.limit)}
    found = load(setup.tuning)
    found = replace(found, records=tuple(r for r in found if r.prompt not in compared))
    if found.check is not None:
        new = run_options(settings).get("max_new_tokens", 64)
        return evaluate(model, found, 0, max_new_tokens=new, batch_size=512)["accuracy"]
    return -compare(model, CausalLM.load(setup.models["teacher"]), found, batch_size=32)["divergence/reverse_kl"]


def costs(folder: Path) -> dict[str, float]:
    """Tokens trained on, steps, and tokens in a second of sampling and training; the first step of a run warms up."""
    tokens = steps = 0
    timed, seconds = 0.0, 0.0
    for path in sorted(folder.rglob("metrics.jsonl")):
        trained = [row["tokens"] for row in _lines(path)]
        clock = [row["seconds"] for row in _lines(path.with_name("timings.jsonl"))]
        tokens, steps = tokens + int(sum(trained)), steps + len(trained)
        first = 1 if len(trained) > 1 else 0
        timed, seconds = timed + sum(trained[first:]), seconds + sum(clock[first:])
    return {"tokens": tokens, "steps": steps, "tokens_per_second": timed / max(seconds, 1e-9)}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _size(model: CausalLM) -> int:
    return sum(p.numel() for p in model.parameters())


def _begin_peak() -> int:
    """Begin to look for the most memory that is held; returns what is held now, in bytes."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return _peak()


def _peak() -> int:
    """The most bytes held at once since `_begin_peak`: of the GPU, or of this process.

    Where the system tells (Linux), the process's own peak: the one in ``getrusage`` is inherited from its parent.
    """
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        return _status("VmHWM")
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(which)) * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
