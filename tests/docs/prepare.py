"""What the commands of the pages expect to find: models, a run, files of records. Made in a second, untrained."""

from __future__ import annotations

import json
import string
from pathlib import Path

from leibler.policy import character_tokenizer, tiny_llama, train_bpe
from leibler.train import fit


def prepare(folder: Path) -> None:
    """Fill a folder."""
    tokenizer = character_tokenizer(string.printable[:95])
    large = tiny_llama(tokenizer, hidden=32, layers=1, heads=2, seed=1)
    small = tiny_llama(tokenizer, hidden=16, layers=1, heads=2)
    other = tiny_llama(train_bpe(["1 + 1 = 2"], size=262), hidden=32, layers=1, heads=2)
    for name, model in {"large": large, "small": small, "other": other}.items():
        model.save(folder / "models" / name)
    lines = {
        "prompts": [{"prompt": f"{i}+1=", "completion": str(i + 1), "answer": str(i + 1)} for i in range(24)],
        "pairs": [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(24)],
    }
    for name, rows in lines.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fit(
        "gkd", student=folder / "models" / "small", teacher=folder / "models" / "large", data=folder / "prompts.jsonl",
        out=folder / "runs" / "gkd", steps=2, batch_size=8, max_new_tokens=4, quiet=True,
        origin={"recipe": "gkd", "overrides": {}},
    )  # fmt: skip
