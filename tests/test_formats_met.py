"""Formats of other frameworks and datasets: the pairs they make, and the names of what makes none."""

from __future__ import annotations

import json
from typing import Any

import pytest
from test_formats_answers import texts
from test_formats_pairs import TOOL, dropped, error_of, one

from tdpo import UserError
from tdpo.config.row_spec import RowSpec, parse_columns
from tdpo.data.formats import DataReport, iter_records, to_records
from tdpo.data.sources import from_memory
from tdpo.data.supervised import SFT_FORMATS


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


DESK = said("system", "You are a weather desk.")
ASKED = said("user", "Describe tomorrow's weather.")
GOOD, BAD = said("assistant", "It will rain."), said("assistant", "No idea.")
GREETED = [said("user", "Hi"), said("assistant", "Hello!")]


def stops(row: Any, spec: RowSpec | str = "auto") -> str:
    with pytest.raises(UserError) as raised:
        to_records(from_memory([row], "pairs.jsonl"), spec)
    return str(raised.value)


def sides(row: Any, spec: RowSpec | str = "auto") -> tuple[Any, Any, Any]:
    record = one(row, spec)
    return record.prompt, record.chosen, record.rejected


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [DESK, *GREETED, ASKED, GOOD], "rejected_response": "No idea."},
        {"messages": [DESK, *GREETED, ASKED, GOOD], "rejected_response": [BAD]},
        {"messages": [DESK, *GREETED, ASKED, GOOD], "rejected_response": None, "rejected_messages": [BAD]},
        {"messages": [DESK, *GREETED, ASKED, GOOD], "rejected_messages": [DESK, *GREETED, ASKED, BAD]},
        {"system": DESK["content"], "messages": [*GREETED, ASKED, GOOD], "rejected_response": "No idea."},
        {"system": DESK["content"], "query": ASKED["content"], "response": "It will rain.",
         "rejected_response": "No idea.", "history": [["Hi", "Hello!"]]},
        {"system": DESK["content"], "instruction": "Describe", "input": "tomorrow's weather.", "messages": None,
         "response": "It will rain.", "rejected_response": "No idea.", "history": [["Hi", "Hello!"]]},
    ],
)  # fmt: skip
def test_rows_of_ms_swift(row: dict[str, Any]) -> None:
    question = {**ASKED, "content": "Describe\ntomorrow's weather."} if "instruction" in row else ASKED
    assert sides(row) == ([DESK, *GREETED, question], [GOOD], [BAD])


def test_errors_in_rows_of_ms_swift_are_named() -> None:
    assert error_of({"messages": [ASKED], "rejected_response": "x"}) == (
        "field 'messages' must end with the assistant's turn, to which 'rejected_response' is the worse one"
    )
    other = {"messages": [ASKED, GOOD], "rejected_messages": [said("user", "Else"), BAD]}
    assert "begins with a message of role 'user'" in error_of(other)
    assert one({"messages": [ASKED, GOOD], "rejected_response": "No idea.", "tools": [TOOL]}).tools == [TOOL]


def test_rows_of_openai() -> None:
    asked = {"messages": [DESK, ASKED], "tools": [TOOL], "parallel_tool_calls": True}
    row = {"input": asked, "preferred_output": [GOOD], "non_preferred_output": [BAD]}
    assert sides(row) == ([DESK, ASKED], [GOOD], [BAD]) and one(row).tools == [TOOL]
    assert one({**row, "input": {**asked, "tools": [], "model": None}}).tools is None
    assert error_of({**row, "input": {**asked, "instructions": "Be brief."}}).startswith(
        "field 'input' holds 'instructions', which is not used"
    )
    assert error_of({**row, "input": "Hi"}) == "field 'input' must be an object with messages, found the text 'Hi'"


