"""Rows become records, and every row that cannot is named with its number, field and what was found."""

from __future__ import annotations

import pytest
from conftest import preference_rows

from tdpo import PreferenceRecord, UserError
from tdpo.data.formats import to_records
from tdpo.data.sources import from_memory

GOOD = preference_rows(20)


def records_of(rows: list, **options: str) -> tuple[list[PreferenceRecord], object]:
    return to_records(from_memory(rows, "pairs.jsonl"), **options)


def test_the_explicit_format_keeps_text_and_row_number() -> None:
    records, report = records_of(GOOD[:2])
    assert records[1] == PreferenceRecord(**GOOD[1], source="pairs.jsonl", row=2)
    assert (report.format, report.read, report.kept) == ("preference", 2, 2)


def test_chat_messages_are_kept_as_they_are() -> None:
    row = {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}],
        "chosen": [{"role": "assistant", "content": "您好！"}],
        "rejected": [{"role": "assistant", "content": "Hi"}],
    }
    records, _ = records_of([row])
    assert records[0].prompt == row["prompt"] and records[0].chosen == row["chosen"]


def test_hh_dialogues_split_at_the_last_assistant_turn() -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: A joke?\n\nAssistant:"
    records, report = records_of([{"chosen": start + " Knock knock.", "rejected": start + " No."}])
    assert (records[0].prompt, records[0].chosen, records[0].rejected) == (start, " Knock knock.", " No.")
    assert report.format == "hh"


def test_hh_dialogues_without_a_shared_prompt_or_response_are_dropped_and_counted() -> None:
    one, other = "\n\nHuman: Hi\n\nAssistant:", "\n\nHuman: Ho\n\nAssistant:"
    rows = [
        {"chosen": one + " a", "rejected": one + " b"},
        {"chosen": one + " a", "rejected": other + " b"},
        {"chosen": one + " a", "rejected": one},
    ]
    records, report = records_of(rows)
    assert len(records) == report.kept == 1
    assert dict(report.dropped) == {
        "the two dialogues do not share their prompt": [2],
        "a dialogue ends without a response": [3],
    }


def test_identical_responses_are_dropped_and_counted() -> None:
    same = {**GOOD[0], "rejected": GOOD[0]["chosen"]}
    records, report = records_of([GOOD[0], same])
    assert len(records) == 1
    assert "dropped 1, chosen and rejected are identical: row 2" in report.lines()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("chosen", 17, "field 'chosen' must be a text or a list of chat messages, found the number 17"),
        ("prompt", None, "field 'prompt' must be a text or a list of chat messages, found null"),
        ("rejected", "  ", "field 'rejected' is an empty response"),
        ("chosen", "half \ud83d", "field 'chosen' holds half a character (a lone surrogate) at position 5"),
        ("chosen", [], "field 'chosen' is an empty list of messages"),
        (
            "chosen",
            [{"content": "x"}],
            "field 'chosen', message 1 must be a message with 'role' or a turn with 'from', found an object",
        ),
        ("chosen", [{"role": "assistant", "content": None}], "field 'chosen', message 1 has no text content: null"),
        ("chosen", [{"role": "assistant", "content": "x"}], "texts and chat messages are mixed"),
    ],
)
def test_a_bad_row_is_named_with_its_number_and_field(field: str, value: object, message: str) -> None:
    rows = [dict(row) for row in GOOD]
    rows[16][field] = value
    with pytest.raises(UserError) as raised:
        records_of(rows)
    assert str(raised.value).startswith(f"pairs.jsonl, row 17: {message}")


def test_a_missing_field_in_one_row_is_named() -> None:
    rows = [dict(row) for row in GOOD]
    del rows[2]["rejected"]
    with pytest.raises(UserError, match=r"pairs\.jsonl, row 3: field 'rejected' is missing"):
        records_of(rows)


def test_ten_bad_rows_are_named_and_the_rest_counted() -> None:
    rows = [{**row, "chosen": ""} if i % 3 else row for i, row in enumerate(preference_rows(24))]
    with pytest.raises(UserError) as raised:
        records_of(rows)
    lines = str(raised.value).splitlines()
    assert len([line for line in lines if line.startswith("pairs.jsonl, row")]) == 10
    assert lines[10] == "... and 6 more"


def test_bad_rows_can_be_dropped_and_are_listed() -> None:
    rows = [GOOD[0], {**GOOD[1], "chosen": None}, "not an object", GOOD[2]]
    records, report = records_of(rows, on_bad_row="drop")
    assert [record.row for record in records] == [1, 4]
    assert sorted(row for rows in report.dropped.values() for row in rows) == [2, 3]
    reason = "bad row (expected an object with fields, found the text 'not an object')"
    assert f"dropped 1, {reason}: row 3" in report.lines()


def test_unknown_columns_are_named_beside_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"no column 'prompt', 'chosen', 'rejected'; found the columns 'question', 'a'"):
        records_of([{"question": "x", "a": "y"}])
    with pytest.raises(
        UserError,
        match=r"unknown dataset format 'hhh'; there are: auto, .* hh, .*, and module:function\. Did you mean",
    ):
        records_of(GOOD[:1], spec="hhh")
