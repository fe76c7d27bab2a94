from __future__ import annotations

import json
import os
import tracemalloc
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leibler.data import Record, load
from leibler.data.load import MAX_LINE, RAW_LIMIT
from leibler.data.rows import BadRow, parse_line, to_record
from leibler.errors import DataError

GOOD = b'{"prompt": "a", "completion": "b"}'


def write(path, *lines: bytes):
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def aside_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


BAD = {
    "torn": (b'{"prompt": "a", "comp', "not JSON"),
    "utf8": (b'{"prompt": "a\xe2\x82", "completion": "b"}', "not UTF-8"),
    "utf8-cut": (b'{"prompt": "\xe2\x82', "not UTF-8"),
    "array": (b'["a", "b"]', "not a JSON object"),
    "string": (b'"a"', "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "two": (b'{"prompt": "a"} {"prompt": "b"}', "not JSON"),
    "nan": (b'{"prompt": "a", "completion": "b", "reward": NaN}', "NaN or infinity"),
    "minus-infinity": (b'{"prompt": "a", "completion": "b", "reward": -Infinity}', "NaN or infinity"),
    "overflow": (b'{"prompt": "a", "completion": "b", "reward": 1e999}', "NaN or infinity"),
    "deep": (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested deeper"),
    "deep-extra": (b'{"prompt": "a", "completion": "b", "x": ' + b"[" * 80 + b"]" * 80 + b"}", "nested deeper"),
    "digits": (b'{"prompt": "a", "completion": "b", "x": ' + b"9" * 5000 + b"}", "not JSON"),
    "no-prompt": (b'{"completion": "b"}', "'prompt' is missing"),
    "no-completion": (b'{"prompt": "a"}', "'completion' is missing"),
    "null-completion": (b'{"prompt": "a", "completion": null}', "'completion' is missing"),
    "empty-completion": (b'{"prompt": "a", "completion": ""}', "'completion' is empty"),
    "blank-completion": (b'{"prompt": "a", "completion": " \\n "}', "'completion' is empty"),
    "number": (b'{"prompt": 3, "completion": "b"}', "'prompt' is not text"),
    "list": (b'{"prompt": "a", "completion": ["b"]}', "'completion' is not text"),
    "nested": (b'{"prompt": {"prompt": {"prompt": "a"}}, "completion": "b"}', "'prompt' is not text"),
    "answer": (b'{"prompt": "a", "completion": "b", "answer": {"x": 1}}', "'answer' is neither"),
    "answer-bool": (b'{"prompt": "a", "completion": "b", "answer": true}', "'answer' is neither"),
    "surrogate": (b'{"prompt": "a\\ud800", "completion": "b"}', "half of a surrogate pair"),
    "surrogate-key": (b'{"prompt": "a", "completion": "b", "\\udc00": 1}', "half of a surrogate pair"),
    "twice": (b'{"prompt": "a", "prompt": "c", "completion": "b"}', "a key is given twice"),
    "messages": (b'{"messages": [{"role": "user", "content": "a"}]}', "apply_chat_template"),
    "turns": (b'{"prompt": [{"role": "user", "content": "a"}], "completion": "b"}', "apply_chat_template"),
    "long": (b'{"prompt": "' + b"a" * 10_000_000 + b'", "completion": "b"}', "longer than 8 MB"),
    "binary": (bytes(range(11, 256)), "not UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_kept_aside_with_file_line_reason_and_text(name, tmp_path):
    raw, reason = BAD[name]
    path, aside = write(tmp_path / "d.jsonl", GOOD, b"", raw, GOOD), tmp_path / "out" / "aside.jsonl"
    data = load(path, needs=("prompt", "completion"), set_aside=aside)
    assert [r.source for r in data] == [f"{path}:1", f"{path}:4"]
    assert data.set_aside_count == 1
    assert data.set_aside_path == aside
    (row,) = aside_rows(aside)
    assert (row["file"], row["line"]) == (str(path), 3)
    assert reason in row["reason"]
    assert data.set_aside_summary == {row["reason"]: 1}
    assert row["raw"]
    assert len(row["raw"]) <= RAW_LIMIT
    assert row["raw"][:10] == raw[:10].decode("utf-8", "backslashreplace")
    assert [p.name for p in aside.parent.iterdir()] == ["aside.jsonl"]


@pytest.mark.parametrize("name", BAD)
def test_a_file_with_nothing_else_is_refused_in_one_sentence(name, tmp_path):
    raw, reason = BAD[name]
    path = write(tmp_path / "d.jsonl", raw, raw)
    with pytest.raises(DataError) as caught:
        load(path, needs=("prompt", "completion"), set_aside=tmp_path / "aside.jsonl")
    message = str(caught.value)
    assert message.startswith(f"{path} has no usable row (all kept in ")
    assert reason in message
    assert "2 of 2" in message
    assert "first on line 1" in message
    assert message.endswith("'prompt', 'completion'.")
    assert "\n" not in message
    assert len(aside_rows(tmp_path / "aside.jsonl")) == 2


def test_a_pair_of_equal_responses_is_no_preference():
    rows = [{"prompt": "a", "chosen": "b", "rejected": "b"}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    with pytest.warns(UserWarning, match="1 of 2 rows of rows set aside: 1 x 'chosen' and 'rejected' are the same"):
        data = load(rows, needs=("prompt", "chosen", "rejected"))
    assert len(data) == 1
    assert data.kind == "preferences"
    assert len(load(rows)) == 2  # nobody asked for preferences


def test_an_id_names_one_row(tmp_path):
    rows = [b'{"prompt": "a", "id": 7}', b'{"prompt": "b", "id": "7"}', b'{"prompt": "c"}', b'{"prompt": "d"}']
    with pytest.warns(UserWarning, match="'id' is given twice"):
        data = load(write(tmp_path / "d.jsonl", *rows))
    assert [r.prompt for r in data] == ["a", "c", "d"]
    assert data.rejected_rows[0].detail == "'7' is also on line 1"


def test_a_bad_row_does_not_use_up_its_id(tmp_path):
    rows = [{"prompt": "", "id": 1}, {"prompt": "a", "id": 1}]
    with pytest.warns(UserWarning, match="1 of 2"):
        assert [r.id for r in load(rows)] == ["1"]


def test_an_empty_prompt_needs_a_response():
    with pytest.warns(UserWarning, match="1 x 'prompt' is empty"):
        assert [r.completion for r in load([{"prompt": ""}, {"prompt": "", "completion": "plain text"}])] == [
            "plain text"
        ]


def test_other_columns_are_kept():
    (record,) = load([{"prompt": "a", "response": "b", "weight": 0.5, "tags": ["x", {"y": None}]}])
    assert record.extra == {"response": "b", "weight": 0.5, "tags": ["x", {"y": None}]}
    assert record.completion is None
    assert record.get("weight") == 0.5


def test_an_extra_column_may_be_needed():
    rows = [{"prompt": "a", "weight": 1.0}, {"prompt": "b", "weight": None}]
    with pytest.warns(UserWarning, match="'weight' is missing"):
        assert len(load(rows, needs=("prompt", "weight"))) == 1


def test_line_ends_byte_order_mark_and_a_missing_last_line_end(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n{"prompt": "\xc3\xa4\\u2028\xe2\x80\xa8"}')
    assert [(r.prompt, r.source[-2:]) for r in load(path)] == [("a", ":1"), ("ä\u2028\u2028", ":3")]


def test_a_long_line_is_not_held_in_memory(tmp_path):
    path = write(tmp_path / "d.jsonl", b"a" * (4 * MAX_LINE), GOOD)
    tracemalloc.start()
    with pytest.warns(UserWarning, match="longer than 8 MB"):
        data = load(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) == 1
    assert data[0].source.endswith(":2")
    assert peak < 3 * MAX_LINE
    assert data.rejected_rows[0].detail == f"{4 * MAX_LINE + 1} bytes"


def test_a_limit_reads_no_further(tmp_path):
    path = write(tmp_path / "d.jsonl", GOOD, b"torn", GOOD, b"torn", GOOD)
    with pytest.warns(UserWarning, match="1 of 3"):
        assert len(load(path, limit=2)) == 2
    with pytest.raises(DataError, match="limit=0"):
        load(path, limit=0)


def test_nothing_is_overwritten(tmp_path):
    path, aside = write(tmp_path / "d.jsonl", GOOD, b"torn"), tmp_path / "aside.jsonl"
    aside.write_text("something of yours\n")
    assert load(path, set_aside=aside).set_aside_path == tmp_path / "aside.2.jsonl"
    assert aside.read_text() == "something of yours\n"
    # The same run once more leaves no third file.
    assert load(path, set_aside=aside).set_aside_path == tmp_path / "aside.2.jsonl"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aside.2.jsonl", "aside.jsonl", "d.jsonl"]
    with pytest.raises(DataError, match="is the data itself"):
        load(path, set_aside=tmp_path / "." / "d.jsonl")
    assert path.read_bytes() == GOOD + b"\ntorn\n"


def test_a_clean_file_leaves_no_file_aside(tmp_path):
    data = load(write(tmp_path / "d.jsonl", GOOD), set_aside=tmp_path / "x" / "aside.jsonl")
    assert data.set_aside_path is None
    assert not (tmp_path / "x").exists()


def test_a_file_aside_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "x").write_text("a file where a folder should be")
    with pytest.raises(DataError, match=r"cannot write the rows set aside to .*x/aside.jsonl"):
        load(write(tmp_path / "d.jsonl", GOOD, b"torn"), set_aside=tmp_path / "x" / "aside.jsonl")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", b"", "d.jsonl is empty; give at least one row with 'prompt'"),
        ("d.jsonl", b"\n \n\n", "d.jsonl is empty"),
        ("d.jsonl", b"PAR1abc", "is a Parquet file; name it .parquet"),
        ("d.jsonl", b"\x1f\x8babc", "is compressed; unpack it first"),
        ("d.jsonl", "{}".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("d.json", b'[{"prompt": "a"}]', "is one JSON array; write one object per line"),
        ("d.jsonl", b'[\n{"prompt": "a"}\n]', "is one JSON array; write one object per line"),
        ("d.parquet", b"PAR1 and then nothing", "as Parquet"),
        ("d.parquet", b"", "as Parquet"),
        ("d.csv", b"prompt\na\n", "is neither .jsonl nor .parquet; convert it"),
    ],
)
def test_a_file_that_is_something_else_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_the_one_that_was_meant(tmp_path):
    write(tmp_path / "train.jsonl", GOOD)
    with pytest.raises(DataError, match=r"no data file .*trian.jsonl \(did you mean '.*train.jsonl'\?\)"):
        load(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match="did you mean 'task:addition'"):
        load("addition")
    with pytest.raises(DataError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(DataError, match="cannot read data from a int"):
        load(3)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    path = write(tmp_path / "d.jsonl", GOOD)
    path.chmod(0)
    with pytest.raises(DataError, match="make the file readable"):
        load(path)


def test_parquet_and_datasets_give_the_same_records_as_lines(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [
        {"prompt": f"p{i}", "completion": "" if i == 3 else f"c{i}", "id": f"r{i}", "weight": i / 4} for i in range(600)
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "d.parquet")
    write(tmp_path / "d.jsonl", *(json.dumps(row).encode() for row in rows))
    loaded = []
    for spec in (tmp_path / "d.jsonl", tmp_path / "d.parquet", str(tmp_path / "d.parquet"), table, rows):
        with pytest.warns(UserWarning, match="1 of 600 rows .* 1 x 'completion' is empty"):
            loaded.append(load(spec, needs=("prompt", "completion")))
        assert loaded[-1].rejected_rows[0].line == 4
        assert json.loads(loaded[-1].rejected_rows[0].raw) == rows[3]
    assert len({data.content_hash for data in loaded}) == 1
    assert len(loaded[0]) == 599
    assert loaded[1][3].source == f"{tmp_path / 'd.parquet'}:5"
    with pytest.raises(DataError, match="splits 'train', 'test'; give one of them"):
        load(datasets.DatasetDict(train=table, test=table))


def test_a_parquet_file_with_a_hole_is_refused(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "d.parquet"
    datasets.Dataset.from_list([{"prompt": f"{i:09d}"} for i in range(5000)]).to_parquet(path)
    content = bytearray(path.read_bytes())
    content[100:4000] = bytes(3900)
    path.write_bytes(content)
    with pytest.raises(DataError, match="as Parquet"):
        load(path)


def test_records_and_data_sets_pass_through():
    data = load([Record("a", answer="b", extra={"x": 1}), Record("c", answer="d")])
    assert data[0].extra == {"x": 1}
    assert data[0].source == "rows:1"
    assert load(data) is data
    assert len(load(data, limit=1)) == 1
    with pytest.raises(DataError, match="rows has no usable row; 2 of 2 were set aside for: 'chosen' is missing"):
        load(data, needs=("prompt", "chosen"))
    with pytest.raises(DataError, match="rows is empty"):
        load([])


def test_the_checker_needs_an_answer_in_every_record():
    data = load([{"prompt": "a", "answer": 4}, {"prompt": "b", "answer": 0.5}])
    assert data.check is not None
    assert [data.check(data[0], t) for t in ("4", "5")] == [1.0, 0.0]
    assert data.check(data[1], "0.50") == 1.0
    assert load([{"prompt": "a", "answer": 4}, {"prompt": "b"}]).check is None


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
columns = st.sampled_from(["prompt", "completion", "chosen", "rejected", "answer", "id", "messages", "x"])


@given(raw=st.binary(max_size=80) | st.builds(lambda x: json.dumps(x).encode(), st.dictionaries(columns, json_values)))
def test_any_line_is_a_record_or_says_why_not(raw):
    try:
        record = to_record(parse_line(raw), ("prompt",), "f:1")
    except BadRow:
        return
    assert record.prompt
    assert json.loads(json.dumps(record.extra, allow_nan=False)) == record.extra
    for text in (record.completion, record.chosen, record.rejected, record.answer):
        assert text is None or text.strip()


def test_a_caller_may_refuse_records(tmp_path):
    def short(record: Record) -> str | None:
        return "longer than the context" if len(record.prompt) > 5 else None

    path = write(tmp_path / "d.jsonl", GOOD, b"torn", b'{"prompt": "too long for it"}', b'{"prompt": "c"}')
    for _ in range(2):  # a resumed run writes the same file once
        data = load(path, set_aside=tmp_path / "aside.jsonl", refuse=short)
        assert [r.prompt for r in data] == ["a", "c"]
        assert [row["line"] for row in aside_rows(tmp_path / "aside.jsonl")] == [2, 3]
        assert data.set_aside_path == tmp_path / "aside.jsonl"
    with pytest.raises(DataError, match="longer than the context"):
        load([{"prompt": "too long"}], refuse=short)


def test_a_data_set_keeps_its_checker_and_counts_on(tmp_path):
    with pytest.warns(UserWarning, match="1 of 4"):
        data = load(
            [{"prompt": "a"}, {"prompt": ""}, {"prompt": "b", "completion": "c"}, Record("d", source="x.jsonl:9")]
        )
    data = replace(data, check=lambda record, text: 1.0)
    again = load(data, refuse=lambda r: "no d" if r.prompt == "d" else None, set_aside=tmp_path / "aside.jsonl")
    assert [r.prompt for r in again] == ["a", "b"]
    assert again.check is data.check
    assert again.set_aside_summary == {"'prompt' is empty": 1, "no d": 1}
    assert json.loads(aside_rows(tmp_path / "aside.jsonl")[0]["raw"]) == {"prompt": "d", "source": "x.jsonl:9"}
    made = load(
        "task:addition:n=30",
        limit=3,
        refuse=lambda r: "even" if int(r.completion or 0) % 2 == 0 else None,
        set_aside=tmp_path / "b.jsonl",
    )
    assert [int(r.completion or 0) % 2 for r in made] == [1, 1, 1]
    assert made.check is not None
