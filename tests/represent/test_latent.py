"""The first stage of latent reasoning: what each token sees, what the laws are, who learns, going on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leibler.data import Dataset, Record, load
from leibler.errors import DataError, ModelError, RunError
from leibler.policy import CausalLM, character_tokenizer, tiny_llama
from leibler.policy.latent import embedding_rows
from leibler.represent.compressing import LATENTS, Settings, compress
from leibler.represent.latent import Encoder, Example, answer_logp, layout, read

TOKENIZER = character_tokenizer("0123456789+=[]")


def model(seed: int = 0, tie: bool = True, loud: float = 5.0) -> CausalLM:
    network = tiny_llama(TOKENIZER, hidden=16, layers=2, heads=2, tie=tie, seed=seed).double().requires_grad_(True)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(loud if parameter.ndim > 1 else 1)
    return network


def data(n: int = 12) -> Dataset:
    rows = [Record(f"{i}=", completion=str(i % 10), extra={"reasoning": "1+" * (1 + i % 4) + "2"}) for i in range(n)]
    return Dataset(tuple(rows), "made")


EXAMPLES = [Example([4, 5], [6, 7, 8, 9, 10], [11, 2]), Example([5], [6, 8, 4], [12, 13, 2])]
NEVER = (0, 2, 16, 17)


def test_each_token_sees_what_it_may_and_no_more():
    """By definition, one pair of places after the other."""
    for rate, span in [(2, 1), (2, 2), (3, 1), (1, 0), (2, 0)]:
        found = layout(EXAMPLES, rate, span)
        for row, example in enumerate(EXAMPLES):
            question, words = len(example.question), len(example.question) + len(example.reasoning)
            thoughts = example.thoughts(rate)
            for i in range(found.tokens.shape[1]):
                for j in range(found.tokens.shape[1]):
                    if i == j:
                        allowed = True
                    elif i < words:
                        allowed = j < i
                    elif i < words + thoughts:
                        own = i - words
                        segment = (j - question) // rate
                        near = own - span < segment if span else True
                        allowed = j < question or (question <= j < words and segment <= own and near)
                    else:
                        allowed = False
                    assert bool(found.visible[row, i, j]) == allowed, (rate, span, row, i, j)
            ends = [min((s + 1) * rate, len(example.reasoning)) + question for s in range(thoughts)]
            assert found.positions[row, words : words + thoughts].tolist() == ends
            assert int(found.compress[row].sum()) == thoughts


@pytest.mark.parametrize("tie", [True, False])
def test_a_law_depends_on_the_text_up_to_its_segment_alone(tie: bool):
    encoder = Encoder(model(tie=tie), NEVER)
    whole = encoder(layout(EXAMPLES, 2, 0))
    assert whole.shape == (5, encoder.model.vocab_size)
    torch.testing.assert_close(whole.sum(-1), torch.ones(5, dtype=torch.float64))
    assert not whole[:, list(NEVER)].any()
    # Cutting the reasoning off after the second segment changes neither of the first two laws.
    short = encoder(layout([replace(EXAMPLES[0], reasoning=[6, 7, 8, 9])], 2, 0))
    torch.testing.assert_close(whole[:2], short, rtol=1e-9, atol=1e-12)
    # Nor does the batch.
    torch.testing.assert_close(whole[3:], encoder(layout(EXAMPLES[1:], 2, 0)), rtol=1e-9, atol=1e-12)
    other = encoder(layout([replace(EXAMPLES[0], reasoning=[6, 7, 8, 12, 10])], 2, 0))
    torch.testing.assert_close(whole[0], other[0], rtol=1e-9, atol=1e-12)
    assert float((whole[1] - other[1]).detach().abs().max()) > 1e-6


def test_the_law_is_that_of_a_model_that_reads_a_compress_token_after_the_segment():
    """With all segments visible a compress token is an ordinary last token: one plain causal pass per law."""
    encoder = Encoder(model(), NEVER)
    matrix = embedding_rows(encoder.model)
    found = encoder(layout(EXAMPLES[:1], 2, 0))
    for number, end in enumerate([2, 4, 5]):
        read_here = matrix[torch.tensor(EXAMPLES[0].question + EXAMPLES[0].reasoning[:end])]
        embedded = torch.cat([read_here, encoder.compress[None]])[None]
        z = encoder.model.network(inputs_embeds=embedded).logits[0, -1, : encoder.model.vocab_size]
        z[list(NEVER)] = -torch.inf
        torch.testing.assert_close(found[number], z.softmax(-1), rtol=1e-8, atol=1e-10)


def one_hot(rows: list[int], vocab: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(rows), vocab).double()


def test_the_decoder_reads_question_and_thoughts_and_never_the_reasoning():
    decoder = model(1, tie=False)
    laws = torch.rand(5, 18, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    found = answer_logp(decoder, EXAMPLES, laws, [3, 2], "[", "]")
    matrix, first, last = embedding_rows(decoder), 16, 17
    at, expected = 0, []
    for example, own in zip(EXAMPLES, laws.split([3, 2]), strict=True):
        ids = [torch.tensor(x) for x in ([*example.question, first], [last, *example.answer])]
        embedded = torch.cat([matrix[ids[0]], own @ matrix, matrix[ids[1]]])[None]
        logp = decoder.network(inputs_embeds=embedded).logits[0, :, :18].log_softmax(-1)
        start = len(example.question) + 1 + len(own)
        expected += [logp[start + i, token] for i, token in enumerate(example.answer)]
        at += len(own)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-8, atol=1e-9)
    other = [replace(e, reasoning=e.reasoning[::-1]) for e in EXAMPLES]
    assert torch.equal(found, answer_logp(decoder, other, laws, [3, 2], "[", "]"))


def test_a_certain_thought_is_a_token():
    decoder = model(1)
    laws = one_hot([6, 7, 8, 9, 10], 18)
    found = answer_logp(decoder, EXAMPLES, laws, [3, 2], "[", "]")
    tokens = torch.tensor([[5, 16, 9, 10, 17, 12, 13, 2]])
    logp = decoder.network(input_ids=tokens).logits[0, :, :18].log_softmax(-1)
    torch.testing.assert_close(found[2:], logp[torch.arange(4, 7), tokens[0, 5:]], rtol=1e-9, atol=1e-10)


def test_the_gradient_reaches_the_laws_and_not_the_embedding_that_reads_them():
    decoder = model(1, tie=False)
    laws = one_hot([6, 7, 8, 9, 10], 18).requires_grad_()
    answer_logp(decoder, EXAMPLES, laws, [3, 2], "[", "]").sum().backward()
    assert laws.grad is not None
    assert laws.grad[:, 1:].abs().min() > 0  # the padding token's embedding is 0
    matrix = decoder.causal.get_input_embeddings().weight
    # Read as tokens: the questions, the markers and the answers; the thoughts 6 to 10 are not among them.
    assert set(matrix.grad.abs().sum(-1).nonzero()[:, 0].tolist()) == {2, 4, 5, 11, 12, 13, 16, 17} - {2}


def test_reasoning_is_a_column_or_stands_between_the_markers():
    network = model()
    column = read(Record("1=", completion="3", extra={"reasoning": "1+2"}), network, "[", "]")
    assert read(Record("1=", completion="[1+2]3"), network, "[", "]") == column
    assert read(Record("1=", completion="[\n1+2\n]\n\n3"), network, "[", "]") == column
    with pytest.raises(DataError, match="no reasoning before its answer"):
        read(Record("1=", completion="3", source="a.jsonl:4"), network, "[", "]")
    with pytest.raises(DataError, match=r"a\.jsonl:4"):
        read(Record("1=", completion="[1+2]", source="a.jsonl:4"), network, "[", "]")


SETTINGS = Settings(rate=2, span=1, steps=(3, 2, 2), batch_size=4, learning_rate=1e-2, top_k=5, open="[", close="]")


def moved(network: CausalLM, other: CausalLM) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(network.parameters(), other.parameters(), strict=True))


def test_what_is_written_is_read_back(tmp_path: Path):
    network, records = model(), data()
    seen: list[int] = []
    found = compress(network, records, tmp_path / "out", SETTINGS, progress=lambda done, total: seen.append(done))
    assert seen == list(range(8))
    assert not moved(network, model())
    assert (found.records, len(found.losses)) == (12, 7)
    assert found.compression == pytest.approx(sum(3 + 2 * (i % 4) for i in range(12)) / found.thoughts)
    rows = load(found.file, needs=("prompt", "completion", "latents"))
    assert [r.prompt for r in rows] == [r.prompt for r in records]
    assert [r.extra["reasoning"] for r in rows] == [r.extra["reasoning"] for r in records]
    for before, row in zip(records, rows, strict=True):
        latents = row.extra["latents"]
        assert len(latents["token"]) == -(-len(before.extra["reasoning"]) // 2)
        for token, weight in zip(latents["token"], latents["weight"], strict=True):
            assert len(set(token)) == 5
            assert sum(weight) == pytest.approx(1, abs=1e-6)
            assert not {0, 2, 16, 17} & set(token)
    decoder = CausalLM.load(found.decoder, dtype=torch.float64)
    assert moved(decoder, network)
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["encoder"] * 3 + ["decoder"] * 2 + ["jointly"] * 2


def test_only_the_phase_s_model_learns(tmp_path: Path):
    network = model()
    for steps, learns in [((2, 0, 0), False), ((0, 2, 0), True), ((0, 0, 2), True)]:
        out = tmp_path / "".join(map(str, steps))
        found = compress(network, data(), out, replace(SETTINGS, steps=steps))
        assert moved(CausalLM.load(found.decoder, dtype=torch.float64), network) == learns
    fixed, learned = (
        [json.loads(line)["latents"] for line in (tmp_path / name / LATENTS).read_text().splitlines()]
        for name in ("020", "200")
    )
    compress(network, data(), tmp_path / "again", replace(SETTINGS, steps=(0, 1, 0), learning_rate=1.0))
    assert fixed == [json.loads(line)["latents"] for line in (tmp_path / "again" / LATENTS).read_text().splitlines()]
    assert fixed != learned


class Killed(Exception):
    pass


@pytest.mark.parametrize("where", [2, 3, 5, 6])
def test_a_killed_first_stage_goes_on_bit_for_bit(tmp_path: Path, where: int):
    settings = replace(SETTINGS, save_every=1)
    whole = compress(model(), data(), tmp_path / "whole", settings)

    def kill(done: int, total: int) -> None:
        if done == where:
            raise Killed

    with pytest.raises(Killed):
        compress(model(), data(), tmp_path / "cut", settings, progress=kill)
    again = compress(model(), data(), tmp_path / "cut", settings)
    assert again.losses == whole.losses
    assert again.file.read_bytes() == whole.file.read_bytes()


def test_a_killed_export_goes_on_after_the_last_whole_batch(tmp_path: Path):
    whole = compress(model(), data(), tmp_path / "whole", SETTINGS)

    def kill(done: int, total: int) -> None:
        if done == 8:
            raise Killed

    out = tmp_path / "cut"
    with pytest.raises(Killed):
        compress(model(), data(), out, SETTINGS, exporting=kill)
    assert not (out / LATENTS).exists()
    aside = out / f".writing-{LATENTS}"
    aside.write_bytes(aside.read_bytes()[:-7])  # torn in the middle of a line
    seen: list[int] = []
    again = compress(model(), data(), out, SETTINGS, exporting=lambda done, total: seen.append(done))
    assert seen == [4, 8, 12]
    assert again.file.read_bytes() == whole.file.read_bytes()
    assert sorted(p.name for p in out.iterdir()) == ["decoder", LATENTS, "metrics.jsonl", "settings.json"]


def test_mistakes_are_told(tmp_path: Path):
    compress(model(), data(), tmp_path / "done", SETTINGS)
    with pytest.raises(RunError, match="holds finished thoughts"):
        compress(model(), data(), tmp_path / "done", SETTINGS)
    (tmp_path / "done" / LATENTS).unlink()
    for other, what in [
        ({"model": model(1), "data": data(), "settings": SETTINGS}, "model"),
        ({"model": model(), "data": data(5), "settings": SETTINGS}, "data"),
        ({"model": model(), "data": data(), "settings": replace(SETTINGS, rate=3)}, "rate"),
    ]:
        with pytest.raises(RunError, match=f"begun with another {what}"):
            compress(out=tmp_path / "done", **other)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="not empty"):
        compress(model(), data(), tmp_path / "full", SETTINGS)
    with pytest.raises(ModelError, match="no token '<think>'"):
        compress(model(), data(), tmp_path / "x", replace(SETTINGS, open="<think>"))
    long = Dataset((Record("1", completion="2", extra={"reasoning": "1" * 250}),), "long")
    with pytest.raises(DataError, match=r"beyond the model's context of 256"):
        compress(model(), long, tmp_path / "x", SETTINGS)
    for wrong in ({"rate": 0}, {"steps": (0, 0, 0)}, {"learning_rate": 0.0}, {"span": -1}):
        with pytest.raises(RunError):
            replace(SETTINGS, **wrong)
    assert not (tmp_path / "x").exists()


def test_a_model_that_ignores_masks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    network = model()
    plain = type(network).hidden

    def deaf(self, tokens, attention, positions=None, embedded=None, **options):
        if attention is not None and attention.ndim == 4:
            attention = torch.ones(tokens.shape, dtype=torch.bool)
        return plain(self, tokens, attention, positions, embedded, **options)

    monkeypatch.setattr(type(network), "hidden", deaf)
    with pytest.raises(ModelError, match="does not obey"):
        compress(network, data(), tmp_path / "x", SETTINGS)
