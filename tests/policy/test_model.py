from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from leibler.errors import ModelError
from leibler.policy import CausalLM, Lora, character_tokenizer, right_pad, same_tokenizer, tiny_llama


def left_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    length = max(map(len, rows))
    tokens = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    attention = torch.tensor([[False] * (length - len(row)) + [True] * len(row) for row in rows])
    return tokens, attention


def right_padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, attention, _ = right_pad([(row[:1], row[1:]) for row in rows])
    return tokens, attention


# -- hidden states and head -------------------------------------------------------------------------------------------


def test_hidden_states_times_head_are_the_models_logits(any_model: CausalLM, prompts: list[list[int]]) -> None:
    weight, bias = any_model.head()
    with torch.no_grad():
        tokens, attention = right_padded(prompts)
        logits = torch.nn.functional.linear(any_model(tokens, attention), weight, bias)[attention]
        alone = [any_model.causal(input_ids=torch.tensor([row])).logits[0] for row in prompts]
    torch.testing.assert_close(logits, torch.cat(alone), rtol=1e-5, atol=1e-5)


def test_left_and_right_padding_agree(any_model: CausalLM, prompts: list[list[int]]) -> None:
    with torch.no_grad():
        tokens, attention = right_padded(prompts)
        right = any_model(tokens, attention)[attention]
        tokens, attention = left_padded(prompts)
        left = any_model(tokens, attention)[attention]
    torch.testing.assert_close(left, right, rtol=1e-5, atol=1e-5)


def test_what_stands_at_padding_does_not_matter(any_model: CausalLM, prompts: list[list[int]]) -> None:
    tokens, attention = right_padded(prompts)
    other = torch.where(attention, tokens, torch.tensor(11))
    with torch.no_grad():
        assert torch.equal(any_model(tokens, attention)[attention], any_model(other, attention)[attention])


def test_vocabulary_counts_real_entries_only(any_model: CausalLM) -> None:
    assert any_model.vocab_size == len(any_model.tokenizer)
    assert any_model.head()[0].shape == (any_model.vocab_size + 7, any_model.hidden_size)


@pytest.mark.parametrize(
    ("kind", "changes", "word"),
    [
        ("gemma2", {"head_dim": 8}, "soft-capping"),
        ("granite", {"logits_scaling": 8.0}, "scaling"),
        ("cohere", {}, "scaling"),
        ("bert", {"is_decoder": True}, "before the head"),
    ],
)
def test_logits_that_are_not_linear_in_hidden_states_are_refused(
    make_network, tokenizer, kind: str, changes: dict, word: str
) -> None:
    with pytest.raises(ModelError, match=word):
        CausalLM(make_network(kind, **changes), tokenizer)


def test_small_logits_do_not_hide_soft_capping(make_network, tokenizer) -> None:
    """With the weights of an untrained model, capping at 30 changes logits by less than any sensible tolerance."""
    quiet = make_network("gemma2", head_dim=8)
    with torch.no_grad():
        for parameter in quiet.parameters():
            parameter.mul_(0.05)
    with pytest.raises(ModelError, match="soft-capping"):
        CausalLM(quiet, tokenizer)


def test_a_scaling_of_one_is_no_scaling(make_network, tokenizer) -> None:
    assert CausalLM(make_network("granite", logits_scaling=1.0), tokenizer).vocab_size == len(tokenizer)


def test_half_precision_passes_the_check(make_network, tokenizer) -> None:
    assert CausalLM(make_network("llama").bfloat16(), tokenizer).head()[0].dtype == torch.bfloat16


def test_tokenizer_larger_than_the_model_is_refused(make_network, tokenizer) -> None:
    with pytest.raises(ModelError, match="41 entries but the model only 40"):
        CausalLM(make_network("llama", vocab_size=40), tokenizer)


