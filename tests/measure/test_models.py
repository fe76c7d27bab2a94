from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from leibler.data import Addition, Brackets, Dataset, Record
from leibler.divergence import ForwardKL, JensenShannon, ReverseKL
from leibler.errors import DataError, ModelError, RecipeError
from leibler.measure import calibration, compare, evaluate, pass_at_k, token_view
from leibler.measure.models import TopHit, TopProbability, greedy
from leibler.policy import (
    CausalLM,
    character_tokenizer,
    decode_masked,
    logprobs,
    right_pad,
    sample,
    tiny_llama,
    tiny_masked,
    uniforms,
)


@pytest.fixture(scope="module")
def models() -> tuple[CausalLM, CausalLM]:
    tokenizer = character_tokenizer(Addition().alphabet)
    pair = tuple(tiny_llama(tokenizer, hidden=16, layers=1, heads=2, seed=seed) for seed in (0, 1))
    with torch.no_grad():  # random heads are almost uniform; make the laws differ
        for model in pair:
            model.head()[0].mul_(8)
    return pair


RECORDS = [*Addition(2).sample(7, seed=1), Record("", completion="1+1=2"), Record("12+3=", completion="15")]


def laws(model: CausalLM, prompt: str, completion: str, temperature: float = 1.0):
    """[tokens, vocab] float64 log-probs, one sequence at a time, without any of the library's batching."""
    head, ids = model.encode_prompt(prompt), model.encode_completion(completion)
    tokens = torch.tensor([head + ids])
    with torch.no_grad():
        hidden = model.causal(input_ids=tokens).logits[0, len(head) - 1 : -1, : model.vocab_size]
    return torch.log_softmax(hidden.double() / temperature, -1), torch.tensor(ids)


def brute(model, target, records):
    p, q, tokens = [], [], []
    for record in records:
        logp, ids = laws(model, record.prompt, record.completion)
        p.append(logp)
        q.append(laws(target, record.prompt, record.completion)[0])
        tokens.append(ids)
    return torch.cat(p), torch.cat(q), torch.cat(tokens)


def test_compare_agrees_with_the_full_logits(models):
    model, target = models
    p, q, tokens = brute(model, target, RECORDS)
    found = compare(model, target, RECORDS, [ForwardKL(), ReverseKL(), JensenShannon(beta=0.2)])
    forward, reverse = ((q.exp() * (q - p)).sum(-1).mean(), (p.exp() * (p - q)).sum(-1).mean())
    expected = {
        "tokens": len(tokens),
        "divergence/forward_kl": forward,
        "divergence/forward_kl/swapped": reverse,
        "divergence/reverse_kl": reverse,
        "divergence/reverse_kl/swapped": forward,
        "model/nll": -p[torch.arange(len(tokens)), tokens].mean(),
        "target/nll": -q[torch.arange(len(tokens)), tokens].mean(),
        "model/entropy": -(p.exp() * p).sum(-1).mean(),
        "target/entropy": -(q.exp() * q).sum(-1).mean(),
        "model/accuracy": (p.argmax(-1) == tokens).double().mean(),
        "target/calibration_error": calibration(q.exp().max(-1).values, q.argmax(-1) == tokens).error,
        "divergence/forward_kl/infinite": 0,
    }
    for a, b, name in ((p, q, "divergence/jensen_shannon"), (q, p, "divergence/jensen_shannon/swapped")):
        m = (0.2 * b.exp() + 0.8 * a.exp()).log()
        expected[name] = (0.2 * b.exp() * (b - m) + 0.8 * a.exp() * (a - m)).sum(-1).mean()
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), rel=2e-5), name
    assert abs(forward - reverse) > 0.005  # or the two directions would prove nothing
    assert found["model/perplexity"] == pytest.approx(math.exp(found["model/nll"]))
    assert sum(part["count"] for part in found["model/reliability"]) == len(tokens)


