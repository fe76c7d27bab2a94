from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fused.helpers import Entropy, Products, Reverse, Sampled, assert_close, heads
from leibler.divergence import block_rows
from leibler.errors import DataError, LeiblerError, ModelError, RecipeError
from leibler.fused import Linear, LowRank, TargetRows, Want, functionals, one_pass, sweep
from leibler.fused.blocks import CHUNKS, chunk_tokens
from leibler.fused.functions import one_pass_per_token


def test_chunks_fit_the_budget_and_depend_on_shapes_alone() -> None:
    for vocab in (19, 4096, 32768, 151936, 10**6):
        for hidden in (64, 896, 4096):
            for count in (1, 2, 5):
                chunk = chunk_tokens(vocab, hidden, count)
                budget = max(256 * 2**20, 4 * vocab * hidden)
                assert chunk in CHUNKS
                assert chunk == CHUNKS[-1] or count * chunk * vocab * 4 <= budget
                assert chunk == CHUNKS[0] or 2 * chunk * vocab * 4 * count > budget


def test_row_blocks_stay_near_two_megabytes() -> None:
    for vocab in (19, 4096, 32768, 151936):
        assert block_rows(vocab) * vocab * 4 <= 2**21 + 4 * vocab
        assert block_rows(vocab) >= 2
    assert block_rows(10**7) == 2
    assert sweep.block_rows is block_rows  # one rule, whether logits are given or formed


@pytest.mark.parametrize(
    ("build", "error", "says"),
    [
        (lambda m, t: functionals(m, []), RecipeError, "at least one Want"),
        (lambda m, t: functionals(m, [Want(Reverse)]), RecipeError, "needs a target"),
        (lambda m, t: functionals(m, [Want(Reverse, 1)], [t]), RecipeError, "1 targets"),
        (lambda m, t: functionals(m, [Want(Reverse, -1)], [t]), RecipeError, "target -1"),
        (lambda m, t: TargetRows(()), RecipeError, "at least one leaf"),
        (lambda m, t: TargetRows((m, m)), RecipeError, "combine"),
        (lambda m, t: functionals(m, [Want(Sampled)], token=torch.zeros(22).long()), DataError, "one integer"),
        (lambda m, t: functionals(m, [Want(Sampled)], token=torch.zeros(23)), DataError, "one integer"),
        (lambda m, t: functionals(m, [Want(Sampled)], token=torch.full((23,), -100)), DataError, "-100"),
        (lambda m, t: functionals(m, [Want(Sampled)], token=torch.full((23,), 13)), DataError, "vocabulary of 13"),
        (
            lambda m, t: functionals(m, [Want(Sampled)], token=torch.full((23,), 12), vocab=12),
            DataError,
            "vocabulary of 12",
        ),
        (
            lambda m, t: functionals(m, [Want(Reverse, 0)], [heads(target_vocab=16)[1]]),
            ModelError,
            "13 and 16 vocabulary",
        ),
        (
            lambda m, t: functionals(m, [Want(Reverse, 0)], [TargetRows((replace(m, hidden=m.hidden[1:]),))]),
            ModelError,
            "same tokens",
        ),
        (
            lambda m, t: functionals(Linear(m.hidden.to("meta"), m.weight.to("meta")), [Want(Reverse, 0)], [t]),
            ModelError,
            "different devices",
        ),
        (lambda m, t: Linear(m.hidden, m.weight.to("meta")), ModelError, "different devices"),
    ],
)
def test_mistakes_are_named(
    build: Callable[[Linear, TargetRows], object], error: type[LeiblerError], says: str
) -> None:
    model, target, _ = heads()
    with pytest.raises(error, match=says):
        build(model, target)


def test_integer_tokens_of_any_width_do() -> None:
    model, _, token = heads()
    wants = [Want(Sampled), Want(Entropy)]
    assert torch.equal(functionals(model, wants, token=token), functionals(model, wants, token=token.to(torch.int32)))


