"""From a Transformers checkpoint with a subword tokenizer of its own to a distilled model, all on the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from leibler.data import load, stdlib_documents
from leibler.policy import character_tokenizer, tiny_llama, train_bpe


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Two checkpoints as Transformers saves them (the teacher's head is padded), and prompts as JSON lines."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizer = train_bpe([d.text for d in stdlib_documents("docstring")[:200]], 400)
    for name, hidden, padding in (("student", 16, 0), ("teacher", 24, 24)):
        config = LlamaConfig(
            vocab_size=len(tokenizer) + padding,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=96,
            initializer_range=0.2,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
        )
        LlamaForCausalLM(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    prompts = [{"prompt": r.prompt} for r in load("corpus:stdlib:length=80,limit=24,seed=0")]
    lines = [json.dumps(p) for p in prompts]
    lines.insert(3, '{"prompt": 12}')
    lines.insert(7, '{"prompt": "cut off')
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def leibler(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "leibler", *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


def test_distilling_a_checkpoint_directory_from_a_file_of_prompts(place):
    done = leibler(
        "train", "gkd", "student=student", "teacher=teacher", "data=prompts.jsonl", "out=run", "steps=12",
        "batch_size=8", "max_new_tokens=8", "learning_rate=3e-2", cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "2 of 26 rows" in done.stderr, "malformed rows are counted"
    aside = [json.loads(line) for line in (place / "run/set_aside/train.jsonl").read_text().splitlines()]
    assert [row["line"] for row in aside] == [4, 8]
    steps = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    first, last = steps[0]["divergence/JensenShannon(teacher)"], steps[-1]["divergence/JensenShannon(teacher)"]
    assert len(steps) == 12
    assert last < 0.9 * first, "the student comes nearer to the teacher"
    # What was written is a checkpoint that Transformers loads by itself.
    model = AutoModelForCausalLM.from_pretrained(place / "run/final")
    tokenizer = AutoTokenizer.from_pretrained(place / "run/final")
    assert (place / "run/final/model.safetensors").exists()
    assert model.config.hidden_size == 16
    text = "Return the name of the file"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text

    report = leibler("report", "run", cwd=place)
    assert report.returncode == 0, report.stderr
    assert "<html" in (place / "run/report.html").read_text()


def test_a_teacher_with_another_tokenizer_is_refused_in_one_sentence(place):
    tiny_llama(character_tokenizer("0123456789"), hidden=16, layers=1, heads=2).save(place / "other")
    done = leibler("train", "gkd", "student=student", "teacher=other", "data=prompts.jsonl", "out=refused", cwd=place)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "tokenizer" in done.stderr.splitlines()[-1]
    assert not (place / "refused" / "run.yaml").exists()
