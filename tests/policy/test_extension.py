"""New tokens: their rows, and the law of the old model over them, judged by products of single pieces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from leibler.divergence import ForwardKL, ReverseKL
from leibler.errors import ModelError, RecipeError
from leibler.estimate import K2
from leibler.fused import Linear, TargetRows, Want, functionals
from leibler.objective import Lift, LogLinear, Match, Teacher
from leibler.policy import CausalLM, Lora, character_tokenizer, right_pad
from leibler.policy.extension import Lifting, extend
from leibler.policy.vocabulary import TextAlignment
from leibler.train import Data, OnPolicy, Recipe
from leibler.train.aligned import alignments, event_states
from train.conformance import distance, tiny
from train.test_vocabularies import descend

ALPHABET = "abcdefghijklmnopqrstuvwxyz :é漢字"
WORDS = ["the", "theo", "there", "is", "th", "n a"]  # one begins another, one holds a space


def pair(padding: int = 0) -> tuple[CausalLM, CausalLM]:
    """A student with new tokens and other weights, and the model that it was extended from."""
    teacher = tiny(1, tokenizer=character_tokenizer(ALPHABET), padding=padding)
    student = extend(tiny(3, tokenizer=character_tokenizer(ALPHABET), padding=padding), WORDS, "random")
    return student, teacher


# ---- rows of new tokens ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, 3, 20])
def test_old_rows_stay_and_new_ones_begin_as_asked(padding: int) -> None:
    model = tiny(1, tokenizer=character_tokenizer(ALPHABET), padding=padding)
    pieces = model.tokenizer.encode("the", add_special_tokens=False)
    for init in ("mean", "last", "random"):
        made = extend(model, WORDS, init)  # type: ignore[arg-type]
        assert made.vocab_size == model.vocab_size + len(WORDS)
        number = made.tokenizer.convert_tokens_to_ids("the")
        for get in ("get_input_embeddings", "get_output_embeddings"):
            old, new = (getattr(m.causal, get)().weight for m in (model, made))
            assert torch.equal(new[: model.vocab_size], old[: model.vocab_size])
            expected = {"mean": old[pieces].mean(0), "last": old[pieces[-1]]}.get(init)
            if expected is not None:
                torch.testing.assert_close(new[number], expected)
            else:
                assert 0.3 < float(new[model.vocab_size : made.vocab_size].std() / old[: model.vocab_size].std()) < 3
        assert made.tokenizer.encode("theme") == [number, *model.tokenizer.encode("me")]
    assert model.tokenizer.encode("the") == pieces  # the model itself is as it was


def test_a_tied_head_stays_tied_and_nothing_new_is_refused(tmp_path) -> None:
    model = tiny(2, tokenizer=character_tokenizer(ALPHABET))
    made = extend(model, ["the"])
    assert made.causal.get_input_embeddings().weight is made.causal.get_output_embeddings().weight  # type: ignore
    made.save(tmp_path)
    assert CausalLM.load(tmp_path).tokenizer.encode("thea") == made.tokenizer.encode("thea")
    with pytest.raises(ModelError, match="one token already"):
        extend(made, ["the", "a"])
    with pytest.raises(ModelError, match="empty word"):
        extend(model, ["the", ""])


def test_a_model_with_an_adapter_is_refused() -> None:
    model = tiny(1, tokenizer=character_tokenizer(ALPHABET)).adapted(Lora(targets=("lm_head",)))
    with pytest.raises(ModelError, match="with an adapter cannot be extended; save it and load the merged"):
        extend(model, ["the"])


# ---- the lifted law ------------------------------------------------------------------------------------------------


def log_law(model: CausalLM, tokens: list[int]) -> Tensor:
    return model.causal(input_ids=torch.tensor([tokens])).logits[0, -1, : model.vocab_size].log_softmax(-1)


def lifted_by_hand(teacher: CausalLM, student: CausalLM, text: str) -> Tensor:
    """tau by enumeration: each new token's product of pieces, less that of the longer ones that begin with it."""
    names = {n: e for e, n in student.tokenizer.get_vocab().items()}
    context = teacher.tokenizer.encode(text)
    mass = {}
    for word in WORDS:
        total, so_far = 0.0, list(context)
        for piece in teacher.tokenizer.encode(word):
            total += float(log_law(teacher, so_far)[piece])
            so_far.append(piece)
        mass[word] = torch.tensor(total, dtype=torch.float64).exp()
    p = log_law(teacher, context).exp()
    out = torch.zeros(student.vocab_size, dtype=torch.float64)
    everything = {**{names[n]: p[n] for n in range(teacher.vocab_size)}, **mass}
    for number in range(student.vocab_size):
        name = names[number]
        longer = [w for w in WORDS if w.startswith(name) and w != name]
        # Only the nearest: what begins with a longer one that begins with this is counted there.
        nearest = [w for w in longer if not any(w.startswith(v) and v != w for v in longer)]
        out[number] = everything[name] - sum(mass[w] for w in nearest)
    return out


