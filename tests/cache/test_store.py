"""Writing and reading a teacher cache: what is stored, what is found, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from leibler.cache import TeacherCache, write
from leibler.cache.layout import MANIFEST, Manifest
from leibler.data import Dataset, Record
from leibler.errors import DataError, LeiblerError, ModelError, RecipeError, RunError
from leibler.fused import TopK
from leibler.objective import Rows
from leibler.policy import CausalLM, Lora, character_tokenizer, right_pad
from train.conformance import TOKENIZER, tiny

RECORDS = tuple(
    Record(f"{i}+{j}=", completion=str(i + j), source=f"sums.jsonl:{4 * i + j + 1}") for i in range(6) for j in range(4)
)
DATA = Dataset(RECORDS, name="sums.jsonl")


def teacher(seed: int = 1, **options: Any) -> CausalLM:
    return tiny(seed, dtype=torch.float32, loud=6.0, padding=3, **options).eval()


def rows_of(records: tuple[Record, ...], model: CausalLM, left: int = 0) -> Rows:
    pairs = [(model.encode_prompt(r.prompt), model.encode_completion(r.completion or "")) for r in records]
    tokens, attention, mask = right_pad(pairs)
    tokens, attention, mask = (torch.nn.functional.pad(x, (left, 0)) for x in (tokens, attention, mask))
    number = torch.arange(len(records))
    return Rows(tokens, attention, mask, number, torch.zeros_like(number), records=records)


def dense(model: CausalLM, rows: Rows, temperature: float) -> torch.Tensor:
    weight, _ = model.head()
    with torch.no_grad():
        hidden = model(rows.tokens, rows.attention)[:, :-1][rows.mask].double()
        logits = hidden @ weight[: model.vocab_size].double().T
        return (logits / temperature).log_softmax(-1)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "cache"
    write(teacher(), DATA, folder, top_k=5, temperature=0.8, name="models/large", shard_tokens=20, batch_tokens=40)
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "cache"))


def test_what_is_read_is_what_the_teacher_says_in_any_order(made: Path) -> None:
    cache, model = TeacherCache(made), teacher()
    some = tuple(RECORDS[i] for i in (17, 3, 3, 22, 0))
    for left in (0, 3):
        rows = rows_of(some, model, left)
        expected = dense(model, rows, 0.8)
        target = cache.target(rows)
        assert isinstance(target.law, TopK)
        token = target.token.long()
        assert torch.allclose(target.law.logp.double(), expected.gather(1, token), atol=1e-4)
        assert torch.allclose(target.law.logp.double(), expected.topk(5).values, atol=1e-4)
        rest = expected.scatter(1, token, -torch.inf).logsumexp(-1)
        assert torch.allclose(target.law.rest.double(), rest, atol=1e-4)
        assert target.law.temperature == 0.8
        assert torch.allclose(cache.logp(rows).double(), expected.gather(1, rows.label[:, None])[:, 0], atol=1e-4)


def test_dropout_of_an_adapter_on_the_head_is_off(tmp_path: Path) -> None:
    model = teacher().adapted(Lora(rank=4, alpha=64.0, dropout=0.5, targets=("lm_head",)))
    with torch.no_grad():
        for name, parameter in model.causal.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    for name, training in (("calm", False), ("trained", True)):
        model.train(training)
        write(model, DATA, tmp_path / name, top_k=5)
        assert model.training is training
    assert (tmp_path / "calm/shard-00000.npy").read_bytes() == (tmp_path / "trained/shard-00000.npy").read_bytes()


def test_a_part_of_a_completion_is_read_as_that_part(made: Path) -> None:
    cache, model = TeacherCache(made), teacher()
    rows = rows_of(RECORDS[:3], model)
    whole = cache.logp(rows)
    mask = rows.mask.clone()
    mask[0, int(mask[0].nonzero()[0])] = False  # a stage muted the first event of a row
    part = Rows(rows.tokens, rows.attention, mask, rows.group, rows.role, records=rows.records)
    assert torch.equal(cache.logp(part), whole[1:])
    mask[0, 0] = True  # an event inside the prompt, which the cache has not got
    with pytest.raises(DataError, match=r"no row for sums.jsonl:1 "):
        cache.logp(part)


def test_pairs_and_duplicates(tmp_path: Path) -> None:
    pairs = (
        Record("1+1=", chosen="2", rejected="3"),
        Record("1+1=", chosen="2", rejected="5"),
        Record("1+1", completion="=2"),  # the same tokens, a longer completion
    )
    cache = write(teacher(), Dataset(pairs, name="pairs"), tmp_path / "cache", top_k=3)
    assert len(cache.index) == 3
    assert cache.tokens == 2 + 2 + 3
    model = teacher()
    short, long = rows_of((Record("1+1=", completion="2"),), model), rows_of((Record("1+1", completion="=2"),), model)
    assert torch.equal(cache.logp(long)[1:], cache.logp(short))
    wrong = rows_of((Record("1+1=", completion="5"),), model)
    assert torch.allclose(cache.logp(wrong).double(), dense(model, wrong, 1.0).gather(1, wrong.label[:, None])[:, 0])


def test_half_precision_keeps_the_rest_exact(made: Path, tmp_path: Path) -> None:
    half = write(teacher(), DATA, tmp_path / "half", top_k=5, temperature=0.8, dtype="float16")
    rows = rows_of(RECORDS, teacher())
    a, b = TeacherCache(made).target(rows).law, half.target(rows).law
    assert isinstance(a, TopK)
    assert isinstance(b, TopK)
    assert b.logp.dtype == torch.float16
    assert torch.allclose(a.logp, b.logp.float(), rtol=1e-3)
    assert torch.allclose(a.rest, b.rest, rtol=1e-4)
    assert half.dtype.itemsize < TeacherCache(made).dtype.itemsize


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_killed_write_goes_on_to_the_same_bytes(made: Path, tmp_path: Path, after: int) -> None:
    calls = []

    def stop(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == after:
            raise Killed

    folder = tmp_path / "cache"
    options: dict[str, Any] = {
        "top_k": 5, "temperature": 0.8, "name": "models/large", "shard_tokens": 20, "batch_tokens": 40,
    }  # fmt: skip
    with pytest.raises(Killed):
        write(teacher(), DATA, folder, **options, progress=stop)
    finished = {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*.npy")}
    assert len(finished) < len(list(made.glob("shard-*.npy")))
    with pytest.raises(DataError, match="unfinished"):
        TeacherCache(folder)
    (folder / ".writing-shard-00001.npy").write_bytes(b"torn")
    seen: list[tuple[int, int]] = []
    write(teacher(), DATA, folder, **options, progress=lambda *a: seen.append(a))
    names = [p.name for p in made.iterdir()]
    assert {p.name for p in folder.iterdir()} - {".writing-shard-00001.npy"} == set(names)
    for name in names:
        assert (folder / name).read_bytes() == (made / name).read_bytes()
    # What was finished was not computed again.
    assert {name: (folder / name).stat().st_mtime_ns for name in finished} == finished
    assert seen[-1][0] == seen[-1][1] == TeacherCache(folder).tokens


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": 1.0}, r"another temperature \(0.8 then, 1.0 now\)"),
        ({"top_k": 4}, r"another k \(5 then, 4 now\)"),
        ({"dtype": "float16"}, "another dtype"),
        ({"data": Dataset(RECORDS[:-1], name="sums.jsonl")}, "another data"),
        ({"teacher": 3}, "another teacher;"),
    ],
)
def test_going_on_with_other_arguments_is_refused(copied: Path, changes: dict[str, Any], says: str) -> None:
    manifest = Manifest.load(copied)
    from dataclasses import replace

    replace(manifest, shards=manifest.shards[:1]).save(copied)
    options: dict[str, Any] = {"top_k": 5, "temperature": 0.8, "shard_tokens": 20, "batch_tokens": 40, **changes}
    model, data = teacher(options.pop("teacher", 1)), options.pop("data", DATA)
    with pytest.raises(RunError, match=says):
        write(model, data, copied, **options)


def test_a_finished_cache_or_anything_else_is_not_overwritten(copied: Path, tmp_path: Path) -> None:
    before = (copied / MANIFEST).read_bytes()
    with pytest.raises(RunError, match=r"finished teacher cache; train with teacher=cache:"):
        write(teacher(), DATA, copied, top_k=5, temperature=0.8, shard_tokens=20, batch_tokens=40)
    assert (copied / MANIFEST).read_bytes() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("x")
    with pytest.raises(RunError, match=r"not empty \(it holds thesis.txt\)"):
        write(teacher(), DATA, tmp_path / "other")
    with pytest.raises(RunError, match="is a file"):
        write(teacher(), DATA, tmp_path / "other" / "thesis.txt")


def test_torn_and_altered_files_are_found(copied: Path) -> None:
    shard = copied / "shard-00001.npy"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    with pytest.raises(DataError, match=r"shard-00001.npy has \d+ bytes instead of"):
        TeacherCache(copied)
    flipped = bytearray(whole)
    flipped[len(whole) - 100] ^= 1
    shard.write_bytes(bytes(flipped))
    with pytest.raises(DataError, match=r"shard-00001.npy was altered"):
        TeacherCache(copied, thorough=True)
    # Without the hashes the sequence that holds the byte is refused when it is read, and no other.
    cache, model = TeacherCache(copied), teacher()
    refused = []
    for record in RECORDS:
        try:
            cache.target(rows_of((record,), model))
        except DataError as error:
            refused.append(str(error))
    assert len(refused) == 1
    assert "checksum" in refused[0]
    shard.unlink()
    with pytest.raises(DataError, match="is missing"):
        TeacherCache(copied)


def test_an_altered_manifest_or_index_is_found(copied: Path) -> None:
    path = copied / MANIFEST
    text = path.read_text()
    content = json.loads(text)
    for key, value in (("temperature", 1.0), ("k", 4), ("tokens", [1])):
        path.write_text(json.dumps({**content, key: value}))
        with pytest.raises(DataError, match="altered"):
            TeacherCache(copied)
    for bad in ("{", "[]", "{}", text.replace('"version": 1', '"version": 9')):
        path.write_text(bad)
        with pytest.raises(DataError, match=r"damaged|version 9"):
            TeacherCache(copied)
    path.write_text(text)
    index = bytearray((copied / "index.npy").read_bytes())
    index[-3] ^= 1
    (copied / "index.npy").write_bytes(bytes(index))
    with pytest.raises(DataError, match=r"index.npy was altered"):
        TeacherCache(copied)


def test_nothing_in_it_is_unpickled(copied: Path) -> None:
    """A shard that holds a pickle, with a manifest that vouches for it, is refused and not run."""
    from dataclasses import replace

    from leibler.cache.layout import FileEntry

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (copied / "exploded",))

    np.save(copied / "shard-00000.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    manifest = Manifest.load(copied)
    entry = FileEntry.of(copied / "shard-00000.npy")
    replace(manifest, shards=(entry, *manifest.shards[1:])).save(copied)
    cache = TeacherCache(copied, thorough=True)
    first = [r for r in RECORDS if cache._find(rows_of((r,), teacher()).tokens[0].numpy())["shard"] == 0]
    with pytest.raises(DataError, match="cannot be read"):
        cache.target(rows_of((first[0],), teacher()))
    assert not (copied / "exploded").exists()


def test_a_model_a_temperature_or_data_that_do_not_fit_are_refused(made: Path) -> None:
    cache = TeacherCache(made)
    cache.check_model(tiny(0))
    cache.check_temperature(0.8)
    with pytest.raises(ModelError, match=r"tokenizers differ: the teacher cache .* models/large \(16 entries\)"):
        cache.check_model(tiny(0, tokenizer=character_tokenizer("0123456789+=abc")))
    with pytest.raises(RecipeError, match=r"at temperature 0.8 and the run is at 1; set temperature=0.8"):
        cache.check_temperature(1.0)
    model = teacher()
    cache.check_data(DATA, model)
    cache.check_data(Dataset(RECORDS[5:2:-1], name="some"), model)
    others = (*RECORDS, Record("9+9=", completion="18", source="more.jsonl:7"), Record("8+9=", completion="17"))
    with pytest.raises(DataError, match=r"no row for more.jsonl:7 \(prompt '9\+9='\) and 1 more: it was made of sums"):
        cache.check_data(Dataset(others, name="more"), model)
    # The hash says that it is the same data, but this tokenizer makes other tokens of it.
    spaced = teacher()
    spaced.encode_prompt = lambda text: [*TOKENIZER.encode(text), 5]  # type: ignore[method-assign]
    with pytest.raises(DataError, match="no row for"):
        cache.check_data(DATA, spaced)


def test_names(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TeacherCache.of(f"cache:{copied}:tail=renormalise")
    assert cache.tail == "renormalise"
    assert TeacherCache.of(cache.name).name == cache.name
    assert cache.hash != TeacherCache.of(f"cache:{copied}").hash
    monkeypatch.chdir(copied.parent)
    assert TeacherCache.of("cache:cache").name == f"cache:{copied}"
    with pytest.raises(RecipeError, match="tail must be"):
        TeacherCache.of(f"cache:{copied}:tail=none")
    with pytest.raises(DataError, match="no teacher cache"):
        TeacherCache.of("cache:elsewhere")


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda out: write(teacher(), DATA, out, dtype="int8"), RunError, "float32 or float16"),
        (lambda out: write(teacher(), DATA, out, top_k=0), RunError, "at least 1"),
        (lambda out: write(teacher(), Dataset((Record("1+1="),), name="p"), out), DataError, "--student"),
        (
            lambda out: write(teacher(), Dataset((Record("1" * 70, completion="1", source="f:1"),), name="p"), out),
            DataError,
            r"72 tokens \(f:1\) exceeds the teacher's context of 64",
        ),
    ],
)
def test_what_cannot_be_written_is_refused(call: Any, error: type[LeiblerError], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        call(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_small_vocabulary_is_kept_whole(tmp_path: Path) -> None:
    cache = write(teacher(), DATA, tmp_path / "cache")
    assert cache.manifest.k == 16
    law = cache.target(rows_of(RECORDS[:2], teacher())).law
    assert isinstance(law, TopK)
    assert bool((law.rest == -torch.inf).all())


def test_progress_says_what_is_read_and_what_is_done(tmp_path: Path) -> None:
    read: list[tuple[int, int]] = []
    done: list[tuple[int, int]] = []
    many = Dataset(RECORDS * 50, name="many")  # the same sequences over and over: read once each
    options: dict[str, Any] = {"progress": lambda *a: done.append(a), "reading": lambda *a: read.append(a)}
    cache = write(teacher(), many, tmp_path / "cache", batch_tokens=60, **options)
    assert read == [(500, 1200), (1000, 1200)]
    assert [d for d, _ in done] == sorted({d for d, _ in done})
    assert done[-1] == (cache.tokens, cache.tokens)
    assert len(cache.index) == len(RECORDS)


def test_sequences_whose_keys_collide_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from leibler.cache import store, writer
    from leibler.cache.identity import sequence_key

    def coarse(tokens: Any) -> tuple[int, int]:
        key, check = sequence_key(tokens)
        return key % 2, check

    monkeypatch.setattr(store, "sequence_key", coarse)
    monkeypatch.setattr(writer, "sequence_key", coarse)
    cache = write(teacher(), DATA, tmp_path / "cache", top_k=5)
    rows = rows_of(RECORDS, teacher())
    assert torch.allclose(cache.logp(rows).double(), dense(teacher(), rows, 1.0).gather(1, rows.label[:, None])[:, 0])
    with pytest.raises(DataError, match="no row"):
        cache.check_data(Dataset((Record("9+9=", completion="1"),), name="other"), teacher())
