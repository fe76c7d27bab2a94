from __future__ import annotations

import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leibler.data import load, stdlib, stdlib_documents
from leibler.data.corpus import pieces
from leibler.errors import DataError

FILES = {
    "b/one.py": '"""Module one\n\nis here."""\n\nraise RuntimeError("imported")\n\n\nclass A:\n    """A class."""\n',
    "a.py": "import os\n" + "".join(f"x{i} = {i}\n" for i in range(200)),
    "umlaut.py": '"""Schön."""\nx = 1\n',
    "broken.py": "def (:\n    pass\n",
    "test/test_a.py": "assert True, 'a test of the library'\n",
    "site-packages/other.py": "x = 'somebody else'\n",
    "notes.txt": "no Python\n",
}


@pytest.fixture
def library(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_the_walk_is_sorted_and_skips_what_is_not_the_library(library):
    assert [d.file for d in stdlib_documents("source", root=library)] == ["a.py", "b/one.py", "broken.py"]
    names = [d.file for d in stdlib_documents("source", root=library, ascii_only=False)]
    assert names == ["a.py", "b/one.py", "broken.py", "umlaut.py"]


def test_docstrings_are_parsed_and_nothing_is_imported(library):
    found = [(d.file, d.line, d.text) for d in stdlib_documents("docstring", root=library)]
    assert found == [("b/one.py", 1, "Module one\n\nis here."), ("b/one.py", 9, "A class.")]
    assert len(stdlib_documents("all", root=library)) == 5


def test_the_real_library_is_read_without_importing_it():
    before = set(sys.modules)
    documents = stdlib_documents("source")
    assert sum(len(d.text) for d in documents) > 3_000_000
    assert all(d.text.isascii() and d.text.replace("\n", "").isprintable() for d in documents)
    assert not any(
        name in d.file.split("/") for d in documents for name in ("test", "tests", "site-packages", "idlelib")
    )
    assert not {"turtle", "antigravity", "this"} & (set(sys.modules) - before)
    assert documents == stdlib_documents("source")


@given(text=st.text(alphabet="ab \n\x0c", max_size=200), length=st.integers(1, 30))
def test_pieces_join_to_the_text_and_know_their_line(text, length):
    found = list(pieces(text, length))
    assert "".join(piece for _, piece in found) == text
    position = 0
    for line, piece in found:
        assert 0 < len(piece) <= length
        assert line == text[:position].count("\n")
        position += len(piece)
    if all(len(line) < length for line in text.split("\n")):
        assert all(piece.endswith("\n") for _, piece in found[:-1])


def test_training_and_held_out_text_come_from_different_files():
    train, heldout = stdlib(part="train", length=300), stdlib(part="heldout", length=300, seed=3)
    assert not {r.source.split(":")[0] for r in train} & {r.source.split(":")[0] for r in heldout}
    texts = {r.prompt + r.completion for r in train}
    assert len(texts) == len(train)
    assert not texts & {r.prompt + r.completion for r in heldout}
    assert 0.03 < len(heldout) / (len(train) + len(heldout)) < 0.25


def test_records_are_lines_of_the_file_they_name(library):
    for record in stdlib(root=library, length=60):
        name, line = record.source.split(":")
        text = record.prompt + record.completion
        assert FILES[name].split("\n")[int(line) - 1 :][: text.count("\n") + 1] == text.split("\n")
        assert record.prompt.strip()
        assert record.completion.strip()
        assert len(text) <= 60


@given(seed=st.integers(0, 3), share=st.sampled_from([0.01, 0.3, 0.9, 0.99]), length=st.sampled_from([16, 20, 100]))
def test_prompt_and_completion_are_never_blank(tmp_path_factory, seed, share, length):
    root = tmp_path_factory.mktemp("library")
    (root / "a.py").write_text("\n\n        x\n\n\n   yyyyyyyyyy                       z\n" + "q = 1\n" * 30)
    for record in stdlib(root=root, seed=seed, prompt=share, length=length):
        assert record.prompt.strip()
        assert record.completion.strip()


def test_the_seed_chooses_and_orders_and_a_limit_cuts():
    a, b, c = stdlib(limit=50, seed=1), stdlib(limit=80, seed=1), stdlib(limit=50, seed=2)
    assert list(a) == list(b)[:50]
    assert a.content_hash == stdlib(limit=50, seed=1).content_hash
    assert {r.source for r in a} != {r.source for r in c}
    assert len({r.source.split(":")[0] for r in b}) > 20  # from all files alike


def test_the_specification_reaches_the_corpus():
    data = load("corpus:stdlib:length=200,limit=20,seed=1,what=source,part=heldout")
    assert list(data) == list(stdlib(length=200, limit=20, seed=1, part="heldout"))
    assert data.name == "corpus:stdlib:length=200,seed=1,what=source,part=heldout,limit=20"
    assert list(load(data.name)) == list(data)
    assert len(load("corpus:stdlib:limit=20", limit=7)) == 7
    assert load("corpus:stdlib:limit=2").check is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"length": 15}, "length=15; give at least 16"),
        ({"limit": 0}, "limit=0"),
        ({"prompt": 1.0}, "prompt=1.0"),
        ({"part": "test"}, "part 'test'"),
        ({"what": "binary"}, "kind 'binary'"),
    ],
)
def test_arguments_out_of_range_are_named(arguments, message):
    with pytest.raises(DataError, match=message):
        stdlib(**arguments)


def test_a_library_without_sources_is_named(tmp_path):
    with pytest.raises(DataError, match=f"no Python source in {tmp_path}"):
        stdlib(root=tmp_path)
