"""Terms about some events only, labels that are not the next token, and models that read another view of the rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from leibler.divergence import ForwardKL, ReverseKL
from leibler.errors import RecipeError
from leibler.objective import (
    Given,
    Imitate,
    LogRatio,
    Match,
    Objective,
    Old,
    Policy,
    PolicyGradient,
    Ratio,
    Rows,
    SequenceMean,
    Teacher,
    concatenate,
)
from leibler.train import Data, OnPolicy, Recipe
from leibler.train.buffer import pack, unpack
from leibler.train.guards import read_batch, write_batch
from train.conformance import TEMPERATURE, Prepared, distance, gradient, ready


@dataclass(frozen=True)
class Viewed:
    """Adds a view with two more tokens before each prompt, odd labels, and columns that part the events."""

    def __call__(self, rows: Rows, context: object) -> Rows:
        before = torch.tensor([[5, 7]]).expand(len(rows), 2)
        longer = replace(
            rows,
            tokens=torch.cat([before, rows.tokens], 1),
            attention=torch.cat([torch.ones_like(before).bool(), rows.attention], 1),
            mask=torch.cat([torch.zeros_like(before).bool(), rows.mask], 1),
            columns={},
        )
        labels = torch.where(rows.mask, (rows.tokens[:, 1:] + 3) % 8 + 4, 0)
        place = torch.arange(rows.mask.shape[1])
        near = (rows.mask & (place % 2 == 0)).float()
        tagged = rows.with_columns(near=near, distant=rows.mask.float() - near, long=(rows.length > 3).float())
        return replace(tagged, labels=labels).with_view("privileged", longer)


def dense(made: Prepared, name: str, tokens: Tensor, attention: Tensor) -> Tensor:
    model = made.policy if name == "policy" else made.models[name]
    logits = model.network(input_ids=tokens, attention_mask=attention.long()).logits
    return (logits[:, :-1, : model.vocab_size] / TEMPERATURE).log_softmax(-1)


def both(made: Prepared, loss: Tensor) -> float:
    """The distance of the engine's gradient from that of a loss written out."""
    found, _ = gradient(made)
    names = made.parameters()
    grads = torch.autograd.grad(loss, list(names.values()), allow_unused=True)
    wanted = {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(names.items(), grads, strict=True)}
    return distance(found, wanted)


def test_near_tokens_are_imitated_and_distant_ones_follow_the_informed_teacher():
    made = ready(
        Recipe(
            Data() >> Viewed(),
            Objective(
                Imitate(where="near"),
                Match(ForwardKL(), to=Given(Teacher(), "privileged"), where="distant", reduce=SequenceMean()),
            ),
        )
    )
    rows = made.rows["main"]
    policy = dense(made, "policy", rows.tokens, rows.attention)
    view = rows.views["privileged"]
    # The same events, two places further on.
    teacher = dense(made, "teacher", view.tokens, view.attention)[:, 2:].detach()
    near, distant = rows.column("near") != 0, rows.column("distant") != 0
    assert rows.labels is not None
    nll = -policy.gather(-1, rows.labels[..., None])[..., 0]
    kl = (teacher.exp() * (teacher - policy)).sum(-1)
    each = (kl * distant).sum(1) / distant.sum(1).clamp_min(1)
    loss = (nll * near).sum() / near.sum() + each.sum() / (distant.sum(1) > 0).sum()
    assert both(made, loss) < 1e-6


@pytest.mark.parametrize("micro", [1, 2, 5])
def test_cutting_the_batch_changes_nothing(micro: int):
    made = ready(
        Recipe(
            Data() >> Viewed(),
            Objective(
                Imitate(where="near", reduce=SequenceMean()),
                Match(ReverseKL(), to=Given(Policy(), "privileged"), where="distant"),
            ),
        )
    )
    whole, step = gradient(made)
    cut, again = gradient(made, micro_rows=micro)
    assert distance(cut, whole) < 1e-7
    assert again.metrics == pytest.approx(step.metrics, rel=1e-6)


def test_events_outside_do_not_count_whatever_they_hold():
    """A term on some rows is the term on a batch of those rows alone."""
    made = ready(Recipe(Data() >> Viewed(), Objective(Imitate(where="long"))))
    alone = ready(Recipe(Data() >> Viewed(), Objective(Imitate())))
    keep = (alone.rows["main"].column("long") != 0).nonzero()[:, 0]
    few = {name: view.select(keep) for name, view in alone.views.items()}
    assert 0 < len(keep) < len(made.rows["main"])
    found, step = gradient(made)
    wanted, other = gradient(alone, views=few)
    assert distance(found, wanted) < 1e-7
    assert step.metrics["loss"] == pytest.approx(other.metrics["loss"])


