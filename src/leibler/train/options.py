"""The options of a run that do not belong to the method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from leibler.errors import RunError


@dataclass(frozen=True)
class Options:
    """How long, how large, how fast, how often.

    Attributes:
        steps: optimiser steps.
        tokens: end instead with the step that brings the tokens trained on (the events of all optimiser batches) to so
            many, be that before or after ``steps``, by which schedules go on. Runs of different methods then compare.
        batch_size: sequences in an optimiser batch (over all processes).
        micro_batch_size: sequences in a forward pass; None: as many as 16,384 tokens allow. Changes no number but
            rounding.
        learning_rate, warmup, decay, weight_decay, beta1, beta2, max_grad_norm: of AdamW; ``warmup`` in steps,
            ``decay`` to zero over the run by a line or a cosine, or not at all; ``max_grad_norm=inf`` clips nothing.
        max_new_tokens, temperature: of sampled responses; every log-prob is taken at this temperature.
        rollouts: who samples the policy's responses: ``here``, ``vllm`` (an engine in this process) or
            ``vllm:http://HOST:PORT`` (a server); see `leibler.policy.vllm`.
        align: how other models' tokens are matched with the student's: ``tokens``, entry by entry, or ``text``,
            through the text that both read, for models of another tokenizer.
        seed: all randomness is derived from it.
        save_every: optimiser steps between checkpoints (0: only when interrupted); ``keep`` newest stay.
        validate_every: optimiser steps between validations (0: at the end only, if there is validation data); the first
            128 records are used.
        sample_every: steps between the samples that are written down.
        adapter_rank: train a LoRA adapter of this rank instead of the weights.
        gradient_checkpointing, dtype: as in Transformers.
        mixed_precision: Accelerate's: no, bf16 or fp16.
        guard_steps: steps in a row with a non-finite loss or gradient (each is skipped) that end the run.
        guard_draws: draws in a row for which the reward fails on every response that end the run.
        max_divergence, on_divergence: a bound on each measured divergence in nats per token, beyond which the run
            stops, or goes back to the last checkpoint with twice the term's coefficient (``rollback``).
        tensorboard: also write TensorBoard event files.
        trust_remote_code: run Python code that comes with a checkpoint.
    """

    steps: int = 200
    tokens: int | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    learning_rate: float = 1e-5
    warmup: int = 0
    decay: Literal["none", "linear", "cosine"] = "none"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    max_new_tokens: int = 64
    temperature: float = 1.0
    rollouts: str = "here"
    align: Literal["tokens", "text"] = "tokens"
    seed: int = 0
    save_every: int = 0
    keep: int = 2
    validate_every: int = 0
    sample_every: int = 10
    adapter_rank: int | None = None
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    guard_steps: int = 5
    guard_draws: int = 3
    max_divergence: float | None = None
    on_divergence: Literal["stop", "rollback"] = "stop"
    tensorboard: bool = False
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "max_new_tokens", "keep", "guard_steps", "guard_draws"):
            if getattr(self, name) < 1:
                raise RunError(f"{name}={getattr(self, name)} must be at least 1.")
        for name in ("save_every", "validate_every", "sample_every", "warmup"):
            if getattr(self, name) < 0:
                raise RunError(f"{name}={getattr(self, name)} must be at least 0.")
        if self.decay not in ("none", "linear", "cosine"):
            raise RunError(f"decay={self.decay!r} must be one of none, linear, cosine.")
        if self.align not in ("tokens", "text"):
            raise RunError(f"align={self.align!r} must be one of tokens, text.")
        for name in ("learning_rate", "temperature"):
            if not getattr(self, name) > 0:
                raise RunError(f"{name}={getattr(self, name)} must be greater than 0.")
        if not self.max_grad_norm > 0:
            raise RunError(f"max_grad_norm={self.max_grad_norm} must be greater than 0; inf switches clipping off.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise RunError(f"{name}={getattr(self, name)} must be at least 0 and below 1.")
        if not self.weight_decay >= 0:
            raise RunError(f"weight_decay={self.weight_decay} must be at least 0.")
        if self.tokens is not None and self.tokens < 1:
            raise RunError(f"tokens={self.tokens} must be at least 1; leave it out to train for a number of steps.")
        if self.adapter_rank is not None and self.adapter_rank < 1:
            raise RunError(f"adapter_rank={self.adapter_rank} must be at least 1; leave it out to train the weights.")
        if self.max_divergence is not None and not self.max_divergence > 0:
            raise RunError(f"max_divergence={self.max_divergence} must be greater than 0.")
        if self.on_divergence not in ("stop", "rollback"):
            raise RunError(f"on_divergence={self.on_divergence!r} must be one of stop, rollback.")
        if self.on_divergence == "rollback" and not self.save_every:
            raise RunError("on_divergence=rollback needs checkpoints, and save_every=0 writes none; set save_every.")
        if self.micro_batch_size is not None and self.micro_batch_size < 1:
            raise RunError(f"micro_batch_size={self.micro_batch_size} must be at least 1.")

    def rate(self, step: int) -> float:
        """The learning rate of optimiser step ``step`` (counted from 0)."""
        import math

        warm = min((step + 1) / self.warmup, 1.0) if self.warmup else 1.0
        done = min(max(step - self.warmup, 0) / max(self.steps - self.warmup, 1), 1.0)
        fall = {"none": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[self.decay]
        return self.learning_rate * warm * fall
