"""Sources: every way a file can be right or broken. Nothing raises; each broken row is named by file and line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tunelet.data.sources import data_files, read_rows
from tunelet.errors import TuneletError

GOOD = {"prompt": "What is 2 + 2?", "completion": "4"}


def write(folder: Path, name: str, content: str | bytes) -> str:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def kinds(rows) -> list[tuple[str, int]]:
    return [(finding.kind, finding.origin.line) for finding in rows.findings]


# JSON lines --------------------------------------------------------------------------------------------------------


def test_broken_line_is_a_finding_with_its_line(tmp_path):
    lines = [json.dumps({**GOOD, "id": n}) for n in range(1000)]
    lines[730] = '{"prompt": "cut off'
    rows = read_rows(write(tmp_path, "a.jsonl", "\n".join(lines)))
    assert len(rows.rows) == 999
    assert kinds(rows) == [("broken_json", 731)]
    assert rows.broken == {"broken_json": 1}
    assert "cut off" in rows.findings[0].message and rows.findings[0].fix


@pytest.mark.parametrize(
    "line,kind,fix",
    [
        ('{"a": 1,}', "broken_json", "comma"),
        ("{'a': 1}", "broken_json", "double quotes"),
        ('{"a": "x\ty"}', "broken_json", "\\n"),
        ("[1, 2]", "not_an_object", "prompt"),
        ("3.5", "not_an_object", "prompt"),
        ("null", "not_an_object", "prompt"),
        ("true", "not_an_object", "prompt"),
        ('{"a": 1, "a": 2}', "duplicate_key", "remove"),
        ('{"a": "\\ud83d"}', "broken_text", ""),
        ("\x00" * 40, "nul_bytes", ""),
        ("[" * 100000, "broken_json", ""),
        ('{"a": ' + "9" * 5000 + "}", "broken_json", ""),
        ('{"a": 1} {"b": 2}', "broken_json", ""),
    ],
)
def test_each_kind_of_broken_line(tmp_path, line, kind, fix):
    rows = read_rows(write(tmp_path, "a.jsonl", f"{json.dumps(GOOD)}\n{line}\n{json.dumps(GOOD)}\n"))
    assert kinds(rows) == [(kind, 2)]
    assert fix in rows.findings[0].fix
    assert [row.origin.line for row in rows.rows] == [1, 3]


def test_the_same_key_twice_with_one_value_is_no_fault(tmp_path):
    rows = read_rows(write(tmp_path, "a.jsonl", '{"a": "x", "a": "x"}'))
    assert rows.findings == [] and rows.rows[0].value == {"a": "x"}


def test_wrong_encoding_names_line_byte_and_the_command_that_mends_it(tmp_path):
    data = json.dumps(GOOD).encode() + b"\n" + '{"prompt": "안녕"}'.encode("cp949") + b"\n" + json.dumps(GOOD).encode()
    rows = read_rows(write(tmp_path, "mixed.jsonl", data))
    assert kinds(rows) == [("wrong_encoding", 2)]
    assert "byte 13" in rows.findings[0].message and "0xbe" in rows.findings[0].message
    assert "iconv -f CP949 -t UTF-8" in rows.findings[0].fix
    assert len(rows.rows) == 2


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.txt", "a.tsv"])
def test_utf16_and_empty_files(tmp_path, name):
    assert kinds(read_rows(write(tmp_path, name, "prompt,completion\na,b\n".encode("utf-16")))) == [
        ("wrong_encoding", 1)
    ]
    for empty in (b"", b"\n \r\n", b"\xef\xbb\xbf", b"\x00" * 512):
        rows = read_rows(write(tmp_path, name, empty))
        assert kinds(rows) == [("empty_file", 1)] and not rows.rows and not rows.broken


def test_bom_crlf_blank_lines_and_huge_lines(tmp_path):
    huge = json.dumps({"prompt": "x" * 3_000_000, "completion": "y"})
    text = "\r\n".join(["", json.dumps(GOOD), "", huge, ""])
    rows = read_rows(write(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + text.encode()))
    assert rows.findings == [] and [row.origin.line for row in rows.rows] == [2, 4]
    assert rows.rows[0].value == GOOD


def test_unicode_line_separators_do_not_split_a_row(tmp_path):
    rows = read_rows(write(tmp_path, "a.jsonl", json.dumps({"text": "a\u2028b\u2029c\x85d"}, ensure_ascii=False)))
    assert rows.findings == [] and rows.rows[0].value["text"] == "a\u2028b\u2029c\x85d"


# JSON --------------------------------------------------------------------------------------------------------------


def test_json_array_object_with_one_array_lines_and_one_row(tmp_path):
    pair = [GOOD, {**GOOD, "id": 1}]
    for name, text in {
        "array.json": json.dumps(pair, indent=2),
        "object.json": json.dumps({"version": 1, "data": pair}),
        "lines.json": "\n".join(map(json.dumps, pair)),
        "array.jsonl": json.dumps(pair, indent=2),
    }.items():
        rows = read_rows(write(tmp_path, name, text))
        assert rows.findings == [] and [row.value for row in rows.rows] == pair, name
    one = {"messages": [{"role": "user", "content": "a"}]}
    assert [row.value for row in read_rows(write(tmp_path, "one.json", json.dumps(one))).rows] == [one]


def test_broken_row_of_an_array_costs_one_row(tmp_path):
    text = '[\n {"a": 1},\n {"a": oops},\n {"a": 3},\n {"a": 4,},\n {"a": 5}\n]'
    rows = read_rows(write(tmp_path, "a.json", text))
    assert [row.value for row in rows.rows] == [{"a": 1}, {"a": 3}, {"a": 5}]
    assert kinds(rows) == [("broken_json", 3), ("broken_json", 5)]


@pytest.mark.parametrize(
    "text,expected,lost",
    [
        ('[{"a": 1}, {"a": 2},]', 2, 0),
        ('[{"a": 1} {"a": 2}]', 2, 0),
        ('[{"a": 1}, {"a": 2}', 2, 1),
        ('[{"a": 1}] trailing', 1, 1),
        ('[{"a": 1}, 5, null, "text"]', 2, 2),
        ("17", 0, 1),
        ('"only text"', 1, 0),
        ("{", 0, 1),
    ],
)
def test_arrays_that_are_not_right(tmp_path, text, expected, lost):
    rows = read_rows(write(tmp_path, "a.json", text))
    assert (len(rows.rows), sum(rows.broken.values())) == (expected, lost)
    assert bool(rows.findings) == (text != '"only text"')


def test_wrong_encoding_inside_an_array_costs_its_row_only(tmp_path):
    data = b'[{"a": "ok"}, {"a": "' + "한글".encode("cp949") + b'"}, {"a": "fine"}]'
    rows = read_rows(write(tmp_path, "a.json", data))
    assert [row.value["a"] for row in rows.rows] == ["ok", "fine"]
    assert kinds(rows) == [("wrong_encoding", 2)]


# Tables ------------------------------------------------------------------------------------------------------------


def test_csv_with_quotes_line_breaks_and_bom(tmp_path):
    text = 'Q,A,label\r\n"a, b","line one\nline two",0\r\n"say ""hi""",c,1\r\n\r\n'
    rows = read_rows(write(tmp_path, "a.csv", b"\xef\xbb\xbf" + text.encode()))
    assert rows.findings == []
    assert [row.value["A"] for row in rows.rows] == ["line one\nline two", "c"]
    assert [row.origin.line for row in rows.rows] == [2, 4]