def the_lift(student: CausalLM, teacher: CausalLM, batch: Any, threshold: float = 0.0, temperature: float = 1.0):
    alignment = TextAlignment(student, teacher)
    reading = alignment.read(*batch)
    with torch.no_grad():
        hidden = event_states(teacher(reading.tokens, reading.attention), reading)
        law = TargetRows((teacher.linear(hidden, temperature),))
        return Lifting(alignment).target(law, reading, teacher, threshold, 64), reading, law


def rows_of(target: Any) -> Tensor:
    """The law that a target compares with, at every row: -d KL(target || model) / d logits, plus the model's."""
    n = target.leaves[0].tokens
    bias = torch.zeros(target.model_map.vocab, dtype=torch.float64, requires_grad=True)
    rows = []
    for i in range(n):
        model = Linear(torch.zeros(n, 1).double(), torch.zeros(len(bias), 1).double(), bias)
        value = functionals(model, [Want(ForwardKL(), 0)], [target])[0]
        (gradient,) = torch.autograd.grad(value[i], bias)
        rows.append(torch.softmax(bias.detach(), 0) - gradient)
    return torch.stack(rows)


@pytest.mark.parametrize("padding", [0, 4])
def test_the_lifted_law_is_the_product_over_pieces(padding: int) -> None:
    student, teacher = pair(padding)
    texts = [("a", "theo is"), ("is ", "n and there")]
    batch = right_pad([(student.encode_prompt(p), student.encode_completion(c)) for p, c in texts])
    target, reading, _ = the_lift(student, teacher, batch)
    assert bool(reading.present.all())
    found = rows_of(target)
    row = 0
    for prompt, text in texts:
        tokens = student.tokenizer.encode(text)
        for n in range(len(tokens) + 1):
            expected = lifted_by_hand(teacher, student, prompt + student.tokenizer.decode(tokens[:n]))
            torch.testing.assert_close(found[row], expected, rtol=1e-5, atol=1e-9)
            row += 1
    assert row == len(found)
    torch.testing.assert_close(found.sum(-1), torch.ones(row, dtype=torch.float64))
    assert bool((found > -1e-12).all())


def test_pushing_the_lifted_law_forward_gives_the_old_law_and_a_smaller_divergence() -> None:
    student, teacher = pair()
    batch = right_pad([(student.encode_prompt("a"), student.encode_completion("theo is n and there"))])
    target, reading, law = the_lift(student, teacher, batch)
    alignment = TextAlignment(student, teacher)
    tau, p = rows_of(target), functionals_law(law.leaves[0])
    first_piece = alignment.maps[0](tau.clamp(min=0).log()).exp()
    torch.testing.assert_close(first_piece, alignment.maps[1](p).exp(), rtol=1e-9, atol=1e-12)
    hidden = student(*batch[:2])[:, :-1][batch[2]]
    model, wants = student.linear(hidden), [Want(ForwardKL(), 0)]
    full = functionals(model, wants, [target], vocab=student.vocab_size)[0]
    pushed = functionals(model, wants, [alignment.merged(law, reading)], vocab=student.vocab_size)[0]
    assert bool((pushed <= full).all())
    assert bool((pushed < full - 1e-3).any())


def functionals_law(leaf: Linear) -> Tensor:
    return (torch.nn.functional.linear(leaf.hidden, leaf.weight, leaf.bias) / leaf.temperature).log_softmax(-1)


