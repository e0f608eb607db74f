"""Judging over HTTP: verdicts by hand, endpoints that fail, a cache that survives it, and a key that is not shown."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import make_tokenizer, write_jsonl
from judge_server import KEY, JudgeServer, judge_server

from tdpo.cli import main
from tdpo.errors import UserError
from tdpo.evaluate import judge_client
from tdpo.evaluate.judge import JudgePrompt, judge_by_reward, judge_pairs, position_figures, read_verdict
from tdpo.evaluate.judge_client import AnswerCache, Completion, EndpointOptions, JudgeClient, retry_after
from tdpo.evaluate.responses import Answer

# A's response and B's: two wins of A, a tie, a win of B.
RESPONSES = [("good good", "bad"), ("good", "poor"), ("good", "so good"), ("no", "good")]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[JudgeServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(judge_client, "FIRST_DELAY", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge_server() as running:
        yield running


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.chdir(tmp_path)  # the default folder of the cache without --json
    paths = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for side, path in enumerate(paths):
        write_jsonl(path, [{"prompt": f"Question {n}?", "response": r[side]} for n, r in enumerate(RESPONSES)])
    return paths


def judge(
    server: JudgeServer, files: tuple[Path, Path], capfd: pytest.CaptureFixture, *more: object, code: int = 0
) -> tuple[dict[str, Any], str]:
    """Runs the command one call at a time; returns the JSON and the output. The key must be in neither, nor on disk."""
    out = files[0].parent / "out.json"
    words = ["--responses_a", files[0], "--responses_b", files[1], "--endpoint", server.url, "--judge_model", "m"]
    words += ["--json", out, "--concurrency", 1, *more]
    assert main(["judge", *map(str, words)]) == code
    output = capfd.readouterr()
    text = output.out + output.err
    assert KEY not in text and "Traceback" not in text
    for path in files[0].parent.rglob("*"):
        assert path.is_dir() or KEY.encode() not in path.read_bytes(), path
    return (json.loads(out.read_text()) if code == 0 else {}), text


def test_figures_by_hand(server, files, capfd):
    prices = ("--price_per_million_input", 2, "--price_per_million_output", 10)
    found, output = judge(server, files, capfd, *prices)
    assert (found["wins"], found["ties"], found["losses"], found["unparsed"], found["pairs"]) == (2, 1, 1, 0, 4)
    assert found["win_rate"] == 2.5 / 4
    assert found["win_rate_ci"] == pytest.approx([0.219427, 0.908101], abs=1e-6)  # z = 1.96, p = 0.625, n = 4
    assert found["win_rate_bootstrap_ci"][0] < 0.625 < found["win_rate_bootstrap_ci"][1]
    assert (found["calls"], found["cached"], found["retries"], len(server.requests)) == (8, 0, 0, 8)
    assert (found["prompt_tokens"], found["completion_tokens"], found["answers_without_usage"]) == (800, 56, 0)
    assert found["cost"] == pytest.approx((800 * 2 + 56 * 10) / 1e6)
    assert (found["position_bias"], found["first_shown_rate"]) == (0, 0.5)
    assert (found["answered_by"], found["judge_model"], found["endpoint"]) == (["judge-v2"], "m", server.url)
    assert "62.5%" in output and "8 calls, 0 from the cache, 800 + 56 tokens, cost 0.00216" in output
    body, headers = server.requests[0]
    assert {k: v for k, v in body.items() if k != "messages"} == {
        "model": "m", "temperature": 0.0, "max_tokens": 2048, "seed": 0,
    }  # fmt: skip
    assert {name.lower(): value for name, value in headers.items()}["authorization"] == f"Bearer {KEY}"


def test_a_second_run_makes_no_call_and_gives_the_same_figures(server, files, capfd):
    first, _ = judge(server, files, capfd)
    again, _ = judge(server, files, capfd)
    assert (again["calls"], again["cached"], len(server.requests)) == (0, 8, 8)
    assert {**again, "calls": 8, "cached": 0} == first
    # Each part of a request is part of its name.
    for change in (("--seed", 1), ("--temperature", 0.5), ("--max_tokens", 9), ("--judge_model", "n")):
        found, _ = judge(server, files, capfd, *change)
        assert (found["calls"], found["cached"]) == (8, 0), change
    found, _ = judge(server, files, capfd, "--extra_body", '{"top_k": 1}', "--seed", "none", "--max_tokens", "none")
    body = server.requests[-1][0]
    assert body["top_k"] == 1 and "seed" not in body and "max_tokens" not in body


def test_a_judge_that_prefers_the_first_gives_ties_and_a_bias_of_one(server, files, capfd):
    server.judge = lambda text: "[[A]]"
    found, _ = judge(server, files, capfd)
    assert (found["win_rate"], found["ties"], found["position_bias"], found["first_shown_rate"]) == (0.5, 4, 1, 1)
    found, _ = judge(server, files, capfd, "--order", "random")
    assert (found["calls"], found["cached"], found["ties"], found["position_bias"]) == (0, 4, 0, None)
    server.judge = lambda text: "[[C]]"
    found, _ = judge(server, files, capfd, "--seed", 1)
    assert (found["win_rate"], found["ties"], found["position_bias"], found["first_shown_rate"]) == (0.5, 4, 0, None)


def test_a_tie_in_one_order_is_a_tie(server, files, capfd):
    server.script = [("answer", "[[A]]"), ("answer", "[[C]]")]
    found, _ = judge(server, files, capfd)
    assert (found["wins"], found["ties"], found["position_bias"]) == (1, 2, 0.25)


@pytest.mark.parametrize(
    "failure",
    [
        ("status", 500), ("status", 503), ("status", 408), ("limited", "0.01"), ("close",), ("cut",),
        ("body", b'{"choices": ['), ("body", b"<html>"), ("body", {"error": {"message": "overloaded"}}), ("body", []),
    ],
)  # fmt: skip
def test_failures_that_pass_are_retried(server, files, capfd, failure):
    server.script = [failure, ("answer",), failure, failure]
    found, _ = judge(server, files, capfd)
    assert (found["calls"], found["retries"], found["cached"], len(server.requests)) == (8, 3, 0, 11)
    assert (found["win_rate"], found["unparsed"]) == (0.625, 0)


def test_a_stalled_answer_is_asked_for_again(server, files, capfd):
    server.script = [("answer",), ("stall",)]
    found, _ = judge(server, files, capfd, "--timeout", 1)
    assert (found["calls"], found["retries"], len(server.requests), found["win_rate"]) == (8, 1, 9, 0.625)
    server.script = [("answer",)] * 3 + [("stall",)]
    _, output = judge(server, files, capfd, "--timeout", 1, "--max_retries", 0, "--seed", 1, code=2)
    assert "row 2, B first): no answer within --timeout 1 seconds" in " ".join(output.split())


def test_retry_after_delays_all_calls(server, files, capfd):
    server.script = [("limited", "0.3")]
    start = time.monotonic()
    judge(server, files, capfd)
    assert time.monotonic() - start > 0.3
    assert retry_after("Fri, 31 Dec 2999 23:59:59 GMT") > 1e9
    server.script = [("limited", "3600")] * 8
    _, output = judge(server, files, capfd, "--seed", 1, code=2)
    assert "all calls failed. The last error" in output and "it asks to wait 3600 seconds" in output
    assert len(server.requests) == 9 + 8


def test_requests_are_spaced(server, files, capfd):
    start = time.monotonic()
    judge(server, files, capfd, "--requests_per_minute", 1200, "--concurrency", 8)
    assert time.monotonic() - start > 7 * 60 / 1200


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (("answer", "I cannot say"), "no verdict"), (("answer", "[[A]] or [[B]]"), "several verdicts: A, B"),
        (("answer", "[[A]]", "length"), "cut at --max_tokens"), (("answer", ""), "no text (finish reason: stop)"),
        (("body", {"choices": []}), "no text (finish reason: no choices)"),
        (("answer", "[A] [[D]] [[a]]"), "no verdict"),
    ],
)  # fmt: skip
def test_answers_without_a_verdict_are_counted_and_listed(server, files, capfd, answer, reason):
    server.script = [("answer",), answer]
    found, output = judge(server, files, capfd)
    assert (found["unparsed"], found["wins"], found["ties"], found["losses"]) == (1, 1, 1, 1)
    assert (found["win_rate"], found["prompts"], found["calls"]) == (0.5, 3, 8)
    listed = {"row": f"{files[0]}, row 1", "order": "B first", "reason": reason}
    assert {k: v for k, v in found["unparsed_answers"][0].items() if k != "answer"} == listed
    assert f"row 1, B first: {reason}" in output.replace("\n", " ")
    again, _ = judge(server, files, capfd)
    assert again["calls"] == (1 if "choices" in reason else 0)  # no answer at all is asked for again


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({"usage": {"prompt_tokens": "12", "completion_tokens": None}}, 0), ({"usage": "many"}, 0),
        ({"model": ["x", KEY]}, 0), ({"usage": {"prompt_tokens": 5, "completion_tokens": 6}}, 11),
    ],
)  # fmt: skip
def test_odd_fields_of_an_answer_are_no_figures(server, files, capfd, changes, tokens):
    said = b'{"message": {"content": "Half a character: \\ud83d [[C]]"}, "finish_reason": {"why": "stop"}}'
    whole = b'{"choices": [' + said + b"], " + json.dumps(changes).encode()[1:]
    server.script = [("body", whole)] * 8
    found, _ = judge(server, files, capfd, "--verdicts", files[0].parent / "v.jsonl")
    assert (found["ties"], found["calls"], found["prompt_tokens"] + found["completion_tokens"]) == (4, 8, 8 * tokens)
    assert found["answers_without_usage"] == (0 if tokens else 8)
    line = json.loads((files[0].parent / "v.jsonl").read_text().splitlines()[0])
    assert line["verdicts"][0]["text"] == "Half a character: ? [[C]]"
    assert judge(server, files, capfd)[0]["cached"] == 8


def test_a_placeholder_for_a_key_stays_in_answers(server, files, capfd, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "A")
    found, _ = judge(server, files, capfd)
    assert (found["win_rate"], found["unparsed"]) == (0.625, 0)


def test_a_cache_that_cannot_be_read_is_named(server, files, capfd):
    cache = files[0].parent / "cache"
    judge(server, files, capfd, "--cache_dir", cache)
    kept = next(cache.glob("*.json"))
    kept.unlink()
    kept.mkdir()
    _, output = judge(server, files, capfd, "--cache_dir", cache, code=2)
    assert "cannot be read: Is a directory" in " ".join(output.split())


def test_nothing_but_nonsense_has_no_rate(server, files, capfd):
    server.judge = lambda text: "banana"
    found, output = judge(server, files, capfd)
    assert (found["win_rate"], found["win_rate_ci"], found["unparsed"], found["pairs"]) == (None, None, 4, 4)
    assert len(found["unparsed_answers"]) == 8 and "unparsed: 5 more answers, which --json lists" in output


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "does not accept the key in OPENAI_API_KEY"),
        (403, "OPENAI_API_KEY"),
        (404, "no model 'm' (--judge_model)"),
    ],
)
def test_statuses_that_no_retry_changes_stop_at_once(server, files, capfd, status, words):
    server.script = [("status", status)] * 9  # the server's message repeats the key
    _, output = judge(server, files, capfd, code=2)
    assert len(server.requests) == 1
    assert words in " ".join(output.split()) and f"{server.url}: status {status}" in output and "***" in output


def test_a_wrong_path_and_a_missing_key(server, files, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # the cache is here without --json
    words = ["--responses_a", str(files[0]), "--responses_b", str(files[1]), "--judge_model", "m"]
    assert main(["judge", *words, "--endpoint", server.url.removesuffix("/v1")]) == 2
    assert "Most base URLs end in /v1" in capfd.readouterr().err
    monkeypatch.delenv("OPENAI_API_KEY")
    server.script = [("status", 401, {"error": {"message": "who are you"}})]
    assert "wants a key: set OPENAI_API_KEY" in judge(server, files, capfd, code=2)[1]
    found, _ = judge(server, files, capfd)  # a local endpoint that wants none
    assert found["calls"] > 0
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY} {KEY}")
    assert "holds characters that no key has" in judge(server, files, capfd, "--seed", 1, code=2)[1]


def test_calls_that_fail_for_good_are_named_and_the_rest_is_kept(server, files, capfd):
    server.script = [("answer",), ("status", 400, {"error": {"message": "too long"}})] + [("answer",)] * 3
    server.script += [("status", 500)] * 3
    _, output = judge(server, files, capfd, "--max_retries", 2, code=2)
    output = " ".join(output.split())
    assert "2 calls failed" in output and "a.jsonl, row 1, B first" in output and "a.jsonl, row 3, B first" in output
    assert "6 of 8 answers are in" in output and "status 500" in output
    found, _ = judge(server, files, capfd)
    assert (found["calls"], found["cached"], found["win_rate"]) == (2, 6, 0.625)


def test_an_endpoint_that_is_not_there(server, files, capfd, tmp_path):
    write_jsonl(files[0], [{"prompt": f"Q{n}", "response": "x"} for n in range(20)])
    write_jsonl(files[1], [{"prompt": f"Q{n}", "response": "y"} for n in range(20)])
    server.script = [("close",)] * 80
    _, output = judge(server, files, capfd, "--max_retries", 1, code=2)
    output = " ".join(output.split())
    assert f"{server.url}: all calls failed, the first 8 tried. The last error" in output and "disconnected" in output
    assert len(server.requests) in (16, 17, 18)  # not 80


@pytest.fixture
def interruptible():
    """A process started in the background of a shell ignores SIGINT; here it raises, as in a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_keeps_the_answers_and_the_next_run_makes_the_missing_calls(server, files, capfd, interruptible):
    server.script = [("answer",)] * 4 + [("call", lambda: os.kill(os.getpid(), signal.SIGINT))]
    _, output = judge(server, files, capfd, code=130)
    assert "interrupted; the answers so far are in" in " ".join(output.split())
    done = len(server.requests)
    assert done in (5, 6)
    found, _ = judge(server, files, capfd)
    assert (found["calls"], found["cached"], len(server.requests), found["win_rate"]) == (8 - done, done, 8, 0.625)