def test_non_finite_weights_are_refused(make_network, tokenizer) -> None:
    broken = make_network("llama")
    with torch.no_grad():
        broken.get_output_embeddings().weight[3, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        CausalLM(broken, tokenizer)


def test_too_long_a_sequence_is_refused(model: CausalLM) -> None:
    tokens = torch.ones(1, 65, dtype=torch.long)
    with pytest.raises(ModelError, match="65 tokens exceeds the model's context of 64"):
        model(tokens, torch.ones_like(tokens, dtype=torch.bool))
    padded = torch.ones_like(tokens, dtype=torch.bool)
    padded[:, -1] = False  # 64 tokens and one of padding do fit
    assert model(tokens, padded).shape == (1, 65, 32)


def test_gradient_checkpointing_changes_no_gradient(model: CausalLM, prompts: list[list[int]]) -> None:
    tokens, attention = right_padded(prompts)
    gradients = []
    for checkpointed in (False, True):
        twin = copy.deepcopy(model).train()
        if checkpointed:
            twin.checkpoint_gradients()
        twin(tokens, attention)[attention].square().sum().backward()
        gradients.append([parameter.grad for parameter in twin.parameters()])
    assert any(getattr(module, "gradient_checkpointing", False) for module in twin.modules())
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


# -- copies, adapters, files ------------------------------------------------------------------------------------------


def test_copy_is_frozen_and_apart(model: CausalLM, prompts: list[list[int]]) -> None:
    tokens, attention = right_padded(prompts)
    model.train()
    model(tokens, attention).sum().backward()
    twin = model.copy()
    assert not twin.training
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in twin.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert twin.tokenizer is model.tokenizer
    before = twin(tokens, attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert torch.equal(twin(tokens, attention), before)


@pytest.mark.parametrize("tie", [True, False])
def test_save_and_load(tmp_path: Path, tokenizer, prompts: list[list[int]], tie: bool) -> None:
    model = tiny_llama(tokenizer, hidden=32, layers=1, heads=2, tie=tie)
    model.save(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").is_file()
    assert not list((tmp_path / "m").glob("*.bin"))
    again = CausalLM.load(tmp_path / "m")
    tokens, attention = right_padded(prompts)
    with torch.no_grad():
        assert torch.equal(again(tokens, attention), model(tokens, attention))
    assert (again.head()[0] is again.causal.get_input_embeddings().weight) == tie
    assert again.encode_completion("abc 12") == model.encode_completion("abc 12")
    # and without this library
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(plain.get_output_embeddings().weight, model.head()[0])
    assert AutoTokenizer.from_pretrained(tmp_path / "m").get_vocab() == tokenizer.get_vocab()


def test_load_as_another_dtype(tmp_path: Path, model: CausalLM) -> None:
    model.save(tmp_path)
    assert CausalLM.load(str(tmp_path), dtype=torch.float64).head()[0].dtype == torch.float64


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_adapter_trains_alone_and_saves_merged(tmp_path: Path, make_network, tokenizer, prompts, kind: str) -> None:
    CausalLM(make_network(kind), tokenizer).save(tmp_path / "base")
    model = CausalLM.load(tmp_path / "base", adapter=Lora(rank=4, alpha=8))
    plain = CausalLM.load(tmp_path / "base")
    tokens, attention = right_padded(prompts)
    assert torch.equal(model(tokens, attention)[attention], plain(tokens, attention)[attention])  # B starts at 0

    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        model(tokens, attention)[attention][:, 0].mean().backward()  # not the norm, which is fixed
        optimiser.step()
    changed = model(tokens, attention)[attention]
    reference = plain(tokens, attention)[attention]
    assert (changed - reference).abs().max() > 1e-3
    with model.without_adapter():
        torch.testing.assert_close(model(tokens, attention)[attention], reference)
    assert torch.equal(model.copy()(tokens, attention)[attention], changed)

    model.save(tmp_path / "out")
    merged = CausalLM.load(tmp_path / "out")
    assert not merged.has_adapter
    torch.testing.assert_close(merged(tokens, attention)[attention], changed, rtol=1e-4, atol=1e-5)
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert torch.equal(model(tokens, attention)[attention], changed)  # saving leaves the adapter in place
    with pytest.raises(ModelError, match="adapter only"):
        CausalLM.load(tmp_path / "out" / "adapter")


def test_adapter_targets(model: CausalLM) -> None:
    adapted = copy.deepcopy(model).adapted(Lora(targets=("q_proj",)))
    names = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert names
    assert all("q_proj.lora_" in name for name in names)
    for wrong, message in ((("embed_tokens",), "embedding"), (("nothing",), "does not fit")):
        with pytest.raises(ModelError, match=message):
            copy.deepcopy(model).adapted(Lora(targets=wrong))
    with pytest.raises(ModelError, match="already has an adapter"):
        adapted.adapted(Lora())
    with pytest.raises(ModelError, match="no adapter to switch off"), model.without_adapter():
        pass


def test_adapters_are_seeded_and_leave_the_global_generator_alone(model: CausalLM) -> None:
    before = torch.get_rng_state()

    def weights(seed: int) -> torch.Tensor:
        adapted = copy.deepcopy(model).adapted(Lora(seed=seed))
        return torch.cat([p.flatten() for name, p in adapted.named_parameters() if "lora_A" in name])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), before)


# -- text -------------------------------------------------------------------------------------------------------------


def test_prompts_are_never_empty_and_completions_end(model: CausalLM) -> None:
    tokenizer = model.tokenizer
    assert model.encode_prompt("") == [tokenizer.bos_token_id]
    assert model.encode_prompt("ab") == tokenizer.encode("ab")
    assert model.encode_completion("ab") == [*tokenizer.encode("ab"), tokenizer.eos_token_id]
    assert model.encode_completion("") == [tokenizer.eos_token_id]
    assert model.decode(model.encode_completion("ab 1")) == "ab 1"
    assert model.decode(torch.tensor(model.encode_completion("ab 1"))) == "ab 1"


def test_only_special_tokens_of_the_settings_stop(model: CausalLM) -> None:
    model.causal.generation_config.eos_token_id = [7, 1]  # a letter, and the begin token
    assert model.stop_ids == (1, 2)


def test_same_tokenizer(model: CausalLM) -> None:
    same_tokenizer(model, character_tokenizer("abcdefghijklmnopqrstuvwxyz 0123456789"))
    with pytest.raises(
        ModelError, match=r"the policy has 41 entries and the expert 7, and entry 4 is ' ' for one and 'x'"
    ):
        same_tokenizer(model, character_tokenizer("xyz"), ("policy", "expert"))
    other = character_tokenizer("abcdefghijklmnopqrstuvwxyz 0123456789")
    other.eos_token = "⟨pad⟩"
    with pytest.raises(ModelError, match="ends with '⟨eos⟩', the teacher with '⟨pad⟩'"):
        same_tokenizer(model, other)
