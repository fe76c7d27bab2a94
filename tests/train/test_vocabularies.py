"""Runs whose teacher has another tokenizer, judged by dense float64 logits and by runs without the difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from leibler.cli import main
from leibler.data import Dataset, Record
from leibler.divergence import Divergence, ForwardKL, JensenShannon, ReverseKL
from leibler.errors import ModelError, RecipeError
from leibler.estimate import K2
from leibler.objective import Imitate, LogLinear, Match, Objective, SequenceMean, Teacher
from leibler.policy import CausalLM, character_tokenizer, train_bpe
from leibler.policy.vocabulary import TextAlignment
from leibler.train import Context, Data, OnPolicy, Recipe, fit
from leibler.train.aligned import alignments
from leibler.train.engine import Engine
from leibler.train.models import EMA, resolve
from leibler.train.sources import Source
from leibler.train.tally import Step
from train import running
from train.conformance import TEMPERATURE, distance, size, tiny

TEXTS = ["the theme of the other theorem, ", "there and then: a thing is this. ", "é ü 漢字 "] * 6
RECORDS = (
    Record("the ", completion="theorem is"),
    Record("a thing", completion=": there and é"),
    Record("this ", completion="is"),
    Record("other ", completion="theme of the other"),
)
SMALL, LARGE = train_bpe(TEXTS, size=275), train_bpe(TEXTS, size=400)


def permuted(tokenizer: PreTrainedTokenizerFast, order: list[int]) -> PreTrainedTokenizerFast:
    """The same tokenizer with entry i under the number ``order[i]``."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] = {entry: order[n] for entry, n in content["model"]["vocab"].items()}
    for added in content["added_tokens"]:
        added["id"] = order[added["id"]]
    names = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("pad", "bos", "eos")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **names)


def renumbered(model: CausalLM, order: list[int]) -> CausalLM:
    """The same model with its entries under other numbers."""
    twin = tiny(1, tokenizer=permuted(model.tokenizer, order))
    state = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        state[name][order] = model.network.state_dict()[name][: len(order)]
    twin.network.load_state_dict(state)
    return twin


def drawn(source: Source, models: dict[str, CausalLM], seed: int = 5) -> Any:
    context = Context(
        models=models, data={"train": Dataset(RECORDS, "made")}, seed=seed, draw=0, step=0, steps=10, rows=4,
        max_new_tokens=6, max_length=64, temperature=TEMPERATURE,
    )  # fmt: skip
    return source.draw(context, source.init())[0]


def descend(
    recipe: Recipe,
    policy: CausalLM,
    teacher: CausalLM,
    aligned: dict[str, TextAlignment] | None = None,
    *,
    plan: str | None = None,
    micro_rows: int | None = None,
) -> tuple[dict[str, Tensor], Step, Any]:
    """Gradient and metrics of one optimiser batch."""
    policy.requires_grad_(True)
    models = {"policy": policy, "teacher": teacher.requires_grad_(False)}
    engine = Engine(
        recipe, policy, models, {}, temperature=TEMPERATURE, alignments=aligned or {}, micro_rows=micro_rows
    )
    if plan is not None:
        engine.plans = {name: replace(p, kind=plan) for name, p in engine.plans.items()}  # type: ignore[arg-type]
    rows = drawn(recipe.source, models)
    policy.zero_grad()
    step = engine.accumulate(engine.annotate(rows, 0, {}))
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in policy.named_parameters()}
    return found, step, rows["main"]


DIVERGENCES = [ForwardKL(), ReverseKL(), JensenShannon(0.3)]


