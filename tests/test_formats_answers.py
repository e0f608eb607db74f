"""Answers with scores or ranks: how many pairs they make, which ones, and the messages about those that make none."""

from __future__ import annotations

import decimal
import gzip
import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest
from test_formats_pairs import ROWS, TEXTS, dropped, error_of, one

from tdpo import UserError
from tdpo.config.row_spec import RowSpec
from tdpo.data.formats import to_records
from tdpo.data.formats.markup import html_to_text
from tdpo.data.sources import from_memory

SCORES = [0.91, 0.13, 0.5, 0.5, 0.33]


def texts(rows: list[Any], spec: RowSpec | str = "auto") -> list[tuple[str, str]]:
    records, _ = to_records(from_memory(rows, "pairs.jsonl"), spec)
    return [(record.chosen, record.rejected) for record in records]


def completions(prompt: str = "The film", scores: list[float] = SCORES) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "completion": f" was {i}", "reward": score} for i, score in enumerate(scores)]


def test_scored_completions_make_all_pairs_that_differ() -> None:
    made = texts(completions())
    assert len(made) == 5 * 4 // 2 - 1, "all but the tie"
    scores = {row["completion"]: row["reward"] for row in completions()}
    assert all(scores[chosen] > scores[rejected] for chosen, rejected in made)
    assert len(set(made)) == len(made)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_scored_completions_in_any_script_and_of_any_length(text: str) -> None:
    scores = {"yes": 1.0, "no": -1.0, "": 0.0}
    rows = [{"prompt": text, "completion": f"{text} {word}", "reward": score} for word, score in scores.items()]
    records, report = to_records(from_memory(rows, "pairs.jsonl"))
    assert report.format == "scored" and {record.prompt for record in records} == {text}
    found = {(record.chosen.removeprefix(text), record.rejected.removeprefix(text)) for record in records}
    assert found == {(" yes", " no"), (" yes", " "), (" ", " no")}


def test_scored_completions_make_the_best_against_the_worst() -> None:
    assert texts(completions(), RowSpec(pairs_from="best_worst")) == [(" was 0", " was 1")]


@pytest.mark.parametrize(("margin", "count"), [(0.0, 9), (0.2, 7), (0.41, 4), (0.78, 1)])
def test_scored_completions_make_pairs_by_a_margin(margin: float, count: int) -> None:
    differences = [abs(a - b) for a, b in itertools.combinations(SCORES, 2)]
    assert sum(d > 0 and d > margin - 1e-9 for d in differences) == count
    assert len(texts(completions(), RowSpec(pairs_from="margin", min_margin=margin))) == count


def test_a_margin_counts_decimals_not_binary_fractions() -> None:
    assert 0.3 - 0.1 < 0.2
    assert len(texts(completions(scores=[0.3, 0.1]), RowSpec(pairs_from="margin", min_margin=0.2))) == 1


def test_completions_of_a_prompt_are_paired_across_the_source() -> None:
    rows = [row for pair in zip(completions("A"), completions("B"), strict=True) for row in pair]
    records, report = to_records(from_memory(rows, "pairs.jsonl"))
    assert (report.read, report.kept, len(records)) == (10, 18, 18)
    assert report.lines()[0] == "pairs.jsonl (scored): 10 rows, 18 pairs of them"
    assert all(rows[record.row - 1]["completion"] == record.chosen for record in records), "the row of the chosen one"


def test_completions_without_a_pair_are_counted() -> None:
    rows = [*completions("A", [1, 1]), *completions("B", [3]), *completions("C", [1, 2])]
    records, report = to_records(from_memory(rows, "pairs.jsonl"))
    assert len(records) == 1
    assert dict(report.dropped) == {"no two scores differ": [1, 2], "the only completion of its prompt": [3]}
    same = [{**row, "completion": " x"} for row in completions("D", [1, 2])]
    assert not texts(same)