@pytest.mark.parametrize(
    ("row", "better"),
    [
        ({"response_0": "A", "response_1": "B", "better_response_id": 0, "safer_response_id": 1}, "A"),
        ({"response_0": "A", "response_1": "B", "better_response_id": 1, "is_response_0_safe": True}, "B"),
        ({"output_1": "A", "output_2": "B", "preference": 1}, "A"),
        ({"output_1": "A", "output_2": "B", "preference": 2.0}, "B"),
        ({"output_1": "A", "output_2": "B", "preference": "1"}, "A"),
        ({"response_a": "A", "response_b": "B", "winner": "model_a", "model_a": "x", "model_b": "y"}, "A"),
        ({"response_a": "A", "response_b": "B", "winner": "b"}, "B"),
        ({"answer_A": "A", "answer_B": "B", "choice": "answer_B"}, "B"),
        ({"response_1": "A", "response_2": "B", "preference_strength": -2, "split": "train"}, "A"),
        ({"response1": "A", "response2": "B", "overall_preference": 3}, "B"),
        ({"response_a": "A", "response_b": "B", "rating_a": 2, "rating_b": "4.5"}, "B"),
        ({"completion_1": "A", "completion_2": "B", "reward_1": -0.5, "reward_2": -1}, "A"),
    ],
)
def test_labels_in_columns_name_the_better_response(row: dict[str, Any], better: str) -> None:
    assert sides({"prompt": "Q:", **row}) == ("Q:", better, "B" if better == "A" else "A")
    _, report = to_records(from_memory([{"prompt": "Q:", **row}], "pairs.jsonl"))
    assert report.format == "labelled" and report.unused == {}


@pytest.mark.parametrize("label", ["tie", "tie (bothbad)", "both_bad", 1.5])
def test_ties_are_dropped(label: Any) -> None:
    row = {"prompt": "Q:", "output_1": "A", "output_2": "B", "preference": label}
    assert dropped(row) == "neither response is the better one"
    equal = {"prompt": "Q:", "response_a": "A", "response_b": "B", "score_a": 2, "score_b": 2.0}
    assert dropped(equal) == "neither response is the better one"
    assert dropped({"prompt": "Q:", "response1": "A", "response2": "B", "overall_preference": 0})


@pytest.mark.parametrize("label", [0, 3, 0.5, True, "second", None])
def test_labels_that_name_neither_response_are_refused(label: Any) -> None:
    row = {"prompt": "Q:", "output_1": "A", "output_2": "B", "preference": label}
    message = error_of(row, "labelled")
    if label is None:
        assert message.endswith("is missing, which says the better of 'output_1' and 'output_2'")
    else:
        assert message.startswith(
            "field 'preference' must name the better response: 1 for 'output_1', 2 for 'output_2'"
        )


def test_a_label_of_conversations_and_of_instructions() -> None:
    arena = {"conversation_a": [ASKED, BAD], "conversation_b": [ASKED, GOOD], "winner": "model_b", "turn": 1}
    assert sides(arena) == ([ASKED], [GOOD], [BAD])
    farm = {"instruction": "Name", "input": "a bird", "output_1": "Robin", "output_2": "Trout", "preference": 1}
    assert sides(farm) == (
        [said("user", "Name\na bird")], [said("assistant", "Robin")], [said("assistant", "Trout")],
    )  # fmt: skip
    steered = {
        "context": [DESK, ASKED],
        "response1": "It will rain.",
        "response2": "No idea.",
        "overall_preference": -1,
    }
    assert sides(steered) == ([DESK, ASKED], [GOOD], [BAD])
    third = {"prompt": "Q:", "response_0": "A", "response_1": "B", "response_2": "C!", "better_response_id": 0}
    assert to_records(from_memory([third], "x"))[1].unused == {"response_2": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Q:", "completion": "A", "label": True}, "the rows are unpaired labels (KTO): one response a row"),
        ({"messages": [ASKED], "response": "A", "label": 0}, "the rows are unpaired labels (KTO): one response a row"),
        ({"prompt": "Q:", "completions": ["a", "b"], "labels": [True, False]}, "labels of single steps"),
        ({"prompt": '["Q"]', "response_a": '["A"]', "response_b": '["B"]', "winner_model_a": 1, "winner_model_b": 0,
          "winner_tie": 0}, "votes between two conversations (lmsys arena)"),
        ({"info": {"post": "P"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}, "comparisons of summaries"),
        ({"prompt": "Q:", "response": "A", "helpfulness": 3, "verbosity": 1},
         "ratings of single responses; --columns reward=helpfulness pairs the responses of each prompt"),
        ({"messages": [ASKED, GOOD]}, "supervised rows without a rejected response; tdpo sft trains on them"),
    ],
)  # fmt: skip
def test_data_without_pairs_is_refused_by_its_kind(row: dict[str, Any], message: str) -> None:
    assert stops(row).startswith("pairs.jsonl: the rows are ") and message in stops(row)


