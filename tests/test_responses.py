"""Files of responses: formats, matching by prompt, AlpacaEval's and MT-Bench's files, messages for what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SHARED, write_jsonl

from tdpo.cli import main
from tdpo.errors import UserError
from tdpo.evaluate.responses import Answer, alpaca_eval_rows, match_answers, read_answers, read_questions

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]},
    {"question_id": 82, "category": "math", "turns": ["Add.", "Subtract."], "reference": ["3", "1"]},
    {"question_id": 83, "category": "math", "turns": ["Multiply.", "Divide."]},
]


def read(folder: Path, rows: list[dict[str, Any]], name: str = "r.jsonl", **more: Any) -> list[Answer]:
    write_jsonl(folder / name, rows)
    return read_answers(str(folder / name), **more)


def test_texts_chats_samples_and_columns(tmp_path):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [
        {"prompt": "p", "response": "r"},
        {"prompt": chat, "response": [{"role": "assistant", "content": "Hello"}]},
        {"prompt": "s", "response": ["one", "two"]},
        {"prompt": ["p1", "p2"], "response": ["r1", "r2"]},
        {"prompt": "e", "response": ""},
    ]
    found = read(tmp_path, rows)
    assert [(a.prompts, a.responses) for a in found] == [
        (("p",), ("r",)), ((chat,), ("Hello",)), (("s",), ("one",)), (("s",), ("two",)), (("p1", "p2"), ("r1", "r2")),
        (("e",), ("",)),
    ]  # fmt: skip
    assert [a.location.split(", ", 1)[1] for a in found[1:4]] == ["row 2", "row 3, response 1", "row 3, response 2"]
    assert [a.length for a in found] == [1, 5, 3, 3, 4, 0]
    generated = [{"prompt": "p", "policy": ["x"], "reference": ["y"]}]  # as `tdpo generate --json` writes it
    assert read(tmp_path, generated, column="reference")[0].responses == ("y",)


def test_a_text_and_the_message_that_says_it_are_one_prompt(tmp_path):
    a = read(tmp_path, [{"prompt": "p", "response": "r"}])
    b = read(tmp_path, [{"prompt": [{"content": "p", "role": "user"}], "response": "s"}])
    assert [pair[1].responses for pair in match_answers(a, b, "a", "b").pairs] == [("s",)]


def test_matching_follows_a_and_counts_the_rest(tmp_path):
    a = read(tmp_path, [{"prompt": p, "response": f"a{n}"} for n, p in enumerate(["x", "y", "x", "only a"])])
    b = read(tmp_path, [{"prompt": p, "response": f"b{n}"} for n, p in enumerate(["only b", "y", "x", "x", "b too"])])
    found = match_answers(a, b, "a", "b")
    assert [(p[0].responses[0], p[1].responses[0]) for p in found.pairs] == [("a0", "b2"), ("a2", "b3"), ("a1", "b1")]
    assert (found.unmatched_a, found.unmatched_b) == (1, 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "p"}], "r.jsonl, row 1: field 'response' is missing; there are: prompt"),
        ([{"prompt": "p", "response": "r"}, {"response": "r"}], "row 2: field 'prompt' is missing"),
        ([{"prompt": "p", "response": 3}], "row 1: field 'response' must be a text"),
        ([{"prompt": "p", "response": None}], "row 1: field 'response' must be a text"),
        ([{"prompt": " ", "response": "r"}], "row 1: field 'prompt' is empty"),
        ([{"prompt": ["p", "q"], "response": ["r"]}], "row 1: 2 prompts and 1 responses"),
        ([{"prompt": ["p", "q"], "response": "r"}], "must be a list with a text for each turn"),
        ([{"prompt": "p", "response": [{"role": "user", "content": "x"}]}], "one message of the assistant"),
    ],
)
def test_wrong_rows_are_named(tmp_path, rows, message):
    with pytest.raises(UserError) as raised:
        read(tmp_path, rows)
    assert message in str(raised.value)


def test_files_that_do_not_match_are_refused(tmp_path):
    a, b = (read(tmp_path, [{"prompt": p, "response": "r"}]) for p in "xy")
    with pytest.raises(UserError, match=r"no prompt of a.jsonl is in b.jsonl.*'x' and 'y'"):
        match_answers(a, b, "a.jsonl", "b.jsonl")
    with pytest.raises(UserError, match="row 1: this prompt has 1 responses in a and 2 in b"):
        match_answers(a, [*a, *a], "a", "b")
    mixed = read(tmp_path, [{"prompt": "x", "response": "r"}, {"prompt": ["p", "q"], "response": ["r", "s"]}])
    with pytest.raises(UserError, match=r"row 2: 2 turns, where .* row 1 has 1"):
        match_answers(mixed, mixed, "a", "b")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "p", "response": "r"}\n{"prompt": \n')
    with pytest.raises(UserError, match=r"broken\.jsonl, row 2"):
        read_answers(str(tmp_path / "broken.jsonl"))
    with pytest.raises(UserError, match="no such file"):
        read_answers(str(tmp_path / "absent.jsonl"))


def test_answers_of_mt_bench_in_each_form(tmp_path):
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    questions = read_questions(str(tmp_path / "q.jsonl"))
    fastchat = {"question_id": 82, "answer_id": "x", "model_id": "m", "choices": [{"index": 0, "turns": ["3", "1"]}]}
    rows = [fastchat, {"question_id": "81", "turns": ["a", "b"]}]
    rows.append({"prompt": ["Multiply.", "Divide."], "response": ["c", "d"]})
    found = read(tmp_path, rows, questions=questions)
    assert [(a.prompts, a.responses, a.category) for a in found] == [
        (("Add.", "Subtract."), ("3", "1"), "math"), (("Write.", "Again."), ("a", "b"), "writing"),
        (("Multiply.", "Divide."), ("c", "d"), "math"),
    ]  # fmt: skip
    two = {**fastchat, "choices": [{"turns": ["3", "1"]}, {"turns": ["4", "2"]}]}
    assert [a.responses for a in read(tmp_path, [two], questions=questions)] == [("3", "1"), ("4", "2")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 7, "turns": ["a", "b"]}, "question_id 7 is none of the 3 of --mt_bench"),
        ({"question_id": 81, "turns": ["a"]}, "1 turns, and question 81 has 2"),
        ({"question_id": 81, "choices": []}, "field 'choices' must be a list of objects"),
        ({"question_id": 81, "choices": [{"turns": "a"}]}, "field 'turns' must be a list"),
        ({"question_id": None, "turns": ["a", "b"]}, "field 'question_id' must be a number"),
        ({"prompt": "Add.", "response": "3"}, "none of the questions of --mt_bench"),
    ],
)
def test_wrong_answers_to_mt_bench_are_named(tmp_path, row, message):
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    with pytest.raises(UserError) as raised:
        read(tmp_path, [row], questions=read_questions(str(tmp_path / "q.jsonl")))
    assert str(raised.value).startswith(f"{tmp_path / 'r.jsonl'}, row 1: ") and message in str(raised.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 81, "turns": ["a", "b"]}, "its question_id is there twice"),
        ({"question_id": 84, "turns": ["a"]}, "another number of turns than row 1"),
        ({"question_id": 84}, "field 'turns' must be a list"),
        ({"turns": ["a", "b"]}, "field 'question_id' must be a number"),
    ],
)
def test_wrong_questions_are_named(tmp_path, row, message):
    write_jsonl(tmp_path / "q.jsonl", [*QUESTIONS, row])
    with pytest.raises(UserError, match=f"row 4: {message}"):
        read_questions(str(tmp_path / "q.jsonl"))


@pytest.mark.skipif(not (SHARED / "data/eval/mt_bench_question.jsonl").is_file(), reason="needs the questions")
def test_the_questions_of_mt_bench():
    questions = read_questions(str(SHARED / "data/eval/mt_bench_question.jsonl"))
    assert len(questions) == 80 and {len(question.turns) for question in questions} == {2}
    assert [question.category for question in questions[::10]] == [
        "writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities",
    ]  # fmt: skip


def test_alpaca_eval_is_written_and_read_again(tmp_path, capsys):
    rows = [{"prompt": "p", "response": "r"}, {"prompt": [{"role": "user", "content": "é"}], "response": "s\n"}]
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    words = ["--responses_a", tmp_path / "a.jsonl", "--responses_b", tmp_path / "b.jsonl", "--alpaca_eval"]
    assert main(["judge", *map(str, [*words, tmp_path / "a.json", tmp_path / "b.json", "--name_b", "B"])]) == 0
    assert json.loads((tmp_path / "b.json").read_text()) == [
        {"instruction": "p", "output": "r", "generator": "B", "dataset": "b"},
        {"instruction": "é", "output": "s\n", "generator": "B", "dataset": "b"},
    ]
    again = read_answers(str(tmp_path / "a.json"))
    assert [(a.prompts[0], a.responses[0]) for a in again] == [("p", "r"), ("é", "s\n")]
    with pytest.raises(UserError, match="no place for conversations"):
        alpaca_eval_rows([Answer(("p", "q"), ("r", "s"), "row")], "g", "d")
    assert main(["judge", *map(str, words), str(tmp_path / "x.json"), "--json", "y"]) == 2
    assert "--json has no effect without --endpoint or --reward" in capsys.readouterr().err
