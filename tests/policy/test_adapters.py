"""A low-rank adapter on the output head: one law in the loss, the sampler, measurements and the merged file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leibler.divergence import ForwardKL, ReverseKL
from leibler.errors import ModelError
from leibler.fused import TargetRows, Want, one_pass
from leibler.policy import CausalLM, Lora, character_tokenizer, logprobs, sample, tiny_llama

TOKENS = torch.tensor([[5, 6, 7, 8], [3, 4, 1, 2]])


def adapted(seed: int = 0, *, rank: int = 3, tie: bool = False, targets: tuple[str, ...] = ("lm_head",)) -> CausalLM:
    """A model whose adapter has been trained: B is not 0."""
    model = tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2, tie=tie, seed=seed)
    model = model.adapted(Lora(rank=rank, targets=targets)).double().eval()
    g = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=g)
    return model


def whole_logits(model: CausalLM) -> Tensor:
    """By PEFT's own forward pass."""
    logits = model.causal(input_ids=TOKENS, attention_mask=torch.ones_like(TOKENS)).logits
    return logits[..., : model.vocab_size].flatten(0, 1)


def states(model: CausalLM) -> Tensor:
    return model(TOKENS, torch.ones_like(TOKENS, dtype=torch.bool)).flatten(0, 1)


def fused_loss(student: CausalLM, teacher: CausalLM) -> Tensor:
    target = TargetRows((teacher.linear(states(teacher).detach(), 0.7),))
    wants = [Want(ReverseKL(), 0), Want(ForwardKL(), 0)]
    total, _ = one_pass(
        student.linear(states(student), 0.7), wants, [target], lambda v, i: v.sum(0), vocab=student.vocab_size
    )
    return total


def dense_loss(student: CausalLM, teacher: CausalLM) -> Tensor:
    lp, lq = ((whole_logits(m) / 0.7).log_softmax(-1) for m in (student, teacher))
    lq = lq.detach()
    return (lp.exp() * (lp - lq)).sum() + (lq.exp() * (lq - lp)).sum()


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("targets", [("lm_head",), ("lm_head", "q_proj", "v_proj")])
def test_gradients_of_the_factors_are_those_of_full_logits(tie: bool, targets: tuple[str, ...]) -> None:
    student, teacher = adapted(0, tie=tie, targets=targets), adapted(1, tie=tie)
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    assert any("lm_head.lora_A" in name for name in trained)
    assert any("lm_head.lora_B" in name for name in trained)
    fused, dense = fused_loss(student, teacher), dense_loss(student, teacher)
    torch.testing.assert_close(fused, dense, rtol=1e-10, atol=1e-10)
    got = torch.autograd.grad(fused, list(trained.values()))
    wanted = torch.autograd.grad(dense, list(trained.values()))
    for name, one, other in zip(trained, got, wanted, strict=True):
        assert other.abs().max() > 0, name
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, msg=name)


class Shapes(TorchDispatchMode):
    """The shapes of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and id(t.untyped_storage()) not in inputs:
                self.made.append(tuple(t.shape))
        return out


def test_nothing_of_the_size_of_the_head_is_made() -> None:
    """Not the merged weight, and not its gradient; the head's own product is read only."""
    student, teacher = adapted(0), adapted(1)
    head = student.causal.get_output_embeddings()
    rows, width = head.weight.shape
    (pair,) = student.low_rank(states(student))
    assert pair.weight.shape == (rows, 3)
    teacher_states, hidden = states(teacher).detach(), states(student)
    with Shapes() as shapes:
        linear = student.linear(hidden, 0.7)
        target = TargetRows((teacher.linear(teacher_states, 0.7),))
        total, _ = one_pass(linear, [Want(ReverseKL(), 0)], [target], lambda v, i: v[0])
        total.backward()
    assert (rows, 3) in shapes.made  # the gradient by B, so the judge does see what is made
    base = head.base_layer.weight.untyped_storage().data_ptr()
    assert head.base_layer.weight.grad is None
    assert linear.weight.untyped_storage().data_ptr() == base
    assert (rows, width) not in shapes.made
    assert (width, rows) not in shapes.made