def test_scored_completions_may_be_chats_and_numbers_may_be_text() -> None:
    exact = [{"prompt": "p", "completion": c, "reward": decimal.Decimal(s)} for c, s in (("a", "0.1"), ("b", "0.2"))]
    assert texts(exact) == [("b", "a")]
    chat = [{"role": "user", "content": "Hi"}]
    rows = [{"prompt": chat, "response": [{"role": "assistant", "content": c}], "score": s} for c, s in ("a1", "b2")]
    (record,), _ = to_records(from_memory(rows, "pairs.jsonl"))
    assert record.prompt == chat and record.chosen[0]["content"] == "b"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reward": None}, "field 'reward' must be a finite number, found null"),
        ({"reward": float("nan")}, "field 'reward' must be a finite number, found the number nan"),
        ({"reward": 10**400}, "field 'reward' must be a finite number, found a number of 1329 bits"),
        ({"reward": True}, "field 'reward' must be a finite number, found the boolean true"),
        ({"reward": 1 + 2j}, "field 'reward' must be a finite number, found a complex"),
        ({"reward": "N/A"}, "field 'reward' must be a finite number, found the text 'N/A'"),
        ({"completion": " \n"}, "field 'completion' is an empty response"),
        (
            {"completion": ["x"]},
            "field 'completion', message 1 must be a message with 'role' or a turn with 'from', found the text 'x'",
        ),
        ({"prompt": 3}, "field 'prompt' must be a text or a list of chat messages, found the number 3"),
    ],
)
def test_errors_in_a_scored_completion_are_named(change: dict[str, Any], message: str) -> None:
    assert error_of({**completions()[0], **change}, "scored") == message


def test_reviews_grouped_by_their_first_words_make_the_pairs_that_counting_gives(shared: Path) -> None:
    """IMDb reviews as scored completions of their first three words, the rating as reward."""
    with gzip.open(shared / "data/imdb/train.jsonl.gz", "rt", encoding="utf-8") as file:
        reviews = [json.loads(line) for line in itertools.islice(file, 6000)]
    rows, groups = [], {}
    for review in reviews:
        words = review["text"].split(" ", 3)
        if len(words) == 4 and words[3].strip():
            rows.append({"prompt": " ".join(words[:3]), "completion": " " + words[3], "reward": review["rating"]})
            groups.setdefault(rows[-1]["prompt"], []).append((rows[-1]["reward"], rows[-1]["completion"]))
    differing = [
        abs(a - b) for group in groups.values() for (a, x), (b, y) in itertools.combinations(group, 2) if x != y
    ]
    ends = [(max(group, key=lambda x: x[0]), min(group[::-1], key=lambda x: x[0])) for group in groups.values()]
    several = sum(best[0] > worst[0] and best[1] != worst[1] for best, worst in ends)
    assert several > 200
    numbered = from_memory(rows, "imdb")
    for spec, count in (
        (RowSpec(), sum(d > 0 for d in differing)),
        (RowSpec(pairs_from="best_worst"), several),
        (RowSpec(pairs_from="margin", min_margin=5), sum(d >= 5 for d in differing)),
    ):
        records, report = to_records(numbered, spec)
        assert len(records) == report.kept == count
        assert report.read == len(rows)