def test_the_metric_of_a_term_is_of_its_own_events():
    kl = Match(ForwardKL(), to=Teacher(), where="near")
    made = ready(Recipe(Data() >> Viewed(), Objective(kl)))
    _, step = gradient(made)
    assert step.metrics["divergence/ForwardKL(teacher)"] == pytest.approx(step.metrics["loss/ForwardKL(teacher)"])


def test_controllers_hear_of_the_responses_that_a_term_is_about():
    """The divergence per response of a term about some rows is that of the term on a batch of those rows alone."""
    kl = Match(ForwardKL(), to=Teacher())
    made, alone = (ready(Recipe(Data() >> Viewed(), Objective(t))) for t in (replace(kl, where="long"), kl))
    keep = (alone.rows["main"].column("long") != 0).nonzero()[:, 0]
    assert 0 < len(keep) < len(made.rows["main"])
    (found,) = gradient(made, micro_rows=2)[1].own.values()
    (wanted,) = gradient(alone, views={n: v.select(keep) for n, v in alone.views.items()})[1].own.values()
    assert found == pytest.approx(wanted)
    assert found["sequences"] == len(keep)


def test_a_sampled_ratio_reads_the_view():
    ratio = LogRatio(Given(Teacher(), "privileged"), Given(Old(), "privileged"))
    made = ready(Recipe(OnPolicy(2) >> Viewed(), Objective(PolicyGradient(ratio, Ratio()))))
    rows = made.rows["main"]
    view = rows.views["privileged"]
    laws = [dense(made, name, view.tokens, view.attention)[:, 2:] for name in ("teacher", "policy")]
    assert rows.labels is not None
    taken = [law.gather(-1, rows.labels[..., None])[..., 0] for law in laws]
    advantage = (taken[0] - taken[1]).detach()
    score = dense(made, "policy", rows.tokens, rows.attention).gather(-1, rows.labels[..., None])[..., 0]
    assert both(made, -(advantage * score * rows.mask).sum() / rows.mask.sum()) < 1e-6


def test_rows_keep_views_and_labels_through_cuts_and_files(tmp_path):
    rows = ready(Recipe(Data() >> Viewed(), Objective(Imitate()))).rows["main"]
    half = len(rows) // 2
    first, second = rows.select(torch.arange(half)), rows.select(torch.arange(half, len(rows)))
    for again in (
        concatenate([first, second]),
        unpack(pack(rows)),
        read_batch(write_batch(tmp_path, 1, {"main": rows}, {}))["main"],
    ):
        assert torch.equal(again.label, rows.label)
        assert torch.equal(again.views["privileged"].tokens, rows.views["privileged"].tokens)
        assert torch.equal(again.inside("near"), rows.inside("near"))


def test_a_role_is_a_where():
    rows = ready(Recipe(Data(), Objective(Imitate()))).rows["main"]
    paired = replace(rows, role=torch.tensor([1, 2] * (len(rows) // 2)))
    assert torch.equal(paired.inside("chosen").any(1), torch.tensor([True, False] * (len(rows) // 2)))
    assert torch.equal(paired.inside("chosen") | paired.inside("rejected"), paired.mask)
    assert not paired.inside("sample").any()


def test_mistakes_are_named():
    rows = ready(Recipe(Data(), Objective(Imitate()))).rows["main"]
    with pytest.raises(RecipeError, match="no view 'privileged'"):
        rows.view("privileged")
    with pytest.raises(RecipeError, match="each row as many"):
        rows.with_view("privileged", replace(rows, mask=rows.mask & False))
    with pytest.raises(RecipeError, match="no column 'near'"):
        gradient(ready(Recipe(Data(), Objective(Imitate(where="near")))))
    with pytest.raises(RecipeError, match="name the model"):
        Recipe(OnPolicy(sampler=Given(Teacher())), Objective(Imitate()))
    with pytest.raises(RecipeError, match=r"Given\(Old\(\)\)"):
        Recipe(OnPolicy(), Objective(PolicyGradient(LogRatio(Given(Policy()), Old()), Ratio())))