def test_the_batch_size_changes_nothing(models):
    one, all_at_once = (compare(*models, RECORDS, batch_size=size) for size in (1, 100))
    for name, value in one.items():
        if not name.endswith("reliability"):
            assert value == pytest.approx(all_at_once[name], rel=1e-5), name


def test_a_model_is_at_no_distance_from_itself_and_is_left_as_it_was(models):
    model, _ = models
    model.train()
    found = compare(model, model.copy(), RECORDS)
    assert found["divergence/forward_kl"] == found["divergence/reverse_kl/swapped"] == 0.0
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    model.eval()


def test_divergences_may_be_named(models):
    found = compare(*models, RECORDS[:2], {"near": JensenShannon(0.1), "far": JensenShannon(0.9)})
    assert {"divergence/near", "divergence/far/swapped"} <= set(found)
    both = compare(*models, RECORDS[:2], [JensenShannon(0.1), JensenShannon(0.9)])
    assert both["divergence/JensenShannon(beta=0.9)"] == found["divergence/far"]


def test_what_cannot_be_compared_is_named(models):
    model, target = models
    with pytest.raises(DataError, match="no record to measure on"):
        compare(model, target, [])
    with pytest.raises(DataError, match=r"d\.jsonl:3 has no 'completion'"):
        compare(model, target, [Record("1+1=", source="d.jsonl:3")])
    other = tiny_llama(character_tokenizer("()[]"), hidden=16, layers=1, heads=2)
    with pytest.raises(ModelError, match="tokenizers differ"):
        compare(model, other, RECORDS)
    with pytest.raises(RecipeError, match="without a gradient"):
        TopProbability().add_gradient()
    with pytest.raises(RecipeError, match="needs the token"):
        TopHit().value(None)