def test_the_conversions_that_refusals_suggest_make_pairs(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rated = [{"prompt": "Q:", "response": text, "helpfulness": n} for n, text in enumerate(("A", "B"))]
    assert texts(rated, RowSpec(columns=parse_columns("reward=helpfulness"))) == [("B", "A")]
    unpaired = [{"prompt": "Q:", "answer": text, "label": n} for n, text in enumerate(("A", "B"))]
    assert "; --columns reward=label,completion=answer pairs the good with the bad" in stops(unpaired[0])
    assert texts(unpaired, RowSpec(columns=parse_columns("reward=label,completion=answer"))) == [("B", "A")]
    arena = {"prompt": '["Q"]', "response_a": '["A"]', "response_b": '["B"]', "winner_model_a": 0, "winner_model_b": 1,
             "winner_tie": 0}  # fmt: skip
    summaries = {"info": {"post": "P"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}
    webgpt = {"question": {"full_text": "Q"}, "answer_0": "a", "answer_1": "b", "score_0": -1.0, "score_1": 1.0}
    asked = [said("user", "Q")], [said("assistant", "b")], [said("assistant", "a")]
    for number, (row, pair) in enumerate(
        ((arena, ("Q", "B", "A")), (summaries, ("P\n\nTL;DR:", "b", "a")), (webgpt, asked))
    ):
        code = stops(row).partition("def function(row): ")[2].rpartition(". Found")[0]
        (tmp_path / f"way_{number}.py").write_text(f"import json\n\ndef function(row):\n    {code}\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        assert sides(row, f"way_{number}:function") == pair


def test_the_prompt_is_the_turns_that_chats_share() -> None:
    chats = {"chosen": [*GREETED, ASKED, GOOD], "rejected": [*GREETED, ASKED, BAD]}
    for prompt in ("Hi", "Describe tomorrow's weather. "):
        assert sides({"prompt": prompt, **chats}) == ([*GREETED, ASKED], [GOOD], [BAD])
    assert sides({"instruction": "Hi", **chats}) == ([*GREETED, ASKED], [GOOD], [BAD])
    assert sides({"prompt": [ASKED], **chats}) == ([*GREETED, ASKED], [GOOD], [BAD]), "the end of them"
    system = {"prompt": [ASKED], "chosen": [DESK, ASKED, GOOD], "rejected": [DESK, ASKED, BAD]}
    assert sides(system) == ([DESK, ASKED], [GOOD], [BAD])
    assert error_of({"prompt": "Another question", **chats}) == (
        "the prompt, the text 'Another question', is none of the 3 turns that the chats 'chosen' and 'rejected' begin "
        "with; without the prompt (--ignore_columns) these turns are taken"
    )
    assert sides({"prompt": "Another question", **chats}, RowSpec(ignore_columns=("prompt",)))[0] == [*GREETED, ASKED]


@pytest.mark.parametrize("name", ["question", "query", "problem", "input", "inputs", "instruction"])
def test_a_question_is_a_users_turn_in_pairs_and_in_supervised_rows(name: str) -> None:
    asked, good, bad = said("user", "Why?"), said("assistant", "A."), said("assistant", "B.")
    pair = ([asked], [good], [bad])
    assert sides({name: "Why?", "chosen": "A.", "rejected": "B."}) == pair
    assert sides({name: "Why?", "chosen": [good], "rejected": [bad]}) == pair
    assert sides({name: "Why?", "chosen": [asked, good], "rejected": [asked, bad]}) == pair
    assert sides({name: "Why?", "response_0": "B.", "response_1": "A.", "better_response_id": 1}) == pair
    assert sides({name: "Why?", "completions": ["B.", "A."], "scores": [1, 2]}) == pair
    assert sides({name: "Why?", "responses": ["A.", "B."], "ranks": [1, 2]}) == pair
    scored = [{name: "Why?", "completion": "A.", "reward": 2}, {name: "Why?", "completion": "B.", "reward": 1}]
    (record,) = to_records(from_memory(scored, "pairs.jsonl"))[0]
    assert (record.prompt, record.chosen, record.rejected) == pair
    answered = from_memory([{name: "Why?", "output": "A."}], "rows")
    (exchange,) = iter_records(answered, "auto", "error", DataReport("rows"), SFT_FORMATS)
    assert (exchange.prompt, exchange.chosen) == pair[:2]
    as_it_stands = RowSpec(columns=(("prompt", name),))
    assert sides({name: "Q:", "chosen": " A", "rejected": " B"}, as_it_stands) == ("Q:", " A", " B")
    assert error_of({name: " ", "chosen": "A.", "rejected": "B."}) == f"field {name!r} is empty"
    assert sides({"prompt": "Q:", "chosen": " A", "rejected": " B"}) == ("Q:", " A", " B")


def test_prompts_under_other_names() -> None:
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello!"},
             {"from": "user", "value": ASKED["content"]}]  # fmt: skip
    for name in ("trajectory", "conversation", "prompt", "conversations"):
        row = {name: turns, "chosen": "It will rain.", "rejected": "No idea."}
        assert sides(row) == ([*GREETED, ASKED], [GOOD], [BAD])
        as_text = {**row, name: json.dumps(turns)}
        if name == "prompt":
            assert sides(as_text) == ([*GREETED, ASKED], [GOOD], [BAD])
    assert sides({"prompt": [ASKED], "chosen": GOOD, "rejected": BAD}) == ([ASKED], [GOOD], [BAD]), "lone messages"


def test_speakers_have_the_names_that_templates_know() -> None:
    asked, good, bad = said("user", "Why?"), said("assistant", "A."), said("assistant", "B.")
    for user, assistant in (("human", "gpt"), ("User", "Assistant"), ("prompter", "bot"), ("human", "chatgpt")):
        row = {"prompt": [said(user, "Why?")], "chosen": [said(assistant, "A.")], "rejected": [said(assistant, "B.")]}
        assert sides(row) == ([asked], [good], [bad])
        turns = [{"from": user, "value": "Why?"}]
        row = {"conversations": turns, "chosen": {"from": assistant, "value": "A."}, "rejected": bad}
        assert sides(row) == ([asked], [good], [bad])
    call = {"name": "f", "arguments": {"x": 1}}
    made = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]}
    of_swift = [asked, said("tool_call", json.dumps(call)), said("tool_response", "8"), good]
    assert sides({"messages": of_swift, "rejected_response": "B."})[0] == [asked, made, said("tool", "8")]
    assert error_of({"prompt": [asked], "chosen": [said("tool_call", "f(1)")], "rejected": [bad]}).startswith(
        "field 'chosen', message 1 is from tool_call and not valid JSON"
    )
    other = said("critic", "B.")
    assert sides({"prompt": [asked], "chosen": [good], "rejected": [other]})[2] == [other], "a template may know it"


