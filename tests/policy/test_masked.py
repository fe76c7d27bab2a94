"""Masked language models: what they predict, which checkpoints are taken, how they are decoded."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leibler.data import Record
from leibler.divergence import SampledLogProb
from leibler.errors import DataError, ModelError
from leibler.fused import Want, functionals
from leibler.measure import compare, token_view
from leibler.measure.scores import label_logps
from leibler.policy import (
    CausalLM,
    Lora,
    MaskedLM,
    character_tokenizer,
    decode_latent,
    decode_masked,
    load,
    logprobs,
    right_pad,
    sample,
    tiny_llama,
    tiny_masked,
    uniforms,
)
from leibler.policy.masked import hidden_rows
from leibler.policy.reading import reading

TOKENIZER = character_tokenizer("abcde")


def _bert(kind: str, hidden: int = 16) -> MaskedLM:
    """A random model of one of the other architectures, whose laws are far from uniform."""
    from transformers import BertConfig, BertForMaskedLM, DistilBertConfig, DistilBertForMaskedLM

    tokenizer = tiny_masked(TOKENIZER, hidden=16, layers=1, heads=2).tokenizer
    size = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 32}
    torch.manual_seed(1)
    if kind == "bert":
        config = BertConfig(
            hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, **size
        )
        network = BertForMaskedLM(config)
    else:
        network = DistilBertForMaskedLM(DistilBertConfig(dim=hidden, n_layers=1, n_heads=2, hidden_dim=16, **size))
    return MaskedLM(_loud(network), tokenizer).eval()


def _loud(network: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return network


def _modern() -> MaskedLM:
    model = tiny_masked(TOKENIZER, hidden=16, layers=2, heads=2, max_length=32)
    return MaskedLM(_loud(model.network), model.tokenizer).eval()


@pytest.fixture(params=["modernbert", "bert", "distilbert"])
def model(request: pytest.FixtureRequest) -> MaskedLM:
    return _modern() if request.param == "modernbert" else _bert(request.param)


def _law(model: MaskedLM, tokens: list[int]) -> Tensor:
    """Log-probabilities ``[time, vocab]`` by Transformers itself; the mask token has none."""
    logits = model.pretrained(input_ids=torch.tensor([tokens])).logits[0, :, : model.vocab_size].double()
    logits[:, model.mask_id] = -torch.inf
    return logits.log_softmax(-1).detach()


def test_the_state_in_front_of_a_position_predicts_it_from_both_sides(model: MaskedLM):
    prompts = [model.encode_prompt("ab"), model.encode_prompt("dcb")]
    canvas = torch.tensor([model.encode_completion("cde"), model.encode_completion("eab")])
    hide = torch.tensor([[True, False, True, False], [False, True, True, True]])
    tokens, attention, mask, labels = hidden_rows(prompts, canvas, hide, model.mask_id, model.pad_id)
    head = model.linear(model(tokens, attention)[:, :-1][mask])
    from leibler.divergence import SampledLogProb
    from leibler.fused import Want, functionals

    found = functionals(head, [Want(SampledLogProb())], token=labels[mask], vocab=model.vocab_size)[0]
    expected = []
    for prompt, row, hidden in zip(prompts, canvas.tolist(), hide.tolist(), strict=True):
        seen = prompt + [model.mask_id if h else t for t, h in zip(row, hidden, strict=True)]
        law = _law(model, seen)
        expected += [law[len(prompt) + i, t] for i, (t, h) in enumerate(zip(row, hidden, strict=True)) if h]
    torch.testing.assert_close(found.double(), torch.stack(expected), rtol=1e-4, atol=1e-4)
    # The other side counts: another token behind a masked position changes what stands there.
    canvas[0, 1] = model.encode_completion("a")[0]
    other = hidden_rows(prompts, canvas, hide, model.mask_id, model.pad_id)
    moved = model.linear(model(*other[:2])[:, :-1][mask])
    assert not torch.allclose(moved.hidden[0], head.hidden[0])


def test_no_law_gives_the_mask_token_anything(model: MaskedLM):
    tokens = torch.tensor([[*model.encode_prompt("ab"), model.mask_id]])
    mask = torch.tensor([[False, True]])
    assert int(tokens[0, 2]) == model.mask_id
    head = model.linear(model(tokens, torch.ones_like(tokens).bool())[:, :-1][mask])
    (found,) = functionals(head, [Want(SampledLogProb())], token=tokens[:, 1:][mask], vocab=model.vocab_size)
    assert found.item() == -torch.inf


def test_a_checkpoint_is_read_back_as_what_it_is(model: MaskedLM, tmp_path: Path):
    model.save(tmp_path / "masked")
    again = load(tmp_path / "masked")
    assert type(again) is MaskedLM
    assert again.mask_id == model.mask_id
    tokens = torch.tensor([[*model.encode_prompt("ab"), model.mask_id, 5]])
    attention = torch.ones_like(tokens).bool()
    assert torch.equal(again(tokens, attention), model(tokens, attention))
    with pytest.raises(ModelError, match=r"is a masked language model \(\w+ForMaskedLM\).*give a decoder-only"):
        CausalLM.load(tmp_path / "masked")


def test_a_causal_checkpoint_is_refused_as_a_masked_one(tmp_path: Path):
    tiny_llama(TOKENIZER, hidden=16, layers=1, heads=2).save(tmp_path)
    assert type(load(tmp_path)) is CausalLM
    with pytest.raises(ModelError, match=r"is no masked language model; give .*ModernBERT"):
        MaskedLM.load(tmp_path)


def test_what_cannot_be_used_is_refused_in_a_sentence():
    from transformers import RobertaConfig, RobertaForMaskedLM

    model = _modern()
    roberta = RobertaForMaskedLM(
        RobertaConfig(vocab_size=10, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(ModelError, match="RobertaForMaskedLM is not a masked language model that can be used"):
        MaskedLM(roberta, model.tokenizer)
    with pytest.raises(ModelError, match="BertModel is not"):
        MaskedLM(model.pretrained.base_model, model.tokenizer)
    with pytest.raises(ModelError, match="no mask token"):
        MaskedLM(model.network, TOKENIZER)


def test_a_separator_ends_completions_where_there_is_no_end_token():
    model = _bert("bert")
    tokenizer = model.tokenizer
    ending = tokenizer.eos_token_id
    tokenizer.sep_token, tokenizer.eos_token = tokenizer.eos_token, None
    again = MaskedLM(model.network, tokenizer)
    assert again.eos_id == ending
    assert again.stop_ids == (ending,)
    assert again.encode_completion("ab")[-1] == ending


def test_an_adapter_trains_and_is_written_merged(tmp_path: Path):
    model = _modern()
    adapted = model.adapted(Lora(rank=2, seed=3))
    assert type(adapted) is MaskedLM
    assert all("lora" in n for n, p in adapted.named_parameters() if p.requires_grad)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    tokens = torch.tensor([[*adapted.encode_prompt("ab"), adapted.mask_id]])
    attention = torch.ones_like(tokens).bool()
    with adapted.without_adapter():
        before = adapted(tokens, attention)
    after = adapted(tokens, attention)
    assert not torch.allclose(before, after)
    adapted.save(tmp_path)
    torch.testing.assert_close(load(tmp_path)(tokens, attention), after, rtol=1e-4, atol=1e-4)


# ---- decoding --------------------------------------------------------------------------------------------------------


def _by_hand(model: MaskedLM, prompt: list[int], length: int, commit: int) -> tuple[list[int], list[int]]:
    """Greedy decoding of one row, a loop over positions."""
    row, steps, number = [model.mask_id] * length, [0] * length, 0
    while 0 in steps:
        number += 1
        law = _law(model, prompt + row)[len(prompt) :]
        masked = sorted((i for i in range(length) if not steps[i]), key=lambda i: (-float(law[i].max()), i))
        for i in masked[:commit]:
            row[i], steps[i] = int(law[i].argmax()), number
    return row, steps


@pytest.mark.parametrize("commit", [1, 2, 3, 9])
def test_decoding_reveals_the_surest_positions_of_each_row(model: MaskedLM, commit: int):
    prompts = [model.encode_prompt(text) for text in ("abc", "e", "dd")]
    found = decode_masked(model, prompts, length=5, commit=commit)
    for i, prompt in enumerate(prompts):
        assert (found.tokens[i].tolist(), found.step[i].tolist()) == _by_hand(model, prompt, 5, commit)
    assert found.passes == -(-5 // commit) == int(found.step.max())
    cut = decode_masked(model, prompts, length=5, commit=commit, max_batch=2)
    assert torch.equal(cut.tokens, found.tokens)
    assert torch.equal(cut.step, found.step)


def test_a_draw_is_one_of_the_product_of_the_conditionals():
    model, prompt, length = _modern(), _modern().encode_prompt("a"), 2
    n = 4000
    numbers = uniforms(0, "decode", 0, rows=n, n=length)
    found = decode_masked(model, [prompt] * n, length=length, temperature=1.0, uniforms=numbers)
    first = _law(model, [*prompt, model.mask_id, model.mask_id])[len(prompt) :]
    at = int(first.max(-1).values.argmax())
    law = torch.zeros(model.vocab_size, model.vocab_size, dtype=torch.float64)
    for token in range(model.vocab_size):
        if token == model.mask_id:
            continue
        seen = [model.mask_id] * 2
        seen[at] = token
        second = _law(model, prompt + seen)[len(prompt) + 1 - at]
        for other in range(model.vocab_size):
            pair = (token, other) if at == 0 else (other, token)
            law[pair] = (first[at, token] + second[other]).exp()
    assert law.sum().item() == pytest.approx(1.0, abs=1e-6)
    counts = torch.zeros_like(law).index_put_(
        tuple(found.tokens.T), torch.ones((), dtype=torch.float64), accumulate=True
    )
    error = (law * (1 - law) / n).sqrt()
    assert ((counts / n - law).abs() <= 4.5 * error + 1e-9).all()


def test_a_row_is_the_same_in_any_company():
    model = _modern()
    prompts = [model.encode_prompt(text) for text in ("abc", "e", "ddddd")]
    numbers = uniforms(3, "decode", 0, rows=3, n=4)
    together = decode_masked(model, prompts, length=4, commit=2, temperature=0.7, uniforms=numbers)
    for i, prompt in enumerate(prompts):
        alone = decode_masked(model, [prompt], length=4, commit=2, temperature=0.7, uniforms=numbers[i : i + 1])
        assert torch.equal(alone.tokens[0], together.tokens[i])
        assert torch.equal(alone.step[0], together.step[i])


def test_completions_stop_at_their_end():
    model = _modern()
    found = decode_masked(model, [model.encode_prompt("ab")] * 2, length=4)
    end = model.eos_id
    object.__setattr__(found, "tokens", torch.tensor([[5, end, 6, end], [5, 6, 7, 8]]))
    assert found.completions() == [[5, end], [5, 6, 7, 8]]


def test_low_precision_decodes():
    model = _modern().to(torch.bfloat16)
    found = decode_masked(model, [model.encode_prompt("ab")], length=3)
    assert not (found.tokens == model.mask_id).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, "length must be at least 1"),
        ({"length": 3, "commit": 0}, "commit must be at least 1"),
        ({"length": 3, "temperature": -1.0}, "temperature must be at least 0"),
        ({"length": 3, "temperature": 1.0}, "give uniforms"),
        ({"length": 3, "uniforms": torch.zeros(1, 2, dtype=torch.float64)}, "one for each position"),
    ],
)
def test_mistakes_in_decoding_are_told(options: dict, message: str):
    with pytest.raises(DataError, match=message):
        decode_masked(_modern(), [[1]], **options)
    with pytest.raises(DataError, match="Prompt 1 is empty"):
        decode_masked(_modern(), [[1], []], length=2)
    with pytest.raises(ModelError, match="exceeds the model's context of 32"):
        decode_masked(_modern(), [[1]], length=32)


def test_what_reads_from_left_to_right_refuses_it():
    """It would answer with the laws of tokens that it has read."""
    model, record = _modern(), Record("ab", completion="b")
    rows = right_pad([([4], [5, 2])])
    calls = [
        lambda: sample(model, [[4]], uniforms=torch.zeros(1, 2, dtype=torch.float64)),
        lambda: sample([(model, 1.0)], [[4]], uniforms=torch.zeros(1, 2, dtype=torch.float64)),
        lambda: logprobs(model, *rows),
        lambda: reading(model, [([4], [5, 2])]),
        lambda: compare(model, model.copy(), [record]),
        lambda: token_view(model, model.copy(), "b"),
        lambda: label_logps(model, [record]),
        lambda: decode_latent(model, [[4]]),
    ]
    for call in calls:
        with pytest.raises(ModelError, match="fills in masked positions, and this reads from left to right"):
            call()


def test_hidden_rows_agree_with_a_loop():
    prompts, canvas = [[3], [4, 5, 6]], torch.tensor([[7, 8, 9], [9, 8, 7]])
    for bits in itertools.product([False, True], repeat=6):
        hide = torch.tensor(bits).view(2, 3)
        tokens, attention, mask, labels = hidden_rows(prompts, canvas, hide, 1, 0)
        for i, prompt in enumerate(prompts):
            seen = prompt + [1 if h else t for t, h in zip(canvas[i].tolist(), hide[i].tolist(), strict=True)]
            assert tokens[i].tolist() == seen + [0] * (6 - len(seen))
            assert attention[i].sum() == len(seen)
            assert labels[i][mask[i]].tolist() == canvas[i][hide[i]].tolist()
            assert (mask[i].nonzero()[:, 0] + 1 - len(prompt)).tolist() == hide[i].nonzero()[:, 0].tolist()
