"""TRL's shapes, ShareGPT and Alpaca pairs, and rows under other names: their records and their errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tdpo import PreferenceRecord, UserError
from tdpo.config.row_spec import RowSpec, parse_columns
from tdpo.data.formats import FORMATS, to_records
from tdpo.data.formats.pairs import common_words
from tdpo.data.formats.report import DataReport
from tdpo.data.sources import from_memory

SYSTEM = {"role": "system", "content": "You are a librarian."}
ASKED = {"role": "user", "content": "Wer schrieb „Momo“?"}
GOOD = {"role": "assistant", "content": "Michael Ende, 1973. 📚"}
BAD = {"role": "assistant", "content": "Erich Kästner."}
TOOL = {"type": "function", "function": {"name": "search", "parameters": {"type": "object", "properties": {}}}}
TEXTS = {
    "emoji": "👩‍👩‍👧‍👦 waves 🇩🇰 👍🏽",
    "right to left": "שלום עולם، مرحبا بالعالم",
    "combining": "e\u0301te\u0301, นำ้, हिन्दी",
    "controls": "tab\there\r\nnul \x00 and \u2028 separators",
    "special tokens": "<|endoftext|> </s> [INST] <|im_end|>",
    "long": "a long word " * 8_334,
}


def one(row: Any, spec: str | RowSpec = "auto") -> PreferenceRecord:
    (record,), _ = to_records(from_memory([row], "pairs.jsonl"), spec)
    return record


def error_of(row: Any, spec: str | RowSpec = "auto") -> str:
    with pytest.raises(UserError) as raised:
        to_records(from_memory([row], "pairs.jsonl"), spec)
    message = str(raised.value).splitlines()[0]
    assert message.startswith("pairs.jsonl, row 1: ")
    return message.removeprefix("pairs.jsonl, row 1: ")


def dropped(row: Any, spec: str | RowSpec = "auto") -> str:
    records, report = to_records(from_memory([row], "pairs.jsonl"), spec)
    assert not records
    ((reason, rows),) = report.dropped.items()
    assert rows == [1]
    return reason


def chat_pair(**more: Any) -> dict[str, Any]:
    return {"prompt": [SYSTEM, ASKED], "chosen": [GOOD], "rejected": [BAD], **more}


ROWS = {
    "preference": lambda t: {"prompt": t, "chosen": t + " yes", "rejected": t + " no"},
    "hh": lambda t: {
        "chosen": f"\n\nHuman: {t}\n\nAssistant: {t} yes",
        "rejected": f"\n\nHuman: {t}\n\nAssistant: {t} no",
    },
    "implicit": lambda t: {
        "chosen": [{"role": "user", "content": t}, {"role": "assistant", "content": t + " yes"}],
        "rejected": [{"role": "user", "content": t}, {"role": "assistant", "content": t + " no"}],
    },
    "sharegpt": lambda t: {
        "conversations": [{"from": "human", "value": t}],
        "chosen": {"from": "gpt", "value": t + " yes"},
        "rejected": {"from": "gpt", "value": t + " no"},
    },
    "alpaca": lambda t: {"instruction": t, "input": t, "output": [t + " yes", t + " no"]},
    "shp": lambda t: {
        "history": t, "human_ref_A": t + " no", "human_ref_B": t + " yes", "score_A": 3, "score_B": 12, "labels": 0,
    },
    "stackexchange": lambda t: {
        "question": t.replace("<", "&lt;"),
        "answers": [
            {"text": t.replace("<", "&lt;") + " no", "pm_score": 0},
            {"text": t.replace("<", "&lt;") + " yes", "pm_score": 3},
        ],
    },
    "answers": lambda t: {
        "instruction": t,
        "completions": [
            {"model": "a", "response": t + " no", "overall_score": 2.5},
            {"model": "b", "response": t + " yes", "overall_score": 8},
        ],
    },
    "ranked": lambda t: {"prompt": t, "responses": [t + " no", t + " yes"], "ranks": [2, 1]},
    "swift": lambda t: {
        "messages": [{"role": "user", "content": t}, {"role": "assistant", "content": t + " yes"}],
        "rejected_response": t + " no",
    },
    "openai": lambda t: {
        "input": {"messages": [{"role": "user", "content": t}], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [{"role": "assistant", "content": t + " yes"}],
        "non_preferred_output": [{"role": "assistant", "content": t + " no"}],
    },
    "labelled": lambda t: {"prompt": t, "response_0": t + " no", "response_1": t + " yes", "better_response_id": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("name", ROWS)
def test_every_format_keeps_any_text(name: str, kind: str) -> None:
    text = TEXTS[kind]
    records, report = to_records(from_memory([ROWS[name](text)], "pairs.jsonl"))
    assert report.format == name and len(records) == 1
    shown = [x if isinstance(x, str) else x[-1]["content"] for x in (records[0].chosen, records[0].rejected)]
    prompt = records[0].prompt if isinstance(records[0].prompt, str) else records[0].prompt[-1]["content"]
    if name == "stackexchange":  # HTML shows any run of white space as one space
        text = " ".join(text.split())
        shown, prompt = [" ".join(x.split()) for x in shown], " ".join(prompt.split())
    assert text in prompt
    assert shown[0].endswith(" yes") and shown[1].endswith(" no")
    assert all(text in x for x in shown)


@pytest.mark.parametrize("name", [*ROWS])
def test_every_format_names_an_empty_answer(name: str) -> None:
    row = json.loads(json.dumps(ROWS[name]("What now?")).replace("What now? yes", " "))
    if name == "hh":
        assert dropped(row, name) == "a dialogue ends without a response"
    elif name == "shp":
        assert error_of(row, name) == "field 'human_ref_B' is empty"
    elif name in ("answers", "ranked", "stackexchange"):
        assert dropped(row, name) == "fewer than two answers: an empty answer left out"
    else:
        assert "empty" in error_of(row, name)


def test_every_format_has_a_row_here() -> None:
    assert set(FORMATS) == {*ROWS, "scored"}, "scored has tests of its own, in test_formats_answers.py"


def test_tools_and_template_arguments_are_kept_as_objects_or_json() -> None:
    for tools, arguments in ([TOOL], {"enable_thinking": False}), (json.dumps([TOOL]), '{"enable_thinking": false}'):
        record = one(chat_pair(tools=tools, chat_template_kwargs=arguments))
        assert record.tools == [TOOL] and record.chat_template_kwargs == {"enable_thinking": False}
    assert one(chat_pair(tools=None, chat_template_kwargs={})).tools is None
    assert error_of(chat_pair(tools=[TOOL], prompt="Hi", chosen="a", rejected="b")) == (
        "field 'tools' is for chats, and the prompt is a text"
    )
    assert error_of(chat_pair(tools="[")).startswith("field 'tools' is not valid JSON: ")
    assert error_of(chat_pair(chat_template_kwargs=[1])).endswith("must be an object, found a list of 1")
    assert error_of(chat_pair(tools=["search"])) == "field 'tools', tool 1 must be an object, found the text 'search'"
    assert one(chat_pair(chat_template_kwargs={"enable_thinking": None})).chat_template_kwargs is None
    assert error_of(chat_pair(chat_template_kwargs={"tokenize": True})) == (
        "field 'chat_template_kwargs' sets 'tokenize', which is not for the template"
    )
    assert error_of(chat_pair(tools=[{"name": "\ud83d"}])).startswith(
        "field 'tools' cannot be written as JSON: 'utf-8'"
    )


def test_a_response_may_be_a_tool_call_without_text() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "search", "arguments": {}}}]}
    record = one(chat_pair(chosen=[call]))
    assert record.chosen == [{**call, "content": ""}]
    result = {"role": "tool", "content": "1973"}
    assert one(chat_pair(chosen=[call, result, GOOD])).chosen[1:] == [result, GOOD]


def test_keys_that_are_null_are_left_out() -> None:
    with_nulls = [{**message, "tool_calls": None, "name": None} for message in (SYSTEM, ASKED)]
    assert one(chat_pair(prompt=with_nulls)).prompt == [SYSTEM, ASKED]


def test_content_in_parts_is_one_text_and_pictures_are_refused() -> None:
    parts = [{"type": "text", "text": "Wer schrieb "}, {"type": "text", "text": "„Momo“?"}]
    assert one(chat_pair(prompt=[{"role": "user", "content": parts}])).prompt == [ASKED]
    picture = [{"role": "user", "content": [{"type": "image", "url": "x.png"}]}]
    assert error_of(chat_pair(prompt=picture)) == (
        "field 'prompt', message 1 holds a part without text: the text 'image'"
    )


def test_a_chat_in_a_table_of_texts_is_that_chat() -> None:
    row = {name: json.dumps(value, indent=1) for name, value in chat_pair().items()}
    assert one(row) == one(chat_pair())
    assert one({**row, "chosen": str([GOOD])}) == one(chat_pair()), "as pandas writes a list to CSV"
    assert error_of({**row, "chosen": f"[{GOOD}\n {GOOD}]"}) == (
        "field 'chosen' looks like a chat as text and is not valid JSON: Expecting property name enclosed in double "
        "quotes: line 1 column 3 (char 2). Write it with json.dumps, or the table as Parquet or JSONL"
    ), "as NumPy prints one"
    assert one({"prompt": "[{", "chosen": '[{"rolex": 1}]', "rejected": "[]"}).chosen == '[{"rolex": 1}]'


def test_a_response_that_begins_with_a_question_is_refused() -> None:
    assert error_of(chat_pair(chosen=[ASKED, ASKED, GOOD])) == (
        "field 'chosen' begins with a message of role 'user', and a response with the assistant's"
    )


def test_a_prompt_that_both_chats_repeat_is_taken_once() -> None:
    plain = one(chat_pair())
    for prompt in ([SYSTEM, ASKED], ASKED["content"]):
        row = chat_pair(prompt=prompt, chosen=[SYSTEM, ASKED, GOOD], rejected=[SYSTEM, ASKED, BAD])
        assert one(row) == plain
    row = chat_pair(chosen=[SYSTEM, ASKED], rejected=[SYSTEM, ASKED, BAD])
    assert "holds the prompt alone" in error_of(row) or "begins with" in error_of(row)
    assert error_of(chat_pair(prompt="Another question")).startswith("texts and chat messages are mixed: prompt text")


def test_an_implicit_prompt_is_whole_turns() -> None:
    earlier = [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, ASKED]
    record = one({"chosen": [*earlier, GOOD], "rejected": [*earlier, BAD]})
    assert (record.prompt, record.chosen, record.rejected) == (earlier, [GOOD], [BAD])
    close = {"role": "assistant", "content": GOOD["content"] + "!"}
    assert one({"chosen": [ASKED, GOOD], "rejected": [ASKED, close]}).prompt == [ASKED], "never a part of a turn"
    longer = one({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD, ASKED, BAD]})
    assert (longer.prompt, longer.chosen) == ([ASKED], [GOOD]), "each keeps a response"


def test_implicit_chats_without_a_common_prompt_are_dropped_or_refused() -> None:
    other = {"role": "user", "content": "Und „Emil“?"}
    assert dropped({"chosen": [SYSTEM, ASKED, GOOD], "rejected": [SYSTEM, other, BAD]}) == (
        "the two chats do not share their prompt"
    )
    assert error_of({"chosen": [ASKED, GOOD], "rejected": [other, BAD]}).endswith("do not begin with the same messages")
    assert dropped({"chosen": [ASKED, GOOD], "rejected": [ASKED, GOOD]}) == "chosen and rejected are identical"


@pytest.mark.parametrize(
    ("one", "other", "prompt"),
    [
        ("The sky is bluish.", "The sky is blue.", "The sky is"),
        ("It costs 3.14 euros", "It costs 3.15 euros", "It costs"),
        ("I don't know", "I don't think so", "I don't"),
        ("Q: why?\nA: yes", "Q: why?\nA: no", "Q: why?\nA:"),
        ("天空是蓝色的", "天空是绿色的", "天空是"),
        ("family: 👨‍👩‍👧", "family: 👨‍👩‍👦", "family:"),
        ("flag 🇩🇪", "flag 🇩🇰", "flag"),
        ("café", "cafe\u0301", ""),
        ("he said e\u0301", "he said e", "he said"),
        ("שלום עולם", "שלום עולה", "שלום"),
        ("Hello there", "Hello", ""),
        ("same words here ", "same words here too", "same words"),
        ("x" * 100_000 + "a", "x" * 100_000 + "b", ""),
        ("say " + "x " * 50_000 + "yes", "say " + "x " * 50_000 + "no", "say " + "x " * 49_999 + "x"),
    ],
)
def test_an_implicit_prompt_of_text_ends_between_words(one: str, other: str, prompt: str) -> None:
    end = common_words(one, other)
    assert one[:end] == other[:end] == prompt
    assert one[end:].strip() and other[end:].strip()


def test_implicit_texts_are_cut_at_the_words_they_share() -> None:
    record = one({"chosen": "The sky is blue.", "rejected": "The sky is green."})
    assert (record.prompt, record.chosen, record.rejected) == ("The sky is", " blue.", " green.")
    mixed = {"chosen": "Yes.", "rejected": [GOOD]}
    assert error_of(mixed) == "texts and chat messages are mixed: chosen text, rejected messages"
    assert error_of({"chosen": "Yes.", "rejected": "No."}) == (
        "there is no field 'prompt', and chosen and rejected do not begin with the same words"
    )


def test_sharegpt_turns_become_messages_with_roles() -> None:
    call = {"name": "search", "arguments": {"q": "Momo"}}
    row = {
        "system": "You are a librarian.",
        "tools": json.dumps([TOOL]),
        "conversations": [
            {"from": "human", "value": "Wer schrieb „Momo“?"},
            {"from": "function_call", "value": json.dumps(call)},
            {"from": "observation", "value": "1973"},
        ],
        "chosen": {"from": "gpt", "value": GOOD["content"]},
        "rejected": "Erich Kästner.",
    }
    record = one(row)
    called = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    assert record.prompt == [SYSTEM, ASKED, called, {"role": "tool", "content": "1973"}]
    assert (record.chosen, record.rejected, record.tools) == ([GOOD], [BAD], [TOOL])
    messages = {"messages": [ASKED], "chosen": GOOD, "rejected": BAD}
    assert one(messages).prompt == [ASKED], "role and content are understood too"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": []}, "field 'conversations' must be a list of turns, found a list of 0"),
        ({"conversations": "x"}, "field 'conversations' must be a list of turns, found the text 'x'"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "message 1 must be 'from' one of human, "),
        ({"conversations": [{"from": "human", "value": None}]}, "message 1, 'value' must be a text, found null"),
        ({"conversations": [{"from": ["human"], "value": ""}]}, "found a list of 1"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "is from function_call and not valid JSON"),
        ({"conversations": [{"from": "function_call", "value": "[]"}]}, "names no function"),
        ({"conversations": [{"from": "gpt", "value": "x"}]}, "ends with the assistant's turn"),
        ({"chosen": {"from": "gpt", "value": ""}}, "field 'chosen' is an empty response"),
        ({"chosen": {"from": "human", "value": "x"}}, "field 'chosen' begins with a message of role 'user'"),
        ({"rejected": []}, "field 'rejected' is an empty list of messages"),
        ({"rejected": 7}, "field 'rejected' must be a text or a list of chat messages, found the number 7"),
    ],
)
def test_errors_in_sharegpt_turns_are_named(change: dict[str, Any], message: str) -> None:
    row = ROWS["sharegpt"]("What now?")
    assert message in error_of({**row, **change}, "sharegpt")


def test_an_empty_turn_of_a_person_is_kept() -> None:
    row = {**ROWS["sharegpt"]("x"), "conversations": [{"from": "human", "value": ""}]}
    assert one(row).prompt == [{"role": "user", "content": ""}]


def test_alpaca_rows_become_chats() -> None:
    row = {"instruction": "Translate", "input": "guten Tag", "chosen": "good day", "rejected": "good bye",
           "history": [["Hi", "Hello"]], "system": "Be brief."}  # fmt: skip
    record = one(row)
    assert [m["content"] for m in record.prompt] == ["Be brief.", "Hi", "Hello", "Translate\nguten Tag"]
    assert [m["role"] for m in record.prompt] == ["system", "user", "assistant", "user"]
    assert record.chosen == [{"role": "assistant", "content": "good day"}]
    assert error_of({"instruction": "x", "output": ["a", "b", "c"]}) == (
        "field 'output' must list two texts, the better one first, found a list of 3"
    )
    assert error_of({**row, "history": ["x"]}).startswith("field 'history' must list pairs of question and answer")
    assert error_of({**row, "input": 5}) == "field 'input' must be a text, found the number 5"


def test_columns_stand_under_other_names() -> None:
    spec = RowSpec(columns=parse_columns("prompt=question,chosen=good,rejected=bad"))
    record = one({"question": "Why?", "good": " Because.", "bad": " No.", "chosen": "another column"}, spec)
    assert (record.prompt, record.chosen, record.rejected) == ("Why?", " Because.", " No.")
    assert error_of({"question": "Why?", "good": "x"}, spec) == (
        "field 'bad', which --columns takes for 'rejected', is missing"
    )
    inside = RowSpec(columns=(("score", "fine-grained_score"),))
    row = {"prompt": "q", "completions": [{"text": t, "fine-grained_score": s} for t, s in (("a", 1), ("b", 2))]}
    assert one(row, inside).chosen == "b", "also in the objects of a list"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("prompt", "expected field names with column names"),
        ("prompt=", "expected field names with column names"),
        ("prompt=a,prompt=b", "a field is named twice"),
        ('{"prompt": 3}', "expected field names with column names"),
        ('{"prompt"', "not valid JSON"),
        (["prompt"], "expected field names with column names"),
    ],
)
def test_malformed_column_options_are_refused(columns: Any, message: str) -> None:
    with pytest.raises(UserError, match="--columns") as raised:
        parse_columns(columns)
    assert message in str(raised.value)


FUNCTIONS = """
from tdpo import PreferenceRecord

