"""Latent reasoning on the command line: both stages, the measurement, and going on after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leibler.policy import CausalLM, character_tokenizer, tiny_llama

LETTERS = "0123456789+=[]"


def leibler(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "leibler", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_llama(character_tokenizer(LETTERS), hidden=16, layers=1, heads=2).save(tmp_path / "model")
    rows = [
        {"prompt": f"{i}+{i}=", "reasoning": f"{i}+{i}", "completion": str(2 * i), "answer": str(2 * i)}
        | {"paths": [[str(i), "+"], [str(2 * i)]]}
        for i in range(12)
    ]
    (tmp_path / "reasoned.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


COMPRESS = (
    "represent", "latent", "--model", "model", "--data", "reasoned.jsonl", "--out", "latents", "--rate", "2",
    "--encoder-steps", "4", "--decoder-steps", "2", "--joint-steps", "2", "--batch-size", "4", "--top-k", "4",
    "--open", "[", "--close", "]", "--save-every", "2",
)  # fmt: skip


@pytest.mark.slow
def test_both_stages_and_the_measurement(folder: Path):
    first = leibler(*COMPRESS, cwd=folder)
    assert first.returncode == 0, first.stderr
    assert "12 records" in first.stdout
    assert "train 8/8" in first.stderr
    assert "left" in first.stderr
    again = leibler(*COMPRESS, cwd=folder)
    assert again.returncode == 2
    assert "holds finished thoughts" in again.stderr
    marks = ("recipe.open=[", "recipe.close=]")
    train = ("train", "latent-sft", "student=latents/decoder", "data.train=latents/latents.jsonl", "out=run", *marks)
    second = leibler(*train, "steps=4", "batch_size=4", "save_every=2", cwd=folder)
    assert second.returncode == 0, second.stderr
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 4
    assert {"loss/nll", "loss/ForwardKL(latents)"} <= metrics[0].keys()
    CausalLM.load(folder / "run" / "final")
    third = leibler(
        "measure", "latent", "--model", "run/final", "--data", "reasoned.jsonl", "--max-latent", "4", "--open", "[",
        "--close", "]", "--max-new-tokens", "3", "--json", cwd=folder,
    )  # fmt: skip
    assert third.returncode == 0, third.stderr
    found = json.loads(third.stdout)
    assert found["questions"] == 12
    assert {"accuracy", "closed", "thoughts"} <= found.keys()


@pytest.mark.slow
def test_mistakes_end_with_one_sentence(folder: Path):
    for arguments, what in [
        ((*COMPRESS[:-6], "--save-every", "2"), "no token '<think>'"),
        ((*COMPRESS, "--rate", "0"), "rate=0 must be at least 1"),
        (("train", "latent-sft", "student=model", "data=reasoned.jsonl", "out=run", "recipe.open=[", "recipe.close=]",
          "steps=1"), "no thoughts in the column 'latents'"),
    ]:  # fmt: skip
        found = leibler(*arguments, cwd=folder)
        assert found.returncode == 2, found.stderr
        assert what in found.stderr
        assert "Traceback" not in found.stderr