# ---- where nothing differs, nothing changes ------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("plan", ["one pass", "two-pass head", "survey and replay"])
def test_equal_tokenizers_give_the_plain_loss(divergence: Divergence, plan: str) -> None:
    policy, teacher = tiny(0, tokenizer=SMALL, padding=2), tiny(1, tokenizer=SMALL, padding=5)
    recipe = Recipe(Data(), Objective(Match(divergence, to=Teacher()), Imitate(coefficient=0.3)))
    plain, before, _ = descend(recipe, policy, teacher, plan=plan)
    aligned = {"teacher": TextAlignment(policy, teacher)}
    found, after, _ = descend(recipe, policy, teacher, aligned, plan=plan, micro_rows=2)
    assert distance(found, plain) < 1e-12
    assert size(plain) > 1e-3
    assert after.metrics["aligned/teacher"] == 1.0
    assert after.metrics["loss"] == pytest.approx(before.metrics["loss"], rel=1e-12)
    assert "aligned/teacher" not in before.metrics


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_same_entries_under_other_numbers_give_the_plain_loss(divergence: Divergence) -> None:
    policy, teacher = tiny(0, tokenizer=SMALL), tiny(1, tokenizer=SMALL)
    order = torch.randperm(len(SMALL), generator=torch.Generator().manual_seed(0)).tolist()
    other = renumbered(teacher, order)
    recipe = Recipe(Data(), Match(divergence, to=Teacher()))  # type: ignore[arg-type]
    plain, before, _ = descend(recipe, policy, teacher)
    found, after, _ = descend(recipe, policy, other, {"teacher": TextAlignment(policy, other)})
    assert distance(found, plain) < 1e-10
    assert after.metrics["loss"] == pytest.approx(before.metrics["loss"], rel=1e-10)
    # and the numbers do matter: read as they stand, they give something else
    wrong, _, _ = descend(recipe, policy, other)
    assert distance(wrong, plain) > 0.01


# ---- two tokenizers, by brute force --------------------------------------------------------------------------------


def spelt(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True)


def brute_force(policy: CausalLM, teacher: CausalLM, rows: Any, divergence: Divergence, texts: list[tuple[str, str]]):
    """The sum of the divergences at common boundaries, from whole logits, one position at a time."""
    cell = [m.cell for m in TextAlignment(policy, teacher).maps]
    cells = int(max(c.max() for c in cell)) + 1
    total = torch.zeros((), dtype=torch.float64)
    shared = 0

    def law(model: CausalLM, tokens: list[int], side: int) -> Tensor:
        logits = model.causal(input_ids=torch.tensor([tokens])).logits[0, -1, : model.vocab_size] / TEMPERATURE
        logits = logits.masked_fill(cell[side] < 0, -torch.inf).log_softmax(-1)
        return torch.stack([logits[cell[side] == c].logsumexp(0) for c in range(cells)])

    for number, (prompt, text) in enumerate(texts):
        tokens = rows.tokens[number][rows.attention[number]].tolist()
        start = len(policy.tokenizer.encode(prompt))
        mine, there = tokens[start:], teacher.tokenizer.encode(text)
        ahead = policy.tokenizer.encode(prompt), teacher.tokenizer.encode(prompt)
        read = {spelt(teacher.tokenizer, there[:n]): n for n in range(len(there) + 1)}
        for n in range(len(mine)):
            said = spelt(policy.tokenizer, mine[:n])
            if said in read and "�" not in said:
                p = law(policy, [*ahead[0], *mine[:n]], 0)
                with torch.no_grad():
                    q = law(teacher, [*ahead[1], *there[: read[said]]], 1)
                total = total + divergence(p[None], q[None])[0]
                shared += 1
    return total, shared


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("swap", [False, True])
def test_value_and_gradient_at_common_boundaries(divergence: Divergence, swap: bool) -> None:
    here, there = (LARGE, SMALL) if swap else (SMALL, LARGE)
    policy, teacher = tiny(0, tokenizer=here, padding=3), tiny(1, tokenizer=there, padding=1)
    recipe = Recipe(Data(), Match(divergence, to=Teacher()))  # type: ignore[arg-type]
    found, step, rows = descend(recipe, policy, teacher, {"teacher": TextAlignment(policy, teacher)})
    policy.zero_grad()
    texts = [(r.prompt, r.completion or "") for r in rows.records]
    total, shared = brute_force(policy, teacher, rows, divergence, texts)
    events = int(rows.mask.sum())
    (total / events).backward()
    judge = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in policy.named_parameters()}
    assert 0 < shared <= events
    assert swap or shared < events
    assert step.metrics["aligned/teacher"] == pytest.approx(shared / events)
    assert step.metrics["loss"] == pytest.approx(float(total.detach()) / events, rel=1e-9)
    assert distance(found, judge) < 1e-6  # the layers normalise in single precision


