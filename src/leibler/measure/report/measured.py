"""What only the models can tell: a text token by token, calibration, accuracy. Each part may be missing, with a reason.

A report is read long after its run. Models may have been given in memory, moved or deleted since; then the sections
that need them say so in a sentence, and the rest of the page stands.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leibler.cache import PREFIX
from leibler.errors import LeiblerError, ModelError, RunError
from leibler.measure.report.collect import Recorded, mapping

if TYPE_CHECKING:
    from leibler.data import Dataset, Record
    from leibler.measure.models import TokenView
    from leibler.policy import CausalLM

RECORDS = 128
"""Records that are measured."""
TOKENS = 16_384
"""Tokens of completions that are measured at most, so that a report on long documents does not take an hour."""
SHOWN_TOKENS = 420
SHOWN_TEXTS = 12
TOP = 5
SAMPLES = 8
"""Answers per question for pass@k, on at most ``QUESTIONS`` questions."""
QUESTIONS = 64

IN_MEMORY = "given in memory>"


@dataclass(frozen=True)
class Text:
    """A text as both models see it."""

    prompt: str
    tokens: tuple[TokenView, ...]
    cut: bool = False


@dataclass(frozen=True)
class Reliability:
    """One model's reliability bins, without the empty ones."""

    name: str
    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]
    error: float


@dataclass(frozen=True)
class Measured:
    """What was measured, or why it was not.

    Args:
        target: what the model is compared with, such as "the teacher".
        data: what it was measured on.
        held_out: whether that is apart from the training data.
        texts, reliability: empty when ``missing`` says why.
        numbers: of `compare` and `evaluate`, by model ("model", "target").
        missing: sentences, by section ("text", "calibration", "numbers").
    """

    target: str = "the target"
    data: str = ""
    held_out: bool = False
    texts: tuple[Text, ...] = ()
    reliability: tuple[Reliability, ...] = ()
    numbers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)


def measure(recorded: Recorded, evaluation: Mapping[str, Any] | None = None) -> Measured:
    """Load the models of a run and measure them, as far as they are there.

    Args:
        recorded: the run.
        evaluation: numbers that were measured before, as `leibler.measure.compare` or `evaluate` give them; they are
            shown instead of measuring the accuracy again.
    """
    run = recorded.run
    teacher = run.get("teacher") or mapping(run.get("models")).get("teacher")
    if isinstance(teacher, str) and teacher.startswith(PREFIX):
        teacher = None  # a cache of one, which says nothing about texts that it was not made of
    what = "the teacher" if teacher else "the initial weights"
    found = Measured(target=what)
    given = _given(evaluation)
    try:
        model, target = _models(recorded, teacher, what)
        dataset, held_out = _data(recorded)
    except LeiblerError as error:
        reason = f"Left out: {_sentence(error)}"
        missing = {"text": reason, "calibration": reason, "numbers": reason}
        return replace(found, missing=missing, numbers=given, reliability=_reliability(evaluation or {}, what))
    found = replace(found, data=dataset.name, held_out=held_out)
    missing: dict[str, str] = {}
    texts: tuple[Text, ...] = ()
    reliability: tuple[Reliability, ...] = ()
    numbers: dict[str, dict[str, float]] = {side: dict(values) for side, values in given.items()}
    records = [record for record in map(_with_completion, dataset) if record is not None]
    fitting = _within(records, model, target)
    if not fitting:
        why = "longer than the models' context" if records else "without a completion or a chosen response"
        missing["text"] = missing["calibration"] = f"Left out: every record of {dataset.name} is {why}."
    else:
        try:
            texts = look(model, target, fitting)
            compared = _compared(model, target, fitting, recorded)
            reliability = _reliability(compared, what)
            for side in ("model", "target"):
                numbers[side] = {**_side(compared, side), **numbers.get(side, {})}
        except LeiblerError as error:
            missing["text"] = missing["calibration"] = f"Left out: {_sentence(error)}"
    if not given and dataset.check is not None:
        answers = _answers(model, target, dataset, recorded)
        for side in ("model", "target"):
            numbers[side] = {**numbers.get(side, {}), **answers[side]}
    return replace(found, texts=texts, reliability=reliability, numbers=numbers, missing=missing)


def look(model: CausalLM, target: CausalLM, records: Sequence[Record]) -> tuple[Text, ...]:
    """The first texts token by token, as many as a page holds."""
    from leibler.measure.models import token_view

    texts: list[Text] = []
    room = SHOWN_TOKENS
    context = min(side.context or 1 << 30 for side in (model, target))
    for record in records[:SHOWN_TEXTS]:
        text = record.completion or ""
        ids = model.encode_completion(text)
        fits = min(room, context - len(model.encode_prompt(record.prompt)))
        cut = len(ids) > fits
        if cut:
            if texts:
                break
            text = model.decode(ids[:fits])
        views = token_view(model, target, text, prompt=record.prompt, top=TOP, end=not cut)
        texts.append(Text(record.prompt, tuple(views), cut))
        room -= len(views)
        if room <= 0:
            break
    return tuple(texts)


