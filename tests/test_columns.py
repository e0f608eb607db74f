"""Columns beside a pair: used, known as metadata, repeated elsewhere, named in the report, or a reason to stop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import preference_rows, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_formats_pairs import BAD, ROWS, TOOL, error_of, one

from tdpo import PreferenceRecord, UserError
from tdpo.cli import main
from tdpo.config.data import EvalDataConfig, FormatOptions
from tdpo.config.row_spec import RowSpec, parse_columns, parse_names
from tdpo.data.dataset import prepare_pairs
from tdpo.data.formats import to_records
from tdpo.data.formats.columns import is_metadata, texts_in
from tdpo.data.formats.report import DataReport
from tdpo.data.mixture import open_mixture
from tdpo.data.sources import from_memory, open_source
from tdpo.data.tokenise import Lengths, Tokeniser

ASKED = {"role": "user", "content": "Name a river in Kenya."}
SAID = {"role": "assistant", "content": "The Tana is one."}
OTHER = {"role": "assistant", "content": "Kenya."}
PLAIN = {"prompt": "Where is the moon?", "chosen": "In the sky.", "rejected": "Near."}
BINARIZED = {
    "prompt": "Name a river in Kenya.", "prompt_id": "id0", "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER],
    "messages": [ASKED, SAID], "score_chosen": 8.5, "score_rejected": 4.0,
}  # fmt: skip


def records_of(rows: list[Any], spec: str | RowSpec = "auto") -> tuple[list[PreferenceRecord], DataReport]:
    return to_records(from_memory(rows, "pairs.jsonl"), spec)


def stopped(rows: list[Any], spec: str | RowSpec = "auto") -> str:
    with pytest.raises(UserError) as raised:
        records_of(rows, spec)
    message = str(raised.value)
    assert "\n" not in message
    return message


def test_the_most_used_set_is_a_pair_of_chats() -> None:
    records, report = records_of([BINARIZED])
    assert (records[0].prompt, records[0].chosen, records[0].rejected) == ([ASKED], [SAID], [OTHER])
    assert (report.format, report.unused) == ("preference", {})


def test_messages_beside_a_pair_are_silent_only_if_the_pair_holds_them() -> None:
    preamble = {"role": "system", "content": "You are a geographer."}
    message = stopped([BINARIZED, {**BINARIZED, "messages": [preamble, ASKED, SAID]}])
    assert message == (
        "pairs.jsonl, row 2: the column 'messages' holds what the format preference does not use, and it may be the "
        "prompt or a part of it; --columns prompt=messages takes 'messages' as the prompt instead, --ignore_columns "
        "messages leaves it out, --dataset_format module:function converts rows in any other way"
    )
    records, report = records_of([{**BINARIZED, "messages": [preamble]}], RowSpec(ignore_columns=("messages",)))
    assert records[0].prompt == [ASKED] and report.unused == {}
    as_json = {**BINARIZED, "messages": json.dumps([ASKED, SAID])}
    assert records_of([as_json])[1].unused == {}, "also where a table of texts holds them"


@pytest.mark.parametrize(
    "name",
    ["question", "instruction", "Query", "context", "history", "documents", "passage", "conversation", "user_input"],
)
def test_a_column_that_may_be_the_prompt_stops_the_run(name: str) -> None:
    rows = [PLAIN, {**PLAIN, name: "Which planet?"}]
    message = stopped(rows)
    assert message.startswith(f"pairs.jsonl, row 2: the column '{name}' holds what") and f"prompt={name} " in message
    assert len(records_of(rows, RowSpec(ignore_columns=(name,)))[0]) == 2
    assert len(records_of([{**PLAIN, name: "Where is the moon?"}])[0]) == 1, "what the prompt is already"
    assert len(records_of([{**PLAIN, name: "the moon"}])[0]) == 1, "what the prompt holds already"
    assert stopped([{**PLAIN, name: "sky"}]), "a word of an answer is not a prompt"
    for empty in (None, "", " ", [], {}, [None], 7, False):
        assert len(records_of([{**PLAIN, name: empty}])[0]) == 1


def test_all_columns_of_the_first_rows_that_stop_are_named_at_once() -> None:
    rows = [PLAIN, {**PLAIN, "passage": "Once."}, {**PLAIN, "question": "Why?", "passage": "Twice."}]
    message = stopped(rows)
    assert message.startswith("pairs.jsonl, row 2: the columns 'passage' (row 2), 'question' (row 3) hold what")
    assert "--ignore_columns passage,question leaves them out" in message


def test_a_context_may_be_the_input_of_an_instruction() -> None:
    row = {"instruction": "Name the river.", "context": "The Tana flows.", "chosen": "Tana", "rejected": "Nile"}
    assert "--columns input=context takes 'context' as the input, --ignore_columns context" in stopped([row])
    assert one(row, RowSpec(columns=(("input", "context"),))).prompt == [
        {"role": "user", "content": "Name the river.\nThe Tana flows."}
    ]


def test_a_column_of_messages_stops_the_run_under_any_name() -> None:
    for value in ([ASKED], {"turns": [ASKED]}, [{"from": "human", "value": "Hi"}], str([ASKED])):
        assert "the column 'extra' holds" in stopped([{**PLAIN, "extra": value}])


def test_other_texts_are_named_once_with_their_first_row() -> None:
    rows = [
        PLAIN,
        {**PLAIN, "notes": "mine", "more": ["a list", "of texts"]},
        {**PLAIN, "notes": "again", "late": "x!"},
    ]
    records, report = records_of(rows)
    assert len(records) == 3 and report.unused == {"notes": 2, "more": 2, "late": 3}
    assert report.lines()[1] == (
        "columns that hold text and are not used: 'notes' (row 2), 'more' (row 2), 'late' (row 3); --columns takes one "
        "for a field, --ignore_columns says that it is not needed"
    )
    assert records_of(rows, RowSpec(ignore_columns=("notes", "more", "late")))[1].unused == {}
    assert records_of([{**PLAIN, "notes": "In the sky"}])[1].unused == {}, "a part of an answer"


def test_metadata_is_silent_as_long_as_it_is_short() -> None:
    metadata = {
        "id": "a7",
        "source": "web",
        "chosen_model": "gpt",
        "rating-rejected": "3",
        "lang": "en",
        "created_at": 3,
    }
    assert records_of([{**PLAIN, **metadata}])[1].unused == {}
    assert records_of([{**PLAIN, "source": "A long article. " * 20}])[1].unused == {"source": 1}
    assert "the column 'source' holds" in stopped([{**PLAIN, "source": [ASKED]}])


def test_instructions_to_annotators_are_not_a_prompt() -> None:
    row = {"input": "Why?", "chosen": "A.", "rejected": "B.", "labelling_prompt": [ASKED], "judge_messages": [ASKED]}
    records, report = records_of([row])
    assert records[0].prompt == [{"role": "user", "content": "Why?"}]
    assert report.unused == {"labelling_prompt": 1, "judge_messages": 1}
    assert "'labelling_prompt' holds images" in stopped([{**row, "labelling_prompt": [{"image": b"x"}]}])


def test_the_index_that_pandas_writes_is_metadata() -> None:
    row = {**PLAIN, "Unnamed: 0": "17", "": "0", "注": "备注"}
    assert records_of([row])[1].unused == {"注": 1}


def test_pairs_under_other_names_are_recognised_in_the_message() -> None:
    row = {"prompt": "如何?", "pos_resp": "好。", "neg_resp": "不。", "pos_type": "x"}
    with pytest.raises(UserError, match=r"\(--columns chosen=pos_resp,rejected=neg_resp renames columns, --dataset_f"):
        records_of([row])
    with pytest.raises(UserError, match=r"\(--columns prompt=Prompt,chosen=Chosen renames columns"):
        records_of([{"Prompt": "Why?", "Chosen": "A.", "rejected": "B."}])
    spaced = {"prompt": "Why?", " chosen": "A.", " rejected": "B."}
    with pytest.raises(UserError, match=r"""--columns '\{"chosen": " chosen", "rejected": " rejected"\}' renames"""):
        records_of([spaced])
    given = parse_columns('{"chosen": " chosen", "rejected": " rejected"}')
    assert records_of([spaced], RowSpec(columns=given))[0][0].chosen == "A."
    (record,), _ = records_of([row], RowSpec(columns=parse_columns("chosen=pos_resp,rejected=neg_resp")))
    assert (record.prompt, record.chosen, record.rejected) == ("如何?", "好。", "不。")


def test_rows_after_the_first_hundred_are_checked() -> None:
    first = [{**PLAIN, "question": None, "notes": ""} for _ in range(150)]
    assert "row 151: the column 'question' holds" in stopped([*first, {**PLAIN, "question": "Why?"}])
    assert "row 152: the column 'images' holds images" in stopped([*first, PLAIN, {**PLAIN, "images": ["a.png"]}])
    records, report = records_of([*first, {**PLAIN, "notes": "late"}])
    assert len(records) == 151 and report.unused == {"notes": 151}
    longer = [{**BINARIZED, "prompt_id": str(n)} for n in range(150)]
    assert "row 151: the column 'messages'" in stopped([*longer, {**BINARIZED, "messages": [ASKED, BAD]}])


def test_a_prompt_is_not_guessed_beside_a_column_that_may_be_it() -> None:
    pair = {"chosen": "Yes, the sun is a star.", "rejected": "Yes, it is hot."}
    assert one(pair).prompt == "Yes,"
    assert one({**pair, "question": "Is the sun a star?"}).prompt == [{"role": "user", "content": "Is the sun a star?"}]
    for name in ("asked", "topic_text", "context", "document"):
        message = stopped([{**pair, name: "Is the sun a star?"}])
        assert f"the column '{name}' holds" in message and f"--columns prompt={name} takes" in message
        assert one({**pair, name: "Is the sun a star?"}, RowSpec(columns=(("prompt", name),))).prompt == (
            "Is the sun a star?"
        )
    assert error_of({**pair, "system": "Be brief."}) == (
        "field 'system' is for a chat, and chosen and rejected are texts without a prompt beside"
    )


def test_a_column_that_dialogues_do_not_hold_stops_the_run() -> None:
    row = ROWS["hh"]("Is the sun a star?")
    assert one({**row, "question": "Is the sun a star?"}).prompt == one(row).prompt
    assert "the column 'question' holds what the format hh does not use" in stopped([{**row, "question": "Why so?"}])
    assert "the column 'system' holds" in stopped([{**row, "system": "Be brief."}])


def test_images_are_refused_by_name() -> None:
    chat = {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]}

    class Picture:
        mode, size = "RGB", (3, 4)

    for row in (
        {**chat, "images": ["a.png"]},
        {**PLAIN, "image": b"\x89PNG"},
        {**PLAIN, "photo": Picture()},
        {**PLAIN, "videos": [{"path": "a.mp4"}]},
        {**PLAIN, "clip": {"bytes": b"x", "path": None}},
    ):
        message = stopped([row])
        assert "holds images, video or audio, and training is on text alone; --ignore_columns" in message
    for empty in (None, [], "", [None]):
        assert one({**chat, "images": empty}).prompt == [ASKED]
    pictured = {"role": "user", "content": "<image>What is this?"}
    assert error_of({**chat, "prompt": [pictured]}).startswith("the prompt has the placeholder <image> of image data")
    assert error_of({**PLAIN, "prompt": "What is this? <video>\n"}).startswith("the prompt has the placeholder <video>")
    inside = "Explain the <video> element of HTML."
    assert one({**PLAIN, "prompt": inside}).prompt == inside


def test_a_system_prompt_makes_texts_chats() -> None:
    rows = [{**PLAIN, "system": "You are a pirate."}, {**PLAIN, "system": ""}, {**PLAIN, "system": None}, PLAIN]
    records, _ = records_of(rows)
    turn, asked = {"role": "system", "content": "You are a pirate."}, {"role": "user", "content": "Where is the moon?"}
    assert [record.prompt for record in records] == [[turn, asked], [asked], [asked], [asked]]
    assert {record.chosen[0]["content"] for record in records} == {"In the sky."}
    assert records_of([{**PLAIN, "system": None}])[0][0].prompt == "Where is the moon?", "null is as if missing"
    assert one({**PLAIN, "system_prompt": "You are a pirate."}).prompt == [turn, asked]
    late = stopped([*[PLAIN] * 120, {**PLAIN, "system": "You are a pirate."}])
    assert late.startswith("pairs.jsonl, row 121: field 'system' holds a system prompt, and none of the first 100 rows")
    assert one({**PLAIN, "system": "x"}, RowSpec(ignore_columns=("system",))).prompt == "Where is the moon?"


def test_a_system_prompt_comes_before_chats_that_have_none() -> None:
    turn = {"role": "system", "content": "You are a geographer."}
    for row in (
        BINARIZED, {"chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]},
        {"prompt": [ASKED], "chosen": [SAID], "rejected": [OTHER]},
        {"conversations": [{"from": "human", "value": ASKED["content"]}], "chosen": SAID, "rejected": OTHER},
        {"prompt": "Name a river in Kenya.", "responses": ["The Tana is one.", "Kenya."], "scores": [2, 1]},
    ):  # fmt: skip
        record = one({**row, "system": "You are a geographer."})
        assert (record.prompt, record.chosen, record.rejected) == ([turn, ASKED], [SAID], [OTHER])
    begun = {"prompt": [turn, ASKED], "chosen": [SAID], "rejected": [OTHER]}
    assert one({**begun, "system": "You are a geographer. "}).prompt == [turn, ASKED]
    assert error_of({**begun, "system": "You are a pirate."}) == (
        "field 'system' and the system turn that the prompt begins with differ"
    )


def test_columns_to_ignore_must_be_there() -> None:
    assert parse_names("a, b") == parse_names(["a,b"]) == parse_names('["a", "b"]') == ("a", "b")
    assert FormatOptions(ignore_columns=["a,b", "c"]).row_spec().ignore_columns == ("a", "b", "c")
    with pytest.raises(UserError, match=r"--ignore_columns: expected column names|expected column names, name,name"):
        parse_names([3])  # type: ignore[list-item]
    message = stopped([{**PLAIN, "notes": "x"}], RowSpec(ignore_columns=("note",)))
    assert message == (
        "--ignore_columns: there is no column 'note'; found the columns 'prompt', 'chosen', 'rejected', 'notes'. Did "
        "you mean 'notes'?"
    )
    assert records_of([PLAIN] * 200 + [{**PLAIN, "note": "x"}], RowSpec(ignore_columns=("note",)))[1].unused == {}
    renamed = RowSpec(columns=parse_columns("prompt=question"), ignore_columns=("prompt",))
    assert one({**PLAIN, "question": "Why?"}, renamed).prompt == "Why?"


def test_columns_the_wrong_way_round_are_noticed() -> None:
    row = {"question": "Why?", "good": "Because.", "bad": "No."}
    message = stopped([row], RowSpec(columns=parse_columns("question=prompt,good=chosen,bad=rejected")))
    assert message == (
        "--columns question=prompt is the wrong way round: the row has a column 'question', and 'prompt' is what "
        "formats call a field; --columns prompt=question takes the column 'question' for it (pairs.jsonl)"
    )
    both = {**PLAIN, "question": "Why?"}
    assert "--columns prompt=question takes" in stopped([both], RowSpec(columns=(("question", "prompt"),)))
    assert "--columns reward=points takes" in stopped([{"points": 3}], RowSpec(columns=(("points", "reward"),)))
    swapped = one(PLAIN, RowSpec(columns=parse_columns("chosen=rejected,rejected=chosen")))
    assert (swapped.chosen, swapped.rejected) == ("Near.", "In the sky."), "labels turned around on purpose"


def test_a_column_that_another_replaces_is_named() -> None:
    spec = RowSpec(columns=parse_columns("prompt=question,chosen=good,rejected=bad"))
    records, report = records_of([{"question": "Why?", "good": " A.", "bad": " B.", "chosen": "another"}], spec)
    assert records[0].chosen == " A." and report.unused == {"chosen": 1}


def test_each_part_of_a_mixture_is_checked_by_its_own_spec(tmp_path: Path) -> None:
    one_file = write_jsonl(tmp_path / "one.jsonl", [{**PLAIN, "question": "Why?"}])
    other = write_jsonl(tmp_path / "other.jsonl", [{**PLAIN, "remark": "fine"}, {**PLAIN, "system": None}])
    entries = [{"name": str(one_file), "ignore_columns": ["question"]}, str(other)]
    mixture = open_mixture(entries, "train", 0)
    records, report = to_records(mixture)
    assert len(records) == 3 and report.unused == {f"remark ({other})": 1}
    with pytest.raises(UserError, match=r"one\.jsonl, row 1: the column 'question'"):
        to_records(open_mixture([str(one_file), f"{other},ignore_columns=remark"], "train", 0))
    config = EvalDataConfig(datasets=[str(other)])
    with pytest.raises(UserError, match="--ignore_columns and --datasets contradict each other"):
        config.check_row_spec(RowSpec(ignore_columns=("a",)))


def test_tables_fill_what_is_missing_with_null(tmp_path: Path) -> None:
    rows = [
        {**PLAIN, "question": None, "messages": None, "conversations": None, "system": None, "tools": None},
        {**PLAIN, "question": None, "messages": None, "conversations": None, "system": None, "tools": None},
    ]
    schema = pa.schema(
        [*((name, pa.string()) for name in ("prompt", "chosen", "rejected", "question", "system")),
         *((name, pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])))
           for name in ("messages", "conversations", "tools"))]
    )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "pairs.parquet")
    records, report = to_records(open_source(str(tmp_path / "pairs.parquet"), "train"))
    assert [record.prompt for record in records] == ["Where is the moon?"] * 2 and report.format == "preference"
    question = {"prompt": None, "question": "Why?", "chosen": "A.", "rejected": "B."}
    assert one(question).prompt == [{"role": "user", "content": "Why?"}]
    assert one({"prompt": None, "chosen": [ASKED, SAID], "rejected": [ASKED, OTHER]}).prompt == [ASKED]
    assert one({"prompt": None, **ROWS["hh"]("Why?")}).prompt == "\n\nHuman: Why?\n\nAssistant:"
    assert "found null" in error_of({"prompt": None, "chosen": "Yes, A.", "rejected": "Yes, B."}), "never guessed"
    nothing = {"chosen": None, "rejected": None, "messages": None}
    for name in ("alpaca", "answers", "ranked", "labelled", "openai"):
        assert one({**nothing, **ROWS[name]("Why?")}) == one(ROWS[name]("Why?"))


def test_the_report_reaches_the_cache_and_the_command_line(
    tmp_path: Path, model_folder: Path, tokenizer: Any, capsys: pytest.CaptureFixture
) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", [{**row, "remark": "good"} for row in preference_rows(6)])
    tokeniser = Tokeniser(tokenizer, Lengths(40, 20))
    for _ in range(2):
        report = prepare_pairs(open_source(str(data), "train"), tokeniser, cache=tmp_path / "cache").report
        assert report.unused == {"remark": 1}
    words = ["check-data", "--model_name_or_path", str(model_folder), "--dataset_name", str(data), "--json",
             str(tmp_path / "found.json")]  # fmt: skip
    assert main(words) == 0
    assert json.loads((tmp_path / "found.json").read_text())["unused"] == {"remark": 1}
    assert "column 'remark' holds text and is not used" in capsys.readouterr().out.replace("\n", " ")
    assert main([*words, "--ignore_columns", "remark"]) == 0
    assert json.loads((tmp_path / "found.json").read_text())["unused"] == {}
    questions = write_jsonl(tmp_path / "questions.jsonl", [{**row, "question": "?!"} for row in preference_rows(6)])
    assert main([*words[:4], str(questions)]) == 2
    assert f"{questions}, row 1: the column 'question' holds" in capsys.readouterr().err


NAMES = [
    "system", "system_prompt", "question", "instruction", "input", "query", "context", "history", "document",
    "messages",
    "conversations", "trajectory", "tools", "images", "chat_template_kwargs", "notes", "answer", "rationale", "id",
    "source", "chosen_model", "score_chosen", "prompt_id", "text", "completion", "response", "output", "responses",
    "completions", "scores", "ranks", "reward", "label", "winner", "preference", "rejected_response", "messages_json",
    "response_0", "response_1", "better_response_id", "conversation_a", "conversation_b", "score_A", "initial_steps",
]  # fmt: skip
words = st.text("abc xyz\n", min_size=1, max_size=10)
turns = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]), "content": words}), max_size=3
)
contents = st.one_of(
    words, turns, turns.filter(bool).map(json.dumps), st.none(), st.integers(), st.floats(allow_nan=False),
    st.booleans(),
    st.lists(words, max_size=2), st.fixed_dictionaries({"inner": words}), st.just(""), st.just([TOOL]),
)  # fmt: skip
extras = st.dictionaries(st.sampled_from(NAMES), contents, max_size=4)


def record_texts(record: PreferenceRecord) -> str:
    sides = [record.prompt, record.chosen, record.rejected, record.tools, record.chat_template_kwargs]
    return "\x00".join(text for side in sides for text in texts_in(side))


@settings(max_examples=400, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.too_slow])  # fmt: skip
@given(st.sampled_from(sorted(ROWS)), st.lists(extras, min_size=1, max_size=3))
def test_no_text_of_a_row_is_lost_in_silence(name: str, added: list[dict[str, Any]]) -> None:
    """Each text is in a record, in a column that the report names, or in one known as metadata; or the run stops."""
    rows = [{**more, **ROWS[name](f"what {number}?")} for number, more in enumerate(added)]
    try:
        records, report = to_records(from_memory(rows, "pairs.jsonl"))
    except UserError:
        return
    dropped = {number for numbers in [*report.dropped.values(), *report.noticed.values()] for number in numbers}
    for number, row in enumerate(rows, 1):
        if number in dropped:
            continue
        kept = "\x00".join(record_texts(record) for record in records if record.row == number)
        base = ROWS[name]("what?")
        for column in row.keys() - base.keys():
            for text in texts_in(row[column]):
                silent = column in report.unused or is_metadata(column) or column in ("labels", "winner", "preference")
                assert silent or all(part.strip() in kept for part in text.split("\n")), (report.format, column, row)