def test_ambiguous_turns_are_reported() -> None:
    asked, good, bad = said("user", "Why?"), said("assistant", "A."), said("assistant", "B.")
    rows = [
        {"prompt": [asked, said("assistant", "Because")], "chosen": [good], "rejected": [bad]},
        {"prompt": [asked], "chosen": [good], "rejected": [bad, asked, bad]},
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
    ]
    records, report = to_records(from_memory(rows, "pairs.jsonl"))
    assert records[0].prompt[-1]["content"] == "Because"
    assert report.noticed == {
        "the prompt ends with the assistant's turn, which the responses follow and do not continue": [1],
        "a response holds turns of other roles, which are trained on as a part of it": [2],
    }


def test_an_empty_instruction_leaves_no_line_break() -> None:
    for instruction in ("", None):
        row = {"instruction": instruction, "input": "Name a bird.", "output": ["Robin", "Trout"]}
        assert one(row).prompt == [said("user", "Name a bird.")]
    assert one({"instruction": "Name", "input": "a bird.", "output": ["Robin", "Trout"]}).prompt == [
        said("user", "Name\na bird.")
    ]
    assert error_of({"instruction": "", "input": "", "chosen": "a", "rejected": "b"}) == "field 'instruction' is empty"


@pytest.mark.parametrize(
    ("answers", "left", "note"),
    [
        ([("Garda", 8), ("Fuji", None), ("Como", 5)], [("Garda", "Como")], "an answer left out, whose score is null"),
        ([("Garda", 8), ("Fuji", "N/A"), ("Como", 5)], [("Garda", "Como")],
         "an answer left out, whose score is the text 'N/A'"),
        ([("Garda", 8), ("", 9), ("Como", 5)], [("Garda", "Como")], "an empty answer left out"),
        ([("Garda", 8), (None, 9), ("Como", 5)], [("Garda", "Como")], "an empty answer left out"),
    ],
)  # fmt: skip
def test_only_an_answer_without_a_rating_is_left_out(answers: list[Any], left: list[Any], note: str) -> None:
    listed = {"prompt": "Q:", "completions": [{"response": text, "overall_score": score} for text, score in answers]}
    beside = {"prompt": "Q:", "generations": [text for text, _ in answers], "ratings": [score for _, score in answers]}
    for row in (listed, beside):
        for spec in (RowSpec(), RowSpec(pairs_from="best_worst")):
            records, report = to_records(from_memory([{**row, "prompt": "P:"}, row], "pairs.jsonl"), spec)
            assert [(record.chosen, record.rejected) for record in records] == left * 2
            assert report.noticed == {note: [1, 2]} and f"warning, {note}: rows 1, 2" in report.lines()