def test_sampler_log_probs_and_measurements_read_the_adapter() -> None:
    model = adapted(0)
    drawn = sample(
        model, [[5, 6], [7]], uniforms=torch.rand(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    law = whole_logits(model).log_softmax(-1).unflatten(0, TOKENS.shape)
    for b, completion in enumerate(drawn.completions()):
        prompt = [[5, 6], [7]][b]
        tokens = torch.tensor([prompt + list(completion)])
        logits = model.causal(input_ids=tokens).logits[0, :, : model.vocab_size]
        wanted = logits.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tokens[0, len(prompt) :, None])[:, 0]
        torch.testing.assert_close(drawn.logp[b, : len(completion)].double(), wanted.detach(), rtol=1e-6, atol=1e-6)
    mask = torch.ones(2, 3, dtype=torch.bool)
    got = logprobs(model, TOKENS, torch.ones_like(TOKENS, dtype=torch.bool), mask)
    wanted = law[:, :-1].gather(2, TOKENS[:, 1:, None]).flatten()
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_switched_off_it_adds_nothing() -> None:
    model = adapted(0)
    with model.without_adapter():
        assert model.low_rank(states(model)) == ()
        torch.testing.assert_close(whole_logits(model), states(model) @ model.head()[0][: model.vocab_size].t())
    assert len(model.low_rank(states(model))) == 1


@pytest.mark.parametrize("tie", [False, True])
def test_the_merged_checkpoint_has_the_same_law(tmp_path: Path, tie: bool) -> None:
    """A head that shares its weight with the embedding gets one of its own: the embedding is not adapted."""
    model = adapted(0, tie=tie)
    embedding = model.causal.get_input_embeddings().weight.detach().clone()
    model.save(tmp_path)
    merged = CausalLM.load(tmp_path, dtype=torch.float64)
    assert not merged.has_adapter
    torch.testing.assert_close(whole_logits(merged), whole_logits(model), rtol=1e-6, atol=1e-6)
    assert torch.equal(merged.causal.get_input_embeddings().weight, embedding)
    assert len(model.low_rank(states(model))) == 1  # saving leaves the adapter in place
    assert (model.head()[0] is model.causal.get_input_embeddings().weight) == tie


def test_other_kinds_of_adapter_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny_llama(character_tokenizer("0123456789+="), hidden=16, layers=1, heads=2)
    network = get_peft_model(model.causal, LoraConfig(target_modules=["lm_head"], use_dora=True, task_type="CAUSAL_LM"))
    with pytest.raises(ModelError, match="not plain LoRA"):
        CausalLM(network, model.tokenizer)
    with pytest.raises(ModelError, match="embedding"):
        tiny_llama(model.tokenizer).adapted(Lora(targets=("embed_tokens",)))


def test_a_run_trains_the_heads_adapter_against_a_teacher_that_carries_one(tmp_path: Path) -> None:
    from leibler.train import fit

    student, teacher = (adapted(seed, targets=("lm_head", "q_proj")).float() for seed in (0, 1))
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    records = [{"prompt": "1+1=", "completion": "2"}, {"prompt": "2+2=", "completion": "4"}]
    fit(
        "gkd",
        student=student,
        teacher=teacher,
        data=records,
        out=tmp_path / "run",
        steps=2,
        batch_size=2,
        quiet=True,
    )
    moved = {name for name, p in student.named_parameters() if not torch.equal(p, before[name])}
    assert any("lm_head.lora_A" in name for name in moved)
    assert any("lm_head.lora_B" in name for name in moved)
    assert all("lora_" in name for name in moved)
    merged = CausalLM.load(tmp_path / "run" / "final")
    torch.testing.assert_close(whole_logits(merged), whole_logits(student), rtol=1e-3, atol=1e-3)