def load_pair(model: str | Path, target: str | Path, options: Mapping[str, Any] = {}) -> tuple[CausalLM, CausalLM]:
    """Two checkpoints, on the GPU if there is one."""
    import torch

    from leibler.policy import CausalLM, same_tokenizer

    dtype = getattr(torch, str(options.get("dtype", "float32")), torch.float32)
    # A run file does not say whether code that comes with a checkpoint may run: it may come from elsewhere itself.
    one, other = (CausalLM.load(source, dtype=dtype) for source in (model, target))
    same_tokenizer(one, other, ("model", "target"))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return one.to(device), other.to(device)


def _models(recorded: Recorded, teacher: Any, what: str) -> tuple[CausalLM, CausalLM]:
    if recorded.final is None:
        wanted = recorded.options.get("steps", "?")
        raise RunError(f"the run stands at step {recorded.steps} of {wanted} and has no final model yet.")
    source = teacher or recorded.run.get("student")
    if not isinstance(source, str) or source.endswith(IN_MEMORY):
        verb = "was" if teacher else "were"
        raise ModelError(f"{what} of this run {verb} given in memory and left nothing on disk.")
    return load_pair(recorded.final, _place(source, recorded.path), recorded.options)


def _place(text: str, run: Path) -> str:
    """A path as the run knew it, or beside the run when the whole folder was moved; else the text, perhaps a hub id."""
    for base in (Path(), run, run.parent, run.parent.parent):
        if (base / text).exists():
            return str(base / text)
    return text


def _data(recorded: Recorded) -> tuple[Dataset, bool]:
    from leibler.data import load

    data = recorded.run.get("data")
    if isinstance(data, Mapping):
        data = data.get("train") or next(iter(data.values()), None)
    spec, held_out = (recorded.run["validation"], True) if recorded.run.get("validation") else (data, False)
    if not isinstance(spec, str) or spec.endswith(IN_MEMORY):
        raise RunError("the run's data was given in memory and is not on disk.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about rows set aside: the run has counted them already
        return load(_place(spec, recorded.path), limit=RECORDS), held_out


def _with_completion(record: Record) -> Record | None:
    if record.completion is not None:
        return record
    return None if record.chosen is None else replace(record, completion=record.chosen)


def _within(records: Sequence[Record], *models: CausalLM) -> list[Record]:
    """Records that fit both contexts, up to ``TOKENS`` tokens."""
    limit = min(model.context or 1 << 30 for model in models)
    kept, total = [], 0
    for record in records:
        length = len(models[0].encode_completion(record.completion or ""))
        if len(models[0].encode_prompt(record.prompt)) + length <= limit:
            kept.append(record)
            total += length
            if total >= TOKENS:
                break
    return kept


def _compared(model: CausalLM, target: CausalLM, records: Sequence[Record], recorded: Recorded) -> dict[str, Any]:
    from leibler.divergence import ForwardKL, JensenShannon, ReverseKL, TotalVariation
    from leibler.measure.models import compare

    size = recorded.options.get("batch_size")
    size = size if isinstance(size, int) and 0 < size < 16 else 16
    return compare(model, target, records, (ForwardKL(), ReverseKL(), JensenShannon(), TotalVariation()), size)


def _side(compared: Mapping[str, Any], side: str) -> dict[str, float]:
    found = {key: float(compared[f"{side}/{key}"]) for key in ("nll", "entropy", "calibration_error")}
    found["token_accuracy"] = float(compared[f"{side}/accuracy"])
    if side == "model":
        names = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")
        found = {f"divergence/{name}": float(compared[f"divergence/{name}"]) for name in names} | found
    return found


def _reliability(compared: Mapping[str, Any], what: str) -> tuple[Reliability, ...]:
    """The curves of what `compare` returned, as far as it holds them."""
    found = []
    for side, name in (("model", "this model"), ("target", what)):
        bins = [part for part in compared.get(f"{side}/reliability", ()) if part["count"]]
        if bins:
            columns = ([part[key] for part in bins] for key in ("confidence", "accuracy", "count"))
            found.append(Reliability(name, *map(tuple, columns), error=compared[f"{side}/calibration_error"]))
    return tuple(found)


def _answers(model: CausalLM, target: CausalLM, dataset: Dataset, recorded: Recorded) -> dict[str, dict[str, float]]:
    from leibler.measure.models import evaluate

    options = recorded.options
    longest, temperature = options.get("max_new_tokens", 64), options.get("temperature", 1.0)
    questions = dataset.select(range(min(QUESTIONS, len(dataset))))
    kept = ("accuracy", "pass@1", f"pass@{SAMPLES}")
    out = {}
    for side, which in (("model", model), ("target", target)):
        found = evaluate(which, questions, SAMPLES, temperature=temperature, max_new_tokens=longest)
        out[side] = {key: float(found[key]) for key in kept if key in found}
    return out


def _given(evaluation: Mapping[str, Any] | None) -> dict[str, dict[str, float]]:
    """Numbers that the caller measured: those of the target are named ``target/...``, the others are the model's."""
    out: dict[str, dict[str, float]] = {}
    for key, value in (evaluation or {}).items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            continue
        side, slash, rest = str(key).partition("/")
        side, name = (side, rest) if slash and side in ("model", "target") else ("model", str(key))
        out.setdefault(side, {})[name] = float(value)
    return out


def _sentence(error: Exception) -> str:
    text = str(error).strip().rstrip(".")
    return text[:1].lower() + text[1:] + "."