def test_csv_faults(tmp_path):
    data = b"Q,A,Q\n1,2,3\n" + b"x,\xb0\xa1\xb3\xaa,z\n" + b"too,few\n" + b"one,too,many,cells\n" + b"a,b,c\n"
    rows = read_rows(write(tmp_path, "a.csv", data))
    assert kinds(rows) == [("duplicate_header", 1), ("wrong_encoding", 3), ("ragged_row", 4), ("ragged_row", 5)]
    assert len(rows.rows) == 2 and sum(rows.broken.values()) == 3
    assert rows.rows[0].value == {"Q": "1", "A": "2", "Q 3": "3"}


def test_csv_without_a_header_and_with_the_wrong_delimiter(tmp_path):
    assert kinds(read_rows(write(tmp_path, "a.csv", "What is 2?,3.5,4,5,6,B\nx,1,2,3,4,A\n"))) == [
        ("missing_header", 1)
    ]
    assert kinds(read_rows(write(tmp_path, "m.csv", "Which nerve is it?,This,That,D\nAnd this?,x,y,C\n"))) == [
        ("missing_header", 1)
    ]
    assert kinds(read_rows(write(tmp_path, "n.tsv", "ID\tQuestion\t1\t2\n1\tx\ty\tz\n"))) == []  # numbers as names
    assert kinds(read_rows(write(tmp_path, "b.csv", "Q;A\na;b\n"))) == [("wrong_delimiter", 1)]
    assert kinds(read_rows(write(tmp_path, "c.tsv", "Q,A\na,b\n"))) == [("wrong_delimiter", 1)]