def test_ultrafeedback_rows_are_chats_and_prompts_stay_texts() -> None:
    row = ROWS["answers"]("Name a bird.")
    assert one(row).prompt == [{"role": "user", "content": "Name a bird."}]
    assert one(row).chosen == [{"role": "assistant", "content": "Name a bird. yes"}]
    beside = {"prompt": "Name a bird.", "responses": [" A cat.", " A jay."], "scores": [1, 5]}
    assert (one(beside).prompt, one(beside).chosen) == ("Name a bird.", " A jay.")
    four = {"instruction": "x", "completions": [{"response": str(i), "overall_score": i // 2} for i in range(6)]}
    assert len(texts([four])) == 6 * 5 // 2 - 3
    best_worst = texts([four], RowSpec(pairs_from="best_worst"))
    assert [chosen[0]["content"] + rejected[0]["content"] for chosen, rejected in best_worst] == ["41"]


def test_answers_to_a_chat_are_the_assistants_turns() -> None:
    chat = [{"role": "user", "content": "Name a bird."}]
    answer = {"role": "assistant", "content": "A jay."}
    row = {"prompt": chat, "responses": ["A cat.", [answer]], "scores": [1, 5]}
    assert (one(row).chosen, one(row).rejected) == ([answer], [{**answer, "content": "A cat."}])
    assert error_of({**row, "prompt": "Name a bird."}) == (
        "texts and chat messages are mixed: prompt text, chosen messages, rejected text"
    )


def test_ranked_lists_prefer_the_lower_rank() -> None:
    nectar = {"prompt": "q", "answers": [{"answer": a, "rank": r} for a, r in (("c", 3.0), ("a", 1.0), ("b", 2.0))]}
    assert sorted(texts([nectar])) == [("a", "b"), ("a", "c"), ("b", "c")]
    in_order = {"prompt": "q", "responses": ["a", "b", "c"]}
    assert texts([in_order], "ranked") == [("a", "b"), ("a", "c"), ("b", "c")], "without ranks the best comes first"
    apart = RowSpec("ranked", pairs_from="margin", min_margin=2)
    assert texts([in_order], apart) == [("a", "c")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "responses": []}, "field 'responses' must be a list of answers, found a list of 0"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "field 'scores' must list 2 numbers, one an answer"),
        (
            {"prompt": "q", "responses": ["a", 3], "scores": [1, 2]},
            "answer 2 must be a text or a list of chat messages",
        ),
        (
            {"prompt": "q", "responses": ["a", "b"]},
            "answer 1 must be an object with its text and score, found the text",
        ),
        ({"prompt": "q", "responses": [{"text": "a"}]}, "answer 1, its score must be a finite number, found null"),
        (
            {"prompt": "q", "responses": [{"score": 1}]},
            "answer 1 must be a text or a list of chat messages, found null",
        ),
        ({"responses": [{"text": "a", "score": 1}]}, "field 'prompt' is missing"),
    ],
)
def test_errors_in_a_list_of_answers_are_named(row: dict[str, Any], message: str) -> None:
    assert message in error_of(row, "answers")


def test_shp_keeps_pairs_of_score_ratio_two() -> None:
    row = ROWS["shp"]("Should I?")
    record = one(row)
    assert record.prompt == "\n\nHuman: Should I?\n\nAssistant:"
    assert (record.chosen, record.rejected) == (" Should I? yes", " Should I? no")
    assert dropped({**row, "score_A": 7}) == "score ratio below 2"
    assert one({**row, "score_A": 6}), "exactly 2 is enough"
    assert one({**row, "score_A": 7}, RowSpec(min_score_ratio=1.5))
    assert dropped({**row, "score_A": 4}, RowSpec(min_score_ratio=4)) == "score ratio below 4"
    assert one({**row, "score_A": 0}) and one({**row, "score_A": -2}), "beyond any ratio"
    assert dropped({**row, "score_A": 12}) == "both comments have one score"
    assert error_of({**row, "labels": 1}) == "field 'labels' and the scores contradict each other"
    assert error_of({**row, "labels": 2}).startswith("field 'labels' must be 1 (A is better) or 0")
    assert one({key: value for key, value in row.items() if key != "labels"}).chosen == " Should I? yes"