def test_a_row_with_too_few_answers_is_dropped_with_the_reason() -> None:
    row = {"prompt": "Q:", "responses": ["a", "b"], "scores": [1, None]}
    assert dropped(row) == "fewer than two answers: an answer left out, whose score is null"
    records, report = to_records(from_memory([row, row], "pairs.jsonl"))
    assert not records and report.dropped == {"fewer than two answers: an answer left out, whose score is null": [1, 2]}


@pytest.mark.parametrize(
    ("text", "score"), [("completion", "reward"), ("response", "score"), ("completions", "scores")]
)
def test_the_best_answer_of_each_prompt_is_learnt_whatever_its_column(text: str, score: str) -> None:
    answers = {"Why?": [(" so", 0.1), (" thus", 0.9)], "When?": [(" now", 0.5)], "Who?": [(" she", 1.0), (" he", 1.0)]}
    listed = [
        {"prompt": prompt, text: [one for one, _ in scored], score: [value for _, value in scored]}
        for prompt, scored in answers.items()
    ]
    single = [
        {"prompt": prompt, text: one, score: value} for prompt, scored in answers.items() for one, value in scored
    ]
    rows, report = from_memory(listed if text == "completions" else single, "rows"), DataReport("rows")
    exchanges = list(iter_records(rows, "auto", "error", report, SFT_FORMATS))
    learnt = [(exchange.prompt, exchange.chosen) for exchange in exchanges]
    assert learnt == [("Why?", " thus"), ("When?", " now"), ("Who?", " she")]
    assert report.format in ("scored", "answers") and not report.dropped


def test_the_error_names_the_format_that_was_recognised() -> None:
    row = {"instruction": "Name a bird.", "chosen": 3, "rejected": "Trout"}
    assert stops(row).splitlines()[-1] == (
        "(--on_bad_row drop leaves such rows out; by their columns they were read as alpaca (instruction with chosen, "
        "rejected or output), --dataset_format names another format)"
    )
    mixed = {"prompt": "Q:", "chosen": [GOOD], "rejected": "No idea."}
    assert "they were read as preference (prompt, chosen, rejected: texts" in stops(mixed)
    assert stops(row, "alpaca").endswith("(--on_bad_row drop leaves such rows out)"), "a format that was asked for"


def test_chats_beside_an_instruction() -> None:
    row = {"instruction": ASKED["content"], "chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]}
    assert sides(row) == ([ASKED], [GOOD], [BAD])
    assert sides({**row, "chosen": [GOOD], "rejected": [BAD]}) == ([ASKED], [GOOD], [BAD])


def test_unused_keys_of_answers_are_reported_once() -> None:
    listed = [{"response": text, "overall_score": n, "model": "m", "critique": "Fine."} for n, text in enumerate("ab")]
    row = {"instruction": "Name a bird.", "completions": listed}
    records, report = to_records(from_memory([row, row], "pairs.jsonl"))
    assert len(records) == 2
    warning = "warning, 'critique' of the answers in 'completions' is text that is not used, first: row 1"
    assert report.lines()[1:] == [warning]
