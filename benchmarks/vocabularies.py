"""What alignment through the text keeps of a teacher with another tokenizer, measured on models made on the spot.

    python benchmarks/vocabularies.py                     # a minute or two
    python benchmarks/vocabularies.py --steps 600 --teacher-steps 1500

Two teachers are trained on the same text with the same steps, one on the student's byte-pair encoding and one on a
larger one. Equal students then learn from few records: from their text alone, from the teacher of their own tokenizer,
and from the other one through the text; the latter two also with the text's likelihood beside. Through the text,
entries of one side only are in the cell of their first piece (what `align=text` does) or all in one bucket. Everything
is judged on held-out text: bits per byte, and the forward KL to each teacher.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from leibler.data import Dataset, Record, load
from leibler.policy import CausalLM, logprobs, right_pad, tiny_llama, train_bpe, vocabulary
from leibler.policy.vocabulary import TextAlignment
from leibler.recipes.distillation import kd
from leibler.train import Recipe, fit
from leibler.train.aligned import event_states
from leibler.train.validation import validate


def model(texts: list[str], entries: int, hidden: int, seed: int) -> CausalLM:
    return tiny_llama(train_bpe(texts, entries), hidden=hidden, layers=1, heads=4, max_length=512, seed=seed)


def bits_per_byte(made: CausalLM, held_out: list[Record]) -> float:
    """Comparable between tokenizers, which a number per token is not."""
    total, size = 0.0, 0
    with torch.no_grad():
        for at in range(0, len(held_out), 16):
            part = held_out[at : at + 16]
            rows = [(made.encode_prompt(r.prompt), made.encode_completion(r.completion or "")) for r in part]
            total -= float(logprobs(made, *right_pad(rows)).double().sum())
            size += sum(len((r.completion or "").encode()) for r in part)
    return total / size / math.log(2)


def distance(student: CausalLM, teacher: CausalLM, held_out: list[Record]) -> dict[str, float]:
    """Forward KL to a teacher in nats: per position, or per shared position over common cells."""
    aligned = {} if student.tokenizer is teacher.tokenizer else {"teacher": TextAlignment(student, teacher)}
    models = {"policy": student, "teacher": teacher}
    data = Dataset(tuple(held_out), "held out")
    return validate(models, data, temperature=1.0, max_new_tokens=1, limit=len(held_out), alignments=aligned)


def coverage(student: CausalLM, teacher: CausalLM, held_out: list[Record]) -> dict[str, float]:
    """Shares of positions that both tokenizations have, and of the mass there on entries that both have."""
    alignment = TextAlignment(student, teacher)
    rows = [(student.encode_prompt(r.prompt), student.encode_completion(r.completion or "")) for r in held_out]
    tokens, attention, mask = right_pad(rows)
    reading = alignment.read(tokens, attention, mask)
    found = {"positions": float(reading.present.float().mean())}
    with torch.no_grad():
        states = (
            student(tokens, attention)[:, :-1][mask],
            event_states(teacher(reading.tokens, reading.attention), reading),
        )
    for name, made, hidden, twins, cells in zip(
        ("student", "teacher"), (student, teacher), states, alignment.twins, alignment.maps, strict=True
    ):
        here = hidden[reading.present]
        p = torch.softmax(here @ made.head()[0].detach()[: made.vocab_size].T, -1).mean(0)
        found[f"{name}'s mass on entries of both"] = float(p[twins.cell >= 0].sum())
        found[f"{name}'s mass in no cell"] = float(p[cells.cell < 0].sum())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher-steps", type=int, default=250)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--records", type=int, default=200, help="that the students see")
    parser.add_argument("--student-entries", type=int, default=400)
    parser.add_argument("--teacher-entries", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    started = time.monotonic()

    records = [Record(r.prompt[-24:], completion=(r.completion or "")[:72]) for r in load("corpus:stdlib").records]
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(given.seed)).tolist()
    records = [records[i] for i in order]
    held_out, few, many = records[:64], records[64 : 64 + given.records], records[64:2000]
    texts = [r.prompt + (r.completion or "") for r in many[:1000]]
    settings = {"batch_size": 16, "decay": "cosine", "warmup": 10, "quiet": True, "seed": given.seed}

    with tempfile.TemporaryDirectory() as folder:

        def trained(
            name: str, recipe: str | Recipe, made: CausalLM, data: list[Record], steps: int, **options: object
        ) -> CausalLM:
            before = time.monotonic()
            run = fit(
                recipe, student=made, data=Dataset(tuple(data), name), out=Path(folder) / name, steps=steps, **settings,
                learning_rate=3e-3, **options,
            )  # fmt: skip
            print(f"  {name}: {steps} steps, {time.monotonic() - before:.0f} s", flush=True)
            return run.policy

        student = model(texts, given.student_entries, hidden=32, seed=given.seed)
        own, other = model(texts, given.student_entries, 64, 7), model(texts, given.teacher_entries, 64, 7)
        own.tokenizer = student.tokenizer
        own = trained("teacher-own", "sft", own, many, given.teacher_steps)
        other = trained("teacher-other", "sft", other, many, given.teacher_steps)

        students = {"untrained": student.copy()}

        def learn(name: str, recipe: str | Recipe, **options: object) -> None:
            made = model(texts, given.student_entries, hidden=32, seed=given.seed)
            made.tokenizer = student.tokenizer
            students[name] = trained(name.replace(" ", "-"), recipe, made, few, given.steps, **options)

        learn("text alone", "sft")
        learn("its own teacher", "kd", teacher=own)
        learn("its own teacher, and the text", kd(imitate=1.0), teacher=own)
        learn("other teacher, align=text", "kd", teacher=other, align="text")
        learn("other teacher, align=text, and the text", kd(imitate=1.0), teacher=other, align="text")
        with mock.patch.object(vocabulary, "TextAlignment", partial(TextAlignment, rest="bucket")):
            learn("other teacher, one bucket", "kd", teacher=other, align="text")

        print("\n| held-out text | |\n|---|--:|")
        for name, value in coverage(students["other teacher, align=text"], other, held_out).items():
            print(f"| {name} | {value:.3f} |")
        print("\n| | bits per byte | KL to own teacher | KL to other teacher |\n|---|--:|--:|--:|")
        for name, made in (("teacher, own tokenizer", own), ("teacher, other tokenizer", other)):
            print(f"| {name} | {bits_per_byte(made, held_out):.3f} | | |")
        for name, made in students.items():
            kl = [distance(made, teacher, held_out)["ForwardKL(teacher)"] for teacher in (own, other)]
            print(f"| student: {name} | {bits_per_byte(made, held_out):.3f} | {kl[0]:.3f} | {kl[1]:.3f} |")
    print(f"\n{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
