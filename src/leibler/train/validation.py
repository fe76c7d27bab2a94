"""Held-out numbers while a run goes on: cheap, without gradient, the same at every call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from leibler.divergence import Entropy, ForwardKL, ReverseKL, SampledLogProb
from leibler.environment.dialogue import encode_record
from leibler.fused import TargetRows, Want, functionals
from leibler.objective.rows import Rows
from leibler.train.aligned import event_states
from leibler.train.masking import validate_masked
from leibler.train.sources import silenced

if TYPE_CHECKING:
    from leibler.data import Dataset
    from leibler.fused.coarse import OtherVocabulary
    from leibler.policy import CausalLM, MaskedLM
    from leibler.policy.vocabulary import TextAlignment


@torch.no_grad()
def validate(
    models: Mapping[str, CausalLM],
    data: Dataset,
    *,
    temperature: float,
    max_new_tokens: int,
    limit: int = 128,
    alignments: Mapping[str, TextAlignment] | None = None,
) -> dict[str, float]:
    """Mean ``nll`` and ``entropy`` on completions, both KLs to the teacher if there is one, greedy ``accuracy``.

    Of a dialogue, all turns are read, and what stands between them does not count.

    Of a masked language model: `validate_masked`.

    Args:
        models: ``policy`` and, if the run has one, ``teacher``.
        data: held-out records; the first ``limit`` are used.
        alignments: of the models of another tokenizer; the KLs to such a teacher are those of the laws of common cells,
            a mean over the positions that both share, and ``aligned(teacher)`` is their share.
    """
    from leibler.policy import right_pad, sample

    policy = models["policy"]
    mode = policy.training
    policy.eval()
    records = data.records[:limit]
    out: dict[str, float] = {}
    try:
        if policy.masked:
            given = {"temperature": temperature, "max_new_tokens": max_new_tokens, "limit": limit}
            return validate_masked(cast("MaskedLM", policy), data, **given)
        read = [
            encode_record(policy, r, None if r.completion is not None else r.chosen)
            for r in records
            if r.completion is not None or r.chosen is not None
        ]
        sums: dict[str, float] = {}
        events = shared = 0
        for start in range(0, len(read), 32):
            part = read[start : start + 32]
            number = torch.arange(len(part))
            padded = Rows(*right_pad([(prompt, answer) for prompt, answer, _ in part]), number, number)
            held = silenced(padded, [silent for _, _, silent in part]).to(policy.device)
            rows = tokens, attention, mask = [held.tokens, held.attention, held.mask]
            wants = [Want(SampledLogProb()), Want(Entropy())]
            head = policy.linear(policy(tokens, attention)[:, :-1][mask], temperature)
            names, targets, here = ["nll", "entropy"], [], int(mask.sum())
            if "teacher" in models:
                wants += [Want(ForwardKL(), 0), Want(ReverseKL(), 0)]
                names += ["ForwardKL(teacher)", "ReverseKL(teacher)"]
                target, here = _target(models["teacher"], (alignments or {}).get("teacher"), rows, temperature)
                targets = [target]
            values = functionals(head, wants, targets, token=tokens[:, 1:][mask], vocab=policy.vocab_size)
            for name, value in zip(names, values, strict=True):
                sums[name] = sums.get(name, 0.0) + float(value.double().sum()) * (-1 if name == "nll" else 1)
            events += int(mask.sum())
            shared += here
        out.update({name: total / max(shared if "teacher" in name else events, 1) for name, total in sums.items()})
        if events and alignments and "teacher" in alignments:
            out["aligned(teacher)"] = shared / events
        if data.check is not None:
            prompts = [policy.encode_prompt(r.prompt) for r in records]
            zeros = torch.zeros(len(prompts), max_new_tokens, dtype=torch.float64)
            answers = [policy.decode(c) for c in sample(policy, prompts, uniforms=zeros, temperature=0).completions()]
            out["accuracy"] = sum(data.check(r, a) for r, a in zip(records, answers, strict=True)) / len(records)
    finally:
        policy.train(mode)
    return out


def _target(
    teacher: CausalLM, alignment: TextAlignment | None, rows: list[Tensor], temperature: float
) -> tuple[TargetRows | OtherVocabulary, int]:
    """The teacher's rows at the events of a batch, and at how many events it says something."""
    tokens, attention, mask = rows
    if alignment is None:
        leaf = teacher.linear(teacher(tokens, attention)[:, :-1][mask], temperature)
        return TargetRows((leaf,)), int(mask.sum())
    reading = alignment.read(tokens, attention, mask)
    hidden = event_states(teacher(reading.tokens, reading.attention), reading)
    law = TargetRows((teacher.linear(hidden, temperature),))
    return alignment.merged(law, reading), int(reading.present.sum())