def test_csv_open_quote_is_told(tmp_path):
    rows = read_rows(write(tmp_path, "a.csv", 'Q,A\na,"b\n' + "c,d\n" * 40))
    assert {"unbalanced_quotes"} <= {finding.kind for finding in rows.findings}


def test_parquet_and_a_broken_one(tmp_path):
    import pyarrow
    import pyarrow.parquet

    messages = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 3
    pyarrow.parquet.write_table(pyarrow.table({"messages": messages, "n": [1, None, 3]}), tmp_path / "a.parquet")
    rows = read_rows(str(tmp_path / "a.parquet"))
    assert [row.value["n"] for row in rows.rows] == [1, None, 3] and rows.rows[0].value["messages"] == messages[0]
    whole = (tmp_path / "a.parquet").read_bytes()
    assert kinds(read_rows(write(tmp_path, "b.parquet", whole[:-20]))) == [("broken_parquet", 1)]


def test_text_is_one_document_unless_separated(tmp_path):
    rows = read_rows(write(tmp_path, "a.txt", "one\r\n\r\nstill one\r\n"))
    assert [row.value for row in rows.rows] == ["one\n\nstill one\n"]
    rows = read_rows(write(tmp_path, "b.txt", "one\n<|endoftext|>\n\ntwo\nlines\n<|endoftext|>\n"))
    assert [(row.value, row.origin.line) for row in rows.rows] == [("one", 1), ("two\nlines", 4)]
    data = b"fine\n<|endoftext|>\nbad \xb0\xa1\n<|endoftext|>\nfine too\n"
    rows = read_rows(write(tmp_path, "c.txt", data))
    assert kinds(rows) == [("wrong_encoding", 3)] and len(rows.rows) == 2


# Files, folders, names ---------------------------------------------------------------------------------------------


def test_gzip_and_a_damaged_one(tmp_path):
    packed = gzip.compress(json.dumps(GOOD).encode())
    assert [row.value for row in read_rows(write(tmp_path, "a.jsonl.gz", packed)).rows] == [GOOD]
    assert kinds(read_rows(write(tmp_path, "b.jsonl.gz", packed[:-12]))) == [("broken_gzip", 1)]
    assert kinds(read_rows(write(tmp_path, "c.csv.gz", b"no gzip at all"))) == [("broken_gzip", 1)]


def test_folder_takes_data_files_only_in_order(tmp_path):
    for name in (
        "b.jsonl",
        "a.csv",
        "README.txt",
        "LICENSE.txt",
        ".hidden.jsonl",
        "notes.md",
        "sub/c.json",
        ".git/x.json",
    ):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("Q,A\n1,2\n" if name.endswith("csv") else json.dumps(GOOD))
    assert [path.name for path in data_files(tmp_path)] == ["a.csv", "b.jsonl", "c.json"]
    assert len(read_rows(str(tmp_path)).rows) == 3
    assert set(read_rows(str(tmp_path)).sha256) == {str(path) for path in data_files(tmp_path)}
    (tmp_path / "empty").mkdir()
    with pytest.raises(TuneletError, match="holds no data file"):
        read_rows(str(tmp_path / "empty"))


def test_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path, "train.jsonl", "{}")
    with pytest.raises(TuneletError) as caught:
        read_rows(str(tmp_path / "trian.jsonl"))
    assert "Did you mean 'train.jsonl'" in str(caught.value) and caught.value.fix
    with pytest.raises(TuneletError, match="no file or folder"):
        read_rows("data/chat.jsonl")


def test_unknown_ending_is_a_finding(tmp_path):
    assert kinds(read_rows(write(tmp_path, "a.xml", "<a/>"))) == [("unknown_file", 1)]


def test_an_existing_path_is_never_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    write(tmp_path / "org" / "name", "a.jsonl", json.dumps(GOOD))
    assert len(read_rows("org/name").rows) == 1


