"""Rows of a head that stand for no token: beyond the tokenizer's entries, or in gaps between its ids.

Every path is run twice, with such rows and without (or with other contents of them), and has to give the same numbers.
The rows are loud: they would take nearly all of the probability if they counted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from leibler.data import Record
from leibler.divergence import ForwardKL, JensenShannon, ReverseKL
from leibler.errors import ModelError
from leibler.measure import compare
from leibler.objective import Imitate, Match, Objective, Teacher
from leibler.policy import CausalLM, character_tokenizer, logprobs, right_pad, sample, uniforms
from leibler.train import Data, Recipe, fit
from train.conformance import distance, tiny
from train.test_vocabularies import descend

TEXT = "abcdefghijklmnopqrstuvwxyz :é漢字ü,."
PLAIN = character_tokenizer(TEXT)
PADDING = [0, 3, 9]


def gappy() -> PreTrainedTokenizerFast:
    """The same characters, with three ids in the middle and one before the last that no token has."""
    content = json.loads(PLAIN.backend_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {entry: spread(n) for entry, n in vocabulary.items()}
    names = {f"{name}_token": getattr(PLAIN, f"{name}_token") for name in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names)


def spread(number: int) -> int:
    return number + 3 * (number > 10) + (number == len(PLAIN) - 1)


GAPPY = gappy()
GAPS = [11, 12, 13, len(PLAIN) + 2]


def model(seed: int, padding: int = 0, *, gaps: bool = False, loudness: float = 50.0) -> CausalLM:
    """A model whose rows for tokens depend on the seed alone; the other rows are loud."""
    base = tiny(seed, tokenizer=PLAIN)  # of an odd seed: head and embedding are not tied
    generator = torch.Generator().manual_seed(seed)
    made = tiny(1, tokenizer=GAPPY if gaps else PLAIN, padding=padding + 4 * gaps)
    rows = torch.tensor([spread(n) for n in range(len(PLAIN))] if gaps else list(range(len(PLAIN))))
    state = base.network.state_dict()
    weights: dict[str, Any] = {}
    for name, tensor in made.network.state_dict().items():
        if tensor.shape == state[name].shape and name not in ("model.embed_tokens.weight", "lm_head.weight"):
            weights[name] = state[name]
            continue
        loud = torch.randn(tensor.shape, dtype=tensor.dtype, generator=generator) * loudness
        loud[rows] = state[name]
        weights[name] = loud
    made.network.load_state_dict(weights)
    return made


def batch(made: CausalLM):
    return right_pad([(made.encode_prompt(p), made.encode_completion(c)) for p, c in (("ab ", "cde: é"), ("x", "yz"))])


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("gaps", [False, True])
def test_log_probs_do_not_see_them(padding: int, gaps: bool) -> None:
    plain, padded = model(1), model(1, padding, gaps=gaps)
    assert padded.vocab_size == len(PLAIN) + 4 * gaps
    torch.testing.assert_close(logprobs(padded, *batch(padded)), logprobs(plain, *batch(plain)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_never_draws_them(padding: int, gaps: bool, temperature: float) -> None:
    plain, padded = model(1), model(1, padding, gaps=gaps)
    numbers = uniforms(0, "rollout", 0, 8, 12)
    one, two = (
        sample(m, [m.encode_prompt("a")], uniforms=numbers, group_size=8, temperature=temperature)
        for m in (plain, padded)
    )
    assert set(two.tokens[two.mask].tolist()) <= set(padded.tokenizer.get_vocab().values())
    if not gaps or temperature == 0:  # with gaps the characters stand in the same order, so the draws are equal too
        assert [plain.decode(c) for c in one.completions()] == [padded.decode(c) for c in two.completions()]
    torch.testing.assert_close(one.logp, two.logp, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sizes", [(0, 9), (9, 0), (3, 9)])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("plan", ["one pass", "two-pass head", "survey and replay"])
def test_training_does_not_see_them_and_gives_them_no_gradient(plan: str, gaps: bool, sizes) -> None:
    """Student's and teacher's heads of different sizes, one or the other larger."""
    matches = [Match(d, to=Teacher()) for d in (ForwardKL(), ReverseKL(), JensenShannon(0.3))]
    recipe = Recipe(Data(), Objective(*matches, Imitate(coefficient=0.3)))
    plain, _, _ = descend(recipe, model(1), model(3))
    student, teacher = (model(seed, n, gaps=gaps) for seed, n in zip((1, 3), sizes, strict=True))
    found, step, _ = descend(recipe, student, teacher, plan=plan)
    rows = torch.tensor([spread(n) for n in range(len(PLAIN))] if gaps else list(range(len(PLAIN))))
    others = torch.ones(len(PLAIN) + 4 * gaps + sizes[0], dtype=torch.bool)
    others[rows] = False
    for name in ("network.lm_head.weight", "network.model.embed_tokens.weight"):
        assert not found[name][others].any()
        found[name] = found[name][rows]
    assert distance(found, plain) < 1e-6
    assert not any("support_violations" in key for key in step.metrics)


@pytest.mark.parametrize("gaps", [False, True])
def test_comparing_two_models_does_not_see_them(gaps: bool) -> None:
    records = [Record("ab ", completion="cde"), Record("x", completion="yz")]
    plain = compare(model(1), model(3), records)
    padded = compare(model(1, 9, gaps=gaps), model(3, 3, gaps=gaps), records)
    for key, value in plain.items():
        if isinstance(value, float) and "calibration" not in key:
            assert padded[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("gaps", [False, True])
def test_a_saved_model_keeps_its_rows_and_leaves_them_out_again(gaps: bool, tmp_path: Path) -> None:
    made = model(1, 9, gaps=gaps)
    made.save(tmp_path)
    again = CausalLM.load(tmp_path, dtype=torch.float64)
    assert again.head()[0].shape == made.head()[0].shape
    torch.testing.assert_close(logprobs(again, *batch(again)), logprobs(made, *batch(made)))
    assert "gaps" not in json.dumps(sorted(made.state_dict()))


@pytest.mark.parametrize("gaps", [False, True])
def test_a_whole_run_leaves_them_as_they_were(gaps: bool, tmp_path: Path) -> None:
    data = [{"prompt": "ab ", "completion": "cde"}, {"prompt": "x", "completion": "yz"}] * 4
    student, teacher = model(1, 4, gaps=gaps).float(), model(3, 9, gaps=gaps).float()
    rows = [spread(n) for n in range(len(PLAIN))] if gaps else list(range(len(PLAIN)))
    others = [n for n in range(student.head()[0].shape[0]) if n not in rows]
    before = student.head()[0].detach().clone()
    run = fit(
        "gkd", student=student, teacher=teacher, data=data, validation=data, out=tmp_path / "run", steps=3,
        batch_size=4, learning_rate=0.01, max_new_tokens=5, quiet=True,
    )  # fmt: skip
    after = CausalLM.load(run.out / "final").head()[0]
    assert torch.equal(after[others], before[others])
    assert not torch.equal(after[rows], before[rows])


def test_a_bias_of_the_head_stays_trainable_where_there_are_gaps() -> None:
    made = model(1, 2, gaps=True)
    head = torch.nn.Linear(16, made.head()[0].shape[0], dtype=torch.float64)
    made.network.set_output_embeddings(head)
    made = CausalLM(made.network, GAPPY)
    logprobs(made, *batch(made)).sum().backward()
    assert head.bias.grad is not None
    assert bool(torch.isfinite(head.bias.grad).all())
    assert not head.bias.grad[GAPS].any()
    assert not head.bias.grad[made.vocab_size :].any()
    assert bool(head.bias.grad.any())


def test_tokens_added_beyond_the_head_are_refused() -> None:
    tokenizer = character_tokenizer(TEXT)
    network = tiny(1, tokenizer=tokenizer).network
    tokenizer.add_tokens(["<tool>"])
    with pytest.raises(ModelError, match=f"has {len(PLAIN) + 1} entries but the model only {len(PLAIN)}.*resize_token"):
        CausalLM(network, tokenizer)
