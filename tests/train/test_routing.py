"""Another model for each domain: each reads its own rows only, and the gradient is that of laws written out."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from leibler.cli.expressions import evaluate
from leibler.divergence import ForwardKL
from leibler.errors import DataError, RecipeError
from leibler.fused import Linear
from leibler.objective import (
    LogLinear,
    LogRatio,
    Match,
    Model,
    Objective,
    Old,
    Policy,
    PolicyGradient,
    Ratio,
    Routed,
    Teacher,
)
from leibler.train import Data, OnPolicy, Recipe
from leibler.train.routing import placed
from train.conformance import TEMPERATURE, Prepared, distance, gradient, ready

WHO = {
    "9=": "teacher",
    "1+2=": "extreme",
    "12+34=": "teacher",
    "5+5+5=": "extreme",
    "7=": "negative",
    "8+1=": "extreme",
}
ROUTED = Routed("prompt", WHO)


def dense(made: Prepared, name: str) -> Tensor:
    """Log-laws over the vocabulary at every position."""
    rows = made.rows["main"]
    model = made.policy if name == "policy" else made.models[name]
    logits = model.network(input_ids=rows.tokens, attention_mask=rows.attention.long()).logits
    return (logits[:, :-1, : model.vocab_size] / TEMPERATURE).log_softmax(-1)


def routed(made: Prepared) -> Tensor:
    """The law of each row's own model."""
    laws = {name: dense(made, name).detach() for name in set(WHO.values())}
    return torch.stack([laws[WHO[r.prompt]][i] for i, r in enumerate(made.rows["main"].records)])


def off(made: Prepared, loss: Tensor) -> float:
    """The distance of the engine's gradient from that of a loss written out."""
    found, _ = gradient(made)
    names = made.parameters()
    grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    wanted = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(names.items(), grads, strict=True)}
    return distance(found, wanted)


def test_the_vocabulary_is_summed_over_with_each_rows_own_model():
    made = ready(Recipe(Data(), Objective(Match(ForwardKL(), to=ROUTED))))
    q, p, mask = routed(made), dense(made, "policy"), made.rows["main"].mask
    assert len({WHO[r.prompt] for r in made.rows["main"].records}) == 3
    assert off(made, (q.exp() * (q - p)).sum(-1)[mask].mean()) < 1e-6


def test_an_extrapolation_beyond_routed_teachers():
    made = ready(Recipe(Data(), Objective(Match(ForwardKL(), to=LogLinear({ROUTED: 1.25, Model("base"): -0.25})))))
    q = (1.25 * routed(made) - 0.25 * dense(made, "base").detach()).log_softmax(-1)
    loss = (q.exp() * (q - dense(made, "policy"))).sum(-1)[made.rows["main"].mask].mean()
    assert off(made, loss) < 1e-6


def test_sampled_tokens_are_scored_by_each_rows_own_model():
    advantage = LogRatio(LogLinear({ROUTED: 1.25, Model("base"): -0.25}), Policy())
    made = ready(Recipe(OnPolicy(group_size=2), Objective(PolicyGradient(advantage, Ratio()))))
    rows = made.rows["main"]

    def at(law: Tensor) -> Tensor:
        return law.gather(-1, rows.tokens[:, 1:, None])[..., 0][rows.mask]

    p = at(dense(made, "policy"))
    score = 1.25 * at(routed(made)) - 0.25 * at(dense(made, "base").detach()) - p.detach()
    assert off(made, -(score * p).mean()) < 1e-6


@pytest.mark.parametrize("micro", [1, 5])
def test_cutting_the_batch_changes_nothing(micro: int):
    """In micro-batches of one row, two of the models have none."""
    made = ready(Recipe(Data(), Objective(Match(ForwardKL(), to=ROUTED))))
    whole, _ = gradient(made)
    cut, _ = gradient(made, micro_rows=micro)
    assert distance(cut, whole) < 1e-7


@contextmanager
def reading(made: Prepared) -> Iterator[dict[str, int]]:
    """How many rows each model reads."""
    count = dict.fromkeys(sorted(set(WHO.values())), 0)
    hooks = []
    for name in count:

        def note(module: object, given: tuple[Tensor, ...], out: object, name: str = name) -> None:
            count[name] += len(given[0])

        hooks.append(made.models[name].register_forward_hook(note))
    yield count
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("sampled", [False, True])
def test_each_model_reads_its_own_rows_only(sampled: bool):
    term = PolicyGradient(LogRatio(ROUTED, Old()), Ratio()) if sampled else Match(ForwardKL(), to=ROUTED)
    made = ready(Recipe(OnPolicy() if sampled else Data(), Objective(term)))
    with reading(made) as count:
        made.views = made.engine().annotate(made.rows, 0, made.states)
        gradient(made)
    own = [WHO[r.prompt] for r in made.rows["main"].records]
    assert count == {name: own.count(name) for name in count}


def test_a_record_of_no_domain_is_told_with_its_value():
    with pytest.raises(DataError, match=r"'prompt' of .* is '8\+1='.*models for 9= only"):
        ready(Recipe(OnPolicy(), Objective(PolicyGradient(LogRatio(Routed("prompt", {"9=": "teacher"}), Old())))))


def test_what_cannot_be_routed_is_refused():
    with pytest.raises(RecipeError, match="has no model"):
        Routed("domain", {})
    with pytest.raises(RecipeError, match="takes models by name"):
        Routed("domain", {"math": LogLinear({Teacher(): 1.0})})  # type: ignore[dict-item]
    with pytest.raises(RecipeError, match="the one that is trained"):
        Routed("domain", {"math": Policy()})
    with pytest.raises(RecipeError, match="cannot be sampled from a Routed law"):
        Recipe(OnPolicy(sampler=ROUTED), Objective(Match(ForwardKL(), to=Teacher())))


def test_placed_heads_keep_biases_and_what_is_out_of_the_support():
    g = torch.Generator().manual_seed(0)
    hidden, weight, bias = (torch.randn(*n, generator=g, dtype=torch.float64) for n in ((2, 3), (4, 3), (4,)))
    bias[3] = -math.inf
    at = torch.tensor([False, True, False, True])
    full = placed(Linear(hidden, weight, bias), at)
    assert full.bias is not None
    logits = full.hidden @ full.weight.t() + full.bias + sum(x.hidden @ x.weight.t() for x in full.low_rank)
    assert torch.allclose(logits[at].softmax(-1), (hidden @ weight.t() + bias).softmax(-1))
    assert torch.allclose(logits[~at].softmax(-1), torch.tensor([1 / 3, 1 / 3, 1 / 3, 0], dtype=torch.float64))


def test_it_is_written_on_the_command_line():
    assert evaluate("Routed('domain', {'math': 'teacher_math'})") == Routed("domain", {"math": "teacher_math"})
