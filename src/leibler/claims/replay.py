"""Learning without forgetting: two languages over the same letters, learnt one after the other."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from leibler.claims.framework import claim
from leibler.claims.tables import Build, of
from leibler.data import Dataset, Record
from leibler.policy import CausalLM, character_tokenizer, right_pad, tiny_llama
from leibler.policy.randomness import generator
from leibler.train import Recipe, fit

LETTERS = "abcdefghijkl"
LENGTH = 16
SEEDS = (0, 1)


def _language(number: int) -> Tensor:
    """The law of the next letter after each letter."""
    noise = torch.randn(len(LETTERS), len(LETTERS), generator=generator(number, "language"), dtype=torch.float64)
    return (2.5 * noise).softmax(-1)


def _texts(number: int, count: int, seed: int) -> Dataset:
    law, source = _language(number), generator(seed, "texts", number)
    at = torch.randint(len(LETTERS), (count,), generator=source)
    letters = [at]
    for _ in range(LENGTH - 1):
        at = torch.multinomial(law[at], 1, generator=source)[:, 0]
        letters.append(at)
    rows = torch.stack(letters, 1).tolist()
    return Dataset(tuple(Record("", completion="".join(LETTERS[i] for i in row)) for row in rows), f"language {number}")


def _model(seed: int) -> CausalLM:
    return tiny_llama(character_tokenizer(LETTERS), hidden=32, layers=2, heads=4, seed=seed)


def _trained(recipe: Recipe, model: CausalLM, data: object, **options: object) -> CausalLM:
    student = model.copy().requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"batch_size": 32, "quiet": True, "learning_rate": 3e-3, **options}
        return fit(recipe, student=student, data=data, out=folder, **settings).policy  # type: ignore[arg-type]


@torch.no_grad()
def _loss(model: CausalLM, data: Dataset) -> float:
    """Nats per letter."""
    pairs = [(model.encode_prompt(r.prompt), model.encode_completion(r.completion or "")) for r in data]
    tokens, attention, mask = right_pad(pairs)
    logp = (model(tokens, attention) @ model.head()[0].t())[:, :-1, : model.vocab_size].log_softmax(-1)
    return float(-logp.gather(-1, tokens[:, 1:, None])[..., 0][mask].mean())


@claim(
    "gere",
    "While the student is its initial self no activation has left its band, so the margin has neither value nor "
    "gradient; once it has moved there is something to hold it back",
    "loss/hidden(reference) exactly 0 at the first step, and above 0 at the five steps after it",
)
def the_band_holds_what_was(build: Build = of("gere")) -> tuple[str, bool]:
    data = {"train": _texts(1, 64, 1), "general": _texts(0, 16, 2)}
    with tempfile.TemporaryDirectory() as folder:
        fit(build(), student=_model(0), data=data, out=folder, steps=6, learning_rate=1e-2, quiet=True)
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    first, *later = [json.loads(line).get("loss/hidden(reference)", 0.0) for line in lines]
    return f"{first:.3g} at the first step, then {later[0]:.3g} to {later[-1]:.3g}", first == 0 < min(later)


def _forgetting(build: Build, seed: int) -> dict[str, tuple[float, float]]:
    """Held-out nats per letter of the first and the second language, by what is done."""
    old, new, general = _texts(0, 2000, 1), _texts(1, 2000, 2), _texts(0, 100, 3)
    held_out = [_texts(number, 256, 9) for number in (0, 1)]
    base = _trained(of("sft")(), _model(seed), old, steps=300, decay="cosine", seed=seed)
    after = {"before": base, "no replay": _trained(of("sft")(), base, new, steps=100, seed=seed)}
    for name, margin, steps in (("replay", 0.0, 100), ("replay and margin", 0.5, 150)):
        recipe = build(share=1.0, margin=margin)
        after[name] = _trained(recipe, base, {"train": new, "general": general}, steps=steps, seed=seed)
    return {name: (_loss(model, held_out[0]), _loss(model, held_out[1])) for name, model in after.items()}


@claim(
    "gere",
    "A few replayed texts beside a new language keep most of the old one, and the margin on activations keeps more of "
    "it where the new one is learnt as far. (It costs steps: 150 against 100; and its coefficient is 0.5, for the "
    "published 100 all but stops the learning at this size.)",
    "held-out loss of the old language: no replay > replay > replay and margin, each by 0.02 nats a letter; that of "
    "the new one with the margin at most 0.05 above replay's; means of two seeds",
    full=True,
)
def the_margin_forgets_less(build: Build = of("gere")) -> tuple[str, bool]:
    runs = [_forgetting(build, seed) for seed in SEEDS]
    mean = {n: [sum(r[n][i] for r in runs) / len(runs) for i in (0, 1)] for n in runs[0]}
    shown = "; ".join(f"{name}: old {old:.3f}, new {new:.3f}" for name, (old, new) in mean.items())
    none, replay, margin = (mean[n] for n in ("no replay", "replay", "replay and margin"))
    order = none[0] > replay[0] + 0.02 and replay[0] > margin[0] + 0.02
    return shown, order and margin[1] < replay[1] + 0.05
