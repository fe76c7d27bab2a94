"""What the ways to choose data claim, on texts and models that are made up for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from leibler.claims.framework import claim
from leibler.claims.tables import F64
from leibler.data import Dataset, Record
from leibler.data.selection import Selection
from leibler.fused import Linear
from leibler.measure.selecting import llkd, miniplm

Select = Callable[..., Selection]
SYMBOLS = 20


class Ngram(nn.Module):
    """A language model that is a table: the law of the next symbol given the last two.

    Symbol 0 begins every text; none ends.
    """

    pad_id, vocab_size = 0, SYMBOLS

    def __init__(self, logits: Float[Tensor, "first second next"]) -> None:
        super().__init__()
        self.logits = logits
        self.device = logits.device

    def encode_prompt(self, text: str) -> list[int]:
        return [0, *map(ord, text)]

    def encode_completion(self, text: str) -> list[int]:
        return list(map(ord, text))

    def forward(self, tokens: Int[Tensor, "batch time"], attention: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(tokens[:, :1]), tokens[:, :-1]], dim=1)
        return nn.functional.one_hot(before * SYMBOLS + tokens, SYMBOLS**2).to(F64)

    def linear(self, hidden: Float[Tensor, "n hidden"], temperature: float = 1.0) -> Linear:
        return Linear(hidden, self.logits.reshape(-1, SYMBOLS).t(), None, temperature)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _texts(logits: Tensor, count: int, length: int, seed: int) -> list[str]:
    """Texts drawn from a table (the symbol 0 is left out, so that they do not end)."""
    g = _generator(seed)
    law = logits.masked_fill(torch.arange(SYMBOLS) == 0, -torch.inf).softmax(-1)
    tokens = torch.zeros(count, length + 2, dtype=torch.long)
    for t in range(2, length + 2):
        tokens[:, t] = torch.multinomial(law[tokens[:, t - 2], tokens[:, t - 1]], 1, generator=g)[:, 0]
    return ["".join(map(chr, row)) for row in tokens[:, 2:].tolist()]


def _worlds() -> tuple[Tensor, Tensor, Tensor]:
    """Tables of easy text (the last symbol tells), hard text (the last two do) and noise."""
    easy = torch.randn(1, SYMBOLS, SYMBOLS, generator=_generator(1), dtype=F64).mul(2.5).expand(SYMBOLS, -1, -1)
    hard = torch.randn(SYMBOLS, SYMBOLS, SYMBOLS, generator=_generator(2), dtype=F64).mul(2.5)
    return easy.contiguous(), hard, torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS, dtype=F64)


def _corpus(count: int = 60, length: int = 64) -> tuple[Dataset, dict[str, Any]]:
    """Equal parts of easy text, hard text and noise, and models that counted other texts of each kind."""
    records, training = [], []
    for number, (name, table) in enumerate(zip(("easy", "hard", "noise"), _worlds(), strict=True)):
        records += [Record("", completion=t, extra={"kind": name}) for t in _texts(table, count, length, 10 + number)]
        training += _texts(table, 20 * count, length, 20 + number)
    seen = torch.full((SYMBOLS, SYMBOLS, SYMBOLS), 0.02, dtype=F64)
    for text in training:
        tokens = torch.tensor([0, 0, *map(ord, text)])
        seen.index_put_((tokens[:-2], tokens[1:-1], tokens[2:]), torch.tensor(1.0, dtype=F64), accumulate=True)
    two = seen / seen.sum(-1, keepdim=True)
    one = (seen.sum(0) / seen.sum((0, 2))[:, None]).expand(SYMBOLS, -1, -1)
    return Dataset(tuple(records), "made up"), {
        "teacher": Ngram(((two + one) / 2).log()),
        "reference": Ngram(one.log()),
    }


def _shares(found: Selection) -> dict[str, float]:
    """The share of each kind that was kept."""
    kinds = dict.fromkeys(r.extra["kind"] for r in found.records)
    kept = [r.extra["kind"] for r in found.kept]
    return {k: kept.count(k) / sum(r.extra["kind"] == k for r in found.records) for k in kinds}


def _by_teacher(dataset: Dataset, teacher: Any, reference: Any, share: float) -> Selection:
    """The control: what the teacher alone reads best."""
    even = Ngram(torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS, dtype=F64))
    return miniplm(dataset, teacher, even, share)  # type: ignore[arg-type]


@claim(
    "miniplm",
    "The difference of log-likelihoods keeps what is hard and can be learnt; the teacher's own likelihood keeps what "
    "is easy",
    "a third of easy text, hard text and noise kept: over 90% of the hard and none of the noise by the difference; by "
    "the teacher alone over half of the easy",
)
def miniplm_keeps_the_hard_and_learnable(select: Select = miniplm) -> tuple[str, bool]:
    corpus, models = _corpus()
    found, control = _shares(select(corpus, **models, share=1 / 3)), _shares(_by_teacher(corpus, **models, share=1 / 3))
    shown = "; ".join(
        f"{name}: " + ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
        for name, shares in (("difference", found), ("teacher alone", control))
    )
    return shown, found["hard"] > 0.9 and found["noise"] == 0.0 and control["easy"] > 0.5


def _labelled(count: int = 400) -> tuple[Dataset, dict[str, Any]]:
    """One-symbol labels of a teacher who errs where it is unsure, and a student who knows half of the questions."""
    g = _generator(5)
    right = torch.randint(1, SYMBOLS, (SYMBOLS, SYMBOLS), generator=g)
    sure = torch.where(torch.rand(SYMBOLS, SYMBOLS, generator=g) < 0.6, 8.0, 1.5).double()
    teacher = torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS, dtype=F64).scatter_(-1, right[..., None], sure[..., None])
    knows = torch.where(torch.rand(SYMBOLS, SYMBOLS, generator=g) < 0.5, 8.0, 0.0).double()
    student = torch.zeros(SYMBOLS, SYMBOLS, SYMBOLS, dtype=F64).scatter_(-1, right[..., None], knows[..., None])
    first, second = (torch.randint(1, SYMBOLS, (count,), generator=g) for _ in range(2))
    label = torch.multinomial(teacher[first, second].softmax(-1), 1, generator=g)[:, 0]
    rows = zip(first.tolist(), second.tolist(), label.tolist(), strict=True)
    records = tuple(
        Record(
            chr(a) + chr(b), completion=chr(c), extra={"right": c == int(right[a, b]), "known": bool(knows[a, b] > 0)}
        )
        for a, b, c in rows
    )
    return Dataset(records, "labelled"), {"teacher": Ngram(teacher), "student": Ngram(student)}


@claim(
    "llkd",
    "Where the teacher is sure and the student is not, labels are right and not yet known; each condition alone lets "
    "the other kind in",
    "labels kept: over 95% right and over 90% unknown to the student, against under 80% right among all and half "
    "unknown",
)
def llkd_keeps_right_and_unknown_labels(select: Select = llkd) -> tuple[str, bool]:
    data, models = _labelled()

    def share(records: Any, name: str) -> float:
        return sum(bool(r.extra[name]) for r in records) / len(records)

    kept = select(data, **models).kept
    right, unknown = share(kept, "right"), 1 - share(kept, "known")
    before, unknown_before = share(data, "right"), 1 - share(data, "known")
    shown = f"{len(kept)} of {len(data)} kept: {right:.0%} right, {unknown:.0%} unknown"
    shown += f"; all: {before:.0%} right, {unknown_before:.0%} unknown"
    return shown, right > 0.95 and unknown > 0.9 and before < 0.8 and unknown_before < 0.6