def good(row):
    if row["n"] == 0:
        return None
    made = [{"prompt": "p", "chosen": f"c{i}", "rejected": "r"} for i in range(row["n"])]
    return made[0] if row["n"] == 1 else made

def several(row):
    yield good({"n": 1})
    yield good({"n": 1})

def record(row):
    return PreferenceRecord("p", "c", "r", "elsewhere", 99)

def weighed(row):
    return good({"n": 1}) | {"chosen_weights": row["w"]}

def weighed_record(row):
    weights = {"chosen_weights": [2.0]}
    return PreferenceRecord("p", "c", "r", truncation_mode="keep_start", weights=weights)

def strange(row):
    return {"answer": 42}

def number(row):
    return 42

def broken(row):
    return row["missing"]

value = 3
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_functions.py").write_text(FUNCTIONS)
    (tmp_path / "my_broken.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "my_functions", raising=False)


@pytest.mark.usefixtures("functions")
def test_a_function_of_the_users_converts_rows() -> None:
    records, report = to_records(from_memory([{"n": 2}, {"n": 0}, {"n": 1}], "pairs.jsonl"), "my_functions:good")
    assert [(r.chosen, r.row) for r in records] == [("c0", 1), ("c1", 1), ("c0", 3)]
    assert (report.read, report.kept, report.format) == (3, 3, "my_functions:good")
    assert one({"n": 1}, "my_functions:record") == PreferenceRecord("p", "c", "r", "pairs.jsonl", 1)
    assert len(to_records(from_memory([{}], "pairs.jsonl"), "my_functions:several")[0]) == 2
    assert one({"w": [3.0]}, "my_functions:weighed").weights == {"chosen_weights": [3.0]}
    kept = one({"chosen_weights": [7.0]}, "my_functions:weighed_record")  # not those of the row it was made from
    assert (kept.weights, kept.truncation_mode) == ({"chosen_weights": [2.0]}, "keep_start")
    assert one({"n": 1, "chosen_weights": [7.0]}, "my_functions:good").weights is None
    assert error_of({}, "my_functions:strange").endswith("with prompt, chosen and rejected, found the fields 'answer'")
    assert error_of({}, "my_functions:number").endswith("with prompt, chosen and rejected, found the number 42")
    assert error_of({}, "my_functions:broken") == "my_functions:broken raised KeyError: 'missing'"


@pytest.mark.usefixtures("functions")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_functions:none", "AttributeError: module 'my_functions' has no attribute 'none'"),
        ("my_functions:value", "the number 3 is not a function"),
        ("my_nowhere:good", "ModuleNotFoundError: No module named 'my_nowhere'"),
        ("my_broken:good", "ZeroDivisionError: division by zero"),
        (":", "ValueError: invalid format: ':'"),
    ],
)
def test_a_function_that_cannot_be_imported_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--dataset_format {name}: {message}"):
        to_records(from_memory([{"n": 1}], "pairs.jsonl"), name)


