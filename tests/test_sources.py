"""Rows are read with their numbers, from every kind of file, and what is unreadable is named."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import preference_rows, write_jsonl

from tdpo import UserError
from tdpo.config import EvalDataConfig
from tdpo.config.row_spec import RowSpec, Side
from tdpo.data.cache import fingerprint
from tdpo.data.formats import DataReport, iter_records, to_records
from tdpo.data.mixture import open_mixture, parse_entry
from tdpo.data.options import open_training
from tdpo.data.sources import Source, open_source, read_source

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
    lines = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "g.json").write_text("\n" + lines.replace("\n", "\r\n"))
    (tmp_path / "h.jsonl.bz2").write_bytes(bz2.compress(lines.encode()))
    (tmp_path / "i.csv.xz").write_bytes(lzma.compress((tmp_path / "d.csv").read_bytes()))
    frames = [pa.compress(part.encode(), codec="zstd", asbytes=True) for part in lines.splitlines(keepends=True)]
    (tmp_path / "j.jsonl.zst").write_bytes(b"".join(frames))
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(tmp_path / "k.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    with pa.OSFile(str(tmp_path / "l.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1)
    (tmp_path / "m.arrow.gz").write_bytes(gzip.compress((tmp_path / "l.arrow").read_bytes()))
    (tmp_path / "n.json").write_text(json.dumps({"data": ROWS}, indent=2))
    (tmp_path / "O.JSONL").write_text(lines)
    (tmp_path / "q.ndjson").write_text(lines)
    (tmp_path / "p.parquet.zst").write_bytes(pa.compress((tmp_path / "e.parquet").read_bytes(), "zstd", asbytes=True))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert len(names) == 17
    for name in names:
        rows = read_source(str(tmp_path / name), "train")
        assert [row.fields for row in rows] == ROWS, name
        shift = 1 if name == "g.json" else 0  # a blank line before
        assert [row.row - shift for row in rows] == [1, 2, 3], name


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


def test_json_that_is_no_list_of_lines_is_still_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS[0], indent=2))
    assert [row.fields for row in read_source(str(tmp_path / "a.json"), "train")] == [ROWS[0]]
    (tmp_path / "b.json").write_text('{"a": 1}\n{"a": }\n\n{"a": 3}\n')
    assert [(row.row, bool(row.error)) for row in read_source(str(tmp_path / "b.json"), "train")] == [
        (1, False), (2, True), (4, False),
    ]  # fmt: skip
    (tmp_path / "c.json").write_text('\n{"a": \n{"a": 3}\n')
    assert [(row.row, bool(row.error)) for row in read_source(str(tmp_path / "c.json"), "train")] == [
        (2, True), (3, False),
    ]  # fmt: skip
    (tmp_path / "d.json").write_text("3")
    assert read_source(str(tmp_path / "d.json"), "train")[0].error == (
        "expected an object with fields, found the number 3"
    )
    (tmp_path / "e.json").write_text("[]")
    with pytest.raises(UserError, match=r"e\.json: no rows in it"):
        read_source(str(tmp_path / "e.json"), "train")


def test_a_key_that_stands_twice_would_lose_a_value(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"chosen": "a", "meta": {"x": 1, "x": 2}}\n')
    (row,) = read_source(str(tmp_path / "a.jsonl"), "train")
    assert row.error == "not readable JSON: the key 'x' stands twice in one object"


def test_utf_16_and_broken_utf_8_are_reported(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes('{"a": 1}\n'.encode("utf-16"))
    with pytest.raises(UserError, match=r"a\.jsonl: it is UTF-16 text; save it as UTF-8"):
        read_source(str(tmp_path / "a.jsonl"), "train")
    (tmp_path / "b.csv").write_bytes(b"prompt,chosen\na,b\nc,\xff\n")
    with pytest.raises(UserError, match=r"b\.csv, line 3: not UTF-8 text: byte 0xff; save it as UTF-8"):
        read_source(str(tmp_path / "b.csv"), "train")
    (tmp_path / "c.json").write_bytes(b'[{"a": 1},\n{"a": "\xff"}]')
    with pytest.raises(UserError, match=r"c\.json, line 2: not UTF-8 text: byte 0xff"):
        read_source(str(tmp_path / "c.json"), "train")


def test_what_is_no_dataset_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(UserError, match=r"a\.parquet: it is a pointer of Git LFS, not the file; git lfs pull"):
        read_source(str(tmp_path / "a.parquet"), "train")
    with pytest.raises(UserError, match="cannot be read: File name too long"):
        open_source("x" * 5000, "train")
    with pytest.raises(UserError, match=r"no such file or folder"):
        open_source("a\0b.jsonl", "train")
    strange = write_jsonl(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jsonl")), ROWS)
    report = to_records(open_source(str(strange), "train"))[1]
    assert report.lines()[0].encode().endswith(b"caf\\udce9.jsonl (preference): 3 rows, 3 kept")
    assert fingerprint(open_source(str(strange), "train"))


def test_files_cut_in_the_middle_are_reported(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"prompt": str(i), "text": os.urandom(20).hex()}) + "\n" for i in range(2000)).encode()
    whole = {
        "a.jsonl.gz": gzip.compress(lines), "b.jsonl.bz2": bz2.compress(lines), "c.jsonl.xz": lzma.compress(lines),
        "d.jsonl.zst": pa.compress(lines, codec="zstd", asbytes=True),
    }  # fmt: skip
    table = pa.Table.from_pylist([{"text": str(i)} for i in range(2000)])
    pq.write_table(table, tmp_path / "e.parquet")
    with pa.OSFile(str(tmp_path / "f.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    for name in ("e.parquet", "f.arrow"):
        whole[name] = (tmp_path / name).read_bytes()
    for name, content in whole.items():
        (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(UserError, match=rf"{name}: (cannot be read|not a Parquet file|not an Arrow file)"):
            read_source(str(tmp_path / name), "train")


def test_tables_with_a_name_twice_and_dates_beyond_time_are_reported(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["chosen", "chosen"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: a column name stands twice: chosen, chosen"):
        read_source(str(tmp_path / "a.parquet"), "train")
    beyond = pa.table({"t": pa.array([2**60], pa.timestamp("s"))})
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_stream(file, beyond.schema) as writer:
        writer.write_table(beyond)
    with pytest.raises(UserError, match=r"b\.arrow: cannot be read: "):
        read_source(str(tmp_path / "b.arrow"), "train")


def test_a_dataset_saved_by_datasets_is_read(tmp_path: Path) -> None:
    import datasets

    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": saved, "test": saved.select([2])}).save_to_disk(str(tmp_path / "both"))
    assert [row.fields for row in read_source(str(tmp_path / "one"), "anything")] == ROWS
    assert [row.fields for row in read_source(str(tmp_path / "both"), "train")] == ROWS
    (row,) = read_source(str(tmp_path / "both"), "test")
    assert (row.fields, row.row) == (ROWS[2], 1)
    with pytest.raises(UserError, match=r"both: no split 'dev'; there are: test, train"):
        read_source(str(tmp_path / "both"), "dev")


def test_a_hub_dataset_is_asked_for_once_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load_dataset(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        if name == "org/none":
            raise FileNotFoundError("no such dataset\nand many more lines")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = open_source("org/pairs", "train[:10%]", "en")
    assert not asked
    assert [row.fields for row in source] == ROWS
    assert asked == [("org/pairs", "en", "train[:10%]")]
    assert fingerprint(source) == fingerprint(open_source("org/pairs", "train[:10%]", "fr")) is not None, "of its rows"
    assert [row.location for row in source][1] == "org/pairs (train[:10%]), row 2"
    with pytest.raises(
        UserError, match=r"^dataset 'org/none': neither a local file nor loadable from the hub: no such dataset$"
    ):
        read_source("org/none", "train")


def test_standard_input_is_read_as_often_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    source = open_source("-", "train")
    assert [row.location for row in source] == [f"standard input, row {number}" for number in (1, 2, 3)]
    assert [row.fields for row in source] == ROWS
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="standard input cannot be read by several processes; write it to a file"):
        open_source("-", "train")


def test_rows_of_several_files_are_named_by_their_file(tmp_path: Path) -> None:
    same = {**ROWS[0], "rejected": ROWS[0]["chosen"]}
    write_jsonl(tmp_path / "a.jsonl", [ROWS[0], same])
    write_jsonl(tmp_path / "b.jsonl", [ROWS[1], same, same])
    name = str(tmp_path / "*.jsonl")
    records, report = to_records(open_source(name, "train"))
    assert [(Path(r.source).name, r.row) for r in records] == [("a.jsonl", 1), ("b.jsonl", 1)]
    assert report.lines() == [
        f"{name} (preference): 5 rows, 2 kept",
        f"dropped 2, chosen and rejected are identical ({tmp_path / 'b.jsonl'}): rows 2, 3",
        f"dropped 1, chosen and rejected are identical ({tmp_path / 'a.jsonl'}): row 2",
    ]


def numbered_rows(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {i // 2}", "chosen": f" yes {i}", "rejected": f" no {i}"} for i in range(count)]


def chosen(source: Any, reading: RowSpec | str = "auto") -> list[str]:
    return [record.chosen for record in to_records(source, reading)[0]]


def test_a_split_has_each_prompt_on_one_side_and_does_not_depend_on_the_order(tmp_path: Path) -> None:
    rows = numbered_rows(4000)
    random.Random(0).shuffle(rows)

    def side(rows: list[dict[str, str]], test: bool, seed: int = 0) -> Source:
        path = write_jsonl(tmp_path / "a.jsonl", rows)
        return open_source(str(path), "train", spec=RowSpec(side=Side(0.05, seed, test)))

    test, train = (chosen(side(rows, test)) for test in (True, False))
    assert sorted(test + train) == sorted(row["chosen"] for row in rows)
    questions = [{int(text.split()[1]) // 2 for text in part} for part in (test, train)]
    assert not questions[0] & questions[1]
    assert abs(len(questions[0]) - 100) < 3 * (2000 * 0.05 * 0.95) ** 0.5, "a binomial number around 5% of 2,000"
    assert set(chosen(side(rows[::-1], True))) == set(test)
    other = set(chosen(side(rows, True, seed=1)))
    assert len(other & set(test)) < len(test) / 4, "another seed is another split"
    _, report = to_records(side(rows, True))
    assert report.lines()[0].endswith(f"4000 rows, {len(test)} kept, {len(train)} on the other side of the split")


def test_processes_split_and_mix_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_jsonl(tmp_path / "a.jsonl", numbered_rows(200))
    code = (
        "from tdpo.data.formats import to_records\n"
        "from tdpo.config.row_spec import Side\n"
        "from tdpo.data.cache import fingerprint\n"
        "from tdpo.data.mixture import open_mixture\n"
        "output = []\n"
        "for test in (False, True):\n"
        "    names = ['a.jsonl,weight=0.5', 'a.jsonl,weight=1.3']\n"
        "    source = open_mixture(names, 'train', 0, Side(0.1, 0, test))\n"
        "    output += [fingerprint(source), *(record.chosen for record in to_records(source)[0])]\n"
    )
    other = subprocess.run(
        [sys.executable, "-c", code + "print(output)"], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7", "RANK": "1", "WORLD_SIZE": "2"},
    ).stdout  # fmt: skip
    monkeypatch.chdir(tmp_path)
    here: dict[str, Any] = {}
    exec(code, here)
    assert other.strip() == repr(here["output"]) and len(here["output"]) > 300


def test_a_mixture_reads_each_dataset_in_its_own_way(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant:"
    write_jsonl(tmp_path / "hh.jsonl", [{"chosen": start + " a", "rejected": start + " b"}])
    write_jsonl(tmp_path / "other.jsonl", [{"question": "q", "good": "c", "bad": "d"}])
    completions = [{"prompt": "p", "completion": c, "reward": r} for r, c in enumerate("xyz")]
    write_jsonl(tmp_path / "scored.jsonl", completions)
    entries: list[Any] = [
        {"name": str(tmp_path / "hh.jsonl"), "weight": 2, "truncation_mode": "keep_start"},
        json.dumps({"name": str(tmp_path / "other.jsonl"), "columns": {"prompt": "question"}, "format": "auto"}),
        f"{tmp_path / 'scored.jsonl'},pairs_from=best_worst,weight=1",
    ]
    entries[1] = {
        "name": str(tmp_path / "other.jsonl"), "columns": "prompt=question,chosen=good,rejected=bad",
    }  # fmt: skip
    source = open_mixture(entries, "train", 0)
    records, report = to_records(source)
    assert [(r.chosen, r.truncation_mode) for r in records] == [
        (" a", "keep_start"), (" a", "keep_start"), ("c", None), ("z", None),
    ]  # fmt: skip
    assert (report.format, report.read, report.kept) == ("hh, preference, scored", 5, 4)


def test_weights_are_how_often_a_record_is_seen(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", numbered_rows(1000))
    for weight, counts in ((1, {1}), (3, {3}), (0.5, {1}), (2.25, {2, 3})):
        source = open_mixture([f"{tmp_path / 'a.jsonl'},weight={weight}"], "train", 0)
        times = Counter(chosen(source))
        assert set(times.values()) == counts
        assert abs(times.total() - 1000 * weight) < 3 * 250**0.5


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "a.jsonl", "wieght": 2}, "entry 1: unknown field 'wieght'. Did you mean 'weight'?"),
        ({"weight": 2}, "entry 1: no name"),
        ("a.jsonl,weight", "expected name,field=value,..., found 'weight' without a value"),
        ("a.jsonl,weight=1,weight=2", "weight stands twice"),
        ("a.jsonl,weight=much", "weight must be a number, found the text 'much'"),
        ({"name": "a.jsonl", "weight": True}, "weight must be a number, found the boolean true"),
        ({"name": "a.jsonl", "split": 3}, "split must be a text, found the number 3"),
        ({"name": "a.jsonl", "weight": 0}, "the weight of a dataset must be above 0, got 0"),
        ({"name": "a.jsonl", "weight": float("inf")}, "the weight of a dataset must be above 0, got inf"),
        ({"name": "a.jsonl", "pairs_from": "margin"}, "--min_margin belong together"),
        ({"name": "a.jsonl", "truncation_mode": "keep"}, "truncation_mode keep: there are keep_end, keep_start"),
        ({"name": "a.jsonl", "columns": ["x"]}, "expected field names with column names"),
        ({"name": "nowhere.jsonl"}, "nowhere.jsonl: no such file or folder"),
        ("{", "not valid JSON"),
        (3, "expected an object or a text, found the number 3"),
    ],
)
def test_what_is_wrong_with_a_mixture_is_named(entry: Any, message: str) -> None:
    with pytest.raises(UserError) as raised:
        open_mixture([entry], "train", 0)
    assert message in str(raised.value)


def test_options_of_data_that_contradict_are_named() -> None:
    assert parse_entry("a.jsonl,weight=1", 1) == {"name": "a.jsonl", "weight": 1.0}
    with pytest.raises(UserError, match="either --dataset_name or --datasets"):
        EvalDataConfig()
    with pytest.raises(UserError, match="either --dataset_name or --datasets"):
        EvalDataConfig(dataset_name="a", datasets=["b"])
    with pytest.raises(UserError, match="--eval_dataset_name and --test_fraction contradict"):
        EvalDataConfig(dataset_name="a", eval_dataset_name="b", test_fraction=0.1)
    with pytest.raises(UserError, match=r"--test_fraction must be between 0 and 1, got 1\.5"):
        EvalDataConfig(dataset_name="a", test_fraction=1.5)
    mixed = EvalDataConfig(datasets=["a.jsonl"])
    with pytest.raises(UserError, match="--pairs_from, --dataset_format and --datasets contradict"):
        mixed.check_row_spec(RowSpec("hh", pairs_from="all"))


@pytest.mark.parametrize("field", ["pairs_from=best", "best_alone=1"])
def test_the_best_answer_alone_is_no_option_of_preferences(field: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there are all, best_worst, margin|unknown field 'best_alone'"):
        open_mixture([f"{write_jsonl(tmp_path / 'a.jsonl', ROWS)},{field}"], "train", 0)


def test_parts_of_a_split_are_refused_for_files(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(
        UserError, match=r"a\.jsonl: a part of a split, as in 'train\[:1\]', exists for hub datasets alone"
    ):
        open_source(str(path), "train[:1]")
    pytest.importorskip("datasets").Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(UserError, match="exists for hub datasets alone"):
        open_source(str(tmp_path / "saved"), "train[:1]")


def test_a_mixture_of_hub_datasets_has_one_configuration_unless_they_name_their_own() -> None:
    data = EvalDataConfig(datasets=["org/a", "org/b,config=fr"], dataset_config="en")
    assert [part.read.args[-1] for part in open_training(data, RowSpec()).parts] == ["en", "fr"]


def test_a_fingerprint_changes_with_what_is_read_and_how(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)

    def printed(spec: RowSpec | None = None) -> str | None:
        return fingerprint(open_source(str(path), "train", spec=spec))

    prints = [printed(), printed(RowSpec("preference")), printed(RowSpec(side=Side(0.1, 0, True)))]
    assert printed() == prints[0]
    write_jsonl(path, ROWS[::-1])
    prints.append(printed())
    assert None not in prints and len(set(prints)) == 4
    assert printed(RowSpec("module:function")) is None


def test_a_large_file_with_ten_bad_rows_names_them_in_bounded_memory(tmp_path: Path) -> None:
    """Reading holds no rows: 20,000 of them take no more memory than a few."""
    bad = {2_000 * i + 777: line for i, line in enumerate([b"{", b"[1]", b'{"prompt": "p"}', b"\xff\xfe", b"null"] * 2)}
    line = json.dumps({"prompt": "p" * 400, "chosen": "c" * 400, "rejected": "r" * 400}).encode()
    with open(tmp_path / "a.jsonl", "wb") as file:
        for number in range(1, 20_001):
            file.write(bad.get(number, line) + b"\n")
    report = DataReport("a")
    tracemalloc.start()
    kept = 0
    with pytest.raises(UserError) as raised:
        for _ in iter_records(open_source(str(tmp_path / "a.jsonl"), "train"), "auto", "error", report):
            kept += 1
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    named = [int(place.split(", row ")[1].split(":")[0]) for place in str(raised.value).splitlines()[:10]]
    assert named == sorted(bad)
    assert (report.read, kept) == (20_000, 776), "once a row is bad no record is needed"
    assert peak < 2 * 2**20, f"{peak:,} bytes for a file of {(tmp_path / 'a.jsonl').stat().st_size:,}"
