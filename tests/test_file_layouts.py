"""Files as people have them: columns instead of rows, splits in one object, other delimiters, other contents."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import preference_rows

from tdpo import UserError
from tdpo.cli import main
from tdpo.data.cache import fingerprint
from tdpo.data.sources import open_source, read_source

ROWS = preference_rows(3)
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]


def read(folder: Path, content: Any, name: str = "a.json", split: str = "train") -> list[tuple[int, Any]]:
    if not isinstance(content, bytes):
        content = (content if isinstance(content, str) else json.dumps(content)).encode()
    (folder / name).write_bytes(content)
    return [(row.row, row.error or row.fields) for row in read_source(str(folder / name), split)]


def numbered(rows: list[Any]) -> list[tuple[int, Any]]:
    return list(enumerate(rows, 1))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (COLUMNS, ROWS),
        ({name: {str(i): cell for i, cell in enumerate(column)} for name, column in COLUMNS.items()}, ROWS),
        ({str(i): row for i, row in enumerate(ROWS)}, ROWS),
        ({"columns": list(COLUMNS), "index": [0, 1, 2], "data": [list(row.values()) for row in ROWS]}, ROWS),
        ({f"q{i}": row for i, row in enumerate(ROWS)}, ROWS),
        ({"frage": {"0": "a", "1": "b"}, "gut": {"0": 1, "1": None}},
         [{"frage": "a", "gut": 1}, {"frage": "b", "gut": None}]),
        ({"columns": 3, "index": 4, "data": 5}, [{"columns": 3, "index": 4, "data": 5}]),
        ({"schema": {"fields": []}, "data": ROWS}, ROWS),
        ({"version": "1.0", "tags": ["a"], "data": ROWS}, ROWS),
        ({"info": {"by": "me"}, "examples": ROWS}, ROWS),
        ({"prompt": ["a", "b"], "meta": [{"id": 1}, {"id": 2}]},
         [{"prompt": "a", "meta": {"id": 1}}, {"prompt": "b", "meta": {"id": 2}}]),
        ({"chosen": [CHAT, CHAT[:1]]}, [{"chosen": CHAT}, {"chosen": CHAT[:1]}]),
        ({"text": ["a", "b"]}, [{"text": "a"}, {"text": "b"}]),
        ({"train": ROWS[:2], "test": ROWS[2:]}, ROWS[:2]),
        ({"train": COLUMNS, "test": {}}, ROWS),
        ({"version": 2, "train": ROWS}, ROWS),
        ({"messages": CHAT}, [{"messages": CHAT}]),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]},
         [{"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}]),
        ({"prompt": "x", "completions": [{"text": "a", "score": 1}]},
         [{"prompt": "x", "completions": [{"text": "a", "score": 1}]}]),
    ],
)  # fmt: skip
def test_a_json_file_in_any_layout_gives_its_rows(tmp_path: Path, content: Any, rows: list[Any], indent: Any) -> None:
    assert read(tmp_path, json.dumps(content, indent=indent)) == numbered(rows)


def test_the_split_option_chooses_among_lists(tmp_path: Path) -> None:
    splits = {"train": ROWS[:2], "test": ROWS[2:], "note": "x"}
    assert read(tmp_path, splits, split="test") == numbered(ROWS[2:])
    assert read(tmp_path, {"easy": ROWS[:1], "hard": ROWS[1:]}, split="hard") == numbered(ROWS[1:])
    prints = [fingerprint(open_source(str(tmp_path / "a.json"), split)) for split in ("easy", "hard", "hard")]
    assert prints[0] != prints[1] == prints[2]  # tokenised pairs of one split are not taken for another's


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": ROWS, "test": ROWS}, r"a\.json: no split 'dev'; there are: train, test"),
        ({"test": ROWS}, r"no split 'dev'; there are: test"),
        ({"easy": ROWS, "hard": ROWS}, r"several lists of rows: easy, hard; .*--dataset_train_split"),
        ({"prompt": ["a", "b"], "chosen": ["c"]}, r"its columns have different lengths: prompt 2, chosen 1"),
        ({"prompt": {"0": "a"}, "chosen": {"1": "b"}}, r"its columns prompt, chosen do not have the same rows"),
        ({"prompt": [], "chosen": []}, r"a\.json: no rows in it"),
    ],
)  # fmt: skip
def test_what_is_ambiguous_is_refused_by_name(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, content, split="dev")


def test_lists_under_the_name_of_json_lines_are_read(tmp_path: Path) -> None:
    for indent in (None, 1):
        assert read(tmp_path, json.dumps(ROWS, indent=indent), "a.jsonl") == numbered(ROWS)
    assert read(tmp_path, json.dumps(ROWS[0], indent=1), "b.jsonl") == numbered(ROWS[:1])
    assert read(tmp_path, {"messages": CHAT}, "c.jsonl") == [(1, {"messages": CHAT})]
    (first, second) = read(tmp_path, '\n{"a": }\n{"a": 2}\n', "d.jsonl")
    assert (first[0], "not valid JSON" in first[1], second) == (2, True, (3, {"a": 2}))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", "prompt;chosen\nx, y;z\n"),
        ("a.csv", "prompt\tchosen\nx, y\tz\n"),
        ("a.csv", "sep=;\r\nprompt;chosen\r\nx, y;z\r\n"),
        ("a.csv", "\ufeffprompt|chosen\nx, y|z\n"),
        ("a.csv", 'prompt,chosen\n"x, y",z\n'),
        ("a.csv", 'prompt;chosen\n"x, y";"z"\n'),
        ("a.tsv", "prompt\tchosen\nx, y\tz\n"),
        ("a.tsv", 'prompt,chosen\n"x, y",z\n'),
    ],
)
def test_tables_with_other_delimiters(tmp_path: Path, name: str, content: str) -> None:
    assert read(tmp_path, content, name) == [(1, {"prompt": "x, y", "chosen": "z"})]
    assert read(tmp_path, gzip.compress(content.encode()), name + ".gz") == [(1, {"prompt": "x, y", "chosen": "z"})]


def test_a_table_of_one_column_keeps_its_delimiter(tmp_path: Path) -> None:
    assert read(tmp_path, "text\na;b\n", "a.csv") == [(1, {"text": "a;b"})]
    assert read(tmp_path, "text\na,b\n", "a.csv")[0][1].startswith("not as many cells")
    (row,) = read(tmp_path, "prompt;chosen\nx;y;z\n", "a.csv")
    assert row == (1, "not as many cells as the header has columns (2)")


def office() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("[Content_Types].xml", "<Types/>")
    return file.getvalue()


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), file)
    return file.getvalue()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n<!DOCTYPE html>\n<html><body>Sign in", "it is an HTML page and not the data"),
        (b'<HTML lang="en">', "it is an HTML page"),
        (gzip.compress(b"{}", mtime=0), r"it is gzip-compressed data; decompress it or add \.gz to its name"),
        (bz2.compress(b"{}"), "it is bzip2-compressed data"),
        (lzma.compress(b"{}"), "it is xz-compressed data"),
        (pa.compress(b"{}", codec="zstd", asbytes=True), "it is zstd-compressed data"),
        (office(), "it is a zip archive or an Excel workbook; unpack the one, save the other as CSV"),
        (bytes.fromhex("d0cf11e0"), "it is an Excel workbook or another Office file; save it as CSV"),
        (parquet(), r"it is a Parquet file; name it \.parquet"),
        ('{"a": 1}\n'.encode("utf-16"), "it is UTF-16 text; save it as UTF-8"),
        ('{"a": 1}\n'.encode("utf-16-le"), "it is UTF-16 text; save it as UTF-8"),
    ],
)
def test_other_content_under_a_name_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=rf"{name}: {message}"):
        read(tmp_path, content, name)


def test_other_content_is_named_inside_compressed_files_and_tables_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: it is an HTML page"):
        read(tmp_path, gzip.compress(b"<html>", mtime=0), "a.jsonl.gz")
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: it is gzip-compressed data"):
        read(tmp_path, gzip.compress(gzip.compress(b"{}", mtime=0)), "a.jsonl.gz")
    with pytest.raises(UserError, match=r"a\.parquet: it is an HTML page"):
        read(tmp_path, b"<html>", "a.parquet")
    with pytest.raises(UserError, match=r"a\.arrow: it is a Parquet file"):
        read(tmp_path, parquet(), "a.arrow")
    with pytest.raises(
        UserError, match=r"a\.xlsx: cannot read files of this kind \(it is a zip archive or an Excel workbook"
    ):
        read(tmp_path, office(), "a.xlsx")
    with pytest.raises(UserError, match=r"a\.csv: it is JSON; name it \.json or \.jsonl"):
        read(tmp_path, ROWS, "a.csv")
    assert read(tmp_path, parquet(), "a.parquet") == numbered(ROWS)


def test_the_command_line_reads_the_split_it_is_asked_for(tmp_path: Path, model_folder: Path) -> None:
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"train": ROWS[:2], "test": ROWS[2:]}))
    for split, pairs in (("train", 2), ("test", 1)):
        words = ["check-data", "--dataset_name", path, "--model_name_or_path", model_folder]
        words += ["--dataset_train_split", split, "--json", tmp_path / "found.json"]
        assert main([str(word) for word in words]) == 0
        assert json.loads((tmp_path / "found.json").read_text())["kept"] == pairs