def test_hub_name_offline_fails_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    started = time.monotonic()
    with pytest.raises(TuneletError) as caught:
        read_rows("HuggingFaceTB/smoltalk:all")
    assert time.monotonic() - started < 2
    assert "offline" in str(caught.value).lower() and "not in the local cache" in caught.value.why


def test_hub_rows_configuration_split_and_errors(monkeypatch):
    from tunelet.data import sources

    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        if name == "org/none":
            raise ValueError("Unknown split\nlong trace")
        return [GOOD] * 5

    monkeypatch.setattr(sources, "offline_asked", lambda: False)
    monkeypatch.setattr(sources, "hub_reachable", lambda: True)
    rows = sources._hub("org/name:all:test", 3, load)
    assert asked == [("org/name", "all", "test")] and [row.value for row in rows.rows] == [GOOD] * 3
    assert str(rows.rows[2].origin) == "org/name:all:test, row 3"
    with pytest.raises(TuneletError) as caught:
        sources._hub("org/none", 0, load)
    assert caught.value.why == "Unknown split" and asked[-1] == ("org/none", None, "train")


def test_a_network_that_does_not_answer_counts_as_offline_soon(monkeypatch):
    from tunelet.data import sources

    late = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr(sources.socket, "create_connection", lambda *a, **k: time.sleep(2) or late)
    started = time.monotonic()
    assert sources.hub_reachable(0.2) is False and time.monotonic() - started < 1.5


def test_limit_takes_the_first_rows(tmp_path):
    text = "\n".join(["broken"] + [json.dumps({**GOOD, "id": n}) for n in range(10)])
    rows = read_rows(write(tmp_path, "a.jsonl", text), limit=4)
    assert [row.value["id"] for row in rows.rows] == [0, 1, 2] and rows.broken == {"broken_json": 1}


def test_reading_imports_nothing_heavy(tmp_path):
    import subprocess

    path = write(tmp_path, "a.jsonl", json.dumps(GOOD))
    code = (
        "import sys; from tunelet.data import formats, doctor; "
        "doctor.check(formats.load([sys.argv[1]]).examples); "
        "print([m for m in ('torch', 'transformers', 'datasets', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, path]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": "src"})
    assert done.stdout.strip() == "[]", done.stderr


# Properties --------------------------------------------------------------------------------------------------------

fast = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
sound = st.text(st.characters(exclude_categories=["Cs"]))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | sound,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(sound, inner, max_size=3),
    max_leaves=8,
)


@fast
@given(st.lists(st.dictionaries(sound, values, min_size=1, max_size=4), min_size=1, max_size=5), st.booleans())
def test_jsonl_round_trip(tmp_path, rows, ascii_only):
    path = write(tmp_path, "a.jsonl", "\n".join(json.dumps(row, ensure_ascii=ascii_only) for row in rows))
    read = read_rows(path)
    assert read.findings == [] and [row.value for row in read.rows] == rows


@fast
@given(
    st.lists(st.dictionaries(sound, values, min_size=1, max_size=4), min_size=1, max_size=5), st.sampled_from([None, 1])
)
def test_json_array_round_trip(tmp_path, rows, indent):
    read = read_rows(write(tmp_path, "a.json", json.dumps(rows, indent=indent)))
    assert read.findings == [] and [row.value for row in read.rows] == rows


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\x00"), min_size=1)


@fast
@given(st.lists(st.tuples(cells, cells), min_size=1, max_size=5), st.sampled_from([("csv", ","), ("tsv", "\t")]))
def test_csv_round_trip(tmp_path, pairs, kind):
    out = io.StringIO()
    csv.writer(out, delimiter=kind[1]).writerows([("question", "answer"), *pairs])
    read = read_rows(write(tmp_path, f"a.{kind[0]}", out.getvalue()))
    assert [tuple(row.value.values()) for row in read.rows] == pairs
    assert not read.broken


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300), st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz"]))
def test_any_bytes_are_read_without_an_exception(tmp_path, data, ending):
    read = read_rows(write(tmp_path, "a" + ending, data))
    assert all(finding.origin is not None and finding.kind for finding in read.findings)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from([*list('{}[]",:\\ \n'), "1", "a", "null", '{"a": 1}', '{"b": "c"}']), max_size=30))
def test_any_near_json_is_read_without_an_exception(tmp_path, parts):
    for ending in (".json", ".jsonl"):
        read_rows(write(tmp_path, "a" + ending, "".join(parts)))
