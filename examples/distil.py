"""Distil a teacher into a smaller student on the student's own samples, and see how near it came.

    python examples/distil.py [--steps 60] [--out runs/distil]

Everything is made here in seconds, so the script needs no download. With checkpoints of your own, replace the two
calls of ``fit`` on random weights by ``CausalLM.load("path or hub id")``.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from leibler.data import Brackets
from leibler.measure import compare, evaluate
from leibler.policy import character_tokenizer, tiny_llama
from leibler.train import fit


def main(out: Path, steps: int = 60, batch_size: int = 64, questions: int = 100) -> dict[str, dict[str, float]]:
    """Returns the numbers of the student before and after distillation."""
    task = Brackets(depth=3, length=8)
    train, held_out = task.split(train=2000, heldout=questions, seed=0)
    tokenizer = character_tokenizer(task.alphabet)
    teacher = tiny_llama(tokenizer, hidden=64, layers=2, heads=4)
    student = tiny_llama(tokenizer, hidden=32, layers=1, heads=4)
    size = {"batch_size": batch_size, "max_new_tokens": 8, "learning_rate": 3e-3, "quiet": True}

    teacher = fit("sft", student=teacher, data=train, out=out / "teacher", steps=2 * steps, **size).policy
    student = fit("sft", student=student, data=train, out=out / "student", steps=steps // 2, **size).policy
    start = student.copy()
    distilled = fit("gkd", student=student, teacher=teacher, data=train, out=out / "gkd", steps=steps, **size).policy

    found = {}
    for name, model in {"before": start, "after": distilled}.items():
        near = compare(model, teacher, held_out)
        right = evaluate(model, held_out, n_samples=4, max_new_tokens=8)
        found[name] = {
            "forward_kl": near["divergence/forward_kl"],
            "reverse_kl": near["divergence/reverse_kl"],
            "pass@1": right["pass@1"],
        }
        print(f"{name:>7}: " + "  ".join(f"{k} {v:.3f}" for k, v in found[name].items()))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=None, help="a new directory; a temporary one by default")
    arguments = parser.parse_args()
    main(arguments.out or Path(tempfile.mkdtemp(prefix="leibler-")), arguments.steps)