def test_stackexchange_posts_become_dialogues_with_their_code() -> None:
    question = "<p>How do I <strong>sort</strong> a list?</p>\n\n<pre><code>x = [3,\n     1]\n</code></pre>"
    answers = [
        {"text": "<p>Use <code>sorted(x)</code> &amp; be happy.</p>", "pm_score": 4, "selected": True},
        {"text": "<ul><li>You</li><li>can't</li></ul>", "pm_score": 0},
        {"text": "<p>Why?</p>", "pm_score": 0},
    ]
    records, report = to_records(from_memory([{"qid": 1, "question": question, "answers": answers}], "se.jsonl"))
    assert records[0].prompt == ("\n\nHuman: How do I sort a list?\n\n<code>x = [3,\n     1]\n</code>\n\nAssistant:")
    assert [(r.chosen, r.rejected) for r in records] == [
        (" Use <code>sorted(x)</code> & be happy.", " - You\n- can't"),
        (" Use <code>sorted(x)</code> & be happy.", " Why?"),
    ]
    assert report.lines()[0] == "se.jsonl (stackexchange): 1 rows, 2 pairs of them"
    tie = {"question": question, "answers": answers[1:]}
    assert dropped(tie) == "no two scores differ"
    assert dropped({"question": question, "answers": [{"text": "<p></p>", "pm_score": 1}]}) == (
        "fewer than two answers: an empty answer left out"
    )
    assert error_of({"question": "<p></p>", "answers": answers}) == "field 'question' is empty"
    assert error_of({"question": "x", "answers": [3]}, "stackexchange").endswith(
        "object with its text and score, found the number 3"
    )


@pytest.mark.parametrize(
    ("html", "text"),
    [
        ("plain &amp; simple, a < b", "plain & simple, a < b"),
        ("<p>a\n  b</p><p>c<br>d</p>", "a b\n\nc\nd"),
        ("<p>a <em>b</em> c</p>", "a b c"),
        ("<pre>x\n  y</pre>z", "x\n  y\n\nz"),
        ("<p>open <code>f(", "open <code>f(</code>"),
        ("</code></p>closed twice", "closed twice"),
        ("<script>alert(1)</script>kept<style>p{}</style>", "kept"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><td>c</td></tr></table>", "a b\nc"),
        ("&#128512;&nbsp;שלום <img alt='no'>!", "😀 שלום !"),
        ("<!-- no -->yes<?php no ?>", "yes"),
        ("", ""),
    ],
)
def test_html_becomes_the_text_a_reader_sees(html: str, text: str) -> None:
    assert html_to_text(html) == text


def test_unclosed_markup_takes_linear_time() -> None:
    start = time.perf_counter()
    for piece in ("<a ", "<!--", "<a href='", "<", "<?x"):
        assert html_to_text(piece * 20_000 + "<p>end</p>").endswith("end")
    assert time.perf_counter() - start < 5


def test_options_belong_to_the_formats_that_have_them() -> None:
    with pytest.raises(UserError, match=r"--min_score_ratio: the format answers has no such option \(shp have\)"):
        to_records(from_memory([ROWS["answers"]("q")], "x"), RowSpec(min_score_ratio=3))
    with pytest.raises(UserError, match=r"--pairs_from: the format hh has no such option"):
        to_records(from_memory([ROWS["hh"]("q")], "x"), RowSpec(pairs_from="all"))
    with pytest.raises(UserError, match="belong together"):
        RowSpec(pairs_from="margin")
    with pytest.raises(UserError, match="belong together"):
        RowSpec(min_margin=1.0)
    with pytest.raises(UserError, match="--min_margin must be at least 0, got -1"):
        RowSpec(pairs_from="margin", min_margin=-1)
    with pytest.raises(UserError, match=r"--pairs_from some: there are all, best_worst, margin"):
        RowSpec(pairs_from="some")  # type: ignore[arg-type]


def test_every_hh_row_is_read_or_counted_as_dropped(shared: Path) -> None:
    from tdpo.data.sources import open_source

    source = open_source(str(shared / "data/hh/harmless-base_test.jsonl.gz"), "train")
    records, report = to_records(source)
    assert (report.read, report.kept, len(records)) == (2312, 2303, 2303)
    assert report.dropped["the two dialogues do not share their prompt"] == [1255, 1689, 1951, 1953, 2037]
    assert report.dropped["a dialogue ends without a response"] == [87, 517, 926, 1104]