def test_huge_and_deeply_nested_values_are_named() -> None:
    def deep() -> list[Any]:
        inside: list[Any] = []
        for _ in range(100_000):
            inside = [inside]
        return inside

    row = ROWS["preference"]("Why?")
    assert error_of({**row, "chosen": 10**5000}).endswith("found a number of 16610 bits")
    assert "message 1 must be a message with 'role' or a turn with 'from', found a list of 1" in error_of(
        {**row, "chosen": deep()}
    )
    nested = [[{"role": "assistant", "content": "x", "name": deep()}] for _ in range(2)]
    assert error_of(chat_pair(chosen=nested[0], rejected=nested[1])) == "it is nested too deeply"


def test_the_first_row_of_a_known_format_decides() -> None:
    good = ROWS["preference"]("Why?")
    rows = from_memory([{"prompt": "Why?"}, good, {**good, "chosen": None}], "pairs.jsonl")
    with pytest.raises(UserError) as raised:
        to_records(rows)
    assert str(raised.value).splitlines()[:2] == [
        "pairs.jsonl, row 1: field 'chosen' is missing",
        "pairs.jsonl, row 3: field 'chosen' must be a text or a list of chat messages, found null",
    ]
    records, report = to_records(rows, on_bad_row="drop")
    assert [record.row for record in records] == [2] and report.read == 3


def test_a_report_stays_short_whatever_the_rows() -> None:
    report = DataReport("pairs.jsonl", "preference", read=1000)
    for number in range(1000):
        report.dropped[f"reason {number % 50}"].append(number)
    assert len(report.lines()) == 12
    assert report.lines()[-1] == "dropped 800 more for 40 other reasons"
    rows = [{**ROWS["preference"]("Why?"), "chosen": number} for number in range(3000)]
    _, report = to_records(from_memory([ROWS["preference"]("Why?"), *rows], "pairs.jsonl"), on_bad_row="drop")
    assert len(report.dropped) == 1001 and len(report.dropped["other reasons"]) == 2000
