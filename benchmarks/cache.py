"""A teacher cache: bytes per token, reading beside a training step that consumes it, and the bias of each tail.

    python benchmarks/cache.py [--threads 2] [--repeats 5] [--part size|speed|bias]

Size: bytes on disk per completion token, beside full bfloat16 logits at the same vocabulary (151,936 entries). Speed:
tokens per second that `TeacherCache.target` gives, beside those that a step of `leibler train kd` with a tiny student
takes, in turn, the fastest of the repeats (files in the page cache on both sides). Bias: value and gradient of a
divergence to a Zipf-like teacher that is known on its top k, beside the whole vocabulary's, in float64; the student is
the teacher's law to the power 0.8 times log-normal noise (sd 0.7), so flatter than it, as small models are.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from leibler.cache import TeacherCache, write
from leibler.data import Dataset, Record
from leibler.divergence import get
from leibler.fused import Coarse, Linear, TargetRows, TopK, Want, functionals
from leibler.objective import Rows
from leibler.policy import CausalLM, character_tokenizer, right_pad, tiny_llama
from leibler.policy.randomness import generator
from leibler.train import fit

DIVERGENCES = (
    "forward_kl", "reverse_kl", "jeffreys", "jensen_shannon", "skew_forward_kl", "skew_reverse_kl", "renyi", "tsallis",
    "hellinger", "total_variation", "chi_squared", "reverse_chi_squared", "cauchy_schwarz", "adaptive_kl",
)  # fmt: skip
PARAMETERS: dict[str, dict[str, float]] = {"renyi": {"alpha": 0.5}, "tsallis": {"q": 1.5}}


def alphabet(entries: int) -> str:
    """Distinct characters for a tokenizer of so many entries (four of them special)."""
    return "".join(chr(0x10000 + i) for i in range(entries - 4))


def setting(vocab: int, rows: int, length: int, layers: int, hidden: int) -> tuple[CausalLM, CausalLM, Dataset]:
    """Teacher, student and records of ``length`` random characters each."""
    text = alphabet(vocab)
    tokenizer = character_tokenizer(text)
    models = [tiny_llama(tokenizer, hidden=hidden, layers=layers, heads=2, seed=s) for s in (1, 0)]
    picks = torch.randint(len(text), (rows, length + 1), generator=generator(0, "benchmark")).tolist()
    records = [Record(text[row[0]], completion="".join(text[i] for i in row[1:])) for row in picks]
    return models[0], models[1], Dataset(tuple(records), name="random")


def size() -> None:
    vocab = 151_936
    teacher, _, data = setting(vocab, 16, 127, 1, 32)
    print(f"vocabulary {vocab}: full bf16 logits {2 * vocab} bytes per token")
    with tempfile.TemporaryDirectory() as folder:
        for k, dtype in ((64, "float32"), (64, "float16"), (128, "float32"), (16, "float16")):
            began = time.perf_counter()
            cache = write(teacher, data, f"{folder}/{k}-{dtype}", top_k=k, dtype=dtype)
            rate = cache.tokens / (time.perf_counter() - began)
            each = sum(p.stat().st_size for p in cache.folder.glob("*.npy")) / cache.tokens
            print(
                f"  top {k:3d} {dtype}: {each:5.0f} bytes per token, 1/{2 * vocab / each:.0f}; written {rate:.0f} tok/s"
            )


def speed(repeats: int) -> None:
    for vocab, hidden in ((512, 32), (32_768, 64), (151_936, 64)):
        teacher, student, data = setting(vocab, 64, 127, 1, hidden)
        with tempfile.TemporaryDirectory() as folder:
            cache = write(teacher, data, f"{folder}/cache", top_k=64)
            batches = [data.records[i : i + 16] for i in range(0, 64, 16)]
            rows = [rows_of(batch, student) for batch in batches]
            read = taken = 0.0
            for number in range(repeats):
                began = time.perf_counter()
                for batch in rows:
                    cache.target(batch)
                read = max(read, cache.tokens / (time.perf_counter() - began))
                taken = max(taken, step(student, cache, data, Path(folder) / str(number)))
        ratio = f"read {read:,.0f} tok/s, a step takes {taken:,.0f}: {read / taken:.1f}x"
        print(f"vocabulary {vocab}, hidden {hidden}: {ratio}")


def rows_of(records: tuple[Record, ...], model: CausalLM) -> Rows:
    pairs = [(model.encode_prompt(r.prompt), model.encode_completion(r.completion or "")) for r in records]
    number = torch.arange(len(records))
    return Rows(*right_pad(pairs), number, torch.zeros_like(number), records=records)


def step(student: CausalLM, cache: TeacherCache, data: Dataset, out: Path) -> float:
    """Tokens per second of the fastest of three steps."""
    fit("kd", student=student, teacher=cache, data=data, out=out, steps=3, batch_size=16, quiet=True, max_new_tokens=8)
    lines = (out / "timings.jsonl").read_text().splitlines()
    return max(json.loads(line)["tokens_per_second"] for line in lines)


def bias() -> None:
    vocab, rows = 32_768, 64
    g = generator(0, "bias")
    rank = torch.rand(rows, vocab, generator=g, dtype=torch.float64).argsort(-1).argsort(-1) + 1.0
    q = (-1.3 * rank.log()).log_softmax(-1)
    noise = torch.randn(rows, vocab, generator=g, dtype=torch.float64)
    logits = (0.8 * q + 0.7 * noise).log_softmax(-1)
    eye = torch.eye(rows, dtype=torch.float64)
    model, full = Linear(eye, logits.T.contiguous().requires_grad_()), TargetRows((Linear(eye, q.T.contiguous()),))
    print(f"vocabulary {vocab}, teacher ~ rank^-1.3; value / full value (error of the gradient, relative)")
    masses, cuts = [], (8, 64, 512)
    targets = []
    for k in cuts:
        logp, token = q.topk(k)
        rest = q.scatter(1, token, -torch.inf).logsumexp(-1)
        targets += [Coarse(token, TopK(logp, rest), tail=tail) for tail in ("bucket", "renormalise")]
        p_rest = logits.detach().scatter(1, token, -torch.inf).logsumexp(-1).exp().mean()
        masses.append(f"k={k}: teacher {float(rest.exp().mean()):.3f}, student {float(p_rest):.3f}")
    print("  mass outside the top k: " + "; ".join(masses))
    print("  " + " " * 20 + "".join(f"k={k} {tail:<17}" for k in cuts for tail in ("bucket", "renormalise")))
    for name in DIVERGENCES:
        divergence = get(name, **PARAMETERS.get(name, {}))
        whole, slope = found(model, full, divergence)
        cells = []
        for target in targets:
            value, gradient = found(model, target, divergence)
            error = float((gradient - slope).norm() / slope.norm())
            cells.append(f"{value / whole:6.3f} ({error:5.3f})")
        print(f"  {name:<20}" + "".join(f"{cell:<22}" for cell in cells))


def found(model: Linear, target: TargetRows | Coarse, divergence: object) -> tuple[float, torch.Tensor]:
    (values,) = functionals(model, [Want(divergence, 0)], [target])  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(values.sum(), model.weight)
    return float(values.detach().mean()), gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--part", choices=("size", "speed", "bias"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    parts = {"size": size, "speed": lambda: speed(arguments.repeats), "bias": bias}
    for name, part in parts.items():
        if arguments.part in (None, name):
            print(f"-- {name}")
            part()


if __name__ == "__main__":
    main()