def test_a_threshold_leaves_a_law_and_follows_less() -> None:
    student, teacher = pair()
    batch = right_pad([(student.encode_prompt("a"), student.encode_completion("theo is n and there"))])
    counted = {}
    for threshold in (0.0, 0.05, 0.99):
        calls = []

        def states(tokens: Tensor, attention: Tensor, calls: list[int] = calls) -> Tensor:
            calls.append(len(tokens))
            return teacher(tokens, attention)

        alignment = TextAlignment(student, teacher)
        reading = alignment.read(*batch)
        with torch.no_grad():
            law = TargetRows((teacher.linear(event_states(teacher(reading.tokens, reading.attention), reading)),))
            target = Lifting(alignment).target(law, reading, states, threshold, 64)
        found = rows_of(target)
        torch.testing.assert_close(found.sum(-1), torch.ones(len(found), dtype=torch.float64))
        torch.testing.assert_close(
            alignment.maps[0](found.clamp(min=0).log()).exp(),
            alignment.maps[1](functionals_law(law.leaves[0])).exp(),
            rtol=1e-9,
            atol=1e-12,
        )
        counted[threshold] = sum(calls)
    assert counted[0.0] > counted[0.05] > counted[0.99]


def test_a_teacher_with_more_entries_cannot_be_lifted() -> None:
    student, teacher = pair()
    with pytest.raises(ModelError, match=r"\d+ entries of the teacher, such as b'.*extends its own only"):
        Lifting(TextAlignment(teacher, student))


# ---- in a recipe ---------------------------------------------------------------------------------------------------


def test_a_recipe_descends_the_lifted_divergence() -> None:
    student, teacher = pair(2)
    recipe = Recipe(Data(), Match(ForwardKL(), to=Lift(Teacher(), threshold=0.0)))  # type: ignore[arg-type]
    aligned = {"teacher": TextAlignment(student, teacher)}
    found, step, rows = descend(recipe, student, teacher, aligned)
    student.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(rows)):
        tokens = rows.tokens[i][rows.attention[i]].tolist()
        for t in rows.mask[i].nonzero()[:, 0].tolist():
            logits = student.causal(input_ids=torch.tensor([tokens[: t + 1]])).logits[0, -1, : student.vocab_size]
            text = student.tokenizer.decode(tokens[: t + 1])
            tau = hot(lifted_by_hand, teacher, student, text)
            total = total + (tau * (tau.clamp(min=1e-300).log() - (logits / 0.8).log_softmax(-1))).sum()
    (total / rows.mask.sum()).backward()
    judge = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in student.named_parameters()}
    assert step.metrics["loss"] == pytest.approx(float(total.detach() / rows.mask.sum()), rel=1e-5)
    assert distance(found, judge) < 1e-5


def hot(law: Any, teacher: CausalLM, student: CausalLM, text: str) -> Tensor:
    """At the temperature of the engine's tests, 0.8: the same as a head that is larger by its inverse."""
    hotter = teacher.copy()
    with torch.no_grad():
        hotter.head()[0].mul_(1 / 0.8)
    return law(hotter, student, text)


def test_without_new_tokens_lifting_changes_nothing() -> None:
    tokenizer = character_tokenizer(ALPHABET)
    student, teacher = tiny(1, tokenizer=tokenizer), tiny(3, tokenizer=tokenizer)
    plain = descend(Recipe(Data(), Match(ForwardKL(), to=Teacher())), student, teacher)[0]  # type: ignore[arg-type]
    lifted = Recipe(Data(), Match(ForwardKL(), to=Lift(Teacher())))  # type: ignore[arg-type]
    assert distance(descend(lifted, student, teacher)[0], plain) == 0
    aligned = {"teacher": TextAlignment(student, teacher)}
    assert distance(descend(lifted, student, teacher, aligned)[0], plain) < 1e-12


def test_what_lifting_cannot_mean() -> None:
    with pytest.raises(RecipeError, match="not an expression over several"):
        Lift(LogLinear({Teacher(): 2.0}))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="a probability from 0 to below 1"):
        Lift(Teacher(), threshold=1.0)
    with pytest.raises(RecipeError, match=r"made over the whole vocabulary.*use Exact\(\)"):
        Recipe(OnPolicy(), Match(ReverseKL(), to=Lift(Teacher()), estimator=K2()))  # type: ignore[arg-type]
    student, teacher = pair()
    recipe = Recipe(Data(), Match(ForwardKL(), to=Lift(Teacher())))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="extends its own only"):
        alignments(recipe, teacher, {"policy": teacher, "teacher": student})
