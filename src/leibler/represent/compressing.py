"""The first stage of latent reasoning: train encoder and decoder, write the data with its thoughts.

Source: Latent Reasoning in LLMs as a Vocabulary-Space Superposition (2025).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from leibler import durable
from leibler.cache.identity import fingerprint
from leibler.data.records import told
from leibler.errors import DataError, ModelError, RunError
from leibler.policy import CausalLM
from leibler.policy.latent import CLOSE, OPEN, marker
from leibler.policy.model import evaluating
from leibler.policy.randomness import derived_seed
from leibler.represent.latent import Encoder, Example, answer_logp, layout, read
from leibler.safety import refuse_links
from leibler.train import checkpoint
from leibler.train.interrupt import interruptible
from leibler.train.latents import COLUMN, to_column

if TYPE_CHECKING:
    from leibler.data import Dataset, Record

LATENTS, SETTINGS, LOG, CHECKPOINTS = "latents.jsonl", "settings.json", "metrics.jsonl", "checkpoints"
"""What the output directory holds, beside ``decoder/``."""
PHASES = ("encoder", "decoder", "jointly")
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Settings:
    """Of the first stage.

    Args:
        rate: reasoning tokens that one thought stands for.
        span: segments of the reasoning that a compress token sees: its own and those just before it; 0: all so far.
        steps: optimiser steps of the encoder with the decoder frozen, of the decoder with the encoder frozen, of both.
        batch_size: records in a step.
        learning_rate: of AdamW.
        weight_decay: likewise.
        clip: the largest norm of a gradient.
        top_k: entries of each thought that are written.
        open, close: the markers around the thoughts, each one token.
        seed: of the order of the data and of dropout.
        save_every: steps between checkpoints.
    """

    rate: int = 4
    span: int = 2
    steps: tuple[int, int, int] = (300, 100, 100)
    batch_size: int = 16
    learning_rate: float = 1e-4
    weight_decay: float = 0.0
    clip: float = 1.0
    top_k: int = 64
    open: str = OPEN
    close: str = CLOSE
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        least = {"rate": 1, "span": 0, "batch_size": 1, "top_k": 1, "save_every": 1}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise RunError(f"{name}={getattr(self, name)} must be at least {value}.")
        if len(self.steps) != 3 or min(self.steps) < 0 or not sum(self.steps):
            raise RunError(f"steps={self.steps} must be three numbers of 0 or more: {', '.join(PHASES)}.")
        if not self.learning_rate > 0 or not self.clip > 0:
            raise RunError(f"learning_rate={self.learning_rate:g} and clip={self.clip:g} must be greater than 0.")

    def phase(self, step: int) -> str:
        """What is trained in a step, counted from 0."""
        first, second, _ = self.steps
        return PHASES[0] if step < first else PHASES[1] if step < first + second else PHASES[2]


@dataclass(frozen=True)
class Compressed:
    """What the first stage left.

    Args:
        file: the data with its thoughts, for ``leibler train latent-sft``.
        decoder: the directory of the model that answers from thoughts: a good student to begin with.
        losses: mean negative log-likelihood of the answers (nats per token) at each step.
        records, thoughts, tokens: how many were written, and the reasoning tokens that they stand for.
    """

    file: Path
    decoder: Path
    losses: tuple[float, ...]
    records: int
    thoughts: int
    tokens: int

    @property
    def compression(self) -> float:
        """Reasoning tokens of one thought."""
        return self.tokens / max(self.thoughts, 1)


def compress(
    model: CausalLM,
    data: Dataset,
    out: str | Path,
    settings: Settings = Settings(),
    *,
    progress: Progress = lambda done, total: None,
    exporting: Progress = lambda done, total: None,
) -> Compressed:
    """Train encoder and decoder, and write each record with the thoughts that stand for its reasoning.

    Called again with the same arguments after a kill or Ctrl-C, it goes on from the last checkpoint, and the result is
    that of an uninterrupted call bit for bit.

    Args:
        model: where both start; it is not changed.
        data: records with reasoning: see `read`.
        out: a directory of its own.
        settings: see there.
        progress: called with the steps done, and all of them.
        exporting: called with the records written, and all of them.

    Raises:
        DataError: a record lacks its reasoning or its answer, or is too long for the model.
        ModelError: the markers are no tokens, or the model's layers do not obey an attention mask.
        RunError: ``out`` holds something else, or was begun with other arguments.
    """
    folder = Path(out)
    examples = _examples(model, data, settings)
    _begin(folder, model, data, settings)
    never = [marker(model, settings.open), marker(model, settings.close), model.pad_id, *model.stop_ids]
    encoder, decoder = Encoder(model.copy(), never), model.copy()
    _check_mask(encoder)
    losses = _train(encoder, decoder, data, examples, folder, settings, progress)
    lines = "".join(
        json.dumps({"step": i + 1, "phase": settings.phase(i), "nll": x}) + "\n" for i, x in enumerate(losses)
    )
    durable.write_text(folder / LOG, lines)
    with durable.folder(folder / "decoder") as aside:
        decoder.save(aside)
    _export(encoder, data, examples, folder, settings, exporting)
    counts = [e.thoughts(settings.rate) for e in examples]
    return Compressed(
        folder / LATENTS,
        folder / "decoder",
        tuple(losses),
        len(examples),
        sum(counts),
        sum(len(e.reasoning) for e in examples),
    )


def _examples(model: CausalLM, data: Dataset, settings: Settings) -> list[Example]:
    for text in (settings.open, settings.close):
        marker(model, text)
    examples = [read(record, model, settings.open, settings.close) for record in data]
    limit = model.context or 1 << 30
    for record, example in zip(data, examples, strict=True):
        thoughts = example.thoughts(settings.rate)
        longest = len(example.question) + max(len(example.reasoning) + thoughts, thoughts + 2 + len(example.answer))
        if longest > limit:
            raise DataError(
                f"{record.source or data.name} needs {longest} tokens, thoughts included, beyond the model's context "
                f"of {limit}; shorten it or leave it out."
            )
    return examples


def _begin(folder: Path, model: CausalLM, data: Dataset, settings: Settings) -> None:
    """Claim the directory, or see that it was begun with the same arguments."""
    now = json.loads(json.dumps(asdict(settings))) | {"model": fingerprint(model), "data": data.content_hash}
    path = folder / SETTINGS
    if path.exists():
        refuse_links(folder)
        before = json.loads(path.read_text())
        if (folder / LATENTS).exists():
            raise RunError(
                f"{folder} holds finished thoughts; train with data={folder / LATENTS}, or give another out."
            )
        different = [key for key in now if before.get(key) != now[key] and key != "save_every"]
        if different:
            raise RunError(
                f"{folder} was begun with another {different[0]}; give the same again to go on, or another out."
            )
        return
    if folder.is_file() or (folder.exists() and any(folder.iterdir())):
        raise RunError(f"{folder} is not empty; give another directory for the thoughts.")
    folder.mkdir(parents=True, exist_ok=True)
    durable.write_text(path, json.dumps(now, indent=1) + "\n")


@torch.no_grad()
def _check_mask(encoder: Encoder) -> None:
    """Raise unless what a compress token may not see changes nothing: some layers have their own idea of a mask."""
    size = encoder.model.vocab_size
    first = Example([0], [1 % size, 2 % size, 3 % size, 1 % size], [0])
    second = replace(first, reasoning=[2 % size, 2 % size, 3 % size, 1 % size])
    # With text seeing only itself, the first segment reaches the second compress token through nothing else.
    plans = [layout([example], rate=2, span=1) for example in (first, second)]
    alone = torch.eye(plans[0].visible.shape[1], dtype=torch.bool)
    plans = [replace(p, visible=torch.where(p.compress[:, :, None], p.visible, alone)) for p in plans]
    with evaluating(encoder):
        laws = [encoder(plan) for plan in plans]
    if not torch.allclose(laws[0][1], laws[1][1], atol=1e-5) or torch.allclose(laws[0][0], laws[1][0], atol=0, rtol=0):
        raise ModelError(
            f"{type(encoder.model.pretrained).__name__} does not obey an attention mask of one's own; take a model "
            "with ordinary attention in every layer."
        )


def _train(
    encoder: Encoder,
    decoder: CausalLM,
    data: Dataset,
    examples: list[Example],
    folder: Path,
    settings: Settings,
    progress: Progress,
) -> list[float]:
    """Every step that is left; the losses of all."""
    total = sum(settings.steps)
    modules = {"encoder": encoder, "decoder": decoder}
    path, _ = checkpoint.latest(folder / CHECKPOINTS)
    step, losses, optimizer, trained = 0, [], None, ""
    if path is not None:
        step = int(path.name.removeprefix("step-"))
        trained = settings.phase(step - 1)
        optimizer = _optimizer(modules, trained, settings)
        losses = checkpoint.load(path, modules, optimizer)["losses"]
    stop: list[bool] = []
    batches = _batches(data, settings, step)
    progress(step, total)
    with interruptible(lambda: bool(stop.append(True)) or len(stop) == 1):
        while step < total:
            if optimizer is None or settings.phase(step) != trained:
                trained = settings.phase(step)
                optimizer = _optimizer(modules, trained, settings)
            losses.append(_step(encoder, decoder, [examples[i] for i in next(batches)], optimizer, step, settings))
            step += 1
            progress(step, total)
            if stop or step == total or step % settings.save_every == 0:
                checkpoint.save(folder / CHECKPOINTS, step, modules, optimizer, {"losses": losses}, keep=1)
            if stop:
                raise KeyboardInterrupt
    return losses


def _optimizer(modules: dict[str, Any], phase: str, settings: Settings) -> torch.optim.AdamW:
    """Over what the phase trains; the rest is frozen."""
    parameters = []
    for name, module in modules.items():
        module.requires_grad_(phase in (name, "jointly"))
        module.train(phase in (name, "jointly"))
        parameters += [p for p in module.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)


def _step(
    encoder: Encoder,
    decoder: CausalLM,
    examples: list[Example],
    optimizer: torch.optim.AdamW,
    step: int,
    settings: Settings,
) -> float:
    devices = [decoder.device] if decoder.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):  # dropout is derived, so that a resumed run drops the same units
        torch.manual_seed(derived_seed(settings.seed, "dropout/latent", step))
        laws = encoder(layout(examples, settings.rate, settings.span))
        counts = [e.thoughts(settings.rate) for e in examples]
        loss = -answer_logp(decoder, examples, laws, counts, settings.open, settings.close).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
    value = float(loss.detach())
    if value != value or value in (float("inf"), float("-inf")):
        raise RunError(f"the loss is {value} at step {step + 1}; lower learning_rate and begin again in another out.")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    nn.utils.clip_grad_norm_(parameters, settings.clip)
    optimizer.step()
    return value


def _batches(data: Dataset, settings: Settings, step: int) -> Iterator[list[int]]:
    """The records of each step from one on, in orders derived from (seed, epoch)."""
    at, size = step * settings.batch_size, len(data)
    while True:
        yield [data.order(i // size, settings.seed)[i % size] for i in range(at, at + settings.batch_size)]
        at += settings.batch_size


def _export(
    encoder: Encoder, data: Dataset, examples: list[Example], folder: Path, settings: Settings, progress: Progress
) -> None:
    """Write each record with its thoughts; whole batches that a killed call has written stay."""
    encoder.requires_grad_(False)
    aside = folder / f"{durable.WRITING}{LATENTS}"
    done = _whole_lines(aside, settings.batch_size)
    progress(done, len(examples))
    with aside.open("ab") as file:
        for start in range(done, len(examples), settings.batch_size):
            part = range(start, min(start + settings.batch_size, len(examples)))
            with evaluating(encoder), torch.no_grad():
                laws = encoder(layout([examples[i] for i in part], settings.rate, settings.span))
            best = laws.float().topk(min(settings.top_k, laws.shape[-1] - len(encoder.never)), dim=-1)
            weight = best.values / best.values.sum(-1, keepdim=True)
            counts = [examples[i].thoughts(settings.rate) for i in part]
            rows = zip(part, best.indices.cpu().split(counts), weight.cpu().split(counts), strict=True)
            for i, index, share in rows:
                file.write(_line(data[i], examples[i], index, share, encoder.model))
            file.flush()
            os.fsync(file.fileno())
            progress(part.stop, len(examples))
    aside.replace(folder / LATENTS)
    durable.flush(folder)
    durable.remove(folder / CHECKPOINTS)  # two models with their optimizer; nothing goes on from here


def _whole_lines(path: Path, batch: int) -> int:
    """How many lines of whole batches there are (another batch would differ in the last bit); the rest is cut away."""
    if not path.exists():
        return 0
    with path.open("r+b") as file:
        ends = [0]
        for line in file:
            if line.endswith(b"\n"):
                ends.append(ends[-1] + len(line))
        done = (len(ends) - 1) // batch * batch
        file.truncate(ends[done])
    return done


def _line(record: Record, example: Example, index: Tensor, weight: Tensor, model: CausalLM) -> bytes:
    row = {**record.extra, "prompt": record.prompt, "reasoning": model.decode(example.reasoning)}
    row |= {"completion": model.decode(example.answer)}
    row |= {name: value for name in ("answer", "id") if (value := getattr(record, name)) is not None}
    row[COLUMN] = to_column(index, weight, model)
    return json.dumps(row, default=told).encode() + b"\n"
