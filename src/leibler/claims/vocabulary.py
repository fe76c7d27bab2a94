"""What distillation across an extended vocabulary claims, run on small models with two new tokens."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from leibler.claims.framework import claim
from leibler.claims.tables import Build, kl, of
from leibler.data import Record
from leibler.policy import CausalLM, character_tokenizer, extend, tiny_llama
from leibler.train import fit

WORDS = ("ab", "abc")
"""One begins the other, so that what is left of it must be told apart."""
TEXTS = ("abcab fab", "cab abc", "ab", "fed")


def _models() -> tuple[CausalLM, CausalLM]:
    """A student with two new tokens, and the model without them."""
    old = character_tokenizer("abcdef ")
    student = extend(tiny_llama(old, hidden=16, layers=1, heads=2, seed=3), WORDS, "random")
    return student, tiny_llama(old, hidden=16, layers=1, heads=2, seed=1)


def _law(model: CausalLM, tokens: list[int]) -> Tensor:
    """Log-probabilities of the next token."""
    with torch.no_grad():
        logits = model.network(input_ids=torch.tensor([tokens])).logits[0, -1, : model.vocab_size]
    return logits.double().log_softmax(-1)


def _read(model: CausalLM, text: str) -> list[int]:
    """The tokens of what stands before a place, from the begin token on."""
    return [*model.encode_prompt(""), *model.encode_completion(text)[:-1]]


def _lifted(teacher: CausalLM, student: CausalLM, text: str) -> Tensor:
    """The old model's law over the student's vocabulary: products over pieces, taken off where they begin."""
    context = _read(teacher, text)
    law = _law(teacher, context)
    out = torch.zeros(student.vocab_size, dtype=torch.float64)
    out[: teacher.vocab_size] = law.exp()
    a, b, c = teacher.encode_completion("abc")[:-1]
    ab = float((law[a] + _law(teacher, [*context, a])[b]).exp())
    abc = ab * float(_law(teacher, [*context, a, b])[c].exp())
    first, second = (student.encode_completion(word)[0] for word in WORDS)
    out[a], out[first], out[second] = out[a] - ab, ab - abc, abc
    return out


def _contexts(student: CausalLM) -> list[tuple[list[int], str]]:
    """Every context that is predicted from, as the student's tokens and as text."""
    found = []
    for text in TEXTS:
        begin, ids = student.encode_prompt(""), student.encode_completion(text)
        found += [([*begin, *ids[:t]], student.decode(ids[:t])) for t in range(len(ids))]
    return found


def _expected() -> tuple[float, float]:
    """The mean KL of the lifted law to the student's, and of the old law to the student's pushed onto old tokens."""
    student, teacher = _models()
    lifted, pushed, contexts = 0.0, 0.0, _contexts(student)
    first = student.encode_completion("a")[0]
    new = [student.encode_completion(word)[0] for word in WORDS]
    for tokens, text in contexts:
        p, tau = _law(student, tokens), _lifted(teacher, student, text)
        lifted += float(kl(tau.clamp_min(1e-300).log(), p))
        old = p.exp()[: teacher.vocab_size].clone()
        old[first] += p.exp()[new].sum()
        pushed += float(kl(_law(teacher, _read(teacher, text)), old.log()))
    return lifted / len(contexts), pushed / len(contexts)


def _loss(recipe: Any) -> float:
    student, teacher = _models()
    records = [Record("", completion=text) for text in TEXTS]
    with tempfile.TemporaryDirectory() as folder:
        size: dict[str, Any] = {"steps": 1, "batch_size": len(records), "learning_rate": 1e-9, "align": "text"}
        run = fit(recipe, student=student, teacher=teacher, data=records, out=Path(folder) / "run", quiet=True, **size)
        return run.metrics["loss"]


@claim(
    "vocabulary-expansion",
    "A new token is compared with the product over the pieces that it was before, and what begins with it is taken "
    "off; comparing on the old vocabulary instead is blind to how mass splits among new tokens",
    "the loss is the KL of the law lifted by hand, to 1e-5, and at least 1% above that of the laws pushed onto the "
    "old tokens",
)
def expansion_lifts_the_old_law(build: Build = of("vocabulary-expansion")) -> tuple[str, bool]:
    lifted, pushed = _expected()
    found = _loss(build(threshold=0.0))
    shown = f"loss {found:.6f}, by hand {lifted:.6f}; pushed onto old tokens {pushed:.6f}"
    return shown, abs(found - lifted) < 1e-5 * lifted and found > 1.01 * pushed