def test_rows_of_padding_get_no_gradient() -> None:
    policy, teacher = tiny(1, tokenizer=SMALL, padding=4), tiny(3, tokenizer=LARGE, padding=9)
    recipe = Recipe(Data(), Match(ForwardKL(), to=Teacher()))  # type: ignore[arg-type]
    found, _, _ = descend(recipe, policy, teacher, {"teacher": TextAlignment(policy, teacher)})
    head = found["network.lm_head.weight"]  # not tied
    assert bool(head[: policy.vocab_size].any(dim=1).all())
    assert not head[policy.vocab_size :].any()


def test_own_responses_are_read_anew() -> None:
    """Sampled tokens need not be what the student's own tokenizer would make of their text."""
    policy, teacher = tiny(0, tokenizer=SMALL), tiny(1, tokenizer=LARGE)
    recipe = Recipe(OnPolicy(2), Match(ReverseKL(), to=Teacher()))  # type: ignore[arg-type]
    found, step, _ = descend(recipe, policy, teacher, {"teacher": TextAlignment(policy, teacher)})
    assert 0 < step.metrics["aligned/teacher"] <= 1
    assert size(found) > 1e-3
    again, _, _ = descend(recipe, policy, teacher, {"teacher": TextAlignment(policy, teacher)}, micro_rows=1)
    assert distance(again, found) < 1e-10


def test_a_tempered_or_weighted_law_of_one_teacher_works() -> None:
    policy, teacher = tiny(0, tokenizer=SMALL), tiny(1, tokenizer=LARGE)
    alone = Recipe(Data(), Match(ForwardKL(), to=Teacher()))  # type: ignore[arg-type]
    same = Recipe(Data(), Match(ForwardKL(), to=LogLinear({Teacher(): 1.0})))  # type: ignore[arg-type]
    sharp = Recipe(Data(), Match(ForwardKL(), to=LogLinear({Teacher(): 2.0})))  # type: ignore[arg-type]
    aligned = {"teacher": TextAlignment(policy, teacher)}
    plain, other, sharper = (descend(r, policy, teacher, aligned)[0] for r in (alone, same, sharp))
    assert distance(other, plain) < 1e-10
    assert distance(sharper, plain) > 0.01


def test_means_over_sequences_keep_their_denominator() -> None:
    policy, teacher = tiny(0, tokenizer=SMALL), tiny(1, tokenizer=SMALL)
    recipe = Recipe(Data(), Match(ForwardKL(), to=Teacher(), reduce=SequenceMean()))  # type: ignore[arg-type]
    plain = descend(recipe, policy, teacher)[0]
    assert distance(descend(recipe, policy, teacher, {"teacher": TextAlignment(policy, teacher)})[0], plain) < 1e-12


# ---- whole runs ----------------------------------------------------------------------------------------------------

DATA = [{"prompt": r.prompt, "completion": r.completion} for r in RECORDS] * 2


def student(tokenizer: Any = SMALL, seed: int = 0) -> CausalLM:
    return tiny(seed, dtype=torch.float32, loud=6.0, tokenizer=tokenizer)


