"""Held-out numbers while a run goes on: cheap, without gradient, the same at every call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from leibler.divergence import Entropy, ForwardKL, ReverseKL, SampledLogProb
from leibler.fused import Linear, TargetRows, Want, functionals

if TYPE_CHECKING:
    from leibler.data import Dataset
    from leibler.policy import CausalLM


@torch.no_grad()
def validate(
    models: Mapping[str, CausalLM], data: Dataset, *, temperature: float, max_new_tokens: int, limit: int = 128
) -> dict[str, float]:
    """Mean ``nll`` and ``entropy`` on completions, both KLs to the teacher if there is one, greedy ``accuracy``.

    Args:
        models: ``policy`` and, if the run has one, ``teacher``.
        data: held-out records; the first ``limit`` are used.
    """
    from leibler.policy import right_pad, sample

    policy = models["policy"]
    mode = policy.training
    policy.eval()
    records = data.records[:limit]
    out: dict[str, float] = {}
    try:
        pairs = [
            (policy.encode_prompt(r.prompt), policy.encode_completion(text))
            for r in records
            if (text := r.completion if r.completion is not None else r.chosen) is not None
        ]
        sums: dict[str, float] = {}
        events = 0
        for start in range(0, len(pairs), 32):
            tokens, attention, mask = (x.to(policy.device) for x in right_pad(pairs[start : start + 32]))
            wants = [Want(SampledLogProb()), Want(Entropy())]
            heads = []
            for name in ("policy", "teacher"):
                if name in models:
                    model = models[name]
                    heads.append(Linear(model(tokens, attention)[:, :-1][mask], *model.head(), temperature))
            names = ["nll", "entropy"]
            if len(heads) > 1:
                wants += [Want(ForwardKL(), 0), Want(ReverseKL(), 0)]
                names += ["ForwardKL(teacher)", "ReverseKL(teacher)"]
            targets = [TargetRows((h,)) for h in heads[1:]]
            values = functionals(heads[0], wants, targets, token=tokens[:, 1:][mask], vocab=policy.vocab_size)
            for name, value in zip(names, values, strict=True):
                sums[name] = sums.get(name, 0.0) + float(value.double().sum()) * (-1 if name == "nll" else 1)
            events += int(mask.sum())
        out.update({name: total / events for name, total in sums.items()})
        if data.check is not None:
            prompts = [policy.encode_prompt(r.prompt) for r in records]
            zeros = torch.zeros(len(prompts), max_new_tokens, dtype=torch.float64)
            answers = [policy.decode(c) for c in sample(policy, prompts, uniforms=zeros, temperature=0).completions()]
            out["accuracy"] = sum(data.check(r, a) for r, a in zip(records, answers, strict=True)) / len(records)
    finally:
        policy.train(mode)
    return out
