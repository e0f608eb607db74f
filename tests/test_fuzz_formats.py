"""Rows and files of any shape end in records or in a message that names the row; none is changed in silence."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_formats_pairs import ROWS

from tdpo import PreferenceRecord, UserError
from tdpo.config.row_spec import PAIRS_FROM, RowSpec, Side, parse_columns
from tdpo.data.formats import FORMATS, DataReport, iter_records, to_records
from tdpo.data.formats.markup import html_to_text
from tdpo.data.formats.pairs import common_words
from tdpo.data.mixture import parse_entry
from tdpo.data.sft import SFT_FORMATS
from tdpo.data.sources import SourceRow, from_memory, read_source

settings.register_profile(
    "tdpo", max_examples=300, deadline=None, database=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip
settings.load_profile("tdpo")

NAMES = [
    "prompt", "chosen", "rejected", "completion", "response", "reward", "score", "completions", "responses", "answers",
    "scores", "ranks", "rank", "question", "instruction", "input", "output", "history", "system", "tools", "messages",
    "conversations", "chat_template_kwargs", "human_ref_A", "human_ref_B", "score_A", "score_B", "labels", "pm_score",
    "text", "overall_score", "role", "content", "from", "value", "tool_calls", "type",
]  # fmt: skip
WORDS = [
    "user",
    "assistant",
    "system",
    "human",
    "gpt",
    "function_call",
    "\n\nAssistant:",
    "\n\nHuman: a\n\nAssistant: b",
    "1",
]
texts = st.one_of(st.sampled_from(WORDS), st.text(max_size=12), st.text("ab \n\ud83d\U0001f600é\u0301", max_size=8))
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(),
    st.floats(),
    texts,
    st.just(10**400),
    st.binary(max_size=3),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.one_of(st.sampled_from(NAMES), texts), inner, max_size=5)
    ),
    max_leaves=12,
)
chats = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": texts},
        optional={"tool_calls": values, "name": values},
    ),
    max_size=3,
)


MAKERS = [*ROWS.values(), lambda text: {"prompt": text, "completion": text, "reward": len(text) % 5}]


@st.composite
def mutants(draw: Any, make: Any) -> Any:
    """A sound row of some format, with up to two of its values changed, left out or added, at any depth."""
    row = copy.deepcopy(make(draw(texts) or "x"))
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        inside = row
        while True:
            keys = list(inside) if isinstance(inside, dict) else list(range(len(inside)))
            key = draw(st.sampled_from(keys)) if keys else "chosen" if isinstance(inside, dict) else 0
            if not (keys and isinstance(inside[key], dict | list) and draw(st.booleans())):
                break
            inside = inside[key]
        if keys and draw(st.integers(0, 3)) == 0:
            del inside[key]
        elif keys or isinstance(inside, dict):
            inside[key] = draw(st.one_of(values, chats, texts))
    return row


wild = st.one_of(st.dictionaries(st.sampled_from(NAMES), st.one_of(texts, chats, values)), values)
rows = st.one_of(
    *(st.lists(mutants(make), min_size=1, max_size=5) for make in MAKERS),
    st.lists(st.one_of(wild, st.sampled_from(MAKERS).flatmap(mutants)), max_size=5),
)
specs = st.builds(
    RowSpec,
    format=st.sampled_from(["auto"] * 30 + list(FORMATS)),
    columns=st.sampled_from([()] * 8 + [(("prompt", "question"),), (("score", "rank"), ("chosen", "text"))]),
    pairs_from=st.sampled_from([None] * 8 + ["all", "best_worst"]),
    weight=st.sampled_from([1.0, 0.5, 2.0]),
)


@contextlib.contextmanager
def only_words() -> Iterator[list[str]]:
    """Collects the message of a UserError; anything else fails the test."""
    messages: list[str] = []
    try:
        yield messages
    except UserError as error:
        messages.append(str(error))
        assert messages[0].strip()
        messages[0].encode("utf-8", "backslashreplace")


def texts_of(record: PreferenceRecord) -> list[str]:
    sides = (record.prompt, record.chosen, record.rejected)
    return [text for side in sides for text in ([side] if isinstance(side, str) else [m["content"] for m in side])]


def strings_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from strings_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from strings_in(inner)


@given(rows, specs)
@example([{"prompt": "p", "completion": "c", "reward": 10**400}], RowSpec())
@example([{"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "user", "content": "b"}]}], RowSpec())
@example([{"instruction": "a", "output": ["b", "c"], "history": [["a", None]]}], RowSpec())
@example([{"question": "a", "answers": [{"text": "<", "pm_score": "1e999"}]}], RowSpec())
def test_rows_end_in_records_or_in_a_message_that_names_them(found: list[Any], spec: RowSpec) -> None:
    before = copy.deepcopy(found)
    numbered = from_memory(found, "any.jsonl")
    report = DataReport("any.jsonl")
    with only_words() as messages:
        records, report = to_records(numbered, spec, "drop")
        counted = {row for gone in report.dropped.values() for row in gone} | {record.row for record in records}
        if spec.weight >= 1:
            assert counted >= set(range(1, len(found) + 1)) or report.format == "scored"
        for record in records:
            assert record.chosen != record.rejected and record.source == "any.jsonl"
            assert len({isinstance(side, str) for side in (record.prompt, record.chosen, record.rejected)}) == 1
            for text in texts_of(record):
                text.encode()
    assert repr(found) == repr(before), "rows are left as they are"
    if messages:
        options = messages[0].startswith("--")
        assert options or "any.jsonl" in messages[0] or "no rows" in messages[0], messages[0]
    with only_words() as strict:
        to_records(numbered, spec, "error")
    named = [re.match(r"any\.jsonl, row \d+: .", line) for line in strict[0].splitlines()] if strict else []
    bad = any(reason.startswith("bad row") for reason in report.dropped)
    if not messages and bad:
        assert named and named[0], strict


@given(rows)
def test_no_text_is_changed_on_its_way(found: list[Any]) -> None:
    """What a record says stands in its row, joined as the format joins it."""
    for number, row in enumerate(found, 1):
        with only_words():
            records, report = to_records([*from_memory([row], "any.jsonl")], "auto", "drop")
            for record in records:
                assert record.row == 1, number
                if report.format == "preference" and isinstance(record.prompt, str):
                    assert (record.prompt, record.chosen, record.rejected) == tuple(
                        row[name] for name in ("prompt", "chosen", "rejected")
                    )
                elif report.format in ("hh", "implicit") and isinstance(record.prompt, str):
                    assert (record.prompt + record.chosen, record.prompt + record.rejected) == (
                        row["chosen"], row["rejected"],
                    )  # fmt: skip
                elif report.format in ("implicit", "preference", "sharegpt", "answers", "ranked"):
                    there = "\x00".join(strings_in(row))
                    assert all(part in there for text in texts_of(record) for part in text.split("\n"))


@given(rows, st.sampled_from(["auto", *SFT_FORMATS]))
def test_supervised_rows_end_in_exchanges_or_in_a_message(found: list[Any], name: str) -> None:
    with only_words():
        report = DataReport("any.jsonl")
        numbered = from_memory(found, "any.jsonl")
        for exchange in iter_records(numbered, name, "drop", report, SFT_FORMATS):
            assert isinstance(exchange.prompt, str) == isinstance(exchange.chosen, str)


@given(values)
def test_columns_and_mixtures_of_any_shape_are_understood_or_refused(entry: Any) -> None:
    for word in (entry, json.dumps(entry, default=str), str(entry) if not isinstance(entry, int) else "x"):
        with only_words():
            assert all(len(pair) == 2 for pair in parse_columns(word))
        with only_words():
            assert parse_entry(word, 1)["name"]


LINES = [json.dumps(make("Why?")).encode() for make in ROWS.values()]


def files() -> dict[str, bytes]:
    table = pa.Table.from_pylist([{"prompt": "p", "chosen": "c" * i, "rejected": "r"} for i in range(1, 30)])
    parquet, stream = io.BytesIO(), io.BytesIO()
    pq.write_table(table, parquet)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    lines = b"\n".join([LINES[0]] * 5)
    return {
        "a.jsonl": lines,
        "b.json": b"[" + b",\n".join([LINES[0]] * 5) + b"]",
        "c.csv": b'prompt,chosen,rejected\n"a ""b""",c,d\n"e\nf",g,h\n',
        "d.parquet": parquet.getvalue(),
        "e.arrow": stream.getvalue(),
        "f.jsonl.zst": pa.compress(lines, codec="zstd", asbytes=True),
        "g.jsonl.gz": __import__("gzip").compress(lines),
        "h.jsonl.xz": __import__("lzma").compress(lines),
        "i.jsonl.bz2": __import__("bz2").compress(lines),
    }