@pytest.mark.parametrize("slug", ["kd", "gkd"])
def test_a_run_brings_the_student_nearer(slug: str, tmp_path: Path) -> None:
    run = fit(
        slug, student=student(), teacher=student(LARGE, 1), data=DATA, validation=DATA, out=tmp_path / "a", steps=30,
        batch_size=8, learning_rate=0.01, max_new_tokens=8, align="text", validate_every=29, quiet=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    checks = [json.loads(line) for line in (run.out / "validation.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert 0 < checks[-1]["aligned(teacher)"] < 1
    assert checks[-1]["ForwardKL(teacher)"] > 0
    if slug == "kd":
        # The same numbers, one a mean over the positions that are shared, the other over all.
        assert checks[0]["ForwardKL(teacher)"] * checks[0]["aligned(teacher)"] == pytest.approx(
            lines[-1]["loss"], rel=0.3
        )


def test_a_run_that_is_gone_on_with_is_the_same_run(tmp_path: Path) -> None:
    """The teacher reads pairs of characters; the student, single ones."""
    pairs = student(train_bpe([r["prompt"] + r["completion"] for r in running.RECORDS], size=290), 1)
    options: dict[str, Any] = {"teacher": pairs, "align": "text", "save_every": 2}
    whole = running.run(running.recipe("gkd"), tmp_path / "whole", **options)
    part = running.interrupted(lambda stop: running.recipe("gkd", stop), tmp_path / "part", 3, **options)
    assert running.written(part.out) == running.written(whole.out)
    assert b"aligned/teacher" in running.written(whole.out)["metrics.jsonl"]


def test_without_the_option_the_message_names_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"the student has 275 entries and the teacher 293.*with align=text\.$"):
        fit("kd", student=student(), teacher=student(LARGE, 1), data=DATA, out=tmp_path / "a", steps=1, quiet=True)


def test_what_only_a_common_tokenizer_can_answer_is_refused(tmp_path: Path) -> None:
    policy, teacher = student(), student(LARGE, 1)
    sampled = Recipe(OnPolicy(), Match(ReverseKL(), to=Teacher(), estimator=K2()))  # type: ignore[arg-type]
    both = Recipe(Data(), Match(ForwardKL(), to=LogLinear({Teacher(): 2.0, "reference": -1.0})))  # type: ignore[arg-type]
    written = Recipe(OnPolicy(sampler=Teacher()), Match(ForwardKL(), to=Teacher()))  # type: ignore[arg-type]
    for recipe, message in (
        (sampled, "align=text compares laws over the vocabulary: use the estimator Exact"),
        (both, "a target combines reference, teacher, whose tokenizers differ"),
        (written, "responses are sampled from 'teacher'"),
    ):
        models, _ = resolve(recipe.models, policy, {"teacher": teacher}, "text")
        with pytest.raises(RecipeError, match=message):
            alignments(recipe, policy, {**models, "policy": policy})
    moving = Recipe(Data(), Match(ForwardKL(), to=Teacher()), models={"teacher": EMA(0.1, "teacher")})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"take teacher and student of one family\.$"):
        resolve(moving.models, policy, {"teacher": teacher}, "text")


def test_the_command_line_takes_the_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student().save(tmp_path / "s")
    student(character_tokenizer(TEXTS), 1).save(tmp_path / "t")
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(r) for r in DATA))
    given = [f"student={tmp_path / 's'}", f"teacher={tmp_path / 't'}", f"data={tmp_path / 'd.jsonl'}", "steps=1"]
    with pytest.raises(SystemExit) as refused:
        main(["train", "kd", *given, f"out={tmp_path / 'a'}"])
    assert refused.value.code == 2
    assert "align=text" in capsys.readouterr().err
    with pytest.raises(SystemExit) as done:
        main(["train", "kd", *given, f"out={tmp_path / 'b'}", "align=text"])
    assert not done.value.code
    assert "aligned/teacher" in (tmp_path / "b" / "metrics.jsonl").read_text()
    assert "align: text" in (tmp_path / "b" / "run.yaml").read_text()