def teach(task, records, steps: int = 150) -> CausalLM:
    model = tiny_llama(character_tokenizer(task.alphabet), hidden=32, layers=1, heads=2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = right_pad([(model.encode_prompt(r.prompt), model.encode_completion(r.completion)) for r in records])
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        (-logprobs(model, *batch).mean()).backward()
        optimiser.step()
    return model.eval()


def test_evaluate_tells_what_was_learnt_from_what_was_not(models):
    task = Addition(digits=1)
    known = task.dataset(8, seed=1)
    model = teach(task, known)
    found = evaluate(model, known, n_samples=4, max_new_tokens=4)
    assert found["accuracy"] == 1.0
    assert found["pass@1"] > 0.9
    assert found["entropy"] < 0.2
    assert found["finished"] > 0.9
    shifted = Dataset(tuple(known.records), "shifted", check=lambda r, text: 1.0 - task.check(r, text))
    assert evaluate(model, shifted, n_samples=0, max_new_tokens=4) == {"questions": 8, "accuracy": 0.0}


def test_evaluate_agrees_with_counting_by_hand(models):
    task = Brackets(depth=1, length=1, kinds=2)
    model = teach(task, [Record("(", completion=")"), Record("[", completion="]"), Record("(", completion="()")], 10)
    data = Dataset((Record("("), Record("["), Record("[")), "brackets", check=task.check)
    found = evaluate(model, data, n_samples=6, temperature=1.3, max_new_tokens=5, seed=3, batch_size=4)
    assert found == pytest.approx(evaluate(model, data, 6, 1.3, 5, 3, batch_size=64), rel=1e-5)
    assert found != pytest.approx(evaluate(model, data, 6, 1.3, 5, 4), rel=1e-5)

    prompts = [model.encode_prompt(r.prompt) for r in data]
    numbers = uniforms(3, "evaluate", 0, rows=18, n=5)
    ids = sample(model, prompts, uniforms=numbers, temperature=1.3, group_size=6).completions()
    texts = [[model.decode(x) for x in ids[i * 6 : i * 6 + 6]] for i in range(3)]
    right = [[t for t in group if task.check(r, t)] for r, group in zip(data, texts)]
    assert 0 < sum(map(len, right)) < 18  # or the case would prove nothing
    for k in (1, 2, 4):
        assert found[f"pass@{k}"] == pytest.approx(sum(pass_at_k(6, len(group), k) for group in right) / 3)
    assert "pass@8" not in found
    assert found["distinct"] == pytest.approx(sum(len(set(group)) for group in texts) / 3)
    assert found["distinct_right"] == pytest.approx(sum(len(set(group)) for group in right) / 3)
    assert found["length"] == sum(map(len, ids)) / 18
    entropies = []
    for i, row in enumerate(ids):
        tokens = torch.tensor([prompts[i // 6] + row])
        with torch.no_grad():
            logits = model.causal(input_ids=tokens).logits[0, len(prompts[i // 6]) - 1 : -1, : model.vocab_size]
        logp = torch.log_softmax(logits.double() / 1.3, -1)
        entropies.append(-(logp.exp() * logp).sum(-1))
    assert found["entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-5)


def test_what_cannot_be_evaluated_is_named(models):
    model, _ = models
    with pytest.raises(DataError, match="d has no checker"):
        evaluate(model, Dataset((Record("1"),), "d"))
    with pytest.raises(DataError, match="d is empty"):
        evaluate(model, Dataset((), "d", check=lambda r, t: 1.0))
    with pytest.raises(DataError, match="temperature 0"):
        evaluate(model, Addition().dataset(2), temperature=0)


def test_token_view_agrees_with_the_full_logits(models):
    model, target = models
    views = token_view(model, target, "82+1", prompt="37+45=", top=3)
    (p, ids), (q, _) = laws(model, "37+45=", "82+1"), laws(target, "37+45=", "82+1")
    assert [v.token for v in views] == ids.tolist()
    assert "".join(v.text for v in views[:-1]) == "82+1"
    assert views[-1].text == model.tokenizer.eos_token
    for t, view in enumerate(views):
        assert view.model_logp == pytest.approx(float(p[t, ids[t]]), rel=1e-4)
        assert view.target_logp == pytest.approx(float(q[t, ids[t]]), rel=1e-4)
        assert view.forward_kl == pytest.approx(float((q[t].exp() * (q[t] - p[t])).sum()), rel=1e-4)
        assert view.reverse_kl == pytest.approx(float((p[t].exp() * (p[t] - q[t])).sum()), rel=1e-4)
        for tops, law in ((view.model_top, p[t]), (view.target_top, q[t])):
            best = law.exp().topk(3)
            assert [text for text, _ in tops] == [model.tokenizer.decode([i]) for i in best.indices.tolist()]
            assert [value for _, value in tops] == pytest.approx(best.values.tolist(), rel=1e-4)


def test_token_view_of_plain_text_and_of_nothing(models):
    views = token_view(*models, "1+1=2", end=False, top=100)
    assert "".join(v.text for v in views) == "1+1=2"
    assert len(views[0].model_top) == models[0].vocab_size
    assert len(token_view(*models, "")) == 1  # only the end
    with pytest.raises(DataError, match="no token"):
        token_view(*models, "", end=False)
    with pytest.raises(ModelError, match="context"):
        token_view(*models, "1" * 400)


def test_a_masked_model_is_asked_for_its_surest_answers():
    task = Addition(digits=1)
    model = tiny_masked(character_tokenizer(task.alphabet), hidden=16, layers=1, heads=2)
    data = task.dataset(6)
    found = evaluate(model, replace(data, check=lambda record, text: 1.0), n_samples=0, max_new_tokens=3, commit=2)
    assert found == {"questions": 6, "accuracy": 1.0}
    answers = greedy(model, [model.encode_prompt(r.prompt) for r in data], 3, 4, commit=3)
    whole = decode_masked(model, [model.encode_prompt(r.prompt) for r in data], length=3, commit=3)
    assert answers == whole.completions()
    with pytest.raises(DataError, match=r"surest answers only; give --samples 0"):
        evaluate(model, data, n_samples=2)