def with_adapter(head: Linear, rank: int = 2, seed: int = 7) -> Linear:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(head.tokens, rank, generator=g, dtype=torch.float64).to(head.hidden.dtype)
    weight = torch.randn(head.vocab, rank, generator=g, dtype=torch.float64).to(head.hidden.dtype)
    pair = LowRank(hidden.requires_grad_(), weight.requires_grad_())
    return replace(head, low_rank=(*head.low_rank, pair))


def dense(head: Linear, vocab: int | None = None) -> Tensor:
    """Log-probabilities of a head with its adapters, with their graph."""
    logits = torch.stack([h.double() @ w[:vocab].double().T for h, w in head.products]).sum(0)
    if head.bias is not None:
        logits = logits + head.bias[:vocab].double()
    return (logits / head.temperature).log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [1, 2])
@pytest.mark.parametrize("engine", ["functionals", "one_pass"])
def test_low_rank_pairs_are_a_second_product(
    dtype: torch.dtype, adapters: int, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the model and of the target; the frozen weight gets no gradient and no product for one."""
    monkeypatch.setattr(sweep, "chunk_tokens", lambda *a, **k: 7)
    monkeypatch.setattr(sweep, "block_rows", lambda *a, **k: 3)
    model, target, token = heads(dtype=dtype, temperature=3.0)
    token = token % 12
    model.weight.requires_grad_(False)
    leaf = target.leaves[0]
    for k in range(adapters):
        model, leaf = with_adapter(model, 2 + k, seed=7 + k), with_adapter(leaf, 3, seed=9 + k)
    wants = [Want(Sampled), Want(Reverse, 0)]
    trained = [t for t in model.tensors if t is not None and t.requires_grad]
    assert len(trained) == 2 + 2 * adapters
    with Products() as products:
        if engine == "one_pass":
            total, _ = one_pass(model, wants, [TargetRows((leaf,))], lambda v, i: v.sum(0), token=token, vocab=12)
        else:
            total = functionals(model, wants, [TargetRows((leaf,))], token=token, vocab=12).sum()
        got = torch.autograd.grad(total, trained)
    ranks = sum(pair.weight.shape[1] for pair in model.low_rank)
    forward = 23 * 12 * (6 + 12 + ranks + 3 * adapters)
    again = forward * 21 // 23 if engine == "functionals" else 0  # the last chunk's logits are still there
    assert products.count == forward + again + 23 * 12 * (6 + 2 * ranks)
    lp, lq = dense(model, 12), dense(leaf.detached(), 12)
    expected = lp.gather(1, token[:, None]).sum() + (lp.exp() * (lp - lq)).sum()
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    assert_close(total.detach(), expected.detach(), tolerance)
    assert_close(list(got), list(torch.autograd.grad(expected, trained)), tolerance)
    assert got[-1][12:].abs().max() == 0


def test_low_rank_pairs_per_token_and_their_key() -> None:
    model, target, _ = heads(bias=False)
    model.weight.requires_grad_(False)
    adapted = with_adapter(model)
    adapted.low_rank[0].weight.requires_grad_(False)
    each = one_pass_per_token(adapted, Want(Reverse, 0), [target])
    cotangent = torch.linspace(-1, 1, 23, dtype=torch.float64)
    lp, lq = dense(adapted), dense(target.leaves[0])
    expected = (lp.exp() * (lp - lq)).sum(-1)
    factors = [adapted.hidden, adapted.low_rank[0].hidden]
    got, wanted = (list(torch.autograd.grad((v * cotangent).sum(), factors)) for v in (each, expected))
    assert_close(got, wanted, 1e-12)
    assert adapted.key == adapted.detached().key != model.key
    with pytest.raises(ModelError, match="low-rank pair"):
        Linear(model.hidden, model.weight, low_rank=(LowRank(torch.zeros(22, 2), torch.zeros(13, 2)),))
