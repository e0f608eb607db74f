"""Rows are read with their numbers, from every kind of file, and what is unreadable is named."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import preference_rows, write_jsonl

from tdpo import UserError
from tdpo.data.sources import read_source

ROWS = preference_rows(3)


def test_every_file_kind_gives_the_same_rows(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write((tmp_path / "a.jsonl").read_text())
    with open(tmp_path / "d.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    with open(tmp_path / "e.parquet", "rb") as plain, gzip.open(tmp_path / "f.parquet.gz", "wb") as packed:
        packed.write(plain.read())
    (tmp_path / "g.json").write_text((tmp_path / "a.jsonl").read_text())
    for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.csv", "e.parquet", "f.parquet.gz", "g.json"):
        rows = read_source(str(tmp_path / name), "train")
        assert [row.fields for row in rows] == ROWS, name
        assert [row.row for row in rows] == [1, 2, 3]


def test_blank_lines_do_not_shift_the_row_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [row.row for row in read_source(str(tmp_path / "a.jsonl"), "train")] == [1, 3]


def test_a_byte_order_mark_and_any_script_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"prompt": "问题：מה שלומך? 🙂"}\n'.encode())
    assert read_source(str(tmp_path / "a.jsonl"), "train")[0].fields == {"prompt": "问题：מה שלומך? 🙂"}


def test_a_folder_gives_the_files_of_the_split_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train-2.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "train-1.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "test.jsonl", ROWS[2:])
    assert [row.fields for row in read_source(str(tmp_path), "train")] == ROWS
    assert [row.fields for row in read_source(str(tmp_path), "test")] == ROWS[2:]
    with pytest.raises(UserError, match=r"'validation'.*test\.jsonl, train-1\.jsonl, train-2\.jsonl"):
        read_source(str(tmp_path), "validation")


def test_a_glob_gives_all_matching_files(tmp_path: Path) -> None:
    for number, row in enumerate(ROWS):
        write_jsonl(tmp_path / f"part{number}.jsonl", [row])
    assert [row.fields for row in read_source(str(tmp_path / "part*.jsonl"), "train")] == ROWS
    with pytest.raises(UserError, match="no file matches"):
        read_source(str(tmp_path / "none*.jsonl"), "train")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/missing/folder/file.parquet"])
def test_a_missing_file_is_named_without_asking_the_hub(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}: no such file or folder"):
        read_source(name, "train")


def test_a_lone_file_stands_for_any_split_but_one_it_does_not_name(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", ROWS)
    assert len(read_source(str(tmp_path), "test")) == 3
    (tmp_path / "pairs.jsonl").rename(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"'test'; dataset files there: train\.jsonl"):
        read_source(str(tmp_path), "test")
    write_jsonl(tmp_path / "trainer_state.json", ROWS)
    assert len(read_source(str(tmp_path), "train")) == 3, "only files of the split itself"


def test_tables_that_would_be_misread_are_refused(tmp_path: Path) -> None:
    (tmp_path / "open.csv").write_text('prompt,chosen,rejected\na,b,c\nd,e,"f\ng,h,i\n')
    with pytest.raises(UserError, match=r"open\.csv, row 2: not valid CSV"):
        read_source(str(tmp_path / "open.csv"), "train")
    (tmp_path / "twice.csv").write_text("prompt,chosen,chosen\na,b,c\n")
    with pytest.raises(UserError, match="a column name stands twice"):
        read_source(str(tmp_path / "twice.csv"), "train")
    (tmp_path / "short.csv").write_text("prompt,chosen,rejected\na,b\n")
    assert "not as many cells" in read_source(str(tmp_path / "short.csv"), "train")[0].error


def test_rows_json_cannot_hold_are_bad_rows_not_crashes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": ' + "[" * 100_000 + "\n{" + '"a": ' + "1" * 5000 + "}\n")
    rows = read_source(str(tmp_path / "a.jsonl"), "train")
    assert [bool(row.error) for row in rows] == [False, True, True]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UserError, match=r"a\.txt: cannot read files of this kind; known are \.jsonl"):
        read_source(str(tmp_path / "a.txt"), "train")
    (tmp_path / "a.jsonl.gz").write_text("not gzip")
    with pytest.raises(UserError, match=r"a\.jsonl\.gz: cannot be read"):
        read_source(str(tmp_path / "a.jsonl.gz"), "train")
    (tmp_path / "a.parquet").write_text("not parquet")
    with pytest.raises(UserError, match=r"a\.parquet: not a Parquet file"):
        read_source(str(tmp_path / "a.parquet"), "train")
    (tmp_path / "b.json").write_text('[\n{"a": 1},\n{"a": }]')
    with pytest.raises(UserError, match=r"b\.json, line 3: not valid JSON"):
        read_source(str(tmp_path / "b.json"), "train")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match=r"empty\.jsonl: no rows"):
        read_source(str(tmp_path / "empty.jsonl"), "train")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    (row,) = read_source(str(tmp_path / "latin.jsonl"), "train")
    assert row.error == "not UTF-8 text: byte 0xe9 at position 13"