def test_ctrl_c_ends_the_wait_for_an_endpoint(server, files, capfd, interruptible):
    server.script = [("limited", "120")]
    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    start = time.monotonic()
    judge(server, files, capfd, code=130)
    assert time.monotonic() - start < 10 and len(server.requests) == 1


def test_a_killed_run_continues(server, files, capfd):
    """Kills a process of its own after the fifth question, before the answer."""
    words = ["--responses_a", files[0], "--responses_b", files[1], "--endpoint", server.url, "--judge_model", "m"]
    words += ["--json", files[0].parent / "out.json", "--concurrency", 1]
    command = [sys.executable, "-m", "tdpo", "judge", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    server.script = [("answer",)] * 4 + [("call", process.kill)]
    output = process.communicate()[0]
    assert process.returncode == -signal.SIGKILL and KEY.encode() not in output
    kept = files[0].parent / ".tdpo-judge"
    assert len(list(kept.glob("*.json"))) == 4
    # What a kill within a write leaves, and a file that was damaged later.
    (kept / "0.json.partial-1").write_text("{")
    next(kept.glob("*.json")).write_text('{"answer": {"te')
    found, warned = judge(server, files, capfd)
    assert (found["calls"], found["cached"], found["win_rate"]) == (5, 3, 0.625)
    assert "is damaged and will be asked again" in " ".join(warned.split())


def test_a_full_disk_is_reported(server, files, capfd, monkeypatch):
    def full(path: Path, content: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(judge_client, "atomic_write", full)
    _, output = judge(server, files, capfd, code=2)
    assert ".tdpo-judge: cannot be written: No space left on device" in " ".join(output.split())
    assert len(server.requests) == 1


def test_equal_questions_are_asked_once(server, files, capfd):
    write_jsonl(files[1], [json.loads(line) for line in files[0].read_text().splitlines()])
    found, _ = judge(server, files, capfd)  # A is B: both orders are the same question
    assert (found["calls"], found["cached"], found["ties"], found["win_rate"]) == (4, 4, 4, 0.5)


def test_many_calls_at_a_time_give_the_same(server, files, capfd, caplog):
    caplog.set_level(logging.DEBUG)
    rows = [(f"Q{n}", "good" if n % 3 else "bad", "fine") for n in range(30)]
    write_jsonl(files[0], [{"prompt": p, "response": a} for p, a, _ in rows])
    write_jsonl(files[1], [{"prompt": p, "response": b} for p, _, b in reversed(rows)])
    server.script = [("status", 500), ("answer",), ("close",), ("answer",), ("limited", "0.01")]
    found, _ = judge(server, files, capfd, "--concurrency", 8)
    assert (found["wins"], found["ties"], found["losses"]) == (20, 10, 0)
    assert (found["calls"], found["retries"], len(server.requests)) == (60, 3, 63)
    assert KEY not in caplog.text


def test_a_key_that_the_judge_repeats_is_hidden(server, files, capfd):
    server.judge = lambda text: f"The key is {KEY}. [[C]]"
    found, _ = judge(server, files, capfd, "--verdicts", files[0].parent / "v.jsonl")
    line = json.loads((files[0].parent / "v.jsonl").read_text().splitlines()[0])
    assert line["verdicts"][0]["text"] == "The key is ***. [[C]]" and found["ties"] == 4
    assert (line["prompt"], line["response_a"], line["score"]) == ("Question 0?", "good good", 0.5)


def test_exceptions_do_not_carry_the_key(server, tmp_path):
    options = EndpointOptions(endpoint=server.url, judge_model="m", max_retries=0)
    client = JudgeClient(options, AnswerCache(tmp_path))
    for failure in (("status", 401), ("status", 500), ("close",), ("body", KEY.encode())):
        server.script = [failure]
        with pytest.raises(UserError) as raised:
            client.ask({"q": [{"role": "user", "content": "?"}]})
        error: BaseException | None = raised.value
        while error is not None:
            assert KEY not in f"{error} {vars(error)}"
            error = error.__cause__ or error.__context__


def test_own_prompt(server, files, capfd, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text('Q: {prompt}\n1: {response_a}\n2: {response_b}\nAnswer {"like": "this"}.')
    server.judge = lambda text: (
        "[[A]]" if text == 'Q: Question 1?\n1: good\n2: poor\nAnswer {"like": "this"}.' else "[[C]]"
    )
    found, _ = judge(server, files, capfd, "--judge_prompt", path)
    assert (found["ties"], found["unparsed"], found["position_bias"]) == (4, 0, 0.25)
    for text, words in (
        ("{prompt} {response_a}", "{response_b} missing"),
        ("{prompt} {response_a} {response_b} {respons_b}", "unknown placeholder {respons_b}"),
        ("{prompt} {prompt_2} {response_a} {response_b}", "unknown placeholder {prompt_2}"),
    ):
        path.write_text(text)
        _, output = judge(server, files, capfd, "--judge_prompt", path, code=2)
        assert words in " ".join(output.split())
    assert "cannot be read: No such file" in judge(server, files, capfd, "--judge_prompt", tmp_path / "no", code=2)[1]
    assert len(server.requests) == 8


def test_placeholders_inside_responses_stay():
    a, b = Answer(("{response_b}",), ("{prompt}",), "a"), Answer(("{response_b}",), ("B {response_a}",), "b")
    text = JudgePrompt("{prompt}|{response_a}|{response_b}").messages(a, b)[0]["content"]
    assert text == "{response_b}|{prompt}|B {response_a}"


def test_default_prompt_shows_the_turns_in_order():
    a, b = Answer(("p1", "p2"), ("a1", "a2"), "a"), Answer(("p1", "p2"), ("b1", "b2"), "b")
    text = JudgePrompt.default(2).messages(a, b)[0]["content"]
    places = [text.index(f"\n{part}\n") for part in ("p1", "a1", "b1", "p2", "a2", "b2")]
    assert places == sorted(places) and all(f"[[{letter}]]" in text for letter in "ABC")


def test_verdict_words():
    assert read_verdict(Completion("[[B]]. As said: [[B]]")) == ("B", "")
    assert read_verdict(Completion("[[B]]", finish_reason="length"))[0] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--endpoint", "localhost:8000"], "expected a URL"),
        (["--endpoint", "http://u:secret@h/v1", "--judge_model", "m"], "must not hold a user"),
        (["--endpoint", "http://h/v1?key=secret", "--judge_model", "m"], "must not hold a user"),
        (["--endpoint", "http://h/v1"], "--judge_model is missing"),
        (["--endpoint", "http://h/v1", "--judge_model", "m", "--reward", "column:x"], "either --endpoint or --reward"),
        (["--endpoint", "http://h/v1", "--judge_model", "m", "--tie_margin", "1"], "--tie_margin has no effect"),
        (["--endpoint", "http://h/v1", "--judge_model", "m", "--timeout", "0"], "--timeout must be above 0"),
        (["--endpoint", "http://h/v1", "--judge_model", "m", "--price_per_million_input", "1"], "or neither"),
        (
            ["--endpoint", "http://h/v1", "--judge_model", "m", "--reward_tokenizer", "x"],
            "--reward_tokenizer has no effect",
        ),
        (["--reward", "column:x", "--seed", "1"], "--seed has no effect without --endpoint"),
        (["--reward", "column:x", "--order", "random"], "--order has no effect without --endpoint"),
        ([], "a judge is missing"),
    ],
)
def test_options_that_contradict_are_refused(files, capfd, words, message):
    assert main(["judge", "--responses_a", str(files[0]), "--responses_b", str(files[1]), *words]) == 2
    output = capfd.readouterr().err
    assert message in " ".join(output.split()) and "secret" not in output


def test_a_missing_client_is_named(server, files, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert "pip install 'tdpo[judge]'" in judge(server, files, capfd, code=2)[1]


def test_rewards_decide_by_hand():
    def answer(text: str) -> Answer:
        return Answer(("p" + text[0],), (text,), "row")

    pairs = [(answer("xaaa"), answer("xa")), (answer("ya"), answer("yaa")), (answer("zaa"), answer("zaa"))]
    judgements, a, b = judge_by_reward(pairs, lambda rows: [float(len(row["response"])) for row in rows])
    assert [judgement.score for judgement in judgements] == [1, 0, 0.5]
    assert (a.mean, b.mean) == pytest.approx((3, 8 / 3))
    judgements, *_ = judge_by_reward(pairs, lambda rows: [float(len(row["response"])) for row in rows], tie_margin=1)
    assert [judgement.score for judgement in judgements] == [1, 0.5, 0.5]
    assert position_figures(judgements) == {"position_bias": None, "first_shown_rate": None}
    with pytest.raises(UserError, match="row: the reward is nan"):
        judge_by_reward(pairs, lambda rows: [float("nan")] * len(rows))


def test_the_reward_of_a_conversation_is_the_mean_over_its_turns():
    a, b = Answer(("p1", "p2"), ("a1", "a2"), "a"), Answer(("p1", "p2"), ("b1", "b2"), "b")
    seen: list[Any] = []

    def reward(rows: Any) -> list[float]:
        seen.extend(rows)
        return [1.0, 3.0, 2.0, 2.5]

    judgements, mean_a, mean_b = judge_by_reward([(a, b)], reward)
    assert (judgements[0].score, mean_a.mean, mean_b.mean) == (0, 2.0, 2.25)
    said = [{"role": "user", "content": "p1"}, {"role": "assistant", "content": "a1"}]
    assert seen[1] == {"prompt": [*said, {"role": "user", "content": "p2"}], "response": "a2"}


def test_rewards_of_the_command_by_hand(files, capfd, tmp_path, monkeypatch):
    rows = [(1.0, 0.5), (0.0, 0.25), (2.0, 2.0), (3.0, 2.75)]
    for side, path in enumerate(files):
        write_jsonl(path, [{"prompt": f"Q{n}", "response": "x", "score": row[side]} for n, row in enumerate(rows)])
    words = ["judge", "--responses_a", str(files[0]), "--responses_b", str(files[1]), "--reward", "column:score"]
    words += ["--json", str(tmp_path / "out.json")]
    assert main(words) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert [found[name] for name in ("wins", "ties", "losses", "win_rate")] == [2, 1, 1, 0.625]
    assert (found["reward_a"], found["reward_b"], found["calls"], found["cached"]) == (1.5, 1.375, 0, 0)
    assert main([*words, "--tie_margin", "0.25"]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["ties"] == 3
    assert "mean reward: 1.5 / 1.375" in capfd.readouterr().out
    assert not (tmp_path / ".tdpo-judge").exists()


def test_chats_reach_a_reward_function_through_a_template(capfd, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "chat_lengths.py").write_text(
        "seen = []\ndef f(texts):\n    seen.extend(texts)\n    return [len(t) for t in texts]"
    )
    paths = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, second in zip(paths, ("long", "x"), strict=True):
        write_jsonl(path, [{"prompt": ["p1", "p2"], "response": ["r1", second]}])
    words = ["judge", "--responses_a", str(paths[0]), "--responses_b", str(paths[1]), "--reward", "chat_lengths:f"]
    assert main(words) == 2
    assert "no tokenizer is given (tdpo judge: --reward_tokenizer)" in " ".join(capfd.readouterr().err.split())
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }};{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    out = tmp_path / "out.json"
    assert main([*words, "--reward_tokenizer", str(tmp_path / "chat"), "--json", str(out)]) == 0
    found, seen = json.loads(out.read_text()), sys.modules["chat_lengths"].seen
    assert "u:p1;a:r1;u:p2;a:long;" in seen and "u:p1;a:r1;" in seen
    assert (found["win_rate"], found["reward_a"], found["reward_b"]) == (1, (10 + 22) / 2, (10 + 19) / 2)


def test_library_call(server, tmp_path):
    pairs = [(Answer(("q",), ("good",), "a"), Answer(("q",), ("bad",), "b"))]
    client = JudgeClient(EndpointOptions(endpoint=server.url, judge_model="m"), AnswerCache(tmp_path))
    judgements, completions = judge_pairs(pairs, client, JudgePrompt.default())
    assert [judgement.score for judgement in judgements] == [1]
    assert [verdict.a_first for verdict in judgements[0].verdicts] == [True, False]
    assert len(completions) == 2 and client.usage.calls == 2