FILES = files()


@settings(max_examples=400)
@given(st.sampled_from(list(FILES)), st.lists(st.tuples(st.integers(0, 5000), st.binary(max_size=4)), max_size=4))
def test_damaged_files_end_in_rows_or_in_a_message(tmp_path: Path, name: str, damage: list[tuple[int, bytes]]) -> None:
    content = FILES[name]
    for place, new in damage:
        place %= len(content) + 1
        content = content[:place] + new + content[place + len(new) // 2 :]
    (tmp_path / name).write_bytes(content)
    with only_words() as messages:
        found = read_source(str(tmp_path / name), "train")
        assert all(bool(row.error) != bool(row.fields) or row.fields == {} for row in found)
        assert all(isinstance(row, SourceRow) and row.row > 0 for row in found)
        to_records(found, "auto", "drop")
    assert not messages or name in messages[0], messages


@given(st.binary(max_size=200), st.sampled_from(["x.jsonl", "x.json", "x.csv", "x.parquet", "x.arrow", "x.jsonl.gz"]))
def test_any_bytes_end_in_rows_or_in_a_message(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with only_words() as messages:
        to_records(read_source(str(tmp_path / name), "train"), "auto", "drop")
    assert not messages or name in messages[0]


@given(st.text(), st.text(alphabet="ab ½\u0301👩\u200d🇩é.,'\n"), st.text())
def test_common_words_are_common_and_leave_something(common: str, more: str, rest: str) -> None:
    one, other = common + more, common + rest
    end = common_words(one, other)
    assert one[:end] == other[:end]
    assert end == 0 or (one[end:].strip() and other[end:].strip())
    assert end == common_words(other, one)
    assert end == 0 or not one[end - 1 : end + 1].isalpha() or not one[end - 1 : end + 1].isascii()


@given(st.text(alphabet="<>/pcodebrli &;#x10\n\"'! ab", max_size=60))
def test_any_markup_becomes_a_text(html: str) -> None:
    assert html_to_text(html) == html_to_text(html).strip()


@given(st.integers(), st.floats(0.01, 0.99), st.lists(st.text(), unique=True))
def test_each_prompt_is_on_one_side(seed: int, fraction: float, prompts: list[str]) -> None:
    test, train = (Side(fraction, seed, side) for side in (True, False))
    assert all(test.holds(prompt) != train.holds(prompt) for prompt in prompts)


@pytest.mark.parametrize("pairs_from", PAIRS_FROM)
@given(scores=st.lists(st.integers(0, 5), min_size=2, max_size=8))
def test_pairs_prefer_the_higher_score(pairs_from: Any, scores: list[int]) -> None:
    margin = 2.0 if pairs_from == "margin" else None
    rows = [{"prompt": "p", "completion": str(i), "reward": score} for i, score in enumerate(scores)]
    records, _ = to_records(from_memory(rows, "x"), RowSpec(pairs_from=pairs_from, min_margin=margin))
    apart = [scores[int(r.chosen)] - scores[int(r.rejected)] for r in records]
    ordered = [abs(a - b) for i, a in enumerate(scores) for b in scores[:i] if a != b]
    expected = {"all": len(ordered), "margin": sum(d >= 2 for d in ordered), "best_worst": int(len(set(scores)) > 1)}
    assert len(records) == expected[pairs_from]
    assert all(difference >= (margin or 1) for difference in apart)
    if pairs_from == "best_worst" and records:
        assert apart == [max(scores) - min(scores)]
